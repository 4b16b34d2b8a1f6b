"""SFT and GRPO losses over a fused linear -> log-softmax that never makes the `[N, V]` logits.

For a 150k vocabulary the logits are by far the largest tensor of training, and autograd would keep several copies of them.
Here the tokens are taken in chunks. While the logits of one chunk exist, everything that needs them is done:

    logits = hidden @ weight.T / temperature              one buffer, overwritten by each chunk
    logprobs, entropy, kl        per-token statistics     float32, [n]
    loss = token_loss(logprobs, entropy, kl)              a formula of the paper, [n]; autograd differentiates it (n numbers)
    d logits                     by the chain rule        written over the logits
    d hidden, d weight           two matrix products      accumulated

so the *gradient is computed inside the forward pass*, and backward only hands it out. The three derivatives of the chain rule,
with p = softmax(logits), q = softmax(reference logits), y the target token and H the entropy:

    d log p_y / d logits_j  = [j = y] - p_j
    d H / d logits_j        = -p_j (log p_j + H)
    d KL(p||q) / d logits_j =  p_j (log p_j - log q_j - KL)

Numerics: matrix products run in the dtype of `hidden` and `weight`; of bfloat16 they return float32 logits on a GPU, bfloat16
logits on a CPU. Softmax, entropy, KL and loss are float32 always. The head's gradient is summed over chunks in float32 and
rounded to the dtype of `weight` once.
Extra memory: one chunk of logits, the gradients, and for several chunks of bfloat16 a float32 `[V, D]` accumulator. Only the
gradient of `hidden` grows with the number of tokens.
Environment: NANO_ATLAS_COMPILE=1 compiles the elementwise kernels always, 0 never; unset, for vocabularies of 4,096 and more.
"""

import math
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_atlas.model import PackedAttention, Transformer

if TYPE_CHECKING:
    from nano_atlas.data import Batch

# (logprobs [n], entropy [n], kl [n] | None, rows) -> loss [n]; `rows` is the slice of the N tokens that the chunk holds
TokenLoss = Callable[[Tensor, Tensor, Tensor | None, slice], Tensor]

MAX_CHUNK_TOKENS = 1024  # beyond this, longer matrix products are no faster
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}  # logits in one chunk: 128 MiB and 1 GiB of float32
MIN_COMPILED_VOCABULARY = 4096


class TokenStats(NamedTuple):
    """What one token's distribution says, detached; each `[N]` float32, in nats."""

    logprobs: Tensor  # log-probability of the target
    entropy: Tensor
    kl: Tensor | None  # full-vocabulary KL(policy || reference); None without a reference


class GrpoStats(NamedTuple):
    """What the GRPO loss saw of each token, detached; `[N]` float32, in nats, but for the boolean `is_clipped`."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor | None  # of the estimator in use; None without a reference
    is_clipped: Tensor  # the clip took the policy gradient away


# ---- elementwise kernels over one chunk of logits [n, V]; everything inside is float32 ------------------------------------


def _chunk_stats(
    logits: Tensor, ref_logits: Tensor | None, target_logits: Tensor, inverse_temperature: Tensor
):
    """-> TokenStats of the chunk, log-sum-exp [n], and the reference's log-sum-exp [n] (None without reference)."""
    scores = logits.float() * inverse_temperature
    top = scores.amax(-1)
    shifted = scores - top[:, None]
    exps = shifted.exp()
    total = exps.sum(-1)
    logsumexp = top + total.log()
    logprobs = target_logits.float() * inverse_temperature - logsumexp
    entropy = total.log() - (exps * shifted).sum(-1) / total
    if ref_logits is None:
        return TokenStats(logprobs, entropy, None), logsumexp, None
    ref_scores = ref_logits.float() * inverse_temperature
    ref_top = ref_scores.amax(-1)
    ref_logsumexp = ref_top + (ref_scores - ref_top[:, None]).exp().sum(-1).log()
    kl = (exps * (scores - ref_scores)).sum(-1) / total - logsumexp + ref_logsumexp
    return TokenStats(logprobs, entropy, kl), logsumexp, ref_logsumexp


