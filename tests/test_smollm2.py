"""benchmarks/smollm2.py from its data to its tables, with a model that is small enough for a test."""

import sys
from pathlib import Path

import pytest

from benchmarks import smollm2
from nano_atlas import world
from nano_atlas.runs import read_json, read_jsonl

DATA = Path(__file__).parent / "data"


@pytest.mark.processes
def test_every_stage_runs_once_and_the_tables_have_every_arm(tmp_path, monkeypatch, capsys):
    sizes = {"student": 4, "test": 4, "demonstrations": 3}
    small = {"SIZES": sizes, "LESSONS": 20, "PAGES": 1, "DEMONSTRATIONS": 9, "STUDENT": "--steps 1", "SFT": "--steps 1", "GRPO_VARIANTS": 8,
             "GRPO": "--problems-per-step 1 --group-size 2 --baseline-samples 1 --eval-every 0",
             "LENGTHS": {"probe_tokens": 4, "teaching_tokens": 4, "answer_tokens": 4}}  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(smollm2, name, value)
    right = smollm2.is_right  # so small a model solves nothing
    monkeypatch.setattr(smollm2, "is_right", lambda *asked: [i % 2 == 0 for i, _ in enumerate(right(*asked))])
    argv = ["smollm2", "--svamp", DATA / "svamp_excerpt.json", "--gsm8k", DATA / "gsm8k_excerpt.jsonl", "--base", world.STUDENT,
            "--dtype", "float32", "--seeds", 1, 2, "--steps", 1, "--tasks", 4, "--out", tmp_path]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    smollm2.main()
    shown = capsys.readouterr().out
    for arm in ("sft", "grpo-1", "grpo-2", "shuffled"):
        assert shown.count(f"\n| {arm} |") == 3, shown  # two sets, and what the teachings say
    assert shown.count("\n| student |") == 2 and shown.count("\n| same-budget |") == 1
    assert "### test: 4 problems" in shown and "### gsm8k: 4 problems" in shown
    assert (tmp_path / "tables.md").read_text() in shown
    demonstrations = [record for _, record in read_jsonl(tmp_path / "sft.jsonl")]
    assert 0 < len(demonstrations) <= 9
    headroom = read_json(tmp_path / "headroom.json")
    assert all(0 <= share <= 1 for row in headroom.values() for share in row.values())

    times = read_json(tmp_path / "times.json")
    assert list(times) == [
        "problems",
        "student",
        "headroom",
        "demonstrations",
        "sft",
        "solvable",
        "grpo",
        "evaluation",
    ]
    monkeypatch.setattr(smollm2, "call", lambda *_: pytest.fail("a finished stage ran again"))
    smollm2.main()
    assert read_json(tmp_path / "times.json") == times
