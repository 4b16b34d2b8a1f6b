"""The embedded sampler: generates with the trainer's own weights, without a copy and in the same process.

1. Requests become samples in a queue; samples with the same prompt are adjacent.
2. Samples enter free rows of the batch. A prompt runs through the model once (`RecordingAttention`). Its keys
   and values are copied to each of its rows, except those of its last token, the first input of decoding.
3. A decoding step feeds one token per row, attends to the row's cache (`CachedAttention`) and draws the next token
   (`draw_tokens`). It uses only buffers on the device, so on a GPU it is recorded as a CUDA graph, one for
   each number of rows and cache length (both rounded up), and replayed.
4. Finished rows leave at once, the last rows fill the gaps, waiting samples enter.

A sample depends on the weights, its prompt, parameters, seed and index, not on the batch: it inverts the
cumulative distribution at its own uniform numbers (Philox keyed by seed and index). Only rounding depends on
the batch size; it can change a draw that is within about 1e-6 of a token's border. Simpler than vLLM (Kwon et
al. 2023, arXiv:2309.06180): each row's cache is as long as the longest request; no pages.
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

PREFILL_TOKENS = 8192  # prompt tokens in one forward pass (a longer prompt is alone)
RECORDED_SLOTS = 256  # cache lengths of recorded steps are multiples of this


@dataclass(frozen=True)
class Generation:  # how to draw the tokens of one sample
    max_tokens: int  # of the completion, including the stop token
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # nucleus (Holtzman et al. 2020, arXiv:1904.09751): fewest tokens with this mass


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...]
    generation: Generation
    n: int = 1  # samples
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()  # a sample ends after the first of these


@dataclass
class Rollout:
    """One sample: the exact ids that the model read and drew.

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
        # Tokens keep their vocabulary order, so other rows' top_p does not change the draw of a row with top_p = 1.
        # Tokens as likely as the last one of the nucleus are kept.
        sorted_probs = probs.sort(dim=-1, descending=True).values
        mass_before = sorted_probs.cumsum(-1) - sorted_probs
        threshold = sorted_probs.masked_fill(mass_before >= top_p, torch.inf).amin(-1, keepdim=True)
        probs = probs.masked_fill((probs < threshold) & (top_p < 1), 0)
    # float64, so that rounding cannot draw a token of probability 0. Only NaN logits are out of range; the caller reports.
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

    The query heads of a key head are passed to the kernel as positions, so keys and values are not repeated.
    Only slots up to the longest row's last token are read.
    """

    def __init__(self, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device):
        # zeros, not `empty`: masked slots are multiplied by 0 and must be finite
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, slots, config.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.rows, self.columns = torch.arange(rows, device=device), torch.arange(slots, device=device)

    def store(self, rows: slice, kv: Tensor) -> None:
        """Copies the keys and values of a prefix, `[L, 2, T, H_kv, D_head]`, to the start of these rows."""
        self.kv[:, :, rows, :, : kv.shape[2]] = kv.transpose(2, 3)[:, :, None]

    def move(self, source: int, target: int, length: int) -> None:
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]

    def begin_step(self, positions: Tensor, longest: int) -> None:
        """positions `[R]`: the last slot of each of the first R rows, filled in this step; longest: maximum + 1."""
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
    """A waiting or running sample; its rollout is extended in place and returned by `generate`."""

    rollout: Rollout
    request: Request
    uniforms: np.ndarray  # [max_tokens] float64

    @property
    def longest(self) -> int:  # most tokens it can have, including the prompt
        return len(self.rollout.prompt_ids) + self.request.generation.max_tokens

    @property
    def position(self) -> int:  # of its last token; equals the number of filled cache slots
        return len(self.rollout.prompt_ids) + len(self.rollout.completion_ids) - 1

    def extend(self, ids: list[int], logprobs: list[float]) -> bool:
        """Appends the drawn tokens up to the first stop token; returns whether the sample is finished."""
        end = next((i for i, token in enumerate(ids, start=1) if token in self.request.stop_token_ids), None)
        self.rollout.completion_ids += ids[:end]
        self.rollout.logprobs += logprobs[:end]
        if end is not None:
            self.rollout.finish_reason = "stop"
        return end is not None or len(self.rollout.completion_ids) == self.request.generation.max_tokens


class Sampler:
    """Generates with the weights that `model` has at the time of the call.

    max_rows: most samples decoded together. Each needs 2 L H_kv D_head numbers per token of the longest
    request (0.14 MB for Qwen3-8B in bf16). steps_per_sync: decoding steps between two device-host syncs
    (default: 8 on a GPU, else 1); tokens drawn after a sample's end are dropped.
    """

    def __init__(self, model: Transformer, *, max_rows: int = 256, steps_per_sync: int | None = None):
        self.model, self.weight_version = model, 0
        self.max_rows, self.steps_per_sync = max_rows, steps_per_sync

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request], progress: str | None = None) -> list[list[Rollout]]:
        """`request.n` rollouts for each request, in order. progress: label of a bar. Raises UserError for a bad request."""
        results, by_prompt = [], defaultdict(list)
        for number, request in enumerate(requests):
            _check(request, number, self.model.config)
            samples = [self._sample(request, index) for index in range(request.n)]
            results.append([sample.rollout for sample in samples])
            by_prompt[request.prompt_ids] += samples
        groups = sorted(filter(None, by_prompt.values()), key=lambda group: -max(s.longest for s in group))
        waiting = deque(chain(*groups))  # longest first, so that few rows are idle at the end
        if waiting:
            batch = _Batch(self, waiting)
            # shown only after a second
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
        """Sets the version; copies a sharded model's weights. Returns the parity difference (nats), which is 0 here."""
        if model is not self.model:
            copy_parameters(model, self.model)
        self.weight_version = version
        return 0.0

    def rest(self) -> None:
        """Called before a pause in sampling; a vLLM sampler on the same GPU then frees its memory."""


