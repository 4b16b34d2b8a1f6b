"""The embedded sampler: generation with the trainer's own live weights, no copy and no second process.

1. Requests become samples in a waiting line; those with the same prompt stand together.
2. Samples enter free rows of the batch. A prompt runs through the model once (`RecordingAttention`), however many samples share
   it. Its keys and values are copied to each row, except those of its last token, which is the first input of decoding.
3. A decoding step feeds one token per row, attends to the row's cache (`CachedAttention`), and draws the next (`draw_tokens`).
4. Finished rows leave at once, the last rows move into the gaps, waiting samples enter.

What a request yields depends on the weights, its prompt, parameters and seed and the sample's index, not on the batch around it:
each sample inverts the cumulative distribution at its own uniform numbers (Philox keyed by seed and index). Only float noise is
left: products round differently at another batch size, which can flip a draw within about 1e-6 of a token's border.

Simplified against vLLM (Kwon et al. 2023, arXiv:2309.06180): the cache is one block of rows as long as the longest request, not
pages; prefixes are shared in computation, not in memory; no row is ever pre-empted.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nano_atlas.distributed import copy_parameters
from nano_atlas.errors import UserError
from nano_atlas.model import ModelConfig, PackedAttention, Transformer

PREFILL_TOKENS = 8192  # prompt tokens that go through the model at once (a longer prompt goes alone)


@dataclass(frozen=True)
class SamplingParams:
    """How to draw the tokens of one sample."""

    max_tokens: int  # of the completion, the stop token included
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # nucleus (Holtzman et al. 2020, arXiv:1904.09751): fewest tokens with this mass
    stop_token_ids: tuple[int, ...] = ()  # the sample ends with, and includes, the first of these


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    n: int = 1  # samples
    seed: int = 0


@dataclass
class Rollout:
    """One sample: exactly the ids the model saw and drew.

    `logprobs` are in nats, float32: the log-softmax of logits / temperature (at temperature 0: of the logits), before top_p.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: list[int]  # includes the stop token if finish_reason is "stop"
    logprobs: list[float]
    finish_reason: str  # "stop" | "length"
    weight_version: int  # of the weights that drew it


