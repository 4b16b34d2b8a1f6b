"""The arms of an evaluation: ways of answering the same tasks, and the options that all benchmarks of eval.py share."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nano_atlas.answers import answer_key
from nano_atlas.benches.results import STUDENT
from nano_atlas.checkpoint import is_checkpoint
from nano_atlas.config import derive_seed, option
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt, EpisodeConfig
from nano_atlas.errors import UserError
from nano_atlas.runs import checkpoint_digest
from nano_atlas.seats import Seat, is_url, open_seat

CONTROLS = SHUFFLED, UNTRAINED, TWO_VOTES, SAME_BUDGET = "shuffled", "untrained", "two-votes", "same-budget"
NAMES = {  # in the tables; {last}: the last teacher
    STUDENT: "student alone",
    SHUFFLED: "control: shuffled {last}",
    UNTRAINED: "control: untrained",
    TWO_VOTES: "control: vote of 2",
    SAME_BUDGET: "control: vote, tokens of {last}",
}


@dataclass(frozen=True)
class ArmsConfig:
    """The seats of an evaluation, where its results go, and how the seats are sampled."""

    student: str | None = option(None, "checkpoint directory, or URL or URL#MODEL of a server")
    teacher: tuple[str, ...] = option((), "NAME=DIRECTORY or NAME=URL; the last is compared with the others")
    out: Path = option(Path("runs/eval"), "directory of the results", resumable=True)
    control: tuple[str, ...] = option(CONTROLS, "control arms", (*CONTROLS, "none"))
    limit: int | None = option(None, "tasks per domain; of a file the first ones (none: all)", at_least=1)
    seed: int = option(0, "of task choice, sampling, shuffling and bootstrap")

    temperature: float = option(0.0, "of student and teachers (0: greedy)", group="sampling", at_least=0)
    top_p: float = option(1.0, "nucleus mass of student and teachers", above=0, at_most=1)
    probe_tokens: int = option(500, "longest student approach (tokens)", at_least=1)
    teaching_tokens: int = option(4096, "longest teacher completion, thinking included (tokens)", at_least=1)
    answer_tokens: int = option(4096, "longest student answer or message (tokens)", at_least=1)

    device: str = option("cpu", "where checkpoints run, such as cpu or cuda", group="run")
    dtype: str = option("float32", "of checkpoints", ("float32", "bfloat16"))
    tables: bool = option(False, "only print the tables of --out, also of an unfinished run", resumable=True)
    restart: bool = option(False, "start over; discards what --out holds", resumable=True)

    def check_arms(self) -> None:
        needy = {SHUFFLED, SAME_BUDGET} & set(self.arms)
        if needy and not self.teacher and not self.tables:
            raise UserError(f"--control {min(needy)} needs a --teacher, which it is the control of")
        if set(NAMES) & set(self.teachers) or len(self.teachers) < len(self.teacher):
            what = f"--teacher {' '.join(self.teacher)}: each needs a name of its own, NAME=PATH"
            raise UserError(f"{what}, other than {STUDENT} and those of the controls")

    @property
    def teachers(self) -> dict[str, str]:
        """Directory or URL of each teacher by name; without NAME= the last part of the path is the name."""
        parts = [re.fullmatch(r"(?:([\w.-]+)=)?(.*)", spec).groups() for spec in self.teacher]
        return {name or spec.rstrip("/").rpartition("/")[2]: spec for name, spec in parts}

    @property
    def controls(self) -> list[str]:
        return [control for control in dict.fromkeys(self.control) if control != "none"]

    @property
    def arms(self) -> list[str]:
        return [STUDENT, *self.teachers, *self.controls]

    @property
    def names(self) -> dict[str, str]:
        """What an arm is called in the tables."""
        last = "".join(list(self.teachers)[-1:])
        return {name: name for name in self.teachers} | {arm: n.format(last=last) for arm, n in NAMES.items()}

    @property
    def episode(self) -> EpisodeConfig:
        lengths = self.probe_tokens, self.teaching_tokens, self.answer_tokens
        return EpisodeConfig(*lengths, temperature=(self.temperature, self.temperature), top_p=self.top_p)

    def open(self, spec: str) -> Seat:
        return open_seat(spec, device=self.device, dtype=getattr(torch, self.dtype))

    def contents(self) -> dict[str, str]:
        """Digests of the checkpoints of all seats, by what messages call them. Raises UserError where there is none."""
        seats = {STUDENT: self.student, **self.teachers}
        paths = {name: Path(spec) for name, spec in seats.items() if not is_url(spec)}
        for path in paths.values():
            if not is_checkpoint(path):
                raise UserError(
                    f"{path}: no checkpoint; train_sft.py and train_grpo.py make a preset's teachers"
                )
        return {f"checkpoint {name}": checkpoint_digest(path) for name, path in paths.items()}


def derange(problems: Sequence[Problem], seed: int) -> dict[str, Problem]:
    """For each problem (by id) another one as donor: its neighbour in a shuffled circle, so that each gives exactly once."""
    if len(problems) < 2:
        raise UserError("--control shuffled needs at least 2 tasks in each domain; raise --limit or drop it")
    circle = random.Random(derive_seed(seed, "shuffled")).sample(list(problems), len(problems))
    return {problem.id: circle[index - 1] for index, problem in enumerate(circle)}


def is_taught(arm: str) -> bool:
    return arm not in (STUDENT, TWO_VOTES, SAME_BUDGET)


def majority(attempts: Sequence[Attempt]) -> Attempt:
    """The first attempt with the most frequent answer, at the price of all: self-consistency (Wang et al. 2022, arXiv:2203.11171).

    Attempts without an answer have no vote, and of equally frequent answers the one given first wins.
    """
    keys = [None if attempt.answer is None else answer_key(attempt.answer) for attempt in attempts]
    votes = Counter(key for key in keys if key is not None)
    first = keys.index(votes.most_common(1)[0][0]) if votes else 0  # of equals the one counted first
    tokens, is_truncated = sum(a.tokens for a in attempts), any(a.is_truncated for a in attempts)
    return replace(attempts[first], tokens=tokens, is_truncated=is_truncated)
