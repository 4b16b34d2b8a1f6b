"""Is it right? The section `correct` of gpu.py: what a device computes beside the plain formula in float64
on the CPU.

The plain side runs every sequence by itself, with attention, softmax, losses and AdamW written out; only
the layers' matrices are shared with what is tested. An error is norm(found - right) / norm(right). Weights
are rounded to the dtype first, so that the errors are those of the computation alone.
"""

import copy
import math
import os
from dataclasses import dataclass
from functools import cache, cached_property
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import train_grpo
import train_sft
from benchmarks.gpu_probe import Probe, compared, random_model
from nano_atlas.batching import Sample, completion_logprobs
from nano_atlas.data import Example, count_targets
from nano_atlas.gpu import compile_layers
from nano_atlas.loss import fused_token_loss
from nano_atlas.model import ModelConfig, PackedAttention, Transformer
from nano_atlas.optim import MasterAdamW
from nano_atlas.sampler import Generation, Request, Rollout, Sampler

SMALL = ModelConfig("qwen3", 300, 64, 96, 2, 4, 2, 16, tie_word_embeddings=True, qk_norm=True)
SHAPES = {"cpu": SMALL, "cuda": ModelConfig("qwen3", 8192, 256, 512, 3, 8, 4, 64, qk_norm=True)}
SCALE = {"cpu": 1, "cuda": 10}  # of the lengths: on a GPU they cross blocks of 128 tokens
DOCUMENTS, PROMPTS, COMPLETIONS = (9, 17, 4), (14, 8), (13, 5, 2)  # tokens; each prompt has these completions
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BOUNDS = {"float32": 1e-4, "bfloat16": 6e-2}
MOVES = 1e-3  # of the weights in one step, which is so small that float32 weights round it
KL = 8  # times the bound: a small difference of log-probs
LOGPROBS = 4  # part of the bound: they are numbers far from zero with small differences
RATE = 1e-4


# ---------------------------------------------------------------------------------------- the right answers


def plain_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within one document."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def plain_logits(model: Transformer, ids: list[int]) -> Tensor:
    """[T, V]"""
    return model(torch.tensor(ids), torch.arange(len(ids)), plain_attention) @ model.head_weight.T


def plain_logprobs(model: Transformer, prompt, completion) -> Tensor:
    """Of each token of the completion, [T]."""
    logits = plain_logits(model, [*prompt, *completion][:-1])[len(prompt) - 1 :]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


