"""Session traces: what happened with each task at run time, one JSON object per line.

A record has an `outcome` (the few numbers that learning, selection and reports need), the `ground_truth`, the eleven keys of ATLAS'
AtlasSessionTrace (whose `load_runtime_traces` reads the file), and what atlas-sdk adds on export. `steps` holds one step, with all
attempts in its metadata; `session_reward` is null, not zero, where nobody could score; `trajectory_events` say who spoke in which
order. A failed session is recorded with `status: failed`; it is done again at the next start, and never selected.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from nano_atlas.errors import UserError
from nano_atlas.runs import Journal, read_jsonl
from nano_atlas.runtime.guard import Trial
from nano_atlas.runtime.judges import Verdict
from nano_atlas.runtime.lanes import Session
from nano_atlas.runtime.learning import Outcome

Trace = dict[str, Any]
NO_TRIAL = Trial("", "", None, 0, False, Verdict(None, "nobody"))  # of a session that failed before its first


def session_record(
    session: Session, *, review: str, metadata: Trace, learning_history: Trace
) -> tuple[Outcome, Trace]:
    """The outcome of a finished session, and its trace.

    metadata: what else session_metadata should hold; learning_history: as of the choice of the strategy.
    """
    task, trials, chosen = session.task, session.trials or [NO_TRIAL], session.chosen
    alone, returned, helped = trials[0], trials[chosen], session.helped or trials[0]
    read, generated = Counter(), Counter()
    for event in session.events:
        read[event["actor"]] += event.get("prompt_tokens", 0)
        generated[event["actor"]] += event["tokens"]
    session.status, session.review = "failed" if session.fault else "succeeded", review
    session.baseline, session.returned, session.returned_attempt = alone.score, returned.score, returned.kind
    session.guided = None if session.fault or session.lane == "auto" else helped.score
    session.disagreement = max(trial.verdict.deviation for trial in trials)
    session.is_truncated = any(event.get("is_truncated", False) for event in session.events)
    session.tokens, session.prompt_tokens = dict(generated), dict(read)
    outcome = Outcome(**{f.name: getattr(session, f.name) for f in fields(Outcome)})
    answer = returned.text if returned.answer is None else returned.answer
    plan = session.plan or [{"id": 1, "description": session.approach, "depends_on": []}]
    reward, guidance = _reward(session, alone, helped), next(reversed(session.teachings), None)
    step = {"step_id": 1, "description": session.approach, "trace": returned.text, "output": answer}
    step |= {"reward": reward, "validation": {"valid": returned.verdict.is_valid, "guidance": guidance}}
    history = {"attempt_history": [asdict(trial) for trial in session.trials]}
    step |= {"attempts": len(session.trials), "guidance": session.teachings, "metadata": history}
    about = {"session_id": session.session_id, "task_id": task.id, "learning_key": session.learning_key}
    usage = {**outcome.usage, "calls": len(session.events)}
    about |= {"status": outcome.status, "created_at": session.created_at, "token_usage": usage}
    about |= {"ground_truth": task.answer, "error": session.fault, **metadata}
    mode = {"mode": session.lane, "confidence": session.choice.get("confidence")}
    adaptive = {"adaptive_mode": session.lane, "confidence": mode["confidence"], "mode_history": [mode]}
    adaptive |= {"probe": session.choice, "strategy": session.strategy, "returned": returned.kind}
    return outcome, {
        "outcome": asdict(outcome),
        "task": task.question,
        "ground_truth": task.answer,
        "final_answer": answer,
        "plan": {"steps": plan, "execution_mode": "single_shot"},
        "steps": [step],
        "session_metadata": about,
        "session_reward": None if session.reward is None else reward,
        "trajectory_events": session.events,
        "student_learning": None,
        "teacher_learning": "\n".join(session.advice) or None,
        "learning_history": learning_history,
        "adaptive_summary": adaptive,
        "execution_mode": "single_shot",
        "learning_key": session.learning_key,
        "review_status": review,
        "reward_stats": {"score": session.reward, "score_stddev": outcome.disagreement},
        "reward_summary": {"score": session.reward, "gain": outcome.gain},
    }


def _reward(session: Session, alone: Trial, helped: Trial) -> Trace:
    """As AtlasRewardBreakdown. The judges are those of the best answer with help, or of the only answer."""
    by, score = helped.verdict, session.reward
    judges = by.judges
    if not judges and by.score is not None:
        judges = [{"identifier": by.by, "score": by.score, "rationale": by.rationale}]
    if score is None:
        cause = session.fault or ("the lane has no teacher" if session.lane == "auto" else by.rationale)
        return {"score": None, "judges": judges, "rationale": f"no reward: {cause}", "raw": {}}
    rationale = f"score {alone.score:.3g} alone, {helped.score:.3g} with help"
    raw = {"alone": alone.score, "with_help": helped.score}
    return {"score": score, "judges": judges, "rationale": rationale, "raw": raw}


def past_outcomes(journal: Journal) -> Iterator[Outcome]:
    """Of all sessions in the runtime's own trace file, in the order written."""
    return (outcome_of(trace, f"{journal.path}:{number}") for number, trace in journal.records())


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
    sections = ("session_metadata", "adaptive_summary", "reward_stats")
    told, adaptive, stats = (trace.get(section) or {} for section in sections)
    told = {**told, "lane": adaptive.get("adaptive_mode"), "review": trace.get("review_status")}
    names = ("session_id", "learning_key", "created_at", "status", "lane", "review")
    known = {"session_id": where} | {name: str(told[name]) for name in names if told.get(name)}
    score = trace.get("session_reward")
    score = score.get("score") if isinstance(score, dict) else score
    return Outcome(**known, reward=score, disagreement=float(stats.get("score_stddev") or 0.0))
