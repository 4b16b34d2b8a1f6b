"""Does it fit? The bytes that training takes on each GPU, one formula per item.

    python -m benchmarks.memory --policy Qwen/Qwen3-8B --student Qwen/Qwen3-4B --gpus 2 8 16

One GPU trains and samples. Of two, the second samples with vLLM, and the optimizer's state is on the host. Of more, each holds 1/N
of the policy (FSDP2), the whole frozen models and a copy to sample from. The KV cache is gone when gradients come. Not counted:
CUDA's context (about 1 GB) and what the allocator cannot reuse. tests/test_memory.py compares with real tensors, except the fused
loss on a GPU and FSDP2's buffers. c: the model; b: bytes of a number (2: bfloat16).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from nano_atlas.checkpoint import read_config
from nano_atlas.config import option, parse, run_script
from nano_atlas.loss import CHUNK_ELEMENTS, MAX_CHUNK_TOKENS
from nano_atlas.model import ModelConfig

QWEN3 = {  # hidden and intermediate size, layers, heads, tied embedding; from their config.json
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, True), "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32, True), "Qwen/Qwen3-8B": (4096, 12288, 36, 32, False),
    "Qwen/Qwen3-14B": (5120, 17408, 40, 40, False), "Qwen/Qwen3-32B": (5120, 25600, 64, 64, False),
}  # fmt: skip
CARD = 81_559 * 2**20  # bytes of an H100 of "80 GB"
VLLM_SHARE = 0.9  # of a card that only serves
NORM_INPUT = {
    4: 4,
    2: 8,
}  # bytes of a number that a norm keeps in float32; of bfloat16 two copies, for square and product
LOGITS = {4: 4, 2: 6}  # bytes of an element of the logits, and of the head's gradient
DURING_UPDATE = ("gradients", "activations", "fused loss", "gathered by FSDP2")


def known_config(name: str) -> ModelConfig:
    """A Qwen3 by its name, or what is in a checkpoint directory. Raises UserError."""
    if name not in QWEN3:
        return read_config(name)
    *sizes, is_tied = QWEN3[name]
    return ModelConfig("qwen3", 151936, *sizes, 8, 128, tie_word_embeddings=is_tied, qk_norm=True)


def layer_parameters(c: ModelConfig) -> int:
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    matrices = 2 * c.hidden_size * (q + k) + 3 * c.hidden_size * c.intermediate_size
    return matrices + 2 * c.hidden_size + c.attention_bias * (q + 2 * k) + c.qk_norm * 2 * c.head_dim


def root_parameters(c: ModelConfig) -> int:
    """Embedding, head where it is another matrix, and final norm."""
    return (2 - c.tie_word_embeddings) * c.vocab_size * c.hidden_size + c.hidden_size


def parameters(c: ModelConfig) -> int:
    return c.num_hidden_layers * layer_parameters(c) + root_parameters(c)


def layer_activations(c: ModelConfig, b: int = 2) -> int:
    """Per token, what autograd keeps of a layer of `model.py` (documents of one length; others add padding)."""
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norms = 2 * c.hidden_size * (NORM_INPUT[b] + b + b) + c.qk_norm * (q + k) * (NORM_INPUT[b] + b)
    return norms + b * 2 * (q + k) + 4 * b * c.intermediate_size  # q, k, v, attended; gate, silu, up, product


def activations(c: ModelConfig, tokens: int, is_checkpointed: bool, b: int = 2) -> int:
    """Every layer's, or, checkpointed, every layer's input and one whole layer's; the final norm's; cosines and sines."""
    layers, one = c.num_hidden_layers, layer_activations(c, b)
    kept = layers * b * c.hidden_size + one if is_checkpointed else layers * one
    return tokens * (kept + c.hidden_size * (NORM_INPUT[b] + 2 * b) + 2 * c.head_dim * b)


def kv_cache(c: ModelConfig, rows: int, slots: int, b: int = 2) -> int:
    """Keys and values of every layer, of `rows` sequences as long as the longest may get."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * b * rows * slots


