"""The embedded sampler: generation with the trainer's own live weights, no copy and no second process.

1. Requests become samples in a waiting line; those with the same prompt stand together.
2. Samples enter free rows of the batch. A prompt runs through the model once (`RecordingAttention`), however many samples share
   it. Its keys and values are copied to each row, except those of its last token, which is the first input of decoding.
3. A decoding step feeds one token per row, attends to the row's cache (`CachedAttention`), and draws the next (`draw_tokens`).
   All it reads and writes are buffers on the device. So on a GPU, which an eager step keeps waiting, it is recorded as a CUDA graph
   for each number of rows and cache length (rounded up, so that there are few) and replayed.
4. Finished rows leave at once, the last rows move into the gaps, waiting samples enter.

What a request yields depends on the weights, its prompt, parameters and seed and the sample's index, not on the batch around it:
each sample inverts the cumulative distribution at its own uniform numbers (Philox keyed by seed and index). Only float noise is
left: products round differently at another batch size, which can flip a draw within about 1e-6 of a token's border.
Simplified against vLLM (Kwon et al. 2023, arXiv:2309.06180): a row of cache is as long as the longest request; no pages.
"""

from bisect import bisect
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nano_atlas import gpu
from nano_atlas.distributed import copy_parameters
from nano_atlas.errors import UserError
from nano_atlas.model import ModelConfig, PackedAttention, Transformer
from nano_atlas.terminal import Bar

PREFILL_TOKENS = 8192  # prompt tokens that go through the model at once (a longer prompt goes alone)
RECORDED_SLOTS = 256  # cache lengths of recorded steps are multiples of this


@dataclass(frozen=True)
class Generation:
    """How to draw the tokens of one sample."""

    max_tokens: int  # of the completion, the stop token included
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # nucleus (Holtzman et al. 2020, arXiv:1904.09751): fewest tokens with this mass


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...]
    generation: Generation
    n: int = 1  # samples
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # a sample ends with, and includes, the first of these


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


def draw_tokens(logits, uniforms, temperature, is_greedy=None, top_p=None) -> tuple[Tensor, Tensor]:
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
        # Zeros, not `empty`: a masked slot still takes part in 0 * value and must be finite.
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, slots, config.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.rows, self.columns = torch.arange(rows, device=device), torch.arange(slots, device=device)

    def store(self, rows: slice, kv: Tensor) -> None:
        """The keys and values of a prefix, `[L, 2, T, H_kv, D_head]`, to the start of each of these rows."""
        self.kv[:, :, rows, :, : kv.shape[2]] = kv.transpose(2, 3)[:, :, None]

    def move(self, source: int, target: int, length: int) -> None:
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]

    def begin_step(self, positions: Tensor, longest: int) -> None:
        """positions `[R]`: the slot that each of the first R rows fills now and attends up to; longest: their maximum + 1."""
        self.cells = self.rows[: len(positions)], slice(None), positions
        self.mask = self.kv.new_zeros(len(positions), 1, 1, longest)  # added to the scores
        self.mask.masked_fill_((self.columns[:longest] > positions[:, None])[:, None, None], -torch.inf)
        self.views = self.kv[:, :, : len(positions), :, :longest].unbind()

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.views[layer]  # [R, H_kv, longest, D_head]
        keys[self.cells], values[self.cells] = k, v
        grouped = q.unflatten(1, (k.shape[1], -1))  # [R, H_kv, H / H_kv, D_head]
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask).flatten(1, 2)


class Sample(NamedTuple):
    """One sample that waits or runs. Its rollout is the one that `generate` returns, and grows."""

    rollout: Rollout
    request: Request
    uniforms: np.ndarray  # [max_tokens] float64

    @property
    def longest(self) -> int:  # tokens it may come to, the prompt included
        return len(self.rollout.prompt_ids) + self.request.generation.max_tokens

    @property
    def position(self) -> int:  # of its last token; as many slots of the cache are filled
        return len(self.rollout.prompt_ids) + len(self.rollout.completion_ids) - 1

    def extend(self, ids: list[int], logprobs: list[float]) -> bool:
        """Adds what was drawn, up to the first stop token. Returns whether the sample is finished."""
        end = next((i for i, token in enumerate(ids, start=1) if token in self.request.stop_token_ids), None)
        self.rollout.completion_ids += ids[:end]
        self.rollout.logprobs += logprobs[:end]
        if end is not None:
            self.rollout.finish_reason = "stop"
        return end is not None or len(self.rollout.completion_ids) == self.request.generation.max_tokens


