"""τ²-bench: the student talks to a simulated user with a problem and to tools that could solve it, with and without a teacher.

    python eval.py --bench tau2 --dry-run                                             # what would run, and its floors
    python eval.py --bench tau2 --tasks mms_issue --student URL --teacher grpo=URL --user URL --out runs/mms
    python eval.py --bench tau2 --mode solo ...                                       # from the ticket, without a user
    python eval.py --bench tau2 --out runs/mms --tables                               # the tables again
    python eval.py --bench tau2 --out runs/mms --view 'bad_wifi_calling'              # the dialogues of matching tasks

The official package runs and scores each dialogue (nano_atlas/benches/dialogue.py); this file says which, and what became of them. Arms
are those of eval.py, but for the votes: dialogues change the world, so there is no choosing among them afterwards. Student and
user are URLs: each turn repeats a prompt of some 8,000 tokens, which a server computes once and the embedded sampler would every
time, and a server parses calls of tools in each family's format (`vllm serve MODEL --enable-auto-tool-choice --tool-call-parser
hermes` for Qwen3). A teacher, asked once per dialogue and without tools, may be a checkpoint too.

A dialogue that a seat breaks off (no text, malformed call, outgrown context) is a failure; so is one whose seat could not be
reached, which tau2's own metrics leave out. *Covered* is the share of dialogues without such an error.

In --out: tasks.jsonl, a line per dialogue, to which an interrupted run is continued; tables.md and results.json; and for each arm
tau2-<arm>.json, which `tau2 evaluate-trajs` loads and scores again.
"""

import importlib.metadata
import importlib.util
import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tqdm import tqdm

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
from nano_atlas.benches.tau2_report import (
    UNREACHED,
    dialogue_tables,
    intent,
    print_dialogues,
    task_result,
    termination,
)
from nano_atlas.config import option, parse
from nano_atlas.data import Problem
from nano_atlas.errors import UserError
from nano_atlas.runs import digest, files_digest, read_json, replace_text
from nano_atlas.seats import Generation, is_url

INSTALL = """--bench tau2 needs the official package and its data:
    git clone --branch v1.0.1 https://github.com/sierra-research/tau2-bench
    pip install ./tau2-bench                    # Python 3.12 or 3.13; in a 3.11: install its dependencies by name, then
                                                # pip install --no-deps --ignore-requires-python ./tau2-bench
    export TAU2_DATA_DIR=$PWD/tau2-bench/data
(`pip install tau2` is a different project.)"""
GIVE_UP = 4  # such dialogues in a row; each has tried again several times by itself


@dataclass(frozen=True)
class Config(ArmsConfig):
    bench: str = option("tau2", "this benchmark", ("tau2",), group="τ²-bench")
    domain: str = option("telecom", "domain of the tasks")
    split: str = option("base", "split of the domain's tasks")
    tasks: str | None = option(None, "only tasks whose id contains this, such as mms_issue")
    mode: str = option(
        "user", "with a simulated user, or alone with a ticket and all tools", ("user", "solo")
    )
    guidance: str = option(
        "both", "the student alone, with teachers, or both in pairs", ("none", "teacher", "both")
    )
    control: tuple[str, ...] = option((SHUFFLED, UNTRAINED), "control arms", (SHUFFLED, UNTRAINED, "none"))
    user: str | None = option(None, "URL of the simulated user")
    user_model: str | None = option(None, "model name at the user's URL (none: the first it serves)")
    user_temperature: float = option(0.0, "of the simulated user")
    temperature: float = option(0.7, "of student and teachers (0: greedy)")
    trials: int = option(4, "dialogues per task and arm")
    max_steps: int = option(200, "messages and calls after which a dialogue is ended as a failure")
    workers: int = option(16, "dialogues at a time", resumable=True)
    seed: int = option(
        300, "of the trials (300: the seeds of the published runs), sampling, shuffling and bootstrap"
    )
    out: Path = option(Path("runs/tau2"), "directory of the results", resumable=True)
    dry_run: bool = option(
        False, "only say what would run, and what the trivial policies score", resumable=True
    )
    view: str | None = option(
        None, "only print the dialogues in --out of tasks whose id contains this", resumable=True
    )

    def check(self) -> None:
        self.check_arms()
        if min(self.trials, self.max_steps, self.workers) < 1 or self.user_temperature < 0:
            raise UserError(
                "--trials, --max-steps and --workers must be at least 1, --user-temperature at least 0"
            )
        if self.tables or self.view or self.dry_run:
            return
        if self.student is None or self.mode == "user" and self.user is None:
            raise UserError(
                "--bench tau2 needs --student and, unless --mode solo, --user: the URL of a server each"
            )
        if not all(is_url(spec) for spec in (self.student, self.user or self.student)):
            raise UserError(
                "--bench tau2: --student and --user must be URLs; serve a checkpoint with "
                "`vllm serve DIRECTORY --enable-auto-tool-choice --tool-call-parser hermes`"
            )
        if self.guidance != "none" and not self.teacher:
            raise UserError(
                f"--guidance {self.guidance} needs a --teacher; --guidance none evaluates the student alone"
            )

    @property
    def arms(self) -> list[str]:
        taught = [*self.teachers, *self.controls] if self.teacher and self.guidance != "none" else []
        return ([] if self.guidance == "teacher" else [STUDENT]) + taught

    @property
    def samples(self) -> int:
        return self.trials

    @property
    def is_solo(self) -> bool:
        return self.mode == "solo"


