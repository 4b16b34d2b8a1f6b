r"""Does the teacher help? Compares the student with and without teaching on the same tasks, with controls.

    try it, on a CPU   python eval.py                       (after train_grpo.py)
    all controls       python eval.py --full
    your own models    python eval.py --preset own --bench gsm8k --data test.jsonl \
                           --student DIR --teacher sft=DIR grpo=DIR --out runs/gsm8k
    tables again       python eval.py --tables --out runs/gsm8k
    dialogues          python eval.py --bench tau2 --help

Every arm answers the same tasks in the same answer format, so arms are compared in pairs:

    student      alone: its approach (probe) and its answer (baseline), computed once, shared by all arms
    <teacher>    a --teacher reads question and approach and writes a teaching; the student answers with it
    shuffled     control, any teaching: the last teacher's teachings, each given to *another* task
    untrained    control, a second look: the student is its own teacher
    two-votes    control, a second try: the majority of two answers of the student alone; the first wins a tie
    same-budget  control, more tokens: the majority of as many answers alone as the last teacher's pair costs

OUT gets tasks.jsonl (a line per answer; the same command continues an interrupted run), run.json, results.json and
tables.md. Simplified: by default one greedy answer per task (--samples: averages), compared as a number or as words.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, pairwise
from math import ceil
from pathlib import Path
from statistics import mean

from nano_atlas import protocol, reward, runs, world
from nano_atlas.benches import arms, crmarena, scores, tau2
from nano_atlas.benches.arms import SHUFFLED, STUDENT, TWO_VOTES, TaskLog, TaskResult
from nano_atlas.config import derive_seed, option, parse, run_script
from nano_atlas.data import Problem, load_problems
from nano_atlas.episode import Attempt, EpisodeConfig, Sketch, guide, seeds, sketch, teach, verify
from nano_atlas.errors import UserError
from nano_atlas.functions import verifier_seat
from nano_atlas.presets import announce, look_at, presets
from nano_atlas.runtime.deploy import with_deployment
from nano_atlas.schedule import Fault, Script, caught, play

VOTE_TEMPERATURE = 0.7  # of the votes in a greedy evaluation, because greedy answers would all be equal
CHUNK = 1024  # answers per arm between two writes: the most that a killed run loses
Tasks = dict[str, list[Problem]]  # by domain


@dataclass(frozen=True)
class Benchmark:  # a base of Config, so that its options come first
    preset: str = option("nano", "")
    bench: str = option("nano", "benchmark; see also --bench tau2", ("nano", "gsm8k", "aime25", "crmarena"))
    data: Path | None = option(None, "JSONL of problems with answers; for all but nano", resumable=True)


@dataclass(frozen=True)
class Config(arms.ArmsConfig, Benchmark):
    full: bool = option(False, "run all controls, and print all columns", resumable=True)
    samples: int = option(1, "answers per task (avg@n, pass@n, maj@n)", group="answers", at_least=1)
    answer_format: str = option("solution", "how the student marks its answer", protocol.ANSWER_FORMATS)
    verifier: str = option("exact", "exact, or function MODULE:NAME that scores answers, 0 to 1")
    dry_run: bool = option(False, "print what would run, and the score of the answer None", resumable=True)
    deploy: Path | None = option(None, "YAML file that names student and teacher", resumable=True)

    @property
    def arms(self) -> list[str]:
        return [STUDENT, *self.teachers, *arms.CONTROLS] if self.full and self.teacher else super().arms

    @property
    def episode(self) -> EpisodeConfig:
        is_own = self.bench == "crmarena" and self.verifier == "exact"
        return replace(super().episode, verifier=f"{crmarena.__name__}:verify" if is_own else self.verifier)

    def check(self) -> None:
        if self.tables:
            return
        if self.student is None and not self.dry_run:
            raise UserError(f"--preset {self.preset} needs --student DIRECTORY or URL")
        super().check()
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"--samples {self.samples}: with --temperature 0 they are equal; raise it")
        if bool(self.data) == (self.bench == "nano"):
            raise UserError("--bench nano makes its own tasks; every other --bench needs --data FILE")


def main() -> None:
    argv = sys.argv[1:]
    if "--bench=tau2" in argv or ("--bench", "tau2") in pairwise(argv):
        config, compute, own = parse(tau2.Config, argv, {}, tau2.__doc__), tau2.run, tau2.tables
    else:
        argv = with_deployment(argv, is_evaluation=True)
        config, compute, own = parse(Config, argv, presets("eval"), __doc__), run, None
    if config.tables or config.dry_run:
        faults = None if config.tables else compute(config)  # a dry run ends there
    else:
        limit = f"{config.limit} tasks of each domain" if config.limit else "all tasks"
        announce("eval", config, f"benchmark {config.bench}, {limit}, arms {', '.join(config.arms)}")
        with runs.owned(config.out):
            faults = compute(config)
    scores.finish(config, own, faults)
    look_at(config.out)


def run(config: Config) -> dict[str, list[str]]:
    """Compute the results that config.out lacks. Returns, by arm, why tasks have no result."""
    tasks = load_tasks(config)
    if config.dry_run:
        seats, nothing = verifier_seat(config.episode.verifier), [Attempt("None", "None", 0.0, 0, False)]
        for domain, problems in tasks.items():
            scripts = [verify(problem, nothing, config.episode) for problem in problems]
            floor = mean(score or 0.0 for (score,) in play(scripts, seats))
            print(f"{domain}: {len(problems)} tasks; None as the answer to each scores {floor:.1%}")
        sys.exit()
    query = crmarena.salesforce() if config.bench == "crmarena" else None
    contents = {f"tasks {name}": runs.digest(repr(p).encode() for p in tasks[name]) for name in tasks}
    arms.start_or_continue(config, contents)
    with TaskLog(config.out / "tasks.jsonl") as log:
        problems, how = list(chain(*tasks.values())), Arms(config, tasks, log, query)
        arms.fill(log, config, problems, how.answer)
        return log.faults


def load_tasks(config: Config) -> Tasks:
    """A data file is one domain with the benchmark's name; in CRMArena each kind of task is a domain."""
    if config.bench == "nano":
        return {domain: world.held_out(domain, config.limit or 500, config.seed) for domain in world.DOMAINS}
    if config.bench == "crmarena":
        return crmarena.load_tasks(config.data, config.limit)
    problems = load_problems(config.data)[: config.limit]
    return {config.bench: [replace(problem, domain=config.bench) for problem in problems]}


