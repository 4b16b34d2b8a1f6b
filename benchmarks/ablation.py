"""What each choice of the method is worth, and what each fault of the published code costs: one table, one figure.

    python train_sft.py                              # first, the nano world's teacher and its demonstrations
    python -m benchmarks.ablation                    # every row with three seeds; the same command continues an interrupted run
    python -m benchmarks.ablation --rows default "KL" --seeds 0 1 2 3 4
    python -m benchmarks.ablation --table --figure ablation.svg      # only show what is there
    python -m benchmarks.ablation --rows default "advantage scale" --student DIR --teacher DIR --out runs/ablation-2    # of another student

Each run is GRPO from the same SFT checkpoint with one thing changed, evaluated greedily on held-out tasks of all three domains. A
seed fixes the order of the problems and all samples; the student and, but for the rows on SFT, the teacher's SFT checkpoint are
the same everywhere. A fault is switched on here, by replacing one function of the code that is right; nothing in the package knows of it.
"""

import argparse
import copy
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from tqdm import tqdm

import train_grpo
import train_sft
from nano_atlas import layout, protocol, stats, world
from nano_atlas.batching import Sample
from nano_atlas.data import Problem, derive_seed, read_jsonl
from nano_atlas.episode import Attempt, EpisodeConfig, Sketch, sketch_problems, teach, teaching_metrics
from nano_atlas.reward import RewardConfig
from nano_atlas.runs import read_json, write_json
from nano_atlas.seats import EmbeddedSeat, open_seat

NANO = Path("runs/nano")
GREEDY = EpisodeConfig(probe_tokens=40, teaching_tokens=96, answer_tokens=120).greedy()
TASKS = {"math": 500, "telecom": 150, "crm": 150}


# ---------------------------------------------------------------------------------------------------------------- faults


def gradient_on_the_bare_question(stack: ExitStack) -> None:
    """Sampled after question and approach, but scored after the question alone (teacher_trainers.py:392 of ATLAS)."""
    right = train_grpo.rollout_teaching

    def wrong(config, student, policy, problems, step):
        taught, groups = right(config, student, policy, problems, step)
        return taught, [
            [Sample(replace(sample.rollout, prompt_ids=bare), sample.advantage) for sample in group]
            for problem, group in zip(problems, groups)
            for bare in [tuple(policy.prompt_ids([{"role": "user", "content": problem.question}]))]
        ]

    stack.enter_context(patch.object(train_grpo, "rollout_teaching", wrong))


def sampler_never_updated(stack: ExitStack) -> None:
    """The sampler keeps the weights it started with."""

    class StaleSeat(EmbeddedSeat):
        def __init__(self, model, *arguments, **options):
            super().__init__(copy.deepcopy(model), *arguments, **options)
            self.sampler.sync = lambda model, version: 0.0

    stack.enter_context(patch.object(layout, "EmbeddedSeat", StaleSeat))


def whole_text_without_a_tag(stack: ExitStack) -> None:
    """A completion without <teaching> is handed to the student as a whole, private thoughts included."""

    def parse(completion: str) -> str | None:
        match = re.search(r"<teaching>(.*?)</teaching>", completion, re.DOTALL)
        return match[1].strip() if match else completion.strip() or None

    stack.enter_context(patch.object(protocol, "parse_teaching", parse))


def probe_and_baseline_for_each_teaching(stack: ExitStack) -> None:
    """Every member of a group gets a probe and baselines of its own, so that the group competes from different states."""

    def resampled(config, student, policy, problems, step):
        seed, size = (config.seed, "step", step), config.group_size
        copies = [replace(problem, id=f"{problem.id}#{i}") for problem in problems for i in range(size)]
        sketches = sketch_problems(student, copies, config, seed, config.baseline_samples)
        episodes = [episode for (episode,) in teach(student, policy, sketches, config, config, seed)]
        taught = [episodes[start : start + size] for start in range(0, len(episodes), size)]
        return taught, train_grpo.samples_of(config, taught)

    stack.enter_context(patch.object(train_grpo, "rollout_teaching", resampled))


