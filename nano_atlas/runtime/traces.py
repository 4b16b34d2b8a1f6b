"""A session with one task, while it runs and as a trace: one JSON object per line (docs/traces.md)."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean
from textwrap import wrap
from typing import Any

from nano_atlas import data, runs
from nano_atlas.config import derive_seed
from nano_atlas.errors import UserError, say
from nano_atlas.runtime.options import LANES, STYLES, Config, moment
from nano_atlas.stats import wilson_interval
from nano_atlas.terminal import WIDTH
from nano_atlas.text import number

Trace = dict[str, Any]
INDENT = {"initial_indent": "  ", "subsequent_indent": " " * 21, "break_on_hyphens": False}
CONFIDENCE = 0.95  # needed to return a judged answer with help; also of the bound on harm


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass
class Verdict:
    score: float | None  # 0 to 1; None: unscored
    by: str  # "exact" | "python" | "judges" | "nobody"; "outage": no reply from verifier or judges
    is_valid: bool | None = None  # None: not known
    deviation: float = 0.0  # standard error of the score, from the spread of the samples
    helpfulness: float | None = None
    rationale: str = ""
    judges: list[dict[str, Any]] = field(default_factory=list)  # as AtlasJudgeBreakdown


@dataclass
class Trial:
    kind: str  # "alone" (always the first), "guided" or "coached"
    text: str
    answer: str | None  # the text in <solution>
    tokens: int
    is_truncated: bool
    verdict: Verdict = field(default_factory=lambda: Verdict(None, "outage", rationale="not judged"))

    @property
    def score(self) -> float | None:
        return self.verdict.score


NO_TRIAL = Trial("", "", None, 0, False, Verdict(None, "nobody"))  # of a session without trials


@dataclass
class Outcome:
    """What the runtime keeps of a session in memory. Scores are from 0 to 1, or None if unscored."""

    session_id: str
    learning_key: str = ""  # kind of task
    lane: str = ""
    strategy: str = ""  # a key of protocol.TEACHING_STYLES
    status: str = "succeeded"  # "succeeded" | "failed"
    review: str = "approved"  # "approved" | "pending" | "quarantined"
    created_at: str = ""  # ISO 8601
    returned_attempt: str = ""  # kind of the trial
    reward: float | None = None
    baseline: float | None = None  # score of the student alone
    guided: float | None = None  # with help; without a well-formed teaching the baseline
    returned: float | None = None
    disagreement: float = 0.0  # largest standard error of a judged score
    audited_gain: float | None = None  # returned minus baseline, judged again
    is_leak: bool = False
    is_malformed: bool = False
    is_truncated: bool = False  # a reply ran into its length limit
    tokens: dict[str, int] = field(default_factory=dict)  # generated, by actor
    prompt_tokens: dict[str, int] = field(default_factory=dict)  # read, by actor
    matched: list[str] = field(default_factory=list)  # ids of skills whose cue applied
    skills: list[str] = field(default_factory=list)  # ids of skills that were used
    learned: list[dict] = field(default_factory=list)  # skills proposed after it
    fault: str | None = None  # why it failed; in the trace: session_metadata.error

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
    """A running session: its task and the results so far."""

    task: data.Problem
    seed: int
    lane: str = "paired"
    strategy: str = "adaptive"
    choice: dict[str, Any] = field(default_factory=dict)  # {mode, confidence, by} of the lane
    history: dict[str, Any] = field(default_factory=dict)  # of the strategies, when this one was chosen
    metadata: dict[str, Any] = field(default_factory=dict)  # more entries of the trace's session_metadata
    experience: Any = None  # learning.Experience, if skills are used
    advice: list[str] = field(default_factory=list)  # sentences of the skills that are used
    approach: str = ""
    plan: list[str] = field(default_factory=list)  # steps
    teachings: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # calls in order, with actor and tokens
    chosen: int = 0  # index of the trial that is returned

    @property
    def guidance(self) -> str:
        return "\n".join(self.teachings)

    @property
    def helped(self) -> Trial | None:
        """The trial with help that has the highest score, or None."""
        return max(self.trials[1:], key=lambda trial: trial.score or 0.0, default=None)

    def draw(self, kind: str, *parts: object) -> int:
        """The seed of the next call: depends only on the session and on its number of calls so far."""
        return derive_seed(self.seed, self.session_id, kind, len(self.events))


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
    numbers = {name: value for name, value in asdict(outcome).items() if name != "fault"}
    trace = {"outcome": numbers, "task": task.question, "ground_truth": task.answer}
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
    """As AtlasRewardBreakdown."""
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
    for line, trace in runs.read_jsonl(path, is_journal=True):
        yield outcome_of(trace, f"{path}:{line}"), trace


def outcome_of(trace: Trace, where: str) -> Outcome:
    """The outcome of a trace, ours or atlas-sdk's. Raises UserError."""
    if not isinstance(trace.get("task"), str):
        raise UserError(f"{where}: not a session trace; its field 'task' must hold the question")
    told, reward = data.section(trace, "outcome", where), trace.get("session_reward")
    about = data.section(trace, "session_metadata", where)
    if not told:
        if isinstance(reward, dict) or str(reward).startswith("{"):
            reward = data.section(trace, "session_reward", where).get("score")
        told = {name: about.get(name) for name in ("session_id", "learning_key", "created_at", "status")}
        told["session_id"] = told["session_id"] or where
        told |= {"reward": reward, "review": trace.get("review_status")}
        told["lane"] = data.section(trace, "adaptive_summary", where).get("adaptive_mode")
        told["disagreement"] = data.section(trace, "reward_stats", where).get("score_stddev")
    try:
        typed = {name: _typed(name, value) for name, value in data.present(told).items()}
        return Outcome(**typed, fault=str(about.get("error") or "") or None)
    except (TypeError, ValueError) as error:
        cause = f"{where}: not a trace of this version ({error})"
        raise UserError(f"{cause}; remove the line, or choose another --out") from None


