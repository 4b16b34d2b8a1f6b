"""The dense decoder family of Llama 3.x, Mistral, Qwen2.5 and Qwen3, over flat lists of tokens.

Every tensor here is *flat*: `N` tokens, whichever documents they belong to. The `attention` object that the model is called with
decides what a token may attend to. So one `Transformer` serves packed training (`PackedAttention`), cached decoding (`sampler.py`)
and scoring, and no computation is spent on padding. Names of modules and parameters are those of the Hugging Face checkpoints.

Simplified against the originals: no dropout, no sliding window, no mixture of experts (such configurations are refused).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

# (layer index, q [N, H, D_head], k [N, H_kv, D_head], v [N, H_kv, D_head]) -> [N, H, D_head]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency interpolation (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of one model; the fields have the names of a Hugging Face `config.json`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Llama3RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # bias on q, k and v (Qwen2.5)
    qk_norm: bool = False  # RMSNorm over each head of q and k (Qwen3)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)  # float32, whatever x is
        return self.weight * (x.float() * scale).to(x.dtype)


def rope_inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Rotation per position, in radians, of each pair of channels: `[D_head / 2]`, float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths  # full turns within the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)  # 0: slow channel, interpolated by `factor`; 1: fast channel, kept
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of the Hugging Face checkpoints; x `[N, H, D_head]`, cos and sin `[N, 1, D_head]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, layer: int) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [N, H, D_head]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [N, H_kv, D_head]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # [N, H_kv, D_head]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        attended = attention(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(attended.flatten(-2))


class SwiGLU(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and final norm (the checkpoints' `model.` prefix)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """A decoder that returns final hidden states; the output head is `head_weight`, applied by the loss and the sampler.

    Logits are never made here, because for a 150k vocabulary they are the largest tensor of training (see `loss.py`).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute_activations = False  # gradient checkpointing, one layer at a time
        self.compute_dtype: torch.dtype | None = None  # of a sharded model (its parameters are float32)

    @property
    def head_weight(self) -> Tensor:
        """`[V, D]`; the embedding itself where `tie_word_embeddings` is set."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """input_ids `[N]` int64, positions `[N]` int64 (within each document) -> normalised hidden states `[N, D]`."""
        x = self.model.embed_tokens(input_ids)
        frequencies = rope_inverse_frequencies(self.config, input_ids.device)
        angles = (positions[:, None].float() * frequencies).repeat(1, 2)[:, None]  # [N, 1, D_head]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for index, layer in enumerate(self.model.layers):
            if self.recompute_activations and torch.is_grad_enabled():
                x = recompute_in_backward(layer, x, cos, sin, attention, index, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attention, index)
        return self.model.norm(x)

    @torch.no_grad()
    def initialize(self, seed: int) -> "Transformer":
        """Random weights: normal(0, 0.02), output projections scaled down by sqrt(2 L) (GPT-2); reproducible from the seed."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if is_output else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self


class PackedAttention:
    """Causal attention inside each of B documents that lie end to end in one flat batch of `N = sum(lengths)` tokens.

    Only the attention kernel sees a padded view `[B, L_max]`. The padding is on the right and attention is causal, so no real
    token looks at it and no mask is needed. Group documents of similar length to keep that view tight.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.lengths = list(lengths)
        self.longest = max(self.lengths)
        counts = torch.tensor(self.lengths)
        starts = counts.cumsum(0) - counts
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        positions = torch.arange(int(counts.sum())) - starts[rows]
        self.positions = positions.to(device)  # [N] of each token in its document
        self.slots = (rows * self.longest + positions).to(device)  # [N] of each token in the flat padded view
        self.is_rectangular = int(counts.sum()) == len(counts) * self.longest

    def pad(self, x: Tensor) -> Tensor:
        """[N, H, D_head] -> [B, H, L_max, D_head]"""
        if not self.is_rectangular:
            x = x.new_zeros(len(self.lengths) * self.longest, *x.shape[1:]).index_copy(0, self.slots, x)
        return x.unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, H, L_max, D_head] -> [N, H, D_head]"""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.is_rectangular else x.index_select(0, self.slots)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.pad(q), self.pad(k), self.pad(v)
        is_grouped = q.shape[1] != k.shape[1]
        return self.unpad(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped))


class SharedPromptAttention:
    """Attention of several completions to one prompt that is computed only once, as GRPO's groups need it.

    The flat batch holds all prompts end to end, then all completions end to end; completion r continues prompt `prompt_of[r]`.
    Prompts are ordinary packed documents. A completion's token attends to its whole prompt and, causally, to its own completion.
    With G completions of a long prompt this saves (G - 1) / G of the prompt's work outside of attention.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        completion_lengths: Sequence[int],
        prompt_of: Sequence[int],
        device: torch.device | str,
    ):
        self.prompts = PackedAttention(prompt_lengths, device)
        self.completions = PackedAttention(completion_lengths, device)
        self.prompt_of = torch.tensor(prompt_of, device=device)
        lengths = torch.tensor(prompt_lengths, device=device)[self.prompt_of]  # [R]
        counts = torch.tensor(completion_lengths, device=device)
        continued = self.completions.positions + lengths.repeat_interleave(counts)
        self.positions = torch.cat((self.prompts.positions, continued))
        sees_prompt = torch.arange(self.prompts.longest, device=device) < lengths[:, None]  # [R, P_max]
        size = self.completions.longest
        sees_own = torch.ones(size, size, dtype=torch.bool, device=device).tril()  # [C_max, C_max]
        sees = sees_prompt[:, None].expand(-1, size, -1), sees_own.expand(len(prompt_of), -1, -1)
        self.mask = torch.cat(sees, dim=-1)[:, None]  # [R, 1, C_max, P_max + C_max]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = len(self.prompts.positions)
        on_prompts = self.prompts(layer, q[:split], k[:split], v[:split])
        if self.completions.longest == 0:
            return on_prompts

        def joined(x: Tensor) -> Tensor:
            """[N, H_kv, D_head] -> [R, H_kv, P_max + C_max, D_head]"""
            prompts, completions = self.prompts.pad(x[:split]), self.completions.pad(x[split:])
            return torch.cat((prompts[self.prompt_of], completions), dim=2)

        queries, is_grouped = self.completions.pad(q[split:]), q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(queries, joined(k), joined(v), self.mask, enable_gqa=is_grouped)
        return torch.cat((on_prompts, self.completions.unpad(out)))
