"""Does the teacher help? The student before and after teaching, task by task, with intervals and controls.

    python eval.py                                                    # the nano world: 500 held-out tasks in each domain
    python eval.py --full                                             # all controls and all columns
    python eval.py --preset own --bench gsm8k --data test.jsonl --student DIR --teacher sft=DIR grpo=DIR --out runs/gsm8k
    python eval.py --preset own --bench aime25 --data aime25.jsonl --samples 16 --temperature 0.6 --top-p 0.95 ...
    python eval.py --preset own --bench crmarena --data b2b.jsonl ... # needs Salesforce credentials, see nano_atlas/benches/crmarena.py
    python eval.py --bench tau2 --student URL --teacher URL ...       # dialogues, see `eval.py --bench tau2 --help`
    python eval.py --tables --out runs/gsm8k                          # the tables again, without any model
    python -m benchmarks.claims runs/*/results.json                   # what was published, beside what was measured here

Every arm answers the same tasks in the same answer format, so arms are compared in pairs:

    student      alone: its approach (probe) and its answer (baseline), computed once and shared by all other arms
    <teacher>    a --teacher reads question and approach and writes a teaching; with it the student answers again
    shuffled     control: the last teacher's teachings, each given to *another* task of its domain; a gain that remains comes
                 from being taught anything at all
    untrained    control: the student itself as teacher; a gain comes from a second look. The untrained base of a larger
                 teacher is one more teacher: --teacher base=DIR ...
    two-votes    control: the majority of two answers of the student alone; the first wins a tie
    same-budget  control: the majority of as many answers of the student alone as the tokens of the last teacher's pair buy
                 (rounded up); a teacher that is worth its tokens beats it

In --out, `tasks.jsonl` gets one line per (arm, domain, task, sample) as soon as a chunk of tasks is done; an interrupted run
continues there, with nothing lost or done twice. `results.json` and `tables.md` are the outcome, `run.json` says of what.

Simplified against leaderboards: one greedy answer per task by default (--samples for averages), answers compared as numbers or
words (`answers.is_correct`), or by symbolic algebra with --verifier math-verify.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import mean

from nano_atlas import answers, world
from nano_atlas.benches import arms, crmarena
from nano_atlas.benches.arms import SAME_BUDGET, SHUFFLED, TWO_VOTES, UNTRAINED
from nano_atlas.benches.results import STUDENT, TaskLog, TaskResult, read_results, start_or_continue
from nano_atlas.benches.scores import summary, tables
from nano_atlas.config import derive_seed, option, parse, run_script
from nano_atlas.data import Problem, load_problems
from nano_atlas.episode import Attempt, Sketch, guide, majority, seeds, sketch, teach
from nano_atlas.errors import UserError
from nano_atlas.presets import presets
from nano_atlas.reward import RewardConfig
from nano_atlas.runs import digest
from nano_atlas.runtime.deploy import with_deployment
from nano_atlas.schedule import Script, play
from nano_atlas.seats import Reply, Seat

VOTE_TEMPERATURE = 0.7  # of the votes where all else is greedy: equal answers are no vote
CHUNK = 1024  # answers per arm between two writes: what a killed run loses at most
Tasks = dict[str, list[Problem]]  # by domain
Opener = Callable[[str], Seat]  # of the student, or of a teacher by name
Verifier = Callable[[str, str], bool]  # whether an extracted answer and the gold one are equal


@dataclass(frozen=True)
class Benchmark:
    """The first options of --help."""

    preset: str = option("nano", "")
    bench: str = option("nano", "benchmark; also: tau2", ("nano", "gsm8k", "aime25", "crmarena"))
    data: Path | None = option(None, "JSONL of problems with gold answers, for all but nano", resumable=True)


@dataclass(frozen=True)
class Config(arms.ArmsConfig, Benchmark):
    full: bool = option(False, "all controls, and every column instead of a summary", resumable=True)
    samples: int = option(1, "answers per task: avg@n, pass@n, maj@n", group="answers", at_least=1)
    verifier: str = option("exact", "compare numbers and words, or algebra", ("exact", "math-verify"))
    deploy: Path | None = option(None, "YAML that names student and teacher in service", resumable=True)

    @property
    def controls(self) -> list[str]:
        return list(arms.CONTROLS) if self.full else super().controls

    def check(self) -> None:
        if self.tables:
            return
        if self.student is None:
            raise UserError(f"--preset {self.preset} needs --student DIRECTORY or URL")
        self.check_arms()
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"--temperature 0 gives {self.samples} times the same answer; raise it")
        if bool(self.data) == (self.bench == "nano"):
            raise UserError("--data FILE goes with every --bench but nano, which makes its own tasks")


def main() -> None:
    argv = sys.argv[1:]
    if "--bench=tau2" in argv or ("--bench", "tau2") in pairwise(argv):
        from nano_atlas.benches import tau2

        tau2.main(argv)
        return
    config = parse(Config, with_deployment(argv, is_evaluation=True), presets("eval"), __doc__)
    if not config.tables:
        run(config)
    report, stored = arms.stored_report(config.out, Config)
    results = read_results(config.out / "tasks.jsonl").values()
    policy = crmarena.tables(results, stored.arms, stored.names)
    text = tables(report, stored.names) + policy
    if not config.tables:
        arms.write_report(config.out, report, text)
    if not config.full:
        short = summary(report, list(stored.teachers), SHUFFLED, stored.names)
        text = f"{short}All columns: {config.out / 'tables.md'} (--full)\n{policy}"
    print(text)


def run(config: Config) -> None:
    """Compute whatever config.out does not hold yet."""
    tasks = load_tasks(config)
    is_right = verifier(config)
    query = crmarena.salesforce() if config.bench == "crmarena" else None

    def open_seat(name: str) -> Seat:
        seat = config.open(config.student if name == STUDENT else config.teachers[name])
        return crmarena.QueryingSeat(seat, query) if query and name == STUDENT else seat

    digests = {f"tasks {name}": digest(repr(p).encode() for p in domain) for name, domain in tasks.items()}
    start_or_continue(config, config.contents() | digests)
    with TaskLog(config.out / "tasks.jsonl") as log:
        evaluate(config, tasks, log, is_right, open_seat)


def load_tasks(config: Config) -> Tasks:
    """A file is one domain, called after the benchmark; in CRMArena each kind of task is one."""
    if config.bench == "nano":
        return {domain: world.held_out(domain, config.limit or 500, config.seed) for domain in world.DOMAINS}
    if config.bench == "crmarena":
        return crmarena.load_tasks(config.data, config.limit)
    problems = load_problems(config.data)[: config.limit]
    return {config.bench: [replace(problem, domain=config.bench) for problem in problems]}


def verifier(config: Config) -> Verifier:
    if config.bench == "crmarena":
        return crmarena.is_correct
    if config.verifier == "exact":
        return answers.is_correct
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("--verifier math-verify: pip install 'math-verify[antlr4_13_2]'") from None
    # As boxes, because bare text like "1/2" is only understood in part; verify takes the gold answer first.
    return lambda answer, gold: verify(*(parse(f"\\boxed{{{text}}}") for text in (gold, answer)))


# ---------------------------------------------------------------------------------------------------------------- the arms


def evaluate(config: Config, tasks: Tasks, log: TaskLog, is_right: Verifier, open_seat: Opener) -> None:
    """Run each chunk of each arm that the log does not hold whole. Teachers are opened one at a time, and only if needed.

    Arms that do not need each other advance side by side, and chunks mix domains, so that few large calls reach a seat. A chunk
    that was cut short is computed again: answers do not depend on where a run was interrupted.
    """
    problems = [problem for domain in tasks.values() for problem in domain]
    size = max(1, CHUNK // config.samples)
    chunks = [problems[start : start + size] for start in range(0, len(problems), size)]
    seats: dict[str, Seat] = {}
    scripts = Scripts(config, tasks, log, seats)
    teachers = [[name] for name in config.teachers]
    for stage in [[STUDENT, TWO_VOTES], *teachers, [SHUFFLED, UNTRAINED, SAME_BUDGET]]:
        seats.pop("teacher", None)  # the last one, before the next one is opened
        for chunk in chunks:
            missing = [arm for arm in stage if arm in config.arms and log.lacks(arm, chunk, config.samples)]
            if not missing:
                continue
            if "student" not in seats:
                seats["student"] = open_seat(STUDENT)
            if "teacher" not in seats:
                seats["teacher"] = open_seat(stage[0]) if stage[0] in config.teachers else seats["student"]
            running = [scripts.of(arm, problem) for arm in missing for problem in chunk]
            progress = f"{', '.join(missing)}: {len(chunk)} of {len(problems)} tasks"
            finished = play(running, seats, progress)
            log.append(judged(result, is_right) for results in finished for result in results)


def judged(result: TaskResult, is_right: Verifier) -> TaskResult:
    answer = result.attempt.answer
    is_correct = answer is not None and is_right(answer, result.gold)
    return replace(result, attempt=replace(result.attempt, is_correct=is_correct))


@dataclass
class Scripts:
    """How each arm answers one task: scripts that return its results, one per sample."""

    config: Config
    tasks: Tasks
    log: TaskLog
    seats: dict[str, Seat]

    def of(self, arm: str, problem: Problem) -> Script:
        if arm in (STUDENT, TWO_VOTES, SAME_BUDGET):
            return self.alone(arm, problem)
        return self.shuffled(arm, problem) if arm == SHUFFLED else self.taught(arm, problem)

    def alone(self, arm: str, problem: Problem) -> Script:
        """The student's own answers. In the arms that vote each is the majority of several, at the price of all of them."""
        config, task = self.config, (arm, problem.domain, problem.id)
        episode, seed, votes = config.episode, seeds(config.seed), 1
        if arm != STUDENT:
            votes = 2 if arm == TWO_VOTES else self.budget[problem.domain]
            temperature = config.temperature or VOTE_TEMPERATURE
            episode = replace(episode, probe_tokens=0, temperature=(temperature, temperature))
            number = derive_seed(config.seed, *task, 0)
            seed = lambda *_: number
        found = yield from sketch(problem, episode, seed, votes * config.samples)
        groups = [found.baselines[start :: config.samples] for start in range(config.samples)]
        probe = found.approach, found.approach_tokens
        return [TaskResult(*task, i, problem.answer, majority(own), *probe) for i, own in enumerate(groups)]

    def taught(self, arm: str, problem: Problem) -> Script:
        episode, seed, samples = self.config.episode, seeds(self.config.seed), self.config.samples
        alone, count = self.log.get(STUDENT, problem), self.seats["teacher"].count_tokens
        made = yield from teach(known(problem, alone), episode, RewardConfig(), seed, count, samples)
        return [guided(own, arm, e.guided, e.reply, e.teaching) for own, e in zip(alone, made)]

    def shuffled(self, arm: str, problem: Problem) -> Script:
        """Sample i of a task gets the teaching that the last teacher wrote for sample i of the task's donor."""
        episode, seed, alone = self.config.episode, seeds(self.config.seed), self.log.get(STUDENT, problem)
        given = self.log.get(list(self.config.teachers)[-1], self.donors[problem.domain][problem.id])
        teachings = [one.teaching for one in given]
        attempts = yield from guide(known(problem, alone), teachings, episode, seed)
        replies = [Reply(one.teacher_text, one.teacher_tokens, one.is_teacher_truncated) for one in given]
        return [guided(own, arm, *told) for own, *told in zip(alone, attempts, replies, teachings)]

    @cached_property
    def donors(self) -> dict[str, dict[str, Problem]]:
        return {domain: arms.derange(problems, self.config.seed) for domain, problems in self.tasks.items()}

    @cached_property
    def budget(self) -> dict[str, int]:
        """By domain: answers of the student alone that cost at least what one of the last teacher's pair does (tokens)."""

        def price(arm: str, domain: str) -> float:
            return mean(r.all_tokens for problem in self.tasks[domain] for r in self.log.get(arm, problem))

        last = list(self.config.teachers)[-1]
        return {name: ceil(price(last, name) / max(price(STUDENT, name), 1)) for name in self.tasks}


def known(problem: Problem, alone: list[TaskResult]) -> Sketch:
    """What the student did alone, from the log: the same for every arm."""
    return Sketch(problem, alone[0].approach, alone[0].approach_tokens, [one.attempt for one in alone])


def guided(own: TaskResult, arm: str, attempt: Attempt, reply: Reply, teaching: str | None) -> TaskResult:
    """`own`, the student's result alone, after a teaching. reply: the teacher's whole completion."""
    return replace(
        own,
        arm=arm,
        attempt=attempt,
        teacher_text=reply.text,
        teacher_tokens=reply.tokens,
        is_teacher_truncated=reply.is_truncated,
        teaching=teaching,
        is_leak=teaching is not None and answers.reveals_answer(teaching, own.gold),
    )


if __name__ == "__main__":
    run_script(main)
