"""Training in 2 and 3 processes against the same training in one; what torchrun's processes say when one of them fails."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, records
from distributed_cases import CASES
from safetensors.torch import load_file

from benchmarks.pretrain import initialize
from nano_atlas import config, distributed
from nano_atlas.checkpoint import save_model
from nano_atlas.errors import UserError
from nano_atlas.model import ModelConfig, Transformer

PLAN = {
    1: ("sft-tied", "sft-untied", "sft-bfloat16", "grpo", "grpo-exact-kl", "grpo-exact-reward",
        "sft-lora-bfloat16", "grpo-lora", "grpo-lora-exact-kl", "grpo-verified"),
    2: ("sft-tied", "sft-bfloat16", "grpo", "grpo-exact-reward", "sft-lora-bfloat16", "grpo-lora", "grpo-verified"),
    3: ("sft-tied", "sft-untied", "grpo", "grpo-exact-kl", "grpo-lora-exact-kl"),
}  # fmt: skip
REPOSITORY = Path(__file__).parent.parent
CASE_SCRIPT = REPOSITORY / "tests/distributed_cases.py"


@pytest.fixture(scope="session")
def place(place):
    """The checkpoints and problems of tests/conftest.py, two more to fine-tune, and sums to learn.

    A norm weight of two numbers leaves rank 2 of 3 without a row; few sizes are a multiple of 2 or 3.
    """
    tokenizer = byte_tokenizer()
    for name in ("tied", "untied"):
        shape = (tokenizer.vocab_size, 30, 50, 2, 3, 1, 2)
        config = ModelConfig("qwen3", *shape, tie_word_embeddings=name == "tied", qk_norm=True)
        save_model(place / name, initialize(Transformer(config), 0), tokenizer)
    sums = [
        {"prompt": f"{a}+{b}=", "completion": str(a + b) * (1 + a % 3)} for a in range(10) for b in range(10)
    ]
    (place / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sums))
    return place


def processes(count: int, place: Path, out: Path, names: tuple[str, ...]):
    """The cases in `count` processes, as torchrun would start them: the store is the launcher's, and outlives them."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = [sys.executable, str(CASE_SCRIPT), str(place), str(out), *names]
    common = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
              "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}  # fmt: skip
    return store, [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True, cwd=REPOSITORY,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory) -> Path:
    """Directories 1, 2, 3 with the cases in that many processes; relay-*: a step in 2 processes, one in 3, the last in 1."""
    out = tmp_path_factory.mktemp("runs")
    for count, names in ((2, (*PLAN[2], "relay-1")), (3, (*PLAN[3], "relay-2", "fails"))):
        store, running = processes(count, place, out / str(count), names)
        said, complaints = zip(*(process.communicate(timeout=600) for process in running))
        assert "metrics.jsonl, state" in said[0] and not any(said[1:])  # only rank 0 talks
        codes = sorted(process.returncode for process in running)
        assert codes == ([0, 0] if count == 2 else [1, 1, 2]), complaints
        errors = [
            line for text in complaints for line in text.splitlines() if "rror" in line or "Traceback" in line
        ]
        assert errors == ([] if count == 2 else ["error: every rank finds the same mistake"])
    for name in (*PLAN[1], "relay-3"):
        CASES[name](place, out / "1" / name)
    return out


def assert_same(first: Path, second: Path, tolerance: float = 1e-5) -> None:
    """Metrics (but times, padding, and evaluations that only one of them made) and final weights."""
    ours, theirs = (records(path / "metrics.jsonl") for path in (first, second))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert {"loss", "grad_norm", "lr"} <= a.keys() & b.keys()
        for key in a.keys() & b.keys():
            if "second" not in key and not key.startswith(("padding", "sampling/")):
                assert a[key] == pytest.approx(b[key], rel=10 * tolerance, abs=tolerance), (a["step"], key)
    if "bfloat16" in first.name:  # whose noise becomes steps of full length in Adam's first
        return
    weights, expected = (load_file(path / "model/model.safetensors") for path in (first, second))
    assert weights.keys() == expected.keys()
    # A few weights have gradients of almost nothing, whose rounding Adam's first steps (1e-2 of SFT, 3e-3 of GRPO) enlarge.
    close = 5e-4 if "sft-untied" in second.name else 5 * tolerance
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=tolerance, atol=close, msg=name)


@pytest.mark.processes
@pytest.mark.parametrize(("count", "name"), [(count, name) for count in (2, 3) for name in PLAN[count]])
def test_any_number_of_processes_gives_the_same_metrics_and_weights(runs, count, name):
    assert_same(runs / str(count) / name, runs / "1" / name, 5e-3 if "bfloat16" in name else 1e-5)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["sft-untied", "grpo"])
def test_a_run_goes_on_in_another_number_of_processes(runs, kind):
    assert_same(runs / ("relay-" + kind.partition("-")[0]), runs / "1" / kind)


@pytest.mark.processes
def test_a_killed_rank_ends_the_job_which_goes_on_from_its_last_state(place, tmp_path, runs):
    """Under the real torchrun; and on in one process."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(CASE_SCRIPT))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run([sys.executable, *launcher, str(place), str(tmp_path), "killed"], capture_output=True, text=True,
                           env=environment, timeout=600)  # fmt: skip
    assert ended.returncode != 0 and "SIGKILL" in ended.stderr
    assert [path.name for path in (tmp_path / "killed/state").iterdir()] == ["step-00000002"]
    CASES["sft-tied"](place, tmp_path / "killed")
    assert_same(tmp_path / "killed", runs / "1/sft-tied")


def test_shares_are_neighbours_of_equal_size(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 4)
    assert distributed.shares([3, 1, 1, 3, 3, 1, 4]) == [[0, 1], [2, 3], [4, 5], [6]]
    assert distributed.shares([8, 1]) == [[], [0], [], [1]]
    sizes = [random.Random(seed).randint(1, 9) for seed in range(100)]
    shares = distributed.shares(sizes)
    assert [index for share in shares for index in share] == list(range(100))
    assert all(abs(sum(sizes[index] for index in share) - sum(sizes) / 4) <= 9 for share in shares)


def test_small_models_compute_with_one_thread_and_the_largest_of_a_process_decides(monkeypatch, capsys):
    threads, monkeypatched = [4], {"largest": 0, "CORES": 4}
    for name, value in monkeypatched.items():
        monkeypatch.setattr(distributed, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.append(count))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for parameters, expected in ((700_000, 1), (700_000, 1), (135_000_000, 4), (700_000, 4)):
        distributed.settle_threads(parameters)
        assert threads[-1] == expected
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{count} of 4 CPU threads used; set OMP_NUM_THREADS to change it" for count in (1, 4)]
    monkeypatch.setattr(distributed, "largest", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = list(threads)
    distributed.settle_threads(700_000)
    assert threads == before


def test_a_process_of_torchrun_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.device("auto") == "cuda:1" and distributed.device("cpu") == "cpu"
    with pytest.raises(UserError, match="under torchrun each process has its own GPU; use auto or cpu"):
        distributed.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="no device cuda:2"):
        distributed.device("auto")


def test_a_script_for_one_process_refuses_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(config, "size", lambda: 2)
    with pytest.raises(SystemExit, match="2"):
        config.run_script(lambda: print("never"))
    said = capsys.readouterr()
    assert said.out == "" and "error: this script runs as one process: start it with python" in said.err