class Sampler:
    """Generates from `model` as it is at the time of the call.

    max_rows: samples decoded together at most. Each takes 2 L H_kv D_head numbers per token of the longest request (0.14 MB for
    Qwen3-8B in bf16). steps_per_sync: decoding steps between two looks at what was drawn (1; on a GPU, where looking means
    waiting, 8); what a row draws past its end is cut.
    """

    def __init__(self, model: Transformer, *, max_rows: int = 256, steps_per_sync: int | None = None):
        self.model, self.weight_version = model, 0
        self.max_rows, self.steps_per_sync = max_rows, steps_per_sync

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], progress: str | None = None) -> list[list[Rollout]]:
        """`request.n` rollouts per request, in order; `progress` labels a progress bar. Raises UserError for a bad request."""
        results, by_prompt = [], defaultdict(list)
        for number, request in enumerate(requests):
            _check(request, number, self.model.config)
            samples = [self._sample(request, index) for index in range(request.n)]
            results.append([sample.rollout for sample in samples])
            by_prompt[request.prompt_ids] += samples
        groups = sorted(filter(None, by_prompt.values()), key=lambda group: -max(s.longest for s in group))
        waiting = deque(chain(*groups))  # longest first: the shortest tail
        if waiting:
            batch = _Batch(self, waiting)
            # only for calls of more than a second, and then it moves with every token
            shown = {"leave": False, "unit": "sample", "disable": not progress, "delay": 1}
            with Bar(None, progress, len(waiting), **shown) as bar:
                while waiting or batch.samples:
                    batch.admit(waiting)
                    finished = batch.decode()
                    bar.set_postfix_str(f"{batch.tokens:,} tokens", refresh=False)
                    bar.update(finished)
        return results

    def _sample(self, request: Request, index: int) -> Sample:
        rollout = Rollout(request.prompt_ids, [], [], "length", self.weight_version)
        stream = np.random.Generator(np.random.Philox(key=[request.seed % 2**63, index]))
        return Sample(rollout, request, stream.random(request.generation.max_tokens))

    def sync(self, model: Transformer, version: int) -> float:
        """The weights are from now on `version`; those of a sharded `model` are copied. A sampler elsewhere would return its parity
        difference (nats); here it is 0.
        """
        if model is not self.model:
            copy_parameters(model, self.model)
        self.weight_version = version
        return 0.0

    def rest(self) -> None:
        """Called when nothing is sampled for a while; a sampler elsewhere on this GPU then frees its memory."""


