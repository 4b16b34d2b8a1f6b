"""The runtime: a teacher helps a frozen student with each task, finds out which way of teaching works, and leaves traces.

    python runtime_loop.py                                       # the nano world, on a CPU
    python runtime_loop.py --preset own --tasks tasks.jsonl --student http://localhost:8000 --teacher DIR --out runs/mine
    python runtime_loop.py --export hard.jsonl --min-signal 1    # select traces; then: python train_grpo.py --traces hard.jsonl

Student and teacher are each a checkpoint directory or the URL of an OpenAI-compatible server. A line of the tasks file has a
`question` and, where it is known, an `answer`. The loop has the three parts of the published one:

    task analysis     analyse_tasks   the student alone: its approach, its answer, the gap to full reward
    experimentation   experiment      a strategy for each task, by what has worked so far; teaching; guided answer; reward
    trace export      record_traces   each session appended to traces.jsonl; export_traces selects those worth training on

What is returned is never worse than the student alone, where that can be verified: see `choose_attempt`.

The traces are the only state. Strategies and metrics are rebuilt by replaying them, so a run that was killed continues where it
stopped and repeats at most one batch of tasks. A task is known by its content (domain, question, answer): lines may move, and a
task edited since is a new one.

Simplified against atlas-sdk: one lane (paired: one attempt alone, one guided), exact verifiers instead of judges, no playbooks.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from nano_atlas import protocol, world
from nano_atlas.config import Preset, option, parse, refuse_changes, run_script, to_json
from nano_atlas.data import Problem, derive_seed, load_problems
from nano_atlas.episodes import Episode, EpisodeConfig, Sketch, sketch_problems, teach
from nano_atlas.errors import UserError
from nano_atlas.files import read_json, write_json
from nano_atlas.metrics import RunLog
from nano_atlas.reward import RewardConfig
from nano_atlas.seats import Seat, open_seat
from nano_atlas.strategies import Strategies
from nano_atlas.traces import Outcome, Selection, TraceWriter, outcome, read_traces, trace_from_episode

STYLES = tuple(protocol.TEACHING_STYLES)  # the strategies to choose among
NANO_TEACHERS = ("runs/nano/teacher-grpo/model", "runs/nano/teacher-sft/model")  # the first that exists


@dataclass(frozen=True)
class Config(Selection, RewardConfig, EpisodeConfig):
    preset: str = option("nano", "", group="run")
    tasks: Path | None = option(None, "JSONL of tasks; none: tasks of the nano world", resumable=True)
    domain: str = option("math", "kind of nano-world tasks, without --tasks", choices=list(world.DOMAINS), resumable=True)
    count: int = option(200, "number of nano-world tasks, without --tasks", resumable=True)
    student: str | None = option(None, "checkpoint directory or URL of the student")
    teacher: str | None = option(None, "the same of the teacher; without one the nano world's, after GRPO if that was done")
    student_model: str | None = option(None, "model name at the student's URL (none: the first it serves)")
    teacher_model: str | None = option(None, "model name at the teacher's URL (none: the first it serves)")
    out: Path = option(Path("runs/nano/runtime"), "directory of traces.jsonl and metrics.jsonl", resumable=True)
    restart: bool = option(False, "start over; earlier traces are kept under another name", resumable=True)
    batch: int = option(32, "tasks that are worked on together, between two updates of the strategies")
    seed: int = option(0, "of every random choice")
    device: str = option("cpu", "where checkpoints run, such as cpu or cuda")
    dtype: str = option("float32", "of checkpoints", ("float32", "bfloat16"))
    export: Path | None = option(None, "write the traces that --min-… selects to this file, and run no task", resumable=True)

    def check(self) -> None:
        if self.batch < 1 or self.count < 1:
            raise UserError("--batch and --count must be at least 1")
        if self.export is None and (self.min_reward, self.min_gain, self.min_signal) != (None, None, None):
            raise UserError("--min-reward, --min-gain and --min-signal select traces for --export FILE; name that file too")
        if self.export is not None and self.restart:
            raise UserError("--export reads the traces that --restart would set aside; use one of them")
        if self.export is None and self.preset != "nano" and None in (self.tasks, self.student, self.teacher):
            raise UserError(f"--preset {self.preset} needs --tasks" + " --student --teacher" * (self.preset == "own"))


GPU = {"teacher": "runs/grpo/model", "out": Path("runs/runtime"), "device": "cuda", "dtype": "bfloat16"}
PRESETS = {
    "nano": Preset("the nano world with its student and teacher; CPU, 1 GB", {
        "student": "runs/nano/student/model", "probe_tokens": 40, "teaching_tokens": 96, "answer_tokens": 120}),
    "24gb": Preset("Qwen3-0.6B student, 0.6B teacher on one GPU, 6 GB; needs --tasks", GPU | {"student": "Qwen/Qwen3-0.6B"}),
    "2gpu": Preset("Qwen3-4B student, 1.7B teacher on the first GPU, 16 GB; needs --tasks", GPU | {"student": "Qwen/Qwen3-4B"}),
    "80gb": Preset("Qwen3-4B student, 8B teacher on one GPU, 30 GB; needs --tasks", GPU | {"student": "Qwen/Qwen3-4B"}),
    "own": Preset("checkpoints or URLs of your own; needs --tasks, --student, --teacher", {"out": Path("runs/runtime")}),
}


# -------------------------------------------------------------------------------------------------------- task analysis


def analyse_tasks(student: Seat, tasks: Sequence[Problem], config: Config) -> list[Sketch]:
    """What the student does alone: its approach (probe), its answer (baseline), and how correct that is.

    The performance gap, 1 - baseline correctness, is what teaching can win on the task; the rest is what it can destroy.
    """
    return sketch_problems(student, tasks, config, config.seed)


# ------------------------------------------------------------------------------------------------------ experimentation


def experiment(
    student: Seat, teacher: Seat, sketches: Sequence[Sketch], strategies: Strategies, config: Config
) -> list[Episode]:
    """One teaching per task, in the style its bandit chooses, and the student's guided answer with its reward."""
    styles = [
        strategies.choose(learning_key(s.problem), derive_seed(config.seed, "strategy", s.problem.id)) for s in sketches
    ]
    groups = teach(student, teacher, sketches, config, config, config.seed, styles=styles)
    return [episode for (episode,) in groups]


