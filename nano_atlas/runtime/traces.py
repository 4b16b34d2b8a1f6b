"""A session with one task, while it runs and on file: a trace, one JSON object per line.

A record has an `outcome` (what learning, selection and reports need), the `ground_truth`, the eleven keys of ATLAS' AtlasSessionTrace
(whose `load_runtime_traces` reads the file), and what atlas-sdk adds on export. `steps` holds one step, with all attempts in its
metadata; `session_reward` is null, not zero, where nobody could score; `trajectory_events` say who spoke in which order. A failed
session has `status: failed`; it is done again at the next start, and never selected.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from nano_atlas import config, data, runs
from nano_atlas.errors import UserError

Trace = dict[str, Any]


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass
class Verdict:
    score: float | None  # 0 to 1; None: nobody could say
    by: str  # "exact" | "python" | "judges" | "nobody"
    is_valid: bool | None = None  # None: not known
    deviation: float = 0.0  # standard error of the score, from the spread of the samples
    helpfulness: float | None = None
    rationale: str = ""
    judges: list[dict[str, Any]] = field(default_factory=list)  # as AtlasJudgeBreakdown


@dataclass
class Trial:
    """One answer of the student, and the verdict on it."""

    kind: str  # "alone" (always the first), "guided" or "coached"
    text: str
    answer: str | None  # what stands in <solution>
    tokens: int
    is_truncated: bool
    verdict: Verdict | None = None  # None: not judged yet

    @property
    def score(self) -> float | None:
        return self.verdict.score


NO_TRIAL = Trial("", "", None, 0, False, Verdict(None, "nobody"))  # of a session that failed before its first


@dataclass
class Outcome:
    """The few numbers of a session that the runtime keeps in memory. Scores (0 to 1) are None where nobody could say."""

    session_id: str
    learning_key: str = ""  # kind of task, by which the runtime learns
    lane: str = ""
    strategy: str = ""  # how the teacher is asked to teach: a key of protocol.TEACHING_STYLES
    status: str = "succeeded"  # "succeeded" | "failed"
    review: str = "approved"  # "approved" | "pending" | "quarantined"
    created_at: str = ""  # ISO 8601
    returned_attempt: str = ""  # kind of the trial
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
    learned: list[dict] = field(default_factory=list)  # skills that it proposed

    @property
    def gain(self) -> float | None:
        return None if self.guided is None or self.baseline is None else self.guided - self.baseline

    @property
    def usage(self) -> dict[str, int]:
        """As OpenAI counts tokens."""
        read, generated = sum(self.prompt_tokens.values()), sum(self.tokens.values())
        return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}


@dataclass(kw_only=True)
class Session(Outcome):
    """One task on its way through a lane (`lanes`), and what has come of it so far."""

    task: data.Problem
    seed: int
    lane: str = "paired"
    strategy: str = "adaptive"
    choice: dict[str, Any] = field(default_factory=dict)  # {mode, confidence, by} of the lane
    history: dict[str, Any] = field(default_factory=dict)  # of the strategies, when this one was chosen
    metadata: dict[str, Any] = field(default_factory=dict)  # what else the trace's session_metadata holds
    experience: Any = None  # learning.Experience, if skills are used
    advice: list[str] = field(default_factory=list)  # sentences of the skills that are used
    approach: str = ""
    plan: list[str] = field(default_factory=list)  # its steps
    teachings: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # who spoke, in which order, tokens each
    chosen: int = 0  # index of the trial that is returned
    fault: str | None = None

    @property
    def guidance(self) -> str:
        return "\n".join(self.teachings)

    @property
    def helped(self) -> Trial | None:
        """The trial that stands for the teaching: the best with help, by score; None where there was none."""
        return max(self.trials[1:], key=lambda trial: trial.score or 0.0, default=None)

    def draw(self, kind: str, *parts: object) -> int:
        """The seed of a call: another one for every call of the session, and the same whatever runs beside it."""
        return config.derive_seed(self.seed, self.session_id, kind, len(self.events))


def session_record(session: Session) -> tuple[Outcome, Trace]:
    task, trials = session.task, session.trials or [NO_TRIAL]
    alone, returned, helped = trials[0], trials[session.chosen], session.helped or trials[0]
    read, generated = Counter(), Counter()
    for event in session.events:
        read[event["actor"]] += event.get("prompt_tokens", 0)
        generated[event["actor"]] += event["tokens"]
    session.status = "failed" if session.fault else "succeeded"
    session.baseline, session.returned, session.returned_attempt = alone.score, returned.score, returned.kind
    session.guided = None if session.fault or session.lane == "auto" else helped.score
    session.disagreement = max(trial.verdict.deviation for trial in trials)
    session.is_truncated = any(event.get("is_truncated", False) for event in session.events)
    session.tokens, session.prompt_tokens = dict(generated), dict(read)
    outcome = Outcome(**{f.name: getattr(session, f.name) for f in fields(Outcome)})

    answer = returned.text if returned.answer is None else returned.answer
    numbered = enumerate(session.plan or [session.approach], start=1)
    plan = [{"id": number, "description": step, "depends_on": []} for number, step in numbered]
    reward, guidance = _reward(session, alone, helped), next(reversed(session.teachings), None)
    step = {"step_id": 1, "description": session.approach, "trace": returned.text, "output": answer}
    step |= {"reward": reward, "validation": {"valid": returned.verdict.is_valid, "guidance": guidance}}
    history = {"attempt_history": [asdict(trial) for trial in session.trials]}
    step |= {"attempts": len(session.trials), "guidance": session.teachings, "metadata": history}
    about = {"session_id": session.session_id, "task_id": task.id, "learning_key": session.learning_key}
    usage = {**outcome.usage, "calls": len(session.events)}
    about |= {"status": outcome.status, "created_at": session.created_at, "token_usage": usage}
    about |= {"ground_truth": task.answer, "error": session.fault, **session.metadata}
    mode = {"mode": session.lane, "confidence": session.choice.get("confidence")}
    adaptive = {"adaptive_mode": session.lane, "confidence": mode["confidence"], "mode_history": [mode]}
    adaptive |= {"probe": session.choice, "strategy": session.strategy, "returned": returned.kind}
    trace = {"outcome": asdict(outcome), "task": task.question, "ground_truth": task.answer}
    trace |= {"final_answer": answer, "plan": {"steps": plan, "execution_mode": "single_shot"}}
    trace |= {"steps": [step], "session_metadata": about}
    trace |= {"session_reward": None if session.reward is None else reward}
    trace |= {"trajectory_events": session.events, "student_learning": None}
    trace |= {"teacher_learning": "\n".join(session.advice) or None, "learning_history": session.history}
    trace |= {"adaptive_summary": adaptive, "execution_mode": "single_shot"}
    trace |= {"learning_key": session.learning_key, "review_status": session.review}
    trace |= {"reward_stats": {"score": session.reward, "score_stddev": outcome.disagreement}}
    return outcome, trace | {"reward_summary": {"score": session.reward, "gain": outcome.gain}}


def _reward(session: Session, alone: Trial, helped: Trial) -> Trace:
    """As AtlasRewardBreakdown. The judges are those of the best answer with help, or of the only answer."""
    by, judges = helped.verdict, helped.verdict.judges
    if not judges and by.score is not None:
        judges = [{"identifier": by.by, "score": by.score, "rationale": by.rationale}]
    if session.reward is None:
        cause = session.fault or ("the lane has no teacher" if session.lane == "auto" else by.rationale)
        return {"score": None, "judges": judges, "rationale": f"no reward: {cause}", "raw": {}}
    rationale = f"score {alone.score:.3g} alone, {helped.score:.3g} with help"
    raw = {"alone": alone.score, "with_help": helped.score}
    return {"score": session.reward, "judges": judges, "rationale": rationale, "raw": raw}


def read_traces(path: Path | str) -> Iterator[tuple[Outcome, Trace]]:
    """The records of a trace file, ours or atlas-sdk's. Raises UserError naming file and line."""
    for number, trace in runs.read_jsonl(path, is_journal=True):
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
