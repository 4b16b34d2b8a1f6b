"""τ²-bench: the student talks to a simulated user who has a problem, and to tools that could solve it; with and without a teacher.

    python eval.py --bench tau2 --dry-run                                             # what would run, and its floors
    python eval.py --bench tau2 --tasks mms_issue --student URL --teacher grpo=URL --user URL --out runs/mms
    python eval.py --bench tau2 --user solo ...                                       # from the ticket, without a user
    python eval.py --bench tau2 --out runs/mms --tables                               # the tables again
    tau2 view --file runs/mms/tau2-grpo.json                                          # the dialogues

The official package runs and scores each dialogue (dialogue.py); this file says which, and what became of them. The arms are those
of eval.py without the votes: dialogues change the world, so one cannot choose among them afterwards. Student and user are URLs: a
server computes the prompt that each turn repeats (8,000 tokens) only once, and parses tool calls in each family's format
(`vllm serve MODEL --enable-auto-tool-choice --tool-call-parser hermes` for Qwen3).

A dialogue that a seat breaks off (no text, malformed call, outgrown context) is a failure. So is one whose seat could not be reached,
which tau2's own metrics leave out; *covered* is the share of the others. tau2-<arm>.json in --out is for `tau2 evaluate-trajs`.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from typing import Any

from tqdm import tqdm

from nano_atlas.benches import arms, scores
from nano_atlas.benches.arms import SHUFFLED, UNTRAINED, Key, TaskLog, TaskResult
from nano_atlas.config import option, parse
from nano_atlas.episode import Attempt
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json, replace_text
from nano_atlas.seats import is_url

INSTALL = """--bench tau2 needs the official package and its data:
    git clone --branch v1.0.1 https://github.com/sierra-research/tau2-bench
    pip install ./tau2-bench                    # Python 3.12 or 3.13; in a 3.11: install its dependencies by name, then
                                                # pip install --no-deps --ignore-requires-python ./tau2-bench
    export TAU2_DATA_DIR=$PWD/tau2-bench/data
(`pip install tau2` is a different project.)"""
PERSONA = re.compile(r"PERSONA:\w+")  # in the id of a telecom task, [mms_issue]...[PERSONA:Easy]
UNREACHED = ("infrastructure_error", "unexpected_error")  # ends that say nothing about the student
GIVE_UP = 4  # such dialogues in a row; each has tried again several times by itself


@dataclass(frozen=True)
class Config(arms.ArmsConfig):
    control: tuple[str, ...] = option((SHUFFLED, UNTRAINED), "control arms", (SHUFFLED, UNTRAINED, "none"))
    temperature: float = option(0.7, "of student and teachers (0: greedy)", group="sampling", at_least=0)
    seed: int = option(300, "of trials (300: the published ones), sampling, shuffling and bootstrap")
    out: Path = option(Path("runs/tau2"), "directory of the results", resumable=True)
    bench: str = option("tau2", "this benchmark", ("tau2",), group="τ²-bench")
    user: str | None = option(None, "URL of the simulated user, or `solo`: none, there is only a ticket")
    domain: str = option("telecom", "domain of the tasks")
    split: str = option("base", "split of the domain's tasks")
    tasks: str | None = option(None, "only tasks whose id contains this, such as mms_issue")
    trials: int = option(4, "dialogues per task and arm", at_least=1)
    max_steps: int = option(200, "messages and calls until a dialogue is ended as a failure", at_least=1)
    workers: int = option(16, "dialogues at a time", resumable=True, at_least=1)
    dry_run: bool = option(False, "only say what would run, and its floors", resumable=True)

    def check(self) -> None:
        self.check_arms()
        seats = [self.student] if self.is_solo else [self.student, self.user]
        if not (self.tables or self.dry_run or all(is_url(spec or "") for spec in seats)):
            raise UserError(
                "--student and --user must be URLs (or --user solo): serve a checkpoint as in --help"
            )

    @property
    def samples(self) -> int:
        return self.trials

    @property
    def is_solo(self) -> bool:
        return self.user == "solo"


def main(argv: Sequence[str]) -> None:
    config = parse(Config, argv, {}, __doc__)
    if not config.tables:
        run(config)
    if config.tables or not config.dry_run:
        scores.finish(config, own_tables)


def run(config: Config) -> None:
    """Everything that needs the official package, which is imported without a word and without a download."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        from loguru import logger

        logger.disable("tau2")
        from nano_atlas.benches import dialogue
    except ImportError as error:
        raise UserError(f"{error}\n{INSTALL}") from None
    tasks = dialogue.load_tasks(config)
    contents = dialogue.contents(config, tasks)
    if config.dry_run:
        kinds = Counter(intent(task.id, config.domain) for task in tasks)
        print(f"{len(tasks)} tasks {dict(kinds)}, {config.trials} trials, arms {', '.join(config.arms)}")
        return print(shown(contents))
    arms.start_or_continue(config, contents)
    with TaskLog(config.out / "tasks.jsonl") as log:
        evaluate(config, tasks, log)
    for arm in config.arms:
        simulations = [result.record for result in log.results.values() if result.arm == arm]
        replace_text(config.out / f"tau2-{arm}.json", dialogue.official(config, tasks, arm, simulations))


def intent(name: str, domain: str) -> str:
    """The kind of a telecom task, which its id begins with; of other tasks the domain."""
    return (re.findall(r"^\[(\w+)\]", name) or [domain])[0]