def learning_key(task: Problem) -> str:
    return task.domain or "general"


def choose_attempt(episode: Episode) -> str:
    """Non-degradation: which answer is returned, "guided" or "baseline".

    With ground truth, both answers are verified, and the guided one is returned only if it is at least as correct as the
    baseline. So on every such task, and with any teacher, the returned answer is never worse than the student's own. It is the
    better of two attempts *by verification*; how much the teaching itself helps is the guided accuracy, reported beside it.

    Without ground truth nothing can be verified and nothing is guaranteed: the guided answer is returned unless it lacks a
    final answer where the baseline has one. In both cases, where the teacher gave no teaching the baseline is returned.
    """
    alone, guided = episode.sketch.baselines[0], episode.guided
    if episode.teaching is None:
        return "baseline"
    if episode.sketch.problem.answer is not None:
        return "guided" if guided.is_correct >= alone.is_correct else "baseline"
    return "baseline" if guided.answer is None and alone.answer is not None else "guided"


# --------------------------------------------------------------------------------------------------------- trace export


def record_traces(
    writer: TraceWriter, episodes: dict[str, Episode], strategies: Strategies, config: Config, created_at: str
) -> list[Outcome]:
    """Append one trace per session id, with what was known when its strategy was chosen; all are on the disk on return."""
    traces = []
    for session_id, episode in episodes.items():
        task = episode.sketch.problem
        metadata = {
            "session_id": session_id, "task_id": task.id, "domain": task.domain, "learning_key": learning_key(task),
            "status": "succeeded", "created_at": created_at, "completed_at": now(),
            "student": config.student, "teacher": config.teacher, "seed": config.seed,
        }
        traces.append(trace_from_episode(episode, choose_attempt(episode), metadata, strategies.history(learning_key(task))))
    writer.append(traces)
    return [outcome(trace) for trace in traces]


