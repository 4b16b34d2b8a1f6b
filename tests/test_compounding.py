"""The compounding experiment at toy size: every arm runs for real, and the same command does nothing twice."""

import json

import pytest
from conftest import SMALL

from benchmarks import compounding
from nano_atlas.errors import UserError


def test_all_arms_are_made_and_measured_once(place, tmp_path, monkeypatch, capsys):
    small = {
        name: value
        for name, value in SMALL.items()
        if name not in ("steps", "eval_every", "held_out", "probe_tokens", "teaching_tokens", "answer_tokens")
    }
    train = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in small.items())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        compounding,
        "right_answers",
        lambda config, number: (
            [  # this student knows no mathematics
                [
                    {"role": "user", "content": "1?"},
                    {"role": "assistant", "content": "<solution>1</solution>"},
                ]
            ]
            * (4 * number)
        ),
    )
    options = {"student": place / "student", "teacher": place / "teacher", "rounds": 1, "tasks": 4, "steps": 1, "held_out": 6, "probe_tokens": 3,
               "teaching_tokens": 6, "answer_tokens": 6, "train_options": train, "tune_options": "--preset 24gb --steps 1 --device cpu --dtype float32 "
               "--no-compile --held-out 0", "out": "out"}  # fmt: skip
    argv = ["compounding"] + [
        part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    monkeypatch.setattr("sys.argv", argv)
    compounding.main()
    said = capsys.readouterr().out
    rows = [
        line for line in said.splitlines() if line.startswith(tuple(f"| {arm} |" for arm in compounding.ARMS))
    ]
    assert len(rows) == 5 and "Promotions: round 1:" in said and "crm: 6 held-out tasks" in said
    for arm in compounding.ARMS:
        solved = json.loads((tmp_path / f"out/result-{arm}-1.json").read_text())["solved"]
        assert len(solved) == 6 and set(solved) <= {0, 1}
    monkeypatch.setattr(compounding, "measure", None)  # measured results are not measured again
    compounding.main()
    monkeypatch.setattr("sys.argv", [*argv, "--seed", "1"])
    with pytest.raises(UserError, match="other options"):
        compounding.main()
