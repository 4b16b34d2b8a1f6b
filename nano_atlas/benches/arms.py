"""What the benchmarks of eval.py have in common: the arms that they compare, their options, and what becomes of the results."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nano_atlas.benches.results import STUDENT, read_results
from nano_atlas.benches.scores import Report, make_report
from nano_atlas.checkpoint import is_checkpoint
from nano_atlas.config import option
from nano_atlas.data import Problem, derive_seed
from nano_atlas.episode import EpisodeConfig
from nano_atlas.errors import UserError
from nano_atlas.runs import checkpoint_digest, read_json, replace_text
from nano_atlas.seats import Seat, is_url, open_seat

CONTROLS = SHUFFLED, UNTRAINED, TWO_VOTES, SAME_BUDGET = "shuffled", "untrained", "two-votes", "same-budget"


@dataclass(frozen=True)
class ArmsConfig:
    """The seats of an evaluation, how they are sampled, and where its results go."""

    student: str | None = option(
        None, "checkpoint directory, or URL of an OpenAI-compatible server", group="who is evaluated"
    )
    teacher: tuple[str, ...] = option(
        (), "one or more NAME=DIRECTORY or NAME=URL; the last is compared with each earlier one"
    )
    student_model: str | None = option(None, "model name at the student's URL (none: the first it serves)")
    teacher_model: str | None = option(None, "model name at the teachers' URLs (none: the first each serves)")
    limit: int | None = option(None, "tasks per domain; of a file the first ones (none: all of them)")

    temperature: float = option(0.0, "of student and teachers (0: greedy)", group="sampling")
    top_p: float = option(1.0, "nucleus mass of student and teachers")
    probe_tokens: int = option(500, "longest student approach (tokens)")
    teaching_tokens: int = option(4096, "longest teacher completion, thinking included (tokens)")
    answer_tokens: int = option(4096, "longest student answer (tokens); in a dialogue, longest message")

    device: str = option("cpu", "where checkpoints run, such as cpu or cuda", group="run")
    dtype: str = option("float32", "of checkpoints", ("float32", "bfloat16"))
    tables: bool = option(False, "only print the tables of --out, also of an unfinished run", resumable=True)
    resume: bool = option(
        True, "continue what --out holds of an earlier run; --no-resume refuses to", resumable=True
    )
    restart: bool = option(False, "start over; discards what --out holds", resumable=True)

    def check_arms(self) -> None:
        for name in ("limit", "probe_tokens", "teaching_tokens", "answer_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("--temperature must be at least 0, and --top-p above 0 and at most 1")
        if self.tables and self.restart:
            raise UserError("--tables shows what --restart discards; use one of them")
        if "none" in self.control and len(self.control) > 1:
            raise UserError("--control none excludes the others")
        for control in {SHUFFLED, SAME_BUDGET} & set(self.arms):
            if not self.teacher and not self.tables:
                raise UserError(f"--control {control} needs a --teacher, which it is the control of")
        taken = {STUDENT, *CONTROLS} & set(self.teachers)
        if taken or len(self.teachers) < len(self.teacher):
            raise UserError(
                f"--teacher {' '.join(self.teacher)}: each needs a name of its own, NAME=PATH, "
                f"other than {STUDENT} and those of the controls"
            )

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
        names = {
            SHUFFLED: f"{SHUFFLED} {last}",
            UNTRAINED: UNTRAINED,
            TWO_VOTES: "vote of 2",
            SAME_BUDGET: f"vote, tokens of {last}",
        }
        return {STUDENT: "student alone"} | {arm: f"control: {name}" for arm, name in names.items()}

    @property
    def episode(self) -> EpisodeConfig:
        temperature = self.temperature
        return EpisodeConfig(
            self.probe_tokens, self.teaching_tokens, self.answer_tokens, temperature, temperature, self.top_p
        )

    def open(self, spec: str, model: str | None) -> Seat:
        return open_seat(spec, model=model, device=self.device, dtype=getattr(torch, self.dtype))

    def contents(self) -> dict[str, str]:
        """Digests of the checkpoints of all seats, by what they are called in messages."""
        seats = {STUDENT: self.student, **self.teachers}
        return {
            f"checkpoint {name}": checkpoint_digest(Path(spec))
            for name, spec in seats.items()
            if not is_url(spec)
        }


def derange(problems: Sequence[Problem], seed: int) -> dict[str, Problem]:
    """For each problem (by id) another one as donor: its neighbour in a shuffled circle, so that each gives exactly once."""
    if len(problems) < 2:
        raise UserError(
            "--control shuffled needs at least 2 tasks in each domain; raise --limit, or leave the control out"
        )
    circle = random.Random(derive_seed(seed, "shuffled")).sample(list(problems), len(problems))
    return {problem.id: circle[index - 1] for index, problem in enumerate(circle)}


def require_checkpoint(spec: str, script: str | None = None) -> None:
    if not is_url(spec) and not is_checkpoint(spec):
        raise UserError(
            f"{spec}: there is no checkpoint; "
            + (
                f"`python {script}` makes it"
                if script
                else "it should be a directory with config.json, tokenizer.json and model.safetensors, or a URL"
            )
        )


def stored_report(out: Path, kind: type[ArmsConfig]) -> tuple[Report, ArmsConfig]:
    """The report on all arms in a directory's tasks.jsonl, and the options of the run."""
    saved = read_json(out / "run.json")
    results, _ = read_results(out / "tasks.jsonl")
    if not saved or not results:
        raise UserError(f"{out} holds no results yet; run the evaluation without --tables first")
    config = kind(**saved["config"])
    arms = dict.fromkeys([*config.arms, *CONTROLS])
    return make_report(
        results.values(), list(arms), list(config.teachers), config.samples, config.seed
    ), config


def write_report(out: Path, report: Report, text: str) -> None:
    """Write results.json, and `text` as tables.md."""
    run = read_json(out / "run.json")
    replace_text(out / "results.json", json.dumps({"run": run, **asdict(report)}, indent=2) + "\n")
    replace_text(out / "tables.md", text)
