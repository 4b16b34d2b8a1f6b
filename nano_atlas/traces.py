"""Session traces: what happened with each task at run time, one JSON object per line, append-only.

A record has the eleven keys of ATLAS' AtlasSessionTrace (so its `load_runtime_traces` reads the file) and `ground_truth`, which
turns a trace into a training problem, with `execution_mode`, `learning_key` and `reward_summary` as atlas-sdk exports them:

    task, final_answer       the question, and the answer that was returned
    plan                     one step; its description is the approach the student stated (the probe)
    steps                    one step with both attempts in metadata.attempt_history: alone first, then guided
    session_reward           the teaching reward; null where no ground truth was known, which is not the same as zero
    trajectory_events        who spoke in which order, tokens each; the teacher's whole completion
    learning_history         what was known about the teaching strategies when this one was chosen
    adaptive_summary         the lane, the strategy, and which attempt was returned
    student_learning, teacher_learning    null: playbooks are not kept

Every text stands in a record once, save that `steps[0]` repeats the approach and the returned attempt in the fields where other
readers look for them. Simplified against atlas-sdk: no database, no review states, no drift detection.
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano_atlas.config import option
from nano_atlas.data import Problem, read_jsonl
from nano_atlas.episodes import Attempt, Episode
from nano_atlas.errors import UserError

Trace = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- records


def trace_from_episode(
    episode: Episode, returned: str, session_metadata: dict[str, Any], learning_history: dict[str, Any]
) -> Trace:
    """The trace of one session.

    returned: which attempt was handed out, "guided" or "baseline" (the first one). session_metadata must hold `session_id` and
    `learning_key`; ground truth and token usage are added to it. learning_history: as of the choice of the strategy.
    """
    sketch, gold = episode.sketch, episode.sketch.problem.answer
    attempts = [("baseline", attempt) for attempt in sketch.baselines] + [("guided", episode.guided)]
    chosen = episode.guided if returned == "guided" else sketch.baselines[0]
    final_answer = chosen.text if chosen.answer is None else chosen.answer
    is_scored = gold is not None
    summary = {
        "score": episode.reward if is_scored else None,
        "baseline": sketch.baseline_accuracy if is_scored else None,
        "guided": float(episode.guided.is_correct) if is_scored else None,
        "returned": float(chosen.is_correct) if is_scored else None,
        "gain": episode.gain if is_scored else None,
        "performance_gap": 1 - sketch.baseline_accuracy if is_scored else None,
        "is_leak": episode.is_leak,
        "is_malformed": episode.teaching is None,
    }
    reward = {
        "score": summary["score"],
        "judges": [_judge(summary)] if is_scored else [],
        "rationale": _rationale(episode) if is_scored else "not scored: no ground truth",
        "raw": {"gain": summary["gain"], "teaching_tokens": episode.teaching_tokens},
    }
    step = {
        "step_id": 1,
        "description": sketch.approach,
        "trace": chosen.text,
        "output": final_answer,
        "reward": reward,
        "validation": {"valid": chosen.is_correct if is_scored else None, "guidance": episode.teaching},
        "attempts": len(attempts),
        "guidance": [episode.teaching] if episode.teaching else [],
        "depends_on": [],
        "metadata": {"attempt_history": [_attempt(kind, attempt, is_scored) for kind, attempt in attempts]},
    }
    plan_step = {"id": 1, "description": sketch.approach, "tool": None, "tool_params": None, "depends_on": []}
    events = [{"event": "probe", "actor": "student", "tokens": sketch.approach_tokens}]
    events += [{"event": "baseline", "actor": "student", "tokens": attempt.tokens} for attempt in sketch.baselines]
    events += [
        {"event": "teaching", "actor": "teacher", "tokens": episode.reply.tokens, "is_truncated": episode.reply.is_truncated,
         "text": episode.reply.text},
        {"event": "guided", "actor": "student", "tokens": episode.guided.tokens},
        {"event": "return", "actor": "runtime", "attempt": returned},
    ]
    tokens = Counter()  # by actor
    for event in events[:-1]:
        tokens[event["actor"]] += event["tokens"]
    usage = {"calls": len(events) - 1, "completion_tokens": tokens.total(), **tokens}
    return {
        "task": sketch.problem.question,
        "final_answer": final_answer,
        "plan": {"steps": [plan_step], "execution_mode": "single_shot"},
        "steps": [step],
        "session_metadata": {**session_metadata, "token_usage": usage, "ground_truth": gold},
        "session_reward": reward if is_scored else None,
        "trajectory_events": events,
        "student_learning": None,
        "teacher_learning": None,
        "learning_history": learning_history,
        "adaptive_summary": {"adaptive_mode": "paired", "strategy": episode.style, "returned": returned},
        "ground_truth": gold,
        "execution_mode": "single_shot",
        "learning_key": session_metadata["learning_key"],
        "reward_summary": summary,
    }


def _attempt(kind: str, attempt: Attempt, is_scored: bool) -> dict[str, Any]:
    return {
        "kind": kind,
        "text": attempt.text,
        "answer": attempt.answer,
        "is_correct": attempt.is_correct if is_scored else None,
        "tokens": attempt.tokens,
        "is_truncated": attempt.is_truncated,
    }


def _judge(summary: dict[str, Any]) -> dict[str, Any]:
    return {"identifier": "exact_match", "score": summary["guided"], "rationale": "the guided answer against the ground truth"}


def _rationale(episode: Episode) -> str:
    if episode.teaching is None:
        return "no <teaching> tag, so the student got nothing"
    leak = "; the teaching contains the answer" if episode.is_leak else ""
    baseline, guided = episode.sketch.baseline_accuracy, float(episode.guided.is_correct)
    return f"correctness {baseline:g} alone, {guided:g} guided, by {episode.teaching_tokens} tokens of teaching{leak}"


@dataclass(frozen=True)
class Outcome:
    """The few numbers of a trace that the runtime keeps in memory. Scores are None without ground truth."""

    session_id: str
    learning_key: str
    strategy: str
    returned_attempt: str  # "guided" | "baseline"
    reward: float | None
    baseline: float | None  # correctness, 0 to 1
    guided: float | None
    returned: float | None
    is_leak: bool
    is_malformed: bool
    is_truncated: bool  # an answer or the teaching ran into its length limit
    student_tokens: int  # generated: probe, baseline and guided answer
    teacher_tokens: int

    @property
    def gain(self) -> float | None:
        return None if self.guided is None else self.guided - self.baseline


def outcome(trace: Trace, where: str = "trace") -> Outcome:
    """Raises UserError, with `where`, for a trace that some other program wrote."""
    try:
        metadata, summary = trace["session_metadata"], trace["reward_summary"]
        generated = trace["steps"][0]["metadata"]["attempt_history"] + trace["trajectory_events"]
        return Outcome(
            session_id=metadata["session_id"],
            learning_key=metadata["learning_key"],
            strategy=trace["adaptive_summary"]["strategy"],
            returned_attempt=trace["adaptive_summary"]["returned"],
            reward=summary["score"],
            baseline=summary["baseline"],
            guided=summary["guided"],
            returned=summary["returned"],
            is_leak=summary["is_leak"],
            is_malformed=summary["is_malformed"],
            is_truncated=any(text.get("is_truncated", False) for text in generated),
            student_tokens=metadata["token_usage"]["student"],
            teacher_tokens=metadata["token_usage"]["teacher"],
        )
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{where}: not a trace of this runtime ({type(error).__name__}: {error}); choose another --out, or use --restart"
        ) from None


# ------------------------------------------------------------------------------------------------------------- files


class TraceWriter:
    """Appends traces to a file that no other process may write meanwhile, and mends its last line if a crash tore it.

    A half-written last line is cut off (its task counts as not done); a whole record that lacks only its line break is kept.
    Raises UserError if another process holds the file.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when the process ends, in any way
        except OSError:
            self._file.close()
            raise UserError(f"{self.path}: another process is writing this file; wait for it or choose another --out") from None
        self._mend()

    def _mend(self) -> None:
        end, last = 0, b""
        self._file.seek(0)
        for last in self._file:
            end += len(last)
        if last.endswith(b"\n") or not last:
            return
        try:
            json.loads(last)
            self._file.write(b"\n")
        except ValueError:  # includes UnicodeDecodeError: a multi-byte character cut in two
            self._file.truncate(end - len(last))
        self._sync()

    def append(self, traces: Iterable[Trace]) -> None:
        """Returns when the traces are on the disk."""
        self._file.write("".join(json.dumps(trace, allow_nan=False) + "\n" for trace in traces).encode())
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def outcomes(self) -> Iterator[Outcome]:
        """Of everything in the file, in the order written."""
        if self.path.stat().st_size:
            for number, trace in _numbered(self.path):
                yield outcome(trace, f"{self.path}:{number}")

    def __enter__(self) -> "TraceWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _numbered(path: Path | str) -> Iterator[tuple[int, Trace]]:
    for number, trace in read_jsonl(path):
        if not isinstance(trace.get("task"), str):
            raise UserError(f"{path}:{number}: not a session trace; the field 'task' must hold the question")
        yield number, trace


