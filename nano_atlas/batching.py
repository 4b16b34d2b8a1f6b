"""The policy's side of GRPO: from sampled completions to the update.

The prompt of a group is computed once for all its completions (`SharedPromptAttention`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nano_atlas import distributed
from nano_atlas.config import option
from nano_atlas.episode import EpisodeConfig
from nano_atlas.errors import UserError
from nano_atlas.loss import grpo_loss, step_token_weights, token_stats
from nano_atlas.model import SharedPromptAttention, Transformer
from nano_atlas.optim import MasterAdamW
from nano_atlas.sampler import Rollout


@dataclass(frozen=True)
class UpdateConfig(EpisodeConfig):
    """Options of the update, which also has to know how the completions were sampled."""

    beta: float = option(0.04, "weight of the KL to the reference (nats)", group="GRPO")
    kl: str = option(
        "k3",
        "KL per token: k3 (estimated from the sampled token) or exact (over the vocabulary)",
        ["k3", "exact"],
    )
    clip_low: float = option(0.2, "ratios below 1 - this get no gradient where the advantage is negative")
    clip_high: float = option(0.2, "ratios above 1 + this get no gradient where the advantage is positive")
    normalization: str = option(
        "sequence",
        "weights of tokens: sequence (GRPO), token (DAPO), constant (Dr. GRPO)",
        ["sequence", "token", "constant"],
    )
    skip_zero_variance: bool = option(
        False, "leave groups out of the update whose rewards are all equal (only KL acts on them)"
    )
    mask_truncated: bool = option(
        False, "leave completions out of the update that ran into --teaching-tokens"
    )
    max_logp_diff: float = option(
        0.1, "stop if trainer and sampler differ by more in the mean log-prob of sampled tokens (nats)"
    )
    importance_cap: float = option(
        2.0, "weigh tokens by p_trainer / p_sampler, at most this (0: no weights): truncated IS"
    )
    updates_per_batch: int = option(
        1, "optimizer updates per batch of rollouts; above 1, ratios are clipped against the first"
    )
    tokens_per_batch: int = option(16384, "most tokens in one micro-batch, which is what memory depends on")

    @property
    def longest_completion(self) -> int:
        return self.teaching_tokens


@dataclass
class Sample:
    """One completion of the policy and how much better it was than its group."""

    rollout: Rollout
    advantage: float


@dataclass
class Batch:
    """What one step trains on."""

    groups: list[list[Sample]]
    metrics: dict[str, float]
    episodes: list[dict]  # some of them, for episodes.jsonl
    seconds: float  # that sampling took

    @classmethod
    def from_json(cls, values: dict) -> "Batch":
        def sample(advantage: float, rollout: dict) -> Sample:
            return Sample(Rollout(**{**rollout, "prompt_ids": tuple(rollout["prompt_ids"])}), advantage)

        return cls(
            **{**values, "groups": [[sample(**record) for record in group] for group in values["groups"]]}
        )


@dataclass
class PolicyBatch:
    """A micro-batch of N tokens with M completion tokens among them."""

    input_ids: (
        Tensor  # [N] int64: prompts end to end, then completions end to end, each without its last token
    )
    attention: SharedPromptAttention
    predictors: Tensor  # [M] int64: the place whose hidden state predicts each completion token
    targets: Tensor  # [M] int64: the completion tokens
    rows: Tensor  # [M] int64: the place of each completion token among those of the whole step


def policy_batches(
    samples: Sequence[Sample],
    tokens_per_batch: int,
    device: str | torch.device,
    own: Sequence[int] | None = None,
) -> list[PolicyBatch]:
    """Cut a step's samples into micro-batches of at most `tokens_per_batch` tokens (a single longer completion is its own).

    own: the samples (by index) to take; None takes all.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in range(len(samples)) if own is None else own:
        groups.setdefault(tuple(samples[index].rollout.prompt_ids), []).append(index)
    batches: list[list[tuple[tuple[int, ...], list[int]]]] = [[]]
    room = tokens_per_batch
    for prompt, members in sorted(
        groups.items(), key=lambda group: len(group[0])
    ):  # prompts of similar length together
        for index in sorted(members, key=lambda i: len(samples[i].rollout.completion_ids)):
            size = len(samples[index].rollout.completion_ids) - 1
            is_new = not batches[-1] or batches[-1][-1][0] != prompt
            if batches[-1] and size + is_new * len(prompt) > room:
                batches.append([])
                room, is_new = tokens_per_batch, True
            if is_new:
                batches[-1].append((prompt, []))
            batches[-1][-1][1].append(index)
            room -= size + is_new * len(prompt)
    starts = [0]
    for sample in samples:
        starts.append(starts[-1] + len(sample.rollout.completion_ids))
    return [_policy_batch(samples, batch, starts, device) for batch in batches if batch]


