"""Does it compound? The closed loop against its counterfactuals, round by round, on held-out tasks of a domain the teacher is new to.

    python -m benchmarks.compounding                        # after train_sft.py; three rounds on crm

    both          runtime -> export -> train_grpo.py --problems -> promotion (`runtime_loop.py --rounds`)
    online        the runtime alone: the teacher stays, the strategies learn from the same tasks
    offline       GRPO alone: as many steps on the teacher's own mathematics, which needs no runtime
    fine-tuning   the student itself is trained on its right answers to the same tasks (train_sft.py), and answers alone
    few-shot      the student answers alone after three of those answers

Every arm has seen the same tasks after each round, or done the same number of steps. All are tested greedily on the same held-out tasks,
so differences to the student alone are paired. Results are files; the same command continues with what is missing.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

from benchmarks.jobs import mean_in_points
from nano_atlas import world
from nano_atlas.answers import extract_answer, is_correct
from nano_atlas.checkpoint import is_checkpoint
from nano_atlas.config import derive_seed, option, parse, run_script, to_json
from nano_atlas.data import Problem
from nano_atlas.episode import EpisodeConfig, seeds, sketch, teach
from nano_atlas.errors import UserError
from nano_atlas.presets import NANO_SAMPLING
from nano_atlas.protocol import Messages, baseline_messages
from nano_atlas.reward import RewardConfig
from nano_atlas.runs import read_json, write_json, write_jsonl
from nano_atlas.runtime.agents import open_agent
from nano_atlas.runtime.deploy import call, read_deployment
from nano_atlas.runtime.traces import read_traces
from nano_atlas.schedule import play
from nano_atlas.seats import Generation, Question, Seat

LENGTHS = {name: value for name, value in NANO_SAMPLING.items() if name.endswith("_tokens")}
SHOTS = 3  # examples of the few-shot arm
ARMS = ("both", "online", "offline", "fine-tuning", "few-shot")


@dataclass(frozen=True)
class Config:
    domain: str = option("crm", "domain of the deployed pair", list(world.DOMAINS), group="experiment")
    rounds: int = option(3, "rounds", above=0)
    tasks: int = option(200, "tasks per round", above=0)
    steps: int = option(10, "GRPO steps per round", above=0)
    held_out: int = option(500, "tasks that all arms are tested on", above=0)
    student: str = option(str(world.STUDENT), "checkpoint of the student")
    teacher: str = option("runs/nano/teacher-sft/model", "checkpoint of the teacher at the start")
    train_options: str = option("", "further options of train_grpo.py, as one text")
    tune_options: str = option("--epochs 3 --lr 1e-3", "options of train_sft.py for the fine-tuned student")
    seed: int = option(0, "of tasks and sampling")
    out: Path = option(Path("runs/nano/compounding"), "directory of the results")


def run_arms(config: Config) -> None:
    """Everything that makes the models and traces of all arms; each command continues or does nothing where it is done."""
    pair = {"student": config.student, "teacher": config.teacher}
    work = {"domain": config.domain, "count": config.rounds * config.tasks, "seed": config.seed, **pair}
    train = f"--steps {config.steps} --eval-every 0 --eval-problems 0 {config.train_options}"
    deciding = config.out / "promotion.jsonl"
    problems = world.held_out(config.domain, config.held_out, f"promotion/{config.seed}")
    write_jsonl(deciding, [asdict(problem) for problem in problems])
    out = config.out / "both"
    call("runtime_loop.py", rounds=config.rounds, held_out=deciding, train_options=train, out=out, **work)
    call("runtime_loop.py", out=config.out / "online", **work)
    for number in range(1, config.rounds + 1):
        out = config.out / f"offline-{number}"
        if not is_checkpoint(out / "model"):
            call("train_grpo.py", train, seed=config.seed + number, out=out, **pair)
        pair["teacher"] = str(out / "model")
        out, data = config.out / f"tuned-{number}", config.out / f"tuning-{number}.jsonl"
        if not is_checkpoint(out / "model"):
            write_jsonl(data, [{"messages": chat} for chat in right_answers(config, number)])
            call("train_sft.py", config.tune_options, model=config.student, data=data, out=out)


def right_answers(config: Config, rounds: int) -> list[Messages]:
    """Chats with the right answers that the student gave, alone or guided, to the tasks of the first rounds."""
    chats = []
    for _, trace in islice(read_traces(config.out / "online/traces.jsonl"), rounds * config.tasks):
        attempts = trace["steps"][0]["metadata"]["attempt_history"]
        text = next((trial["text"] for trial in attempts if trial["verdict"]["score"] == 1.0), None)
        if text is not None:
            chats.append([*baseline_messages(trace["task"]), {"role": "assistant", "content": text}])
    if not chats:
        raise UserError(f"the student solved no task in the first {rounds} rounds: nothing to tune it on")
    return chats


def best_style(config: Config, rounds: int) -> str:
    """The strategy that has earned most per session in the first rounds."""
    rewards: dict[str, list[float]] = {}
    for outcome, _ in islice(read_traces(config.out / "online/traces.jsonl"), rounds * config.tasks):
        if outcome.reward is not None:
            rewards.setdefault(outcome.strategy, []).append(outcome.reward)
    return max(sorted(rewards), key=lambda style: fmean(rewards[style]), default="adaptive")


def measure(config: Config, arm: str, number: int, problems: Sequence[Problem], student: Seat) -> list[int]:
    """Which held-out tasks the arm solves after round `number`; round 0 is where all arms but few-shot start."""
    if arm in ("fine-tuning", "few-shot"):
        chats = right_answers(config, number)[:SHOTS] if arm == "few-shot" and number else []
        if arm == "fine-tuning" and number:
            student = open_agent(str(config.out / f"tuned-{number}/model"))
        shots = [message for chat in chats for message in chat]
        asked = [(shots + baseline_messages(p.question), derive_seed("compounding", p.id)) for p in problems]
        answering = Generation(LENGTHS["answer_tokens"], 0.0)
        replies = student.ask([Question(messages, answering, seed) for messages, seed in asked])
        return [
            int(is_correct(extract_answer(reply.text), p.answer)) for (reply,), p in zip(replies, problems)
        ]
    place = config.teacher
    if number and arm != "online":
        offline = str(config.out / f"offline-{number}/model")
        place = offline if arm == "offline" else promotion(config, number)["teacher"]
    style = best_style(config, number) if number and arm == "online" else "adaptive"
    greedy, seed = EpisodeConfig(**LENGTHS).greedy(), seeds("compounding")
    seats = {"student": student, "teacher": open_agent(place)}
    sketches = play([sketch(problem, greedy, seed) for problem in problems], seats)
    count_tokens, rewards = seats["teacher"].count_tokens, RewardConfig()
    scripts = [teach(alone, greedy, rewards, seed, count_tokens, style=style) for alone in sketches]
    return [int(episode.guided.is_correct) for (episode,) in play(scripts, seats)]


def promotion(config: Config, number: int) -> dict:
    return read_json(config.out / f"both/round-{number}/promotion.json")


def table(config: Config, results: dict[str, list[list[int]]]) -> str:
    """Accuracy in % per arm and round; the difference of the last round to the student alone with its 95 % interval."""
    alone = results["few-shot"][0]
    rounds = " | ".join(f"round {number}" for number in range(config.rounds + 1))
    size = f"{len(alone)} held-out tasks, {config.tasks} tasks and {config.steps} steps per round"
    lines = [f"**{config.domain}: {size}**", "", f"| | {rounds} | Δ to the student alone | Δ to round 0 |"]
    lines.append("| --- |" + " ---: |" * (config.rounds + 3))
    for arm, rows in results.items():
        cells = [f"{100 * fmean(row):.1f}" for row in rows]
        for base in (alone, rows[0]):
            cells.append(mean_in_points([after - before for before, after in zip(base, rows[-1])]))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    made = {number: promotion(config, number) for number in range(1, config.rounds + 1)}
    said = [f"round {n}: {'yes' if made[n]['is_promoted'] else 'no'}, {made[n]['reason']}" for n in made]
    in_service = read_deployment(config.out / "both/deploy.yaml")["teacher"]["spec"]
    return "\n".join([*lines, "", f"Promotions: {'; '.join(said)}; in service: {in_service}."])


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    saved = read_json(config.out / "compounding.json")
    if saved and saved != to_json(config):
        raise UserError(f"{config.out} holds results of other options; choose another --out")
    write_json(config.out / "compounding.json", to_json(config))
    run_arms(config)
    problems = world.held_out(config.domain, config.held_out, f"compounding/{config.seed}")
    student = open_agent(config.student)
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
