"""τ²-bench: the student talks to a simulated user who has a problem, and to tools that could solve it; with and without a teacher.

    python eval.py --bench tau2 --dry-run                                             # what would run, and its floors
    python eval.py --bench tau2 --tasks mms_issue --student URL --teacher grpo=URL --user URL --out runs/mms
    python eval.py --bench tau2 --user solo ...                                       # from the ticket, without a user
    python eval.py --bench tau2 --out runs/mms --tables                               # the tables again
    python eval.py --bench tau2 --out runs/mms --view bad_wifi_calling                # the dialogues of matching tasks

The official package runs and scores each dialogue (dialogue.py); this file says which, and what became of them. The arms are those
of eval.py without the votes: dialogues change the world, so one cannot choose among them afterwards. Student and user are URLs: each
turn repeats a prompt of some 8,000 tokens, which a server computes only once, and a server parses tool calls in each family's format
(`vllm serve MODEL --enable-auto-tool-choice --tool-call-parser hermes` for Qwen3). A teacher may be a checkpoint too.

A dialogue that a seat breaks off (no text, malformed call, outgrown context) is a failure. So is one whose seat could not be reached,
which tau2's own metrics leave out; *covered* is the share of dialogues without such an error.

In --out: tasks.jsonl, a line per dialogue, to which an interrupted run is continued; tables.md and results.json; and for each arm
tau2-<arm>.json, which `tau2 evaluate-trajs` loads and scores again.
"""

import importlib.metadata
import importlib.util
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from typing import Any

from tqdm import tqdm

from nano_atlas import stats
from nano_atlas.benches import scores
from nano_atlas.benches.arms import (
    SHUFFLED,
    UNTRAINED,
    ArmsConfig,
    derange,
    require_checkpoint,
    stored_report,
    write_report,
)
from nano_atlas.benches.results import STUDENT, TaskLog, TaskResult, read_results, start_or_continue
from nano_atlas.config import option, parse
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt
from nano_atlas.errors import UserError
from nano_atlas.runs import digest, files_digest, read_json, replace_text
from nano_atlas.seats import Generation, is_url

INSTALL = """--bench tau2 needs the official package and its data:
    git clone --branch v1.0.1 https://github.com/sierra-research/tau2-bench
    pip install ./tau2-bench                    # Python 3.12 or 3.13; in a 3.11: install its dependencies by name, then
                                                # pip install --no-deps --ignore-requires-python ./tau2-bench
    export TAU2_DATA_DIR=$PWD/tau2-bench/data
(`pip install tau2` is a different project.)"""
UNREACHED = ("infrastructure_error", "unexpected_error")  # ends that say nothing about the student
GIVE_UP = 4  # such dialogues in a row; each has tried again several times by itself


@dataclass(frozen=True)
class Config(ArmsConfig):
    control: tuple[str, ...] = option((SHUFFLED, UNTRAINED), "control arms", (SHUFFLED, UNTRAINED, "none"))
    temperature: float = option(0.7, "of student and teachers (0: greedy)")
    seed: int = option(300, "of trials (300: the published ones), sampling, shuffling and bootstrap")
    out: Path = option(Path("runs/tau2"), "directory of the results", resumable=True)
    bench: str = option("tau2", "this benchmark", ("tau2",), group="τ²-bench")
    user: str | None = option(
        None, "URL of the simulated user; `solo`: none, the student works from a ticket"
    )
    domain: str = option("telecom", "domain of the tasks")
    split: str = option("base", "split of the domain's tasks")
    tasks: str | None = option(None, "only tasks whose id contains this, such as mms_issue")
    trials: int = option(4, "dialogues per task and arm")
    max_steps: int = option(200, "messages and calls after which a dialogue is ended as a failure")
    workers: int = option(16, "dialogues at a time", resumable=True)
    dry_run: bool = option(False, "only say what would run, and what trivial policies score", resumable=True)
    view: str | None = option(
        None, "only print the dialogues in --out of tasks whose id contains this", resumable=True
    )

    def check(self) -> None:
        self.check_arms()
        if min(self.trials, self.max_steps, self.workers) < 1:
            raise UserError("--trials, --max-steps and --workers must be at least 1")
        if self.tables or self.view or self.dry_run:
            return
        if not all(
            spec and is_url(spec) for spec in (self.student, self.student if self.is_solo else self.user)
        ):
            raise UserError(
                "--bench tau2 needs --student URL and --user URL (or --user solo); serve a checkpoint with "
                "`vllm serve DIRECTORY --enable-auto-tool-choice --tool-call-parser hermes`"
            )

    @property
    def controls(self) -> list[str]:
        return super().controls if self.teacher else []

    @property
    def samples(self) -> int:
        return self.trials

    @property
    def is_solo(self) -> bool:
        return self.user == "solo"


