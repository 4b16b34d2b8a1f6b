"""Does it compound? The closed loop against its counterfactuals, round by round, on held-out tasks of a domain the teacher is new to.

    python -m benchmarks.compounding                        # after train_sft.py; three rounds on crm
    python -m benchmarks.compounding --domain telecom --out runs/nano/compounding-telecom

    both          runtime -> export -> train_grpo.py --traces -> promotion (`runtime_loop.py --rounds`)
    online        the runtime alone: the teacher stays, the strategies learn from the same tasks
    offline       GRPO alone: as many steps on the teacher's own mathematics, which needs no runtime
    fine-tuning   the student itself is trained on its right answers to the same tasks (train_sft.py), and answers alone
    few-shot      the student answers alone after --shots of those answers

Every arm has seen the same tasks after each round, or done the same number of steps. All are tested greedily on the same held-out tasks,
so differences to the student alone are paired. Results are files; the same command continues with what is missing.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from nano_atlas import protocol, world
from nano_atlas.checkpoint import is_checkpoint
from nano_atlas.config import option, parse, run_script, to_json
from nano_atlas.data import Problem, derive_seed, write_jsonl
from nano_atlas.episode import EpisodeConfig, sketch_problems, teach
from nano_atlas.errors import UserError
from nano_atlas.reward import RewardConfig
from nano_atlas.runs import read_json, write_json
from nano_atlas.runtime.agents import open_agent
from nano_atlas.runtime.deploy import read_deployment
from nano_atlas.runtime.strategies import Strategies
from nano_atlas.runtime.traces import read_traces
from nano_atlas.seats import Generation, Question, Seat
from nano_atlas.stats import mean_in_points

ROOT = Path(__file__).parents[1]
ARMS = ("both", "online", "offline", "fine-tuning", "few-shot")


@dataclass(frozen=True)
class Config:
    domain: str = option("crm", "domain of the deployed pair", list(world.DOMAINS), group="experiment")
    rounds: int = option(3, "rounds")
    tasks: int = option(200, "tasks per round")
    steps: int = option(10, "GRPO steps per round")
    shots: int = option(3, "examples of the few-shot arm")
    held_out: int = option(500, "tasks that all arms are tested on")
    student: str = option(str(world.STUDENT), "checkpoint of the student")
    teacher: str = option("runs/nano/teacher-sft/model", "checkpoint of the teacher at the start")
    probe_tokens: int = option(40, "longest student approach (tokens)")
    teaching_tokens: int = option(96, "longest teacher completion (tokens)")
    answer_tokens: int = option(120, "longest student answer (tokens)")
    train_options: str = option("", "further options of train_grpo.py, as one text")
    tune_options: str = option(
        "--epochs 3 --lr 1e-3", "options of train_sft.py for the fine-tuned student, as one text"
    )
    seed: int = option(0, "of tasks and sampling")
    out: Path = option(Path("runs/nano/compounding"), "directory of the results")


def call(script: str, *options: object) -> None:
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    if subprocess.run(command, cwd=Path.cwd()).returncode != 0:
        raise UserError(
            f"{shlex.join(command)} failed; its message is above. The same command continues here"
        )


def lengths(config: Config) -> list[object]:
    names = ("probe_tokens", "teaching_tokens", "answer_tokens")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", getattr(config, name))]


def run_arms(config: Config) -> None:
    """Everything that makes the models and traces of all arms; each command continues or does nothing where it is done."""
    whole = config.rounds * config.tasks
    train = f"--steps {config.steps} --eval-every 0 --held-out 0 {shlex.join(map(str, lengths(config)))} {config.train_options}"
    common = [
        "--domain",
        config.domain,
        "--count",
        whole,
        "--student",
        config.student,
        "--teacher",
        config.teacher,
        "--seed",
        config.seed,
        *lengths(config),
    ]
    call(
        "runtime_loop.py",
        *common,
        "--rounds",
        config.rounds,
        "--held-out-count",
        config.held_out,
        "--train-options",
        train,
        "--out",
        config.out / "both",
    )
    call("runtime_loop.py", *common, "--out", config.out / "online")
    teacher = config.teacher
    for number in range(1, config.rounds + 1):
        out = config.out / f"offline-{number}"
        if not is_checkpoint(out / "model"):
            call(
                "train_grpo.py",
                "--teacher",
                teacher,
                "--student",
                config.student,
                "--out",
                out,
                "--seed",
                config.seed + number,
                *shlex.split(train),
            )
        teacher = str(out / "model")
        tuned = config.out / f"tuned-{number}"
        if not is_checkpoint(tuned / "model"):
            write_jsonl(
                config.out / f"tuning-{number}.jsonl",
                [{"messages": chat} for chat in right_answers(config, number)],
            )
            call(
                "train_sft.py",
                "--model",
                config.student,
                "--data",
                config.out / f"tuning-{number}.jsonl",
                "--out",
                tuned,
                *shlex.split(config.tune_options),
            )


def right_answers(config: Config, rounds: int) -> list[protocol.Messages]:
    """Chats with the right answers that the student gave, alone or guided, to the tasks of the first rounds."""
    chats = []
    for trace in list(read_traces(config.out / "online/traces.jsonl"))[: rounds * config.tasks]:
        attempts = trace["steps"][0]["metadata"]["attempt_history"]
        text = next((attempt["text"] for attempt in attempts if attempt["score"] == 1.0), None)
        if text is not None:
            chats.append([*protocol.baseline_messages(trace["task"]), {"role": "assistant", "content": text}])
    if not chats:
        raise UserError(
            f"the student answered none of the first {rounds * config.tasks} tasks, so there is nothing to tune it on"
        )
    return chats


def best_style(config: Config, rounds: int) -> str:
    """The strategy that has earned most per session in the first rounds."""
    bandit = Strategies(tuple(protocol.TEACHING_STYLES))
    for trace in list(read_traces(config.out / "online/traces.jsonl"))[: rounds * config.tasks]:
        bandit.learn(config.domain, trace["outcome"]["strategy"], trace["outcome"]["reward"])
    known = bandit.history(config.domain)["strategies"]
    return max(known, key=lambda name: known[name]["average_score"], default="adaptive")


def measure(config: Config, arm: str, number: int, problems: Sequence[Problem], student: Seat) -> list[int]:
    """Which held-out tasks the arm solves after round `number`; round 0 is where all arms but few-shot start."""
    greedy = EpisodeConfig(config.probe_tokens, config.teaching_tokens, config.answer_tokens).greedy()
    if arm in ("both", "online", "offline"):
        place, style = config.teacher, "adaptive"
        if arm == "offline" and number:
            place = str(config.out / f"offline-{number}/model")
        elif arm == "both" and number:
            place = read_json(config.out / f"both/round-{number}/promotion.json")["teacher"]
        elif arm == "online" and number:
            style = best_style(config, number)
        sketches = sketch_problems(student, problems, greedy, "compounding")
        groups = teach(
            student,
            open_agent(place),
            sketches,
            greedy,
            RewardConfig(),
            "compounding",
            styles=[style] * len(sketches),
        )
        return [int(episode.guided.is_correct) for (episode,) in groups]
    shots: protocol.Messages = []
    if arm == "few-shot" and number:
        shots = [message for chat in right_answers(config, number)[: config.shots] for message in chat]
    if arm == "fine-tuning" and number:
        student = open_agent(str(config.out / f"tuned-{number}/model"))
    answering = Generation(config.answer_tokens, 0.0)
    replies = student.ask(
        [
            Question(
                shots + protocol.baseline_messages(p.question), answering, derive_seed("compounding", p.id)
            )
            for p in problems
        ]
    )
    return [
        int(protocol.is_correct(protocol.extract_answer(reply.text), p.answer))
        for (reply,), p in zip(replies, problems)
    ]


def table(config: Config, results: dict[str, list[list[int]]]) -> str:
    """Accuracy in % per arm and round; the difference of the last round to the student alone with its 95 % interval."""
    alone = results["few-shot"][0]
    lines = [
        f"**{config.domain}: {len(alone)} held-out tasks, {config.tasks} tasks and {config.steps} steps per round**",
        "",
        "| | "
        + " | ".join(f"round {n}" for n in range(config.rounds + 1))
        + " | Δ to the student alone | Δ to round 0 |",
        "| --- |" + " ---: |" * (config.rounds + 3),
    ]
    for arm, rows in results.items():
        cells = [f"{100 * fmean(row):.1f}" for row in rows]
        for base in (alone, rows[0]):
            cells.append(mean_in_points([after - before for before, after in zip(base, rows[-1])]))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Promotions: {promotions(config)}."])


def promotions(config: Config) -> str:
    files = [read_json(config.out / f"both/round-{n}/promotion.json") for n in range(1, config.rounds + 1)]
    in_service = read_deployment(config.out / "both/deploy.yaml")["teacher"].spec
    decisions = [
        f"round {n}: {'yes' if f['is_promoted'] else 'no'}, {f['reason']}" for n, f in enumerate(files, 1)
    ]
    return "; ".join([*decisions, f"in service: {in_service}"])


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    config.out.mkdir(parents=True, exist_ok=True)
    saved = read_json(config.out / "compounding.json")
    if saved and saved != to_json(config):
        raise UserError(f"{config.out} holds results of other options; choose another --out")
    write_json(config.out / "compounding.json", to_json(config))
    run_arms(config)
    problems, student = (
        world.held_out(config.domain, config.held_out, f"compounding/{config.seed}"),
        open_agent(config.student),
    )
    results: dict[str, list[list[int]]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        for number in range(config.rounds + 1):
            path = config.out / f"result-{arm}-{number}.json"
            if not path.exists():
                write_json(path, {"solved": measure(config, arm, number, problems, student)})
            results[arm].append(read_json(path)["solved"])
    (config.out / "compounding.md").write_text(table(config, results) + "\n")
    print(table(config, results))


if __name__ == "__main__":
    run_script(main)
