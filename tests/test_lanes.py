"""Lanes, with scripted students and teachers."""

import json

import pytest
from scripted import TASK, Seat, answer, run, student, teacher, words

from nano_atlas.answers import last_json
from nano_atlas.episode import EpisodeConfig, seeds, sketch, teach
from nano_atlas.protocol import ANSWER_FORMATS
from nano_atlas.reward import RewardConfig
from nano_atlas.runtime import lanes
from nano_atlas.runtime.lanes import choose_lane, parse_plan
from nano_atlas.runtime.options import Config
from nano_atlas.runtime.traces import session_record
from nano_atlas.schedule import play

# ------------------------------------------------------------------------------------------------------------- lanes


def test_auto_asks_the_student_alone():
    session = run("auto", student=student(), teacher=teacher())
    assert (
        [trial.kind for trial in session.trials] == ["alone"]
        and session.reward is None
        and len(session.events) == 1
    )


def test_paired_teaches_once_and_rewards_the_gain():
    session = run("paired", student=student(["HELP"]), teacher=teacher("<teaching>HELP</teaching>"))
    assert [(trial.kind, trial.verdict.score) for trial in session.trials] == [
        ("alone", 0.0),
        ("guided", 1.0),
    ]
    assert session.chosen == 1 and session.reward == pytest.approx(1 + 100 / 101)


@pytest.mark.parametrize(
    "completion", ["<teaching>HELP</teaching>", "<teaching>It is 42.</teaching>", "no tag"]
)
def test_paired_is_an_episode_of_training(completion):
    """The same prompts in the same order, and the same reward, from the scripts that training plays."""
    ours = {"student": student(["HELP"]), "teacher": Seat(lambda prompt, seed: completion)}
    theirs = {"student": student(["HELP"]), "teacher": Seat(lambda prompt, seed: completion)}
    session = run("paired", **ours)
    (alone,) = play([sketch(TASK, EpisodeConfig(), seeds(0))], theirs)
    ((episode,),) = play([teach(alone, EpisodeConfig(), RewardConfig(), seeds(0), words)], theirs)
    assert session.reward == episode.reward and session.is_leak is episode.is_leak
    assert {name: seat.prompts for name, seat in ours.items()} == {
        name: seat.prompts for name, seat in theirs.items()
    }


def test_retries_carry_all_guidance_and_show_the_teacher_the_failed_answer():
    guide, pupil = (
        teacher("<teaching>first</teaching>", "no tag", "<teaching>second</teaching>", "never asked"),
        student(["second"]),
    )
    session = run("paired", config=Config(retries=3), student=pupil, teacher=guide)
    assert [trial.verdict.is_valid for trial in session.trials] == [False, False, True]
    assert len(guide.prompts) == 3 and f"Student's approach: {answer(41)}" in guide.prompts[1]
    assert pupil.prompts[-1].count("Teacher's guidance: first\nsecond") == 1
    assert session.is_malformed and session.chosen == 2


def test_the_last_attempt_is_validated_like_every_other():
    session = run(
        "paired",
        config=Config(retries=1),
        student=student(),
        teacher=teacher(*["<teaching>x</teaching>"] * 2),
    )
    assert [trial.verdict.is_valid for trial in session.trials] == [False] * 3


def test_coach_reviews_the_plan_and_the_student_gets_plan_and_review():
    guide, pupil = teacher("<teaching>HELP: skip b</teaching>"), student(["HELP"])
    session = run("coach", student=pupil, teacher=guide)
    assert [trial.kind for trial in session.trials] == ["alone", "coached"] and session.chosen == 1
    plan = "1. do a\n2. do b\n3. do c"
    assert f"Student's approach: {plan}" in guide.prompts[0]
    assert (
        pupil.prompts[-1]
        == f"{TASK.question}\n\nYour plan: {plan}\n\nTeacher's guidance: HELP: skip b\n\n{ANSWER_FORMATS['solution']}"
    )


def test_a_fault_ends_the_lane_but_what_was_reached_counts():
    session = run("paired", student=student(["6"]), teacher=Seat(lambda prompt, seed: None))
    assert session.fault == "teacher: UserError: HTTP 503" and session.reward is None
    assert session.trials[session.chosen].answer == "42"
    assert session.events[-1] == {
        "event": "teaching",
        "actor": "teacher",
        "tokens": 0,
        "fault": session.fault,
    }


def test_an_error_of_ours_ends_its_session_alone(monkeypatch):
    def broken(text):
        raise RecursionError("too deep")

    monkeypatch.setattr(lanes.protocol, "parse_teaching", broken)
    session = run("paired", student=student(), teacher=teacher("<teaching>HELP</teaching>"))
    outcome, trace = session_record(session)
    assert outcome.status == "failed" and session.fault == "internal: RecursionError: too deep"
    assert trace["final_answer"] == "41" and session.metadata["completed_at"]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Just {do} it.", ["Just {do} it."]),
        ('{"steps": []}', ['{"steps": []}']),
        ('{"steps": 3}', ['{"steps": 3}']),
        (
            '```{"steps": [null, {"description": ""}, {"description": "z", "more": null}, "  y"]}```',
            ["z", "y"],
        ),
        (json.dumps({"steps": ["s"] * 99}), ["s"] * 16),
        ('{"steps": [[1], null, {"description": 7}, true, {}, " ", "x"]}', ["x"]),
        ('{"steps": [[1], {"description": ["y"]}]}', ['{"steps": [[1], {"description": ["y"]}]}']),
        ('{"steps": {"0": "x"}}', ['{"steps": {"0": "x"}}']),
    ],
)
def test_a_plan_survives_what_models_write(text, steps):
    assert parse_plan(text) == steps


def test_the_last_fitting_object_counts_wherever_it_stands():
    assert (
        last_json('{"score": 1} and {"x": {"score": 2}} then {"score": 3, "why": "{"} }{', "score")["score"]
        == 3
    )
    assert last_json('<think>{"score": 1}</think> none {', "score") is None


# ------------------------------------------------------------------------------------------------- choosing the lane


@pytest.mark.parametrize(
    ("record", "lane"),
    [
        ([], "paired"),
        ([1.0] * 20, "auto"),
        ([1.0] * 7 + [0.0] * 3, "paired"),
        ([1.0, 0.0], "coach"),
        ([0.0] * 5, "coach"),
    ],
)
def test_the_record_decides_by_the_published_thresholds(record, lane):
    assert choose_lane(record)["mode"] == lane


def test_lane_forces_the_lane():
    assert choose_lane([1.0] * 30, "coach") == {"mode": "coach", "confidence": None, "by": "--lane"}