def _logits_to_gradient_(
    logits: Tensor, ref_logits: Tensor | None, targets: Tensor, inverse_temperature: Tensor, stats: TokenStats,
    logsumexp: Tensor, ref_logsumexp: Tensor | None, derivatives: TokenStats,
) -> None:  # fmt: skip
    """Overwrites the logits with d loss / d logits. derivatives: of the loss by each statistic, [n]; None is zero."""
    logprobs = logits.float() * inverse_temperature - logsumexp[:, None]  # [n, V]
    per_probability = -derivatives.logprobs[:, None]
    if derivatives.entropy is not None:
        per_probability = per_probability - derivatives.entropy[:, None] * (logprobs + stats.entropy[:, None])
    if derivatives.kl is not None:
        ref_logprobs = ref_logits.float() * inverse_temperature - ref_logsumexp[:, None]
        per_probability = per_probability + derivatives.kl[:, None] * (
            logprobs - ref_logprobs - stats.kl[:, None]
        )
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    gradient = logprobs.exp() * per_probability + torch.where(is_target, derivatives.logprobs[:, None], 0.0)
    logits.copy_(gradient * inverse_temperature)


# dynamic: one compilation serves every chunk length and vocabulary (but a chunk of a single token, which is another)
_compiled = cache(partial(torch.compile, dynamic=True, fullgraph=True))


def _run(kernel: Callable, *arguments):
    setting = os.environ.get("NANO_ATLAS_COMPILE", "")
    if setting not in ("", "0", "1"):
        raise ValueError(
            f"environment variable NANO_ATLAS_COMPILE is {setting!r}; use 0, 1 or leave it unset"
        )
    if setting == "0" or (setting == "" and arguments[0].shape[1] < MIN_COMPILED_VOCABULARY):
        return kernel(*arguments)
    try:
        return _compiled(kernel)(*arguments)
    except Exception as error:
        error.add_note(
            f"in the compiled kernel {kernel.__name__}; NANO_ATLAS_COMPILE=0 does without a compiler"
        )
        raise


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """`hidden @ weight.T`, `[n, V]`, in the buffer, which is resized because the compiler would recompile for a view of it."""
    options = (
        {} if buffer.dtype == hidden.dtype else {"out_dtype": buffer.dtype}
    )  # only CUDA's mm knows out_dtype
    return torch.mm(hidden, weight.T, out=buffer.resize_(len(hidden), len(weight)), **options)