def evaluate(config: Config, tasks: Sequence, log: TaskLog) -> None:
    """Every (arm, task, trial) that the log lacks, `workers` at a time. Teachers are opened one after the other."""
    from nano_atlas.benches.dialogue import TOLD, simulate, teacher_guide

    draws = random.Random(config.seed)
    seeds = [draws.randint(0, 1_000_000) for _ in range(config.trials)]  # as tau2 draws them
    donors = arms.derange(tasks, config.seed) if SHUFFLED in config.arms else {}
    jobs = [(task, trial) for trial in range(config.trials) for task in tasks]

    def key(arm: str, task: Any, trial: int) -> Key:
        return arm, intent(task.id, config.domain), task.id, trial

    def run(task: Any, trial: int) -> TaskResult:
        own_guide = guide
        if arm == SHUFFLED:
            given = log.results[key(list(config.teachers)[-1], donors[task.id], trial)]
            own_guide = lambda *_: {name: getattr(given, name) for name in TOLD}
        simulation, told = simulate(config, task, seeds[trial], student, user, own_guide)
        return task_result(key(arm, task, trial), simulation | {"trial": trial}, told)

    missing = {arm: [job for job in jobs if key(arm, *job) not in log.results] for arm in config.arms}
    if not any(missing.values()):
        return
    student = config.open(config.student)
    user = None if config.is_solo else config.open(config.user)
    with tqdm(total=len(jobs) * len(config.arms), initial=len(log.results), unit="dialogue") as bar:
        for arm in filter(missing.get, config.arms):
            bar.set_description(arm)
            teacher = guide = None  # frees the last one before the next is opened
            if arm == UNTRAINED or arm in config.teachers:
                teacher = student if arm == UNTRAINED else config.open(config.teachers[arm])
                guide = teacher_guide(config, student, teacher)
            for result in in_parallel(run, missing[arm], config.workers):
                log.append([result])
                bar.update()


def in_parallel(run: Callable[..., TaskResult], jobs: Sequence[tuple], workers: int) -> Iterator[TaskResult]:
    """Results as they come. GIVE_UP in a row that did not reach a seat end the run instead of failing all that are left; these are
    not yielded, so they run again when the run is continued.
    """
    unreached: list[TaskResult] = []
    pool, finished = ThreadPoolExecutor(workers), SimpleQueue()  # as_completed would not keep their order
    try:
        for job in jobs:
            pool.submit(run, *job).add_done_callback(finished.put)
        for _ in jobs:
            unreached.append(finished.get().result())
            if unreached[-1].record["termination_reason"] not in UNREACHED:
                yield from unreached
                unreached.clear()
            elif len(unreached) == GIVE_UP:
                failure = unreached[-1].record["info"]["failure"]
                raise UserError(f"{GIVE_UP} dialogues in a row did not reach a seat, the last: {failure}")
        yield from unreached
    finally:
        pool.shutdown(cancel_futures=True)


def task_result(key: Key, simulation: dict[str, Any], told: dict[str, Any]) -> TaskResult:
    """One line of the log, in the terms of the other benchmarks: right is a reward of 1, and an answer is a proper end."""
    reward, end = simulation["reward_info"]["reward"], simulation["termination_reason"]
    answer = str(reward) if end in ("user_stop", "agent_stop") else None
    tokens = student_tokens(simulation, "completion_tokens")
    attempt = Attempt("", answer, reward > 1 - 1e-6, tokens, is_truncated=end == "max_steps")
    return TaskResult(*key, "", attempt, **told, record=simulation)


def student_tokens(simulation: dict[str, Any], kind: str) -> int:
    """prompt_tokens or completion_tokens of all of the student's turns, also of the one that broke the dialogue off."""
    turns = [message.get("usage") for message in simulation["messages"] if message["role"] == "assistant"]
    if simulation["termination_reason"] == "agent_error":
        turns.append(simulation.get("info", {}).get("usage"))
    return sum(usage[kind] for usage in turns if usage)


def own_tables(config: Config, results: Sequence[TaskResult]) -> str:
    """Markdown: pass^k by intent and persona; cost and end of each arm's dialogues; and of what package and data this is true."""
    groups = [replace(r, domain=group) for r in results for group in ("all", *PERSONA.findall(r.id))]
    passed = [["", "tasks", *(f"pass^{k}" for k in range(1, config.trials + 1))]]
    for score in scores.make_report([*groups, *results], config)["scores"]:
        name, rates = f"{score['domain']}: {config.names[score['arm']]}", score["pass_hat_k"].values()
        passed.append([name, str(score["tasks"]), *map(scores.percent, rates)])
    ends = sorted({result.record["termination_reason"] for result in results})
    costs = [["", "dialogues", "covered", "prompt tokens", "seconds", *ends]]
    for arm in config.arms:
        if runs := [result.record for result in results if result.arm == arm]:
            count = Counter(run["termination_reason"] for run in runs)
            covered = scores.percent(1 - sum(count[end] for end in UNREACHED) / len(runs))
            read = f"{mean(student_tokens(run, 'prompt_tokens') for run in runs):.0f}"
            seconds, counts = (
                f"{mean(run['duration'] for run in runs):.1f}",
                [str(count[end]) for end in ends],
            )
            costs.append([config.names[arm], str(len(runs)), covered, read, seconds, *counts])
    lines = ["", "### pass^k", "", *scores.table(passed), "", "### dialogues", "", *scores.table(costs), ""]
    return "\n".join([*lines, shown(read_json(config.out / "run.json")["contents"]), ""])


def shown(contents: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value[:16]}" for name, value in contents.items())
