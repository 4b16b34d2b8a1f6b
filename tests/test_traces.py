"""Session traces: their keys, what they keep, how a torn file is repaired, and how they become training problems."""

import json
from pathlib import Path

import pytest

from nano_atlas.data import Problem
from nano_atlas.errors import UserError
from nano_atlas.runs import Journal
from nano_atlas.runtime.options import Config
from nano_atlas.runtime.traces import (
    Outcome,
    Session,
    Trial,
    Verdict,
    outcome_of,
    read_traces,
    session_record,
    why_left_out,
)

ATLAS_KEYS = {  # the fields of AtlasSessionTrace
    "task", "final_answer", "plan", "steps", "session_metadata", "session_reward", "trajectory_events", "student_learning",
    "teacher_learning", "learning_history", "adaptive_summary",
}  # fmt: skip
SDK_KEYS = {"execution_mode", "learning_key", "review_status", "reward_stats", "reward_summary"}


def session(
    question="What is 6 times 7?",
    gold="42",
    alone="41",
    guided="42",
    teaching="Multiply.",
    reward=1.9,
    name="s1",
    chosen=1,
) -> Session:
    def trial(kind: str, answer: str) -> Trial:
        verdict = Verdict(float(answer == gold), "exact", answer == gold) if gold else Verdict(None, "nobody")
        return Trial(kind, f"So <solution>{answer}</solution>", answer, 9, False, verdict)

    events = [
        {"event": "probe", "actor": "student", "tokens": 5, "prompt_tokens": 10},
        {"event": "alone", "actor": "student", "tokens": 9, "prompt_tokens": 10},
        {
            "event": "teaching",
            "actor": "teacher",
            "tokens": 20,
            "prompt_tokens": 30,
            "text": f"<teaching>{teaching}</teaching>",
        },
        {"event": "guided", "actor": "student", "tokens": 9, "prompt_tokens": 15, "is_truncated": False},
    ]
    return Session(
        session_id=name, task=Problem("task-1", question, gold, "math"), seed=0, strategy="concise", learning_key="math",
        created_at="2026-01-02T03:04:05.000+00:00", lane="paired",
        choice={"mode": "paired", "confidence": 0.7, "by": "record"}, approach="I would add.", teachings=[teaching],
        trials=[trial("alone", alone), trial("guided", guided)], events=events, chosen=chosen, reward=reward if gold else None,
        metadata={"seed": 0}, history={"count": 0, "average_score": None, "strategies": {}},
    )  # fmt: skip


def trace(**options) -> dict:
    return session_record(session(**options))[1]


def line(**options) -> bytes:
    return json.dumps(trace(**options)).encode() + b"\n"


def ids(path) -> list[str]:
    return [outcome.session_id for outcome, _ in read_traces(path)]


def write(path, *traces) -> None:
    path.write_text("".join(json.dumps(t) + "\n" for t in traces))


# ------------------------------------------------------------------------------------------------------------- records


def test_a_trace_has_the_keys_of_atlas_and_ground_truth():
    assert set(trace()) == ATLAS_KEYS | SDK_KEYS | {"outcome", "ground_truth"}
    assert set(trace()["plan"]) == {"steps", "execution_mode"}
    assert set(trace()["plan"]["steps"][0]) == {"id", "description", "depends_on"}
    (step,) = trace()["steps"]
    assert set(step["reward"]) == {"score", "judges", "rationale", "raw"}
    assert set(step["validation"]) == {"valid", "guidance"}


def test_the_golden_file_is_what_is_written_today():
    """tests/data/golden_trace.jsonl was read by ATLAS' own load_runtime_traces and flatten_traces_for_training (commit 1cf1883)."""
    assert Path(__file__).with_name("data").joinpath("golden_trace.jsonl").read_bytes() == line()


def test_all_attempts_and_everything_said_is_kept():
    record = trace()
    alone, guided = record["steps"][0]["metadata"]["attempt_history"]
    assert (alone["kind"], alone["answer"], alone["verdict"]["score"]) == ("alone", "41", 0.0)
    assert (guided["kind"], guided["answer"], guided["verdict"]["score"]) == ("guided", "42", 1.0)
    assert (alone["verdict"]["is_valid"], guided["verdict"]["is_valid"]) == (False, True)
    assert record["steps"][0]["attempts"] == 2
    assert record["plan"]["steps"][0]["description"] == "I would add."
    assert record["steps"][0]["guidance"] == ["Multiply."]
    assert [e["text"] for e in record["trajectory_events"] if "text" in e] == [
        "<teaching>Multiply.</teaching>"
    ]


