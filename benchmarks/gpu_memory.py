"""What is left of gpu.py's sections: the fused loss, memory beside its formulas, and the story on a real
model."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from benchmarks import bench_loss, memory
from benchmarks.gpu_probe import NotHere, Probe, random_model, timed
from benchmarks.gpu_speed import BF16, shape_of
from benchmarks.jobs import ROOT
from nano_atlas.gpu import compile_layers


def loss(probe: Probe) -> None:
    tokens, vocabulary, widths = (48, 300, (32,)) if probe.is_small else (8192, 151936, (1024, 4096))

    def run(variant: str, width: int, chunk: int | None) -> dict:
        generator = torch.Generator(probe.device).manual_seed(0)
        options = {"device": probe.device, "generator": generator}
        hidden = torch.randn(tokens, width, dtype=BF16, **options).requires_grad_()
        weight = torch.randn(vocabulary, width, dtype=BF16, **options).mul_(0.05).requires_grad_()
        targets = torch.randint(vocabulary, (tokens,), **options)
        call = bench_loss.build(variant, hidden, weight, targets)

        def both() -> None:
            hidden.grad = weight.grad = None
            call().backward()

        elements = {probe.device: (chunk or 0) * vocabulary}
        sizes = {"MAX_CHUNK_TOKENS": chunk, "CHUNK_ELEMENTS": elements} if chunk else {}
        with mock.patch.multiple("nano_atlas.loss", **sizes) if sizes else mock.patch.dict({}):
            speed = timed(probe.device, both, repeats=5)
        bar = 3 * 2 * tokens * width * vocabulary / 700e12 * 1e3
        return speed | {"times_the_bar": speed["ms"] / bar}

    for width in widths:
        for variant in ("nano", "nano-grpo", "liger", "torch", "plain"):
            probe.measure(f"D = {width:,}, {variant}", run, variant, width, None)
    for width in widths:
        for chunk in (16,) if probe.is_small else (512, 2048, 4096):
            probe.measure(f"D = {width:,}, nano, chunks of {chunk:,}", run, "nano", width, chunk)


def measured_memory(probe: Probe, preset: str):
    """What the preset takes on one GPU: `{item: (GB measured, GB by the formula)}`, one after the other."""
    import train_grpo
    from nano_atlas.batching import longest_samples
    from nano_atlas.optim import MasterAdamW
    from nano_atlas.presets import presets
    from nano_atlas.sampler import Generation, Request, Sampler

    given = presets("train_grpo")[preset].overrides
    teacher = str(presets("train_sft")[preset].overrides["model"])
    config = train_grpo.Config(
        **{"problems": Path("x"), **given, "device": probe.device, "reward": "teaching"}
    )
    if probe.is_small:
        small = {"teaching_tokens": 8, "answer_tokens": 8, "cache_rows": 4, "tokens_per_batch": 64}
        config = replace(config, **small)
    policy_shape, student_shape = (
        shape_of(probe, n.rpartition("Qwen3-")[2]) for n in (teacher, config.student)
    )
    prompt = 16 if probe.is_small else 512
    slots = prompt + config.teaching_tokens + config.answer_tokens
    sizes = config.cache_rows, slots, config.tokens_per_batch
    expected = next(iter(memory.grpo(policy_shape, student_shape, 1, *sizes).values()))
    if not probe.is_small:
        whole, needed = torch.cuda.get_device_properties(0).total_memory, memory.peak(expected)
        if whole < needed:
            raise NotHere(f"the card has {whole / 1e9:.0f} GB, the formula says {needed / 1e9:.0f}")
    is_cuda = probe.device == "cuda"

    def now() -> float:
        gc.collect()
        return (torch.cuda.memory_allocated() if is_cuda else bench_loss.memory("cpu", False)) / 1e9

    found, start = {}, now()

    def item(name: str, key: str, make: Callable) -> object:
        before = now()
        result = make()
        found[name] = now() - before, expected[key] / 1e9
        return result

    policy = item("policy", "policy", lambda: compile_layers(random_model(policy_shape, probe.device, BF16)))
    policy.recompute_activations = config.gradient_checkpointing
    frozen = lambda shape: compile_layers(random_model(shape, probe.device, BF16).requires_grad_(False))
    reference = item("reference", "reference", lambda: frozen(policy_shape))
    student = item("student", "student", lambda: frozen(student_shape))
    make = partial(MasterAdamW, policy, **train_grpo.ADAMW)
    optimizer = item("masters, moments", "masters, moments", make)

    bench_loss.memory(probe.device, is_start=True)
    before = now()
    ids = torch.randint(2, student_shape.vocab_size, (2, slots - 4)).tolist()
    requests = [Request(tuple(p), Generation(4), n=config.cache_rows // 2) for p in ids]
    Sampler(student, max_rows=config.cache_rows).generate(requests)
    cache = memory.kv_cache(student_shape, config.cache_rows, slots)
    found["sampling"] = bench_loss.memory(probe.device, is_start=False) / 1e9 - before, cache / 1e9

    gc.collect()
    samples, _ = longest_samples(
        prompt, config.teaching_tokens, 64, config.group_size, config.tokens_per_batch
    )
    for sample in samples:
        sample.rollout.logprobs = [-1.0] * len(sample.rollout.completion_ids)
    bench_loss.memory(probe.device, is_start=True)
    train_grpo.update(config, policy, reference, optimizer, samples, 1e-6, is_fresh=False)
    top = bench_loss.memory(probe.device, is_start=False) / 1e9
    during = sum(expected[name] for name in memory.DURING_UPDATE if name in expected) / 1e9
    found["an update, over these"] = top - before, during
    found["highest of an update"] = top - start, memory.peak(expected | {"KV cache": 0}) / 1e9
    return found


def memory_section(probe: Probe) -> None:
    for preset in ("qwen3-0.6b-24gb", "qwen3-1.7b-80gb"):
        found: dict[str, tuple[float, float]] = {}

        def run(preset: str = preset) -> dict:
            found.update(measured_memory(probe, preset))
            measured, formula = found["highest of an update"]
            return {"measured_gb": measured, "formula_gb": formula}

        probe.measure(preset, run)
        for name, (measured, formula) in found.items():
            both = {"measured_gb": measured, "formula_gb": formula}
            probe.write(f"{preset}: {name}", both)


def story(probe: Probe) -> None:
    """benchmarks/smollm2.py, which continues where it was stopped."""
    options = probe.options
    files = {"--svamp": options.svamp, "--gsm8k": options.gsm8k, "--base": options.base}

    def run() -> dict:
        if not (options.svamp and options.gsm8k):
            raise NotHere("not asked for: --svamp and --gsm8k name its files")
        words = [sys.executable, "-m", "benchmarks.smollm2", "--device", probe.device, "--dtype", "bfloat16"]
        words += ["--out", str(options.story_out.resolve())]
        for flag, path in files.items():
            words += [flag, str(path.resolve())] if path else []
        process = subprocess.Popen(words, cwd=ROOT)
        try:
            code = process.wait(max(1.0, probe.left()))
            note = {} if code == 0 else {"error": f"ended with status {code}; what it said is in the log"}
        except subprocess.TimeoutExpired:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.killpg(0, signal.SIGTERM)  # this section's processes; nothing that is done is lost
            process.wait()
            note = {"note": "its time was up; the same command continues"}
        from nano_atlas.runs import read_json

        times = read_json(options.story_out / "times.json")
        return {name: seconds / 60 for name, seconds in times.items()} | note

    probe.measure("SmolLM2-135M on SVAMP", run)
