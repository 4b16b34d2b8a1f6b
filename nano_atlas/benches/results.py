"""The results of an evaluation on disk: one line of tasks.jsonl per answer, and run.json, which says what they are results of."""

import fcntl
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano_atlas.config import refuse_changes, to_json
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json, replace_text

STUDENT = "student"  # the arm that all others are compared with
RESULT_FILES = (
    "tasks.jsonl",
    "run.json",
    "results.json",
    "tables.md",
    "floors.json",
    "tau2-*.json",
)  # the last two are τ²-bench's


@dataclass(frozen=True)
class TaskResult:
    """One answer of the student: a line of tasks.jsonl. Lengths in generated tokens. Alone, it has nothing of a teacher."""

    arm: str
    domain: str
    id: str
    sample: int  # from 0
    gold: str
    attempt: Attempt
    approach: str
    approach_tokens: int
    teacher_text: str = ""
    teacher_tokens: int = 0
    is_teacher_truncated: bool = False
    teaching: str | None = None  # None: no well-formed teaching, and the student got nothing
    is_leak: bool = False
    record: dict | None = None  # what a benchmark itself records of the answer: τ²-bench its SimulationRun

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.arm, self.domain, self.id, self.sample

    @property
    def all_tokens(self) -> int:
        """Of everyone involved; the student alone needs no probe."""
        return self.attempt.tokens + (
            0 if self.arm == STUDENT else self.approach_tokens + self.teacher_tokens
        )


def read_results(path: Path) -> tuple[dict[tuple[str, str, str, int], TaskResult], int]:
    """The results in a tasks.jsonl by their key, and its length in bytes without a torn last line.

    Raises UserError for a line that is damaged or there twice.
    """
    content = path.read_bytes() if path.exists() else b""
    intact = content.rfind(b"\n") + 1
    results: dict[tuple[str, str, str, int], TaskResult] = {}
    for number, line in enumerate(content[:intact].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            result = TaskResult(**{**record, "attempt": Attempt(**record["attempt"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}:{number}: not a task result ({error}); delete the line, or start over with --restart"
            ) from None
        if result.key in results:
            raise UserError(
                f"{path}:{number}: {' '.join(map(str, result.key))} is there twice; delete one of the two lines"
            )
        results[result.key] = result
    return results, intact


class TaskLog:
    """The append-only tasks.jsonl with its only writer, and what it holds. A process that dies leaves at most one torn line."""

    def __init__(self, path: Path):
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{path}: another process is writing it; wait for its end, or choose another --out"
            ) from None
        self.results, intact = read_results(path)
        self._file.truncate(intact)

    def append(self, results: Iterable[TaskResult]) -> None:
        """Write those that are not there yet, a flushed line each."""
        for result in results:
            if result.key not in self.results:
                self._file.write(
                    json.dumps({**vars(result), "attempt": vars(result.attempt)}, ensure_ascii=False).encode()
                    + b"\n"
                )
                self._file.flush()
                self.results[result.key] = result

    def has(self, arm: str, problems: Sequence[Problem], samples: int) -> bool:
        keys = (
            (arm, problem.domain, problem.id, sample) for problem in problems for sample in range(samples)
        )
        return all(key in self.results for key in keys)

    def get(self, arm: str, problem: Problem, samples: int) -> list[TaskResult]:
        return [self.results[arm, problem.domain, problem.id, sample] for sample in range(samples)]

    def close(self) -> None:
        self._file.close()


def start_or_continue(config: Any, contents: Mapping[str, str]) -> None:
    """Write run.json into config.out, after comparing with the one there, if any: the options, and digests of what paths and packages hold
    (a path may hold new contents). Raises UserError naming what differs from the run whose results lie there.
    """
    out: Path = config.out
    out.mkdir(parents=True, exist_ok=True)
    if config.restart:
        for file in [file for pattern in RESULT_FILES for file in out.glob(pattern)]:
            file.unlink()
    saved = read_json(out / "run.json")
    if not saved and (out / "tasks.jsonl").exists():
        raise UserError(
            f"{out}/tasks.jsonl lies there without its run.json; choose another --out, or use --restart"
        )
    if saved and not config.resume:
        raise UserError(
            f"{out} holds an earlier run, which --no-resume does not continue; choose another --out, or use --restart"
        )
    if saved:
        refuse_changes(config, saved["config"], str(out))
        changed = [name for name, value in contents.items() if saved["contents"].get(name) != value]
        if changed:
            raise UserError(
                f"{out} holds results of other contents than now: {', '.join(changed)}. "
                "Choose another --out, or start over with --restart"
            )
    replace_text(
        out / "run.json", json.dumps({"config": to_json(config), "contents": contents}, indent=2) + "\n"
    )