# ------------------------------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True)
class Row:
    section: str
    name: str
    flags: tuple[str, ...] = ()  # of train_grpo.py
    fault: Callable[[ExitStack], None] | None = None
    demonstrations: int | None = None  # None: the checkpoint of `python train_sft.py`

    @property
    def key(self) -> str:
        return re.sub(r"\W+", "-", f"{self.section} {self.name}").strip("-").lower()


UNCHECKED = ("--max-logp-diff", "1e9")  # the check that stops such a run is switched off
ROWS = [
    Row("default", "as shipped"),
    Row("probe", "none", ("--probe-tokens", "0")),
    Row("probe", "8 tokens", ("--probe-tokens", "8")),
    Row("probe and baselines", "one probe, one baseline", ("--baseline-samples", "1")),
    Row("probe and baselines", "drawn anew for each teaching", fault=probe_and_baseline_for_each_teaching),
    *(Row("penalty for harm", value, ("--degradation-penalty", value)) for value in ("0", "1", "4")),
    *(
        Row(
            "advantage scale",
            f"{scale}, brevity {weight}",
            ("--advantage-scale", scale, "--efficiency-weight", weight),
        )
        for scale in ("none", "batch", "std")
        for weight in ("0", "1", "2")
        if (scale, weight) != ("none", "1")
    ),
    *(Row("learning rate", value, ("--lr", value)) for value in ("5e-5", "1e-3")),
    Row("KL", "none", ("--beta", "0")),
    Row("KL", "exact", ("--kl", "exact")),
    Row("group size", "2 (64 problems)", ("--group-size", "2", "--problems-per-step", "64")),
    Row("group size", "32 (4 problems)", ("--group-size", "32", "--problems-per-step", "4")),
    Row("SFT", "no demonstration", demonstrations=0),
    Row("SFT", "90 demonstrations", demonstrations=90),
    Row("fault", "log-probs after the bare question", UNCHECKED, gradient_on_the_bare_question),
    Row("fault", "sampler never updated", UNCHECKED, sampler_never_updated),
    Row("fault", "whole text where the tag is missing", fault=whole_text_without_a_tag),
    Row(
        "fault",
        "reference mixed 0.9 every 2 steps",
        ("--reference-mixing", "0.9", "--reference-mixing-every", "2"),
    ),
]


# ------------------------------------------------------------------------------------------------------------------ runs


class Pair(NamedTuple):
    """Checkpoints that all rows start from."""

    student: Path
    teacher: Path  # OUT/model of train_sft.py


def teacher_before_grpo(row: Row, seed: int, out: Path, pair: Pair) -> Path:
    if row.demonstrations is None:
        return pair.teacher
    if row.demonstrations == 0:
        return pair.student
    sft = pair.teacher.parent
    every = [record for _, record in read_jsonl(sft / "demonstrations.jsonl")]
    few = out / "demonstrations.jsonl"
    few.write_text("".join(json.dumps(record) + "\n" for record in every[: row.demonstrations]))
    steps = str(
        read_json(train_sft.latest_training_state(sft / "state") / "state.json")["step"]
    )  # as many as with all
    train_sft.main(
        [
            "--model",
            str(pair.student),
            "--data",
            str(few),
            "--steps",
            steps,
            "--seed",
            str(seed),
            "--out",
            str(out / "sft"),
        ]
    )
    return out / "sft/model"


def run_one(row: Row, seed: int, steps: int, out: Path, pair: Pair) -> None:
    out.mkdir(parents=True, exist_ok=True)
    teacher = teacher_before_grpo(row, seed, out, pair)
    with ExitStack() as stack:
        if row.fault:
            row.fault(stack)
        train_grpo.main(["--student", str(pair.student), "--teacher", str(teacher), "--out", str(out / "grpo"), "--seed", str(seed), "--steps",
                         str(steps), "--eval-every", "0", *row.flags])  # fmt: skip
    record = {
        "row": row.key,
        "seed": seed,
        "steps": steps,
        **evaluate(out / "grpo/model", row, out.parents[1], pair.student),
    }
    write_json(out / "result.json", record)


