r"""τ²-bench: the student talks to a simulated user and calls tools, with and without a teacher.

    what would run     python eval.py --bench tau2 --dry-run
    one kind of task   python eval.py --bench tau2 --tasks mms_issue --student URL --teacher grpo=URL \
                           --user URL --out runs/mms
    without a user     python eval.py --bench tau2 --user solo ...                  (from the ticket)
    see the dialogues  python -m benchmarks.tau2_official --out runs/mms            (for tau2 view)

The official package runs and scores each dialogue (dialogue.py). The arms are those of eval.py without the votes, since
dialogues have side effects. Student and user are URLs of servers that parse tool calls (for Qwen3: `vllm serve MODEL
--enable-auto-tool-choice --tool-call-parser hermes`). If a seat sends an invalid reply or cannot be reached, the
dialogue fails; *covered* is the share of dialogues in which all seats were reached.
"""

import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from nano_atlas.benches import arms, scores
from nano_atlas.benches.arms import SHUFFLED, STUDENT, UNTRAINED, Key, TaskLog, TaskResult
from nano_atlas.config import option
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json
from nano_atlas.seats import Reply, is_url

INSTALL = """--bench tau2 needs the official package and its data:
    git clone --branch v1.0.1 https://github.com/sierra-research/tau2-bench
    pip install ./tau2-bench   # Python 3.12 or 3.13. With 3.11: install its dependencies by name, then
                               # pip install --no-deps --ignore-requires-python ./tau2-bench
    export TAU2_DATA_DIR=$PWD/tau2-bench/data
(`pip install tau2` is a different project.)"""
PERSONA = re.compile(r"PERSONA:\w+")  # in the id of a telecom task, [mms_issue]...[PERSONA:Easy]
UNREACHED = ("infrastructure_error", "unexpected_error")  # ends not caused by the student
GIVE_UP = 4  # consecutive dialogues of this kind that end the run; each has retried its requests


@dataclass(frozen=True)
class Config(arms.ArmsConfig):
    control: tuple[str, ...] = option((SHUFFLED, UNTRAINED), "control arms", (SHUFFLED, UNTRAINED, "none"))
    temperature: float = option(0.7, "of student and teachers (0: greedy)", group="sampling", at_least=0)
    seed: int = option(300, "random seed (300: the published trials)")
    out: Path = option(Path("runs/tau2"), "output directory", resumable=True)
    bench: str = option("tau2", "this benchmark", ("tau2",), group="τ²-bench")
    user: str | None = option(None, "URL of the simulated user; solo: only a ticket, no user")
    domain: str = option("telecom", "domain of the tasks")
    split: str = option("base", "split of the tasks")
    tasks: str | None = option(None, "only tasks with this in their id, such as mms_issue")
    samples: int = option(4, "dialogues per task and arm (tau2's trials)", at_least=1)
    max_steps: int = option(200, "most messages and calls; then a dialogue has failed", at_least=1)
    workers: int = option(16, "parallel dialogues", resumable=True, at_least=1)
    dry_run: bool = option(False, "print what would run, and stop", resumable=True)
    full = True  # tables always have all columns

    def check(self) -> None:
        super().check()
        urls = [self.student] if self.is_solo else [self.student, self.user]
        if not (self.tables or self.dry_run or all(is_url(spec or "") for spec in urls)):
            raise UserError("--student and --user must be URLs of servers (or --user solo); see --help")

    @property
    def is_solo(self) -> bool:
        return self.user == "solo"


