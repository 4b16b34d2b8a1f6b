"""What one rank does in tests/test_distributed.py: `python distributed_cases.py PLACE OUT [name of a case ...]`."""

import sys
from pathlib import Path

import torch
from conftest import grpo_flags

import train_grpo
import train_sft
from nano_atlas.config import run_script

SFT = ("--tokens-per-step", "400", "--tokens-per-batch", "100", "--lr", "1e-2", "--schedule", "constant", "--held-out", "0.1",
       "--device", "cpu", "--steps", "5")  # fmt: skip
GRPO = {"problems_per_step": 3, "steps": 4, "updates_per_batch": 2, "eval_every": 4}


def sft(place: Path, out: Path, model: str, *more: str) -> None:
    train_sft.main(["--model", str(place / model), "--data", str(place / "sums.jsonl"), "--out", str(out), *SFT, *more])


def grpo(place: Path, out: Path, **options) -> None:
    train_grpo.main(grpo_flags(place, out, **{**GRPO, **options}))


CASES = {
    "sft-tied": lambda place, out: sft(place, out, "tied", "--gradient-checkpointing", "--eval-every", "2"),
    "sft-untied-muon": lambda place, out: sft(place, out, "untied", "--muon-scale", "2"),
    "sft-bfloat16": lambda place, out: sft(place, out, "untied", "--dtype", "bfloat16"),
    "grpo": grpo,
    "grpo-exact-kl": lambda place, out: grpo(place, out, kl="exact", reference_mixing=0.5, steps=2),
    "grpo-exact-reward": lambda place, out: grpo(place, out, reward="exact", normalization="token", steps=2),
    "leg-1": lambda place, out: sft(place, out.parent / "relay-sft", "untied", "--steps", "2", "--muon-scale", "2"),
    "leg-2": lambda place, out: sft(place, out.parent / "relay-sft", "untied", "--steps", "4", "--muon-scale", "2"),
    "leg-3": lambda place, out: sft(place, out.parent / "relay-sft", "untied", "--steps", "5", "--muon-scale", "2"),
    "grpo-leg-1": lambda place, out: grpo(place, out.parent / "relay-grpo", steps=2),
    "grpo-leg-2": lambda place, out: grpo(place, out.parent / "relay-grpo", steps=4),
}


def main() -> None:
    torch.set_num_threads(1)
    place, out, *names = sys.argv[1:]
    for name in names:
        CASES[name](Path(place), Path(out) / name)


if __name__ == "__main__":
    run_script(main)
