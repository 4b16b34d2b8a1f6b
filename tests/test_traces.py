"""Session traces: their keys, what they keep, how a torn file is mended, and how they become training problems."""

import json
from pathlib import Path

import pytest

from nano_atlas.data import Problem
from nano_atlas.errors import UserError
from nano_atlas.runtime.guard import Trial
from nano_atlas.runtime.journal import to_line
from nano_atlas.runtime.judges import Verdict
from nano_atlas.runtime.lanes import Session
from nano_atlas.runtime.traces import (
    Outcome,
    Selection,
    TraceWriter,
    problems_from_traces,
    read_head,
    read_traces,
    session_outcome,
    trace_of,
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
        name, Problem("task-1", question, gold, "math"), 0, "concise", "math", "2026-01-02T03:04:05.000+00:00", lane="paired",
        choice={"mode": "paired", "confidence": 0.7, "by": "record"}, approach="I would add.", teachings=[teaching],
        trials=[trial("alone", alone), trial("guided", guided)], events=events, chosen=chosen, reward=reward if gold else None,
    )  # fmt: skip


def trace(review="approved", **options) -> dict:
    made = session(**options)
    result = session_outcome(made, review, {"student": (1.0, 2.0), "teacher": (10.0, 20.0)})
    return trace_of(made, result, {"seed": 0}, {"count": 0, "average_score": None, "strategies": {}})


def line(**options) -> bytes:
    return to_line(trace(**options))


def write(path, *traces) -> None:
    path.write_text("".join(json.dumps(t) + "\n" for t in traces))


# ------------------------------------------------------------------------------------------------------------- records


def test_a_trace_has_the_keys_of_atlas_and_ground_truth():
    assert set(trace()) == ATLAS_KEYS | SDK_KEYS | {"outcome", "ground_truth"}
    assert set(trace()["plan"]) == {"steps", "execution_mode"}
    assert set(trace()["plan"]["steps"][0]) == {"id", "description", "tool", "tool_params", "depends_on"}
    (step,) = trace()["steps"]
    assert set(step["reward"]) == {"score", "judges", "rationale", "raw"}
    assert set(step["validation"]) == {"valid", "guidance"}


def test_the_golden_file_is_what_is_written_today():
    """tests/data/golden_trace.jsonl was read by ATLAS' own load_runtime_traces and flatten_traces_for_training (commit 1cf1883)."""
    assert Path(__file__).with_name("data").joinpath("golden_trace.jsonl").read_bytes() == line()


def test_all_attempts_and_everything_said_is_kept():
    record = trace()
    alone, guided = record["steps"][0]["metadata"]["attempt_history"]
    assert (alone["kind"], alone["answer"], alone["score"], alone["is_valid"]) == ("alone", "41", 0.0, False)
    assert (guided["kind"], guided["answer"], guided["score"], guided["is_valid"]) == (
        "guided",
        "42",
        1.0,
        True,
    )
    assert record["steps"][0]["attempts"] == 2
    assert record["plan"]["steps"][0]["description"] == "I would add."
    assert record["steps"][0]["guidance"] == ["Multiply."]
    assert [e["text"] for e in record["trajectory_events"] if "text" in e] == [
        "<teaching>Multiply.</teaching>"
    ]


def test_tokens_and_costs_are_counted_by_actor():
    record = trace()
    assert record["outcome"]["tokens"] == {"student": 23, "teacher": 20}
    assert record["outcome"]["prompt_tokens"] == {"student": 35, "teacher": 30}
    cost = (35 * 1 + 23 * 2 + 30 * 10 + 20 * 20) / 1e6
    assert record["outcome"]["cost"] == pytest.approx(cost)
    assert record["session_metadata"]["token_usage"] == {
        "prompt_tokens": 65,
        "completion_tokens": 43,
        "total_tokens": 108,
        "calls": 4,
        "cost": pytest.approx(cost),
    }


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
    assert [a["score"] for a in record["steps"][0]["metadata"]["attempt_history"]] == [None, None]
    result = read_head(line(gold=None), "here").outcome
    assert (result.reward, result.baseline, result.guided, result.returned, result.gain) == (None,) * 5


def test_outcome_and_problem_are_read_from_the_head_of_the_line():
    result, task, gold = read_head(line(), "here")
    assert (task, gold) == ("What is 6 times 7?", "42")
    assert (result.session_id, result.strategy, result.reward, result.gain, result.returned) == (
        "s1",
        "concise",
        1.9,
        1.0,
        1.0,
    )
    beginning = line()[: line().index(b'"steps"')]
    assert read_head(beginning, "here").outcome == result  # no more of the line is looked at


# ------------------------------------------------------------------------------------------------------------- files


def test_what_is_appended_is_read_back_in_order(tmp_path):
    path = tmp_path / "deep" / "traces.jsonl"
    question = "<teaching>{gold}</teaching>\n\u2028 \ud800 {0} %s"  # tags, braces, line breaks, half of a surrogate pair
    hostile = trace(name="s2", question=question)
    with TraceWriter(path) as writer:
        writer.append([trace()])
        writer.append([hostile])
    assert [{k: v for k, v in t.items() if k != "crc32"} for t in read_traces(path)] == [trace(), hostile]
    with TraceWriter(path) as writer:
        assert [result.session_id for result in writer.outcomes()] == ["s1", "s2"]


