"""Does the headline hold? README's main path with several seeds, on one and two threads, with the shipped student and with others.

    python -m benchmarks.robustness                   # all of it, an hour on two cores; the same command continues
    python -m benchmarks.robustness --students shipped --seeds 42 43
    python -m benchmarks.robustness --table           # only show what is there
    python -m benchmarks.robustness --measure DIR     # a student alone, by half a plan, by the whole, by another problem's

Each run is `train_sft.py`, `train_grpo.py` and `eval.py` with one seed (of demonstrations, their order, problems and samples) in a
directory of its own. *Whole plan* is the student's accuracy when it is told the order of all steps, the most that a teacher can reach:

    headroom recovered = (GRPO - SFT) / (whole plan - SFT)        where there is any: 5 points or more

The other students are made first, by benchmarks/pretrain.py with another seed or other amounts of text (4 to 9 minutes each).
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.jobs import ROOT, Job, call, markdown, run_jobs
from nano_atlas import world
from nano_atlas.answers import extract_answer, is_correct
from nano_atlas.config import option, parse, run_script
from nano_atlas.protocol import guided_messages
from nano_atlas.runs import read_json, replace_text, write_json
from nano_atlas.seats import Generation, Question, Seat, open_seat
from nano_atlas.stats import in_points

SHIPPED = "shipped"
HELP = ("alone", "half a plan", "whole plan", "another's plan")
HEADROOM = 0.05  # accuracy; a share of less than that says nothing
OTHERS = {  # options of pretrain.py
    "another seed": "--seed 3",
    "weaker": "--seed 5 --texts 8000 60000 2000",
    "stronger": "--seed 6 --texts 8000 60000 40000",
    "good guesser": "--seed 7 --hints 0.15",  # as good by half a plan as by the whole: GRPO can only do harm
}


@dataclass(frozen=True)
class Config:
    students: tuple[str, ...] = option((SHIPPED, *OTHERS), "students", [SHIPPED, *OTHERS])
    seeds: tuple[int, ...] = option((42, 43, 44, 45, 46), "with the shipped student")
    other_seeds: tuple[int, ...] = option((42, 43, 44), "with each other student")
    threads: tuple[int, ...] = option((1, 2), "with the shipped student; the others have one")
    steps: int | None = option(None, "of SFT and of GRPO, instead of the preset's: for trying this out")
    tasks: int = option(500, "held-out tasks per domain")
    out: Path = option(Path("runs/robustness"), "directory of the runs")
    table: bool = option(False, "only print the tables of what is there")
    measure: tuple[Path, ...] = option((), "only measure these students by the help they get")


@dataclass(frozen=True)
class Run:
    student: str
    seed: int
    threads: int

    def place(self, out: Path) -> Path:
        return out / self.student.replace(" ", "-") / f"seed-{self.seed}-threads-{self.threads}"


def student_path(name: str, out: Path) -> Path:
    return world.STUDENT if name == SHIPPED else out / "students" / name.replace(" ", "-")


def make_student(name: str, out: Path) -> Job:
    place = student_path(name, out)
    command = ["-m", "benchmarks.pretrain", "--out", place, *OTHERS[name].split()]
    return Job(place, lambda: call(place.with_suffix(".log"), 1, *command))


def main_path(run: Run, config: Config) -> Job:
    """Every script continues where it was, or has nothing to do."""
    place, student = run.place(config.out), student_path(run.student, config.out)
    sft, grpo = place / "sft", place / "grpo"
    common = ["--seed", run.seed, *([] if config.steps is None else ["--steps", config.steps])]
    teachers = [f"sft={sft / 'model'}", f"grpo={grpo / 'model'}"]
    commands = [
        ["train_sft.py", "--model", student, "--out", sft, *common],
        ["train_grpo.py", "--student", student, "--teacher", sft / "model", "--out", grpo, *common],
        ["eval.py", "--student", student, "--teacher", *teachers, "--limit", config.tasks, "--out", place / "eval"],
    ]  # fmt: skip

    def work() -> None:
        for script, *options in commands:
            call(place / "log.txt", run.threads, ROOT / script, *options)
        write_json(place / "whole-plan.json", whole_plan(student, config.tasks))

    return Job(place / "whole-plan.json", work, run.threads)


def is_right(student: Seat, taught: Sequence[tuple], max_tokens: int = 120, progress=None) -> list[bool]:
    """Whether the student solves each task, greedily, with what it is told (None: nothing). taught: (task, told)."""
    greedy = Generation(max_tokens, temperature=0.0)
    questions = [Question(guided_messages(task.question, told), greedy, seed=0) for task, told in taught]
    answers = [extract_answer(reply.text) for (reply,) in student.ask(questions, progress)]
    return [is_correct(answer, task.answer) for answer, (task, _) in zip(answers, taught)]


def by_help(
    student: Seat, tasks: Sequence, told: dict[str, Sequence[str | None]], **more
) -> dict[str, float]:
    """The student's accuracy (0 to 1) by the kind of help. told: of each kind what is told about each task."""
    right = iter(is_right(student, [pair for texts in told.values() for pair in zip(tasks, texts)], **more))
    return {kind: sum(itertools.islice(right, len(tasks))) / len(tasks) for kind in told}


