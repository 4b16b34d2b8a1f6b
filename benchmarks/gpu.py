"""Everything there is to learn from a few minutes on one GPU: is it right, how fast, how much memory.

    python -m benchmarks.gpu                                        # all sections, four minutes
    python -m benchmarks.gpu --sections attention sft --budget 120  # the others' results stay in the file
    python -m benchmarks.gpu --device cpu --budget 60               # in small, so that it never rots

Each section has a process of its own and a share of the time that is left; what it leaves over goes to the
later ones. Within a section the measurements stand in the order of their worth. One that fails costs its
own row. What did not begin in time says "no time", and a section that passes its time is ended; a process
that dies is replaced, and goes on after the measurement that killed it. The results are in
benchmarks/results/gpu-CARD.json after each measurement, what was printed beside it in gpu-CARD.log. Exit
status 1: something computed a wrong number, or the section `correct` could not say.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_probe import RUNNING, SELF, work
from benchmarks.jobs import ROOT, markdown
from nano_atlas.config import option, parse, run_script
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json, write_json

COMPILER = ("torch._dynamo", "torch._inductor.compile_fx", "torch.nn.attention.flex_attention")
QWEN3 = ("transformers.models.qwen3.modeling_qwen3",)


class Section(NamedTuple):
    function: str  # "module:name", called with a Probe
    weight: float  # of its share of the time
    about: str  # under its table
    imports: tuple[str, ...] = ()  # loaded while the section before is still at work


SECTIONS = {
    "correct": Section(
        "benchmarks.gpu_correct:correct",
        60,
        "Against the plain formula in float64 on the CPU: norm(found - right) / norm(right) of the "
        "part that is nearest to its bound.",
        COMPILER,
    ),
    "attention": Section(
        "benchmarks.gpu_speed:attention",
        35,
        "bfloat16, 16 heads and 8 of keys, of 128; forward and backward of one layer. TFLOP/s: 14 x "
        "heads x 128 x pairs of tokens that see each other (4 forward, 10 backward). Errors: against "
        "a case's first row.",
        COMPILER,
    ),
    "sft": Section(
        "benchmarks.gpu_speed:sft",
        50,
        "bfloat16, random weights, compiled, whole steps with AdamW on float32 masters. MFU over 989 "
        "TFLOP/s. Published: nanochat d12 41.9 to 46 %, torchtitan Llama-3.1-8B 33 to 39 %; wanted: "
        "45 % at 1.7B.",
        COMPILER,
    ),
    "sampler": Section(
        "benchmarks.gpu_speed:sampler",
        45,
        "Qwen3-0.6B's shape, bfloat16, random weights, 256 prompt tokens. Published: vLLM about "
        "12,000 tokens/s, 2.4 to 5.5 ms a step.",
        COMPILER + QWEN3,
    ),
    "grpo": Section(
        "benchmarks.gpu_speed:grpo",
        50,
        "Qwen3-0.6B's shape, 8 prompts x 8 completions, 256 + 512 tokens; seconds per step after one "
        "that is not counted. TRL's optimizer state is bfloat16, ours float32.",
        (*COMPILER, *QWEN3, "datasets", "trl"),
    ),
    "loss": Section(
        "benchmarks.gpu_memory:loss",
        20,
        "N = 8,192 tokens, V = 151,936, bfloat16, forward and backward. The bar: three matrix "
        "products at 700 TFLOP/s. Wanted: twice that at most, and 1.5 GB.",
        COMPILER,
    ),
    "memory": Section(
        "benchmarks.gpu_memory:memory_section",
        20,
        "GB (10^9 bytes) allocated by torch, beside the formulas of benchmarks/memory.py.",
        COMPILER,
    ),
    "story": Section("benchmarks.gpu_memory:story", 1, "Minutes of each stage of benchmarks/smollm2.py."),
}
GRACE = 10.0  # seconds that a section may be late before it is ended
LOADING = 90.0  # seconds that a process may take to import what it needs
TRIES = 4  # processes of one section, of which all but the last died


@dataclass(frozen=True)
class Config:
    sections: tuple[str, ...] = option(
        tuple(SECTIONS), "what is measured, in the order of its worth", [*SECTIONS]
    )
    budget: float = option(240.0, "seconds for all of it", above=0)
    device: str = option("cuda", "cuda, or cpu: everything in small", ["cuda", "cpu"])
    out: Path | None = option(None, "results (none: benchmarks/results/gpu-CARD.json)")
    svamp: Path | None = option(None, "SVAMP.json, for the story", group="story")
    gsm8k: Path | None = option(None, "GSM8K's test.jsonl, for the story")
    base: Path | None = option(None, "checkpoint of SmolLM2-135M-Instruct (none: from the package)")
    story_out: Path = option(Path("runs/smollm2"), "directory of the story, which continues there")


def box(remaining: float, weights: Sequence[float]) -> float:
    """Seconds for the first of the sections that are left."""
    return max(0.0, remaining * weights[0] / sum(weights))


def slug(card: str) -> str:
    """NVIDIA H100 80GB HBM3 -> h100-80gb-hbm3"""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).removeprefix("nvidia-").strip("-")


def commit() -> str:
    with suppress(OSError):
        words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return ""


class Worker:
    """A section's process, which loads at once and measures when it is told to."""

    def __init__(self, name: str, section: Section, folder: Path, log: Path, config: Config, done=()):
        self.name, self.stream = name, folder / f"{name}.jsonl"
        context = multiprocessing.get_context("spawn")
        self.gate, theirs = context.Pipe()
        is_cuda = config.device == "cuda"  # in small, nothing is compiled
        imports = [module for module in section.imports if is_cuda or module not in COMPILER]
        words = name, section.function, imports, self.stream, log, config, done, theirs
        self.process = context.Process(target=work, args=words)
        self.process.start()
        theirs.close()

    def records(self) -> dict[str, dict]:
        """By name; a last line that is not whole yet is left out."""
        lines = self.stream.read_bytes().split(b"\n")[:-1] if self.stream.exists() else []
        return {record["name"]: record for record in map(json.loads, lines)}

    def is_ready(self) -> bool:
        """Waits until it has loaded what it needs. False if it died of that, or takes too long."""
        with suppress(EOFError, OSError):
            return self.gate.poll(LOADING) and self.gate.recv() == "ready"
        return False

    def end(self) -> None:
        """With all that it started. Does nothing where it has ended."""
        if self.process.is_alive():
            with suppress(ProcessLookupError):  # it has no group of its own yet
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.join(5)