def training(c: ModelConfig, tokens: int, b=2, ranks=1, is_offloaded=False) -> dict[str, int]:
    """{item: bytes} on each rank, with gradient checkpointing; tokens: of a micro-batch."""
    total, layer, root = parameters(c), layer_parameters(c), root_parameters(c)
    chunk = min(tokens, MAX_CHUNK_TOKENS, CHUNK_ELEMENTS["cuda"] // c.vocab_size)
    head, masters = c.vocab_size * c.hidden_size, 12 if b == 2 and ranks == 1 else 8
    items = {
        "policy": (b if ranks == 1 else 4) * total // ranks,  # sharded they are the float32 masters
        "masters, moments": 0 if is_offloaded else masters * total // ranks,
        "gradients": 4 * total // ranks,  # summed in float32 over the micro-batches
        "activations": activations(c, tokens, True, b),
        "fused loss": (chunk * c.vocab_size + head) * LOGITS[b] + tokens * c.hidden_size * b,
    }
    if ranks > 1:  # weights and gradients of the root and of two layers, input of the largest reduce-scatter
        items["gathered by FSDP2"] = b * (root + 2 * layer) + b * (root + layer) + 4 * max(root, layer)
    return items


def grpo(policy: ModelConfig, student: ModelConfig, gpus: int, rows: int, slots: int, tokens: int) -> dict:
    """-> {kind of GPU: {item: bytes}}; rows x slots: of the embedded sampler's cache."""
    train = training(policy, tokens, ranks=gpus if gpus > 2 else 1, is_offloaded=gpus == 2)
    copy, reference = {"sampler's copy": 2 * parameters(policy)}, {"reference": 2 * parameters(policy)}
    learner = {"student": 2 * parameters(student)}
    if gpus == 2:
        rest = {"KV cache": int(VLLM_SHARE * CARD) - sum((copy | learner).values())}
        return {"2 GPUs: trainer": train | reference, "2 GPUs: vLLM": copy | learner | rest}
    learner["KV cache"] = max(kv_cache(c, rows, slots) for c in (policy, student))
    return {f"{gpus} GPUs": train | reference | (copy if gpus > 1 else {}) | learner}


def peak(items: dict[str, int]) -> int:
    update = sum(items.get(name, 0) for name in DURING_UPDATE)
    return sum(items.values()) - min(update, items.get("KV cache", 0))


def gigabytes(size: float) -> str:
    digits = 1 if size < 9.95e9 else 0
    return f"{size / 1e9:.{digits}f}" if size else ""


@dataclass(frozen=True)
class Config:
    policy: str = option("Qwen/Qwen3-8B", "model that is trained: a Qwen3 by name, or a checkpoint directory")
    student: str = option("Qwen/Qwen3-4B", "model that is taught, likewise")
    gpus: tuple[int, ...] = option((2, 8, 16), "numbers of GPUs", above=0)
    tokens_per_batch: int = option(8192, "tokens in one micro-batch", above=0)
    cache_rows: int = option(16, "sequences that the embedded sampler decodes at once", above=0)
    sequence_tokens: int = option(8192, "longest prompt and completion together (tokens)", above=0)


def table(config: Config) -> str:
    """Markdown: GB (10^9 bytes) per GPU."""
    policy, student = known_config(config.policy), known_config(config.student)
    rows, slots, tokens = config.cache_rows, config.sequence_tokens, config.tokens_per_batch
    columns = {}
    for gpus in config.gpus:
        columns |= grpo(policy, student, gpus, rows, slots, tokens)
    names = dict.fromkeys(name for items in columns.values() for name in items)
    lines = [["GB per GPU", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(gigabytes(items.get(name, 0)) for items in columns.values())] for name in names]
    lines += [["**peak**", *(f"**{gigabytes(peak(items))}**" for items in columns.values())]]
    whole, cache = gigabytes(activations(policy, tokens, False)), gigabytes(kv_cache(policy, 1, slots))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + (
        f"\n\nAn 80 GB card has {gigabytes(CARD)} GB. Activations of {tokens:,} tokens with gradient checkpointing; without, {whole} GB. "
        f"One sequence of {slots:,} tokens has {cache} GB of KV cache. Masters and moments of 2 GPUs, {gigabytes(12 * parameters(policy))} GB, are on the host."
    )


def main(argv: Sequence[str] | None = None) -> None:
    print(table(parse(Config, sys.argv[1:] if argv is None else argv, {}, __doc__)))


if __name__ == "__main__":
    run_script(main)
