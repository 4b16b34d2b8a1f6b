"""Time and extra memory of the fused loss against the usual ways to get the same gradient.

    python -m benchmarks.bench_loss                                  # N=4096, D=512, V=32768, float32 and bfloat16
    python -m benchmarks.bench_loss --vocabulary 151936 --width 64 --tokens 1024 4096 8192 --variants nano --dtypes float32

Every measurement is one forward and backward of the SFT loss (for `nano-grpo`, `trl` and `liger` GRPO's, with entropy and k3
where they have it) in a process of its own. Rounds go through all variants in turn, so that a slow minute of the machine hits
them all; `ratio` is the median over the rounds of time / time of `plain` in the same round, and `cpu` the same of processor
seconds, which other programs disturb less. Extra memory is the peak over what was there before the call, gradients included:
the process's resident memory on a CPU (the kernel's own peak counter, Linux only), `max_memory_allocated` on a GPU. `first`,
the first call of a process with its compilation, is in no other figure.

Variants that this machine lacks (trl, liger) are reported as such.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

VARIANTS = ("plain", "nano", "nano-eager", "nano-grpo", "trl", "torch", "liger")


def build(variant: str, hidden, weight, targets):
    """-> a function of nothing that returns the loss, or raises ImportError where the variant is not installed."""
    import torch
    import torch.nn.functional as F

    tokens, device = len(targets), targets.device
    weights = torch.full((tokens,), 1 / tokens, device=device)
    advantages = torch.linspace(-1, 1, tokens, device=device)
    ref_logprobs = torch.full((tokens,), -10.0, device=device)

    if variant == "plain":
        return lambda: F.cross_entropy((hidden @ weight.T).float(), targets)
    if variant == "torch":  # the chunked path of torch >= 2.13 with its own defaults
        if not hasattr(F, "linear_cross_entropy"):
            raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda: F.linear_cross_entropy(hidden, weight, targets, options=options)
    if variant == "liger":
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

        rows = tokens // 8
        grpo = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=True, loss_type="bnpo")
        shape = (8, rows)
        mask = torch.ones(shape, device=device)
        arguments = (weight, targets[: 8 * rows].view(shape), mask, advantages[:8])
        return lambda: grpo(hidden[: 8 * rows].view(8, rows, -1), *arguments)[0]

    from nano_atlas.loss import grpo_loss, k3_kl, sft_loss

    if variant in ("nano", "nano-eager"):
        return lambda: sft_loss(hidden, weight, targets, weights)[0]
    if variant == "nano-grpo":
        return lambda: grpo_loss(hidden, weight, targets, weights, advantages, ref_logprobs=ref_logprobs)[0]
    if variant == "trl":
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax

        def trl_grpo():
            logits = hidden @ weight.T
            logprobs = selective_log_softmax(logits[None], targets[None])[0].float()
            with torch.no_grad():
                entropy_from_logits(logits)
            ratio = (logprobs - logprobs.detach()).exp()
            return (weights * (-ratio * advantages + 0.04 * k3_kl(logprobs, ref_logprobs))).sum()

        return trl_grpo
    raise ValueError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")


def resident_peak_since(start: bool) -> int:
    """Bytes: with start, resets the kernel's peak counter and returns what is resident now; without, returns the peak since."""
    if start:
        Path("/proc/self/clear_refs").write_text("5")
    name = "VmRSS" if start else "VmHWM"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def serve(
    variant: str, dtype: str, device: str, tokens: int, width: int, vocabulary: int, threads: int
) -> None:
    """The worker: prints one JSON line per call, the first at once and one more for every line it reads."""
    import os

    if variant == "nano-eager":
        os.environ["NANO_ATLAS_COMPILE"] = "0"
    import torch

    if device == "cpu":
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device).to(getattr(torch, dtype)).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * 0.05).to(getattr(torch, dtype)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    try:
        loss_of = build(variant, hidden, weight, targets)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return

    while True:
        hidden.grad = weight.grad = None
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            before = resident_peak_since(start=True)
        started, cpu_started = time.perf_counter(), time.process_time()
        loss_of().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        after = torch.cuda.max_memory_allocated() if device == "cuda" else resident_peak_since(start=False)
        print(
            json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_bytes": after - before}),
            flush=True,
        )
        if not sys.stdin.readline():
            return


class Worker:
    """One variant in a process of its own, measured on demand."""

    def __init__(self, variant: str, arguments: list[str]):
        self.variant = variant
        command = [sys.executable, "-m", "benchmarks.bench_loss", "--serve", variant, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.calls: list[dict] = []
        self.read()

    def read(self) -> None:
        line = self.process.stdout.readline()
        self.calls.append(
            json.loads(line) if line else {"missing": f"the process ended with status {self.process.wait()}"}
        )
        print(f"  {self.variant} call {len(self.calls)}: {self.calls[-1]}", file=sys.stderr, flush=True)

    def measure(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.read()

    @property
    def missing(self) -> str | None:
        return self.calls[-1].get("missing")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(options: argparse.Namespace, tokens: int, dtype: str) -> None:
    shape = ["--tokens", str(tokens), "--width", str(options.width), "--vocabulary", str(options.vocabulary)]
    arguments = [*shape, "--dtypes", dtype, "--device", options.device, "--threads", str(options.threads)]
    workers = {}
    for variant in options.variants:
        workers[variant] = Worker(variant, arguments)
    for _ in range(options.rounds):
        for worker in workers.values():
            if worker.missing is None:
                worker.measure()
    print(
        f"\nN={tokens} D={options.width} V={options.vocabulary} {dtype} on {options.device}, {options.rounds} rounds"
    )
    print(f"{'variant':12} {'median ms':>10} {'ratio':>7} {'cpu':>7} {'extra MB':>9} {'first s':>8}")
    plain = workers.get("plain")
    for variant, worker in workers.items():
        worker.close()
        if worker.missing is not None:
            print(f"{variant:12} {worker.missing}")
            continue
        first, *calls = worker.calls
        ratios = {"seconds": float("nan"), "cpu_seconds": float("nan")}
        if plain is not None and plain.missing is None:
            for clock in ratios:
                pairs = zip(calls, plain.calls[1:], strict=True)
                ratios[clock] = statistics.median(ours[clock] / theirs[clock] for ours, theirs in pairs)
        milliseconds = 1e3 * statistics.median(call["seconds"] for call in calls)
        megabytes = max(call["extra_bytes"] for call in calls) / 1e6
        ratio, cpu_ratio = ratios.values()
        row = f"{milliseconds:10.1f} {ratio:7.2f} {cpu_ratio:7.2f} {megabytes:9.0f} {first['seconds']:8.1f}"
        print(f"{variant:12} {row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[4096], help="N, tokens of one call; several are run in turn"
    )
    parser.add_argument("--width", type=int, default=512, help="D, width of the hidden states")
    parser.add_argument("--vocabulary", type=int, default=32768, help="V")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--rounds", type=int, default=5, help="measured calls of each variant, after one that is not counted"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--serve", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        shape = (options.tokens[0], options.width, options.vocabulary)
        serve(options.serve, options.dtypes[0], options.device, *shape, options.threads)
        return
    for tokens in options.tokens:
        for dtype in options.dtypes:
            compare(options, tokens, dtype)


if __name__ == "__main__":
    main()
