"""Does the headline hold? README's main path with several seeds, on one and two threads, with the shipped student and with others.

    python -m benchmarks.robustness                   # all of it, an hour on two cores; the same command continues
    python -m benchmarks.robustness --students shipped --seeds 42 43
    python -m benchmarks.robustness --table           # only show what is there

Each run is `train_sft.py`, `train_grpo.py` and `eval.py` with one seed (of demonstrations, their order, problems and samples) in a directory of
its own, and then the answers that the student gives by the *whole plan*, which is the most that a teacher of this world can reach:

    headroom recovered = (GRPO - SFT) / (whole plan - SFT)        where there is any: 5 points or more

The other students come from nano_atlas/world/pretrain.py with another seed or other amounts of text; they are made first (4 to 9 minutes each).
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tqdm import tqdm

from nano_atlas import world
from nano_atlas.checkpoint import is_checkpoint
from nano_atlas.runs import read_json, replace_text, write_json
from nano_atlas.seats import open_seat
from nano_atlas.stats import in_points
from nano_atlas.world.pretrain import is_right

ROOT = Path(__file__).parents[1]
SHIPPED = "shipped"
HEADROOM = 0.05  # accuracy; a share of less than that says nothing
OTHERS = {  # options of pretrain.py
    "another seed": ("--seed", "3"),
    "weaker": ("--seed", "5", "--student-texts", "2000"),
    "stronger": ("--seed", "6", "--student-texts", "40000"),
    "good guesser": (
        "--seed",
        "7",
        "--hints",
        "0.15",
    ),  # as good by half a plan as by the whole: GRPO can only do harm
}


@dataclass(frozen=True)
class Run:
    student: str
    seed: int
    threads: int

    def place(self, out: Path) -> Path:
        return out / self.student.replace(" ", "-") / f"seed-{self.seed}-threads-{self.threads}"


def student_path(name: str, out: Path) -> Path:
    return world.STUDENT if name == SHIPPED else out / "students" / name.replace(" ", "-") / "shipped"


def call(log: Path, threads: int, *command: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        subprocess.run(
            [sys.executable, *map(str, command)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            check=True,
        )


def make_student(name: str, out: Path) -> None:
    place = student_path(name, out)
    if not is_checkpoint(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        call(
            place.parent / "log.txt",
            1,
            "-m",
            "nano_atlas.world.pretrain",
            "--out",
            place.parent,
            *OTHERS[name],
        )


def run_one(run: Run, out: Path, steps: int | None, tasks: int) -> None:
    """Every script continues where it was, or has nothing to do."""
    place, student = run.place(out), student_path(run.student, out)
    place.mkdir(parents=True, exist_ok=True)
    log, sft, grpo = place / "log.txt", place / "sft", place / "grpo"
    limited = () if steps is None else ("--steps", steps)
    call(
        log,
        run.threads,
        ROOT / "train_sft.py",
        "--model",
        student,
        "--seed",
        run.seed,
        "--out",
        sft,
        *limited,
    )
    call(log, run.threads, ROOT / "train_grpo.py", "--student", student, "--teacher", sft / "model", "--seed", run.seed, "--out", grpo,
         *limited)  # fmt: skip
    call(log, run.threads, ROOT / "eval.py", "--student", student, "--teacher", f"sft={sft / 'model'}", f"grpo={grpo / 'model'}",
         "--limit", tasks, "--out", place / "eval")  # fmt: skip
    write_json(place / "whole-plan.json", whole_plan(student, tasks))


def whole_plan(student: Path, count: int) -> dict[str, float]:
    """Per domain the student's accuracy (0 to 1) by the whole plan, on the tasks of eval.py."""
    seat = open_seat(str(student))
    tasks = {domain: world.held_out_tasks(domain, count, 0) for domain in world.DOMAINS}
    return {
        domain: sum(is_right(seat, [(task, world.plan(task.chain)) for task in tasks[domain]])) / count
        for domain in tasks
    }


