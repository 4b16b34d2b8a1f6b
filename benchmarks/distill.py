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


def table(config: Config) -> str:
    head = "teacher | seeds | student's tokens (1,000) | policy's | math | telecom | crm | against SFT, math | leaks | tokens written"
    rows = []
    places = [
        place
        for seed in config.seeds
        if (place := config.out / str(seed), (place / "eval/results.json").exists())[1]
    ]
    for name, folder in ARMS.items():
        found = [
            score
            for place in places
            for score in read_json(place / "eval/results.json")["scores"]
            if score["arm"] == folder
        ]
        if not found:
            continue
        of = {domain: [score for score in found if score["domain"] == domain] for domain in world.DOMAINS}

        def spread(values: list[float]) -> str:
            return f"{100 * sum(values) / len(values):.1f} [{100 * min(values):.1f}, {100 * max(values):.1f}]"

        tokens = [generated(place / folder) for place in places]
        costs = [f"{sum(side) / len(side) / 1000:.0f}" for side in zip(*tokens)]
        rows.append([name, len(places), *costs, *(spread([s["accuracy"] for s in of[d]]) for d in world.DOMAINS),
                     against(places, folder), f"{100 * sum(s['leak'] for s in of['math']) / len(places):.1f}",
                     f"{sum(written(place, folder) for place in places) / len(places):.0f}"])  # fmt: skip
    return markdown(head, rows)


def answers_of(place: Path, folder: str) -> dict[str, dict]:
    found = (record for _, record in read_jsonl(place / "eval/tasks.jsonl"))
    return {one["id"]: one for one in found if one["arm"] == folder and one["domain"] == "math"}


def written(place: Path, folder: str) -> float:
    """Mean tokens of the policy's greedy completion on math."""
    found = answers_of(place, folder).values()
    return sum(one["teacher_tokens"] for one in found) / len(found)


def against(places: list[Path], folder: str) -> str:
    """The paired difference to the SFT teacher on math over all seeds' tasks, in points, with its 95 % interval."""
    changes: list[float] = []
    for place in places:
        sft, own = answers_of(place, "sft"), answers_of(place, folder)
        changes += [own[name]["attempt"]["score"] - sft[name]["attempt"]["score"] for name in own]
    return in_points(sum(changes) / len(changes), paired_bootstrap(changes))


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    if not config.table:
        run_jobs([main_path(seed, config) for seed in config.seeds], "distillation")
    text = table(config)
    replace_text(config.out / "table.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_script(main)