def _slices(tokens: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Chunks of equal length (the last may be shorter), as long as the memory budget allows."""
    longest = max(1, min(MAX_CHUNK_TOKENS, CHUNK_ELEMENTS[device.type] // vocabulary))
    length = math.ceil(tokens / math.ceil(tokens / longest)) if tokens else 1
    return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]


def _differentiate(
    token_loss: TokenLoss, weights: Tensor, stats: TokenStats, rows: slice
) -> tuple[Tensor, TokenStats]:
    """-> sum of the weighted losses [] and its derivative by each statistic, [n] (None: it does not depend on that one)."""
    with torch.enable_grad():
        inputs = TokenStats(*(None if x is None else x.detach().requires_grad_() for x in stats))
        losses = token_loss(*inputs, rows)
        if losses.shape != weights.shape:
            raise ValueError(
                f"token_loss must return {tuple(weights.shape)}, one number per token, not {tuple(losses.shape)}"
            )
        gradients = iter(
            torch.autograd.grad(losses.sum(), [x for x in inputs if x is not None], allow_unused=True)
        )

    def weighted(x: Tensor) -> Tensor:  # a plain product with weight 0 would let inf and NaN through
        return torch.where(weights != 0, weights * x, 0.0)

    derivatives = [None if x is None else next(gradients) for x in inputs]
    return weighted(losses.detach()).sum(), TokenStats(
        *(None if d is None else weighted(d) for d in derivatives)
    )


@torch.no_grad()
def _sweep(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, ref_hidden: Tensor | None, ref_weight: Tensor | None,
    token_loss: TokenLoss | None = None, token_weights: Tensor | None = None,
    needs_gradient: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, TokenStats, Tensor | None, Tensor | None]:  # fmt: skip
    """One pass over the chunks -> loss [] float32, statistics, d loss / d hidden, d loss / d weight (None where not needed)."""
    device, tokens, vocabulary = hidden.device, len(hidden), len(weight)
    chunks = _slices(tokens, vocabulary, device)
    longest = chunks[0].stop if chunks else 0

    def logits_buffer(head: Tensor) -> Tensor:
        return torch.empty(
            longest, vocabulary, dtype=torch.float32 if head.is_cuda else head.dtype, device=device
        )

    buffer, ref_buffer = logits_buffer(weight), None if ref_weight is None else logits_buffer(ref_weight)
    d_hidden = torch.empty_like(hidden) if needs_gradient[0] else None
    d_weight = torch.zeros_like(weight) if needs_gradient[1] else None
    is_summed_apart = needs_gradient[1] and weight.dtype != torch.float32 and len(chunks) > 1
    d_weight_sum = torch.zeros_like(weight, dtype=torch.float32) if is_summed_apart else None
    # a tensor, because the compiler would make a new kernel for each temperature that comes as a number
    inverse_temperature = torch.full((), 1.0 / temperature, device=device)
    loss, every = torch.zeros((), device=device), torch.empty(3, tokens, device=device)

    for rows in chunks:
        logits = _logits(hidden[rows], weight, buffer)
        ref_logits = None if ref_hidden is None else _logits(ref_hidden[rows], ref_weight, ref_buffer)
        # outside the kernel, because on a CPU a compiled one answers a target beyond the vocabulary by killing the process
        target_logits = logits.gather(1, targets[rows, None]).squeeze(1)
        stats, *logsumexps = _run(_chunk_stats, logits, ref_logits, target_logits, inverse_temperature)
        every[: 3 if ref_logits is not None else 2, rows] = torch.stack([x for x in stats if x is not None])
        if token_loss is None:
            continue
        chunk_loss, derivatives = _differentiate(token_loss, token_weights[rows].float(), stats, rows)
        loss += chunk_loss
        if any(needs_gradient):
            known = (targets[rows], inverse_temperature, stats, *logsumexps, derivatives)
            _run(_logits_to_gradient_, logits, ref_logits, *known)
            d_logits = logits.to(
                hidden.dtype
            )  # [n, V]; copies only where the product returned float32 for bfloat16
        if d_hidden is not None:
            torch.mm(d_logits, weight, out=d_hidden[rows])
        if is_summed_apart:
            d_weight_sum += torch.mm(d_logits.T, hidden[rows], out=d_weight)
        elif d_weight is not None:
            d_weight.addmm_(d_logits.T, hidden[rows])
    if is_summed_apart:
        d_weight.copy_(d_weight_sum)
    return loss, TokenStats(every[0], every[1], None if ref_hidden is None else every[2]), d_hidden, d_weight


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, *arguments):
        loss, stats, *ctx.gradients = _sweep(
            hidden, weight, *arguments, needs_gradient=ctx.needs_input_grad[:2]
        )
        ctx.mark_non_differentiable(*(x for x in stats if x is not None))
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "the fused loss keeps its gradient for one backward pass only; compute the loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None  # handed on, not copied: [V, D] is large
        return *(None if gradient is None else gradient.mul_(d_loss) for gradient in gradients), *[None] * 6


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, ref_hidden, ref_weight, **per_token
) -> None:
    shapes = [tuple(x.shape) for x in (hidden, weight, targets)]
    if [len(shape) for shape in shapes] != [2, 2, 1] or shapes[0] != (*shapes[2], shapes[1][1]):
        raise ValueError(f"expected hidden [N, D], weight [V, D] and targets [N], not {shapes}")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must both be float32 or both bfloat16"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    ref_sizes = [None if x is None else len(x) for x in (ref_hidden, ref_weight)]
    if ref_sizes not in ([None, None], [len(hidden), len(weight)]):
        raise ValueError(
            "ref_hidden [N, D_ref] and ref_weight [V, D_ref] come together, with the policy's N and V"
        )
    for name, value in per_token.items():  # a [N, 1] would silently broadcast to [N, N]
        if value is not None and value.shape != targets.shape:
            raise ValueError(
                f"{name} must have one number per token, {tuple(targets.shape)}, not {tuple(value.shape)}"
            )


def fused_token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_loss: TokenLoss, token_weights: Tensor, *, temperature: float = 1.0,
    ref_hidden: Tensor | None = None, ref_weight: Tensor | None = None,
) -> tuple[Tensor, TokenStats]:  # fmt: skip
    """`sum_t w_t * token_loss_t` for any loss that is a function of each token's log-probability, entropy and exact KL.

    hidden `[N, D]` (float32 or bfloat16), weight `[V, D]` (same dtype; may be the tied embedding), targets `[N]` int64, any
    valid id where the weight is 0. token_loss maps (logprobs, entropy, kl, rows) of one chunk, float32 `[n]`, to losses
    `[n]`, element by element; `rows` says which tokens they are. token_weights `[N]`: a weight of 0 makes a token count for
    exactly nothing, whatever its loss is (still, tokens that are left out of `hidden` cost no time). Logits of policy and
    reference are divided by temperature.

    Returns the loss, `[]` float32, differentiable once by hidden and weight, and the statistics of all N tokens, detached.
    Raises ValueError for shapes, dtypes or options that do not fit together.
    """
    _check(hidden, weight, targets, temperature, ref_hidden, ref_weight, token_weights=token_weights)
    arguments = (hidden, weight, targets, temperature, ref_hidden, ref_weight, token_loss, token_weights)
    if not torch.is_grad_enabled():
        return _sweep(*arguments)[:2]
    loss, *stats = _GradientInForward.apply(*arguments)
    return loss, TokenStats(*stats)


def token_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
) -> TokenStats:  # fmt: skip
    """What each token's distribution says, without gradient; arguments and errors as in `fused_token_loss`."""
    _check(hidden, weight, targets, temperature, ref_hidden, ref_weight)
    return _sweep(hidden, weight, targets, temperature, ref_hidden, ref_weight)[1]


# ---- the losses ---------------------------------------------------------------------------------------------------------


def sft_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor
) -> tuple[Tensor, TokenStats]:
    """Weighted cross-entropy, `sum_t w_t * -log p(y_t)`; arguments as in `fused_token_loss`.

    With `w_t = 1 / (target tokens of the whole optimizer step)` it is the mean over tokens, however the step is split.
    """
    return fused_token_loss(
        hidden, weight, targets, lambda logprobs, entropy, kl, rows: -logprobs, token_weights
    )