def _typed(name: str, value: Any) -> Any:
    """Converts a field's value, where numbers may be strings and the reverse. Raises ValueError."""
    kind = type(getattr(Outcome(""), name, value))
    if kind in (float, type(None)):
        return number(value)
    if kind is str and type(value) in (int, float):
        return str(value)
    item = dict if name == "learned" else str
    if not isinstance(value, kind) or (kind is list and not all(isinstance(x, item) for x in value)):
        raise ValueError(f"{name} is {str(value)[:40]!r}")
    return {key: int(number(count)) for key, count in value.items()} if kind is dict else value


METRICS = {  # the value for one session (None: not known), the label in the summary (empty: left out), and a note
    "reward": (lambda o: o.reward, "", ""),
    "baseline_accuracy": (lambda o: o.baseline, "student alone", ""),
    "returned_accuracy": (lambda o: o.returned, "returned", "(the best of all attempts, see judges.py)"),
    "student_accuracy": (lambda o: o.guided, "guided", ""),
    "accuracy_delta": (lambda o: o.gain, "", ""),
    "non_degradation_rate": (lambda o: None if o.gain is None else o.gain >= 0, "not degraded", "(gain {gain} points)"),
    "leak_rate": (lambda o: None if o.reward is None else o.is_leak, "leaks", ""),
    "malformed_rate": (lambda o: o.is_malformed, "without <teaching>", ""),
    "truncated_rate": (lambda o: o.is_truncated, "cut off", "(by a length limit)"),
    "failed_rate": (lambda o: o.status == "failed", "", ""),
}  # fmt: skip


