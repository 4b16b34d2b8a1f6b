"""Time and extra memory of the fused loss against the usual ways to get the same gradient.

    python -m benchmarks.bench_loss                                  # N=4096, D=512, V=32768, float32 and bfloat16
    python -m benchmarks.bench_loss --vocabulary 151936 --width 64 --tokens 1024 4096 8192 --variants nano --dtypes float32

Each call is one forward and backward of the SFT loss (`nano-grpo` and `trl`: GRPO's, with entropy and k3), each variant in a process of
its own. Rounds go through all variants, so that a slow minute of the machine hits them all. `ratio` is the median over the rounds of time
/ time of `plain`, `cpu` the same of processor seconds, which other programs disturb less. Extra memory is the peak over what was there
before the call, gradients included: resident memory on a CPU (the kernel's peak counter, Linux only), `max_memory_allocated` on a GPU.
`first`, the first call with its compilation, is in no other figure.
"""

import gc
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.jobs import markdown
from nano_atlas.config import option, parse, run_script

VARIANTS = ("plain", "nano", "nano-eager", "nano-grpo", "trl", "torch", "liger")
CLOCKS = ("seconds", "cpu_seconds")
PREPARED: dict = {}  # in a process of its own: what to call


@dataclass(frozen=True)
class Config:
    tokens: tuple[int, ...] = option((4096,), "N, tokens of one call; several are run in turn", above=0)
    width: int = option(512, "D, width of the hidden states", above=0)
    vocabulary: int = option(32768, "V", above=0)
    dtypes: tuple[str, ...] = option(("float32", "bfloat16"), "of the model", ["float32", "bfloat16"])
    variants: tuple[str, ...] = option(VARIANTS, "what is compared", VARIANTS)
    rounds: int = option(5, "measured calls of each variant, after one that is not counted", above=0)
    threads: int = option(2, "CPU threads", above=0)
    device: str = option("cpu", "where it runs", ["cpu", "cuda"])


def build(variant: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    """A function that returns the loss. Raises ImportError where the variant is not installed."""
    tokens, place = len(targets), {"device": targets.device}
    weights, ref_logprobs = torch.full((tokens,), 1 / tokens, **place), torch.full((tokens,), -10.0, **place)
    advantages = torch.linspace(-1, 1, tokens, **place)
    if variant == "plain":
        return lambda: F.cross_entropy((hidden @ weight.T).float(), targets)
    if variant == "torch":  # the chunked path of torch >= 2.13 with its own defaults
        from torch.nn.functional import linear_cross_entropy

        options = torch.nn.LinearCrossEntropyOptions()
        return lambda: linear_cross_entropy(hidden, weight, targets, options=options)
    if variant == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        return lambda: fused(weight, hidden, targets)
    from nano_atlas.loss import fused_token_loss
    from train_grpo import GrpoConfig, grpo_token_loss, k3_kl

    def token_loss(logprobs: Tensor, kl: None, rows: slice) -> Tensor:
        if variant != "nano-grpo":
            return -logprobs
        now, kl = logprobs.detach(), k3_kl(logprobs, ref_logprobs[rows])
        return grpo_token_loss(logprobs, now, now, advantages[rows], kl, GrpoConfig)

    if variant != "trl":
        return lambda: fused_token_loss(hidden, weight, targets, token_loss, weights)[0]
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def trl_grpo() -> Tensor:
        logits = hidden @ weight.T
        logprobs = selective_log_softmax(logits[None], targets[None])[0].float()
        with torch.no_grad():
            entropy_from_logits(logits)
        ratio = (logprobs - logprobs.detach()).exp()
        return (weights * (-ratio * advantages + 0.04 * k3_kl(logprobs, ref_logprobs))).sum()

    return trl_grpo


def memory(device: str, is_start: bool) -> int:
    """Bytes: at the start what is there now, and the peak is forgotten; later the peak since then."""
    if device == "cuda":
        torch.cuda.synchronize()
        if is_start:
            torch.cuda.reset_peak_memory_stats()  # the peak is now what is there
        return torch.cuda.max_memory_allocated()
    if is_start:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def prepare(variant: str, dtype: str, tokens: int, config: Config) -> None:
    """The first thing that a process does; it leaves what `measure` calls."""
    if variant == "nano-eager":
        os.environ["NANO_ATLAS_COMPILE"] = "0"
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    options = {"device": config.device, "dtype": getattr(torch, dtype)}
    hidden = torch.randn(tokens, config.width).to(**options).requires_grad_()
    weight = (torch.randn(config.vocabulary, config.width) * 0.05).to(**options).requires_grad_()
    targets = torch.randint(config.vocabulary, (tokens,), device=config.device)
    PREPARED.update(parameters=(hidden, weight), device=config.device)
    try:
        PREPARED["loss"] = build(variant, hidden, weight, targets)
    except ImportError as error:
        PREPARED["missing"] = str(error)


def measure() -> dict:
    if "missing" in PREPARED:
        return PREPARED
    for parameter in PREPARED["parameters"]:
        parameter.grad = None
    gc.collect()
    before = memory(PREPARED["device"], is_start=True)
    started, cpu_started = time.perf_counter(), time.process_time()
    PREPARED["loss"]().backward()
    peak = memory(PREPARED["device"], is_start=False)  # waits for a GPU
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "megabytes": (peak - before) / 1e6}


def compare(config: Config, tokens: int, dtype: str) -> None:
    spawn, processes, rows = multiprocessing.get_context("spawn"), {}, []
    for variant in config.variants:
        processes[variant] = ProcessPoolExecutor(1, spawn, prepare, (variant, dtype, tokens, config))
    rounds = []
    for _ in range(config.rounds + 1):
        rounds.append({variant: process.submit(measure).result() for variant, process in processes.items()})
    for variant in config.variants:
        first, *calls = [calls[variant] for calls in rounds]
        plain = [calls.get("plain", dict.fromkeys(first, float("nan"))) for calls in rounds[1:]]
        if "missing" in first:
            rows.append([variant, first["missing"], *[""] * 4])
            continue
        pairs = list(zip(calls, plain))
        ratio, cpu = (statistics.median(a[clock] / b[clock] for a, b in pairs) for clock in CLOCKS)
        milliseconds = 1e3 * statistics.median(call["seconds"] for call in calls)
        megabytes = max(call["megabytes"] for call in calls)
        numbers = f"{milliseconds:.1f} {ratio:.2f} {cpu:.2f} {megabytes:.0f} {first['seconds']:.1f}"
        rows.append([variant, *numbers.split()])
    for process in processes.values():
        process.shutdown()
    place = f"{dtype} on {config.device}, {config.rounds} rounds"
    print(f"\nN={tokens} D={config.width} V={config.vocabulary} {place}\n")
    print(markdown("variant | median ms | ratio | cpu | extra MB | first s", rows), flush=True)


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    for tokens in config.tokens:
        for dtype in config.dtypes:
            compare(config, tokens, dtype)


if __name__ == "__main__":
    run_script(main)