@dataclass
class Arms:
    """How each arm answers a task: scripts that return its results, one per sample."""

    config: Config
    tasks: Tasks
    log: TaskLog
    query: crmarena.Query | None = None  # for a student that may query the CRM

    def answer(self, jobs: arms.Jobs, seats: arms.Seats) -> Iterator[list[TaskResult]]:
        """About CHUNK results at a time, of all domains, so that each seat gets few large calls."""
        if self.query:
            seats = seats | {STUDENT: crmarena.QueryingSeat(seats[STUDENT], self.query)}
        size = max(1, CHUNK // self.config.samples)
        for start in range(0, len(jobs), size):
            chunk = jobs[start : start + size]
            scripts = [self.alone(*job) if job[0] in arms.ALONE else self.taught(*job) for job in chunk]
            label = f"{', '.join(sorted({arm for arm, _ in chunk}))}: {len(chunk)} of {len(jobs)} tasks"
            results = []
            for (arm, problem), found in zip(chunk, play(list(map(caught, scripts)), seats, label)):
                if isinstance(found, Fault):
                    self.log.faults.setdefault(arm, []).append(f"{problem.domain} {problem.id}: {found}")
                else:
                    results += found
            yield results

    def alone(self, arm: str, problem: Problem) -> Script:
        """The student's own answers. In the voting arms each is the majority of several and costs the sum of them."""
        config, task, n = self.config, (arm, problem.domain, problem.id), self.config.samples
        episode, seed, votes = config.episode, seeds(config.seed), 1
        if arm != STUDENT:
            votes = 2 if arm == TWO_VOTES else self.budget[problem.domain]
            if not votes:
                raise Fault("this arm needs the cost of the last teacher's answers, and there is none yet")
            warm = config.temperature or VOTE_TEMPERATURE
            episode = replace(episode, probe_tokens=0, temperature=(warm, warm))
            seed = lambda *_: derive_seed(config.seed, *task, 0)
        found = yield from sketch(problem, episode, seed, votes * n)
        attempts = [arms.majority(found.baselines[sample::n]) for sample in range(n)]
        told = {"approach_tokens": found.approach_tokens, "question": problem.question}
        result = partial(TaskResult, *task, gold=problem.answer, approach=found.approach, **told)
        return [result(sample=i, attempt=attempt) for i, attempt in enumerate(attempts)]

    def taught(self, arm: str, problem: Problem) -> Script:
        """Answers with a teaching. Shuffled: sample i gets the last teacher's teaching for sample i of the task's donor."""
        config, seed, n = self.config.episode, seeds(self.config.seed), self.config.samples
        alone = self.log.get(STUDENT, problem, n)
        known = Sketch(problem, alone[0].approach, alone[0].approach_tokens, [own.attempt for own in alone])
        if arm == SHUFFLED:
            given = self.log.get(self.config.last, self.donors[problem.domain][problem.id], n)
            attempts = yield from guide(known, [one.teaching for one in given], config, seed)
            told = [(one.told, attempt) for one, attempt in zip(given, attempts)]
        else:
            # the rewards, and the lengths they depend on, are not used here
            made = yield from teach(known, config, reward.RewardConfig(), seed, len, n)
            told = [(episode.reply, episode.guided) for episode in made]
        return [own.taught(reply, arm=arm, attempt=attempt) for own, (reply, attempt) in zip(alone, told)]

    @cached_property
    def donors(self) -> dict[str, dict[str, Problem]]:
        return {domain: arms.derange(problems, self.config.seed) for domain, problems in self.tasks.items()}

    @cached_property
    def budget(self) -> dict[str, int]:
        """By domain: how many answers alone cost at least as many tokens as the last teacher's pair (0: unknown)."""
        cost = lambda arm, own: mean([r.all_tokens for p in own for r in self.log.get(arm, p)] or [0])
        pair, tasks = self.config.last, self.tasks.items()
        return {domain: ceil(cost(pair, own) / max(cost(STUDENT, own), 1)) for domain, own in tasks}


if __name__ == "__main__":
    run_script(main)
