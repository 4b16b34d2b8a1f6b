"""Fused linear -> log-softmax -> loss, without the full `[N, V]` logits.

For a 150k vocabulary the logits are by far the largest tensor of training, and autograd keeps several copies of them.
So the tokens are processed in chunks, and all that needs a chunk's logits is computed while they exist:

    logits = hidden @ weight.T / temperature              one buffer, overwritten by each chunk
    logprobs, entropy, kl        per-token statistics     float32, [n]
    loss = token_loss(logprobs, kl)                       the caller's formula, [n]; autograd differentiates it
    d logits                     by the chain rule        written over the logits
    d hidden, d weight           two matrix products      accumulated

The *forward pass computes the gradient*; backward only returns it. The derivatives for the chain rule, with
p = softmax(logits), q = softmax(reference logits) and y the target token:

    d log p_y / d logits_j  = [j = y] - p_j
    d KL(p||q) / d logits_j =  p_j (log p_j - log q_j - KL)

Numerics: matrix products run in the dtype of `hidden` and `weight`; bfloat16 inputs give float32 logits on a GPU,
bfloat16 logits on a CPU. Softmax, entropy, KL and loss are float32. The head's gradient is summed over chunks in
float32 and rounded once. Elementwise kernels are compiled for vocabularies of at least 4,096 (gpu.py).
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nano_atlas.gpu import is_worth_compiling
from nano_atlas.model import PackedAttention, Transformer

# (logprobs [n], kl [n] | None, rows) -> loss [n]; `rows`: the chunk's slice of the N tokens
TokenLoss = Callable[[Tensor, Tensor | None, slice], Tensor]
Reference = tuple[Tensor, Tensor]  # hidden states [N, D_ref] and head [V, D_ref]

MAX_CHUNK_TOKENS = 1024  # longer matrix products are no faster per token
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**27}  # logits in one chunk: 128 MiB and 512 MiB of float32


class TokenStats(NamedTuple):
    """Statistics of each token's distribution, detached; each `[N]` float32, in nats."""

    logprobs: Tensor  # log-probability of the target
    entropy: Tensor
    kl: Tensor | None  # full-vocabulary KL(policy || reference); None without a reference


# ---- elementwise kernels over one chunk of logits [n, V]; everything inside is float32


def _chunk_stats(logits, ref_logits, target_logits, inverse_temperature):
    """-> TokenStats of the chunk, log-sum-exp [n], the reference's log-sum-exp [n] (None without reference)."""
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


def _logits_gradient(
    out, logits, ref_logits, targets, inverse_temperature, stats, logsumexp, ref_logsumexp, d_logprobs, d_kl
):
    """Writes d loss / d logits to `out`; it may be the logits. d_logprobs, d_kl: derivatives of the loss, [n]."""
    logprobs = logits.float() * inverse_temperature - logsumexp[:, None]  # [n, V]
    per_probability = -d_logprobs[:, None]
    if d_kl is not None:
        ref_logprobs = ref_logits.float() * inverse_temperature - ref_logsumexp[:, None]
        per_probability = per_probability + d_kl[:, None] * (logprobs - ref_logprobs - stats.kl[:, None])
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    gradient = logprobs.exp() * per_probability + torch.where(is_target, d_logprobs[:, None], 0.0)
    out.copy_(gradient * inverse_temperature)


# dynamic: one compilation serves all chunk lengths and vocabularies (except chunks of a single token)
_compiled = cache(partial(torch.compile, dynamic=True, fullgraph=True))


def _run(kernel: Callable, *arguments):
    return (_compiled(kernel) if is_worth_compiling(arguments[0].shape[1]) else kernel)(*arguments)


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """`hidden @ weight.T`, `[n, V]`, in the buffer; resized, because a view of it would be compiled again."""
    is_widened = buffer.dtype != hidden.dtype  # bfloat16 to float32, which only CUDA's mm supports
    options = {"out_dtype": buffer.dtype} if is_widened else {}
    return torch.mm(hidden, weight.T, out=buffer.resize_(len(hidden), len(weight)), **options)


def _differentiate(token_loss: TokenLoss, weights: Tensor, stats: TokenStats, rows: slice) -> tuple:
    """-> sum of the weighted losses [], its derivatives by log-probs and KL, [n] (None: independent of the KL)."""
    with torch.enable_grad():
        inputs = [None if x is None else x.detach().requires_grad_() for x in (stats.logprobs, stats.kl)]
        losses = token_loss(*inputs, rows)
        if losses.shape != weights.shape:  # a [n, 1] would silently broadcast to [n, n]
            shapes = tuple(weights.shape), tuple(losses.shape)
            raise ValueError("token_loss must return {}, one number per token, not {}".format(*shapes))
        given = [x for x in inputs if x is not None]
        gradients = torch.autograd.grad(losses.sum(), given, allow_unused=True)
    weighted = [None if x is None else weights * x for x in (losses.detach(), *gradients)]
    return weighted[0].sum(), weighted[1], weighted[2] if stats.kl is not None else None


