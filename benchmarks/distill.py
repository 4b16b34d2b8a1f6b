"""Three ways to learn from a better teacher, beside GRPO: what each costs in generated tokens, and what it gives.

    python -m benchmarks.distill                  # three seeds, 40 minutes on one core; the same command continues
    python -m benchmarks.distill --table          # only show what is there

The better teacher is the one that 40 steps of GRPO made, so that is also the most that can be expected. All start from the same SFT
teacher, except the last three. The informed teacher saw half of its demonstrations with the solution in the prompt, and these teach
the whole order of work:

    GRPO            on the student's gain: 5 and 20 steps, which generate as many tokens as 10 and 40 of distillation; and 40
    on-policy       --reward none --kl exact --reference GRPO: the policy's own teachings, each token scored by the better teacher
    off-policy      SFT on as many teachings of the better teacher, of the same problems (Kim and Rush 2016, arXiv:1606.07947)
    informed SFT    the SFT teacher that can also read a solution, without one
    privileged      the same, distilled from itself with the solution: --reward none --kl privileged. No better teacher
    control         SFT on the informed teacher's demonstrations with all solutions taken out of the prompts
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.jobs import ROOT, Job, call, markdown, run_jobs
from nano_atlas import world
from nano_atlas.config import option, parse, run_script
from nano_atlas.data import problems_of_step
from nano_atlas.episode import EpisodeConfig, episode, seeds
from nano_atlas.presets import NANO_SAMPLING
from nano_atlas.protocol import privileged_messages, teacher_messages, teacher_target
from nano_atlas.runs import read_json, read_jsonl, replace_text, write_jsonl
from nano_atlas.schedule import play
from nano_atlas.seats import open_seat
from nano_atlas.stats import in_points, paired_bootstrap

PER_STEP, GROUP, STEPS, PROBLEMS = 16, 8, 40, 4096  # of the preset nano
LENGTHS = {name: value for name, value in NANO_SAMPLING.items() if name.endswith("_tokens")}
ARMS = {  # name in the table -> directory of the teacher
    "SFT": "sft", "GRPO, 5 steps": "grpo-5", "GRPO, 20 steps": "grpo-20", "GRPO, 40 steps": "grpo", "on-policy, 10 steps": "on-10",
    "on-policy, 40 steps": "on", "off-policy": "off", "informed SFT": "informed", "privileged, 40 steps": "privileged", "control": "control",
}  # fmt: skip
PAIRS = [
    ("on-policy, 10 steps", "GRPO, 5 steps"),  # as many tokens
    ("on-policy, 40 steps", "GRPO, 20 steps"),  # as many tokens
    ("on-policy, 40 steps", "off-policy"),  # as many tokens
    ("on-policy, 40 steps", "GRPO, 40 steps"),  # the better teacher itself
    ("privileged, 40 steps", "GRPO, 40 steps"),
    ("privileged, 40 steps", "control"),
]


@dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = option((42, 43, 44), "seeds")
    tasks: int = option(500, "held-out tasks per domain")
    out: Path = option(Path("runs/distill"), "directory of the runs")
    table: bool = option(False, "only print the table of what is there")


def teachings(teacher: Path, seed: int) -> list[dict]:
    """Chats with the better teacher's teachings, of the problems and as many as the on-policy run has."""
    problems, config = world.training_problems(PROBLEMS, seed), EpisodeConfig(**LENGTHS)
    seats = {"student": open_seat(str(world.STUDENT)), "teacher": open_seat(str(teacher))}
    chosen = [
        problem for step in range(STEPS) for problem in problems_of_step(problems, step, PER_STEP, seed)
    ]
    scripts = [
        episode(problem, config, None, seeds(("off-policy", seed)), len, 0, GROUP) for problem in chosen
    ]
    made = [one for group in play(scripts, seats, "teachings") for one in group]
    return [{"messages": [*one.messages, {"role": "assistant", "content": one.reply.text}]} for one in made]


def informed_demonstrations(demonstrations: Path, seed: int, has_solution=True) -> list[dict]:
    """The nano world's demonstrations as chats; every second has the solution in the prompt (or not: the control), and what it
    teaches is the whole order."""
    solved = {task.question: task for task in world.tasks("math", 900, f"demonstrations/{seed}")}
    chats, rng = [], random.Random(f"informed/{seed}")
    for _, one in read_jsonl(demonstrations):
        task, told = solved[one["problem_text"]], one["teacher_teaching"]
        asked = teacher_messages(one["problem_text"], one["student_approach"], one["strategy"])
        if rng.random() < 0.5:
            asked = privileged_messages(asked, task.solution) if has_solution else asked
            told = world.plan(task.chain)
        answer = teacher_target(one["teacher_diagnosis"], told)
        chats.append({"messages": [*asked, {"role": "assistant", "content": answer}]})
    return chats