def _policy_batch(
    samples: Sequence[Sample], batch: list, starts: Sequence[int], device: str | torch.device
) -> PolicyBatch:
    prompts = [prompt for prompt, _ in batch]
    members = [(place, index) for place, (_, indices) in enumerate(batch) for index in indices]
    completions = [samples[index].rollout.completion_ids for _, index in members]
    prompt_ends = torch.tensor([len(prompt) for prompt in prompts]).cumsum(0).tolist()
    predictors: list[int] = []
    rows: list[int] = []
    offset = prompt_ends[-1]
    for (place, index), completion in zip(members, completions):
        predictors += [prompt_ends[place] - 1, *range(offset, offset + len(completion) - 1)]
        rows += range(starts[index], starts[index + 1])
        offset += len(completion) - 1
    ids = [token for prompt in prompts for token in prompt] + [
        token for completion in completions for token in completion[:-1]
    ]
    return PolicyBatch(
        input_ids=torch.tensor(ids, device=device),
        attention=SharedPromptAttention(
            [len(prompt) for prompt in prompts],
            [len(c) - 1 for c in completions],
            [place for place, _ in members],
            device,
        ),
        predictors=torch.tensor(predictors, device=device),
        targets=torch.tensor([token for completion in completions for token in completion], device=device),
        rows=torch.tensor(rows, device=device),
    )


def predicting_states(model: Transformer, batch: PolicyBatch) -> Tensor:
    """The hidden states `[M, D]` that predict the batch's completion tokens."""
    return model(batch.input_ids, batch.attention.positions, batch.attention).index_select(
        0, batch.predictors
    )


@torch.no_grad()
def completion_logprobs(
    model: Transformer,
    samples: Sequence[Sample],
    tokens_per_batch: int,
    temperature: float,
    own: Sequence[int] | None = None,
) -> Tensor:
    """Log-probs `[M_step]` float32 of all completion tokens of a step, at the sampling temperature; 0 where not of `own`."""
    device = model.head_weight.device
    logprobs = torch.zeros(sum(len(sample.rollout.completion_ids) for sample in samples), device=device)
    for batch in policy_batches(samples, tokens_per_batch, device, own):
        hidden = predicting_states(model, batch)
        logprobs[batch.rows] = token_stats(
            hidden, model.head_weight, batch.targets, temperature=temperature
        ).logprobs
    return logprobs


