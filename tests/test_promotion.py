"""The loop that closes: traces train the next teacher, and it is deployed only if it is not worse."""

import json
import subprocess

import pytest

import runtime_loop
from nano_atlas.data import Problem
from nano_atlas.episode import EpisodeConfig
from nano_atlas.errors import UserError
from nano_atlas.runtime import deploy
from nano_atlas.runtime.deploy import compare, read_deployment
from nano_atlas.runtime.traces import read_traces
from nano_atlas.seats import Reply
from nano_atlas.stats import paired_bootstrap

TRAIN = (
    "--device cpu --steps 1 --problems-per-step 2 --group-size 4 --baseline-samples 2 --eval-every 0 --tokens-per-batch 600 "
    "--probe-tokens 3 --teaching-tokens 6 --answer-tokens 6 --temperature 1.0 0.8 --lr 0.003"
)
PROBLEMS = [Problem(f"p{i}", f"Problem {i}.", "1", "math") for i in range(200)]


class Student:
    def ask(self, questions, progress=None):
        assert all(question.generation.temperature == 0 for question in questions)
        return [
            [Reply(f"<solution>{int('HELP' in question.messages[0]['content'])}</solution>", 3, False)]
            for question in questions
        ]


class Teacher:
    """Helps with the problems whose number is below `skill`."""

    def __init__(self, skill):
        self.skill = skill

    def ask(self, questions, progress=None):
        numbers = [int(question.messages[0]["content"].split()[1].rstrip(".")) for question in questions]
        return [
            [Reply(f"<teaching>{'HELP' if number < self.skill else 'Well.'}</teaching>", 3, False)]
            for number in numbers
        ]

    def count_tokens(self, text):
        return 1


@pytest.mark.parametrize(
    ("old", "new", "margin", "is_promoted"),
    [
        (100, 120, 0.0, True),
        (100, 100, 0.0, True),
        (100, 98, 0.02, False),
        (100, 98, 0.05, True),
        (100, 60, 0.05, False),
    ],
)
def test_a_new_teacher_is_promoted_only_if_it_is_not_worse(old, new, margin, is_promoted, monkeypatch):
    monkeypatch.setattr(deploy, "MARGIN", margin)
    decision = compare([Student(), Teacher(old), Teacher(new)], PROBLEMS, EpisodeConfig())
    assert decision["is_promoted"] is is_promoted
    assert (decision["old"], decision["new"], decision["alone"]) == (old / 200, new / 200, 0.0)
    differences = [float(i < new) - float(i < old) for i in range(200)]
    assert decision["interval"] == paired_bootstrap(differences, confidence=0.9)
    assert is_promoted is (decision["interval"][0] >= -margin)
    assert f"new - old = {(new - old) / 2:+.1f} [" in decision["reason"]


@pytest.fixture
def rounds(place, tmp_path, monkeypatch):
    """`python runtime_loop.py --rounds 2` over the small checkpoints of the GRPO tests."""
    monkeypatch.chdir(tmp_path)
    lines = (place / "problems.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "problems.jsonl").write_text("".join(lines[:8]))
    options = {"tasks": "problems.jsonl", "student": place / "student", "teacher": place / "teacher", "rounds": 2,
               "held_out": "problems.jsonl", "train_options": TRAIN, "out": "live", "probe_tokens": 3, "teaching_tokens": 6,
               "answer_tokens": 6}  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    monkeypatch.setattr("sys.argv", ["runtime_loop.py", "--preset", "own", *flags])
    return tmp_path / "live"


@pytest.mark.processes
def test_two_rounds_for_real_and_again_nothing(rounds, place, monkeypatch, capsys):
    runtime_loop.main()
    first, second = (json.loads((rounds / f"round-{n}/promotion.json").read_text()) for n in (1, 2))
    assert (rounds / "round-1/grpo/model/config.json").exists() and (
        rounds / "round-2/grpo/model/config.json"
    ).exists()
    assert first["teacher"] in (str(place / "teacher"), "live/round-1/grpo/model")
    for number, teacher in ((1, str(place / "teacher")), (2, first["teacher"])):
        traces = list(read_traces(rounds / f"round-{number}/runtime/traces.jsonl"))
        assert len(traces) == 4  # half of the problems each
        assert {trace["session_metadata"]["teacher"] for _, trace in traces} == {teacher}
    assert read_deployment(rounds / "deploy.yaml")["teacher"]["spec"] == second["teacher"]
    said = capsys.readouterr().out
    assert "round 2: " in said and second["reason"] in said

    def nothing(*arguments, **options):
        raise AssertionError("a round that is done was trained again")

    monkeypatch.setattr(subprocess, "run", nothing)
    runtime_loop.main()
    assert second["reason"] in capsys.readouterr().out


def test_a_training_that_fails_leaves_the_round_undecided(rounds, monkeypatch):
    monkeypatch.setattr(deploy.sys, "executable", "false")
    with pytest.raises(UserError, match="train_grpo.py .* failed with exit code 1"):
        runtime_loop.main()
    assert not (rounds / "round-1/promotion.json").exists() and not (rounds / "deploy.yaml").exists()
