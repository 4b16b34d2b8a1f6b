"""What all benchmarks share: arms (ways of answering the same tasks), their options, and results on disk (tasks.jsonl, run.json)."""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nano_atlas.answers import answer_key
from nano_atlas.checkpoint import is_checkpoint
from nano_atlas.config import derive_seed, option, refuse_changes, to_json
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt, EpisodeConfig
from nano_atlas.errors import UserError
from nano_atlas.runs import Journal, checkpoint_digest, read_json, read_jsonl, write_json
from nano_atlas.seats import Seat, is_url, open_seat

STUDENT = "student"  # the arm that all others are compared with
CONTROLS = SHUFFLED, UNTRAINED, TWO_VOTES, SAME_BUDGET = "shuffled", "untrained", "two-votes", "same-budget"
ALONE = STUDENT, TWO_VOTES, SAME_BUDGET  # the arms without a teaching
NAMES = {  # in the tables; {last}: the last teacher
    STUDENT: "student alone", SHUFFLED: "control: shuffled {last}", UNTRAINED: "control: untrained",
    TWO_VOTES: "control: vote of 2", SAME_BUDGET: "control: vote, tokens of {last}",
}  # fmt: skip
RESULT_FILES = "tasks.jsonl", "run.json", "results.json", "tables.md", "tau2-*.json"
Key = tuple[str, str, str, int]  # of a result: arm, domain, id, sample


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
        if set(NAMES) & set(self.teachers) or len(self.teachers) < len(self.teacher):
            what = f"--teacher {' '.join(self.teacher)}: each needs a name of its own, NAME=PATH"
            raise UserError(f"{what}, other than {STUDENT} and those of the controls")

    @property
    def teachers(self) -> dict[str, str]:
        """Directory or URL of each teacher by name; without NAME= the last part of the path is the name."""
        parts = [re.fullmatch(r"(?:([\w.-]+)=)?(.*)", spec).groups() for spec in self.teacher]
        return {name or spec.rstrip("/").rpartition("/")[2]: spec for name, spec in parts}

    @property
    def controls(self) -> Sequence[str]:
        """Without a teacher those of a teacher are left out."""
        return [arm for arm in self.control if self.teacher or arm not in (SHUFFLED, SAME_BUDGET)]

    @property
    def arms(self) -> list[str]:
        return [arm for arm in dict.fromkeys([STUDENT, *self.teachers, *self.controls]) if arm != "none"]

    @property
    def names(self) -> dict[str, str]:
        """What an arm is called in the tables."""
        last = next(reversed(self.teachers), "")
        return {name: name for name in self.teachers} | {arm: NAMES[arm].format(last=last) for arm in NAMES}

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


@dataclass(frozen=True)
class TaskResult:
    """One answer of the student: a line of tasks.jsonl. Lengths in generated tokens. Alone, it has nothing of a teacher."""

    arm: str
    domain: str
    id: str
    sample: int  # from 0
    gold: str
    attempt: Attempt
    approach: str = ""
    approach_tokens: int = 0
    teacher_text: str = ""
    teacher_tokens: int = 0
    is_teacher_truncated: bool = False
    teaching: str | None = None  # None: no well-formed teaching; the attempt is the student's own
    is_leak: bool = False
    record: dict | None = None  # what a benchmark itself records of the answer: τ²-bench its SimulationRun

    @property
    def key(self) -> Key:
        return self.arm, self.domain, self.id, self.sample

    @property
    def all_tokens(self) -> int:
        """Of everyone involved; the student alone needs no probe."""
        return self.attempt.tokens + (self.approach_tokens + self.teacher_tokens) * (self.arm != STUDENT)


def read_results(path: Path) -> dict[Key, TaskResult]:
    """The results in a tasks.jsonl by their key. Raises UserError for a damaged line."""
    results: dict[Key, TaskResult] = {}
    has_lines = path.exists() and path.stat().st_size
    for number, record in read_jsonl(path, is_journal=True) if has_lines else ():
        try:
            result = TaskResult(**record | {"attempt": Attempt(**record["attempt"])})
        except (TypeError, KeyError) as error:
            raise UserError(f"{path}:{number}: not a task result ({error}); delete the line") from None
        results[result.key] = result
    return results


class TaskLog(Journal):
    """The append-only tasks.jsonl with its only writer, and the results that it holds."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.results = read_results(path)

    def append(self, results: Iterable[TaskResult]) -> None:
        """Write those that are not there yet; they are on the disk when this returns."""
        new = {result.key: result for result in results if result.key not in self.results}
        super().append(vars(result) | {"attempt": vars(result.attempt)} for result in new.values())
        self.results |= new

    def get(self, arm: str, problem: Problem) -> list[TaskResult]:
        """The samples of a task that are there, from the first on."""
        found: list[TaskResult] = []
        while (key := (arm, problem.domain, problem.id, len(found))) in self.results:
            found.append(self.results[key])
        return found


def start_or_continue(config: ArmsConfig, contents: Mapping[str, str]) -> None:
    """Write run.json: the options, and digests of checkpoints, tasks and packages, because a path may come to hold other ones.

    Raises UserError naming what differs from the run whose results lie there.
    """
    out, contents = config.out, config.contents() | contents
    for pattern in RESULT_FILES if config.restart else ():
        for file in list(out.glob(pattern)):
            file.unlink()
    saved = read_json(out / "run.json")
    if saved:
        refuse_changes(config, saved["config"], str(out))
        changed = [name for name, value in contents.items() if saved["contents"].get(name) != value]
        if changed:
            what = f"{out} holds results of other contents than now: {', '.join(changed)}"
            raise UserError(f"{what}; choose another --out, or start over with --restart")
    elif (out / "tasks.jsonl").exists():
        raise UserError(f"{out}/tasks.jsonl has no run.json beside it; choose another --out, or --restart")
    write_json(out / "run.json", {"config": to_json(config), "contents": contents})


def derange(problems: Sequence[Problem], seed: int) -> dict[str, Problem]:
    """For each problem (by id) another one as donor: its neighbour in a shuffled circle, so that each gives exactly once."""
    if len(problems) < 2:
        raise UserError("--control shuffled needs at least 2 tasks in each domain; raise --limit or drop it")
    circle = random.Random(derive_seed(seed, "shuffled")).sample(list(problems), len(problems))
    return {problem.id: circle[index - 1] for index, problem in enumerate(circle)}


def majority(attempts: Sequence[Attempt]) -> Attempt:
    """The first attempt with the most frequent answer, at the price of all: self-consistency (Wang et al. 2022, arXiv:2203.11171).

    Attempts without an answer have no vote, and of equally frequent answers the one given first wins.
    """
    voters = [attempt for attempt in attempts if attempt.answer is not None]
    votes = Counter(answer_key(voter.answer) for voter in voters)
    first = max(voters, key=lambda voter: votes[answer_key(voter.answer)], default=attempts[0])
    tokens, is_truncated = sum(a.tokens for a in attempts), any(a.is_truncated for a in attempts)
    return replace(first, tokens=tokens, is_truncated=is_truncated)
