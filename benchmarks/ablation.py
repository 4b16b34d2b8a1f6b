"""What each choice of the method is worth, and what each fault of the published code costs: one table, one figure.

    python train_sft.py                              # first, the nano world's teacher and its demonstrations
    python -m benchmarks.ablation                    # every row with three seeds; the same command continues
    python -m benchmarks.ablation --rows default "advantage scale" --student DIR --teacher DIR --out runs/ablation-2
    python -m benchmarks.ablation --table --figure ablation.svg      # only show what is there

Each run is GRPO from the same SFT checkpoint with one thing changed, evaluated greedily on held-out tasks of all three domains. A seed
fixes the order of the problems and all samples; the student and, except in the rows on SFT, the teacher's SFT checkpoint are the same
everywhere. A fault is switched on here, by replacing one right function by a wrong one; nothing in the package knows of it.
"""

import copy
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

import train_grpo
from benchmarks.jobs import ROOT, Job, call, markdown, mean_in_points, run_jobs
from nano_atlas import episode, layout, protocol, world
from nano_atlas.config import option, parse, run_script
from nano_atlas.presets import NANO, presets
from nano_atlas.reward import RewardConfig
from nano_atlas.runs import read_json, read_jsonl, write_json, write_jsonl
from nano_atlas.sampler import Sampler
from nano_atlas.schedule import play
from nano_atlas.seats import open_seat

TASKS = {"math": 500, "telecom": 150, "crm": 150}

# ---------------------------------------------------------------------------------------------------------------- faults


def gradient_on_the_bare_question() -> AbstractContextManager:
    """Sampled after question and approach, but scored after the question alone (teacher_trainers.py:392 of ATLAS)."""
    right = train_grpo.roll_out

    def wrong(config, seats, problems, step):
        groups, metrics = right(config, seats, problems, step)
        for one in itertools.chain.from_iterable(groups):
            bare = seats["teacher"].prompt_ids(protocol.user_turn(one.sketch.problem.question))
            one.reply.rollout = replace(one.reply.rollout, prompt_ids=tuple(bare))
        return groups, metrics

    return patch.object(train_grpo, "roll_out", wrong)


def sampler_never_updated() -> AbstractContextManager:
    """The sampler keeps the weights it started with."""

    class StaleSampler(Sampler):
        def __init__(self, model, **options):
            super().__init__(copy.deepcopy(model), **options)
            self.sync = lambda model, version: 0.0

    return patch.object(layout, "Sampler", StaleSampler)


def whole_text_without_a_tag() -> AbstractContextManager:
    """A completion without <teaching> is handed to the student as a whole, private thoughts included."""

    def parse_teaching(completion: str) -> str | None:
        match = re.search(r"<teaching>(.*?)</teaching>", completion, re.DOTALL)
        return match[1].strip() if match else completion.strip() or None

    return patch.object(protocol, "parse_teaching", parse_teaching)


def reference_mixed() -> AbstractContextManager:
    """0.9 of the policy is mixed into the KL reference every second step."""
    right, steps = train_grpo.update, itertools.count(1)

    def wrong(config, policy, reference, *arguments):
        metrics = right(config, policy, reference, *arguments)
        if next(steps) % 2 == 0:
            for old, new in zip(reference.parameters(), policy.parameters()):
                old.data.lerp_(new.data, 0.9)
        return metrics

    return patch.object(train_grpo, "update", wrong)


def groups_of_equal_rewards_skipped() -> AbstractContextManager:
    """They have no advantage; here their KL goes too, and the others' tokens weigh more (a light form of DAPO's dynamic sampling)."""
    right = train_grpo.roll_out

    def skipping(config, seats, problems, step):
        groups, metrics = right(config, seats, problems, step)
        return [group for group in groups if len({one.reward for one in group}) > 1] or groups, metrics

    return patch.object(train_grpo, "roll_out", skipping)


@contextmanager
def probe_and_baselines_for_each_teaching() -> Iterator[None]:
    """Every member of a group gets a probe and baselines of its own, so that the group competes from different states."""
    right = episode.episode

    def copies(problem, *arguments):
        *arguments, group_size = arguments
        problems = [replace(problem, id=f"{problem.id}#{i}") for i in range(group_size)]
        return [right(problem, *arguments, 1) for problem in problems]

    def play_copies(groups, seats, progress):
        episodes = iter(play(list(itertools.chain.from_iterable(groups)), seats, progress))
        return [[next(episodes)[0] for _ in group] for group in groups]

    with patch.object(episode, "episode", copies), patch.object(train_grpo, "play_most", play_copies):
        yield


@dataclass(frozen=True)
class Row:
    section: str
    name: str
    flags: str = ""  # of train_grpo.py
    fault: Callable[[], AbstractContextManager] | None = None
    demonstrations: int | None = None  # None: the checkpoint of `python train_sft.py`

    @property
    def key(self) -> str:
        return re.sub(r"\W+", "-", f"{self.section} {self.name}").strip("-").lower()