def run_section(worker: Worker, again, share, publish) -> None:
    """Until the section is finished or its time is up.

    again(done): another process for it. share(): seconds it gets, asked once it has loaded.
    publish(records): of the section so far.
    """
    seconds = deadline = 0.0
    for tries in range(TRIES):
        is_ready = worker.is_ready()
        if tries == 0:
            seconds = share()
            deadline = time.monotonic() + seconds
        if is_ready:
            with suppress(OSError):
                worker.gate.send(deadline - time.monotonic())
        while is_ready and worker.process.is_alive() and time.monotonic() < deadline + GRACE:
            worker.process.join(0.2)
            publish(worker.records())
        is_late = is_ready and worker.process.is_alive()
        worker.end()
        found, code = worker.records(), worker.process.exitcode
        cause = f"ended after {seconds:.0f} s" if is_late else f"its process ended with status {code}"
        for record in found.values():
            if record.get("error") == RUNNING:
                record["error"] = cause
        if code and not found:
            found[SELF] = {"section": worker.name, "name": SELF, "error": cause}
        publish(found)
        if code == 0 or not is_ready or time.monotonic() > deadline or tries + 1 == TRIES:
            return
        with worker.stream.open("a") as file:  # the cause stays, whatever the next process writes
            file.writelines(json.dumps(record) + "\n" for record in found.values())
        worker = again(sorted(found))


def measure(config: Config, sections: Mapping[str, Section], out: Path, head: dict) -> dict[str, list[dict]]:
    """Run the sections, and rewrite `out` as records come. -> the records of each."""
    ends, log = time.monotonic() + config.budget, out.with_suffix(".log")
    written, names = read_json(out), list(sections)
    kept = written.get("sections", {}) if written.get("card") == head["card"] else {}
    results: dict[str, list[dict]] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:

        def worker(index: int, done=()) -> Worker | None:
            if index == len(names):
                return None
            name = names[index]
            return Worker(name, sections[name], Path(folder), log, config, done)

        current = coming = worker(0)
        try:
            for index, name in enumerate(names):
                current, coming = coming, worker(index + 1)
                started, shown = time.monotonic(), {}

                def publish(found: dict[str, dict]) -> None:
                    if found != shown or name not in results:
                        shown.clear()
                        shown.update(found)
                        results[name] = list(found.values())
                        mine = {one: head | {"records": records} for one, records in results.items()}
                        write_json(out, {"card": head["card"], "sections": kept | mine})

                def again(done: Sequence[str]) -> Worker:
                    nonlocal current
                    current = worker(index, done)
                    return current

                weights = [sections[left].weight for left in names[index:]]
                run_section(current, again, lambda: box(ends - time.monotonic(), weights), publish)
                print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        finally:
            for one in (current, coming):
                if one is not None:
                    one.end()
    return results


def table(records: Sequence[dict]) -> str:
    """A column for each value that any record has; what went wrong, or was not done, in the last one."""
    plain = {"section", "name", "error", "note", "seconds"}
    columns = list(dict.fromkeys(key for record in records for key in record if key not in plain))

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return f"{value:,.4g}" if isinstance(value, float) else str(value)

    rows = []
    for record in records:
        error = f"error: {record['error']}" if "error" in record else record.get("note", "")
        cells = [cell(record.get(column, "")) for column in columns]
        rows.append([record["name"], *cells, error.replace("|", "/")[:160]])
    return markdown(" | ".join(["", *columns, "note"]), rows)


def has_failed(results: Mapping[str, Sequence[dict]]) -> bool:
    """Whether a number was wrong, or the section that is there to find that out could not."""
    is_wrong = any(record.get("ok") is False for records in results.values() for record in records)
    return is_wrong or any("error" in record for record in results.get("correct", ()))


def main(argv: Sequence[str] | None = None, sections: Mapping[str, Section] = SECTIONS) -> int:
    config = parse(Config, sys.argv[1:] if argv is None else argv, {}, __doc__)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here; --device cpu runs everything in small")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no section outlives this process
    card = torch.cuda.get_device_name() if config.device == "cuda" else "CPU"
    config = replace(config, out=config.out or ROOT / f"benchmarks/results/gpu-{slug(card)}.json")
    head = {"torch": torch.__version__, "commit": commit(), "budget": config.budget, "card": card}
    head["date"] = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    chosen = {name: section for name, section in sections.items() if name in config.sections}
    results = measure(config, chosen, config.out, head)
    for name, records in results.items():
        print(f"\n### {name}\n\n{table(records)}\n\n{chosen[name].about}")
    print(f"\n{card}, torch {head['torch']}: {config.out}", flush=True)
    return int(has_failed(results))


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