def test_tokens_are_counted_by_actor():
    record = trace()
    assert record["outcome"]["tokens"] == {"student": 23, "teacher": 20}
    assert record["outcome"]["prompt_tokens"] == {"student": 35, "teacher": 30}
    usage = {"prompt_tokens": 65, "completion_tokens": 43, "total_tokens": 108, "calls": 4}
    assert record["session_metadata"]["token_usage"] == usage


@pytest.mark.parametrize(
    ("chosen", "kind", "answer", "is_valid"), [(1, "guided", "42", True), (0, "alone", "41", False)]
)
def test_the_final_answer_is_the_one_that_was_returned(chosen, kind, answer, is_valid):
    record = trace(chosen=chosen)
    assert (record["final_answer"], record["steps"][0]["output"]) == (answer, answer)
    assert record["steps"][0]["validation"]["valid"] is is_valid
    assert record["adaptive_summary"]["returned"] == kind


def test_without_a_score_there_is_no_reward_rather_than_a_reward_of_zero():
    record = trace(gold=None)
    assert record["session_reward"] is None and record["ground_truth"] is None
    assert record["steps"][0]["reward"]["score"] is None
    result = outcome_of(record, "here")
    assert (result.reward, result.baseline, result.guided, result.returned, result.gain) == (None,) * 5


# ------------------------------------------------------------------------------------------------------------- files


def test_what_is_appended_is_read_back_in_order(tmp_path):
    path = tmp_path / "deep" / "traces.jsonl"
    question = "<teaching>{gold}</teaching>\n\u2028 \ud800 {0} %s"  # tags, braces, line breaks, half of a surrogate pair
    hostile = trace(name="s2", question=question)
    with Journal(path) as journal:
        journal.append([trace()])
        journal.append([hostile])
    read_back = trace(
        name="s2", question=question.replace("\ud800", "\ufffd")
    )  # what a file in UTF-8 can hold
    assert [read for _, read in read_traces(path)] == [trace(), read_back]
    with Journal(path):
        assert ids(path) == ["s1", "s2"]


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path):
    path, lines = tmp_path / "traces.jsonl", [line(name=name) for name in ("s1", "s2")]
    whole, first = b"".join(lines), len(lines[0])
    for cut in (*range(0, len(whole), 97), first - 1, first, first + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        kept = ["s1"] * (cut >= first)
        assert ids(path) == kept  # a reader beside the writer sees the records that are complete
        with Journal(path) as journal:
            assert ids(path) == kept
            journal.append([trace(name="s3")])
        assert ids(path) == [*kept, "s3"]


def test_damage_that_no_crash_leaves_is_reported_with_its_line(tmp_path):
    path = tmp_path / "traces.jsonl"
    for damaged, complaint in (
        (line()[: len(line()) // 2] + b"\n", "not JSON"),
        (b'"not a trace"\n', "a JSON str"),
        (b'{"question": "not a trace"}\n', "not a session trace"),
        (b'{"task": "x", "outcome": {"of": "another"}}\n', "this version"),
    ):
        path.write_bytes(line() + damaged + line())
        with pytest.raises(UserError, match=rf"traces\.jsonl:2: .*{complaint}"):
            list(read_traces(path))


# ------------------------------------------------------------------------------------------- selection and training problems


OUTCOMES = {
    "helped": Outcome(
        "a", "math", "paired", baseline=0.0, guided=1.0, reward=1.9, created_at="2026-01-01T10:00:00+00:00"
    ),
    "harmed": Outcome(
        "b", "math", "coach", baseline=1.0, guided=0.0, reward=-2.0, created_at="2026-01-02T10:00:00+00:00"
    ),
    "kept": Outcome(
        "c", "crm", "paired", baseline=1.0, guided=1.0, reward=0.9, created_at="2026-01-03T10:00:00+00:00"
    ),
    "unknown": Outcome("d", "crm", "paired"),
    "disputed": Outcome("e", "crm", "paired", baseline=0.5, guided=0.5, reward=0.5, disagreement=0.3),
    "pending": Outcome("f", "math", "paired", review="pending"),
    "failed": Outcome("g", "math", "paired", status="failed"),
}


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Config(), ["helped", "harmed", "kept", "unknown", "disputed"]),
        (Config(min_gain=1), ["helped"]),
        (Config(min_gain=0), ["helped", "kept", "disputed"]),
        (Config(min_signal=0.2), ["helped", "harmed", "disputed"]),
        (Config(min_reward=0.9), ["helped", "kept"]),
        (Config(min_reward=0.9, min_signal=0.5), ["helped"]),
        (Config(only=("coach",)), ["harmed"]),
        (Config(only=("crm", "coach")), ["harmed", "kept", "unknown", "disputed"]),
        (Config(since="2026-01-02"), ["harmed", "kept"]),
        (Config(since="2026-01-01..2026-01-02"), ["helped"]),
        (Config(review_status=("pending",)), ["pending"]),
    ],
)
def test_selection(selection, expected):
    assert [name for name, outcome in OUTCOMES.items() if not why_left_out(outcome, selection)] == expected


