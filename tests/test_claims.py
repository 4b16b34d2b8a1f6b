"""The table of claims: published numbers are data, measured ones come from files."""

import json
import sys

import pytest

from benchmarks import claims
from nano_atlas.errors import UserError


def results(bench, tasks=50):
    def score(arm, right, tokens, versus):
        values = {
            "domain": bench,
            "arm": arm,
            "tasks": tasks,
            "accuracy": right,
            "error": 0.01,
            "completion": 0.9,
        }
        lengths = {"student_tokens": tokens, "all_tokens": tokens * 2, "interval": [right - 0.1, right + 0.1]}
        return values | lengths | {"versus_student": versus}

    versus = {
        "delta": 0.25,
        "interval": [0.125, 0.375],
        "non_degradation": 0.96,
        "non_degradation_correct": None,
    }
    rows = ("student", 0.5, 100, None), ("sft", 0.6, 90, versus), ("grpo", 0.75, 80, versus)
    control = score(
        "untrained", 0.5, 100, versus | {"delta": 0.0}
    )  # of a run with --full: no --control names it
    run = {"config": {"bench": bench, "teacher": ["grpo=x"], "control": ["shuffled"]}}
    return {"run": run, "scores": [*(score(*row) for row in rows), control]}


def test_each_claim_has_its_source_and_what_the_files_say(tmp_path, monkeypatch, capsys):
    paths = []
    for bench in ("gsm8k", "tau2"):
        paths.append(tmp_path / f"{bench}.json")
        paths[-1].write_text(json.dumps(results(bench)))
    monkeypatch.setattr(sys, "argv", ["claims", *map(str, paths)])
    claims.main()
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    ]
    assert {len(row) for row in table} == {7} and len(table) == 2 + len(claims.CLAIMS)
    rows = {row[0]: row[1:] for row in table[2:]}
    gain = rows["average accuracy rises"]
    assert gain[2:] == [
        "gsm8k, grpo: +25.0 [+12.5, +37.5] points",
        "50",
        "untrained: +0.0 [+12.5, +37.5] points",
        str(paths[0]),
    ]
    assert rows["the student needs fewer tokens"][2].endswith(
        "student -20.0 %, with probe and teacher +60.0 %"
    )
    assert rows["τ²-bench success"][2] == "tau2, grpo: 75.0 [65.0, 85.0] %, alone 50.0 [40.0, 60.0] %"
    assert rows["AIME-25 accuracy"][2:] == ["not measured", "", "", ""]


def test_without_files_nothing_is_measured():
    assert claims.claims_table([]).count("not measured") == len(claims.CLAIMS)


def test_other_files_are_refused(tmp_path, monkeypatch):
    other = tmp_path / "x.json"
    other.write_text("{}")
    with pytest.raises(UserError, match="x.json: not a results.json"):
        claims.claims_table([other])
    monkeypatch.setattr(sys, "argv", ["claims", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match="none.json: not a results.json"):
        claims.main()
