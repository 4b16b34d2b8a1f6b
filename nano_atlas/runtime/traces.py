"""Session traces: what happened with each task at run time, one JSON object per line.

A record has an `outcome` (the few numbers that learning, selection and reports need), the `ground_truth`, the eleven keys of ATLAS'
AtlasSessionTrace (whose `load_runtime_traces` reads the file), and what atlas-sdk adds on export:

    plan                     the student's plan or, in the lane paired, one step: the approach it stated
    steps                    one step; all attempts are in its metadata.attempt_history
    session_reward           the teaching reward; null, not zero, where nobody could score
    trajectory_events        who spoke in which order, tokens each; the teacher's whole completions
    learning_history         what was known about the teaching strategies when this one was chosen
    adaptive_summary         the lane and why it was chosen, the strategy, and which attempt was returned
    teacher_learning         the sentences of the skills that the teacher was given

A failed session is recorded too, with `status: failed`. It is done again at the next start, and never selected.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nano_atlas.errors import UserError
from nano_atlas.runs import Journal, read_jsonl
from nano_atlas.runtime.lanes import Session

Trace = dict[str, Any]


@dataclass
class Outcome:
    """The few numbers of a session that the runtime keeps in memory. Scores (0 to 1) are None where nobody could say."""

    session_id: str
    learning_key: str = ""
    lane: str = ""
    strategy: str = ""
    status: str = "succeeded"  # "succeeded" | "failed"
    review: str = "approved"  # as recorded; a later review may have changed it
    created_at: str = ""  # ISO 8601
    returned_attempt: str = ""  # kind of the trial: "alone" | "guided" | "coached"
    reward: float | None = None
    baseline: float | None = None  # score of the student alone
    guided: float | None = None  # with help; that of the student alone where the teacher gave none
    returned: float | None = None
    disagreement: float = 0.0  # largest standard error of a judged score
    audited_gain: float | None = None  # returned minus baseline, judged again
    is_leak: bool = False
    is_malformed: bool = False
    is_truncated: bool = False  # an answer or a teaching ran into its length limit
    tokens: dict[str, int] = field(default_factory=dict)  # generated, by actor
    prompt_tokens: dict[str, int] = field(default_factory=dict)  # read, by actor
    matched: list[str] = field(default_factory=list)  # ids of skills whose cue applied
    skills: list[str] = field(default_factory=list)  # ids of skills that were used
    learned: list[dict] = field(default_factory=list)

    @property
    def gain(self) -> float | None:
        return None if self.guided is None or self.baseline is None else self.guided - self.baseline


# ------------------------------------------------------------------------------------------------------------- writing


COPIED = "learning_key lane created_at reward audited_gain is_leak is_malformed matched skills".split()


def session_record(
    session: Session, *, review: str, metadata: Trace, learning_history: Trace
) -> tuple[Outcome, Trace]:
    """The outcome of a finished session, and its trace.

    metadata: what else session_metadata should hold; learning_history: as of the choice of the strategy.
    """
    outcome = _outcome(session, review)
    reward = _reward(session, outcome)
    chosen = session.trials[session.chosen] if session.trials else None
    text, is_valid = (chosen.text, chosen.verdict.is_valid) if chosen else ("", None)
    final_answer = chosen.answer if chosen and chosen.answer is not None else text
    plan = session.plan or [{"id": 1, "description": session.approach, "depends_on": []}]
    guidance = session.teachings[-1] if session.teachings else None
    confidence = session.choice.get("confidence")
    read, generated = sum(outcome.prompt_tokens.values()), sum(outcome.tokens.values())
    usage = {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}
    step = {
        "step_id": 1,
        "description": session.approach,
        "trace": text,
        "output": final_answer,
        "reward": reward,
        "validation": {"valid": is_valid, "guidance": guidance},
        "attempts": len(session.trials),
        "guidance": session.teachings,
        "metadata": {"attempt_history": [asdict(trial) for trial in session.trials]},
    }
    return outcome, {
        "outcome": asdict(outcome),
        "task": session.task.question,
        "ground_truth": session.task.answer,
        "final_answer": final_answer,
        "plan": {"steps": plan, "execution_mode": "single_shot"},
        "steps": [step],
        "session_metadata": {
            "session_id": session.id,
            "task_id": session.task.id,
            "learning_key": session.learning_key,
            "status": outcome.status,
            "created_at": session.created_at,
            "token_usage": {**usage, "calls": len(session.events)},
            "ground_truth": session.task.answer,
            "error": session.fault,
            **metadata,
        },
        "session_reward": None if session.reward is None else reward,
        "trajectory_events": session.events,
        "student_learning": None,
        "teacher_learning": "\n".join(session.advice) or None,
        "learning_history": learning_history,
        "adaptive_summary": {
            "adaptive_mode": session.lane,
            "confidence": confidence,
            "mode_history": [{"mode": session.lane, "confidence": confidence}],
            "probe": session.choice,
            "strategy": session.style,
            "returned": outcome.returned_attempt,
        },
        "execution_mode": "single_shot",
        "learning_key": session.learning_key,
        "review_status": review,
        "reward_stats": {"score": session.reward, "score_stddev": outcome.disagreement},
        "reward_summary": {"score": session.reward, "gain": outcome.gain},
    }


def _outcome(session: Session, review: str) -> Outcome:
    read, generated = Counter(), Counter()
    for event in session.events:
        read[event["actor"]] += event.get("prompt_tokens", 0)
        generated[event["actor"]] += event["tokens"]
    outcome = Outcome(
        session_id=session.id,
        strategy=session.style,
        status="failed" if session.fault else "succeeded",
        review=review,
        disagreement=max((trial.verdict.deviation for trial in session.trials), default=0.0),
        is_truncated=any(event.get("is_truncated", False) for event in session.events),
        tokens=dict(generated),
        prompt_tokens=dict(read),
        learned=session.learned,
        **{name: getattr(session, name) for name in COPIED},
    )
    if session.trials:
        alone, chosen = session.trials[0], session.trials[session.chosen]
        outcome.baseline, outcome.returned = alone.verdict.score, chosen.verdict.score
        outcome.returned_attempt = chosen.kind
        if session.lane != "auto" and not session.fault:
            outcome.guided = (session.helped or alone).verdict.score
    return outcome


def _reward(session: Session, outcome: Outcome) -> Trace:
    """As AtlasRewardBreakdown. The judges are those of the best answer with help, or of the only answer."""
    judges, rationale = [], session.fault
    if session.trials:
        verdict = (session.helped or session.trials[0]).verdict
        said = {"identifier": verdict.by, "score": verdict.score, "rationale": verdict.rationale}
        judges = verdict.judges or ([said] if verdict.score is not None else [])
        rationale = rationale or ("the lane has no teacher" if session.lane == "auto" else verdict.rationale)
    if session.reward is None:
        return {"score": None, "judges": judges, "rationale": f"no reward: {rationale}", "raw": {}}
    rationale = f"score {outcome.baseline:.3g} alone, {outcome.guided:.3g} with help"
    raw = {"alone": outcome.baseline, "with_help": outcome.guided}
    return {"score": session.reward, "judges": judges, "rationale": rationale, "raw": raw}


# ------------------------------------------------------------------------------------------------------------- reading


def past_outcomes(journal: Journal) -> Iterator[Outcome]:
    """Of all sessions in the runtime's own trace file, in the order written."""
    for number, trace in journal.records():
        yield outcome_of(trace, f"{journal.path}:{number}")