def draw_tokens(
    logits: Tensor,
    uniforms: Tensor,
    temperature: Tensor,
    is_greedy: Tensor | None = None,
    top_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token per row by inverse-CDF sampling: `(tokens [R] int64, logprobs [R] float32)`.

    logits `[R, V]` float32; uniforms float64 in [0, 1), temperature float32 > 0, is_greedy bool (rows that take the likeliest
    token; None: no row), top_p float32 (None: 1 everywhere), all `[R, 1]`. Log-probs are those of logits / temperature.
    """
    all_logprobs = F.log_softmax(logits / temperature, dim=-1)
    probs = all_logprobs.exp()
    if top_p is not None:
        # Tokens stay in vocabulary order, so a row with top_p = 1 draws the same token whether or not another row truncates.
        # A token as likely as the last one of the nucleus stays in.
        sorted_probs = probs.sort(dim=-1, descending=True).values
        mass_before = sorted_probs.cumsum(-1) - sorted_probs
        threshold = sorted_probs.masked_fill(mass_before >= top_p, torch.inf).amin(-1, keepdim=True)
        probs = probs.masked_fill((probs < threshold) & (top_p < 1), 0)
    # float64: rounding must not lead to tokens of probability zero. Only NaN logits go out of range; the caller reports them.
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    if is_greedy is not None:
        tokens = torch.where(is_greedy, logits.argmax(-1, keepdim=True), tokens)
    return tokens.squeeze(1), all_logprobs.gather(1, tokens).squeeze(1)


class RecordingAttention(PackedAttention):
    """Packed causal attention that keeps every layer's keys and values: `kv [L, 2, N, H_kv, D_head]`."""

    def __init__(self, lengths: Sequence[int], config: ModelConfig, dtype: torch.dtype, device: torch.device):
        super().__init__(lengths, device)
        shape = (config.num_hidden_layers, 2, sum(lengths), config.num_key_value_heads, config.head_dim)
        self.kv = torch.empty(shape, dtype=dtype, device=device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.kv[layer, 0], self.kv[layer, 1] = k, v
        return super().__call__(layer, q, k, v)


class CachedAttention:
    """Attention of one new token per row to the row's cached keys and values: `kv [L, 2, rows, H_kv, S, D_head]`.

    Queries of the heads that share a key head go to the kernel as if they were successive positions of it, so grouped-query
    attention repeats nothing. Reads stop at the longest row's last token.
    """

    def __init__(self, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device):
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        # Zeros, not `empty`: a masked slot still takes part in 0 * value and must be finite.
        self.kv = torch.zeros(layers, 2, rows, heads, slots, config.head_dim, dtype=dtype, device=device)
        self.flat = self.kv.view(2 * layers, rows * heads * slots, -1).unbind()  # k, v of each layer
        self.first_slots = torch.arange(rows * heads, device=device).view(rows, heads) * slots
        self.columns = torch.arange(slots, device=device)

    def store(self, rows: slice, kv: Tensor) -> None:
        """The keys and values of a prefix, `[L, 2, T, H_kv, D_head]`, to the start of each of these rows."""
        self.kv[:, :, rows, :, : kv.shape[2]] = kv.transpose(2, 3)[:, :, None]

    def move(self, source: int, target: int, length: int) -> None:
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]

    def begin_step(self, positions: Tensor, longest: int) -> None:
        """positions `[R]`: the slot that each of the first R rows fills now and attends up to; longest: their maximum + 1."""
        rows = len(positions)
        self.targets = (self.first_slots[:rows] + positions[:, None]).flatten()
        mask = torch.zeros(rows, longest, dtype=self.kv.dtype, device=self.kv.device)
        mask.masked_fill_(self.columns[:longest] > positions[:, None], -torch.inf)
        self.mask = mask[:, None, None]  # [R, 1, 1, longest], added to the scores
        # keys and values of each layer: 2 L times [R, H_kv, longest, D_head]
        self.views = self.kv[:, :, :rows, :, :longest].flatten(0, 1).unbind()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.flat[2 * layer].index_copy_(0, self.targets, k.flatten(0, 1))
        self.flat[2 * layer + 1].index_copy_(0, self.targets, v.flatten(0, 1))
        keys, values = self.views[2 * layer], self.views[2 * layer + 1]
        grouped = q.unflatten(1, (k.shape[1], -1))  # [R, H_kv, H / H_kv, D_head]
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask).flatten(1, 2)


class Sample(NamedTuple):
    """One sample that waits or runs; its rollout is the `index`-th of the `request_index`-th request."""

    request_index: int
    index: int
    request: Request

    @property
    def longest(self) -> int:  # tokens it may come to, the prompt included
        return len(self.request.prompt_ids) + self.request.params.max_tokens


class Sampler:
    """Generates from `model` as it is at the time of the call.

    max_rows: samples decoded together at most. Each takes 2 L H_kv D_head numbers per token of the longest request (0.14 MB for
    Qwen3-8B in bf16). steps_per_sync: decoding steps between two looks at what was drawn (1; on a GPU, where looking means
    waiting, 8); what a row draws past its end is cut. `sync` raises `weight_version`, which is written into the rollouts.
    """

    def __init__(self, model: Transformer, *, max_rows: int = 256, steps_per_sync: int | None = None):
        self.model, self.weight_version = model, 0
        self.max_rows, self.steps_per_sync = max_rows, steps_per_sync

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], progress: str | None = None) -> list[list[Rollout]]:
        """`request.n` rollouts per request, in order; `progress` labels a progress bar. Raises UserError for a bad request."""
        for index, request in enumerate(requests):
            if fault := _fault(request, self.model.config):
                raise UserError(f"the prompt of request {index} {fault}")
        results: list[list[Rollout | None]] = [[None] * request.n for request in requests]
        waiting = _waiting_line(requests)
        if not waiting:
            return results
        batch = _Batch(self, waiting)
        with tqdm(None, progress, len(waiting), leave=False, unit="sample", disable=progress is None) as bar:
            while waiting or batch.samples:
                batch.admit(waiting)
                for sample, rollout in batch.decode():
                    results[sample.request_index][sample.index] = rollout
                    bar.update()
        return results

    def sync(self, model: Transformer, version: int) -> float:
        """From now on the weights of `model` are `version`. This sampler has them already, unless `model` is sharded.

        Returns by how much a sampler elsewhere then differs (nats); here 0.
        """
        if model is not self.model:
            copy_parameters(model, self.model)
        self.weight_version = version
        return 0.0

    def rest(self) -> None:
        """Called when nothing is sampled for a while; a sampler elsewhere on this GPU then frees its memory."""


