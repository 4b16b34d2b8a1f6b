"""Does it fit? The bytes that training takes on each GPU, one formula per item.

    python -m benchmarks.memory --policy Qwen/Qwen3-8B --student Qwen/Qwen3-4B --gpus 2 8 16
    python train_grpo.py --preset qwen3-8b-2gpu --show-layout      # of this machine and with these options

The first is of a fixed scheme: one GPU trains and samples; of two, the second samples with vLLM, and the optimizer's state is on the
host; of more, each holds 1/N of the policy (FSDP2), the whole frozen models and a copy to sample from. The second follows what
`choose_layout` chooses. The KV cache is gone when gradients come. Not counted: CUDA's context (about 1 GB) and what the allocator
cannot reuse. tests/test_memory.py compares with real tensors, except the fused loss on a GPU and FSDP2's buffers. c: the model; b:
bytes of a number (2: bfloat16); rank: of the adapters (LoRA), 0 where all weights are trained.
"""

import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import torch

from benchmarks.jobs import markdown
from nano_atlas import distributed
from nano_atlas.benches.scores import table as aligned
from nano_atlas.checkpoint import is_checkpoint, read_config
from nano_atlas.config import option, parse, run_script
from nano_atlas.layout import Layout, choose_layout, gpus_of
from nano_atlas.loss import CHUNK_ELEMENTS, MAX_CHUNK_TOKENS
from nano_atlas.model import ModelConfig
from nano_atlas.presets import SMOLLM2, presets
from nano_atlas.terminal import WIDTH
from nano_atlas.vllm.sampler import SHARED_MEMORY, memory_share

QWEN3 = {  # hidden and intermediate size, layers, heads, tied embedding; from their config.json
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, True), "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32, True), "Qwen/Qwen3-8B": (4096, 12288, 36, 32, False),
    "Qwen/Qwen3-14B": (5120, 17408, 40, 40, False), "Qwen/Qwen3-32B": (5120, 25600, 64, 64, False),
}  # fmt: skip
KNOWN = {
    name: ModelConfig("qwen3", 151936, *sizes, 8, 128, tie_word_embeddings=is_tied, qk_norm=True)
    for name, (*sizes, is_tied) in QWEN3.items()
}
KNOWN[SMOLLM2] = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True)
CARD = 81_559 * 2**20  # bytes of an H100 of "80 GB"
VLLM_SHARE = 0.9  # of a card that only serves
CONTEXT = 1e9  # bytes of CUDA's own on each GPU
QUESTION = 512  # tokens, with the words around it
# Bytes of a number that a norm keeps in float32; of bfloat16 two copies, for square and product.
NORM_INPUT = {4: 4, 2: 8}
LOGITS = {4: 4, 2: 6}  # bytes of an element of the logits on a GPU, and of the head's gradient anywhere
DURING_UPDATE = ("gradients", "activations", "fused loss", "gathered by FSDP2")
VLLM_CACHE, VLLM_SHARED = "KV cache, vLLM", "vLLM, asleep in the update"
DURING_ROLLOUT = ("KV cache", VLLM_SHARED)
ROWS = ("policy", "masters, moments", *DURING_UPDATE, "reference", "sampler's copy", "student", "KV cache", VLLM_CACHE, VLLM_SHARED,
        "weights in shared memory")  # fmt: skip


def known_config(name: str) -> ModelConfig:
    """What is in a checkpoint directory, or else one of the KNOWN by its name. Raises UserError."""
    return KNOWN[name] if name in KNOWN and not is_checkpoint(name) else read_config(name)


def layer_parameters(c: ModelConfig) -> int:
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    matrices = 2 * c.hidden_size * (q + k) + 3 * c.hidden_size * c.intermediate_size
    return matrices + 2 * c.hidden_size + c.attention_bias * (q + 2 * k) + c.qk_norm * 2 * c.head_dim


def root_parameters(c: ModelConfig) -> int:
    """Embedding, head where it is another matrix, and final norm."""
    return (2 - c.tie_word_embeddings) * c.vocab_size * c.hidden_size + c.hidden_size


def parameters(c: ModelConfig) -> int:
    return c.num_hidden_layers * layer_parameters(c) + root_parameters(c)


def layer_adapters(c: ModelConfig, rank: int) -> int:
    """Parameters of the adapters of a layer: `rank` for each input and output of its seven matrices."""
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return rank * (7 * c.hidden_size + 2 * (q + k) + 3 * c.intermediate_size)


def trained_parameters(c: ModelConfig, rank: int) -> int:
    return c.num_hidden_layers * layer_adapters(c, rank) if rank else parameters(c)