def test_a_time_that_is_none_is_refused():
    Config(export=Path("x"), since="2026-01-01..2026-01-02T10:00").check()
    wrong = ("2026-01-01..tomorrow", "2026-02-30", "a..b..c", "2026-01-02..2026-01-01")
    for since in (*wrong, "2026-01-01..2026-01-02..2026-01-03"):
        with pytest.raises(UserError, match=f"--since {since} must be START or START..END"):
            Config(export=Path("x"), since=since).check()


@pytest.mark.parametrize(
    "begun", ["2026-11-27T23:30:00.000+00:00", "2026-11-27 23:30:00Z", "20261128T013000+0200"]
)
def test_since_compares_times_however_they_are_written(begun):
    outcome = Outcome("a", created_at=begun)
    for since in (
        "2026-11-27 23:24",
        "20261127",
        "2026-W48",
        "2026-11-28T01:30+02:00",
        "2026-11-27T23:30Z..20261128",
    ):
        assert not why_left_out(outcome, Config(since=since)), since
    for since in (
        "2026-11-27 23:31",
        "20261128",
        "2026-W49",
        "2026-11-28T01:31+02:00",
        "..2026-11-27T23:30Z",
    ):
        assert why_left_out(outcome, Config(since=since)) == "not in --since", since


@pytest.mark.parametrize("begun", ["", "yesterday", "1764286200", "2026-11"])
def test_a_session_of_which_nobody_knows_when_it_began_is_not_selected_by_time(begun):
    assert not why_left_out(Outcome("a", created_at=begun), Config())
    assert why_left_out(Outcome("a", created_at=begun), Config(since="2020-01-01"))


def test_files_of_atlas_sdk_are_read_and_selected(tmp_path):
    """Records with the keys that atlas-sdk's jsonl_writer gives them."""
    metadata = {
        "session_id": 7,
        "status": "succeeded",
        "created_at": "2026-01-02T00:00:00Z",
        "learning_key": "k",
    }
    session = {
        "task": "6 times 7?",
        "final_answer": "42",
        "plan": {"steps": []},
        "steps": [],
        "session_metadata": metadata,
        "session_reward": {"score": 0.9},
        "reward_stats": {"score": 0.9, "score_stddev": 0.2},
        "review_status": "approved",
        "adaptive_summary": {"adaptive_mode": "coach"},
    }
    failed = session | {"session_metadata": metadata | {"status": "failed"}}
    sample = {
        "session_id": 1,
        "task": "One",
        "steps": [{"reward": {"process": 1.0}}],
    }  # as in their sample file
    path = tmp_path / "sdk.jsonl"
    write(path, session, session | {"session_reward": {"score": 0.2}}, failed, sample)
    selection = Config(min_reward=0.5, min_signal=0.1, only=("coach",))
    outcomes = [outcome for outcome, _ in read_traces(path)]
    reasons = [None, "reward below 0.5", "session failed", "no reward"]
    assert [why_left_out(outcome, selection) for outcome in outcomes] == reasons
    assert (outcomes[0].session_id, outcomes[0].learning_key) == ("7", "k")
    assert outcomes[3].session_id == f"{path}:4"


@pytest.mark.parametrize(
    ("odd", "reward"),
    [
        ({"session_metadata": "text", "adaptive_summary": 5, "reward_stats": []}, "x.jsonl:3"),
        ({"session_reward": "0.9"}, 0.9),
        ({"session_reward": {"score": "n/a"}}, "x.jsonl:3"),
        ({"reward_stats": {"score_stddev": "n/a"}}, "x.jsonl:3"),
        ({"outcome": ["a"]}, "x.jsonl:3"),
    ],
)
def test_odd_fields_of_atlas_sdk_are_read_where_they_can_be_and_else_named(odd, reward):
    if not isinstance(reward, str):
        assert outcome_of({"task": "x", **odd}, "x.jsonl:3").reward == reward
        return
    with pytest.raises(UserError, match=reward):
        outcome_of({"task": "x", **odd}, "x.jsonl:3")