def export_traces(source: Path, target: Path, selection: Selection) -> tuple[int, int]:
    """Write the selected traces of `source` to `target` as a whole; returns how many were selected, and of how many."""
    if target.exists() and target.samefile(source):
        raise UserError(f"--export {target} is the trace file itself; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    total = selected = 0
    with partial.open("w", encoding="utf-8") as file:
        for total, trace in enumerate(read_traces(source), start=1):
            if selection.takes(trace):
                selected += 1
                file.write(json.dumps(trace, allow_nan=False) + "\n")
    if selected == 0:
        partial.unlink()
        raise UserError(f"{source}: none of its {total} traces is selected; {target} was not written; lower the --min-… bounds")
    os.replace(partial, target)
    return selected, total


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


# ------------------------------------------------------------------------------------------------------------- the loop


def session_ids(tasks: Sequence[Problem]) -> list[str]:
    """Names that depend on the content of a task alone; the second of two equal tasks is told from the first by its count."""
    seen: Counter[str] = Counter()
    names = []
    for task in tasks:
        content = json.dumps([task.domain, task.question, task.answer])
        seen[content] += 1
        names.append(hashlib.sha256(f"{seen[content]} {content}".encode()).hexdigest()[:24])
    return names


def run(config: Config, tasks: Sequence[Problem], student: Seat, teacher: Seat) -> list[Outcome]:
    """Bring every task to a trace, and return the outcome of each in the order of the tasks."""
    path = config.out / "traces.jsonl"
    with TraceWriter(path) as writer, RunLog(config.out) as log, tqdm(total=len(tasks), unit="task", desc="runtime") as bar:
        settle_options(config)
        strategies = Strategies(STYLES)
        ids = session_ids(tasks)
        wanted, done = set(ids), {}
        for past in writer.outcomes():
            done[past.session_id] = past
            if past.session_id not in wanted:  # experience with tasks that are no longer in the file still counts
                strategies.learn(past.learning_key, past.strategy, past.reward)

        # Batches are fixed by position and strategies learn from whole batches: a run that was interrupted, be it in the middle
        # of a batch, makes the same choices as one that never was.
        for start in range(0, len(tasks), config.batch):
            batch = ids[start : start + config.batch]
            missing = {name: task for name, task in zip(batch, tasks[start:]) if name not in done}
            if missing:
                created_at = now()
                sketches = analyse_tasks(student, list(missing.values()), config)
                episodes = experiment(student, teacher, sketches, strategies, config)
                recorded = record_traces(writer, dict(zip(missing, episodes)), strategies, config, created_at)
                done |= {result.session_id: result for result in recorded}
            outcomes = [done[name] for name in batch]
            for result in outcomes:
                strategies.learn(result.learning_key, result.strategy, result.reward)
            log.log(start + len(batch), **runtime_metrics(outcomes))
            bar.update(len(batch))
    return [done[name] for name in ids]


def settle_options(config: Config) -> None:
    """A directory holds one experiment: other options, or other weights, than those it began with are refused."""
    path = config.out / "config.json"
    weights = {"student": weights_digest(config.student), "teacher": weights_digest(config.teacher)}
    if not path.exists():
        write_json(path.with_suffix(".partial"), {"options": to_json(config), "weights": weights})
        os.replace(path.with_suffix(".partial"), path)
    saved = read_json(path)
    refuse_changes(config, saved["options"], str(config.out))
    changed = [f"{name} ({getattr(config, name)})" for name in weights if weights[name] != saved["weights"][name]]
    if changed:
        raise UserError(f"{config.out} holds traces of other weights of the {' and the '.join(changed)}. "
                        "Choose another --out, or start over with --restart")


def weights_digest(spec: str) -> str:
    """Of a checkpoint directory; a URL does not show its weights."""
    digest = hashlib.sha256()
    for file in sorted(Path(spec).glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def set_aside(directory: Path) -> None:
    """For --restart: rename the traces (all else is made from them) and forget the options."""
    path = directory / "traces.jsonl"
    if path.exists():
        with TraceWriter(path):  # not while another process writes it
            number = next(n for n in range(1, sys.maxsize) if not path.with_name(f"traces.{n}.jsonl").exists())
            path.rename(path.with_name(f"traces.{number}.jsonl"))
    (directory / "config.json").unlink(missing_ok=True)


def runtime_metrics(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Averages over sessions; those that need a ground truth are None where no session has one."""
    scored = [result for result in outcomes if result.reward is not None]

    def average(name: str) -> float | None:
        return mean(getattr(result, name) for result in scored) if scored else None

    def rate(is_so: Iterable[bool]) -> float:
        return sum(is_so) / len(outcomes)

    return {
        "reward": average("reward"),
        "baseline_accuracy": average("baseline"),
        "student_accuracy": average("guided"),
        "returned_accuracy": average("returned"),
        "accuracy_delta": average("gain"),
        "non_degradation_rate": mean(result.gain >= 0 for result in scored) if scored else None,
        "leak_rate": average("is_leak"),
        "malformed_rate": rate(result.is_malformed for result in outcomes),
        "truncated_rate": rate(result.is_truncated for result in outcomes),
        "guided_returned_rate": rate(result.returned_attempt == "guided" for result in outcomes),
        "tokens/student": sum(result.student_tokens for result in outcomes),
        "tokens/teacher": sum(result.teacher_tokens for result in outcomes),
        **{f"strategy/{style}": rate(result.strategy == style for result in outcomes) for style in STYLES},
    }


def summary(outcomes: Sequence[Outcome]) -> str:
    """The end-of-run report."""
    metrics = runtime_metrics(outcomes)
    scored = [result for result in outcomes if result.reward is not None]
    lines = [f"{len(outcomes)} tasks, {len(scored)} with ground truth"]
    if scored:
        lines += [
            f"  student alone      {metrics['baseline_accuracy']:7.1%}",
            f"  guided             {metrics['student_accuracy']:7.1%}   ({100 * metrics['accuracy_delta']:+.1f} points)",
            f"  returned           {metrics['returned_accuracy']:7.1%}   (the better of the two, verified)",
            f"  not degraded       {metrics['non_degradation_rate']:7.1%}   leaks {metrics['leak_rate']:.1%}",
            "  strategy           chosen     gain   reward",
        ]
        for style in STYLES:
            mine = [result for result in scored if result.strategy == style]
            if mine:
                gain, reward = mean(result.gain for result in mine), mean(result.reward for result in mine)
                lines.append(f"    {style:<16} {len(mine):6d}   {100 * gain:+6.1f}   {reward:+.3f}")
    cut = f"cut off by a length limit {metrics['truncated_rate']:.1%}"
    lines.append(f"  without <teaching> {metrics['malformed_rate']:7.1%}   {cut}")
    lines.append(f"  tokens generated   student {metrics['tokens/student']:,}, teacher {metrics['tokens/teacher']:,}")
    return "\n".join(lines)


def find_teacher() -> str:
    """The nano world's teacher: trained by GRPO, or by SFT only where that has not happened yet."""
    for place in NANO_TEACHERS:
        if (Path(place) / "config.json").is_file():
            if place != NANO_TEACHERS[0]:
                print(f"there is no {NANO_TEACHERS[0]} yet; the teacher is {place}, before GRPO")
            return place
    raise UserError(f"no teacher in {' or '.join(NANO_TEACHERS)}; run `python train_grpo.py`, or name one with --teacher")


def main() -> None:
    config = parse(Config, sys.argv[1:], PRESETS, __doc__)
    if config.export is not None:
        selected, total = export_traces(config.out / "traces.jsonl", config.export, config)
        print(f"{config.export}: {selected} of {total} traces; next: python train_grpo.py --traces {config.export}")
        return
    if config.teacher is None:
        config = dataclasses.replace(config, teacher=find_teacher())
    # The traces may train the next teacher, so the nano tasks are not those that eval.py holds out.
    nano = world.held_out(config.domain, config.count, f"runtime/{config.seed}")
    tasks = nano if config.tasks is None else load_problems(config.tasks, needs_answer=False)
    place = {"device": config.device, "dtype": getattr(torch, config.dtype)}
    student = open_seat(config.student, model=config.student_model, **place)
    teacher = open_seat(config.teacher, model=config.teacher_model, **place)
    if config.restart:
        set_aside(config.out)
    print(summary(run(config, tasks, student, teacher)))
    print(f"  traces             {config.out / 'traces.jsonl'}")


if __name__ == "__main__":
    run_script(main)