class _Batch:
    """The rows being decoded: `samples[r]`, `state[r]` and row r of the cache belong together."""

    def __init__(self, sampler: Sampler, waiting: Sequence[Sample]):
        self.model, self.weight_version = sampler.model, sampler.weight_version
        self.dtype, self.device = self.model.head_weight.dtype, self.model.head_weight.device
        self.steps_per_sync = sampler.steps_per_sync or (8 if self.device.type == "cuda" else 1)
        self.max_rows = min(sampler.max_rows, len(waiting))
        slots = max(sample.longest for sample in waiting)
        self.attention = CachedAttention(self.model.config, self.max_rows, slots, self.dtype, self.device)

        longest_completion = max(sample.request.params.max_tokens for sample in waiting)
        most_stops = max(len(sample.request.params.stop_token_ids) for sample in waiting)
        # `token` is the next input and `position` its place (as many slots are filled); `count` tokens have been drawn.
        fields = [(name, "i8") for name in ("token", "position", "count", "max_tokens")]
        fields += [("temperature", "f4"), ("top_p", "f4"), ("stop_token_ids", "i8", (most_stops,))]
        per_token = (("uniforms", "f8"), ("completion_ids", "i8"), ("logprobs", "f4"))
        fields += [(name, kind, (longest_completion,)) for name, kind in per_token]
        self.state = np.zeros(self.max_rows, dtype=fields)
        self.samples: list[Sample] = []
        self.awaited: tuple = (None, None)  # a prompt some of whose samples still wait, and its prefix

    def admit(self, waiting: deque[Sample]) -> None:
        """Fills free rows from the waiting line, once an eighth of all rows is free (prompts are cheaper by the batch)."""
        first_row = row = len(self.samples)
        free = self.max_rows - first_row
        if not waiting or free < min(len(waiting), max(1, self.max_rows // 8)):
            return
        entering = [waiting.popleft() for _ in range(min(free, len(waiting)))]
        for sample, state in zip(entering, self.state[first_row:]):
            prompt_ids, params = sample.request.prompt_ids, sample.request.params
            state["token"], state["position"] = prompt_ids[-1], len(prompt_ids) - 1
            state["count"], state["max_tokens"] = 0, params.max_tokens
            state["temperature"], state["top_p"] = params.temperature, params.top_p
            state["stop_token_ids"] = -1  # no token
            state["stop_token_ids"][: len(params.stop_token_ids)] = params.stop_token_ids
            stream = np.random.Generator(np.random.Philox(key=[sample.request.seed % 2**64, sample.index]))
            state["uniforms"][: params.max_tokens] = stream.random(params.max_tokens)
        self.samples += entering

        copies = Counter(sample.request.prompt_ids for sample in entering)  # in order of first appearance
        for prompt_ids, prefix in self._prefixes(list(copies)):
            self.attention.store(slice(row, row + copies[prompt_ids]), prefix)
            row += copies[prompt_ids]
            is_awaited = bool(waiting) and waiting[0].request.prompt_ids == prompt_ids
            self.awaited = (prompt_ids, prefix.clone()) if is_awaited else (None, None)

    def _prefixes(self, prompts: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Each prompt and the keys and values of its tokens but the last, `[L, 2, T - 1, H_kv, D_head]`, in the given order."""
        if prompts[0] == self.awaited[0]:
            yield self.awaited
            prompts = prompts[1:]
        while prompts:
            total = np.cumsum([len(prompt_ids) for prompt_ids in prompts])
            chunk = prompts[: max(1, int((total <= PREFILL_TOKENS).sum()))]
            prompts = prompts[len(chunk) :]
            prefixes = [ids[:-1] or ids for ids in chunk]  # never empty; decoding rewrites a lone token
            lengths = [len(prefix) for prefix in prefixes]
            attention = RecordingAttention(lengths, self.model.config, self.dtype, self.device)
            input_ids = torch.tensor([token for prefix in prefixes for token in prefix], device=self.device)
            self.model(input_ids, attention.positions, attention)
            yield from zip(chunk, attention.kv.split(lengths, dim=2))

    def decode(self) -> Iterator[tuple[Sample, Rollout]]:
        """A few steps for every row; then yields those that are finished and moves the last rows into the gaps they leave."""
        rows = len(self.samples)
        state = self.state[:rows]
        steps = min(self.steps_per_sync, int((state["max_tokens"] - state["count"]).min()))
        columns = state["count"][:, None] + np.arange(steps)
        cells = np.arange(rows)[:, None], columns  # of the fields with a number per token
        tokens, logprobs = self._steps(steps, state["uniforms"][cells])
        if np.isnan(logprobs).any():
            raise UserError("the model's logits are NaN: its weights are broken, use an earlier checkpoint")
        state["completion_ids"][cells], state["logprobs"][cells] = tokens, logprobs
        state["token"] = tokens[:, -1]
        state["position"] += steps

        is_stop = (tokens[:, :, None] == state["stop_token_ids"][:, None]).any(-1)  # [R, steps]
        has_stopped = is_stop.any(1)
        state["count"] += np.where(has_stopped, is_stop.argmax(1) + 1, steps)
        is_finished = has_stopped | (state["count"] == state["max_tokens"])
        for row in is_finished.nonzero()[0].tolist():
            sample, count = self.samples[row], int(state["count"][row])
            drawn = (state[field][row, :count].tolist() for field in ("completion_ids", "logprobs"))
            finish_reason = "stop" if has_stopped[row] else "length"
            yield sample, Rollout(sample.request.prompt_ids, *drawn, finish_reason, self.weight_version)

        remaining = rows - int(is_finished.sum())
        holes = is_finished[:remaining].nonzero()[0]
        movers = (~is_finished[remaining:]).nonzero()[0] + remaining
        for hole, mover in zip(holes.tolist(), movers.tolist()):
            self.attention.move(mover, hole, int(state["position"][mover]))
            state[hole], self.samples[hole] = state[mover], self.samples[mover]
        del self.samples[remaining:]

    def _steps(self, steps: int, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decoding steps without a look at the results: drawn tokens `[R, steps]` int64 and their log-probs, float32."""

        def to_device(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array.copy()).to(self.device, non_blocking=True)

        state = self.state[: len(self.samples)]
        tokens, positions = to_device(state["token"]), to_device(state["position"])
        longest = int(state["position"].max()) + 1
        greedy = state["temperature"][:, None] == 0
        temperature = to_device(np.where(greedy, 1, state["temperature"][:, None]))
        is_greedy = to_device(greedy) if greedy.any() else None
        top_p = to_device(state["top_p"][:, None]) if (state["top_p"] < 1).any() else None
        drawn = []
        for step, step_uniforms in enumerate(to_device(uniforms.T[:, :, None])):
            self.attention.begin_step(positions, longest + step)
            logits = F.linear(self.model(tokens, positions, self.attention), self.model.head_weight).float()
            tokens, logprobs = draw_tokens(logits, step_uniforms, temperature, is_greedy, top_p)
            positions = positions + 1
            drawn.append((tokens, logprobs))
        return tuple(torch.stack(steps, 1).cpu().numpy() for steps in zip(*drawn))


def _waiting_line(requests: Sequence[Request]) -> deque[Sample]:
    """All samples: those of one prompt together, prompts that may run longest first (the shortest tail)."""
    by_prompt: dict[tuple[int, ...], list[Sample]] = {}
    for request_index, request in enumerate(requests):
        samples = [Sample(request_index, index, request) for index in range(request.n)]
        by_prompt.setdefault(request.prompt_ids, []).extend(samples)
    groups = [group for group in by_prompt.values() if group]
    groups.sort(key=lambda group: max(sample.longest for sample in group), reverse=True)
    return deque(sample for group in groups for sample in group)


def _fault(request: Request, config: ModelConfig) -> str | None:
    """Why the model cannot answer a request; None if it can."""
    prompt, limit, longest = request.prompt_ids, config.max_position_embeddings, request.params.max_tokens
    if not prompt or not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        return f"is empty or has ids outside 0 ... {config.vocab_size - 1}: use this model's tokenizer"
    if not 1 <= longest <= limit - len(prompt):
        size = f"has {len(prompt)} tokens, max_tokens = {longest} and the model's max_position_embeddings = {limit}"
        return f"{size}: give max_tokens from 1 to {limit - len(prompt)}, or shorten the prompt"
    return None
