"""All options of runtime_loop.py, in the order of its parts."""

import os
from dataclasses import dataclass
from datetime import datetime
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


@dataclass(frozen=True)
class RunConfig:
    preset: str = option("nano", "", group="run")
    tasks: Path | None = option(None, "JSONL of tasks (none: of the nano world)", resumable=True)
    student: str | None = option(None, "DIR, URL#model, post+URL#path or module:function (it may use tools)")
    teacher: str | None = option(None, "the same of the teacher")
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
    held_out: Path | None = option(None, "JSONL of problems that decide (none: nano world)", resumable=True)
    train_options: str = option("", "further options of train_grpo.py, as one text", resumable=True)

    min_reward: float | None = option(None, "least session reward of a selected trace", group="selection")
    min_gain: float | None = option(None, "least gain: score with help minus alone (-1 to 1)")
    min_signal: float | None = option(None, "least |gain|, or disagreement of the judges")
    only: tuple[str, ...] = option((), "only traces of these lanes or kinds of task (learning keys)")
    since: str = option("", "only sessions begun since START, or in START..END (ISO 8601, UTC)")
    review_status: tuple[str, ...] = option(("approved",), "only traces with these review states", STATUSES)

    export: Path | None = option(None, "file for the selected traces", group="review", resumable=True)
    show: str | None = option(None, "list the sessions of this status", STATUSES, resumable=True)
    approve: tuple[str, ...] = option((), "ids (or their beginnings) of sessions to approve", resumable=True)
    quarantine: tuple[str, ...] = option((), "ids of those that must not train a teacher", resumable=True)
    note: str = option("", "why, for --approve and --quarantine", resumable=True)
    require_approval: bool = option(False, "record sessions as pending: none is exported before --approve")

    @property
    def address(self) -> tuple[str, str]:
        host, _, port = (self.serve or "0").rpartition(":")
        return host or "127.0.0.1", port

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
        for time in filter(None, self.since.split("..")):
            try:
                datetime.fromisoformat(time)
            except ValueError:
                raise UserError(f"--since {self.since}: {time} is no time such as 2026-01-31T12:00") from None
        actions = ("restart", "export", "show", "approve", "quarantine", "rounds")
        wanted = [name for name in actions if getattr(self, name)] + ["serve"] * (self.serve is not None)
        if len(wanted) > 1:
            raise UserError(f"--{' and --'.join(wanted)} are different things to do; use one of them")
        is_selecting = any(getattr(self, name) != getattr(Config, name) for name in SELECTION)
        if is_selecting and wanted not in (["export"], ["rounds"]):
            raise UserError("the options that select traces are for --export and --rounds; add one of them")
        needed = ["student", "teacher"] + ["tasks"] * (self.preset != "nano" and self.serve is None)
        missing = [f"--{name}" for name in needed if getattr(self, name) is None]
        if missing and not {"export", "show", "approve", "quarantine"} & set(wanted):
            raise UserError(f"--preset {self.preset} needs {' '.join(missing)}")