ROWS = [
    Row("default", "as shipped"),
    Row("probe", "none", "--probe-tokens 0"),
    Row("probe", "8 tokens", "--probe-tokens 8"),
    Row("probe and baselines", "one probe, one baseline", "--baseline-samples 1"),
    Row("probe and baselines", "drawn anew for each teaching", fault=probe_and_baselines_for_each_teaching),
    *(Row("penalty for harm", value, f"--degradation-penalty {value}") for value in ("0", "1", "4")),
    *(Row("advantage scale", f"{scale}, brevity {weight}", f"--advantage-scale {scale} --efficiency-weight {weight}")
      for scale in ("none", "batch", "std") for weight in "012" if (scale, weight) != ("none", "1")),
    *(Row("learning rate", value, f"--lr {value}") for value in ("5e-5", "1e-3")),
    Row("KL", "none", "--beta 0"),
    Row("KL", "exact", "--kl exact"),
    Row("group size", "2 (64 problems)", "--group-size 2 --problems-per-step 64"),
    Row("group size", "32 (4 problems)", "--group-size 32 --problems-per-step 4"),
    Row("groups of equal rewards", "skipped", fault=groups_of_equal_rewards_skipped),
    Row("SFT", "no demonstration", demonstrations=0),
    Row("SFT", "90 demonstrations", demonstrations=90),
    Row("fault", "log-probs after the bare question", fault=gradient_on_the_bare_question),
    Row("fault", "sampler never updated", fault=sampler_never_updated),
    Row("fault", "whole text where the tag is missing", fault=whole_text_without_a_tag),
    Row("fault", "reference mixed 0.9 every 2 steps", fault=reference_mixed),
]  # fmt: skip
SECTIONS = tuple(dict.fromkeys(row.section for row in ROWS))


@dataclass(frozen=True)
class Config:
    rows: tuple[str, ...] = option(SECTIONS, "sections of the table", SECTIONS)
    seeds: tuple[int, ...] = option((0, 1, 2), "seeds of each row")
    steps: int = option(16, "GRPO steps of each run")
    student: Path = option(world.STUDENT, "its checkpoint")
    teacher: Path = option(NANO / "teacher-sft/model", "OUT/model of train_sft.py")
    out: Path = option(NANO / "ablation", "directory of the runs")
    table: bool = option(False, "only print the table of what is there")
    figure: Path | None = option(None, "also draw it, as an SVG file (pip install -e '.[bench]')")
    one: str = option("", "train and evaluate only this row, in this process (its directory's name)")

    def place(self, row: Row, seed: int) -> Path:
        return self.out / row.key / str(seed)


def teacher_before_grpo(row: Row, seed: int, config: Config) -> Path:
    if not row.demonstrations:
        return config.teacher if row.demonstrations is None else config.student
    sft, place = config.teacher.parent, config.place(row, seed)
    every, few = read_jsonl(sft / "demonstrations.jsonl"), place / "demonstrations.jsonl"
    write_jsonl(few, [record for _, record in itertools.islice(every, row.demonstrations)])
    steps = max(record["step"] for _, record in read_jsonl(sft / "metrics.jsonl"))  # as many as with all
    options = ["--model", config.student, "--data", few, "--steps", steps, "--seed", seed]
    call(place / "sft.txt", 1, ROOT / "train_sft.py", *options, "--out", place / "sft")
    return place / "sft/model"


def run_one(row: Row, seed: int, config: Config) -> None:
    place, teacher = config.place(row, seed), teacher_before_grpo(row, seed, config)
    argv = ["--student", config.student, "--teacher", teacher, "--out", place / "grpo", "--seed", seed,
            "--steps", config.steps, "--eval-every", 0, "--restart", *row.flags.split()]  # fmt: skip
    grpo = parse(train_grpo.Config, [str(word) for word in argv], presets("train_grpo"), "")
    if row.fault:
        grpo = replace(grpo, max_logp_diff=1e9)  # no check stops such a run
    with row.fault() if row.fault else nullcontext():
        train_grpo.train(grpo)
    record = {"row": row.key, "seed": seed, "steps": config.steps}
    write_json(place / "result.json", record | evaluate(place / "grpo/model", config.student, grpo.greedy()))


