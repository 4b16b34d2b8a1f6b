"""Shared by all benchmarks: arms (ways to answer the same tasks), their order, and results on disk."""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Self

import torch

from nano_atlas import checkpoint, protocol
from nano_atlas.answers import answer_key, reveals_answer
from nano_atlas.config import derive_seed, option
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt, EpisodeConfig
from nano_atlas.errors import UserError
from nano_atlas.functions import verifier_seat
from nano_atlas.runs import Journal, checkpoint_digest, keep_to, read_jsonl, refuse_foreign
from nano_atlas.seats import Fault, Reply, Seat, is_url, open_seat
from nano_atlas.terminal import Bar
from nano_atlas.text import masked

STUDENT = "student"  # all other arms are compared with this one
CONTROLS = SHUFFLED, UNTRAINED, TWO_VOTES, SAME_BUDGET = "shuffled", "untrained", "two-votes", "same-budget"
ALONE = STUDENT, TWO_VOTES, SAME_BUDGET  # the arms without a teaching
RESULT_FILES = "tasks.jsonl", "run.json", "results.json", "tables.md", "tau2-*.json"
Key = tuple[str, str, str, int]  # of a result: arm, domain, id, sample
Jobs = Sequence[tuple[str, Problem]]  # (arm, task to answer)
Seats = dict[str, Seat]  # "student" and "teacher" (the student itself in arms without a teacher)


@dataclass(frozen=True)
class ArmsConfig:
    student: str | None = option(None, "checkpoint directory, or URL or URL#MODEL of a server")
    teacher: tuple[str, ...] = option((), "NAME=DIRECTORY or NAME=URL; the last one is tested")
    out: Path = option(Path("runs/eval"), "output directory", resumable=True)
    control: tuple[str, ...] = option(CONTROLS, "control arms", (*CONTROLS, "none"))
    limit: int | None = option(None, "tasks per domain; of a file the first ones (none: all)", at_least=1)
    seed: int = option(0, "random seed: tasks, sampling, shuffling, bootstrap")

    temperature: float = option(0.0, "of student and teachers (0: greedy)", group="sampling", at_least=0)
    top_p: float = option(1.0, "nucleus sampling of student and teachers", above=0, at_most=1)
    probe_tokens: int = option(500, "longest first approach (tokens; 0: none)", at_least=0)
    teaching_tokens: int = option(4096, "longest reply of the teacher, with thinking (tokens)", at_least=1)
    answer_tokens: int = option(4096, "longest answer of the student (tokens)", at_least=1)

    answer_format: str = "solution"  # an option only in eval.Config, as the next
    verifier: str = "exact"

    device: str = option("cpu", "device of the checkpoints, such as cpu or cuda", group="run")
    dtype: str = option("float32", "precision of the checkpoints", ("float32", "bfloat16"))
    tables: bool = option(False, "only print the tables of --out", resumable=True)
    restart: bool = option(False, "delete the results in --out, and start over", resumable=True)

    def check(self) -> None:
        if {STUDENT, *CONTROLS} & set(self.teachers) or len(self.teachers) < len(self.teacher):
            what = f"--teacher {' '.join(self.teacher)}: give each a different name, NAME=PATH"
            raise UserError(f"{what}, but not the name of an arm: {', '.join((STUDENT, *CONTROLS))}")

    @property
    def teachers(self) -> dict[str, str]:
        """Directory or URL of each teacher by name (default: the last part of the path)."""
        parts = [re.fullmatch(r"(?:([\w.-]+)=)?(.*)", spec).groups() for spec in self.teacher]
        return {name or masked(spec).rstrip("/").rpartition("/")[2]: spec for name, spec in parts}

    @property
    def last(self) -> str:
        """The teacher that the controls use."""
        return next(reversed(self.teachers), "")

    @property
    def arms(self) -> list[str]:
        """All arms to run. Without a teacher: only explicit --control arms that need none."""
        controls = [arm for arm in self.control if arm != "none"]
        if not self.teacher:
            is_asked = self.control != type(self).control
            controls = [arm for arm in controls if is_asked and arm not in (SHUFFLED, SAME_BUDGET)]
        return list(dict.fromkeys([STUDENT, *self.teachers, *controls]))

    @property
    def episode(self) -> EpisodeConfig:
        lengths = self.probe_tokens, self.teaching_tokens, self.answer_tokens
        temperatures = self.temperature, self.temperature
        return EpisodeConfig(*lengths, temperatures, self.answer_format, self.verifier, self.top_p)

    def open(self, spec: str) -> Seat:
        return open_seat(spec, device=self.device, dtype=getattr(torch, self.dtype))


