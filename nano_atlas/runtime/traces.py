"""Session traces: what happened with each task at run time, one JSON object per line, append-only (`journal`).

A record begins with a *head*: its outcome (the few numbers that selection, strategies and review need), the task, and the ground
truth, which together make a training problem; so a reader parses the first few hundred bytes of a line. Its keys are the eleven of ATLAS'
AtlasSessionTrace (whose `load_runtime_traces` reads the file), these, and what atlas-sdk adds on export:

    task, final_answer       the question, and the answer that was returned
    plan                     the student's plan or, in the lane paired, one step that is the approach it stated
    steps                    what was executed; one step outside the lane escalate. Every attempt is in metadata.attempt_history
    session_reward           the teaching reward; null where nobody could score, which is not the same as zero
    trajectory_events        who spoke in which order, tokens each; the teacher's whole completions
    learning_history         what was known about the teaching strategies when this one was chosen
    adaptive_summary         the lane and why it was chosen, the strategy, and which attempt was returned
    student_learning, teacher_learning    null, and the sentences of the skills that the teacher was given

A session whose agent failed is recorded too, with `status: failed`; it is done again when the runtime is started again, and is never
selected.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from nano_atlas.config import option
from nano_atlas.data import Problem
from nano_atlas.errors import UserError
from nano_atlas.runtime.guard import Trial
from nano_atlas.runtime.journal import Journal, read_lines
from nano_atlas.runtime.judges import Verdict
from nano_atlas.runtime.lanes import Session
from nano_atlas.runtime.review import STATUSES

Trace = dict[str, Any]
BODY = b', "final_answer": '  # ends the head of a record; within a JSON text its quotes would be escaped


@dataclass
class Outcome:
    """The few numbers of a session that the runtime keeps in memory. Scores (0 to 1) are None where nobody could say."""

    session_id: str
    learning_key: str = ""
    lane: str = ""
    strategy: str = ""
    status: str = "succeeded"  # "succeeded" | "failed"
    review: str = "approved"  # as recorded; reviews may have changed it since
    created_at: str = ""  # ISO 8601
    returned_attempt: str = ""  # kind of the trial: "alone" | "guided" | "coached" | "stepwise"
    reward: float | None = None
    baseline: float | None = None  # score of the student alone
    guided: float | None = None  # with help; that of the student alone where the teacher gave none
    returned: float | None = None
    disagreement: float = 0.0  # largest standard error of a judged score
    audited_gain: float | None = None  # returned minus baseline, judged anew
    scored_by: str = ""
    is_leak: bool = False
    is_malformed: bool = False
    is_truncated: bool = False  # an answer or a teaching ran into its length limit
    tokens: dict[str, int] = field(default_factory=dict)  # generated, by actor
    prompt_tokens: dict[str, int] = field(default_factory=dict)  # read, by actor
    cost: float | None = None  # in the currency of the prices, where there are any
    matched: list[str] = field(default_factory=list)  # ids of skills, see playbook
    skills: list[str] = field(default_factory=list)
    learned: list[dict] = field(default_factory=list)

    @property
    def gain(self) -> float | None:
        return None if self.guided is None or self.baseline is None else self.guided - self.baseline


DECODER = json.JSONDecoder()


class Head(NamedTuple):
    outcome: Outcome
    task: str
    ground_truth: Any


# ------------------------------------------------------------------------------------------------------------- records


def session_outcome(session: Session, review: str, prices: dict[str, tuple[float, float]]) -> Outcome:
    """prices: of a million tokens read and a million generated, by actor."""
    alone, helped = (session.trials[0], session.helped) if session.trials else (None, None)
    score = alone.verdict.score if alone else None
    guided = None if session.lane == "auto" or session.fault else helped.verdict.score if helped else score
    written, read = Counter(), Counter()
    for event in session.events:
        written[event["actor"]] += event["tokens"]
        read[event["actor"]] += event.get("prompt_tokens", 0)
    cost = (
        sum(prices[a][0] * read[a] + prices[a][1] * written[a] for a in written if a in prices) / 1e6
        if prices
        else None
    )
    return Outcome(
        session_id=session.id,
        learning_key=session.learning_key,
        lane=session.lane,
        strategy=session.style,
        status="failed" if session.fault else "succeeded",
        review=review,
        created_at=session.created_at,
        returned_attempt=session.trials[session.chosen].kind if session.trials else "",
        reward=session.reward,
        baseline=score,
        guided=guided,
        returned=session.trials[session.chosen].verdict.score if session.trials else None,
        disagreement=max((trial.verdict.deviation for trial in session.trials), default=0.0),
        audited_gain=session.audited_gain,
        scored_by=alone.verdict.by if alone else "",
        is_leak=session.is_leak,
        is_malformed=session.is_malformed,
        is_truncated=any(event.get("is_truncated", False) for event in session.events),
        tokens=dict(written),
        prompt_tokens=dict(read),
        cost=cost,
        matched=session.matched,
        skills=session.skills,
        learned=session.learned,
    )


def trace_of(
    session: Session, outcome: Outcome, metadata: Trace, learning_history: Trace, drift: Trace | None = None
) -> Trace:
    """The record of a session. metadata: what else session_metadata should hold; learning_history: as of the choice of strategy."""
    task, trials = session.task, session.trials
    chosen = trials[session.chosen] if trials else None
    final_answer = "" if chosen is None else chosen.text if chosen.answer is None else chosen.answer
    reward = _reward(session, chosen)
    plan = session.plan or [{"id": 1, "description": session.approach, "depends_on": []}]
    steps = [_executed(step) for step in session.steps] or [
        {
            "step_id": 1,
            "description": session.approach,
            "trace": chosen.text if chosen else "",
            "output": final_answer,
            "reward": reward,
            "validation": {
                "valid": chosen.verdict.is_valid if chosen else None,
                "guidance": session.teachings[-1] if session.teachings else None,
            },
            "attempts": len(trials),
            "guidance": session.teachings,
            "depends_on": [],
            "metadata": {},
        }
    ]
    steps[0]["metadata"]["attempt_history"] = [_attempt(trial) for trial in trials]
    mode = "stepwise" if session.steps else "single_shot"
    usage = {
        "prompt_tokens": sum(outcome.prompt_tokens.values()),
        "completion_tokens": sum(outcome.tokens.values()),
        "calls": len(session.events),
        "cost": outcome.cost,
    }
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    choice = {"mode": session.lane, "confidence": session.choice.get("confidence")}
    return {
        "outcome": asdict(outcome),
        "task": task.question,
        "ground_truth": task.answer,
        "final_answer": final_answer,
        "plan": {
            "steps": [{"tool": None, "tool_params": None, **step} for step in plan],
            "execution_mode": mode,
        },
        "steps": steps,
        "session_metadata": {
            "session_id": session.id,
            "task_id": task.id,
            "domain": task.domain,
            "learning_key": session.learning_key,
            "status": outcome.status,
            "created_at": session.created_at,
            **metadata,
            "token_usage": usage,
            "ground_truth": task.answer,
            "drift": drift,
            "error": session.fault,
        },
        "session_reward": reward if session.reward is not None else None,
        "trajectory_events": [
            *session.events,
            {"event": "return", "actor": "runtime", "attempt": outcome.returned_attempt},
        ],
        "student_learning": None,
        "teacher_learning": "\n".join(session.advice) or None,
        "learning_history": learning_history,
        "adaptive_summary": {
            "adaptive_mode": session.lane,
            "mode_history": [choice],
            "confidence": choice["confidence"],
            "probe": session.choice,
            "strategy": session.style,
            "returned": outcome.returned_attempt,
        },
        "execution_mode": mode,
        "learning_key": session.learning_key,
        "review_status": outcome.review,
        "reward_stats": {"score": session.reward, "score_stddev": outcome.disagreement},
        "reward_summary": {
            "score": session.reward,
            "baseline": outcome.baseline,
            "guided": outcome.guided,
            "returned": outcome.returned,
            "gain": outcome.gain,
        },
    }


def _attempt(trial: Trial) -> Trace:
    return {
        "kind": trial.kind,
        "text": trial.text,
        "answer": trial.answer,
        "score": trial.verdict.score,
        "is_valid": trial.verdict.is_valid,
        "rationale": trial.verdict.rationale,
        "tokens": trial.tokens,
        "is_truncated": trial.is_truncated,
    }


def _breakdown(verdict: Verdict) -> list[Trace]:
    """As AtlasJudgeBreakdown."""
    if verdict.judges or verdict.score is None:
        return verdict.judges
    return [{"identifier": verdict.by, "score": verdict.score, "rationale": verdict.rationale}]


def _reward(session: Session, chosen: Trial | None) -> Trace:
    shown = session.helped or chosen
    if session.reward is None:
        reason = session.fault or (
            "the lane has no teacher" if session.lane == "auto" else shown.verdict.rationale
        )
        return {
            "score": None,
            "judges": _breakdown(shown.verdict) if shown else [],
            "rationale": f"no reward: {reason}",
            "raw": {},
        }
    alone = session.trials[0].verdict.score
    told = "" if session.teachings else "; no <teaching> tag, so the student got nothing"
    leak = "; the teaching contains the answer" if session.is_leak else ""
    helped = session.helped.verdict.score if session.helped else alone
    return {
        "score": session.reward,
        "judges": _breakdown(shown.verdict),
        "raw": {"alone": alone, "with_help": helped},
        "rationale": f"score {alone:.3g} alone, {helped:.3g} with help{told}{leak}",
    }


def _executed(step: Trace) -> Trace:
    verdict: Verdict = step["verdict"]
    reward = {"score": verdict.score, "judges": verdict.judges, "rationale": verdict.rationale, "raw": {}}
    return {
        "step_id": step["id"],
        "description": step["description"],
        "trace": step["output"],
        "output": step["output"],
        "reward": reward,
        "validation": {"valid": verdict.is_valid, "guidance": verdict.guidance or None},
        "attempts": step["attempts"],
        "guidance": step["guidance"],
        "depends_on": step["depends_on"],
        "metadata": {},
    }


# ------------------------------------------------------------------------------------------------------------- files


def read_head(line: bytes, where: str) -> Head:
    """The head of one of our records, without looking at the rest of it; or what a record of atlas-sdk says. Raises UserError."""
    end = line.find(BODY) if line.startswith(b'{"outcome": ') else -1
    if end < 0:
        return _foreign_head(parse_trace(line, where), where)
    try:
        head, _ = DECODER.raw_decode(
            line[:end].decode() + "}"
        )  # json.loads would look for the encoding first
        return Head(Outcome(**head["outcome"]), head["task"], head["ground_truth"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: not a trace of this runtime ({error})") from None


def _foreign_head(trace: Trace, where: str) -> Head:
    """In files of atlas-sdk the ground truth, where somebody put one, is in the metadata."""
    metadata, stats, reward = (
        trace.get("session_metadata") or {},
        trace.get("reward_stats") or {},
        trace.get("session_reward"),
    )
    outcome = Outcome(
        session_id=str(metadata.get("session_id") or where),
        learning_key=str(metadata.get("learning_key") or ""),
        lane=str((trace.get("adaptive_summary") or {}).get("adaptive_mode") or ""),
        created_at=str(metadata.get("created_at") or ""),
        status=str(metadata.get("status") or "succeeded"),
        review=str(trace.get("review_status") or "approved"),
        reward=reward.get("score") if isinstance(reward, dict) else reward,
        disagreement=float(stats.get("score_stddev") or 0.0),
    )
    places = (trace.get("ground_truth"), metadata.get("ground_truth"))
    return Head(outcome, trace["task"], next((value for value in places if value is not None), None))


def parse_trace(line: bytes, where: str) -> Trace:
    """Raises UserError for what is not a session trace."""
    try:
        trace = json.loads(line)
    except ValueError as error:  # includes UnicodeDecodeError
        raise UserError(f"{where}: not JSON ({error})") from None
    if not isinstance(trace, dict) or not isinstance(trace.get("task"), str):
        raise UserError(
            f"{where}: not a session trace; it must be an object whose field 'task' holds the question"
        )
    return trace


def read_traces(path: Path | str) -> Iterator[Trace]:
    """The records of a trace file, ours or atlas-sdk's. Raises UserError naming file and line."""
    for number, line in read_lines(path):
        yield parse_trace(line, f"{path}:{number}")


