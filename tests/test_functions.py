"""A user's own verifier and reward: the same one in training, runtime and evaluation, with faults that are counted."""

import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import grpo_flags, records, run_grpo
from scripted import run as run_session
from scripted import student, teacher

import eval as evaluation
from nano_atlas import functions, reward
from nano_atlas.data import Problem
from nano_atlas.episode import EpisodeConfig, attempts
from nano_atlas.errors import UserError
from nano_atlas.functions import verifier_seat
from nano_atlas.presets import presets
from nano_atlas.runtime.options import Config as RuntimeConfig
from nano_atlas.schedule import Fault, play
from nano_atlas.seats import Generation, Question, Reply

MINE = """
async def lenient(question, answer, text, gold):
    assert question.startswith("Pick") and gold == "1"
    return {"1": 1.0, "2": 0.25}.get(answer, 0)

def picky(question, answer, text, gold):
    if "one of 3." in question or "the first of 6." in question:
        raise RuntimeError("cannot say")
    return answer == gold

def broken(question, answer, text, gold):
    raise RuntimeError("cannot say")

def brief(episode):
    told = episode.teaching or ""
    return episode.gain - len(told) / 100 + (episode.reward > 0)

def odd(episode):
    return float("nan")

def silent(question, answer, text, gold):
    return None
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module `mine` in the current directory."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield
    sys.modules.pop("mine", None)


def test_a_verifier_scores_training_instead_of_the_exact_match(place, tmp_path, mine):
    """The reward is the published formula of the user's scores, also where they are between 0 and 1."""
    metrics = run_grpo(place, tmp_path / "out", verifier="mine:lenient", steps=3)
    episodes = records(tmp_path / "out/episodes.jsonl")
    assert {one["guided"]["score"] for one in episodes} & {0.25}
    for one in episodes:
        points = [{"1": 1.0, "2": 0.25}.get(own["answer"], 0) for own in (*one["baselines"], one["guided"])]
        assert points == [own["score"] for own in (*one["baselines"], one["guided"])]
        *alone, guided = points
        guided = None if one["teaching"] is None else guided
        expected = reward.teaching_reward(
            sum(alone) / len(alone), guided, one["teaching_tokens"], one["is_leak"]
        )
        assert one["reward"] == pytest.approx(expected, abs=1e-4)  # written with six digits
    assert all(record["unanswered"] == 0 for record in metrics)


def test_a_fault_of_the_verifier_costs_its_problem_and_is_counted(place, tmp_path, mine):
    metrics = run_grpo(
        place, tmp_path / "out", verifier="mine:picky", steps=20, problems_per_step=4, eval_every=0
    )
    assert sum(record["unanswered"] for record in metrics) >= 2  # each of 38 problems twice in 20 steps of 4
    with pytest.raises(UserError, match="verifier: RuntimeError: cannot say"):  # every problem
        run_grpo(place, tmp_path / "none", verifier="mine:broken", steps=1)
    with pytest.raises(UserError, match="--verifier mine:silent gave no score"):
        run_grpo(place, tmp_path / "none", verifier="mine:silent", steps=1)


def test_training_runtime_and_evaluation_score_an_answer_alike(mine, monkeypatch, tmp_path):
    """Wrong is 0.25 here, in every one of them."""
    monkeypatch.setattr(
        functions, "load_object", lambda spec: lambda **told: 0.25 + 0.75 * (told["answer"] == "42")
    )
    problem = Problem("1", "Q?", "42")
    seats, config = verifier_seat("mine:grade"), EpisodeConfig(verifier="mine:grade")
    replies = [Reply(f"<solution>{answer}</solution>", 1, False) for answer in ("41", "42")]
    (found,) = play([attempts(replies, problem, config)], seats)
    session = run_session("paired", problem, RuntimeConfig(verifier="mine:grade"), student=student(["HELP"]),
                          teacher=teacher("<teaching>HELP</teaching>"),
                          **verifier_seat("mine:grade", is_lockstep=False))  # fmt: skip
    assert [one.score for one in found] == [trial.score for trial in session.trials] == [0.25, 1.0]
    settings = {"bench": "gsm8k", "student": "s", "verifier": "mine:grade"}
    assert evaluation.Config(**settings).episode.verifier == "mine:grade"
    assert evaluation.Config(**settings | {"bench": "crmarena"}).episode.verifier == "mine:grade"


