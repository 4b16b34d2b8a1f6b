"""How many OpenMP threads are never a bad choice? Paired: every setting in every round, alone and beside one busy process.

    python -m benchmarks.bench_threads --rounds 4

OpenMP's threads spin where they wait for each other. Where another program has a core, the thread that spins waits for one that does
not run. Two workloads: GRPO on the nano world (its rollout and its update), and forward and backward passes of a model with the shape
of SmolLM2-135M over 512 tokens. Prints medians in seconds, and each setting's worst ratio to the best one of the same column.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
SETTINGS = {"1 thread": {"OMP_NUM_THREADS": "1"}, "2 threads": {"OMP_NUM_THREADS": "2"}}
SETTINGS |= {f"2, spin {n}": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": str(n)} for n in (1000, 10_000)}
SETTINGS["2, passive"] = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
LARGE = """
import time, torch
from benchmarks.pretrain import initialize
from nano_atlas.loss import token_stats
from nano_atlas.model import ModelConfig, PackedAttention, Transformer
model = initialize(Transformer(ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True)), 0)
ids, attention, times = torch.randint(49152, (512,)), PackedAttention([128] * 4, "cpu"), []
for _ in range(3):
    started = time.perf_counter()
    (model(ids, attention.positions, attention).square().mean()).backward()
    times.append(time.perf_counter() - started)
print(sorted(times)[1])
"""


def nano(environment: dict[str, str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as place:
        options = ["--steps", "4", "--eval-every", "0", "--out", place, "--device", "cpu"]
        command = [sys.executable, "train_grpo.py", "--teacher", "runs/nano/teacher-sft/model", *options]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        records = [json.loads(line) for line in Path(place, "metrics.jsonl").read_text().splitlines()][1:]
    return {f"nano {part}": median(r[f"seconds/{part}"] for r in records) for part in ("rollout", "update")}


def large(environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-c", LARGE]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return {"135M": float(done.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    rounds, times = parser.parse_args().rounds, {}
    for number in range(rounds):
        for is_loaded in (False, True):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_loaded else None
            for name, setting in SETTINGS.items():
                for workload in (nano, large):
                    for what, seconds in workload({**os.environ, **setting}).items():
                        column = f"{what}, {'loaded' if is_loaded else 'idle'}"
                        times.setdefault(column, {}).setdefault(name, []).append(seconds)
            if busy:
                busy.kill()
        print(f"round {number + 1}: {json.dumps(times)}", file=sys.stderr, flush=True)
    columns = {column: {name: median(found) for name, found in by.items()} for column, by in times.items()}
    print("| threads |", " | ".join(columns), "| worst ratio |")
    print("|---|" + "--:|" * (len(columns) + 1))
    for name in SETTINGS:
        ratio = max(by[name] / min(by.values()) for by in columns.values())
        print(f"| {name} |", " | ".join(f"{by[name]:.2f}" for by in columns.values()), f"| {ratio:.1f} |")


if __name__ == "__main__":
    main()
