"""The compounding experiment at toy size: every arm runs for real, and the same command does nothing twice."""

import json

import pytest

from benchmarks import compounding
from nano_atlas.errors import UserError

TRAIN = (
    "--problems-per-step 2 --group-size 4 --baseline-samples 2 --tokens-per-batch 2000 --temperature 1.0 0.8"
)
TUNE = "--preset own --steps 1 --device cpu --held-out 0"


@pytest.mark.processes
def test_all_arms_are_made_and_measured_once(place, tmp_path, monkeypatch, capsys):
    chat = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "<solution>1</solution>"}]
    monkeypatch.chdir(tmp_path)
    # This student knows no mathematics, so it has no right answers to learn from.
    monkeypatch.setattr(compounding, "right_answers", lambda config, number: [chat] * (4 * number))
    options = {"student": place / "student", "teacher": place / "teacher", "rounds": 1, "tasks": 4, "steps": 1, "held_out": 6,
               "train_options": TRAIN, "tune_options": TUNE, "out": "out"}  # fmt: skip
    argv = ["compounding"] + [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
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
