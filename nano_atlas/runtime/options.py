"""All options of runtime_loop.py, in the order of its parts."""

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from nano_atlas import world
from nano_atlas.config import option
from nano_atlas.data import STATUSES
from nano_atlas.episode import EpisodeConfig
from nano_atlas.errors import UserError
from nano_atlas.protocol import TEACHING_STYLES

LANES = ("auto", "paired", "coach")
KEY_VARIABLE = "NANO_ATLAS_API_KEY"  # environment variable with the key of the endpoint's clients
STYLES = tuple(TEACHING_STYLES)
SELECTION = ("min_reward", "min_gain", "min_signal", "only", "since", "review_status")


def moment(text: str) -> datetime | None:
    """An ISO 8601 time, in UTC unless it has an offset; None if it is not valid."""
    with suppress(ValueError):
        time = datetime.fromisoformat(text.strip())
        return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


@dataclass(frozen=True)
class RunConfig:
    preset: str = option("nano", "", group="run")
    tasks: Path | None = option(None, "JSONL of tasks (none: the nano world's)", resumable=True)
    student: str | None = option(None, "DIRECTORY, URL#MODEL, post+URL#PATH or function MODULE:NAME")
    teacher: str | None = option(None, "the same for the teacher; it may change between runs", resumable=True)
    out: Path = option(Path("runs/runtime"), "output directory: traces and metrics", resumable=True)
    restart: bool = option(False, "start over; earlier traces are kept under another name", resumable=True)
    skip_bad: bool = option(False, "skip malformed lines of --tasks, and show them", resumable=True)
    domain: str = option("math", "domain of the nano-world tasks", list(world.DOMAINS), resumable=True)
    count: int = option(200, "number of nano-world tasks", above=0, resumable=True)
    batch: int = option(32, "tasks per batch; strategies and skills change between batches", above=0)
    workers: int = option(16, "most parallel calls to endpoints and functions", above=0, resumable=True)
    timeout: float = option(600.0, "seconds until such a call counts as failed", above=0, resumable=True)
    device: str = option("cpu", "device of the checkpoints, such as cpu or cuda")
    dtype: str = option("float32", "precision of the checkpoints", ("float32", "bfloat16"))


@dataclass(frozen=True)
class Config(EpisodeConfig, RunConfig):
    judge: str | None = option(None, "scores without gold: checkpoint, URL or function", group="judges")
    large_judge: str | None = option(None, "a larger model that decides where judgements differ")
    audit: float = option(0.2, "share of the judged answers to judge again", at_least=0, at_most=1)

    lane: str = option("adaptive", "adaptive: by the student's record", ("adaptive", *LANES), group="lanes")
    retries: int = option(0, "more attempts while no answer is valid", at_least=0)
    strategies: tuple[str, ...] = option(STYLES, "teaching strategies to choose from", STYLES)
    skill_writer: str | None = option(None, "checkpoint, URL or function that writes skills")
    seed: int = option(0, "random seed")

    deploy: Path | None = option(None, "YAML that names student and teacher", group="service", resumable=True)
    serve: str | None = option(None, f"[HOST:]PORT of an endpoint; HOST needs {KEY_VARIABLE}", resumable=True)

    rounds: int = option(0, "rounds of: run, train, promote", group="rounds", at_least=0, resumable=True)
    held_out: Path | None = option(None, "JSONL of problems that decide on promotion", resumable=True)
    train_options: str = option("", "more options for train_grpo.py, in quotes", resumable=True)

    min_reward: float | None = option(None, "least reward of a session", group="selection")
    min_gain: float | None = option(None, "least gain: score with help minus alone (-1 to 1)")
    min_signal: float | None = option(None, "least |gain|, or disagreement of the judges")
    only: tuple[str, ...] = option((), "only these lanes or kinds of task (learning keys)")
    since: str = option("", "only sessions from START, or START..END (ISO 8601, UTC)")
    review_status: tuple[str, ...] = option(("approved",), "only sessions with these review states", STATUSES)

    export: Path | None = option(None, "file for the selected traces", group="review", resumable=True)
    show: str | None = option(None, "list the sessions of a status", (*STATUSES, "failed"), resumable=True)
    approve: tuple[str, ...] = option((), "approve these sessions (ids or their beginnings)", resumable=True)
    quarantine: tuple[str, ...] = option((), "keep these sessions out of training", resumable=True)
    note: str = option("", "the reason, for --approve and --quarantine", resumable=True)
    require_approval: bool = option(False, "sessions start as pending: not exported before --approve")

    @property
    def address(self) -> tuple[str, str]:
        host, _, port = (self.serve or "0").rpartition(":")
        return host or "127.0.0.1", port

    @property
    def interval(self) -> tuple[datetime | None, datetime | None]:
        """Start and end of --since; None if one is not valid."""
        start, _, end = self.since.partition("..")
        return moment(start or "0001-01-01"), moment(end or "9999-12-31")

    def check(self) -> None:
        if self.large_judge and not self.judge:
            raise UserError("--large-judge needs --judge")
        if not self.strategies:
            raise UserError("--strategies needs at least one of " + ", ".join(STYLES))
        host, port = self.address
        if not port.isdecimal() or int(port) > 65535:
            raise UserError(f"--serve {self.serve}: the port must be a number from 0 (any) to 65535")
        if host not in ("127.0.0.1", "localhost", "[::1]") and not os.environ.get(KEY_VARIABLE):
            raise UserError(f"--serve {self.serve}: set {KEY_VARIABLE} to a key that clients must send")
        if None in self.interval or self.interval[0] >= self.interval[1]:
            raise UserError(f"--since {self.since} must be START or START..END, such as 2026-01-31T12:00")
        actions = ("restart", "export", "show", "approve", "quarantine", "rounds")
        wanted = [name for name in actions if getattr(self, name)] + ["serve"] * (self.serve is not None)
        if self.rounds and not self.held_out and (self.tasks or self.preset != "nano"):
            raise UserError("--rounds with --tasks needs --held-out FILE, problems that decide on promotion")
        if self.rounds and self.require_approval and "pending" not in self.review_status:
            raise UserError("--require-approval leaves --rounds no trace; add --review-status pending")
        if len(wanted) > 1:
            raise UserError(f"--{' and --'.join(wanted)} cannot be combined; use one of them")
        is_selecting = any(getattr(self, name) != getattr(Config, name) for name in SELECTION)
        if is_selecting and wanted not in (["export"], ["rounds"]):
            raise UserError("options that select traces need --export or --rounds; add one of them")
        needed = ["student", "teacher"] + ["tasks"] * (self.preset != "nano" and self.serve is None)
        missing = [f"--{name}" for name in needed if getattr(self, name) is None]
        if missing and not {"export", "show", "approve", "quarantine"} & set(wanted):
            raise UserError(f"--preset {self.preset} needs {' '.join(missing)}")
