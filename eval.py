"""Does the teacher help? The student before and after teaching, task by task, with intervals and controls.

    python eval.py                                                    # the nano world: 500 held-out tasks in each domain
    python eval.py --preset own --bench gsm8k --data test.jsonl --student DIR --teacher sft=DIR grpo=DIR --out runs/gsm8k
    python eval.py --preset own --bench aime25 --data aime25.jsonl --samples 16 --temperature 0.6 --top-p 0.95 ...
    python eval.py --tables --out runs/gsm8k                          # the tables again, without any model

Every arm answers the same tasks in the same answer format, so arms are compared in pairs:

    student     alone: its approach (probe) and its answer (baseline), computed once and shared by all other arms
    <teacher>   a --teacher reads question and approach and writes a teaching; with it the student answers again
    shuffled    control: the last teacher's teachings, each given to *another* task of its domain; a gain that remains comes
                from being taught anything at all
    untrained   control: the student's own weights in the teacher's seat; a gain comes from a second look. (The untrained base
                of a larger teacher is one more teacher: --teacher base=DIR ...)

In --out, `tasks.jsonl` gets one line per (arm, domain, task, sample) as soon as a chunk of tasks is done; an interrupted run
continues there, with nothing lost or done twice. `results.json` and `tables.md` are the outcome, `run.json` says of what.

Simplified against leaderboards: one greedy answer per task by default (--samples for averages), answers compared as numbers or
words (`protocol.is_correct`) instead of by symbolic algebra.
"""

import dataclasses
import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from nano_atlas import world
from nano_atlas.config import Preset, option, parse, refuse_changes, run_script, to_json
from nano_atlas.data import Problem, derive_seed, load_problems
from nano_atlas.episodes import Episode, EpisodeConfig, Sketch, guide, sketch_problems, teach
from nano_atlas.errors import UserError
from nano_atlas.files import read_json
from nano_atlas.reward import RewardConfig
from nano_atlas.scores import STUDENT, Report, TaskLog, TaskResult, make_report, read_results, tables
from nano_atlas.seats import Reply, Seat, is_url, open_seat

SHUFFLED, UNTRAINED = "shuffled", "untrained"
RESULT_FILES = ("tasks.jsonl", "run.json", "results.json", "tables.md")


