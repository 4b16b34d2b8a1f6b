"""How fast: the sections attention, sft, sampler and grpo of gpu.py.

flops of training   per token 6 x (parameters without the embedding, but with the head) and per layer
                    6 x heads x D_head x length: half of the square, which causal attention leaves
MFU                 these over the seconds and PEAK; what gradient checkpointing repeats does not count
attention           4 x heads x D_head x pairs forward, 10 backward; pairs: of tokens that see each other
"""

import gc
import inspect
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import memory
from benchmarks.gpu_probe import (
    NO_TIME,
    ONLY_ON_GPU,
    NotHere,
    Probe,
    compared,
    milliseconds,
    random_model,
    timed,
)
from nano_atlas import model as model_module
from nano_atlas.gpu import FlexAttention, compile_layers
from nano_atlas.model import ModelConfig, PackedAttention, SharedPromptAttention

PEAK = 989e12  # flops of an H100 SXM or H200 per second, dense bfloat16
BF16 = torch.bfloat16
TINY = ModelConfig("qwen3", 300, 64, 96, 2, 4, 2, 16, tie_word_embeddings=True, qk_norm=True)
OUTPUT_BOUND = 2e-2  # between two bfloat16 kernels
TRL_SECONDS = 45  # two steps of it: less, and they would be for nothing


def shape_of(probe: Probe, name: str) -> ModelConfig:
    return TINY if probe.is_small else memory.known_config(f"Qwen/Qwen3-{name}")


def has_known_peak(card: str) -> bool:
    return any(name in card for name in ("H100", "H200")) and not any(n in card for n in ("PCIe", "NVL"))


def training_flops(c: ModelConfig, length: int) -> int:
    """Per token of a document of so many, forward and backward."""
    head = c.vocab_size * c.hidden_size
    parameters = c.num_hidden_layers * memory.layer_parameters(c) + c.hidden_size + head
    return 6 * parameters + 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length


# -------------------------------------------------------------------------------------------------- attention