def main(argv: Sequence[str]) -> None:
    config = parse(Config, argv, {}, __doc__)
    if config.view:
        print_dialogues(config.out, config.view)
        return
    if not config.tables:
        contents = require_tau2(config)
        tasks = load_tasks(config)
        contents |= floors(config, tasks)
        if config.dry_run:
            kinds = Counter(intent(task.id, config.domain) for task in tasks)
            print(
                f"{len(tasks)} tasks {dict(kinds)} x {config.trials} trials x arms {config.arms}\n{shown(contents)}"
            )
            return
        for spec in config.teachers.values():
            require_checkpoint(spec)
        contents["tasks"] = digest(task.model_dump_json().encode() for task in tasks)
        start_or_continue(config, config.contents() | contents)
        with TaskLog(config.out / "tasks.jsonl") as log:
            evaluate(config, tasks, log)
            write_official(config, tasks, log)
    report, stored = stored_report(config.out, Config)
    text = scores.tables(report, stored.names) + own_tables(stored, config.out)
    if not config.tables:
        write_report(config.out, report, text)
    print(text)


# ------------------------------------------------------------------------------------------------------ the package and its tasks


def require_tau2(config: Config) -> dict[str, str]:
    """Make tau2 importable, quietly and without a download, and say what of it is there: version, digests of code and data."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    package = importlib.util.find_spec("tau2")
    if package is None or not (Path(package.origin).parent / "orchestrator").is_dir():
        raise UserError(INSTALL)
    from loguru import logger

    logger.disable("tau2")
    from tau2.utils import DATA_DIR

    folders = [DATA_DIR / "tau2" / name for name in (f"domains/{config.domain}", "user_simulator")]
    if not all(folder.is_dir() for folder in folders):
        raise UserError(f"{DATA_DIR} does not hold the data of the domain {config.domain}.\n{INSTALL}")
    data = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    return {
        "tau2 version": importlib.metadata.version("tau2"),
        "tau2 code": files_digest(sorted(Path(package.origin).parent.rglob("*.py"))),
        "tau2 data": files_digest(data),
    }


def load_tasks(config: Config) -> list:
    from tau2.data_model.tasks import RewardType
    from tau2.runner import get_tasks, load_task_splits

    splits = load_task_splits(config.domain) or {}
    if config.split not in splits:
        raise UserError(
            f"--split {config.split}: the domain {config.domain} has {', '.join(splits) or 'none'}"
        )
    tasks = [task for task in get_tasks(config.domain, config.split) if (config.tasks or "") in task.id]
    tasks = tasks[: config.limit]
    if not tasks:
        raise UserError(
            f"--tasks {config.tasks}: no id in the split {config.split} of {config.domain} contains it"
        )
    if any(RewardType.NL_ASSERTION in (task.evaluation_criteria.reward_basis or ()) for task in tasks):
        raise UserError(
            f"the domain {config.domain} has tasks scored by a language model, which tau2 fixes to be gpt-4.1; "
            "choose one scored by the state of the world alone, such as telecom"
        )
    if config.is_solo and any(task.ticket is None for task in tasks):
        raise UserError(f"--user solo needs tasks with a ticket, which the domain {config.domain} has not")
    return tasks


def floors(config: Config, tasks: Sequence) -> dict[str, str]:
    """What two policies that look at nothing score on these tasks, by the official scorer."""
    from nano_atlas.benches.dialogue import floor_reward

    tools = {"do nothing": None, "always transfer": "transfer_to_human_agents"}
    rewards = {
        name: [floor_reward(task, config.domain, tool, config.is_solo) for task in tasks]
        for name, tool in tools.items()
    }
    return {f"floor: {name}": f"{100 * mean(values):.2f} %" for name, values in rewards.items()}


def intent(name: str, domain: str) -> str:
    """The kind of a telecom task, [mms_issue]...[PERSONA:Easy]; of the others, the domain."""
    match = re.match(r"\[(\w+)\]", name)
    return match[1] if match else domain


# ---------------------------------------------------------------------------------------------------------------- the dialogues


def evaluate(config: Config, tasks: Sequence, log: TaskLog) -> None:
    """Every (arm, task, trial) that the log lacks, `workers` at a time. Teachers are opened one after the other."""
    from nano_atlas.benches.dialogue import Guidance, simulate, teacher_guide

    problems = {task.id: Problem(task.id, "", None, intent(task.id, config.domain)) for task in tasks}
    every = [(task, trial) for trial in range(config.trials) for task in tasks]
    missing = {
        arm: [job for job in every if (arm, problems[job[0].id].domain, job[0].id, job[1]) not in log.results]
        for arm in config.arms
    }
    if not any(missing.values()):
        return
    draws = random.Random(config.seed)
    seeds = [draws.randint(0, 1_000_000) for _ in range(config.trials)]  # as tau2 draws them
    generation = Generation(config.answer_tokens, config.temperature, config.top_p)
    student, user = config.open(config.student), None if config.is_solo else config.open(config.user)
    donors = derange(list(problems.values()), config.seed) if SHUFFLED in config.arms else {}

    def run(task: Any, trial: int) -> TaskResult:
        told = guide
        if arm == SHUFFLED:
            donor = donors[task.id]
            given = log.results[list(config.teachers)[-1], donor.domain, donor.id, trial]
            guidance = Guidance(*(getattr(given, field.name) for field in fields(Guidance)))
            told = lambda *_: guidance  # noqa: E731
        dialogue = simulate(
            task,
            config.domain,
            student,
            user,
            generation,
            told,
            trial=trial,
            seed=seeds[trial],
            max_steps=config.max_steps,
        )
        return task_result(
            arm, problems[task.id], dialogue[0].model_dump(mode="json", exclude_none=True), vars(dialogue[1])
        )

    with tqdm(total=len(every) * len(config.arms), initial=len(log.results), unit="dialogue") as bar:
        for arm in filter(missing.get, config.arms):
            bar.set_description(arm)
            guide = None
            if arm in (UNTRAINED, *config.teachers):
                teacher = student if arm == UNTRAINED else config.open(config.teachers[arm])
                guide = teacher_guide(student, teacher, config.episode)
            for result in in_parallel(run, missing[arm], config.workers):
                log.append([result])
                bar.update()


def task_result(arm: str, problem: Problem, simulation: dict[str, Any], told: dict[str, Any]) -> TaskResult:
    """One line of the log, in the terms of the other benchmarks: right is a reward of 1, and an answer is a proper end."""
    reward, reason = simulation["reward_info"]["reward"], simulation["termination_reason"]
    answer = str(reward) if reason in ("user_stop", "agent_stop") else None
    tokens = student_tokens(simulation, "completion_tokens")
    attempt = Attempt("", answer, reward > 1 - 1e-6, tokens, reason == "max_steps")
    return TaskResult(
        arm, problem.domain, problem.id, simulation["trial"], "", attempt, **told, record=simulation
    )


def in_parallel(run: Callable[..., TaskResult], jobs: Sequence[tuple], workers: int) -> Iterator[TaskResult]:
    """Results as they come. When GIVE_UP in a row did not reach a seat, it is gone for good: that ends the run instead of failing
    all dialogues that are left. These are not yielded, so they run again when the run is continued.
    """
    unreached: list[TaskResult] = []
    pool, finished = ThreadPoolExecutor(workers), SimpleQueue()  # as_completed would not keep their order
    try:
        for job in jobs:
            pool.submit(run, *job).add_done_callback(finished.put)
        for _ in jobs:
            unreached.append(finished.get().result())
            if end_of(unreached[-1]) not in UNREACHED:
                yield from unreached
                unreached.clear()
            elif len(unreached) == GIVE_UP:
                failure = unreached[-1].record["info"]["failure"]
                raise UserError(
                    f"{GIVE_UP} dialogues in a row did not reach a seat, the last with: {failure}"
                )
        yield from unreached
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------------ the outcome


def end_of(result: TaskResult) -> str:
    return result.record["termination_reason"]


def student_tokens(simulation: dict[str, Any], kind: str) -> int:
    """prompt_tokens or completion_tokens of all of the student's turns, also of the one that broke the dialogue off."""
    turns = [message.get("usage") for message in simulation["messages"] if message["role"] == "assistant"]
    if simulation["termination_reason"] == "agent_error":
        turns.append((simulation.get("info") or {}).get("usage"))
    return sum(usage[kind] for usage in turns if usage)