@dataclass(frozen=True)
class Config:
    preset: str = option("nano", "", group="what is evaluated", resumable=True)
    bench: str = option("nano", "benchmark; gsm8k and aime25 need their file as --data", ("nano", "gsm8k", "aime25", "tau2"))
    data: Path | None = option(None, "JSONL of problems with gold answers", resumable=True)  # its contents are compared instead
    limit: int | None = option(None, "tasks per domain; of a file the first ones (none: all of them)")
    student: str | None = option(None, "checkpoint directory, or URL of an OpenAI-compatible server")
    teacher: tuple[str, ...] = option((), "one or more NAME=DIRECTORY or NAME=URL; the last is compared with each earlier one")
    control: tuple[str, ...] = option((SHUFFLED, UNTRAINED), "control arms", (SHUFFLED, UNTRAINED, "none"))
    student_model: str | None = option(None, "model name at the student's URL (none: the first it serves)")
    teacher_model: str | None = option(None, "model name at the teachers' URLs (none: the first each serves)")

    samples: int = option(1, "answers per task and arm; above 1 the tables show avg@n and pass@n", group="sampling")
    temperature: float = option(0.0, "of student and teachers (0: greedy)")
    top_p: float = option(1.0, "nucleus mass of student and teachers")
    probe_tokens: int = option(500, "longest student approach (tokens)")
    teaching_tokens: int = option(4096, "longest teacher completion, thinking included (tokens)")
    answer_tokens: int = option(4096, "longest student answer (tokens)")
    seed: int = option(0, "of task choice, sampling, shuffling and bootstrap")

    out: Path = option(Path("runs/nano/eval"), "directory of the results", group="run", resumable=True)
    chunk: int = option(256, "answers computed between two writes: what a killed run loses at most")
    device: str = option("cpu", "where checkpoints run, such as cpu or cuda")
    dtype: str = option("float32", "of checkpoints", ("float32", "bfloat16"))
    tables: bool = option(False, "only print the tables of --out, also of an unfinished run", resumable=True)
    restart: bool = option(False, "start over; discards what --out holds", resumable=True)

    def check(self) -> None:
        for name in ("limit", "samples", "chunk", "probe_tokens", "teaching_tokens", "answer_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError("--temperature must be at least 0, and --top-p above 0 and at most 1")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"--temperature 0 gives {self.samples} times the same answer; raise it, or leave --samples out")
        if self.bench == "tau2":
            raise UserError("--bench tau2 comes with a later version; there are nano, gsm8k and aime25")
        if self.student is None and not self.tables:
            raise UserError(f"--preset {self.preset} needs --student DIRECTORY or URL")
        if self.bench == "nano" and (self.data or self.limit is None):
            raise UserError("--bench nano makes its own tasks: it takes no --data and needs a number as --limit")
        if self.bench != "nano" and not self.data and not self.tables:
            raise UserError(f"--bench {self.bench} needs --data FILE, its problems as JSONL with question and answer")
        if "none" in self.control and len(self.control) > 1:
            raise UserError("--control none excludes the others")
        if SHUFFLED in self.control and not self.teacher:
            raise UserError("--control shuffled needs a --teacher whose teachings it shuffles")
        if self.tables and self.restart:
            raise UserError("--tables shows what --restart discards; use one of them")
        names = list(self.teachers)
        taken = {name for name in names if name in (STUDENT, SHUFFLED, UNTRAINED)}
        if taken or len(names) < len(self.teacher):
            raise UserError(f"--teacher {' '.join(self.teacher)}: each needs a name of its own, NAME=PATH, "
                            f"other than {STUDENT}, {SHUFFLED} and {UNTRAINED}")

    @property
    def teachers(self) -> dict[str, str]:
        """Directory or URL of each teacher by name; without NAME= the last part of the path is the name."""
        parts = [re.fullmatch(r"(?:([\w.-]+)=)?(.*)", spec).groups() for spec in self.teacher]
        return {name or spec.rstrip("/").rpartition("/")[2]: spec for name, spec in parts}

    @property
    def arms(self) -> list[str]:
        return [STUDENT, *self.teachers, *dict.fromkeys(control for control in self.control if control != "none")]

    @property
    def episode(self) -> EpisodeConfig:
        temperature = self.temperature
        return EpisodeConfig(self.probe_tokens, self.teaching_tokens, self.answer_tokens, temperature, temperature, self.top_p)


NANO = Path("runs/nano")
GPU = {"bench": "gsm8k", "teacher": ("sft=runs/sft/model", "grpo=runs/grpo/model"), "out": Path("runs/eval"),
       "device": "cuda", "dtype": "bfloat16"}
PRESETS = {
    "nano": Preset("the nano world with its student and teachers; CPU, 1 GB", {
        "student": str(NANO / "student/model"), "limit": 500,
        "teacher": (f"sft={NANO / 'teacher-sft/model'}", f"grpo={NANO / 'teacher-grpo/model'}"),
        "probe_tokens": 40, "teaching_tokens": 96, "answer_tokens": 120}),
    "24gb": Preset("Qwen3-0.6B student, 0.6B teacher on one GPU, 6 GB; needs --data", GPU | {"student": "Qwen/Qwen3-0.6B"}),
    "2gpu": Preset("Qwen3-4B student, 1.7B teacher on the first GPU, 16 GB; needs --data", GPU | {"student": "Qwen/Qwen3-4B"}),
    "80gb": Preset("Qwen3-4B student, 8B teacher on one GPU, 30 GB; needs --data", GPU | {"student": "Qwen/Qwen3-4B"}),
    "own": Preset("checkpoints or URLs of your own, one teacher in memory at a time; needs --data, --student, --teacher",
                  {"bench": "gsm8k", "out": Path("runs/eval")}),
}
MADE_BY = {NANO / "student/model": "train_sft.py", NANO / "teacher-sft/model": "train_sft.py",
           NANO / "teacher-grpo/model": "train_grpo.py"}


def main() -> None:
    config = parse(Config, sys.argv[1:], PRESETS, __doc__)
    if config.tables:
        print(tables(*stored_report(config.out)))
        return
    tasks = load_tasks(config)
    for spec in (config.student, *config.teachers.values()):
        require_checkpoint(spec)
    start_or_continue(config, tasks)
    place = {"device": config.device, "dtype": getattr(torch, config.dtype)}
    log = TaskLog(config.out / "tasks.jsonl")
    evaluate(config, tasks, log, lambda: open_seat(config.student, model=config.student_model, **place),
             lambda name: open_seat(config.teachers[name], model=config.teacher_model, **place))
    log.close()

    report, names = stored_report(config.out)
    text, run = tables(report, names), read_json(config.out / "run.json")
    write_whole(config.out / "results.json", json.dumps({"run": run, **asdict(report)}, indent=2))
    write_whole(config.out / "tables.md", text)
    print(text)


# ---------------------------------------------------------------------------------------------------------------- the arms


def evaluate(config: Config, tasks: dict[str, list[Problem]], log: TaskLog, open_student: Callable[[], Seat],
             open_teacher: Callable[[str], Seat]) -> None:
    """Run each chunk of each arm that the log does not hold whole. Teachers are opened one at a time, and only if needed.

    Chunks are the same in every run of a configuration, and one that was cut short is computed again as it was: an answer does
    not depend on where a run was interrupted.
    """
    size = max(1, config.chunk // config.samples)
    chunks = [problems[start : start + size] for problems in tasks.values() for start in range(0, len(problems), size)]
    missing = {arm: [chunk for chunk in chunks if not log.has(arm, chunk, config.samples)] for arm in config.arms}
    left = sum(len(chunk) for pending in missing.values() for chunk in pending)
    if not left:
        return
    total = sum(map(len, chunks)) * len(missing)
    student = open_student()
    with tqdm(total=total, initial=total - left, unit="task") as bar:
        for arm in config.arms:
            if not missing[arm]:
                continue
            teacher = student if arm == UNTRAINED else open_teacher(arm) if arm in config.teachers else None
            for chunk in missing[arm]:
                bar.set_description(f"{chunk[0].domain}, {arm}")
                if arm == STUDENT:
                    results = answer_alone(config, chunk, student)
                elif arm == SHUFFLED:
                    results = answer_shuffled(config, chunk, student, log, derange(tasks[chunk[0].domain], config.seed))
                else:
                    results = answer_taught(config, chunk, student, log, arm, teacher)
                log.append(results)
                bar.update(len(chunk))
            del teacher  # before the next one is loaded


def answer_alone(config: Config, chunk: Sequence[Problem], student: Seat) -> Iterator[TaskResult]:
    for sketch in sketch_problems(student, chunk, config.episode, config.seed, config.samples):
        for sample, attempt in enumerate(sketch.baselines):
            problem = sketch.problem
            yield TaskResult(STUDENT, problem.domain, problem.id, sample, problem.answer, attempt,
                             sketch.approach, sketch.approach_tokens)


def answer_taught(
    config: Config, chunk: Sequence[Problem], student: Seat, log: TaskLog, arm: str, teacher: Seat
) -> Iterator[TaskResult]:
    sketches = known_sketches(config, chunk, log)
    for group in teach(student, teacher, sketches, config.episode, RewardConfig(), config.seed, group_size=config.samples):
        yield from (task_result(arm, episode, sample) for sample, episode in enumerate(group))


def answer_shuffled(
    config: Config, chunk: Sequence[Problem], student: Seat, log: TaskLog, donors: dict[str, Problem]
) -> Iterator[TaskResult]:
    """Sample i of a task gets the teaching that the last teacher wrote for sample i of the task's donor."""
    last = list(config.teachers)[-1]
    given = [result for problem in chunk for result in log.get(last, donors[problem.id], config.samples)]
    sketches = [sketch for sketch in known_sketches(config, chunk, log) for _ in range(config.samples)]
    flat = [(sketch, SHUFFLED, Reply(result.teacher_text, result.teacher_tokens, result.is_teacher_truncated))
            for sketch, result in zip(sketches, given, strict=True)]
    episodes = guide(student, flat, [result.teaching for result in given], student, config.episode, RewardConfig(), config.seed)
    yield from (task_result(SHUFFLED, episode, index % config.samples) for index, episode in enumerate(episodes))


def known_sketches(config: Config, chunk: Sequence[Problem], log: TaskLog) -> list[Sketch]:
    """What the student did alone, from the log: the same for every arm."""
    alone = [(problem, log.get(STUDENT, problem, config.samples)) for problem in chunk]
    return [Sketch(problem, r[0].approach, r[0].approach_tokens, [result.attempt for result in r]) for problem, r in alone]


def task_result(arm: str, episode: Episode, sample: int) -> TaskResult:
    sketch, problem, reply = episode.sketch, episode.sketch.problem, episode.reply
    return TaskResult(arm, problem.domain, problem.id, sample, problem.answer, episode.guided,
                      sketch.approach, sketch.approach_tokens,
                      reply.text, reply.tokens, reply.is_truncated, episode.teaching, episode.is_leak)


def derange(problems: Sequence[Problem], seed: int) -> dict[str, Problem]:
    """For each problem (by id) another one as donor: its neighbour in a shuffled circle, so that each gives exactly once."""
    if len(problems) < 2:
        raise UserError("--control shuffled needs at least 2 tasks in each domain; raise --limit, or leave the control out")
    circle = random.Random(derive_seed(seed, "shuffled")).sample(list(problems), len(problems))
    return {problem.id: circle[index - 1] for index, problem in enumerate(circle)}


# --------------------------------------------------------------------------------------------------------- inputs and files


def load_tasks(config: Config) -> dict[str, list[Problem]]:
    """Problems by domain; a file is one domain, called after the benchmark."""
    if config.bench == "nano":
        return {domain: world.held_out(domain, config.limit, config.seed) for domain in world.DOMAINS}
    problems = load_problems(config.data)[: config.limit]
    return {config.bench: [dataclasses.replace(problem, domain=config.bench) for problem in problems]}


def require_checkpoint(spec: str) -> None:
    if not is_url(spec) and not (Path(spec) / "config.json").is_file():
        script = MADE_BY.get(Path(spec))
        raise UserError(f"{spec}: there is no checkpoint; " + (f"`python {script}` makes it" if script else
                        "it should be a directory with config.json, tokenizer.json and model.safetensors, or a URL"))


def start_or_continue(config: Config, tasks: dict[str, list[Problem]]) -> None:
    """Write run.json, or compare with it: the options, and the contents of tasks and checkpoints (a path may hold new ones).

    Raises UserError naming what differs from the run whose results lie in --out.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    if config.restart:
        for name in RESULT_FILES:
            (config.out / name).unlink(missing_ok=True)
    contents = {f"tasks {name}": digest([repr(problem).encode() for problem in problems]) for name, problems in tasks.items()}
    for name, spec in {STUDENT: config.student, **config.teachers}.items():
        if not is_url(spec):
            contents[f"checkpoint {name}"] = checkpoint_digest(Path(spec))
    saved = read_json(config.out / "run.json")
    if not saved and (config.out / "tasks.jsonl").exists():
        raise UserError(f"{config.out}/tasks.jsonl lies there without its run.json; choose another --out, or use --restart")
    if saved:
        refuse_changes(config, saved["config"], str(config.out))
        changed = [name for name, value in contents.items() if saved["contents"].get(name) != value]
        if changed:
            raise UserError(f"{config.out} holds results of other contents than now: {', '.join(changed)}. "
                            "Choose another --out, or start over with --restart")
    else:
        write_whole(config.out / "run.json", json.dumps({"config": to_json(config), "contents": contents}, indent=2))


def digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def checkpoint_digest(path: Path) -> str:
    patterns = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "*.jinja")
    parts = []
    for file in sorted(file for pattern in patterns for file in path.glob(pattern)):
        with file.open("rb") as opened:
            parts += [file.name.encode(), hashlib.file_digest(opened, "sha256").digest()]
    return digest(parts)


def stored_report(out: Path) -> tuple[Report, dict[str, str]]:
    """The report on a directory's tasks.jsonl, and how its arms are called in the tables."""
    saved = read_json(out / "run.json")
    results, _ = read_results(out / "tasks.jsonl")
    if not saved or not results:
        raise UserError(f"{out} holds no results yet; run the evaluation without --tables first")
    config = Config(**saved["config"])
    teachers = list(config.teachers)
    names = {STUDENT: "student alone", UNTRAINED: "control: untrained", SHUFFLED: f"control: shuffled {''.join(teachers[-1:])}"}
    return make_report(results.values(), config.arms, teachers, config.samples, config.seed), names


def write_whole(path: Path, text: str) -> None:
    """A reader, or a process killed meanwhile, finds the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    run_script(main)
