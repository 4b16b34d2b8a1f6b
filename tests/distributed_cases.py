"""What one rank does in tests/test_distributed.py: `python distributed_cases.py PLACE OUT [name of a case ...]`."""

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
from conftest import grpo_flags

import train_grpo
import train_sft
from nano_atlas import distributed
from nano_atlas.config import run_script
from nano_atlas.errors import UserError

SFT = (
    "--tokens-per-step",
    "400",
    "--tokens-per-batch",
    "100",
    "--held-out",
    "0.1",
    "--device",
    "cpu",
    "--steps",
    "4",
)
# advantages of size one: where all gradients are tiny, Adam's first steps turn their rounding into steps of full length
GRPO = {"problems_per_step": 3, "steps": 3, "updates_per_batch": 2, "eval_every": 3, "advantage_scale": "std"}


def constant(*_) -> float:
    """The learning rate, so that a run in three parts is the run in one."""
    return 1e-2


def sft(place: Path, out: Path, model: str, *more: str, rate=constant) -> None:
    files = ("--model", str(place / model), "--data", str(place / "sums.jsonl"), "--out", str(out))
    with mock.patch("nano_atlas.optim.learning_rate", rate):
        train_sft.main([*files, *SFT, *more])


def grpo(place: Path, out: Path, **options) -> None:
    with mock.patch("nano_atlas.optim.learning_rate", lambda *_: 3e-3):
        train_grpo.main(grpo_flags(place, out, **{**GRPO, **options}))


def tied(place: Path, out: Path, rate=constant) -> None:
    sft(place, out, "tied", "--gradient-checkpointing", "--eval-every", "2", "--save-every", "2", rate=rate)


def killed(place: Path, out: Path) -> None:
    """One of the ranks, in step 4, after the state of step 2."""

    def rate(step, *arguments):
        if step == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return constant()

    tied(place, out, rate)


def fails(place: Path, out: Path) -> None:
    raise UserError("every rank finds the same mistake")


def relay(place: Path, out: Path, steps: int) -> None:
    """One directory, whatever the number of processes."""
    sft(place, out.parent.parent / "relay-sft", "untied", "--steps", str(steps + 1))
    grpo(place, out.parent.parent / "relay-grpo", steps=steps)


CASES = {
    "sft-tied": tied,
    "sft-untied": lambda place, out: sft(place, out, "untied"),
    "sft-bfloat16": lambda place, out: sft(place, out, "untied", "--dtype", "bfloat16"),
    "grpo": grpo,
    "grpo-exact-kl": lambda place, out: grpo(place, out, kl="exact", steps=2),
    "grpo-exact-reward": lambda place, out: grpo(place, out, reward="exact", normalization="token", steps=2),
    "sft-lora-bfloat16": lambda place, out: sft(
        place, out, "untied", "--lora-rank", "2", "--dtype", "bfloat16"
    ),
    "grpo-lora": lambda place, out: grpo(place, out, lora_rank=2),
    "grpo-lora-exact-kl": lambda place, out: grpo(place, out, lora_rank=2, kl="exact", steps=2),
    "grpo-verified": lambda place, out: grpo(
        place, out, verifier="nano_atlas.benches.crmarena:verify", kl="privileged", steps=2
    ),
    "relay-1": lambda place, out: relay(place, out, 1),
    "relay-2": lambda place, out: relay(place, out, 2),
    "relay-3": lambda place, out: relay(place, out, 3),
    "killed": killed,
    "fails": fails,
}


def main() -> None:
    torch.set_num_threads(1)
    place, out, *names = sys.argv[1:]
    for name in names:
        CASES[name](Path(place), Path(out) / name)


if __name__ == "__main__":
    run_script(main, is_parallel=True)