def test_many_answers_are_verified_side_by_side_and_each_fault_is_its_own(monkeypatch):
    """Eight calls meet at a barrier, so they run at the same time; one hangs, one raises, one returns nonsense."""
    barrier = threading.Barrier(8)
    monkeypatch.setattr(functions, "SECONDS", 1.0)

    def grade(answer, **_):
        barrier.wait()
        if answer == "3":
            threading.Event().wait()
        if answer == "4":
            sys.exit("no")
        return {"5": "0.5", "6": 7}.get(answer, 0.5)

    monkeypatch.setattr(functions, "load_object", lambda spec: grade)
    seat = verifier_seat("mine:grade")["verifier"]
    started = time.monotonic()
    asked = [Question([{"answer": str(i)}], Generation(1), 0, 1) for i in range(8)]
    answers = seat.ask(asked)
    assert time.monotonic() - started < 30
    assert [str(one) if isinstance(one, Fault) else json.loads(one[0].text) for one in answers[:3]] == [
        0.5
    ] * 3
    assert [type(one) is Fault for one in answers] == [False] * 3 + [True] * 4 + [False]
    assert "no reply within 1 seconds" in str(answers[3]) and "SystemExit: no" in str(answers[4])
    assert "must be a number between 0 and 1" in str(answers[5]) and "must be a number" in str(answers[6])


def test_a_single_answer_that_hangs_or_raises_is_a_fault_too(monkeypatch):
    monkeypatch.setattr(functions, "SECONDS", 0.2)
    for grade, fault in (
        (lambda **_: threading.Event().wait(), "no reply within 0.2"),
        (lambda **_: 1 / 0, "ZeroDivision"),
    ):
        monkeypatch.setattr(functions, "load_object", lambda spec: grade)
        (answer,) = verifier_seat("mine:grade")["verifier"].ask([Question([{}], Generation(1), 0, 1)])
        assert isinstance(answer, Fault) and fault in str(answer)


def test_a_reward_of_ones_own_replaces_the_published_one_in_steps_and_in_the_choice_of_the_best(
    place, tmp_path, mine
):
    metrics = run_grpo(place, tmp_path / "out", reward="mine:brief", steps=2)
    for one in records(tmp_path / "out/episodes.jsonl"):
        gain = 0.0 if one["teaching"] is None else one["guided"]["score"] - one["baseline_accuracy"]
        guided = None if one["teaching"] is None else one["guided"]["score"]
        rest = one["teaching_tokens"], one["is_leak"]
        published = reward.teaching_reward(one["baseline_accuracy"], guided, *rest)
        expected = gain - len(one["teaching"] or "") / 100 + (published > 0)
        assert one["reward"] == pytest.approx(expected)
    assert metrics[0]["reward"] < 1 and "eval/reward" in metrics[1]
    with pytest.raises(
        UserError, match="--reward mine:odd: ValueError: it returned nan, not a finite number"
    ):
        run_grpo(place, tmp_path / "odd", reward="mine:odd", steps=1)


def test_the_functions_of_the_docs_train(place, tmp_path, mine):
    page = Path(__file__).parents[1] / "docs/rewards.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    Path("mine.py").write_text("\n".join(blocks))
    names = {"verifier": "mine:verify", "reward": "mine:gain_without_leaks"}
    metrics = run_grpo(place, tmp_path / "out", steps=2, **names)
    assert len(blocks) == 2 and all(record["unanswered"] == 0 for record in metrics)
    for one in records(tmp_path / "out/episodes.jsonl"):
        gain = one["guided"]["score"] - one["baseline_accuracy"] - one["is_leak"]
        assert one["reward"] == pytest.approx(-0.5 if one["teaching"] is None else gain)


@pytest.mark.parametrize("options, message", [
    ({"reward": "mine:nothing"}, "mine:nothing: AttributeError"), ({"reward": "nobodys:f"}, "nobodys:f: ModuleNotFoundError"),
    ({"verifier": "mine:nothing"}, "mine:nothing: AttributeError"), ({"verifier": "exactly"}, "exactly: "),
])  # fmt: skip
def test_a_function_that_is_not_there_is_named_before_anything_is_loaded(
    place, tmp_path, mine, options, message
):
    import train_grpo

    missing = {"teacher": tmp_path / "no-model"}
    with pytest.raises(UserError, match=message):
        train_grpo.main(grpo_flags(place, tmp_path / "out", **missing, **options))
    assert not (tmp_path / "out").exists() and presets("train_grpo")
