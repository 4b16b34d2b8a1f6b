"""Does it fit? The bytes that training takes on each GPU, one formula per item.

    python -m nano_atlas.memory --policy Qwen/Qwen3-8B --student Qwen/Qwen3-4B --gpus 2 8 16

One GPU trains and samples. Of two, the second samples with vLLM, and the optimizer's state is on the host. Of more, each holds 1/N
of the policy (`torchrun`, FSDP2) beside the whole frozen models and a copy to sample from. Generation and update take turns: the
KV cache is gone when gradients come. Not counted: CUDA's context (about 1 GB) and what the allocator cannot reuse. The byte counts
are held against tensors in tests/test_memory.py, but for FSDP2's buffers, which follow from its source.

In the formulas b is bytes per number of weights and activations, N the ranks, P the parameters, D the hidden size, L the layers.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nano_atlas.checkpoint import read_config
from nano_atlas.config import option, parse, run_script
from nano_atlas.errors import UserError
from nano_atlas.loss import CHUNK_ELEMENTS, MAX_CHUNK_TOKENS
from nano_atlas.model import ModelConfig

# hidden and intermediate size, layers, heads, tied embedding; from their config.json
QWEN3 = {
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, True), "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32, True), "Qwen/Qwen3-8B": (4096, 12288, 36, 32, False),
    "Qwen/Qwen3-14B": (5120, 17408, 40, 40, False), "Qwen/Qwen3-32B": (5120, 25600, 64, 64, False),
}  # fmt: skip
CARD = 81_559 * 2**20  # bytes of an H100 or A100 of "80 GB"
VLLM_SHARE = 0.9  # of a card that only serves
DURING_GENERATION, DURING_UPDATE = ("KV cache",), ("gradients", "activations", "fused loss", "gathered by FSDP2")


def known_config(name: str) -> ModelConfig:
    """A Qwen3 by its name, or what is in a checkpoint directory. Raises UserError."""
    if name not in QWEN3 or (Path(name) / "config.json").is_file():
        return read_config(name)
    width, intermediate, layers, heads, is_tied = QWEN3[name]
    return ModelConfig("qwen3", 151936, width, intermediate, layers, heads, 8, 128, 40960, tie_word_embeddings=is_tied, qk_norm=True)


def layer_parameters(c: ModelConfig) -> int:
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    matrices = 2 * c.hidden_size * (q + k) + 3 * c.hidden_size * c.intermediate_size  # q, o; k, v; gate, up, down
    return matrices + 2 * c.hidden_size + c.attention_bias * (q + 2 * k) + c.qk_norm * 2 * c.head_dim


def root_parameters(c: ModelConfig) -> int:
    """Embedding, head where it is another matrix, and final norm."""
    return (2 - c.tie_word_embeddings) * c.vocab_size * c.hidden_size + c.hidden_size


def parameters(c: ModelConfig) -> int:
    return c.num_hidden_layers * layer_parameters(c) + root_parameters(c)


def weights(c: ModelConfig, b: int = 2, ranks: int = 1) -> int:
    """b P; sharded they are the float32 masters: 4 P / N."""
    return parameters(c) * (b if ranks == 1 else 4) // ranks


def gradients(c: ModelConfig, ranks: int = 1) -> int:
    """Summed in float32 over the micro-batches: 4 P / N."""
    return 4 * parameters(c) // ranks


def optimizer_state(c: ModelConfig, b: int = 2, ranks: int = 1) -> int:
    """Adam's two moments, 8 P / N, and a master where the weight is not one."""
    return parameters(c) * (12 if b == 2 and ranks == 1 else 8) // ranks


def gathered(c: ModelConfig, b: int = 2) -> int:
    """Whole tensors that FSDP2 has at a time: weights of the root group and of two layers (one of them fetched ahead), gradients
    of the root group and one layer, and the float32 input of the largest reduce-scatter."""
    layer, root = layer_parameters(c), root_parameters(c)
    return b * (root + 2 * layer) + b * (root + layer) + 4 * max(root, layer)


def layer_activations(c: ModelConfig, b: int = 2) -> int:
    """Per token, what autograd keeps of a layer of `model.py` (documents of one length; others add padding).

    A norm: its input in float32 (in bfloat16 two copies, one for the square and one for the product), the normalised product, its
    output. Attention: q, k, v and the result. MLP: gate, silu(gate), up and their product.
    """
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    floats = 8 if b == 2 else 4
    norms = 2 * c.hidden_size * (floats + 2 * b) + c.qk_norm * (q + k) * (floats + b)
    return norms + b * (2 * q + 2 * k) + 4 * b * c.intermediate_size


def activations(c: ModelConfig, tokens: int, is_checkpointed: bool, b: int = 2) -> int:
    """Every layer's; with gradient checkpointing b D of each and one layer's that is being recomputed. And the final norm's, and
    the cosines and sines of the rotary embedding."""
    layers, one = c.num_hidden_layers, layer_activations(c, b)
    kept = layers * b * c.hidden_size + one if is_checkpointed else layers * one
    return tokens * (kept + c.hidden_size * ((8 if b == 2 else 4) + 2 * b) + 2 * c.head_dim * b)