@dataclass(frozen=True)
class TaskResult:
    """One answer of the student: a line of tasks.jsonl. Lengths in generated tokens."""

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
    record: dict | None = None  # the benchmark's own record: τ²-bench's SimulationRun
    question: str | None = None

    @property
    def key(self) -> Key:
        return self.arm, self.domain, self.id, self.sample

    def taught(self, reply: Reply, **changes) -> Self:
        teaching = protocol.parse_teaching(reply.text)
        is_leak = bool(self.gold and teaching) and reveals_answer(teaching, self.gold)
        said = {"teacher_text": reply.text, "teacher_tokens": reply.tokens, "teaching": teaching}
        return replace(self, **said, is_teacher_truncated=reply.is_truncated, is_leak=is_leak, **changes)

    @property
    def told(self) -> Reply:
        """The reply given to `taught`."""
        return Reply(self.teacher_text, self.teacher_tokens, self.is_teacher_truncated)

    @property
    def all_tokens(self) -> int:
        """Generated by student and teacher; the arm "student" counts no probe."""
        return self.attempt.tokens + (self.approach_tokens + self.teacher_tokens) * (self.arm != STUDENT)


def read_results(path: Path) -> dict[Key, TaskResult]:
    """The results in a tasks.jsonl. Raises UserError for a damaged line."""
    lines = read_jsonl(path, is_journal=True) if path.exists() else ()
    found = (TaskResult(**record | {"attempt": Attempt(**record["attempt"])}) for _, record in lines)
    try:
        return {result.key: result for result in found}
    except (LookupError, TypeError) as error:
        raise UserError(f"{path}: not of this version ({error}); use --restart, or another --out") from None


class TaskLog(Journal):
    """The append-only tasks.jsonl and its results."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.results = read_results(path)
        self.faults: dict[str, list[str]] = {}  # by arm: why tasks failed; the next start retries them

    def append(self, results: Iterable[TaskResult]) -> None:
        new = {result.key: result for result in results if result.key not in self.results}
        super().append(vars(result) | {"attempt": vars(result.attempt)} for result in new.values())
        self.results |= new

    def get(self, arm: str, problem: Problem, needed: int = 0) -> list[TaskResult]:
        """The samples of a task, from the first to a missing one. Raises Fault if they are fewer than `needed`."""
        keys = ((arm, problem.domain, problem.id, sample) for sample in count())
        found = [self.results[key] for key in takewhile(self.results.__contains__, keys)]
        if len(found) < needed:
            raise Fault(f"{problem.id}: no answer of {arm} yet")
        return found


def fill(log: TaskLog, config: ArmsConfig, problems: Sequence[Problem], answer: Callable) -> None:
    """Appends missing results, which answer(jobs, seats) yields in lists. Opens one teacher at a time."""
    seats: Seats = verifier_seat(config.episode.verifier)
    missing = {(arm, p): config.samples - len(log.get(arm, p)) for p in problems for arm in config.arms}
    with Bar(desc="evaluation", total=sum(missing.values()), unit="answer") as progress:
        others = [SHUFFLED, UNTRAINED, SAME_BUDGET]
        for stage in [STUDENT, TWO_VOTES], *([name] for name in config.teachers), others:
            seats.pop("teacher", None)  # free it before the next is opened
            if jobs := [job for job, count in missing.items() if job[0] in stage and count]:
                seats[STUDENT] = seats.get(STUDENT) or config.open(config.student)
                teacher = config.teachers.get(stage[0])
                seats["teacher"] = config.open(teacher) if teacher else seats[STUDENT]
                for results in answer(jobs, seats):
                    log.append(results)
                    progress.step(len(results))
                if log.faults and not log.results:
                    first, *more = sum(log.faults.values(), [])
                    raise UserError(f"all {len(more) + 1} answers failed; the first error: {first}")


def start_or_continue(config: ArmsConfig, contents: dict[str, str]) -> None:
    """Writes run.json (`keep_to`); --restart deletes old results. Raises UserError for changes or foreign files."""
    out, specs = config.out, {STUDENT: config.student, **config.teachers}
    paths = {name: Path(spec) for name, spec in specs.items() if not is_url(spec)}
    for path in paths.values():
        checkpoint.read_config(path)  # raises UserError with a remedy
    contents = {f"checkpoint {name}": checkpoint_digest(path) for name, path in paths.items()} | contents
    refuse_foreign(out / "run.json", RESULT_FILES)
    for file in [file for pattern in RESULT_FILES for file in out.glob(pattern)] if config.restart else ():
        file.unlink()
    keep_to(config, out / "run.json", contents, RESULT_FILES)


def derange(problems: Sequence[Problem], seed: int) -> dict[str, Problem]:
    """By problem id: another problem as donor, the neighbour in a shuffled circle, so each is donor once."""
    if len(problems) < 2:
        raise UserError("--control shuffled needs at least 2 tasks in each domain; raise --limit or drop it")
    circle = random.Random(derive_seed(seed, "shuffled")).sample(list(problems), len(problems))
    return {problem.id: circle[index - 1] for index, problem in enumerate(circle)}


def majority(attempts: Sequence[Attempt]) -> Attempt:
    """The first with the most frequent answer, with the tokens of all (Wang et al. 2022, arXiv:2203.11171)."""
    voters = [attempt for attempt in attempts if attempt.answer is not None]
    votes = Counter(answer_key(voter.answer) for voter in voters)
    first = max(voters, key=lambda voter: votes[answer_key(voter.answer)], default=attempts[0])
    tokens, is_truncated = sum(a.tokens for a in attempts), any(a.is_truncated for a in attempts)
    return replace(first, tokens=tokens, is_truncated=is_truncated)