def main(argv: Sequence[str]) -> None:
    config = parse(Config, argv, {}, __doc__)
    if config.view:
        print_dialogues(config.out / "tasks.jsonl", config.view)
        return
    if config.tables:
        print(report_of(config.out)[1])
        return
    contents = require_tau2(config)
    tasks = load_tasks(config)
    problems = [Problem(task.id, "", None, intent(task.id, config.domain)) for task in tasks]
    if config.dry_run:
        kinds = Counter(problem.domain for problem in problems)
        print(
            f"{len(tasks)} tasks ({', '.join(f'{count} {name}' for name, count in kinds.items())}) x {config.trials} trials x "
            f"{len(config.arms)} arms ({', '.join(config.arms)})\n" + floor_line(floors(config, tasks))
        )
        return
    for spec in config.teachers.values():
        require_checkpoint(spec)
    contents["tasks"] = digest(task.model_dump_json().encode() for task in tasks)
    start_or_continue(config, config.contents() | contents)
    with closing(TaskLog(config.out / "tasks.jsonl")) as log:
        evaluate(config, tasks, problems, log)
    replace_text(config.out / "floors.json", json.dumps(floors(config, tasks)))
    write_official(config, tasks, contents)
    report, text = report_of(config.out)
    write_report(config.out, report, text)
    print(text)


def report_of(out: Path) -> tuple[scores.Report, str]:
    """On all that the directory holds, and its tables."""
    report, stored = stored_report(out, Config)
    return report, scores.tables(report, stored.names) + own_tables(stored, out)


# ---------------------------------------------------------------------------------------------------------------- the package


