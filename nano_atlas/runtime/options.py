"""All options of runtime_loop.py, in the order of its parts."""

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from nano_atlas import world
from nano_atlas.config import option
from nano_atlas.episode import EpisodeConfig
from nano_atlas.errors import UserError
from nano_atlas.protocol import TEACHING_STYLES

LANES = ("auto", "paired", "coach")
STATUSES = ("pending", "approved", "quarantined")  # of a session's review
KEY_VARIABLE = "NANO_ATLAS_API_KEY"  # environment variable with the key of the endpoint's clients
STYLES = tuple(TEACHING_STYLES)
SELECTION = ("min_reward", "min_gain", "min_signal", "only", "since", "review_status")


def moment(text: str) -> datetime | None:
    """A time in any form of ISO 8601, without an offset one of UTC; None where it cannot be read."""
    with suppress(ValueError):
        time = datetime.fromisoformat(text.strip())
        return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


@dataclass(frozen=True)
class RunConfig:
    preset: str = option("nano", "", group="run")
    tasks: Path | None = option(None, "JSONL of tasks (none: of the nano world)", resumable=True)
    student: str | None = option(None, "DIR, URL#model, post+URL#path or module:function (it may use tools)")
    teacher: str | None = option(None, "the same of the teacher; another may take over", resumable=True)
    out: Path = option(Path("runs/runtime"), "directory of traces.jsonl and metrics.jsonl", resumable=True)
    restart: bool = option(False, "start over; earlier traces are kept under another name", resumable=True)
    skip_bad: bool = option(False, "leave out malformed lines of --tasks, and show them", resumable=True)
    domain: str = option("math", "kind of nano-world tasks", list(world.DOMAINS), resumable=True)
    count: int = option(200, "number of nano-world tasks", above=0, resumable=True)
    batch: int = option(32, "tasks worked on together, between two updates of strategies and skills", above=0)
    workers: int = option(16, "most calls to endpoints and agents at a time", above=0, resumable=True)
    timeout: float = option(600.0, "seconds after which such a call has failed", above=0, resumable=True)
    device: str = option("cpu", "where checkpoints run, such as cpu or cuda")
    dtype: str = option("float32", "of checkpoints", ("float32", "bfloat16"))


@dataclass(frozen=True)
class Config(EpisodeConfig, RunConfig):
    evaluator: str | None = option(None, "function MODULE:NAME that scores from 0 to 1", group="judges")
    judge: str | None = option(None, "checkpoint, URL or agent that judges answers without ground truth")
    large_judge: str | None = option(None, "the same of a larger model that decides where judges disagree")
    audit: float = option(0.2, "share of judged answers with help to judge again", at_least=0, at_most=1)

    lane: str = option("adaptive", "adaptive: by the student's record", ("adaptive", *LANES), group="lanes")
    retries: int = option(0, "further teachings and answers while none is valid", at_least=0)
    strategies: tuple[str, ...] = option(STYLES, "teaching strategies to choose among", STYLES)
    skill_writer: str | None = option(None, "checkpoint, URL or agent that writes skills (none: no skills)")
    seed: int = option(0, "of every random choice")

    deploy: Path | None = option(None, "YAML that names the pair", group="service", resumable=True)
    serve: str | None = option(None, f"[HOST:]PORT of an endpoint; HOST needs {KEY_VARIABLE}", resumable=True)

    rounds: int = option(0, "times to run, train and promote", group="rounds", at_least=0, resumable=True)
    held_out: Path | None = option(None, "JSONL of problems that decide, for --tasks", resumable=True)
    train_options: str = option("", "more options of train_grpo.py, split at spaces", resumable=True)

    min_reward: float | None = option(None, "least session reward of a selected trace", group="selection")
    min_gain: float | None = option(None, "least gain: score with help minus alone (-1 to 1)")
    min_signal: float | None = option(None, "least |gain|, or disagreement of the judges")
    only: tuple[str, ...] = option((), "only traces of these lanes or kinds of task (learning keys)")
    since: str = option("", "only sessions begun since START, or in START..END (ISO 8601; UTC)")
    review_status: tuple[str, ...] = option(("approved",), "only traces with these review states", STATUSES)

    export: Path | None = option(None, "file for the selected traces", group="review", resumable=True)
    show: str | None = option(None, "list the sessions of this status", (*STATUSES, "failed"), resumable=True)
    approve: tuple[str, ...] = option((), "ids (or their beginnings) of sessions to approve", resumable=True)
    quarantine: tuple[str, ...] = option((), "ids of those that must not train a teacher", resumable=True)
    note: str = option("", "why, for --approve and --quarantine", resumable=True)
    require_approval: bool = option(False, "record sessions as pending: none is exported before --approve")

    @property
    def address(self) -> tuple[str, str]:
        host, _, port = (self.serve or "0").rpartition(":")
        return host or "127.0.0.1", port

    @property
    def interval(self) -> tuple[datetime | None, datetime | None]:
        """The two times of --since."""
        start, _, end = self.since.partition("..")
        return moment(start or "0001-01-01"), moment(end or "9999-12-31")

    def check(self) -> None:
        if self.large_judge and not self.judge:
            raise UserError("--large-judge needs --judge")
        if not self.strategies:
            raise UserError("--strategies needs at least one")
        host, port = self.address
        if not port.isdecimal() or int(port) > 65535:
            raise UserError(f"--serve {self.serve}: the port must be a number from 0 (any) to 65535")
        if host not in ("127.0.0.1", "localhost", "[::1]") and not os.environ.get(KEY_VARIABLE):
            raise UserError(f"--serve {self.serve}: set {KEY_VARIABLE} to a key that clients must send")
        if None in self.interval or self.interval[0] >= self.interval[1]:
            raise UserError(f"--since {self.since}: should be START or START..END, such as 2026-01-31T12:00")
        actions = ("restart", "export", "show", "approve", "quarantine", "rounds")
        wanted = [name for name in actions if getattr(self, name)] + ["serve"] * (self.serve is not None)
        if self.rounds and not self.held_out and (self.tasks or self.preset != "nano"):
            raise UserError("--rounds with tasks of yours needs --held-out FILE, the problems that decide")
        if self.rounds and self.require_approval and "pending" not in self.review_status:
            raise UserError("--require-approval leaves --rounds no trace; add --review-status pending")
        if len(wanted) > 1:
            raise UserError(f"--{' and --'.join(wanted)} are different things to do; use one of them")
        is_selecting = any(getattr(self, name) != getattr(Config, name) for name in SELECTION)
        if is_selecting and wanted not in (["export"], ["rounds"]):
            raise UserError("the options that select traces are for --export and --rounds; add one of them")
        needed = ["student", "teacher"] + ["tasks"] * (self.preset != "nano" and self.serve is None)
        missing = [f"--{name}" for name in needed if getattr(self, name) is None]
        if missing and not {"export", "show", "approve", "quarantine"} & set(wanted):
            raise UserError(f"--preset {self.preset} needs {' '.join(missing)}")