def batch_loss(model: Transformer, batch: "Batch", target_tokens: int) -> Tensor:
    """-log p summed over the targets of a packed batch (data.collate), divided by the targets of the *whole step*, so that the cut into
    micro-batches does not matter; []."""
    attention = PackedAttention(batch.lengths, batch.input_ids.device)
    hidden = model(batch.input_ids, attention.positions, attention)  # [N, D]
    weights = torch.full_like(batch.targets, 1 / target_tokens, dtype=torch.float32)
    return sft_loss(hidden[batch.target_positions], model.head_weight, batch.targets, weights)[0]


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) from sampled tokens, `r - 1 - log r` with r = p_ref / p.

    J. Schulman, "Approximating KL divergence" (2020), estimator k3; DeepSeekMath (arXiv:2402.03300), equation 4.
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


def grpo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor, advantages: Tensor, *,
    old_logprobs: Tensor | None = None, ref_logprobs: Tensor | None = None, ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None, importance: Tensor | None = None, beta: float = 0.04, clip_low: float = 0.2,
    clip_high: float = 0.2, temperature: float = 1.0, kl: Literal["k3", "exact"] = "k3",
) -> tuple[Tensor, GrpoStats]:  # fmt: skip
    """GRPO (DeepSeekMath, arXiv:2402.03300, equation 3), `sum_t w_t * loss_t` with

        ratio_t = p(y_t) / p_old(y_t)
        loss_t  = -importance_t * min(ratio_t * A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) * A_t) + beta * KL_t

    token_weights `[N]` from `step_token_weights`; advantages `[N]`, each completion's repeated over its tokens. old_logprobs
    `[N]`: of the policy that the update starts from; None where that is the policy itself (one update per batch: the
    ratio is 1, its gradient is not). importance `[N]`: a fixed factor on the policy term, as in truncated importance
    sampling. Clips of math.inf turn clipping off; clip_high > clip_low is DAPO's clip-higher. kl: "k3" estimates it from
    ref_logprobs `[N]`, "exact" sums over the vocabulary, from ref_hidden `[N, D_ref]` and ref_weight `[V, D_ref]`. All logits
    are divided by `temperature`, as they were in sampling. With beta 0 the KL is only reported, and needs no reference.

    The `grpo_loss` listing of the published overview page is something else, and NaN for any input: see tests/test_loss.py.
    """
    if kl not in ("k3", "exact") or not min(clip_low, clip_high) >= 0:
        raise ValueError(
            f"kl={kl!r} must be 'k3' or 'exact', clip_low={clip_low} and clip_high={clip_high} not negative"
        )
    if beta != 0 and (ref_logprobs if kl == "k3" else ref_hidden) is None:
        needed = "ref_logprobs" if kl == "k3" else "ref_hidden and ref_weight"
        raise ValueError(
            f"beta={beta} with kl={kl!r} needs {needed}; set beta=0 to train without a reference"
        )
    per_token = dict(
        advantages=advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, importance=importance
    )
    _check(
        hidden, weight, targets, temperature, ref_hidden, ref_weight, token_weights=token_weights, **per_token
    )

    def token_loss(logprobs: Tensor, entropy: Tensor, exact_kl: Tensor | None, rows: slice) -> Tensor:
        ratio = (logprobs - (logprobs.detach() if old_logprobs is None else old_logprobs[rows])).exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        loss = -torch.min(ratio * advantages[rows], clipped * advantages[rows])
        if importance is not None:
            loss = loss * importance[rows]
        if beta != 0:
            loss = loss + beta * (k3_kl(logprobs, ref_logprobs[rows]) if kl == "k3" else exact_kl)
        return loss

    options = dict(temperature=temperature, ref_hidden=ref_hidden, ref_weight=ref_weight)
    loss, stats = fused_token_loss(hidden, weight, targets, token_loss, token_weights, **options)
    ratio = torch.ones_like(stats.logprobs) if old_logprobs is None else (stats.logprobs - old_logprobs).exp()
    is_clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
    if kl == "k3":
        stats = stats._replace(kl=None if ref_logprobs is None else k3_kl(stats.logprobs, ref_logprobs))
    return loss, GrpoStats(*stats, is_clipped)