def read_traces(path: Path | str) -> Iterator[tuple[Outcome, Trace]]:
    """The records of a trace file, ours or atlas-sdk's. Raises UserError naming file and line."""
    for number, trace in read_jsonl(path, is_journal=True):
        yield outcome_of(trace, f"{path}:{number}"), trace


def outcome_of(trace: Trace, where: str) -> Outcome:
    """The outcome of one of our records, or what a record of atlas-sdk says of it. Raises UserError."""
    if not isinstance(trace.get("task"), str):
        raise UserError(f"{where}: not a session trace; its field 'task' must hold the question")
    if "outcome" in trace:
        try:
            return Outcome(**trace["outcome"])
        except TypeError as error:
            cause = f"{where}: not a trace of this version ({error})"
            raise UserError(f"{cause}; choose another --out, or use --restart") from None
    metadata, reward = trace.get("session_metadata") or {}, trace.get("session_reward")
    return Outcome(
        session_id=str(metadata.get("session_id") or where),
        learning_key=str(metadata.get("learning_key") or ""),
        lane=str((trace.get("adaptive_summary") or {}).get("adaptive_mode") or ""),
        created_at=str(metadata.get("created_at") or ""),
        status=str(metadata.get("status") or "succeeded"),
        review=str(trace.get("review_status") or "approved"),
        reward=reward.get("score") if isinstance(reward, dict) else reward,
        disagreement=float((trace.get("reward_stats") or {}).get("score_stddev") or 0.0),
    )