def whole_plan(student: Path, count: int) -> dict[str, float]:
    """Per domain the student's accuracy (0 to 1) by the whole plan, on the tasks of eval.py."""
    seat, shares = open_seat(str(student)), {}
    for domain in world.DOMAINS:
        tasks = world.held_out_tasks(domain, count, 0)
        shares[domain] = sum(is_right(seat, [(task, world.plan(task.chain)) for task in tasks])) / count
    return shares


def measure(student: Seat, domain: str, count: int) -> dict[str, float]:
    """Accuracy (0 to 1) on full-size problems, by the help that the student gets."""
    tasks = world.tasks(domain, count, "measure")
    plans = [world.plan(task.chain) for task in tasks]
    halves = [world.plan(task.chain, world.opening(task.chain)) for task in tasks]
    return by_help(student, tasks, dict(zip(HELP, ([None] * count, halves, plans, plans[-1:] + plans[:-1]))))


def read(run: Run, out: Path) -> dict[str, dict] | None:
    """Per domain: accuracy of each arm (0 to 1), GRPO - SFT with its interval, and the headroom recovered."""
    place = run.place(out)
    if not (place / "whole-plan.json").exists():
        return None
    whole, results = read_json(place / "whole-plan.json"), read_json(place / "eval/results.json")
    found = {domain: {"whole": share} for domain, share in whole.items()}
    for score in results["scores"]:
        found[score["domain"]][score["arm"]] = score["accuracy"]
    for difference in results["differences"]:
        row = found[difference["domain"]]
        gain, headroom = row["grpo"] - row["sft"], row["whole"] - row["sft"]
        row |= {"gain": difference["delta"], "interval": difference["interval"]}
        row["recovered"] = gain / headroom if headroom >= HEADROOM else None
    return found


def table(runs: list[Run], out: Path) -> str:
    """One line per run and domain."""
    head = "student | seed | threads | domain | alone | SFT | GRPO | whole plan | GRPO − SFT | recovered | shuffled"
    rows = []
    for run in runs:
        for domain, row in (read(run, out) or {}).items():
            recovered = "–" if row["recovered"] is None else f"{100 * row['recovered']:.0f} %"
            numbers = [f"{100 * row[arm]:.1f}" for arm in ("student", "sft", "grpo", "whole", "shuffled")]
            numbers[4:4] = [in_points(row["gain"], row["interval"]), recovered]
            rows.append([run.student, run.seed, run.threads, domain, *numbers])
    return markdown(head, rows, texts=4)


def summary(runs: list[Run], out: Path) -> str:
    """One line per student and domain: median over its runs, smallest and largest in brackets."""
    head = (
        "student | domain | runs | alone | SFT | GRPO | whole plan | GRPO − SFT | lowest interval | recovered"
    )

    def spread(rows: list[dict], name: str, unit: str = "") -> str:
        values = [100 * row[name] for row in rows if row[name] is not None]
        if not values:
            return "–"
        low, high = min(values), max(values)
        return f"{median(values):.1f}{f' [{low:.1f}, {high:.1f}]' if low < high else ''}{unit}"

    lines = []
    for student in dict.fromkeys(run.student for run in runs):
        found = [result for run in runs if run.student == student and (result := read(run, out))]
        for domain in found[0] if found else ():
            rows = [result[domain] for result in found]
            low = min(rows, key=lambda row: row["interval"][0])
            arms = [spread(rows, name) for name in ("student", "sft", "grpo", "whole", "gain")]
            lowest = in_points(low["gain"], low["interval"])
            lines.append([student, domain, len(rows), *arms, lowest, spread(rows, "recovered", " %")])
    return markdown(head, lines, texts=2)


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    for student in config.measure:
        seat = open_seat(str(student))
        shares = {domain: measure(seat, domain, config.tasks).values() for domain in world.DOMAINS}
        rows = [[domain, *(f"{100 * share:.1f}" for share in row)] for domain, row in shares.items()]
        print(markdown(" | ".join([str(student), *HELP]), rows))
    if config.measure:
        return
    grid = {name: (config.other_seeds, (1,)) for name in OTHERS} | {SHIPPED: (config.seeds, config.threads)}
    runs = [Run(name, *point) for name in config.students for point in itertools.product(*grid[name])]
    if not config.table:
        others = [make_student(name, config.out) for name in OTHERS if name in config.students]
        run_jobs(others, "students")
        run_jobs([main_path(run, config) for run in runs], "runs")
    text = f"{summary(runs, config.out)}\n\n{table(runs, config.out)}\n"
    if config.out.is_dir():
        replace_text(config.out / "tables.md", text)
    print(text)


if __name__ == "__main__":
    run_script(main)