def layer_activations(c: ModelConfig, b: int = 2, rank: int = 0) -> int:
    """Per token, what autograd keeps of a layer of `model.py` (documents of one length; others add padding)."""
    q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    normalized = 0 if rank else b  # for the gradient of a norm's weight
    norms = 2 * c.hidden_size * (NORM_INPUT[b] + normalized + b) + c.qk_norm * (q + k) * (
        NORM_INPUT[b] + normalized
    )
    # q, k, v, attended; gate, silu, up, product; what the seven A give
    return norms + b * 2 * (q + k) + 4 * b * c.intermediate_size + 7 * b * rank


def activations(c: ModelConfig, tokens: int, is_checkpointed: bool, b: int = 2, rank: int = 0) -> int:
    """Every layer's, or, checkpointed, every layer's input and one whole layer's; the final norm's; cosines and sines."""
    layers, one = c.num_hidden_layers, layer_activations(c, b, rank)
    free = c.hidden_size * NORM_INPUT[b] if rank else 0  # the first norm, between frozen weights
    kept = layers * b * c.hidden_size + one if is_checkpointed else layers * one - free
    return tokens * (kept + c.hidden_size * (NORM_INPUT[b] + (1 if rank else 2) * b) + 2 * c.head_dim * b)


def kv_cache(c: ModelConfig, rows: int, slots: int, b: int = 2) -> int:
    """Keys and values of every layer, of `rows` sequences as long as the longest may get."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * b * rows * slots


def training(
    c: ModelConfig,
    tokens: int,
    b=2,
    ranks=1,
    is_offloaded=False,
    is_checkpointed=True,
    kind="cuda",
    references=0,
    rank=0,
) -> dict[str, int]:
    """{item: bytes} on each rank; tokens: of a micro-batch; references: 1 if there is a reference's logits in the loss."""
    adapters, root, trained = layer_adapters(c, rank), root_parameters(c), trained_parameters(c, rank)
    layer, total = layer_parameters(c) + adapters, parameters(c) + c.num_hidden_layers * adapters
    chunk = max(1, min(tokens, MAX_CHUNK_TOKENS, CHUNK_ELEMENTS[kind] // c.vocab_size))
    logits, buffer = (LOGITS[b], 4) if kind == "cuda" else (b, b)
    head, masters = c.vocab_size * c.hidden_size, 12 if b == 2 and ranks == 1 else 8
    # a GPU frees the logits before it rounds the head's gradient
    head = 0 if rank else head  # frozen: it needs no gradient
    fused = chunk * c.vocab_size * (logits + references * buffer) + head * (
        4 if kind == "cuda" else LOGITS[b]
    )
    sharded = 4 * trained + b * (total - trained)  # what is trained are the float32 masters
    items = {
        "policy": b * total if ranks == 1 else sharded // ranks,
        "masters, moments": 0 if is_offloaded else masters * trained // ranks,
        "gradients": 4 * trained // ranks,  # summed in float32 over the micro-batches
        "activations": activations(c, tokens, is_checkpointed, b, rank),
        "fused loss": max(fused, head * LOGITS[b]) + tokens * c.hidden_size * b * (1 + references),
    }
    if ranks > 1:  # weights and gradients of the root and of two layers, input of the largest reduce-scatter
        reduced = (adapters, adapters) if rank else (root + layer, max(root, layer))
        items["gathered by FSDP2"] = b * (root + 2 * layer) + b * reduced[0] + 4 * reduced[1]
    return items


def grpo(
    policy: ModelConfig, student: ModelConfig, gpus: int, rows: int, slots: int, tokens: int, rank=0
) -> dict:
    """-> {kind of GPU: {item: bytes}}; rows x slots: of the embedded sampler's cache."""
    train = training(policy, tokens, ranks=gpus if gpus > 2 else 1, is_offloaded=gpus == 2, rank=rank)
    copy, reference = {"sampler's copy": 2 * parameters(policy)}, {"reference": 2 * parameters(policy)}
    reference = {} if rank else reference  # the policy without its adapters
    learner = {"student": 2 * parameters(student)}
    if gpus == 2:
        rest = {"KV cache": int(VLLM_SHARE * CARD) - sum((copy | learner).values())}
        return {"2 GPUs: trainer": train | reference, "2 GPUs: vLLM": copy | learner | rest}
    learner["KV cache"] = max(kv_cache(c, rows, slots) for c in (policy, student))
    return {f"{gpus} GPUs": train | reference | (copy if gpus > 1 else {}) | learner}


def peak(items: Mapping[str, int], is_overlapped=False) -> int:
    """The larger of what is there in the update and in the rollout, which with --overlap are at the same time.

    A vLLM server on the policy's GPU sleeps in the update, whose memory is given back before the server wakes.
    """
    update, rollout = (sum(items.get(name, 0) for name in names) for names in (DURING_UPDATE, DURING_ROLLOUT))
    return sum(items.values()) - (0 if is_overlapped else min(update, rollout))


def of_layout(config, layout: Layout, policy, student, cards: Mapping[str, float]) -> dict[str, Counter]:
    """{device: {item: bytes}} of a run of train_grpo.py. cards: {device: bytes}; student: None where it is elsewhere.

    Under torchrun a GPU is that of each rank, and "cpu" what all ranks of one machine have there together.
    """
    b, ranks, columns = getattr(torch, config.dtype).itemsize, distributed.size(), defaultdict(Counter)

    def per_rank(device: str) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if ranks > 1 and device == "cpu" else 1

    def cache(device: str, model: ModelConfig, slots: int) -> None:  # one at a time: they take turns
        calls = config.problems_per_step * max(config.group_size, config.baseline_samples + 1)
        rows = min(config.cache_rows, max(calls, config.eval_problems))
        size = kv_cache(model, rows, slots, b) * per_rank(device)
        columns[device]["KV cache"] = max(columns[device]["KV cache"], size)

    def serve(devices: str, item: str, model: ModelConfig) -> None:
        arguments = os.environ.get("NANO_ATLAS_VLLM_ARGS", "")
        asked = re.findall(r"--gpu-memory-utilization[= ]([\d.]+)", arguments)
        share, gpus = float(asked[-1]) if asked else memory_share(layout, devices), gpus_of(devices)
        for device in gpus or ["cpu"]:
            weights = b * parameters(model) // max(1, len(gpus))
            space = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", 1)) * 2**30
            space = share * cards[device] - weights if gpus else space
            is_shared = gpus and device == layout.policy
            served = (
                {VLLM_SHARED: weights + int(space)} if is_shared else {item: weights, VLLM_CACHE: int(space)}
            )
            columns[device].update(served)

    device, state = layout.policy, config.optimizer_device
    gpus = sum(name.startswith("cuda") for name in cards)
    state = device if state == "auto" else distributed.device(state, gpus)
    references = int(config.beta > 0 and config.kl != "k3")
    is_loaded = config.beta and (
        config.reference or not config.lora_rank
    )  # not the policy without its adapters
    reference = known_config(str(config.reference)) if config.reference else policy
    options = state != device, config.gradient_checkpointing, device.split(":")[0], references
    items = training(policy, config.tokens_per_batch, b, ranks, *options, config.lora_rank)
    columns[device].update({name: size * per_rank(device) for name, size in items.items()})
    if state != device:
        trained = trained_parameters(policy, config.lora_rank)
        columns[state]["masters, moments"] += 12 * trained // ranks * per_rank(state)
    if is_loaded:
        columns[layout.reference]["reference"] += b * parameters(reference) * per_rank(layout.reference)

    asked = 0 if config.reward == "exact" else config.probe_tokens
    longest = config.answer_tokens if config.reward == "exact" else config.teaching_tokens
    if references:  # a hidden state of each of the step's tokens
        tokens = config.problems_per_step * config.group_size * longest
        columns[device]["reference"] += b * tokens * reference.hidden_size * per_rank(device)
    if layout.server:
        serve(layout.server, "sampler's copy", policy)
        if SHARED_MEMORY.is_dir():  # a tied head is there twice
            head = policy.tie_word_embeddings * policy.vocab_size * policy.hidden_size
            columns["cpu"]["weights in shared memory"] += b * (parameters(policy) + head)
        if device in gpus_of(layout.server):  # its sleep mode moves the weights there
            columns["cpu"]["sampler's copy"] += b * parameters(policy)
    elif not layout.urls:
        columns[device]["sampler's copy"] += (ranks > 1) * b * parameters(policy) * per_rank(device)
        cache(device, policy, QUESTION + asked + longest)
    if student and layout.student_server:
        serve(layout.student, "student", student)
    elif student:
        columns[layout.student]["student"] += b * parameters(student) * per_rank(layout.student)
        cache(layout.student, student, QUESTION + config.teaching_tokens + config.answer_tokens)
    return {name: columns[name] for name in sorted(columns, key=lambda name: (name == "cpu", name))}


def layout_table(config, gpus: int | None = None, cards: Mapping[str, float] | None = None) -> str:
    """What `config` of train_grpo.py would put on each device, as Markdown. gpus, cards: {device: bytes}; None: those that are here.

    Says the layout on stderr. Raises UserError for a model whose sizes are not known here.
    """
    if cards is None:
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        cards = {f"cuda:{index}": gpu.total_memory for index, gpu in enumerate(found)}
        cards["cpu"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    layout = choose_layout(config, "" if config.reward == "exact" else config.student, config.kl, gpus)
    student = known_config(config.student) if layout.student else None
    columns = of_layout(config, layout, known_config(str(start_of(config))), student, cards)
    ranks = distributed.size()
    shared = {layout.policy: f", each of {ranks} ranks", "cpu": ", all ranks of a machine"}
    shared = shared if ranks > 1 else {}
    names = [name for name in ROWS if any(items[name] for items in columns.values())]
    rows = [["GB", *(device + shared.get(device, "") for device in columns)]]
    rows += [[name, *(gigabytes(items[name]) for items in columns.values())] for name in names]
    rows += [["**peak**", *(f"**{gigabytes(peak(items, config.overlap))}**" for items in columns.values())]]
    rows += [["the device has", *(gigabytes(cards[device]) for device in columns)]]
    remedies = {name: remedy(config, name, items, cards[name]) for name, items in columns.items()}
    rows += [["fits", *("no" if found else "yes" for found in remedies.values())]]
    said = [f"{name} does not fit: try {found}" for name, found in remedies.items() if found]
    checkpointing = "with" if config.gradient_checkpointing else "without"
    notes = (
        f"By formula (benchmarks/memory.py), not measured. Weights in {config.dtype}; activations of {config.tokens_per_batch:,} tokens "
        f"{checkpointing} gradient checkpointing. The peak is the larger of rollout and update; CUDA's context ({gigabytes(CONTEXT)} GB) is not in it."
    )
    lines = [line for text in (*said, notes) for line in wrap(text, WIDTH, break_on_hyphens=False)]
    return "\n".join([*aligned(rows), *lines])


def start_of(config) -> Path | str:
    """The checkpoint that the policy starts from; or, until SFT has made it, the one that the preset's SFT starts from."""
    start = config.student if config.reward == "exact" else config.teacher
    sft, grpo = (presets(script)[config.preset].overrides for script in ("train_sft", "train_grpo"))
    return sft["model"] if start == grpo.get("teacher") and not is_checkpoint(start) else start


def remedy(config, device: str, items: Counter, card: float) -> str:
    """The first option that would bring the peak below `card` bytes; "" where it is there already."""
    is_torch = "policy" in items or "KV cache" in items  # vLLM's share has its context in it
    room = card - CONTEXT * (is_torch and device != "cpu")
    if VLLM_CACHE in items and items[VLLM_CACHE] < CONTEXT:
        return "more GPUs for vLLM (--rollout vllm:cuda:I,J), or more memory (--gpu-memory-utilization in NANO_ATLAS_VLLM_ARGS)"
    checkpointing = "" if config.gradient_checkpointing else "--gradient-checkpointing or "
    remedies = {"": (), "a lower --cache-rows": ("KV cache",)}
    remedies |= {} if device == "cpu" else {"--optimizer-device cpu": ("masters, moments",)}
    remedies |= {f"{checkpointing}a lower --tokens-per-batch": ("activations", "fused loss")}
    for found, smaller in remedies.items():
        left = {name: size for name, size in items.items() if name not in smaller}
        if peak(left, config.overlap) <= room:
            return found
    adapters = "" if config.lora_rank else "--lora-rank 32, "
    return "--dtype bfloat16" if config.dtype == "float32" else f"{adapters}more GPUs, or smaller models"


def gigabytes(size: float) -> str:
    digits = 0 if size >= 9.95e9 else 1 if size >= 5e7 else 3
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
    found = [[name, *(gigabytes(items.get(name, 0)) for items in columns.values())] for name in names]
    found += [["**peak**", *(f"**{gigabytes(peak(items))}**" for items in columns.values())]]
    whole, cache = gigabytes(activations(policy, tokens, False)), gigabytes(kv_cache(policy, 1, slots))
    return markdown(" | ".join(["GB per GPU", *columns]), found) + (
        f"\n\nAn 80 GB card has {gigabytes(CARD)} GB. Activations of {tokens:,} tokens with gradient checkpointing; without, {whole} GB. "
        f"One sequence of {slots:,} tokens has {cache} GB of KV cache. Masters and moments of 2 GPUs, {gigabytes(12 * parameters(policy))} GB, are on the host."
    )


def main(argv: Sequence[str] | None = None) -> None:
    print(table(parse(Config, sys.argv[1:] if argv is None else argv, {}, __doc__)))


if __name__ == "__main__":
    run_script(main)