def write_official(config: Config, tasks: Sequence, log: TaskLog) -> None:
    """A file per arm in tau2's own format. Its metrics leave out infrastructure errors; without any, the means are equal."""
    from tau2.data_model.simulation import Results, SimulationRun, TextRunConfig
    from tau2.runner import get_info

    agent, user = ("llm_agent_solo", "dummy_user") if config.is_solo else ("llm_agent", "user_simulator")
    for arm in config.arms:
        run = TextRunConfig(
            domain=config.domain, agent=agent, llm_agent=f"{config.student} ({arm})", llm_args_agent={"temperature": config.temperature},
            user=user, llm_user=config.user, llm_args_user={"temperature": 0.0},
            num_trials=config.trials, max_steps=config.max_steps, seed=config.seed,
        )  # fmt: skip
        info = get_info(run)
        info.git_commit = "unknown"  # it would be that of the current directory
        runs = [
            SimulationRun.model_validate(result.record)
            for result in log.results.values()
            if result.arm == arm
        ]
        replace_text(
            config.out / f"tau2-{arm}.json",
            Results(info=info, tasks=list(tasks), simulations=runs).model_dump_json(indent=1),
        )


def own_tables(config: Config, out: Path) -> str:
    """Markdown: pass^k by intent and persona, the cost and the end of each arm's dialogues, and of what package and data this is true."""
    by_arm: dict[str, list[TaskResult]] = {}
    for result in read_results(out / "tasks.jsonl").values():
        by_arm.setdefault(result.arm, []).append(result)
    ks, ends = (
        range(1, config.trials + 1),
        sorted({end_of(r) for results in by_arm.values() for r in results}),
    )
    passed = [["", "tasks", *(f"pass^{k}" for k in ks)]]
    costs = [["", "dialogues", "covered", "teacher tokens", "student tokens", "prompt tokens", "seconds"]]
    ended = [["", *ends]]
    for arm in filter(by_arm.get, config.arms):
        results, name = by_arm[arm], config.names.get(arm, arm)
        groups: dict[str, dict[str, list[bool]]] = {"all": {}}
        for result in results:
            for group in ("all", result.domain, *re.findall(r"\[PERSONA:(\w+)\]", result.id)):
                groups.setdefault(group, {}).setdefault(result.id, []).append(result.attempt.is_correct)
        for group, tasks in groups.items():
            whole = [sum(right) for right in tasks.values() if len(right) == config.trials]
            rates = [
                100 * mean(stats.pass_hat_k(config.trials, right, k) for right in whole) for k in ks if whole
            ]
            passed.append([f"{name}: {group}", str(len(whole)), *(f"{rate:.1f}" for rate in rates)])

        def average(value: Callable[[TaskResult], float]) -> float:
            return mean(map(value, results))

        costs.append([
            name, str(len(results)), f"{100 * average(lambda r: end_of(r) not in UNREACHED):.1f}",
            f"{average(lambda r: r.teacher_tokens):.0f}", f"{average(lambda r: r.attempt.tokens):.0f}",
            f"{average(lambda r: student_tokens(r.record, 'prompt_tokens')):.0f}", f"{average(lambda r: r.record['duration']):.1f}",
        ])  # fmt: skip
        ended.append([name, *(str(sum(end_of(r) == end for r in results)) for end in ends)])
    lines = [
        "",
        "### pass^k",
        "",
        *scores.table(passed),
        "",
        "### dialogues",
        "",
        *scores.table(costs),
        "",
        *scores.table(ended),
        "",
    ]
    contents = read_json(out / "run.json").get("contents", {})
    return "\n".join([*lines, shown(contents), ""])


def shown(contents: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value[:16]}" for name, value in contents.items())


def print_dialogues(out: Path, wanted: str) -> None:
    """Those of tasks whose id contains `wanted`."""
    for result in read_results(out / "tasks.jsonl").values():
        if wanted not in result.id:
            continue
        outcome, failure = (
            "right" if result.attempt.is_correct else "wrong",
            result.record.get("info", {}).get("failure", ""),
        )
        print(
            f"\n=== {result.id}, {result.arm}, trial {result.sample}: {outcome}, {end_of(result)} {failure}"
        )
        told = {"approach": result.approach, "teacher": result.teacher_text, "teaching": result.teaching}
        for name, text in told.items():
            if text:
                print(f"[{name}] {text}")
        for message in result.record["messages"]:
            calls = [
                f"{call['name']}({json.dumps(call['arguments'])})" for call in message.get("tool_calls") or []
            ]
            print(f"[{message['role']}]", message.get("content") or "", *calls)
