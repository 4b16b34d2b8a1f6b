"""The dense decoders Llama 3.x, Mistral, Qwen2.5 and Qwen3, over flat lists of `N` tokens of any documents.

The caller's `attention` object decides what a token attends to. So one `Transformer` serves packed training
(`PackedAttention`), groups of completions (`SharedPromptAttention`; on a GPU gpu.py) and cached decoding
(sampler.py) without computing on padding. Modules and parameters have the names of Hugging Face checkpoints.
Not supported, and refused: dropout, sliding windows, mixtures of experts.
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
    rope_scaling: dict[str, float] | None = None  # the fields of `rope_inverse_frequencies`: Llama 3.1's
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
    """Rotation per position (radians) of each pair of channels, `[D_head / 2]` float32, with Llama 3.1's scaling if any."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = scaling["original_max_position_embeddings"] / wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast channels, 0: slow ones
    return (1 - kept) * frequencies / scaling["factor"] + kept * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout of Hugging Face; x `[N, H, D_head]`, cos and sin `[N, 1, D_head]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, width, bias = config.head_dim, config.hidden_size, config.attention_bias
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, q_width, bias)
        self.k_proj = nn.Linear(width, kv_width, bias)
        self.v_proj = nn.Linear(width, kv_width, bias)
        self.o_proj = nn.Linear(q_width, width, bias=False)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(config.head_dim, config.rms_norm_eps) for _ in "qk")

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, D] -> rotated q [N, H, D_head] and k, and v [N, H_kv, D_head]"""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (flat.unflatten(-1, (-1, self.head_dim)) for flat in (q, k, v))
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v


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
        return self.after(x, attention(layer, *self.before(x, cos, sin)))

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [N, D], attended [N, H, D_head] -> [N, D]"""
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A decoder that returns final hidden states; loss and sampler apply the output head, `head_weight` (see loss.py)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()  # gives names the prefix `model.`
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.recompute_activations = False  # gradient checkpointing, one layer at a time
        self.is_compiled = False  # see gpu.py
        self.compute_dtype: torch.dtype | None = None  # set for a sharded model; what it trains is float32

    @property
    def head_weight(self) -> Tensor:
        """`[V, D]`; the embedding itself if `tie_word_embeddings` is set."""
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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The attention kernel, causal unless there is a mask; q `[B, H, T, D_head]`, k and v `[B, H_kv, S, D_head]`."""
    if mask is not None and q.is_cuda:  # CUDA's fast kernels do not support a mask together with shared heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    options = {"is_causal": mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


class PackedAttention:
    """Causal attention within each of B documents, concatenated in one flat batch of `N = sum(lengths)` tokens.

    Only the attention kernel gets a padded view `[B, L_max]`. Padding is on the right and attention is
    causal, so no mask is needed. Documents of similar length waste the least padding.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.lengths, self.longest = list(lengths), max(lengths)
        columns = torch.arange(self.longest)
        is_real = columns < torch.tensor(self.lengths)[:, None]  # [B, L_max], of the padded view
        self.positions = columns.expand_as(is_real)[is_real].to(device)  # [N], each token's in its document
        self.slots = is_real.flatten().nonzero()[:, 0].to(device)  # [N], each token's in the flat padded view
        self.is_real, self.is_padded = is_real.to(device), not is_real.all()

    def pad(self, x: Tensor) -> Tensor:
        """[N, H, D_head] -> [B, H, L_max, D_head]"""
        if self.is_padded:
            x = x.new_zeros(len(self.lengths) * self.longest, *x.shape[1:]).index_copy(0, self.slots, x)
        return x.unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, H, L_max, D_head] -> [N, H, D_head]"""
        x = x.transpose(1, 2).flatten(0, 1)
        return x.index_select(0, self.slots) if self.is_padded else x

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.unpad(attend(self.pad(q), self.pad(k), self.pad(v)))


class SharedPromptAttention:
    """Attention for GRPO's groups: several completions share one prompt, which is computed once.

    The flat batch holds all prompts, then all completions; completion r continues prompt `prompt_of[r]`. Prompts are
    ordinary packed documents. A completion's token attends to its whole prompt and, causally, to its own completion.
    With G completions of a prompt this saves (G - 1) / G of the prompt's computation outside of attention.
    """

    def __init__(self, prompt_lengths, completion_lengths, prompt_of: Sequence[int], device):
        self.prompts = PackedAttention(prompt_lengths, device)
        self.completions = PackedAttention(completion_lengths, device)
        self.prompt_of = torch.tensor(prompt_of, device=device)
        before = torch.tensor(prompt_lengths)[prompt_of].repeat_interleave(torch.tensor(completion_lengths))
        self.positions = torch.cat((self.prompts.positions, self.completions.positions + before.to(device)))
        size = self.completions.longest
        sees_prompt = self.prompts.is_real[self.prompt_of, None].expand(-1, size, -1)  # [R, C_max, P_max]
        sees_own = torch.ones(len(prompt_of), size, size, dtype=torch.bool, device=device).tril()
        self.mask = torch.cat((sees_prompt, sees_own), dim=-1)[:, None]  # [R, 1, C_max, P_max + C_max]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = len(self.prompts.positions)
        on_prompts = self.prompts(layer, q[:split], k[:split], v[:split])
        if self.completions.longest == 0:
            return on_prompts

        def joined(x: Tensor) -> Tensor:
            """[N, H_kv, D_head] -> [R, H_kv, P_max + C_max, D_head]"""
            prompts, completions = self.prompts.pad(x[:split]), self.completions.pad(x[split:])
            return torch.cat((prompts[self.prompt_of], completions), dim=2)

        out = attend(self.completions.pad(q[split:]), joined(k), joined(v), self.mask)
        return torch.cat((on_prompts, self.completions.unpad(out)))
