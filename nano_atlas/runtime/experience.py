"""What the runtime learns from session to session, and how a session starts from it and ends in a trace."""

from collections import defaultdict, deque
from dataclasses import dataclass
from datetime import datetime, timezone

from nano_atlas.config import option
from nano_atlas.data import Problem, derive_seed
from nano_atlas.protocol import TEACHING_STYLES
from nano_atlas.runtime.lanes import LaneConfig, Session
from nano_atlas.runtime.playbook import Playbook
from nano_atlas.runtime.review import WINDOW, Drift
from nano_atlas.runtime.strategies import Strategies
from nano_atlas.runtime.traces import Outcome, session_outcome, trace_of

STYLES = tuple(TEACHING_STYLES)


@dataclass(frozen=True)
class ExperienceConfig(LaneConfig):
    student: str | None = option(
        None, "the student: directory, URL, post+URL#path or module:function", group="run"
    )
    teacher: str | None = option(
        None, "the same of the teacher; without one the nano world's, after GRPO if that was done"
    )
    seed: int = option(0, "of every random choice")
    strategies: tuple[str, ...] = option(STYLES, "teaching strategies to choose among", STYLES)
    require_approval: bool = option(
        False, "record sessions as pending, so that none is exported before --approve"
    )
    student_price: tuple[float, float] | None = option(
        None, "price of a million tokens read, and of a million generated", resumable=True
    )
    teacher_price: tuple[float, float] | None = option(None, "the same of the teacher", resumable=True)

    @property
    def prices(self) -> dict[str, tuple[float, float]]:
        named = {"student": self.student_price, "teacher": self.teacher_price}
        return {actor: price for actor, price in named.items() if price is not None}


class Experience:
    """What earlier sessions taught: a function of their outcomes, in the order of learning."""

    def __init__(self, config: ExperienceConfig):
        self.strategies = Strategies(config.strategies)
        self.playbook = Playbook(config)
        self.drift = Drift()
        self.records: dict[str, deque[float]] = defaultdict(
            lambda: deque(maxlen=WINDOW)
        )  # scores of the student alone

    def learn(self, *outcomes: Outcome) -> None:
        """Of sessions that ran side by side."""
        outcomes = [outcome for outcome in outcomes if outcome.status == "succeeded"]
        for outcome in outcomes:
            key = outcome.learning_key
            self.strategies.learn(key, outcome.strategy, outcome.reward)
            self.playbook.learn(outcome.session_id, outcome.matched, outcome.skills, outcome.reward)
            self.drift.add(key, outcome.reward)
            if outcome.baseline is not None:
                self.records[key].append(outcome.baseline)
        for outcome in outcomes:
            self.playbook.add(outcome.learned)


def new_session(name: str, task: Problem, experience: Experience, config: ExperienceConfig) -> Session:
    """A session that starts from what is known about this kind of task."""
    key = task.domain or "general"
    style = experience.strategies.choose(key, derive_seed(config.seed, "strategy", name))
    playbook = experience.playbook if config.skill_writer else None
    return Session(name, task, config.seed, style, learning_key=key, created_at=now(), playbook=playbook)


def record(session: Session, experience: Experience, config: ExperienceConfig) -> tuple[Outcome, dict]:
    """The outcome of a finished session, and its trace."""
    drift = experience.drift.assess(session.learning_key, session.reward)
    is_pending = config.require_approval or (drift is not None and drift["drift_alert"])
    outcome = session_outcome(session, "pending" if is_pending else "approved", config.prices)
    metadata = {
        "completed_at": now(),
        "student": config.student,
        "teacher": config.teacher,
        "seed": config.seed,
    }
    return outcome, trace_of(
        session, outcome, metadata, experience.strategies.history(session.learning_key), drift
    )


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