def runtime_metrics(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Averages of the known values (None if there are none); shares of lanes and strategies; token counts."""
    known = {name: [x for o in outcomes if (x := of(o)) is not None] for name, (of, *_) in METRICS.items()}
    tokens = sum((Counter(outcome.tokens) for outcome in outcomes), Counter())
    return {
        **{name: mean(values) if values else None for name, values in known.items()},
        **{f"tokens/{actor}": count for actor, count in sorted(tokens.items())},
        **{f"lane/{lane}": mean(o.lane == lane for o in outcomes) for lane in LANES},
        **{f"strategy/{style}": mean(o.strategy == style for o in outcomes) for style in STYLES},
    }


def summary(outcomes: Sequence[Outcome], out: Path | str = Config.out) -> str:
    m, failed = runtime_metrics(outcomes), [o for o in outcomes if o.status == "failed"]
    lines = [f"{len(outcomes)} tasks, {sum(o.baseline is not None for o in outcomes)} scored"]
    if failed:
        lines[0] += f", {len(failed)} FAILED (the same command tries them again)"
        lines.append(f"  to list them       --out {out} --show failed")
    for reason, count in Counter(" ".join(o.fault.split())[:69] for o in failed).most_common(3):
        lines.append(f"  failed             {count:7d}   {reason}")
    if unscored := sum(o.baseline is None for o in outcomes if o.status == "succeeded"):
        lines.append(f"  without a score    {unscored:7d}   (nobody knows whether help was better or worse)")
    gain = f"{100 * (m['accuracy_delta'] or 0):+.1f}"
    for name, (_, label, note) in METRICS.items():
        if label and m[name] is not None:
            lines.append(f"  {label:<18} {m[name]:7.1%}   {note.format(gain=gain)}".rstrip())
    for style in STYLES:
        if gains := [o.gain for o in outcomes if o.strategy == style and o.gain is not None]:
            points = f"{100 * mean(gains):+.1f} points"
            lines.append(f"  {style + ' teaching':<18} {len(gains):7d}   (gain {points})")
    if audited := [o.audited_gain for o in outcomes if o.audited_gain is not None]:
        worse = sum(gain < 0 for gain in audited)
        bound = wilson_interval(worse, len(audited), 2 * CONFIDENCE - 1)[1]  # one-sided
        lines.append(f"  judged again       {len(audited):7d}   ({worse} worse than the student alone:")
        lines.append(f"{'':31}at most {bound:.1%}, at 95 % confidence, by this judge)")
    if pending := sum(outcome.review == "pending" for outcome in outcomes):
        lines.append(f"  held for review    {pending:7d}   (until --approve or --quarantine)")
        lines.append(f"  to list them       --out {out} --show pending")
    lanes = ", ".join(f"{lane} {m[f'lane/{lane}']:.0%}" for lane in LANES if m[f"lane/{lane}"])
    tokens = ", ".join(f"{name[7:]} {count:,}" for name, count in m.items() if name.startswith("tokens/"))
    lines += [f"  lanes              {lanes}", *wrap(f"tokens generated   {tokens}", WIDTH, **INDENT)]
    return "\n".join([*lines, f"  traces             {out}/traces.jsonl"])


def why_left_out(outcome: Outcome, config: Config) -> str | None:
    """Why the selection leaves a session out; None: it is selected. One without the needed number is left out."""
    (start, end), begun = config.interval, moment(str(outcome.created_at))
    signal = max(abs(outcome.gain or 0.0), outcome.disagreement)
    if outcome.status != "succeeded" or outcome.review not in config.review_status:
        return "session failed" if outcome.status != "succeeded" else f"review {outcome.review[:40]}"
    for name, value in {"reward": outcome.reward, "gain": outcome.gain, "signal": signal}.items():
        least = getattr(config, f"min_{name}")
        if least is not None and (value is None or value < least):
            return f"no {name}" if value is None else f"{name} below {least:g}"
    if config.only and not {outcome.lane, outcome.learning_key} & set(config.only):
        return f"not in --only: {outcome.lane} {outcome.learning_key}"
    return "not in --since" if config.since and (begun is None or not start <= begun < end) else None


def reviewed_traces(path: Path) -> Iterator[tuple[Outcome, Trace]]:
    """All records of a trace file, each with its latest review."""
    decisions = path.with_name("reviews.jsonl")
    decided = runs.read_jsonl(decisions, is_journal=True) if decisions.exists() else ()
    reviews = {str(review.get("session_id")): review for _, review in decided}
    for outcome, trace in read_traces(path):
        if review := reviews.get(outcome.session_id):
            outcome.review = review.get("status", "pending")
            trace |= {"outcome": asdict(outcome), "review_status": outcome.review}
            trace["review_notes"] = review.get("note", "")
        yield outcome, trace


def teachings(path: Path, config: Config) -> Iterable[tuple[str, Trace]]:
    """(name, chat) of each selected session: the teaching that helped. Says what is left out, and why."""
    found: dict[str, Trace | str] = {}  # of a repeated session the latest record counts
    for outcome, trace in reviewed_traces(path):
        name = f"session {outcome.session_id}"
        reason = why_left_out(outcome, config) or ("leak" if outcome.is_leak else None)
        found[name] = reason or data.teaching_of(trace, f"{path}: {name}")
    chats = {name: chat for name, chat in found.items() if isinstance(chat, dict)}
    left_out = data.in_words(Counter(reason for reason in found.values() if isinstance(reason, str)))
    said = f"{path}: {len(chats)} teachings of {len(found)} sessions; left out: {left_out}"
    if not chats:
        raise UserError(f"{said}; lower --min-reward, or runtime_loop.py --approve sessions")
    say(said)
    return chats.items()


def record_reviews(directory: Path, names: tuple[str, ...], status: str, note: str) -> list[str]:
    """Reviews the sessions whose ids begin with `names`. Raises UserError unless each name fits exactly one."""
    known, decided = {outcome.session_id for outcome, _ in read_traces(directory / "traces.jsonl")}, []
    for name in names:
        meant = [session_id for session_id in known if session_id.startswith(name)]
        if len(meant) != 1:
            raise UserError(f"session {name}: {len(meant) or 'no'} sessions have an id that begins with this")
        decided += meant
    about = {"status": status, "note": note, "at": now()}
    with runs.Journal(directory / "reviews.jsonl") as journal:
        journal.append({"session_id": name, **about} for name in decided)
    return decided


def export_traces(source: Path, target: Path, config: Config) -> tuple[int, int]:
    """Writes the selected traces of `source` to `target`, all or nothing -> (number selected, number of all)."""
    if target.exists() and target.samefile(source):
        raise UserError(f"--export {target} is the trace file itself; choose another name")
    found = [(trace, why_left_out(outcome, config)) for outcome, trace in reviewed_traces(source)]
    selected = [trace for trace, reason in found if reason is None]
    if not selected:
        what = f"the options select none of its {len(found)} traces"
        reasons = data.in_words(Counter(reason for _, reason in found))
        raise UserError(f"{source}: {what} (left out: {reasons})")
    for trace in selected:
        if trace.get("review_status", "approved") != "approved":  # selected by --review-status
            trace["is_exported"] = True
    runs.write_jsonl(target, selected)
    return len(selected), len(found)


def show_sessions(directory: Path, status: str) -> Iterator[str]:
    """Lines for each session with this review status, or for "failed" each whose last try failed."""
    latest = {o.session_id: (o, trace) for o, trace in reviewed_traces(directory / "traces.jsonl")}
    for outcome, trace in latest.values():
        if status == (outcome.review if outcome.status == "succeeded" else "failed"):
            reward = "unscored" if outcome.reward is None else f"reward {outcome.reward:+.3f}"
            task = " ".join(trace["task"].split())
            yield f"{outcome.session_id}  {reward}  {outcome.lane}  {task}"[:WIDTH].rstrip()
            yield from wrap(str(outcome.fault or trace.get("review_notes") or ""), WIDTH, **INDENT)