class TraceWriter(Journal):
    """The journal of a runtime's sessions."""

    def outcomes(self) -> Iterator[Outcome]:
        """Of everything in the file, in the order written."""
        if self.path.stat().st_size:
            for number, line in read_lines(self.path):
                if BODY not in line:
                    raise UserError(
                        f"{self.path}:{number}: not a trace of this runtime; choose another --out, or use --restart"
                    )
                yield read_head(line, f"{self.path}:{number}").outcome


@dataclass(frozen=True)
class Selection:
    """Which traces are worth training on. One without the number in question is left out: nobody knows whether it qualifies."""

    min_reward: float | None = option(
        None, "least session reward of a selected trace", group="selection of traces, for --export"
    )
    min_gain: float | None = option(
        None, "least gain, score with help minus alone (-1 to 1), of a selected trace"
    )
    min_signal: float | None = option(
        None, "least |gain|, or disagreement of judges: something changed, or nobody is sure"
    )
    only_lane: tuple[str, ...] = option((), "only traces of these lanes")
    only_key: tuple[str, ...] = option((), "only traces with these learning keys (domains)")
    since: str | None = option(None, "only sessions begun at or after this ISO 8601 date or time, UTC")
    until: str | None = option(None, "only sessions begun before this ISO 8601 date or time, UTC")
    review_status: tuple[str, ...] = option(("approved",), "only traces with these review states", STATUSES)

    def check(self) -> None:
        for name in ("since", "until"):
            try:
                datetime.fromisoformat(getattr(self, name) or "2000-01-01")
            except ValueError:
                raise UserError(
                    f"--{name} {getattr(self, name)}: not a date or time such as 2026-01-31 or 2026-01-31T12:00"
                ) from None

    def takes(self, outcome: Outcome, review_status: str | None = None) -> bool:
        """review_status: where it has changed since the session was recorded."""
        gain = outcome.gain
        signal = (
            None if gain is None and not outcome.disagreement else max(abs(gain or 0.0), outcome.disagreement)
        )
        bounds = ((outcome.reward, self.min_reward), (gain, self.min_gain), (signal, self.min_signal))
        return (
            outcome.status == "succeeded"
            and (review_status or outcome.review) in self.review_status
            and all(least is None or (value is not None and value >= least) for value, least in bounds)
            and (not self.only_lane or outcome.lane in self.only_lane)
            and (not self.only_key or outcome.learning_key in self.only_key)
            and (self.since is None or outcome.created_at >= self.since)
            and (self.until is None or "" < outcome.created_at < self.until)
        )

    @classmethod
    def is_default(cls, config: "Selection") -> bool:
        return all(getattr(config, f.name) == f.default for f in fields(cls))


def problems_from_traces(
    path: Path | str, selection: Selection = Selection()
) -> tuple[list[Problem], Counter[str]]:
    """Training problems from traces (task -> question, ground truth -> answer); also counts, by reason, the traces left out.

    A question that comes back with the same ground truth (exports of several runs) becomes one problem. Raises UserError if no
    problem is left.
    """
    problems: dict[tuple[str, str], Problem] = {}
    left_out: Counter[str] = Counter()
    for number, line in read_lines(path):
        outcome, task, gold = read_head(line, f"{path}:{number}")
        if not selection.takes(outcome):
            left_out["not selected"] += 1
        elif gold is None or not str(gold).strip():
            left_out["no ground truth"] += 1
        elif (task, str(gold)) in problems:
            left_out["the same task again"] += 1
        else:
            problems[task, str(gold)] = Problem(outcome.session_id, task, str(gold), outcome.learning_key)
    if not problems:
        raise UserError(
            f"{path}: no trace here makes a training problem ({dict(left_out)}); one must have a ground truth"
        )
    return list(problems.values()), left_out
