"""Does the teacher help? The student before and after teaching, task by task, with intervals and controls.

    python eval.py                                                    # the nano world: 500 held-out tasks in each domain
    python eval.py --full                                             # all controls and all columns
    python eval.py --preset own --bench gsm8k --data test.jsonl --student DIR --teacher sft=DIR grpo=DIR --out runs/gsm8k
    python eval.py --bench tau2 --help                                # dialogues; crmarena: see nano_atlas/benches/crmarena.py
    python eval.py --tables --out runs/gsm8k                          # the tables again, without any model

Every arm answers the same tasks in the same answer format, so arms are compared in pairs:

    student      alone: its approach (probe) and its answer (baseline), computed once and shared by all other arms
    <teacher>    a --teacher reads question and approach and writes a teaching; with it the student answers again
    shuffled     control, any teaching: those of the last teacher, each given to *another* task of its domain
    untrained    control, a second look: the student itself is the teacher
    two-votes    control, a second try: the majority of two answers of the student alone; the first wins a tie
    same-budget  control, more tokens: the majority of as many answers alone as the last teacher's pair costs (rounded up)

--out gets tasks.jsonl (a line per answer; an interrupted run continues there), run.json, results.json and tables.md.
Simplified against leaderboards: one greedy answer per task by default (--samples for averages), compared as number or words.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from math import ceil
from pathlib import Path
from statistics import mean

from nano_atlas import answers, world
from nano_atlas.benches import arms, crmarena, scores
from nano_atlas.benches.arms import SAME_BUDGET, SHUFFLED, STUDENT, TWO_VOTES, UNTRAINED, TaskLog, TaskResult
from nano_atlas.config import derive_seed, option, parse, run_script
from nano_atlas.data import Problem, load_problems
from nano_atlas.episode import Sketch, guide, seeds, sketch, teach
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


@dataclass(frozen=True)
class Benchmark:  # a base of Config, so that its options come first
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
    def controls(self) -> Sequence[str]:
        return arms.CONTROLS if self.full and self.teacher else super().controls

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

        return tau2.main(argv)
    config = parse(Config, with_deployment(argv, is_evaluation=True), presets("eval"), __doc__)
    if not config.tables:
        run(config)
    scores.finish(config, crmarena.tables, is_short=not config.full)


def run(config: Config) -> None:
    """Compute whatever config.out does not hold yet."""
    tasks, is_right = load_tasks(config), verifier(config)
    query = crmarena.salesforce() if config.bench == "crmarena" else None

    def open_seat(name: str) -> Seat:
        seat = config.open({STUDENT: config.student, **config.teachers}[name])
        return crmarena.QueryingSeat(seat, query) if query and name == STUDENT else seat

    contents = {f"tasks {name}": digest(repr(p).encode() for p in tasks[name]) for name in tasks}
    arms.start_or_continue(config, contents)
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


def verifier(config: Config) -> Callable[[str, str], bool]:
    """Whether an extracted answer and the gold one are equal."""
    if config.verifier == "exact":
        return crmarena.is_correct if config.bench == "crmarena" else answers.is_correct
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("--verifier math-verify: pip install 'math-verify[antlr4_13_2]'") from None
    # As boxes, because bare text like "1/2" is only understood in part; verify takes the gold answer first.
    return lambda answer, gold: verify(*(parse(f"\\boxed{{{text}}}") for text in (gold, answer)))


def evaluate(config: Config, tasks: Tasks, log: TaskLog, is_right: Callable, open_seat: Callable) -> None:
    """Run each chunk of each arm that the log does not hold whole. Teachers are opened one at a time, and only if needed.

    Arms that do not need each other advance side by side, and chunks mix domains, so that few large calls reach a seat.
    """
    problems, size = list(chain(*tasks.values())), max(1, CHUNK // config.samples)
    seats: dict[str, Seat] = {}
    scripts, teachers = Scripts(config, tasks, log, seats), [[name] for name in config.teachers]
    ways = dict.fromkeys(config.arms, scripts.taught) | dict.fromkeys(arms.ALONE, scripts.alone)
    for stage in [STUDENT, TWO_VOTES], *teachers, [SHUFFLED, UNTRAINED, SAME_BUDGET]:
        seats.pop("teacher", None)  # the last one, before the next one is opened
        stage = [arm for arm in stage if arm in config.arms]
        for start in range(0, len(problems), size):
            chunk = problems[start : start + size]
            missing = [arm for arm in stage if any(len(log.get(arm, p)) < config.samples for p in chunk)]
            if not missing:
                continue
            student = seats["student"] = seats.get("student") or open_seat(STUDENT)
            if "teacher" not in seats:
                seats["teacher"] = open_seat(*stage) if stage in teachers else student
            running = [ways[arm](arm, problem) for arm in missing for problem in chunk]
            progress = f"{', '.join(missing)}: {len(chunk)} of {len(problems)} tasks"
            results = list(chain(*play(running, seats, progress)))
            for attempt, gold in ((result.attempt, result.gold) for result in results):
                attempt.is_correct = attempt.answer is not None and is_right(attempt.answer, gold)
            log.append(results)


@dataclass
class Scripts:
    """How each arm answers one task: scripts that return its results, one per sample."""

    config: Config
    tasks: Tasks
    log: TaskLog
    seats: dict[str, Seat]

    def alone(self, arm: str, problem: Problem) -> Script:
        """The student's own answers. In the arms that vote each is the majority of several, at the price of all of them."""
        config, task, n = self.config, (arm, problem.domain, problem.id), self.config.samples
        episode, seed, votes = config.episode, seeds(config.seed), 1
        if arm != STUDENT:
            votes = 2 if arm == TWO_VOTES else self.budget[problem.domain]
            warm = config.temperature or VOTE_TEMPERATURE
            episode = replace(episode, probe_tokens=0, temperature=(warm, warm))
            seed = lambda *_: derive_seed(config.seed, *task, 0)
        found = yield from sketch(problem, episode, seed, votes * n)
        attempts = [arms.majority(found.baselines[sample::n]) for sample in range(n)]
        probe = found.approach, found.approach_tokens
        return [TaskResult(*task, i, problem.answer, attempt, *probe) for i, attempt in enumerate(attempts)]

    def taught(self, arm: str, problem: Problem) -> Script:
        """With a teaching. Shuffled, sample i gets the one that the last teacher wrote for sample i of the task's donor."""
        config, seed, alone = self.config, seeds(self.config.seed), self.log.get(STUDENT, problem)
        known = Sketch(problem, alone[0].approach, alone[0].approach_tokens, [own.attempt for own in alone])
        if arm == SHUFFLED:
            given = self.log.get(next(reversed(config.teachers)), self.donors[problem.domain][problem.id])
            teachings = [one.teaching for one in given]
            replies = [Reply(one.teacher_text, one.teacher_tokens, one.is_teacher_truncated) for one in given]
            told = zip((yield from guide(known, teachings, config.episode, seed)), replies, teachings)
        else:
            count = self.seats["teacher"].count_tokens
            made = yield from teach(known, config.episode, RewardConfig(), seed, count, config.samples)
            told = [(episode.guided, episode.reply, episode.teaching) for episode in made]
        results = []
        for own, (attempt, reply, teaching) in zip(alone, told):
            teacher = {"teacher_text": reply.text, "teacher_tokens": reply.tokens, "teaching": teaching}
            teacher["is_teacher_truncated"] = reply.is_truncated
            teacher["is_leak"] = teaching is not None and answers.reveals_answer(teaching, own.gold)
            results.append(replace(own, arm=arm, attempt=attempt, **teacher))
        return results

    @cached_property
    def donors(self) -> dict[str, dict[str, Problem]]:
        return {domain: arms.derange(problems, self.config.seed) for domain, problems in self.tasks.items()}

    @cached_property
    def budget(self) -> dict[str, int]:
        """By domain: answers of the student alone that cost at least what one of the last teacher's pair does (tokens)."""
        pair, found = (next(reversed(self.config.teachers)), STUDENT), {}
        for domain, problems in self.tasks.items():
            costs = [mean(r.all_tokens for p in problems for r in self.log.get(arm, p)) for arm in pair]
            found[domain] = ceil(costs[0] / max(costs[1], 1))
        return found


if __name__ == "__main__":
    run_script(main)