def run_all(runs: list[Run], out: Path, steps: int | None, tasks: int) -> None:
    """As many at a time as there are cores for their threads."""
    failed = []
    others = sorted({run.student for run in runs} - {SHIPPED}, key=list(OTHERS).index)
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        list(
            tqdm(
                pool.map(lambda name: make_student(name, out), others),
                total=len(others),
                desc="students",
                disable=not others,
            )
        )
    missing = [run for run in runs if not (run.place(out) / "whole-plan.json").exists()]
    with tqdm(total=len(missing), desc="runs", unit="run") as progress:

        def attempt(run: Run) -> None:
            try:
                run_one(run, out, steps, tasks)
            except subprocess.CalledProcessError:
                failed.append(run)
            progress.update()

        for threads in sorted({run.threads for run in missing}):
            with ThreadPoolExecutor(max(1, cores // threads)) as pool:
                list(pool.map(attempt, [run for run in missing if run.threads == threads]))
    for run in failed:
        print(f"{run} failed; see {run.place(out) / 'log.txt'}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------- tables


def read(run: Run, out: Path) -> dict[str, dict] | None:
    """Per domain: accuracy of each arm (0 to 1), GRPO - SFT with its interval, and the headroom recovered."""
    if not (run.place(out) / "whole-plan.json").exists():
        return None
    whole, results = (
        read_json(run.place(out) / "whole-plan.json"),
        read_json(run.place(out) / "eval/results.json"),
    )
    found: dict[str, dict] = {}
    for score in results["scores"]:
        found.setdefault(score["domain"], {"whole": whole[score["domain"]]})[score["arm"]] = score["accuracy"]
    for difference in results["differences"]:
        row = found[difference["domain"]]
        headroom = row["whole"] - row["sft"]
        row |= {"gain": difference["delta"], "interval": difference["interval"],
                "recovered": (row["grpo"] - row["sft"]) / headroom if headroom >= HEADROOM else None}  # fmt: skip
    return found


def table(runs: list[Run], out: Path) -> str:
    """One line per run and domain."""
    lines = [
        "| student | seed | threads | domain | alone | SFT | GRPO | whole plan | GRPO − SFT | recovered | shuffled |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in runs:
        for domain, row in (read(run, out) or {}).items():
            numbers = [f"{100 * row[arm]:.1f}" for arm in ("student", "sft", "grpo", "whole")]
            cells = [run.student, run.seed, run.threads, domain, *numbers, in_points(row["gain"], row["interval"]),
                     "–" if row["recovered"] is None else f"{100 * row['recovered']:.0f} %", f"{100 * row['shuffled']:.1f}"]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def summary(runs: list[Run], out: Path) -> str:
    """One line per student and domain: median over its runs, smallest and largest in brackets."""
    lines = [
        "| student | domain | runs | alone | SFT | GRPO | whole plan | GRPO − SFT | lowest interval | recovered |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]

    def spread(values: list[float | None], unit: str = "") -> str:
        values = [value for value in values if value is not None]
        if not values:
            return "–"
        middle, low, high = (100 * value for value in (median(values), min(values), max(values)))
        return f"{middle:.1f}{unit}" if low == high else f"{middle:.1f} [{low:.1f}, {high:.1f}]{unit}"

    for student in dict.fromkeys(run.student for run in runs):
        found = [result for run in runs if run.student == student and (result := read(run, out))]
        for domain in found[0] if found else ():
            rows = [result[domain] for result in found]
            low = min(rows, key=lambda row: row["interval"][0])
            cells = [student, domain, len(rows), *(spread([row[arm] for row in rows]) for arm in ("student", "sft", "grpo", "whole")),
                     spread([row["gain"] for row in rows]), in_points(low["gain"], low["interval"]),
                     spread([row["recovered"] for row in rows], " %")]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [SHIPPED, *OTHERS]
    parser.add_argument(
        "--students", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[42, 43, 44, 45, 46],
        help="with the shipped student (default: 42 to 46)",
    )
    parser.add_argument(
        "--other-seeds",
        nargs="+",
        type=int,
        default=[42, 43, 44],
        help="with each other one (default: 42 to 44)",
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=int,
        default=[1, 2],
        help="with the shipped student (default: 1 2); others take 1",
    )
    parser.add_argument(
        "--steps", type=int, help="of SFT and of GRPO, instead of the preset's: for trying this out"
    )
    parser.add_argument("--tasks", type=int, default=500, help="held-out tasks per domain (default: 500)")
    parser.add_argument("--out", type=Path, default=Path("runs/robustness"))
    parser.add_argument("--table", action="store_true", help="only print the tables of what is there")
    options = parser.parse_args()
    runs = [Run(name, seed, threads) for name in options.students
            for seed in (options.seeds if name == SHIPPED else options.other_seeds)
            for threads in (options.threads if name == SHIPPED else [1])]  # fmt: skip
    if not options.table:
        run_all(runs, options.out, options.steps, options.tasks)
    text = f"{summary(runs, options.out)}\n\n{table(runs, options.out)}\n"
    if options.out.is_dir():
        replace_text(options.out / "tables.md", text)
    print(text)


if __name__ == "__main__":
    main()