def shared_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`model.attend` with a mask and shared key heads, for which CUDA has only the plain kernel."""
    options = {"is_causal": mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


class Varlen:
    """Packed documents by torch's flash kernel, which no CPU has. Its signature differs between versions."""

    def __init__(self, lengths: Sequence[int], device: str):
        if device == "cpu":
            raise NotHere(ONLY_ON_GPU)
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        self.known = inspect.signature(varlen_attn).parameters
        causal = {"is_causal": True} if "is_causal" in self.known else {"window_size": (-1, 0)}
        places = ends, ends, max(lengths), max(lengths)
        self.kernel = lambda q, k, v, **more: varlen_attn(q, k, v, *places, **causal, **more)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if "enable_gqa" in self.known:
            return self.kernel(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return self.kernel(q, k, v)


def attention(probe: Probe) -> None:
    device, heads, kv_heads, head_dim = probe.device, 16, 8, 128
    budget, sizes = 16384, [(512, 256), (2048, 1024), (512, 1024), (2048, 256)]
    mixed = [4096, 4096, 2048, 2048, 1024, 1024, 768, 512, 512, 256]
    documents = {"8 documents of 2,048": [2048] * 8, "10 documents of 256 to 4,096": mixed}
    if probe.is_small:
        heads, kv_heads, head_dim, budget, sizes = 4, 2, 16, 0, [(12, 7)]
        documents = {"3 documents": [9, 14, 5]}
    first: dict[str, dict[str, Tensor]] = {}  # of each case, what its first variant computed

    def run(case: str, build: Callable, attend: Callable | None, tokens: int, pairs: int) -> dict:
        generator = torch.Generator(device).manual_seed(0)
        options = {"device": device, "dtype": BF16, "generator": generator}
        counts = heads, kv_heads, kv_heads, heads
        drawn = [torch.randn(tokens, count, head_dim, **options) for count in counts]
        with mock.patch.object(model_module, "attend", attend or model_module.attend):
            built = build()
            # FlexAttention fills whole blocks
            more = len(built.positions) - tokens if isinstance(built, FlexAttention) else 0
            q, k, v, d_out = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in drawn)
            inputs = [x.requires_grad_() for x in (q, k, v)]
            has_backward = device == "cuda" or not isinstance(built, FlexAttention)
            found: dict[str, Tensor] = {}

            def call() -> None:
                for x in inputs:
                    x.grad = None
                out = built(0, *(inputs if has_backward else [x.detach() for x in inputs]))
                found["output"] = out.detach()[:tokens]
                if has_backward:
                    out.backward(d_out)

            speed = timed(device, call)
            build_ms = statistics.median(milliseconds(device, build) for _ in range(3))
        if has_backward:
            found |= {name: x.grad[:tokens] for name, x in zip(("d q", "d k", "d v"), inputs)}
        right = first.setdefault(case, found)
        flops = (14 if has_backward else 4) * heads * head_dim * pairs
        rates = {"tflops": flops / speed["ms"] / 1e9, "build_ms": build_ms}
        pairs_of = {name: (value, right[name]) for name, value in found.items()}
        return speed | rates | compared(pairs_of, OUTPUT_BOUND)

    for prompt, completion in sizes:
        groups = max(1, budget // (prompt + 8 * completion))
        lengths = [prompt] * groups, [completion] * 8 * groups, [i // 8 for i in range(8 * groups)]
        pairs = groups * (prompt * (prompt + 1) // 2 + 8 * completion * (prompt + (completion + 1) // 2))
        case = f"{groups} x ({prompt} + 8 x {completion})"
        variants = {
            "padded, heads expanded": (SharedPromptAttention, None),  # what `attend` does on a GPU
            "FlexAttention": (FlexAttention, None),
            "padded, heads shared": (SharedPromptAttention, shared_heads),
        }
        for name, (kind, attend) in variants.items():
            tokens = groups * (prompt + 8 * completion)
            probe.measure(
                f"{case}: {name}", run, case, partial(kind, *lengths, device), attend, tokens, pairs
            )
    for case, lengths in documents.items():
        flex = partial(FlexAttention, lengths, [], [], device)
        kinds = {
            "padded": partial(PackedAttention, lengths, device),
            "varlen": partial(Varlen, lengths, device),
        }
        for name, build in (kinds | {"FlexAttention": flex}).items():
            pairs = sum(length * (length + 1) // 2 for length in lengths)
            probe.measure(f"{case}: {name}", run, case, build, None, sum(lengths), pairs)


# -------------------------------------------------------------------------------------------------------- SFT


def sft(probe: Probe) -> None:
    import train_sft
    from nano_atlas.data import Example
    from nano_atlas.optim import MasterAdamW

    kept: dict[str, tuple] = {}  # one model and its optimizer at a time
    card = "" if probe.is_small else torch.cuda.get_device_name()
    step_tokens, batch_tokens = (64, 32) if probe.is_small else (32768, 8192)

    def run(name: str, length: int, is_checkpointed: bool) -> dict:
        shape = shape_of(probe, name)
        if name not in kept:
            kept.clear()
            gc.collect()
            model = compile_layers(random_model(shape, probe.device, BF16))
            kept[name] = model, MasterAdamW(model)
        model, optimizer = kept[name]
        optimizer.clear_gradients()  # what a step that did not fit may have left
        model.recompute_activations = is_checkpointed
        documents = torch.randint(shape.vocab_size, (step_tokens // length, length + 1)).tolist()
        examples = [Example(ids, [True] * len(ids)) for ids in documents]

        def step() -> None:
            for part in train_sft.losses(model, examples, batch_tokens):
                part.backward()
            optimizer.step(1e-5)

        speed = timed(probe.device, step, repeats=3)
        rate = step_tokens / speed["ms"] * 1e3
        values = {"tokens_per_s": rate, "ms": speed["ms"]}
        if has_known_peak(card):
            values["mfu"] = rate * training_flops(shape, length) / PEAK
        if not probe.is_small:
            values["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return values

    rows = [("1.7B", 2048, False), ("1.7B", 4096, False), ("1.7B", 2048, True), ("1.7B", 1024, False)]
    rows += [("0.6B", 2048, False), ("0.6B", 4096, False), ("0.6B", 2048, True), ("0.6B", 1024, False)]
    rows += [(name, length, True) for name in ("0.6B", "1.7B") for length in (4096, 1024)]
    if probe.is_small:
        rows = [("tiny", 16, False), ("tiny", 16, True)]
    for name, length, is_checkpointed in rows:
        how = "checkpointed" if is_checkpointed else "not checkpointed"
        probe.measure(f"{name}, documents of {length:,}, {how}", run, name, length, is_checkpointed)


# ---------------------------------------------------------------------------------------------- sampler, GRPO


def our_generation(probe: Probe) -> Callable:
    from nano_atlas.sampler import Generation, Request, Sampler

    model = compile_layers(random_model(shape_of(probe, "0.6B"), probe.device, BF16))
    sampler = Sampler(model, max_rows=256)

    def generate(prompts: list[list[int]], tokens: int) -> None:
        requests = [Request(tuple(p), Generation(tokens), seed=i) for i, p in enumerate(prompts)]
        found = sampler.generate(requests)
        assert all(len(group[0].completion_ids) == tokens for group in found)

    return generate


def transformers_generation(probe: Probe) -> Callable:
    from transformers import AutoConfig, AutoModelForCausalLM

    from nano_atlas.checkpoint import config_to_dict

    shape = shape_of(probe, "0.6B")
    ours = random_model(shape, probe.device, BF16)
    values = config_to_dict(shape, BF16)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(probe.device):
        model = AutoModelForCausalLM.from_config(config, dtype=BF16, attn_implementation="sdpa").eval()
    model.load_state_dict(ours.state_dict(), strict=False)
    model.generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts, device=probe.device)
        options = {"max_new_tokens": tokens, "do_sample": True, "top_k": 0, "pad_token_id": 0}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert found.shape[1] == len(prompts[0]) + tokens

    return generate


def sampler(probe: Probe) -> None:
    prompt, wanted = (12, 16) if probe.is_small else (256, 512)
    vocabulary = shape_of(probe, "0.6B").vocab_size
    built: dict[Callable, Callable] = {}

    def run(make: Callable, rows: int) -> dict:
        if make not in built:
            built.clear()
            built[make] = make(probe)
        prompts = torch.randint(vocabulary, (rows, prompt)).tolist()

        def seconds(tokens: int) -> float:
            with torch.inference_mode():
                return milliseconds(probe.device, partial(built[make], prompts, tokens)) / 1e3

        short = max(4, wanted // 16)
        seconds(short)  # compiles
        before = seconds(short)
        fitting = int(
            short * 0.5 * probe.left() / before
        )  # the other half of the time is for the rows after this one
        tokens = max(2 * short, min(wanted, fitting))
        whole = seconds(tokens)
        step = 1e3 * (whole - before) / (tokens - short)
        note = {"note": "fewer new tokens than wanted, for time"} if tokens < wanted else {}
        return {"tokens_per_s": rows * tokens / whole, "ms_per_step": step, "new_tokens": tokens} | note

    counts = (3, 1) if probe.is_small else (64, 256, 1)
    for make, name in (our_generation, "ours"), (transformers_generation, "transformers"):
        for rows in counts:
            probe.measure(f"{name}, {rows} rows", run, make, rows)


def random_checkpoint(folder: Path, probe: Probe) -> Callable[[str], int]:
    """A checkpoint whose every word is a token. -> the tokens of a question's prompt."""
    import tokenizers

    from nano_atlas.checkpoint import save_model
    from nano_atlas.protocol import baseline_messages
    from nano_atlas.tokenizer import Tokenizer

    shape = shape_of(probe, "0.6B")
    words = {f"t{i}": i for i in range(shape.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t1"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer = Tokenizer(backend, template, eos_token="t0", pad_token="t0")
    save_model(folder, random_model(shape, probe.device, BF16), tokenizer)
    return lambda question: len(tokenizer.chat_ids(baseline_messages(question)))


def grpo(probe: Probe) -> None:
    from benchmarks import bench_grpo

    with tempfile.TemporaryDirectory() as folder:
        prompts, group, prompt, new = (2, 2, 100, 4) if probe.is_small else (8, 8, 256, 512)
        length = random_checkpoint(Path(folder, "model"), probe)
        missing = prompt - length("t2") + 1
        config = bench_grpo.Config(
            Path(folder, "model"), prompts, group, new, steps=1, dtype="bfloat16", device=probe.device,
            tokens_per_batch=8192, trl_batch=8,
            questions=tuple(" ".join([f"t{2 + i}"] * missing) for i in range(prompts)),
        )  # fmt: skip

        def run(arm: type, warmups: int, steps: int) -> dict:
            if arm is bench_grpo.Trl and probe.left() < TRL_SECONDS and not probe.is_small:
                raise NotHere(f"{NO_TIME}: it would take about {TRL_SECONDS} s")
            built = arm(config)
            if warmups:  # TRL leaves its own first step out
                built.run(warmups)
            steps = 1 if probe.is_small else steps
            return bench_grpo.medians(built.run(steps)) | {"tokens_of_prompt": length(config.questions[0])}

        probe.measure("ours", run, bench_grpo.Ours, 1, 2)
        probe.measure("TRL with transformers", run, bench_grpo.Trl, 0, 1)