def update(
    config: UpdateConfig, policy: Transformer, reference: Transformer | None, optimizer: MasterAdamW, samples: Sequence[Sample],
    rate: float, staleness: int = 0,
) -> dict[str, float]:  # fmt: skip
    """All updates on one step's samples; returns the metrics of the first (they describe the sampled batch), but of
    `clip_ratio` and `grad_norm` the mean over the updates.

    All ranks are given all samples; each computes its share, and statistics of all tokens come back to all.

    Sampler and trainer never compute quite the same log-probs (kernels, precision), and differ for good reason where samples are
    `staleness` > 0 updates old. So each token's policy term is weighed by p_trainer / p_sampler, truncated at
    `importance_cap` (Ionides 2008; for LLMs, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training"). Raises UserError when fresh samples' log-probs are not those that the sampler reported.
    """
    device = policy.head_weight.device
    lengths = [len(sample.rollout.completion_ids) for sample in samples]
    per_token = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(lengths))
    weights = torch.tensor(step_token_weights(lengths, config.normalization, config.longest_completion))[
        per_token
    ].to(device)
    advantages = torch.tensor([sample.advantage for sample in samples])[per_token].to(device)
    sampled = torch.tensor(
        [logprob for sample in samples for logprob in sample.rollout.logprobs], device=device
    )
    own = distributed.shares(lengths)[distributed.rank()]
    is_k3 = reference is not None and config.kl == "k3"
    ref_logprobs = old_logprobs = None
    if is_k3:
        ref_logprobs = completion_logprobs(
            reference, samples, config.tokens_per_batch, config.teacher_temperature, own
        ).to(device)
    metrics: dict[str, float] = {}
    importance = torch.ones_like(
        sampled
    )  # a factor of exactly 1 where the log-probs are equal; of this rank's tokens
    for update_index in range(config.updates_per_batch):
        parts = {
            name: torch.zeros(sum(lengths), device=device)
            for name in ("logprobs", "entropy", "kl", "is_clipped", "importance")
        }
        loss_sum = torch.zeros((), device=device)
        batches = policy_batches(samples, config.tokens_per_batch, device, own)
        filler = batches[0] if batches else policy_batches(samples, config.tokens_per_batch, device, [0])[0]
        for batch, is_own in distributed.in_step(batches, filler):
            exact = {}
            if reference is not None and config.kl == "exact":
                with torch.no_grad():
                    exact = {
                        "ref_hidden": predicting_states(reference, batch),
                        "ref_weight": reference.head_weight,
                    }
            hidden = predicting_states(policy, batch)
            if (
                config.importance_cap and update_index == 0
            ):  # costs the head once more, little beside the model and its gradient
                now = token_stats(
                    hidden.detach(), policy.head_weight, batch.targets, temperature=config.teacher_temperature
                )
                importance[batch.rows] = (
                    (now.logprobs - sampled[batch.rows]).exp().clamp(max=config.importance_cap)
                )
            loss, stats = grpo_loss(
                hidden, policy.head_weight, batch.targets, weights[batch.rows] * is_own, advantages[batch.rows],
                importance=importance[batch.rows],
                old_logprobs=None if old_logprobs is None else old_logprobs[batch.rows],
                ref_logprobs=None if ref_logprobs is None else ref_logprobs[batch.rows],
                beta=config.beta if reference is not None else 0.0, clip_low=config.clip_low, clip_high=config.clip_high,
                temperature=config.teacher_temperature, kl=config.kl, **exact,
            )  # fmt: skip
            loss.backward()
            loss_sum += loss.detach()
            for name, values in parts.items():
                value = importance[batch.rows] if name == "importance" else getattr(stats, name)
                if value is not None and is_own:
                    values[batch.rows] = value.to(values.dtype)
        for values in (loss_sum, *parts.values()):
            distributed.sum_over_ranks(values)
        if update_index == 0:
            difference = (parts["logprobs"] - sampled).abs()
            metrics = {
                "loss": loss_sum.item(),
                "kl": parts["kl"].mean().item(),
                "entropy": parts["entropy"].mean().item(),
                "sampling/logp_diff_mean": difference.mean().item(),
                "sampling/logp_diff_max": difference.max().item(),
                "sampling/importance_mean": parts["importance"].mean().item(),
                "sampling/staleness": staleness,
                "sampling/importance_capped": (parts["importance"] == config.importance_cap)
                .float()
                .mean()
                .item(),
            }
            if not staleness and not metrics["sampling/logp_diff_mean"] <= config.max_logp_diff:
                raise UserError(
                    f"trainer and sampler disagree about the sampled tokens by {metrics['sampling/logp_diff_mean']:.3f} nats on "
                    f"average (--max-logp-diff {config.max_logp_diff}): the sampler's weights or prompts are not the trainer's"
                )
            old_logprobs = parts["logprobs"] if config.updates_per_batch > 1 else None
        metrics["clip_ratio"] = (
            metrics.get("clip_ratio", 0.0) + parts["is_clipped"].mean().item() / config.updates_per_batch
        )
        metrics["grad_norm"] = metrics.get("grad_norm", 0.0) + optimizer.step(rate) / config.updates_per_batch
    return metrics


def usable(config: UpdateConfig, groups: Sequence[Sequence[Sample]]) -> list[Sample]:
    """The samples that take part in the update."""
    return [
        sample for group in groups for sample in group
        if not (config.skip_zero_variance and not any(s.advantage for s in group))
        and not (config.mask_truncated and sample.rollout.finish_reason == "length")
    ]  # fmt: skip


@torch.no_grad()
def mix_reference(reference: Transformer, policy: Transformer, share: float) -> None:
    old = dict(reference.named_parameters())
    for name, new in distributed.full_parameters(policy):
        old[name].lerp_(new.to(old[name].device), share)
