"""Session traces: their keys, what they keep, how a torn file is mended, and how they become training problems."""

import json

import pytest

from nano_atlas.data import Problem
from nano_atlas.episodes import Attempt, Episode, Sketch
from nano_atlas.errors import UserError
from nano_atlas.seats import Reply
from nano_atlas.traces import Selection, TraceWriter, outcome, problems_from_traces, read_traces, trace_from_episode

ATLAS_KEYS = {  # the fields of AtlasSessionTrace
    "task", "final_answer", "plan", "steps", "session_metadata", "session_reward", "trajectory_events", "student_learning",
    "teacher_learning", "learning_history", "adaptive_summary",
}  # fmt: skip


def episode(question="What is 6 times 7?", gold="42", alone="41", guided="42", teaching="Multiply.", reward=1.9) -> Episode:
    def attempt(answer: str) -> Attempt:
        return Attempt(f"So <solution>{answer}</solution>", answer, answer == gold, tokens=9, is_truncated=False)

    sketch = Sketch(Problem("task-1", question, gold, "math"), "I would add.", 5, [attempt(alone)])
    reply = Reply(f"<thinking>wrong operation</thinking>\n<teaching>{teaching}</teaching>", 20, False)
    return Episode(sketch, "concise", reply, teaching, 2, attempt(guided), False, reward)


def trace(returned="guided", session_id="s1", **options) -> dict:
    metadata = {"session_id": session_id, "learning_key": "math", "task_id": "task-1", "domain": "math"}
    return trace_from_episode(episode(**options), returned, metadata, {"count": 0, "average_score": None, "strategies": {}})


def write(path, *traces) -> None:
    path.write_text("".join(json.dumps(t) + "\n" for t in traces))


# ------------------------------------------------------------------------------------------------------------- records


def test_a_trace_has_the_keys_of_atlas_and_ground_truth():
    assert set(trace()) == ATLAS_KEYS | {"ground_truth", "execution_mode", "learning_key", "reward_summary"}
    assert set(trace()["plan"]) == {"steps", "execution_mode"}
    assert set(trace()["plan"]["steps"][0]) == {"id", "description", "tool", "tool_params", "depends_on"}
    (step,) = trace()["steps"]
    assert set(step["reward"]) == {"score", "judges", "rationale", "raw"}
    assert set(step["validation"]) == {"valid", "guidance"}


def test_both_attempts_and_everything_said_is_kept():
    record = trace()
    alone, guided = record["steps"][0]["metadata"]["attempt_history"]
    assert (alone["kind"], alone["answer"], alone["is_correct"]) == ("baseline", "41", False)
    assert (guided["kind"], guided["answer"], guided["is_correct"]) == ("guided", "42", True)
    assert record["steps"][0]["attempts"] == 2
    assert record["plan"]["steps"][0]["description"] == "I would add."
    assert record["steps"][0]["guidance"] == ["Multiply."]
    assert [e["text"] for e in record["trajectory_events"] if "text" in e] == [episode().reply.text]
    assert record["session_metadata"]["token_usage"] == {"calls": 4, "completion_tokens": 43, "student": 23, "teacher": 20}


@pytest.mark.parametrize(("returned", "answer", "is_valid"), [("guided", "42", True), ("baseline", "41", False)])
def test_the_final_answer_is_the_one_that_was_returned(returned, answer, is_valid):
    record = trace(returned)
    assert (record["final_answer"], record["steps"][0]["output"]) == (answer, answer)
    assert record["steps"][0]["validation"]["valid"] is is_valid
    assert record["adaptive_summary"]["returned"] == returned


def test_without_ground_truth_there_is_no_reward_rather_than_a_reward_of_zero():
    record = trace(gold=None)
    assert record["session_reward"] is None and record["ground_truth"] is None
    assert record["steps"][0]["reward"]["score"] is None
    assert [a["is_correct"] for a in record["steps"][0]["metadata"]["attempt_history"]] == [None, None]
    result = outcome(record)
    assert (result.reward, result.baseline, result.guided, result.returned, result.gain) == (None,) * 5


def test_the_outcome_is_read_back_from_the_written_trace():
    result = outcome(json.loads(json.dumps(trace())))
    assert (result.session_id, result.strategy, result.reward, result.gain, result.returned) == ("s1", "concise", 1.9, 1.0, 1.0)
    assert (result.student_tokens, result.teacher_tokens) == (23, 20)