def run(config: Config) -> None:
    """Runs what is missing. Imports the official package without its log output and downloads."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        from loguru import logger

        logger.disable("tau2")
        from nano_atlas.benches import dialogue
    except ImportError as error:
        raise UserError(f"{error}\n{INSTALL}") from None
    tasks = dialogue.load_tasks(config)
    contents = dialogue.contents(config, tasks)
    tasks_of = {Problem(task.id, "", "", intent(task.id, config.domain)): task for task in tasks}
    if config.dry_run:
        kinds = dict(Counter(problem.domain for problem in tasks_of))
        print(f"{len(tasks)} tasks {kinds}, {config.samples} samples, arms {', '.join(config.arms)}")
        print(shown(contents))
        sys.exit()
    arms.start_or_continue(config, contents)
    with TaskLog(config.out / "tasks.jsonl") as log:
        arms.fill(log, config, list(tasks_of), partial(dialogues, config, tasks_of, log))


def intent(name: str, domain: str) -> str:
    """The kind of a telecom task, from its id; for other tasks the domain."""
    return (re.findall(r"^\[(\w+)\]", name) or [domain])[0]


def dialogues(config: Config, tasks: dict, log: TaskLog, jobs: arms.Jobs, seats: arms.Seats):
    """Runs the missing trials, `workers` at a time; yields lists of results."""
    from nano_atlas.benches.dialogue import simulate

    draws = random.Random(config.seed)
    seeds = [draws.randint(0, 1_000_000) for _ in range(config.samples)]  # as tau2 draws them
    donors = arms.derange(list(tasks), config.seed) if SHUFFLED in config.arms else {}
    student, user = seats["student"], None if config.is_solo else config.open(config.user)

    def run(job: tuple[str, Problem, int]) -> TaskResult:
        arm, problem, trial = job
        teacher, told = None if arm in (STUDENT, SHUFFLED) else seats["teacher"], []
        if arm == SHUFFLED:
            given = log.get(config.last, donors[problem.id])[trial]
            told = [Reply(given.approach, given.approach_tokens, False), given.told]
        simulation, told = simulate(config, tasks[problem], seeds[trial], student, user, teacher, told)
        return task_result((arm, problem.domain, problem.id, trial), simulation | {"trial": trial}, *told)

    trials = [(*job, trial) for trial in range(config.samples) for job in jobs]
    left = [(arm, p, trial) for arm, p, trial in trials if (arm, p.domain, p.id, trial) not in log.results]
    return in_parallel(run, left, config.workers)


def in_parallel(run: Callable[..., TaskResult], jobs: Sequence, workers: int) -> Iterator[list[TaskResult]]:
    """Yields results as they finish. GIVE_UP unreached dialogues in a row end the run; they are not recorded."""
    unreached: list[TaskResult] = []
    with ThreadPool(workers) as pool:
        for result in pool.imap_unordered(run, jobs):
            unreached.append(result)
            if result.record["termination_reason"] not in UNREACHED:
                yield unreached
                unreached = []
            elif len(unreached) == GIVE_UP:
                failure = result.record["info"]["failure"]
                raise UserError(f"{GIVE_UP} dialogues in a row reached no server; the last error: {failure}")
    yield unreached


def task_result(key: Key, simulation: dict, probe: Reply | None = None, reply=None) -> TaskResult:
    """One line of the log: correct means a reward of 1, answered means a regular end of the dialogue."""
    reward, end = simulation["reward_info"]["reward"], simulation["termination_reason"]
    answer = str(reward) if end in ("user_stop", "agent_stop") else None
    turns = [message.get("usage") for message in simulation["messages"] if message["role"] == "assistant"]
    if end == "agent_error":
        turns.append(simulation.get("info", {}).get("usage"))  # of the last turn, which failed
    tokens = sum(usage["completion_tokens"] for usage in turns if usage)
    attempt = Attempt("", answer, reward > 1 - 1e-6, tokens, end == "max_steps")
    result = TaskResult(*key, "", attempt, record=simulation)
    return result.taught(reply, approach=probe.text, approach_tokens=probe.tokens) if reply else result


def tables(config: Config, results: Sequence[TaskResult]) -> str:
    """Markdown: pass^k by intent and persona, how dialogues end by arm, and versions of package and data."""
    groups = [replace(r, domain=group) for r in results for group in ("all", *PERSONA.findall(r.id))]
    passed = [["", "tasks", *(f"pass^{k}" for k in range(1, config.samples + 1))]]
    for score in scores.make_report([*groups, *results], config)["scores"]:
        name, rates = f"{score['domain']}: {score['arm']}", score["pass_hat_k"].values()
        passed.append([name, str(score["tasks"]), *map(scores.percent, rates)])
    ends = sorted({result.record["termination_reason"] for result in results})
    counted = [["", "dialogues", "covered", *ends]]
    for arm in config.arms:
        if runs := [result.record for result in results if result.arm == arm]:
            counts = {end: sum(run["termination_reason"] == end for run in runs) for end in ends}
            covered = 1 - sum(counts.get(end, 0) for end in UNREACHED) / len(runs)
            counted.append([arm, str(len(runs)), scores.percent(covered), *map(str, counts.values())])
    lines = ["", *scores.table(passed, "pass^k"), *scores.table(counted, "dialogues")]
    return "\n".join([*lines, shown(read_json(config.out / "run.json")["contents"]), ""])


def shown(contents: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value[:16]}" for name, value in contents.items())