def require_tau2(config: Config) -> dict[str, str]:
    """Make tau2 importable, quietly and without a download, and say what of it is there: version, commit, digest of the data."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    package = importlib.util.find_spec("tau2")
    if package is None or not (Path(package.origin).parent / "orchestrator").is_dir():
        raise UserError(INSTALL)
    from loguru import logger

    logger.disable("tau2")
    from tau2.utils import DATA_DIR

    folders = [DATA_DIR / "tau2" / name for name in (f"domains/{config.domain}", "user_simulator")]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    if not all(folder.is_dir() for folder in folders):
        raise UserError(f"{DATA_DIR} does not hold the data of the domain {config.domain}.\n{INSTALL}")
    return {
        "tau2 version": importlib.metadata.version("tau2"),
        "tau2 commit": installed_commit("tau2"),
        "tau2 data": files_digest(files),
    }


def installed_commit(package: str) -> str:
    """Of the repository that pip installed it from, by address or from a clone that still lies there."""
    origin = json.loads(importlib.metadata.distribution(package).read_text("direct_url.json") or "{}")
    if "vcs_info" in origin:
        return origin["vcs_info"]["commit_id"]
    clone = url2pathname(urlsplit(origin.get("url", "")).path)
    answer = subprocess.run(
        ["git", f"--git-dir={clone}/.git", "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return answer.stdout.strip() if answer.returncode == 0 else "unknown"


def load_tasks(config: Config) -> list:
    from tau2.data_model.tasks import RewardType
    from tau2.registry import registry
    from tau2.runner import get_tasks, load_task_splits

    if config.domain not in registry.get_domains():
        raise UserError(f"--domain {config.domain}: tau2 has {', '.join(registry.get_domains())}")
    splits = load_task_splits(config.domain)
    if config.split not in (splits or {}):
        raise UserError(
            f"--split {config.split}: the domain {config.domain} has {', '.join(splits or {}) or 'none'}"
        )
    tasks = [
        task
        for task in get_tasks(config.domain, config.split)
        if config.tasks is None or config.tasks in task.id
    ]
    tasks = tasks[: config.limit]
    if not tasks:
        raise UserError(
            f"--tasks {config.tasks}: no id in the split {config.split} of {config.domain} contains it"
        )
    if any(RewardType.NL_ASSERTION in (task.evaluation_criteria.reward_basis or ()) for task in tasks):
        raise UserError(
            f"the domain {config.domain} has tasks scored by a language model, which tau2 fixes to be gpt-4.1; "
            "this evaluation takes domains scored by the state of the world alone, such as telecom"
        )
    if config.is_solo and any(task.ticket is None for task in tasks):
        raise UserError(f"--mode solo needs tasks with a ticket, which the domain {config.domain} has not")
    return tasks


def floors(config: Config, tasks: Sequence) -> dict[str, float]:
    """What two policies that look at nothing score on these tasks, by the official scorer."""
    from nano_atlas.benches.dialogue import floor_reward

    tools = {"do nothing": None, "always transfer": "transfer_to_human_agents"}
    return {
        name: mean(floor_reward(task, config.domain, tool, config.is_solo) for task in tasks)
        for name, tool in tools.items()
    }


# ---------------------------------------------------------------------------------------------------------------- the dialogues


def evaluate(config: Config, tasks: Sequence, problems: Sequence[Problem], log: TaskLog) -> None:
    """Every (arm, task, trial) that the log lacks, `workers` at a time. Teachers are opened one after the other."""
    from nano_atlas.benches.dialogue import Guidance, Model, simulate, teacher_guide

    pairs = list(zip(tasks, problems))
    missing = {
        arm: [
            (task, problem, trial)
            for trial in range(config.trials)
            for task, problem in pairs
            if (arm, problem.domain, problem.id, trial) not in log.results
        ]
        for arm in config.arms
    }
    if not any(missing.values()):
        return
    draws = random.Random(config.seed)
    trial_seeds = [draws.randint(0, 1_000_000) for _ in range(config.trials)]  # as tau2 draws them
    student = config.open(config.student, config.student_model)
    asked = Model(student, Generation(config.answer_tokens, config.temperature, config.top_p))
    user = None
    if not config.is_solo:
        seat = config.open(config.user, config.user_model)
        user = Model(seat, Generation(config.answer_tokens, config.user_temperature))
    donors = derange(problems, config.seed) if SHUFFLED in config.arms else {}

    def shuffled(problem: Problem, trial: int) -> Guidance:
        given = log.results[
            list(config.teachers)[-1], donors[problem.id].domain, donors[problem.id].id, trial
        ]
        return Guidance(
            given.approach,
            given.approach_tokens,
            given.teacher_text,
            given.teacher_tokens,
            given.is_teacher_truncated,
            given.teaching,
        )

    with tqdm(
        total=len(pairs) * config.trials * len(config.arms), initial=len(log.results), unit="dialogue"
    ) as bar:
        for arm in (arm for arm, jobs in missing.items() if jobs):
            bar.set_description(arm)
            teach = None
            if arm == UNTRAINED or arm in config.teachers:
                teacher = (
                    student if arm == UNTRAINED else config.open(config.teachers[arm], config.teacher_model)
                )
                teach = teacher_guide(student, teacher, config.episode)

            def run(task, problem: Problem, trial: int) -> TaskResult:
                guide = (lambda *_: shuffled(problem, trial)) if arm == SHUFFLED else teach
                simulation, told = simulate(
                    task,
                    config.domain,
                    asked,
                    user,
                    guide,
                    trial=trial,
                    seed=trial_seeds[trial],
                    max_steps=config.max_steps,
                )
                tokens = student.count_tokens(told.teaching) if told.teaching else 0
                return task_result(
                    arm, problem, simulation.model_dump(mode="json", exclude_none=True), asdict(told), tokens
                )

            for result in in_parallel(run, missing[arm], config.workers):
                log.append([result])
                bar.update()


def in_parallel(run: Callable[..., TaskResult], jobs: Sequence[tuple], workers: int) -> Iterator[TaskResult]:
    """Results as they come. A seat that is gone for good ends the run, instead of failing all dialogues that are left: when
    GIVE_UP in a row did not reach it, these are not yielded, and run again when the run is continued.
    """
    unreached: list[TaskResult] = []
    pool, finished = (
        ThreadPoolExecutor(workers),
        SimpleQueue(),
    )  # as_completed gives what is finished already in any order
    try:
        for job in jobs:
            pool.submit(run, *job).add_done_callback(finished.put)
        for _ in jobs:
            unreached.append(finished.get().result())
            if termination(unreached[-1]) not in UNREACHED:
                yield from unreached
                unreached.clear()
            elif len(unreached) == GIVE_UP:
                raise UserError(
                    f"{len(unreached)} dialogues in a row failed for reasons of infrastructure, the last with: "
                    f"{unreached[-1].record['simulation']['info']['failure']}"
                )
        yield from unreached
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------------ the outcome


def write_official(config: Config, tasks: Sequence, contents: dict[str, str]) -> None:
    """A file per arm in tau2's own format. Its metrics leave out infrastructure errors; without any, the means are equal."""
    from tau2.data_model.simulation import Results, SimulationRun, TextRunConfig
    from tau2.runner import get_info

    agent, user = ("llm_agent_solo", "dummy_user") if config.is_solo else ("llm_agent", "user_simulator")
    results, _ = read_results(config.out / "tasks.jsonl")
    for arm in config.arms:
        run = TextRunConfig(
            domain=config.domain,
            agent=agent,
            user=user,
            llm_agent=f"{config.student} ({arm})",
            llm_user=str(config.user),
            llm_args_agent={"temperature": config.temperature},
            llm_args_user={"temperature": config.user_temperature},
            num_trials=config.trials,
            max_steps=config.max_steps,
            seed=config.seed,
        )
        info = get_info(run)
        info.git_commit = contents["tau2 commit"]
        runs = [
            SimulationRun.model_validate(result.record["simulation"])
            for result in results.values()
            if result.arm == arm
        ]
        official = Results(info=info, tasks=list(tasks), simulations=runs)
        replace_text(config.out / f"tau2-{arm}.json", official.model_dump_json(indent=1))


def own_tables(config: Config, out: Path) -> str:
    """Markdown: what became of the dialogues, the floors, and of what package, data and user this is true."""
    lines = dialogue_tables(
        list(read_results(out / "tasks.jsonl")[0].values()), config.arms, config.names, config.trials
    )
    if floors_of_run := read_json(out / "floors.json"):
        lines += [floor_line(floors_of_run), ""]
    contents = read_json(out / "run.json").get("contents", {})
    lines.append(
        "; ".join([*(f"{name} {value[:16]}" for name, value in contents.items()), f"user {config.user}"])
    )
    return "\n".join([*lines, ""])


def floor_line(rewards: dict[str, float]) -> str:
    return "Floors, by the official scorer: " + ", ".join(
        f"{name} {100 * reward:.2f} %" for name, reward in rewards.items()
    )