class _Batch:
    """The rows being decoded; row r of the cache belongs to `samples[r]`."""

    def __init__(self, sampler: Sampler, waiting: Sequence[Sample]):
        self.model, head = sampler.model, sampler.model.head_weight
        self.dtype, self.device = head.dtype, head.device
        self.steps_per_sync = sampler.steps_per_sync or (8 if self.device.type == "cuda" else 1)
        self.max_rows = min(sampler.max_rows, len(waiting))
        size = self.max_rows, max(sample.longest for sample in waiting)
        self.attention = CachedAttention(self.model.config, *size, self.dtype, self.device)
        # buffers of a step: newest token and its position, sampling parameters, log-prob of the drawn token
        place = {"device": self.device}
        self.last, self.positions = torch.zeros(2, self.max_rows, dtype=torch.int64, **place)
        self.is_greedy = torch.zeros(self.max_rows, 1, dtype=torch.bool, **place)
        self.temperature, self.top_p = torch.ones(2, self.max_rows, 1, **place)
        self.uniforms = torch.zeros(self.max_rows, 1, dtype=torch.float64, **place)
        self.logprobs = torch.zeros(self.max_rows, **place)
        self.is_recorded = gpu.is_recorded(self.device)
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.graphs: dict[tuple, Callable] = {}  # replays of `_step`, by its arguments
        self.samples: list[Sample] = []
        self.tokens = 0  # drawn so far
        self.newest: tuple = (None, None)  # last prompt, which may have more waiting samples, and its prefix

    def admit(self, waiting: deque[Sample]) -> None:
        """Fills free rows from the queue if at least an eighth of the rows is free (batched prompts are cheaper)."""
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
        """(prompt, keys and values of all its tokens but the last, `[L, 2, T - 1, H_kv, D_head]`), in order."""
        if prompts[0] == self.newest[0]:
            yield self.newest
            prompts = prompts[1:]
        while prompts:
            count = max(1, bisect(list(accumulate(map(len, prompts))), PREFILL_TOKENS))
            chunk, prompts = prompts[:count], prompts[count:]
            prefixes = [ids[:-1] or ids for ids in chunk]  # never empty; decoding overwrites a single token
            lengths = [len(prefix) for prefix in prefixes]
            attention = RecordingAttention(lengths, self.model.config, self.dtype, self.device)
            input_ids = torch.tensor([token for prefix in prefixes for token in prefix], device=self.device)
            self.model(input_ids, attention.positions, attention)
            yield from zip(chunk, attention.kv.split(lengths, dim=2))

    def decode(self) -> int:
        """Decodes a few steps; then the last rows replace finished ones. Returns the number of finished samples."""
        left = (s.request.generation.max_tokens - len(s.rollout.completion_ids) for s in self.samples)
        tokens, logprobs = self._steps(min(self.steps_per_sync, *left))
        if logprobs.isnan().any():
            raise UserError("the model's logits are NaN: its weights are damaged; use an earlier checkpoint")
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
        """Decoding steps without a host sync -> drawn tokens `[R, steps]` int64 and log-probs float32, on the CPU."""
        params = [sample.request.generation for sample in self.samples]
        places = [sample.position for sample in self.samples]
        last = [(s.rollout.completion_ids or s.rollout.prompt_ids)[-1] for s in self.samples]
        rows, greedy, top_p = len(places), [p.temperature == 0 for p in params], [p.top_p for p in params]
        self.positions.zero_()  # also of the unused rows that a recorded step computes
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
        """`_step`; on a GPU a replay of its CUDA graph for these (rounded) arguments, recorded at the first call."""
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
        """Draws one token for each of the first `rows` rows, without a host sync. longest: most cache slots in use."""
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