def fused_loss(c: ModelConfig, tokens: int, b: int = 2) -> int:
    """A chunk of float32 logits (loss.py) and its gradient in b bytes, d hidden, d weight, and d weight summed in float32."""
    chunk = min(tokens, MAX_CHUNK_TOKENS, CHUNK_ELEMENTS["cuda"] // c.vocab_size)
    head = c.vocab_size * c.hidden_size
    return chunk * c.vocab_size * (4 + (b if b < 4 else 0)) + tokens * c.hidden_size * b + head * (b + (4 if b < 4 else 0))


def kv_cache(c: ModelConfig, rows: int, slots: int, b: int = 2) -> int:
    """Keys and values of every layer: 2 L H_kv D_head b per token, `rows` sequences as long as the longest may get."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * b * rows * slots


def training(c: ModelConfig, tokens: int, *, ranks: int = 1, is_offloaded: bool = False, is_checkpointed: bool = True) -> dict[str, int]:
    """Bytes by item for a model trained in bfloat16, on each of the ranks."""
    return {
        "policy": weights(c, 2, ranks), "masters, moments": 0 if is_offloaded else optimizer_state(c, 2, ranks),
        "gradients": gradients(c, ranks), "activations": activations(c, tokens, is_checkpointed), "fused loss": fused_loss(c, tokens),
        **({"gathered by FSDP2": gathered(c)} if ranks > 1 else {}),
    }  # fmt: skip


def grpo(policy: ModelConfig, student: ModelConfig, gpus: int, tokens: int, rows: int, slots: int, **options) -> dict[str, dict[str, int]]:
    """Bytes by kind of GPU and item. tokens: of a micro-batch; rows x slots: of the embedded sampler's cache."""
    train = training(policy, tokens, ranks=gpus if gpus > 2 else 1, is_offloaded=gpus == 2, **options)
    frozen = {"reference": weights(policy), "student": weights(student)}
    if gpus == 2:
        served = {"sampler's copy": weights(policy), "student": weights(student)}
        cache = {"KV cache": int(VLLM_SHARE * CARD) - sum(served.values())}
        return {"2 GPUs: trainer": {**train, "reference": weights(policy)}, "2 GPUs: vLLM": {**served, **cache}}
    cache = {"KV cache": max(kv_cache(c, rows, slots) for c in (policy, student))}
    copy = {"sampler's copy": weights(policy)} if gpus > 1 else {}
    return {f"{gpus} GPUs" if gpus > 1 else "1 GPU": {**train, **frozen, **copy, **cache}}


def peak(items: dict[str, int]) -> int:
    generation, update = (sum(items.get(name, 0) for name in names) for names in (DURING_GENERATION, DURING_UPDATE))
    return sum(items.values()) - min(generation, update)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}" if size < 99.5e8 else f"{size / 1e9:.0f}"


def sft_needs(name: str, tokens: int, is_offloaded: bool = False) -> str:
    """For the help text of a preset."""
    model = known_config(name)
    rest = f", and {gigabytes(optimizer_state(model))} GB for the optimizer" if is_offloaded else ""
    return f"{gigabytes(peak(training(model, tokens, is_offloaded=is_offloaded)))} GB{rest}"


def grpo_needs(policy: str, student: str, gpus: int, tokens: int, rows: int, slots: int) -> str:
    columns = grpo(known_config(policy), known_config(student), gpus, tokens, rows, slots)
    host = f", and {gigabytes(optimizer_state(known_config(policy)))} GB of the host" if gpus == 2 else ""
    return " and ".join(f"{gigabytes(peak(items))} GB" for items in columns.values()) + host


@dataclass(frozen=True)
class Config:
    policy: str = option("Qwen/Qwen3-8B", "model that is trained: a Qwen3 by name, or a checkpoint directory")
    student: str = option("Qwen/Qwen3-4B", "model that is taught, likewise")
    gpus: tuple[int, ...] = option((2, 8, 16), "numbers of GPUs")
    tokens_per_batch: int = option(8192, "tokens in one micro-batch")
    cache_rows: int = option(16, "sequences that the embedded sampler decodes at once")
    sequence_tokens: int = option(8192, "longest prompt and completion together, in tokens")
    gradient_checkpointing: bool = option(True, "keep one activation per layer and recompute the rest")

    def check(self) -> None:
        if min(*self.gpus, self.tokens_per_batch, self.cache_rows, self.sequence_tokens, 1) < 1 or not self.gpus:
            raise UserError("--gpus, --tokens-per-batch, --cache-rows and --sequence-tokens must be above 0")


def table(config: Config) -> str:
    """Markdown: GB (10^9 bytes) per GPU."""
    policy, student = known_config(config.policy), known_config(config.student)
    columns: dict[str, dict[str, int]] = {}
    for gpus in config.gpus:
        columns |= grpo(policy, student, gpus, config.tokens_per_batch, config.cache_rows, config.sequence_tokens,
                        is_checkpointed=config.gradient_checkpointing)  # fmt: skip
    names = dict.fromkeys(name for items in columns.values() for name in items)
    rows = [["GB per GPU", *columns], ["---", *["---:"] * len(columns)]]
    rows += [[name, *(gigabytes(items[name]) if items.get(name) else "" for items in columns.values())] for name in names]
    rows += [["**peak**", *(f"**{gigabytes(peak(items))}**" for items in columns.values())]]
    other = activations(policy, config.tokens_per_batch, not config.gradient_checkpointing)
    notes = [
        f"Policy {config.policy} ({parameters(policy) / 1e9:.2f}e9 parameters), student {config.student}; an 80 GB card has "
        f"{CARD / 1e9:.1f} GB. Activations of {config.tokens_per_batch:,} tokens; {gigabytes(other)} GB "
        f"{'without' if config.gradient_checkpointing else 'with'} gradient checkpointing. A sequence of {config.sequence_tokens:,} "
        f"tokens has {gigabytes(kv_cache(policy, 1, config.sequence_tokens))} GB of KV cache."
    ]
    if 2 in config.gpus:
        notes += [f"With 2 GPUs the host holds {gigabytes(optimizer_state(policy))} GB of masters and moments."]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n" + " ".join(notes)


def main(argv: Sequence[str] | None = None) -> None:
    print(table(parse(Config, sys.argv[1:] if argv is None else argv, {}, __doc__)))


if __name__ == "__main__":
    run_script(main)
