"""The results of an evaluation on disk: tasks.jsonl with a line per answer, and run.json, which says what they are results of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano_atlas.config import refuse_changes, to_json
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt
from nano_atlas.errors import UserError
from nano_atlas.runs import Journal, read_json, read_jsonl, write_json

STUDENT = "student"  # the arm that all others are compared with
RESULT_FILES = "tasks.jsonl", "run.json", "results.json", "tables.md", "tau2-*.json"
Key = tuple[str, str, str, int]  # arm, domain, id, sample


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
        guidance = 0 if self.arm == STUDENT else self.approach_tokens + self.teacher_tokens
        return self.attempt.tokens + guidance


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

    def lacks(self, arm: str, problems: Iterable[Problem], samples: int) -> bool:
        return any(len(self.get(arm, problem)) < samples for problem in problems)

    def get(self, arm: str, problem: Problem) -> list[TaskResult]:
        """The samples of a task that are there, from the first on."""
        found: list[TaskResult] = []
        while (key := (arm, problem.domain, problem.id, len(found))) in self.results:
            found.append(self.results[key])
        return found


def start_or_continue(config: Any, contents: Mapping[str, str]) -> None:
    """Write run.json into config.out: the options, and digests of tasks, packages and checkpoints, because a path may hold new ones.

    Raises UserError naming what differs from the run whose results lie there.
    """
    out, contents = Path(config.out), config.contents() | contents
    if config.restart:
        for file in [file for pattern in RESULT_FILES for file in out.glob(pattern)]:
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