def gradients(model: Transformer) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@dataclass
class Case:
    """Models, inputs and right answers of one dtype."""

    device: str
    name: str

    def __post_init__(self):
        self.dtype, self.bound = DTYPES[self.name], BOUNDS[self.name]
        shape, scale = SHAPES[self.device], SCALE[self.device]
        self.model = random_model(shape, "cpu", self.dtype)
        self.reference = copy.deepcopy(self.model)
        noise = random_model(shape, "cpu", self.dtype, seed=1)
        with torch.no_grad():  # near the policy, as a reference is
            for ours, other in zip(self.reference.parameters(), noise.parameters()):
                ours.lerp_(other, 0.01)
        generator = torch.Generator().manual_seed(2)

        def draw(tokens: int) -> list[int]:
            return torch.randint(shape.vocab_size, (tokens * scale,), generator=generator).tolist()

        self.documents = [draw(tokens) for tokens in DOCUMENTS]
        self.examples = [Example(ids, [i % 3 > 0 for i in range(len(ids))]) for ids in self.documents]
        self.prompts = [draw(tokens) for tokens in PROMPTS]
        self.plain, self.plain_reference = (
            copy.deepcopy(model).double() for model in (self.model, self.reference)
        )
        self.samples = []
        for index, prompt in enumerate(self.prompts):
            for number, tokens in enumerate(COMPLETIONS):
                completion = draw(tokens)
                with torch.no_grad():
                    right = plain_logprobs(self.plain, prompt, completion)
                noise = 0.02 * torch.randn(len(right), generator=generator)
                rollout = Rollout(tuple(prompt), completion, (right + noise).tolist(), "length", 0)
                self.samples.append(Sample(rollout, 1.0 - 0.7 * number + 0.2 * index))
        self.config = train_grpo.Config(
            reward="exact",
            temperature=(1.0, 1.0),
            answer_tokens=COMPLETIONS[0] * scale,
            tokens_per_batch=40 * scale,
            max_logp_diff=math.inf,
        )

    @torch.no_grad()
    def logits(self) -> Tensor:
        return torch.cat([plain_logits(self.plain, ids) for ids in self.documents])

    @cached_property
    def sft(self) -> tuple[Tensor, Tensor]:
        """Loss and gradients."""
        self.plain.zero_grad()
        targets, losses = count_targets(self.examples), []
        for example in self.examples:
            logits = plain_logits(self.plain, example.input_ids[:-1])
            nll = F.cross_entropy(logits, torch.tensor(example.input_ids[1:]), reduction="none")
            losses.append((nll * torch.tensor(example.is_target[1:])).sum() / targets)
        sum(losses).backward()
        return sum(losses).detach(), gradients(self.plain)

    @cached_property
    def grpo(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, mean KL and gradients of the first update: the ratio is 1, so nothing is clipped."""
        self.plain.zero_grad()
        losses, kls = [], []
        for sample in self.samples:
            rollout = sample.rollout
            ids = rollout.prompt_ids, rollout.completion_ids
            logprobs = plain_logprobs(self.plain, *ids)
            with torch.no_grad():
                distance = plain_logprobs(self.plain_reference, *ids)
                sampled = torch.tensor(rollout.logprobs, dtype=torch.float64)
                importance = (logprobs - sampled).exp().clamp(max=2.0)
            distance = distance - logprobs
            kls.append(distance.exp() - 1 - distance)
            ratio = (logprobs - logprobs.detach()).exp()
            loss = -importance * ratio * sample.advantage + self.config.beta * kls[-1]
            losses.append(loss.mean() / len(self.samples))
        sum(losses).backward()
        return sum(losses).detach(), torch.cat(kls).detach().mean(), gradients(self.plain)


# ------------------------------------------------------------------------------------------ what is tested


class KeepingAdamW(MasterAdamW):
    """Keeps the gradients it is given, and compares its step with torch's AdamW in float64."""

    def step(self, rate: float) -> float:
        kept = self.gradient_sums or {name: p.grad for name, p in self.parameters.items()}
        kept = {name: kept[name].detach().to("cpu", torch.float64, copy=True) for name in self.parameters}
        self.gradients = torch.cat([gradient.flatten() for gradient in kept.values()])
        before = {name: m.detach().to("cpu", torch.float64, copy=True) for name, m in self.masters.items()}
        norm = super().step(rate)
        scale = min(1.0, self.clip_norm / self.gradients.norm().item())
        right, moved = [], []
        for name, weight in before.items():
            after = weight.clone().requires_grad_()
            after.grad = kept[name] * scale
            settings = next(
                group
                for group in self.adamw.param_groups
                if any(p is self.masters[name] for p in group["params"])
            )
            torch.optim.AdamW([after], rate, settings["betas"], weight_decay=settings["weight_decay"]).step()
            right.append((after.detach() - weight).flatten())
            moved.append((self.masters[name].detach().cpu().double() - weight).flatten())
        self.moves = torch.cat(moved), torch.cat(right)
        return norm


def on_device(case: Case, model: Transformer, mode: str) -> Transformer:
    model = copy.deepcopy(model).to(case.device)
    model.recompute_activations = "checkpointed" in mode
    return compile_layers(model) if "compiled" in mode else model


def check_logits(case: Case, mode: str) -> dict:
    model = on_device(case, case.model, mode)
    attention = PackedAttention([len(ids) for ids in case.documents], case.device)
    ids = torch.tensor(sum(case.documents, []), device=case.device)
    with torch.no_grad():
        logits = model(ids, attention.positions, attention) @ model.head_weight.T
    return compared({"logits": (logits, case.logits())}, case.bound)


def check_loss(case: Case, mode: str) -> dict:
    shape, tokens = SHAPES[case.device], 24 * SCALE[case.device] + 3
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator).to(case.dtype)
    head = (torch.randn(shape.vocab_size, shape.hidden_size, generator=generator) / 8).to(case.dtype)
    targets = torch.randint(shape.vocab_size, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator) / tokens
    right = [x.double().requires_grad_() for x in (hidden, head)]
    nll = F.cross_entropy(right[0] @ right[1].T, targets, reduction="none")
    loss = (nll * weights).sum()
    loss.backward()
    ours = [x.to(case.device).requires_grad_() for x in (hidden, head)]
    negative = lambda logprobs, *_: -logprobs
    # several chunks, the last of them shorter, because sums over chunks are kept apart
    with mock.patch("nano_atlas.loss.MAX_CHUNK_TOKENS", tokens // 2):
        found, _ = fused_token_loss(*ours, targets.to(case.device), negative, weights.to(case.device))
    found.backward()
    grads = {name: (a.grad, b.grad) for name, a, b in zip(("d hidden", "d head"), ours, right)}
    return compared({"loss": (found, loss)} | grads, case.bound)


def check_sft(case: Case, mode: str) -> dict:
    model = on_device(case, case.model, mode)
    optimizer, loss = KeepingAdamW(model), torch.zeros((), device=case.device)
    for part in train_sft.losses(model, case.examples, 20 * SCALE[case.device]):
        part.backward()
        loss += part.detach()
    optimizer.step(RATE)
    right_loss, right = case.sft
    parts = {
        "loss": (loss, right_loss),
        "gradients": (optimizer.gradients, right),
        "weights": optimizer.moves,
    }
    return compared(parts, case.bound, weights=MOVES)


def check_grpo(case: Case, mode: str) -> dict:
    model, reference = (on_device(case, which, mode) for which in (case.model, case.reference))
    optimizer = KeepingAdamW(model, **train_grpo.ADAMW)
    metrics = train_grpo.update(case.config, model, reference, optimizer, case.samples, RATE)
    loss, kl, right = case.grpo
    parts = {"loss": (metrics["loss"], loss), "kl": (metrics["kl"], kl)}
    parts |= {"gradients": (optimizer.gradients, right), "weights": optimizer.moves}
    return compared(parts, case.bound, kl=KL * case.bound, weights=MOVES)


def check_sampler(case: Case, mode: str, steps_per_sync: int) -> dict:
    """Log-probs of draws beside the training forward and the plain one; greedy tokens beside the best."""
    model, parts = on_device(case, case.model, mode), {}
    sampler = Sampler(model, max_rows=4, steps_per_sync=steps_per_sync)  # fewer rows than samples
    for temperature, name in (1.0, "drawn"), (0.0, "greedy"):
        params = [Generation(tokens, temperature) for tokens in (11 * SCALE[case.device], 3)]
        requests = [Request(tuple(p), g, 3, seed=i) for i, (p, g) in enumerate(zip(case.prompts, params))]
        rollouts = sum(sampler.generate(requests), [])
        logprobs = torch.tensor(sum((rollout.logprobs for rollout in rollouts), []))
        training = completion_logprobs(
            model, [Sample(r, 0.0) for r in rollouts], 60 * SCALE[case.device], 1.0
        )
        with torch.no_grad():
            right = [plain_logprobs(case.plain, r.prompt_ids, r.completion_ids) for r in rollouts]
            parts[f"{name}: training"] = logprobs, training
            parts[f"{name}: log-probs"] = logprobs, torch.cat(right)
            if name == "greedy":
                best = [best_logprobs(case.plain, r) for r in rollouts]
                parts["greedy: tokens"] = torch.cat(right), torch.cat(best)
    return compared(parts, case.bound / LOGPROBS)


def best_logprobs(model: Transformer, rollout: Rollout) -> Tensor:
    ids = [*rollout.prompt_ids, *rollout.completion_ids][:-1]
    return plain_logits(model, ids)[len(rollout.prompt_ids) - 1 :].log_softmax(-1).amax(-1)


def correct(probe: Probe) -> None:
    case = cache(lambda name: Case(probe.device, name))

    def check(function, name: str, mode: str, *arguments) -> dict:
        # 0 also keeps the sampler from recording its steps
        with mock.patch.dict(os.environ, NANO_ATLAS_COMPILE="1" if "compiled" in mode else "0"):
            return function(case(name), mode, *arguments)

    steps = {"logits": check_logits, "loss": check_loss, "SFT step": check_sft, "GRPO step": check_grpo}
    modes = "eager", "compiled", "checkpointed", "compiled, checkpointed"
    for mode in [mode for mode in modes if not (probe.is_small and "compiled" in mode)]:
        is_short = "checkpointed" in mode
        for name in DTYPES:
            for title, function in steps.items():
                if "step" in title or not is_short:
                    probe.measure(f"{title}, {name}, {mode}", check, function, name, mode)
            for count in () if is_short else (1, 8):
                title = f"sampler, {count} steps per look, {name}, {mode}"
                probe.measure(title, check, check_sampler, name, mode, count)