def sketches_of(
    student: EmbeddedSeat, problems: list[Problem], config: EpisodeConfig, path: Path
) -> list[Sketch]:
    """What the student does alone is the same in every run: it is kept in a file."""
    if not path.exists():
        sketches = sketch_problems(student, problems, config, 0)
        write_json(
            path,
            {
                "sketches": [
                    [s.approach, s.approach_tokens, [asdict(a) for a in s.baselines]] for s in sketches
                ]
            },
        )
    stored = read_json(path)["sketches"]
    return [
        Sketch(p, text, tokens, [Attempt(**a) for a in alone])
        for p, (text, tokens, alone) in zip(problems, stored, strict=True)
    ]


def evaluate(teacher: Path, row: Row, place: Path, student: Path) -> dict:
    """Correctness on each held-out task, alone and guided; the protocol is the right one, whatever the training did."""
    probe_tokens = (
        int(row.flags[row.flags.index("--probe-tokens") + 1])
        if "--probe-tokens" in row.flags
        else GREEDY.probe_tokens
    )
    config = replace(GREEDY, probe_tokens=probe_tokens)
    seat, policy = (open_seat(str(path)) for path in (student, teacher))
    record: dict[str, dict] = {}
    for domain, count in TASKS.items():
        sketches = sketches_of(
            seat,
            world.held_out(domain, count, "ablation"),
            config,
            place / f"alone-{domain}-{probe_tokens}.json",
        )
        episodes = [
            episode
            for (episode,) in teach(seat, policy, sketches, config, RewardConfig(), derive_seed("ablation"))
        ]
        record[domain] = {
            "alone": [round(e.sketch.baseline_accuracy) for e in episodes],
            "guided": [int(e.guided.is_correct) for e in episodes],
            **teaching_metrics(episodes),
        }
    return record


def run_all(rows: list[Row], seeds: list[int], steps: int, out: Path, workers: int, pair: Pair) -> None:
    """Each run in a process of its own (a fault ends with it), `workers` at a time."""
    missing = [
        (row, seed)
        for seed in seeds
        for row in rows
        if not (out / row.key / str(seed) / "result.json").exists()
    ]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers)), **os.environ}

    def run(job: tuple[Row, int]) -> None:
        row, seed = job
        place = out / row.key / str(seed)
        place.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "benchmarks.ablation",
            "--one",
            row.key,
            "--seeds",
            str(seed),
            "--steps",
            str(steps),
            "--out",
            str(out),
            "--student",
            str(pair.student),
            "--teacher",
            str(pair.teacher),
        ]
        with (place / "log.txt").open("w") as log:
            status = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if status:
            print(f"{row.section}, {row.name}, seed {seed} failed; see {place / 'log.txt'}", file=sys.stderr)

    with ThreadPoolExecutor(workers) as pool:
        list(tqdm(pool.map(run, missing), total=len(missing), desc="ablation", unit="run"))


# ----------------------------------------------------------------------------------------------------------------- table


def results(row: Row, out: Path) -> list[dict]:
    return [read_json(path) for path in sorted((out / row.key).glob("*/result.json"))]