class _Batch:
    """The rows being decoded: `samples[r]` and row r of the cache belong together."""

    def __init__(self, sampler: Sampler, waiting: Sequence[Sample]):
        self.model, head = sampler.model, sampler.model.head_weight
        self.dtype, self.device = head.dtype, head.device
        self.steps_per_sync = sampler.steps_per_sync or (8 if self.device.type == "cuda" else 1)
        self.max_rows = min(sampler.max_rows, len(waiting))
        size = self.max_rows, max(sample.longest for sample in waiting)
        self.attention = CachedAttention(self.model.config, *size, self.dtype, self.device)
        # what a step reads and writes: newest token and its position, how to draw, the draw's log-prob
        place = {"device": self.device}
        self.last, self.positions = torch.zeros(2, self.max_rows, dtype=torch.int64, **place)
        self.is_greedy = torch.zeros(self.max_rows, 1, dtype=torch.bool, **place)
        self.temperature, self.top_p = torch.ones(2, self.max_rows, 1, **place)
        self.uniforms = torch.zeros(self.max_rows, 1, dtype=torch.float64, **place)
        self.logprobs = torch.zeros(self.max_rows, **place)
        self.is_recorded = gpu.is_recorded(self.device)
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.graphs: dict[tuple, Callable] = {}  # replays, by the arguments of `_step`
        self.samples: list[Sample] = []
        self.tokens = 0  # drawn so far
        self.newest: tuple = (None, None)  # a prompt, some of whose samples may still wait, and its prefix

    def admit(self, waiting: deque[Sample]) -> None:
        """Fills free rows from the waiting line, once an eighth of all rows is free (prompts are cheaper by the batch)."""
        row, free = len(self.samples), self.max_rows - len(self.samples)
        if not waiting or free < min(len(waiting), max(1, self.max_rows // 8)):
            return
        entering = [waiting.popleft() for _ in range(min(free, len(waiting)))]
        self.samples += entering
        copies = Counter(sample.rollout.prompt_ids for sample in entering)  # in order of first appearance
        for prompt_ids, prefix in self._prefixes(list(copies)):
            self.attention.store(slice(row, row + copies[prompt_ids]), prefix)
            row += copies[prompt_ids]
        self.newest = prompt_ids, prefix.clone()

    def _prefixes(self, prompts: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Each prompt and the keys and values of its tokens but the last, `[L, 2, T - 1, H_kv, D_head]`, in the given order."""
        if prompts[0] == self.newest[0]:
            yield self.newest
            prompts = prompts[1:]
        while prompts:
            count = max(1, bisect(list(accumulate(map(len, prompts))), PREFILL_TOKENS))
            chunk, prompts = prompts[:count], prompts[count:]
            prefixes = [ids[:-1] or ids for ids in chunk]  # never empty; decoding rewrites a lone token
            lengths = [len(prefix) for prefix in prefixes]
            attention = RecordingAttention(lengths, self.model.config, self.dtype, self.device)
            input_ids = torch.tensor([token for prefix in prefixes for token in prefix], device=self.device)
            self.model(input_ids, attention.positions, attention)
            yield from zip(chunk, attention.kv.split(lengths, dim=2))

    def decode(self) -> int:
        """A few steps for every row; then the last rows move into the gaps of those that are finished. Returns their number."""
        left = (s.request.generation.max_tokens - len(s.rollout.completion_ids) for s in self.samples)
        tokens, logprobs = self._steps(min(self.steps_per_sync, *left))
        if logprobs.isnan().any():
            raise UserError("the model's logits are NaN, its weights are broken; use an earlier checkpoint")
        self.tokens += tokens.numel()
        drawn = zip(self.samples, tokens.tolist(), logprobs.tolist())
        is_finished = [sample.extend(ids, values) for sample, ids, values in drawn]
        remaining = is_finished.count(False)
        holes = [row for row in range(remaining) if is_finished[row]]
        movers = [row for row in range(remaining, len(self.samples)) if not is_finished[row]]
        for hole, mover in zip(holes, movers):
            self.samples[hole] = self.samples[mover]
            self.attention.move(mover, hole, self.samples[hole].position)
        del self.samples[remaining:]
        return len(is_finished) - remaining

    def _steps(self, steps: int) -> tuple[Tensor, Tensor]:
        """Decoding steps without a look at the results: drawn tokens `[R, steps]` int64 and their log-probs, float32, on the CPU."""
        params = [sample.request.generation for sample in self.samples]
        places = [sample.position for sample in self.samples]
        last = [(s.rollout.completion_ids or s.rollout.prompt_ids)[-1] for s in self.samples]
        rows, greedy, top_p = len(places), [p.temperature == 0 for p in params], [p.top_p for p in params]
        self.positions.zero_()  # of rows beyond the samples too, which a recorded step computes for nothing
        for buffer, values in (
            (self.last, last), (self.positions, places), (self.is_greedy, greedy), (self.top_p, top_p),
            (self.temperature, [p.temperature or 1.0 for p in params]),
        ):  # fmt: skip
            buffer[:rows].view(-1).copy_(torch.tensor(values, dtype=buffer.dtype), non_blocking=True)
        coming = [s.uniforms[len(s.rollout.completion_ids) :][:steps] for s in self.samples]
        uniforms = torch.from_numpy(np.stack(coming, axis=1)).to(self.device, non_blocking=True)[..., None]
        drawn = []
        for step in range(steps):
            self.uniforms[:rows] = uniforms[step]
            self._run(rows, max(places) + 1 + step, any(greedy), min(top_p) < 1)
            drawn.append((self.last[:rows].clone(), self.logprobs[:rows].clone()))
        return tuple(torch.stack(values, 1).cpu() for values in zip(*drawn))

    def _run(self, rows: int, longest: int, *kinds: bool) -> None:
        """`_step`; on a GPU, from its second time on with about these arguments, a replay of what it did."""
        if not self.is_recorded:
            self._step(rows, longest, *kinds)
            return
        rows = min(1 << (rows - 1).bit_length(), self.max_rows)
        longest = min(-(-longest // RECORDED_SLOTS) * RECORDED_SLOTS, len(self.attention.columns))
        key = rows, longest, *kinds
        if key in self.graphs:
            self.graphs[key]()
        else:
            self.graphs[key] = gpu.record(lambda: self._step(*key), self.device, self.pool)

    def _step(self, rows: int, longest: int, has_greedy: bool, has_top_p: bool) -> None:
        """One token for each of the first rows, whose caches have at most `longest` slots with it. The host learns nothing of it."""
        tokens, positions = self.last[:rows], self.positions[:rows]
        self.attention.begin_step(positions, longest)
        hidden = self.model(tokens, positions, self.attention)
        logits = F.linear(hidden, self.model.head_weight).float()
        is_greedy = self.is_greedy[:rows] if has_greedy else None
        top_p = self.top_p[:rows] if has_top_p else None
        drawn = draw_tokens(logits, self.uniforms[:rows], self.temperature[:rows], is_greedy, top_p)
        tokens.copy_(drawn[0])
        self.logprobs[:rows] = drawn[1]
        positions += 1


def _check(request: Request, number: int, config: ModelConfig) -> None:
    prompt, max_tokens = request.prompt_ids, request.generation.max_tokens
    limit, last = config.max_position_embeddings, config.vocab_size - 1
    said = f"the prompt of request {number}"
    if not prompt or not 0 <= min(prompt) <= max(prompt) <= last:
        raise UserError(f"{said} is empty or has ids outside 0 ... {last}: use this model's tokenizer")
    if not 1 <= max_tokens <= limit - len(prompt):
        said += f" has {len(prompt)} tokens, max_tokens = {max_tokens} and the model's max_position_embeddings = {limit}"
        lower = f"lower --probe-tokens, --teaching-tokens or --answer-tokens (from 1 to {limit - len(prompt)}) or "
        raise UserError(f"{said}: {lower if limit > len(prompt) else ''}shorten the prompt")