def read_traces(path: Path | str) -> Iterator[Trace]:
    """The records of a trace file, ours or atlas-sdk's. Raises UserError naming file and line."""
    for _, trace in _numbered(path):
        yield trace


@dataclass(frozen=True)
class Selection:
    """Which traces are worth training on. One without the number in question is left out: nobody knows whether it qualifies."""

    min_reward: float | None = option(None, "least session reward of a selected trace")
    min_gain: float | None = option(None, "least gain, correctness guided minus alone (-1 to 1), of a selected trace")
    min_signal: float | None = option(None, "least |gain| of a selected trace: something changed, for better or worse")

    def takes(self, trace: Trace) -> bool:
        reward = (trace.get("session_reward") or {}).get("score")
        gain = (trace.get("reward_summary") or {}).get("gain")
        signal = None if gain is None else abs(gain)
        bounds = ((reward, self.min_reward), (gain, self.min_gain), (signal, self.min_signal))
        return all(least is None or (value is not None and value >= least) for value, least in bounds)


def problems_from_traces(path: Path | str, selection: Selection = Selection()) -> tuple[list[Problem], Counter[str]]:
    """Training problems from traces (task -> question, ground truth -> answer); also counts, by reason, the traces left out.

    A question that comes back with the same ground truth (exports of several runs) becomes one problem. Raises UserError if no
    problem is left.
    """
    problems: dict[tuple[str, str], Problem] = {}
    left_out: Counter[str] = Counter()
    for number, trace in _numbered(path):
        metadata = trace.get("session_metadata") or {}
        places = (trace.get("ground_truth"), metadata.get("ground_truth"))  # the latter in files of atlas-sdk
        gold = next((value for value in places if value is not None), None)
        if not selection.takes(trace):
            left_out["not selected"] += 1
        elif gold is None or not str(gold).strip():
            left_out["no ground truth"] += 1
        elif (trace["task"], str(gold)) in problems:
            left_out["the same task again"] += 1
        else:
            name = str(metadata.get("session_id") or f"{Path(path).stem}:{number}")
            problems[trace["task"], str(gold)] = Problem(name, trace["task"], str(gold), str(metadata.get("domain") or ""))
    if not problems:
        raise UserError(f"{path}: no trace here makes a training problem ({dict(left_out)}); one must have a ground truth")
    return list(problems.values()), left_out