def evaluate(teacher: Path, student: Path, greedy: episode.EpisodeConfig) -> dict:
    """Correctness on each held-out task, alone and guided; the protocol is the right one, whatever the training did."""
    seats = {"student": open_seat(str(student)), "teacher": open_seat(str(teacher))}
    record, seed, count_tokens = {}, episode.seeds("ablation"), seats["teacher"].count_tokens
    for domain, count in TASKS.items():
        problems = world.held_out(domain, count, "ablation")
        scripts = [episode.episode(p, greedy, RewardConfig(), seed, count_tokens, 1, 1) for p in problems]
        episodes = [one for (one,) in play(scripts, seats)]
        alone = [round(one.sketch.baseline_accuracy) for one in episodes]
        guided = [int(one.guided.is_correct) for one in episodes]
        record[domain] = {"alone": alone, "guided": guided, **episode.teaching_metrics(episodes)}
    return record


def job(row: Row, seed: int, config: Config) -> Job:
    """A process of its own: a fault ends with it."""
    place = config.place(row, seed)
    argv = ["--one", row.key, "--seeds", seed, "--steps", config.steps, "--out", config.out,
            "--student", config.student, "--teacher", config.teacher]  # fmt: skip
    return Job(place / "result.json", lambda: call(place / "log.txt", 1, "-m", "benchmarks.ablation", *argv))


def results(row: Row, out: Path) -> list[dict]:
    """One record per seed."""
    return [read_json(path) for path in sorted((out / row.key).glob("*/result.json"))]


def accuracies(records: list[dict], arm: str = "guided") -> list[float]:
    """On math, in %, of each seed."""
    return [100 * statistics.mean(record["math"][arm]) for record in records]


def table(found: dict[Row, list[dict]], default: list[dict]) -> str:
    """One line per row; every number is a mean over seeds, the bracket behind accuracy its smallest and largest seed."""
    head = "changed | to | seeds | math, guided | against default | not worse | tokens taught | malformed | telecom | crm"
    by_seed = {record["seed"]: record["math"]["guided"] for record in default}
    lines = []
    for row, records in found.items():
        shared = [record for record in records if record["seed"] in by_seed and row != ROWS[0]]
        changes = [np.subtract(record["math"]["guided"], by_seed[record["seed"]]) for record in shared]
        right = accuracies(records)

        def mean(name: str, domain: str = "math", unit: int = 100) -> float:
            return unit * statistics.mean(record[domain][name] for record in records)

        lines.append([
            row.section, row.name, len(records), f"{statistics.mean(right):.1f} [{min(right):.1f}, {max(right):.1f}]",
            mean_in_points(np.mean(changes, axis=0)) if changes else "", f"{mean('non_degradation_rate'):.1f}",
            f"{mean('teaching_length_mean', unit=1):.0f}", f"{mean('malformed_rate'):.1f}",
            f"{mean('student_accuracy', 'telecom'):.1f}", f"{mean('student_accuracy', 'crm'):.1f}",
        ])  # fmt: skip
    return markdown(head, lines, texts=2)


def figure(found: dict[Row, list[dict]], default: list[dict], path: Path) -> None:
    """The table's accuracy on math: a dot per seed, a bar at their mean, a line where the default is."""
    import matplotlib.pyplot as plt  # pip install -e '.[bench]'

    plt.rcParams |= {"svg.hashsalt": "ablation", "font.size": 9, "svg.fonttype": "none"}
    canvas, axes = plt.subplots(figsize=(8, 0.27 * len(found) + 0.8), layout="constrained")
    for height, (row, records) in enumerate(found.items()):
        values, color = accuracies(records), f"C{SECTIONS.index(row.section) % 10}"
        axes.plot(values, [height] * len(values), "o", color=color, alpha=0.5, markersize=5)
        axes.plot([statistics.mean(values)] * 2, [height - 0.35, height + 0.35], color=color, linewidth=2.5)
    if default:
        alone = accuracies(default, "alone")[0]
        axes.axvline(statistics.mean(accuracies(default)), color="black", linewidth=0.8, linestyle=":")
        axes.axvline(alone, color="grey", linewidth=0.8)
        axes.annotate("student alone", (alone, -0.9), color="grey", ha="left", fontsize=8)
    axes.set(yticks=range(len(found)), yticklabels=[f"{row.section}: {row.name}" for row in found])
    axes.set(xlabel="accuracy on 500 held-out math tasks, guided (%)", ylim=(len(found) - 0.5, -1.3))
    axes.grid(axis="x", alpha=0.3)
    canvas.savefig(path, metadata={"Date": None})


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    if config.one:
        (row,) = (row for row in ROWS if row.key == config.one)
        run_one(row, config.seeds[0], config)
        return
    rows = [row for row in ROWS if row.section in config.rows]
    if not config.table:
        run_jobs([job(row, seed, config) for seed in config.seeds for row in rows], "ablation")
    found, default = {row: results(row, config.out) for row in rows}, results(ROWS[0], config.out)
    found = {row: records for row, records in found.items() if records}
    print(table(found, default))
    if config.figure:
        figure(found, default, config.figure)


if __name__ == "__main__":
    run_script(main)
