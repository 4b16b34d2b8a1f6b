"""Training in 2 and 4 processes against the same training in one; what torchrun's processes say when one of them fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, records
from distributed_cases import CASES
from safetensors.torch import load_file

from nano_atlas import distributed
from nano_atlas.checkpoint import save_model
from nano_atlas.model import ModelConfig, Transformer

STRAIGHT = [name for name in CASES if "leg" not in name]
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def place(place):
    """The checkpoints and problems of tests/conftest.py, two more to fine-tune, and sums to learn.

    A norm weight of two numbers leaves ranks 2 and 3 of 4 without a row; no size is a multiple of 4 but the vocabulary's.
    """
    tokenizer = byte_tokenizer()
    for name in ("tied", "untied"):
        config = ModelConfig("qwen3", tokenizer.vocab_size, 30, 50, 2, 3, 1, 2, tie_word_embeddings=name == "tied", qk_norm=True)
        save_model(place / name, Transformer(config).initialize(0), tokenizer)
    sums = [{"prompt": f"{a}+{b}=", "completion": str(a + b) * (1 + a % 3)} for a in range(10) for b in range(10)]
    (place / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sums))
    return place


def processes(count: int, place: Path, out: Path, names: list[str]) -> list[subprocess.Popen]:
    """The cases in `count` processes, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).parent / "distributed_cases.py"), str(place), str(out), *names]
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
              "PYTHONPATH": str(REPOSITORY)}  # fmt: skip
    return [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True, cwd=REPOSITORY,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory) -> Path:
    """Directories 1, 2, 4 with every case in that many processes; relay-*: two steps in 2 processes, two in 4, the rest in 1."""
    out = tmp_path_factory.mktemp("runs")
    for name in STRAIGHT:
        CASES[name](place, out / "1" / name)
    for count, legs in ((2, ["leg-1", "grpo-leg-1"]), (4, ["leg-2", "grpo-leg-2"])):
        running = processes(count, place, out / str(count), STRAIGHT + legs)
        for rank, process in enumerate(running):
            said, complaints = process.communicate(timeout=300)
            assert process.returncode == 0, complaints[-3000:]
            assert ("model:" in said) == (rank == 0)  # only rank 0 talks
    CASES["leg-3"](place, out / "1" / "leg-3")
    return out


def assert_same(first: Path, second: Path, tolerance: float) -> None:
    ours, theirs = (records(path / "metrics.jsonl") for path in (first, second))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for key in a.keys() - {"tokens_per_second", "seconds/rollout", "seconds/update", "padding_share", "sampling/logp_diff_mean",
                               "sampling/logp_diff_max"}:  # fmt: skip
            assert a[key] == pytest.approx(b[key], rel=10 * tolerance, abs=tolerance), (a["step"], key)
    weights, expected = (load_file(path / "model/model.safetensors") for path in (first, second))
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype
        torch.testing.assert_close(weights[name].float(), tensor.float(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("name", STRAIGHT)
@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_gives_the_same_metrics_and_weights(runs, name, count):
    assert_same(runs / str(count) / name, runs / "1" / name, 5e-3 if "bfloat16" in name else 1e-5)