def step_token_weights(
    lengths: Sequence[int], mode: Literal["sequence", "token", "constant"], max_length: int | None = None
) -> list[float]:
    """Weight of every token of each completion in one *whole* optimizer step, however it is later cut into micro-batches.

    lengths: tokens of each of the B completions (0 for one that is masked out). Modes:
        "sequence"  1 / (B * length)      mean over tokens, then over completions: GRPO, arXiv:2402.03300
        "token"     1 / sum(lengths)      mean over tokens: DAPO, arXiv:2503.14476
        "constant"  1 / (B * max_length)  no length in it at all: Dr. GRPO, arXiv:2503.20783
    >>> step_token_weights([2, 6], "token")
    [0.125, 0.125]
    """
    if min(lengths, default=0) < 0:
        raise ValueError(f"lengths must not be negative: {list(lengths)}")
    if mode == "sequence":
        return [1 / (len(lengths) * length) if length else 0.0 for length in lengths]
    if mode == "token":
        return [1 / sum(lengths) if length else 0.0 for length in lengths]
    if mode != "constant":
        raise ValueError(f"mode must be 'sequence', 'token' or 'constant', not {mode!r}")
    if max_length is None or max_length < max(lengths, default=1):
        raise ValueError(
            f"mode 'constant' needs max_length, at least the longest of the lengths; it is {max_length}"
        )
    return [1 / (len(lengths) * max_length)] * len(lengths)