def test_a_torn_last_line_is_mended_wherever_it_was_cut(tmp_path):
    path, lines = tmp_path / "traces.jsonl", [line(name=name) for name in ("s1", "s2")]
    whole = b"".join(lines)
    for cut in (
        *range(0, len(whole), 97),
        len(lines[0]) - 1,
        len(lines[0]),
        len(lines[0]) + 1,
        len(whole) - 2,
        len(whole) - 1,
    ):
        path.write_bytes(whole[:cut])
        with TraceWriter(path) as writer:
            kept = [result.session_id for result in writer.outcomes()]
            # A record is complete with its closing brace; only the line break may be missing.
            assert kept == [
                name for name, end in (("s1", len(lines[0]) - 1), ("s2", len(whole) - 1)) if cut >= end
            ]
            writer.append([trace(name="s3")])
        assert [t["session_metadata"]["session_id"] for t in read_traces(path)] == [*kept, "s3"]


def test_damage_that_no_crash_leaves_is_reported_with_its_line(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_bytes(line() + line().replace(b"Multiply", b"Multiplx", 1) + line())
    with TraceWriter(path) as writer, pytest.raises(UserError, match=r"traces\.jsonl:2: damaged"):
        list(writer.outcomes())
    write(path, trace(), "not a trace")
    with pytest.raises(UserError, match=r"traces\.jsonl:2: not a session trace"):
        list(read_traces(path))
    write(path, trace(), {"question": "not a trace"})
    with pytest.raises(UserError, match=r"traces\.jsonl:2: not a session trace"):
        list(read_traces(path))
    write(path, {"task": "of another program"})
    with (
        TraceWriter(path) as writer,
        pytest.raises(UserError, match=r"traces\.jsonl:1: not a trace of this runtime"),
    ):
        list(writer.outcomes())


def test_two_writers_cannot_hold_one_file(tmp_path):
    with TraceWriter(tmp_path / "traces.jsonl"):
        with pytest.raises(UserError, match="another process is writing"):
            TraceWriter(tmp_path / "traces.jsonl")
    TraceWriter(tmp_path / "traces.jsonl").append([trace()])


def test_a_reward_that_is_no_number_is_never_written(tmp_path):
    with TraceWriter(tmp_path / "traces.jsonl") as writer:
        with pytest.raises(ValueError):
            writer.append([trace(), trace(reward=float("nan"))])
    assert (tmp_path / "traces.jsonl").read_bytes() == b""


def test_a_reader_beside_a_writer_leaves_out_the_record_that_is_being_written(tmp_path):
    (tmp_path / "traces.jsonl").write_bytes(line() + line(name="s2")[:-40])
    assert [t["session_metadata"]["session_id"] for t in read_traces(tmp_path / "traces.jsonl")] == ["s1"]


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
        (Selection(), ["helped", "harmed", "kept", "unknown", "disputed"]),
        (Selection(min_gain=1), ["helped"]),
        (Selection(min_gain=0), ["helped", "kept", "disputed"]),
        (Selection(min_signal=0.2), ["helped", "harmed", "disputed"]),
        (Selection(min_reward=0.9), ["helped", "kept"]),
        (Selection(min_reward=0.9, min_signal=0.5), ["helped"]),
        (Selection(only_lane=("coach",)), ["harmed"]),
        (Selection(only_key=("crm",)), ["kept", "unknown", "disputed"]),
        (Selection(since="2026-01-02"), ["harmed", "kept"]),
        (Selection(until="2026-01-02"), ["helped"]),
        (Selection(review_status=("pending",)), ["pending"]),
    ],
)
def test_selection(selection, expected):
    assert [name for name, outcome in OUTCOMES.items() if selection.takes(outcome)] == expected


def test_a_later_review_overrules_the_recorded_one():
    assert Selection().takes(OUTCOMES["pending"], "approved")
    assert not Selection().takes(OUTCOMES["helped"], "quarantined")


def test_traces_become_problems_and_what_does_not_is_counted(tmp_path):
    path = tmp_path / "traces.jsonl"
    write(
        path,
        trace(name="a", question="one"),
        trace(name="b", question="two", gold=None),
        trace(name="c", question="one"),
        trace(name="d", question="three", alone="42", guided="42"),
    )
    problems, left_out = problems_from_traces(path, Selection(min_signal=1))
    assert problems == [Problem("a", "one", "42", "math")]
    assert left_out == {"not selected": 2, "the same task again": 1}
    problems, left_out = problems_from_traces(path)
    assert [problem.question for problem in problems] == ["one", "three"]
    assert left_out == {"no ground truth": 1, "the same task again": 1}


def test_files_of_atlas_sdk_are_read_and_selected(tmp_path):
    """Records with the keys that atlas-sdk's jsonl_writer gives them; it keeps a ground truth in the metadata only."""
    metadata = {
        "session_id": 7,
        "status": "succeeded",
        "created_at": "2026-01-02T00:00:00Z",
        "ground_truth": 42,
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
    poor = session | {"task": "2 times 2?", "session_reward": {"score": 0.2}}
    write(
        tmp_path / "sdk.jsonl",
        session,
        poor,
        session | {"task": "?", "session_metadata": metadata | {"status": "failed"}},
    )
    problems, left_out = problems_from_traces(
        tmp_path / "sdk.jsonl", Selection(min_reward=0.5, min_signal=0.1, only_lane=("coach",))
    )
    assert problems == [Problem("7", "6 times 7?", "42", "k")] and left_out == {"not selected": 2}
    write(
        tmp_path / "sample.jsonl", {"session_id": 1, "task": "One", "steps": [{"reward": {"process": 1.0}}]}
    )  # as in their sample file
    with pytest.raises(UserError, match="no ground truth"):
        problems_from_traces(tmp_path / "sample.jsonl")


def test_a_file_without_any_training_problem_is_an_error_that_says_why(tmp_path):
    write(tmp_path / "traces.jsonl", trace(gold=None))
    with pytest.raises(UserError, match="no ground truth"):
        problems_from_traces(tmp_path / "traces.jsonl")