# ------------------------------------------------------------------------------------------------------------- files


def test_what_is_appended_is_read_back_in_order(tmp_path):
    path = tmp_path / "deep" / "traces.jsonl"
    question = "<teaching>{gold}</teaching>\n\u2028 \ud800 {0} %s"  # tags, braces, line breaks, half of a surrogate pair
    hostile = trace(session_id="s2", question=question)
    with TraceWriter(path) as writer:
        writer.append([trace()])
        writer.append([hostile])
    assert list(read_traces(path)) == [trace(), hostile]
    with TraceWriter(path) as writer:
        assert [result.session_id for result in writer.outcomes()] == ["s1", "s2"]


def test_a_torn_last_line_is_mended_wherever_it_was_cut(tmp_path):
    path, lines = tmp_path / "traces.jsonl", [json.dumps(trace(session_id=name)) + "\n" for name in ("s1", "s2")]
    whole = "".join(lines).encode()
    for cut in (*range(0, len(whole), 97), len(lines[0]) - 1, len(lines[0]), len(lines[0]) + 1, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with TraceWriter(path) as writer:
            kept = [result.session_id for result in writer.outcomes()]
            # A record is complete with its closing brace; only the line break may be missing.
            assert kept == [name for name, end in (("s1", len(lines[0]) - 1), ("s2", len(whole) - 1)) if cut >= end]
            writer.append([trace(session_id="s3")])
        assert [t["session_metadata"]["session_id"] for t in read_traces(path)] == [*kept, "s3"]


def test_damage_that_no_crash_leaves_is_reported_with_its_line(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps(trace()) + '\n{"task": "cut off\n' + json.dumps(trace()) + "\n")
    with TraceWriter(path) as writer, pytest.raises(UserError, match=r"traces\.jsonl:2: not JSON"):
        list(writer.outcomes())
    write(path, trace(), {"question": "not a trace"})
    with pytest.raises(UserError, match=r"traces\.jsonl:2: not a session trace"):
        list(read_traces(path))
    write(path, {"task": "of another program"})
    with TraceWriter(path) as writer, pytest.raises(UserError, match=r"traces\.jsonl:1: not a trace of this runtime"):
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


# ------------------------------------------------------------------------------------------- selection and training problems


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (Selection(), ["helped", "harmed", "kept", "unknown"]),
        (Selection(min_gain=1), ["helped"]),
        (Selection(min_gain=0), ["helped", "kept"]),
        (Selection(min_signal=1), ["helped", "harmed"]),
        (Selection(min_reward=0.9), ["helped", "kept"]),
        (Selection(min_reward=0.9, min_signal=0.5), ["helped"]),
    ],
)
def test_selection(selection, expected):
    traces = {
        "helped": trace(alone="41", guided="42", reward=1.9),
        "harmed": trace(alone="42", guided="41", reward=-2.0),
        "kept": trace(alone="42", guided="42", reward=0.9),
        "unknown": trace(gold=None),
    }
    assert [name for name, record in traces.items() if selection.takes(record)] == expected


def test_traces_become_problems_and_what_does_not_is_counted(tmp_path):
    path = tmp_path / "traces.jsonl"
    write(
        path,
        trace(session_id="a", question="one"),
        trace(session_id="b", question="two", gold=None),
        trace(session_id="c", question="one"),
        trace(session_id="d", question="three", alone="42", guided="42"),
    )
    problems, left_out = problems_from_traces(path, Selection(min_signal=1))
    assert problems == [Problem("a", "one", "42", "math")]
    assert left_out == {"not selected": 2, "the same task again": 1}
    problems, left_out = problems_from_traces(path)
    assert [problem.question for problem in problems] == ["one", "three"]
    assert left_out == {"no ground truth": 1, "the same task again": 1}


def test_files_of_atlas_sdk_keep_the_ground_truth_in_the_metadata(tmp_path):
    write(tmp_path / "sdk.jsonl", {"task": "6 times 7?", "steps": [], "session_metadata": {"ground_truth": 42}})
    assert problems_from_traces(tmp_path / "sdk.jsonl")[0] == [Problem("sdk:1", "6 times 7?", "42", "")]


def test_a_file_without_any_training_problem_is_an_error_that_says_why(tmp_path):
    write(tmp_path / "traces.jsonl", trace(gold=None))
    with pytest.raises(UserError, match="no ground truth"):
        problems_from_traces(tmp_path / "traces.jsonl")