def table(rows: list[Row], out: Path) -> str:
    """One line per row; every number is a mean over seeds, the bracket behind accuracy its smallest and largest seed."""
    default = {record["seed"]: record for record in results(ROWS[0], out)}
    lines = [
        "| changed | to | seeds | math, guided | against default | not worse | tokens taught | malformed | telecom | crm |",
        "|---|---|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        found = results(row, out)
        if not found:
            lines.append(f"| {row.section} | {row.name} | 0 | not run | | | | | | |")
            continue
        accuracy = [100 * statistics.mean(record["math"]["guided"]) for record in found]
        shared = [record for record in found if record["seed"] in default and row != ROWS[0]]
        pairs = zip(
            *(
                [g - d for g, d in zip(r["math"]["guided"], default[r["seed"]]["math"]["guided"])]
                for r in shared
            )
        )
        changes = [statistics.mean(pair) for pair in pairs]
        against = stats.mean_in_points(changes) if changes else ""

        def mean(domain: str, name: str) -> float:
            return statistics.mean(record[domain][name] for record in found)

        cells = [row.section, row.name, len(found), f"{statistics.mean(accuracy):.1f} [{min(accuracy):.1f}, {max(accuracy):.1f}]", against,
                 f"{100 * mean('math', 'non_degradation_rate'):.1f}", f"{mean('math', 'teaching_length_mean'):.0f}",
                 f"{100 * mean('math', 'malformed_rate'):.1f}",
                 *(f"{100 * mean(domain, 'student_accuracy'):.1f}" for domain in ("telecom", "crm"))]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def figure(rows: list[Row], out: Path, path: Path) -> None:
    """The table's accuracy on math: a dot per seed, a bar at their mean, a line where the default is."""
    import matplotlib.pyplot as plt  # pip install -e '.[bench]'

    plt.rcParams |= {"svg.hashsalt": "ablation", "font.size": 9, "svg.fonttype": "none"}
    found = {
        row: [100 * statistics.mean(record["math"]["guided"]) for record in results(row, out)] for row in rows
    }
    found = {row: values for row, values in found.items() if values}
    canvas, axes = plt.subplots(figsize=(8, 0.27 * len(found) + 0.8), layout="constrained")
    sections = list(dict.fromkeys(row.section for row in found))
    for height, (row, values) in enumerate(found.items()):
        color = f"C{sections.index(row.section) % 10}"
        axes.plot(values, [height] * len(values), "o", color=color, alpha=0.5, markersize=5)
        axes.plot([statistics.mean(values)] * 2, [height - 0.35, height + 0.35], color=color, linewidth=2.5)
    if ROWS[0] in found:
        axes.axvline(statistics.mean(found[ROWS[0]]), color="black", linewidth=0.8, linestyle=":")
    alone = [100 * statistics.mean(record["math"]["alone"]) for record in results(ROWS[0], out)]
    if alone:
        axes.axvline(alone[0], color="grey", linewidth=0.8)
        axes.annotate("student alone", (alone[0], -0.9), color="grey", ha="left", fontsize=8)
    axes.set(yticks=range(len(found)), yticklabels=[f"{row.section}: {row.name}" for row in found], ylim=(len(found) - 0.5, -1.3),
             xlabel="accuracy on 500 held-out math tasks, guided (%)")  # fmt: skip
    axes.grid(axis="x", alpha=0.3)
    canvas.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = list(dict.fromkeys(row.section for row in ROWS))
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=sections,
        default=sections,
        metavar="SECTION",
        help=f"of {', '.join(sections)}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16, help="GRPO steps of each run (default: 16)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument(
        "--student", type=Path, default=world.STUDENT, help="its checkpoint (default: the shipped one)"
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        default=NANO / "teacher-sft/model",
        help="OUT/model of train_sft.py (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=NANO / "ablation")
    parser.add_argument("--table", action="store_true", help="only print the table of what is there")
    parser.add_argument(
        "--figure",
        type=Path,
        help="also draw it, as an SVG file; needs matplotlib (pip install -e '.[bench]')",
    )
    parser.add_argument("--one", choices=[row.key for row in ROWS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    pair = Pair(options.student, options.teacher)
    if options.one:
        (row,) = (row for row in ROWS if row.key == options.one)
        run_one(row, options.seeds[0], options.steps, options.out / row.key / str(options.seeds[0]), pair)
        return
    rows = [row for row in ROWS if row.section in options.rows]
    if not options.table:
        run_all(rows, options.seeds, options.steps, options.out, options.workers, pair)
    print(table(rows, options.out))
    if options.figure:
        figure(rows, options.out, options.figure)


if __name__ == "__main__":
    main()