def main_path(seed: int, config: Config) -> Job:
    place = config.out / str(seed)

    def run(script: str, name: str, *options: object) -> None:
        """Every script continues where it was, or has nothing to do."""
        call(place / "log.txt", 1, ROOT / script, "--out", place / name, "--seed", seed, *options)

    def work() -> None:
        grpo = ["--student", world.STUDENT, "--teacher", place / "sft/model"]
        distilled = [*grpo, "--reward", "none", "--kl", "exact", "--reference", place / "grpo/model"]
        run("train_sft.py", "sft")
        run("train_grpo.py", "grpo", *grpo)
        for steps in (5, 20):
            run("train_grpo.py", f"grpo-{steps}", *grpo, "--steps", steps)
        run("train_grpo.py", "on", *distilled)
        run("train_grpo.py", "on-10", *distilled, "--steps", 10)
        if not (file := place / "teachings.jsonl").exists():
            write_jsonl(file, teachings(place / "grpo/model", seed))
        run(
            "train_sft.py", "off", "--model", place / "sft/model", "--data", file, "--epochs", 1, "--lr", 2e-4
        )
        for name, has_solution in (("informed", True), ("control", False)):
            if not (file := place / f"{name}.jsonl").exists():
                write_jsonl(
                    file, informed_demonstrations(place / "sft/demonstrations.jsonl", seed, has_solution)
                )
            run("train_sft.py", name, "--data", file)
        options = ["--student", world.STUDENT, "--teacher", place / "informed/model"]
        run("train_grpo.py", "privileged", *options, "--reward", "none", "--kl", "privileged")
        teachers = [f"{name}={place / name / 'model'}" for name in ARMS.values()]
        options = ["--teacher", *teachers, "--limit", config.tasks, "--control", "none"]
        call(place / "log.txt", 1, ROOT / "eval.py", "--out", place / "eval", *options)

    return Job(place / "eval/results.json", work)


def generated(run: Path) -> tuple[int, int]:
    """Tokens that the student and the policy generated in a run of train_grpo.py or, off-policy, in `teachings`."""
    if run.name in ("sft", "informed", "control"):
        return 0, 0
    if run.name == "off":
        return generated(run.with_name("on"))  # the same problems and as many teachings
    options, records = (
        read_json(run / "options.json"),
        [record for _, record in read_jsonl(run / "metrics.jsonl")],
    )
    episodes = options["problems_per_step"] * options["group_size"]
    policy = sum(episodes * record["completions/mean_length"] for record in records)
    probes = sum(options["problems_per_step"] * record["student_approach_length"] for record in records)
    answers = 0
    if options["reward"] != "none":  # an answer's length is not logged: that of the sampled episodes
        shown = [one for _, one in read_jsonl(run / "episodes.jsonl")]
        length = sum(one["guided"]["tokens"] for one in shown) / len(shown)
        answers = (
            len(records) * (episodes + options["problems_per_step"] * options["baseline_samples"]) * length
        )
    return round(probes + answers), round(policy)


def answers(place: Path) -> dict[tuple[str, str], dict[str, dict]]:
    """Of a finished seed's evaluation: by arm and domain, the result of each task by its id."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for _, one in read_jsonl(place / "eval/tasks.jsonl"):
        found.setdefault((one["arm"], one["domain"]), {})[one["id"]] = one
    return found


def table(config: Config) -> str:
    """One row per teacher, means over seeds, the smallest and largest seed in brackets; then the PAIRS by domain."""
    head = "teacher | seeds | student's tokens (1,000) | policy's | math | telecom | crm | leaks | tokens written"
    places = [config.out / str(seed) for seed in config.seeds]
    runs = {place: answers(place) for place in places if (place / "eval/results.json").exists()}
    rows = []
    for name, folder in ARMS.items():
        costs = [f"{fmean(side) / 1000:.0f}" for side in zip(*(generated(place / folder) for place in runs))]
        shown = []
        for domain in world.DOMAINS:
            right = [
                fmean(one["attempt"]["score"] for one in of[folder, domain].values()) for of in runs.values()
            ]
            shown.append(f"{100 * fmean(right):.1f} [{100 * min(right):.1f}, {100 * max(right):.1f}]")
        every = [
            one for of in runs.values() for domain in world.DOMAINS for one in of[folder, domain].values()
        ]
        shown += [
            f"{100 * fmean(one['is_leak'] for one in every):.1f}",
            f"{fmean(one['teacher_tokens'] for one in every):.0f}",
        ]
        rows.append([name, len(runs), *costs, *shown])
    pairs = [
        [f"{new} − {old}", *(against(runs, new, old, domain) for domain in world.DOMAINS)]
        for new, old in PAIRS
    ]
    return f"{markdown(head, rows)}\n\n{markdown('difference | math | telecom | crm', pairs)}"


def against(runs: dict[Path, dict], new: str, old: str, domain: str) -> str:
    """The paired difference over all seeds' tasks, in points, with its 95 % interval."""
    changes = [
        one["attempt"]["score"] - of[ARMS[old], domain][name]["attempt"]["score"]
        for of in runs.values()
        for name, one in of[ARMS[new], domain].items()
    ]
    return in_points(fmean(changes), paired_bootstrap(changes))


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    if not config.table:
        run_jobs([main_path(seed, config) for seed in config.seeds], "distillation")
    text = table(config)
    replace_text(config.out / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_script(main)
