"""The headline in small: what README's first command shows must not depend on luck, so a short run has to show it too."""

import json

import pytest
import torch

import train_grpo
import train_sft
from benchmarks import robustness
from nano_atlas.runs import write_json

pytestmark = pytest.mark.processes


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_ten_steps_of_grpo_lift_the_shipped_student_far_above_its_sft_teacher(
    tmp_path, monkeypatch, one_thread
):
    """From the shipped student, with the shipped defaults but for the number of steps. 200 tasks have a standard error of 3 points."""
    monkeypatch.chdir(tmp_path)
    train_sft.main([])
    train_grpo.main(["--steps", "10", "--eval-every", "10"])
    metrics = [json.loads(line) for line in open("runs/nano/teacher-grpo/metrics.jsonl")]
    before, after = metrics[0]["student_accuracy"], metrics[-1]["eval/student_accuracy"]
    assert metrics[-1]["eval/baseline_accuracy"] < 0.5 and before < 0.7
    assert after > 0.8 and after - before > 0.2
    assert metrics[-1]["eval/leak_rate"] == 0 and metrics[-1]["eval/malformed_rate"] < 0.02


def test_the_robustness_table_is_made_of_what_its_runs_found(tmp_path):
    runs = [robustness.Run(robustness.SHIPPED, seed, 1) for seed in (1, 2)]
    for run, grpo in zip(runs, (0.9, 0.5)):
        scores = [{"domain": "math", "arm": arm, "accuracy": value}
                  for arm, value in {"student": 0.4, "sft": 0.5, "grpo": grpo, "shuffled": 0.3}.items()]  # fmt: skip
        differences = [{"domain": "math", "delta": grpo - 0.5, "interval": [grpo - 0.6, grpo - 0.4]}]
        (run.place(tmp_path) / "eval").mkdir(parents=True)
        write_json(run.place(tmp_path) / "eval/results.json", {"scores": scores, "differences": differences})
        write_json(run.place(tmp_path) / "whole-plan.json", {"math": 1.0})
    near = runs[0].place(tmp_path) / "whole-plan.json"
    write_json(near, {"math": 0.52})
    assert robustness.read(runs[0], tmp_path)["math"]["recovered"] is None  # two points of headroom
    write_json(near, {"math": 1.0})
    lines = robustness.table([*runs, robustness.Run(robustness.SHIPPED, 3, 1)], tmp_path).splitlines()
    assert lines[2:] == [
        "| shipped | 1 | 1 | math | 40.0 | 50.0 | 90.0 | 100.0 | +40.0 [+30.0, +50.0] | 80 % | 30.0 |",
        "| shipped | 2 | 1 | math | 40.0 | 50.0 | 50.0 | 100.0 | +0.0 [-10.0, +10.0] | 0 % | 30.0 |",
    ]
    (total,) = robustness.summary(runs, tmp_path).splitlines()[2:]
    assert total == ("| shipped | math | 2 | 40.0 | 50.0 | 70.0 [50.0, 90.0] | 100.0 | 20.0 [0.0, 40.0] | +0.0 [-10.0, +10.0] "
                     "| 40.0 [0.0, 80.0] % |")  # fmt: skip


def test_the_robustness_benchmark_runs_the_main_path_and_continues(tmp_path, capsys, monkeypatch):
    arguments = [
        "robustness",
        "--students",
        "shipped",
        "--seeds",
        "7",
        "--threads",
        "1",
        "--steps",
        "1",
        "--tasks",
        "4",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    robustness.main()
    said = capsys.readouterr().out
    assert (
        said.count("| shipped | 7 | 1 |") == 3
        and (tmp_path / "tables.md").read_text().strip() == said.strip()
    )
    monkeypatch.setattr(robustness, "call", lambda *_: pytest.fail("a finished run was started again"))
    robustness.main()
    assert capsys.readouterr().out == said