@torch.no_grad()
def _sweep(hidden, weight, targets, temperature, reference, token_loss=None, weights=None, needs=(0, 0)):
    """One pass over the chunks -> loss [] float32, statistics, d loss / d hidden, d loss / d weight (None if not needed)."""
    device, tokens, vocabulary = hidden.device, len(hidden), len(weight)
    longest = max(1, min(MAX_CHUNK_TOKENS, CHUNK_ELEMENTS[device.type] // vocabulary))
    length = math.ceil(tokens / math.ceil(tokens / longest)) if tokens else 1  # equal, except the last chunk
    chunks = [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]
    dtype = torch.float32 if weight.is_cuda else weight.dtype
    buffer = torch.empty(min(length, tokens), vocabulary, dtype=dtype, device=device)
    ref_buffer = None if reference is None else torch.empty_like(buffer)
    d_buffer = buffer if dtype == hidden.dtype else torch.empty_like(buffer, dtype=hidden.dtype)
    d_hidden = torch.empty_like(hidden) if needs[0] else None
    is_summed_apart = weight.dtype != torch.float32 and len(chunks) > 1
    sum_dtype = torch.float32 if is_summed_apart else weight.dtype
    d_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs[1] else None
    d_part = torch.empty_like(weight) if needs[1] and is_summed_apart and not weight.is_cuda else None
    # a tensor: for a number, each temperature would compile another kernel
    inverse_temperature = torch.full((), 1.0 / temperature, device=device)
    loss, every = torch.zeros((), device=device), torch.empty(3, tokens, device=device)

    for rows in chunks:
        logits = _logits(hidden[rows], weight, buffer)
        ref_logits = None if reference is None else _logits(reference[0][rows], reference[1], ref_buffer)
        # outside the kernel: on a CPU, a target beyond the vocabulary would crash the process in a compiled kernel
        target_logits = logits.gather(1, targets[rows, None]).squeeze(1)
        stats, *logsumexps = _run(_chunk_stats, logits, ref_logits, target_logits, inverse_temperature)
        every[: 2 if reference is None else 3, rows] = torch.stack([x for x in stats if x is not None])
        if token_loss is None:
            continue
        chunk_loss, *derivatives = _differentiate(token_loss, weights[rows].float(), stats, rows)
        loss += chunk_loss
        if any(needs):
            d_logits = d_buffer.resize_(logits.shape)
            known = (targets[rows], inverse_temperature, stats, *logsumexps, *derivatives)
            _run(_logits_gradient, d_logits, logits, ref_logits, *known)
        if d_hidden is not None:
            torch.mm(d_logits, weight, out=d_hidden[rows])
        if d_part is not None:
            d_weight += torch.mm(d_logits.T, hidden[rows], out=d_part)
        elif d_weight is not None and is_summed_apart:  # only CUDA's addmm supports this
            torch.addmm(d_weight, d_logits.T, hidden[rows], out_dtype=torch.float32, out=d_weight)
        elif d_weight is not None:
            d_weight.addmm_(d_logits.T, hidden[rows])
    buffer = ref_buffer = d_buffer = logits = ref_logits = d_logits = None  # frees memory for d_weight.to()
    if d_weight is not None and is_summed_apart:
        d_weight = d_weight.to(weight.dtype) if d_part is None else d_part.copy_(d_weight)
    return loss, TokenStats(every[0], every[1], None if reference is None else every[2]), d_hidden, d_weight


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, *arguments):
        loss, stats, *ctx.gradients = _sweep(hidden, weight, *arguments, ctx.needs_input_grad[:2])
        ctx.mark_non_differentiable(*(x for x in stats if x is not None))
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor, *_):
        if ctx.gradients is None:
            raise RuntimeError("the fused loss keeps its gradient for one backward pass; compute it again")
        gradients, ctx.gradients = ctx.gradients, None  # returned without a copy: [V, D] is large
        return *(None if gradient is None else gradient.mul_(d_loss) for gradient in gradients), *[None] * 5


def fused_token_loss(
    hidden, weight, targets, token_loss, token_weights, *, temperature=1.0, reference: Reference | None = None
) -> tuple[Tensor, TokenStats]:
    """`sum_t w_t * token_loss_t` for any loss that is a function of each token's log-probability and exact KL.

    hidden `[N, D]` (float32 or bfloat16), weight `[V, D]` (same dtype; may be the tied embedding), targets
    `[N]` int64. token_loss maps (logprobs, kl, rows) of a chunk, float32 `[n]`, to losses `[n]`, element by
    element; `rows`: the slice of the N tokens. Logits of policy and reference are divided by temperature.

    Returns the loss, `[]` float32, differentiable once by hidden and weight, and the detached statistics of
    all tokens. Raises ValueError for shapes or dtypes that do not match.
    """
    shapes = [tuple(x.shape) for x in (hidden, weight, targets, token_weights)]
    if shapes[0] != (*shapes[2], shapes[1][-1]) or shapes[2] != shapes[3]:  # a [N, 1] would broadcast
        raise ValueError(f"expected hidden [N, D], weight [V, D], targets, token_weights [N], not {shapes}")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"hidden ({hidden.dtype}), weight ({weight.dtype}) must both be float32 or bfloat16")
    arguments = (hidden, weight, targets, temperature, reference, token_loss, token_weights)
    if not torch.is_grad_enabled():
        return _sweep(*arguments)[:2]
    loss, *stats = _GradientInForward.apply(*arguments)
    return loss, TokenStats(*stats)


def token_stats(hidden, weight, targets, temperature=1.0, reference: Reference | None = None) -> TokenStats:
    """The statistics of all tokens, without gradient; arguments as in `fused_token_loss`."""
    return _sweep(hidden, weight, targets, temperature, reference)[1]


def batch_loss(model: Transformer, batch, target_tokens: int) -> Tensor:
    """The SFT loss `[]` of a `data.Batch`: -log p summed over its targets / number of targets of the *whole step*."""
    attention = PackedAttention(batch.lengths, batch.input_ids.device)
    hidden = model(batch.input_ids, attention.positions, attention)[batch.target_positions]
    weights = torch.full_like(batch.targets, 1 / target_tokens, dtype=torch.float32)
    nll = lambda logprobs, *_: -logprobs
    return fused_token_loss(hidden, model.head_weight, batch.targets, nll, weights)[0]
