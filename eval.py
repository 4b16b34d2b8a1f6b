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
    untrained    control: the student's own weights in the teacher's seat, that is, teaching from the student itself; a gain
                 comes from a second look. (The untrained base of a larger teacher is one more teacher: --teacher base=DIR ...)
    two-votes    control: the majority of two answers of the student alone; the first wins a tie
    same-budget  control: the majority of as many answers of the student alone as the tokens of the last teacher's pair buy
                 (rounded up); a teacher that is worth its tokens beats it

In --out, `tasks.jsonl` gets one line per (arm, domain, task, sample) as soon as a chunk of tasks is done; an interrupted run
continues there, with nothing lost or done twice. `results.json` and `tables.md` are the outcome, `run.json` says of what.

Simplified against leaderboards: one greedy answer per task by default (--samples for averages), answers compared as numbers or
words (`protocol.is_correct`), or by symbolic algebra with --verifier math-verify.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from nano_atlas import protocol, world
from nano_atlas.benches import crmarena, tau2
from nano_atlas.benches.arms import (
    CONTROLS,
    SAME_BUDGET,
    SHUFFLED,
    TWO_VOTES,
    UNTRAINED,
    ArmsConfig,
    derange,
    require_checkpoint,
    stored_report,
    write_report,
)
from nano_atlas.benches.results import STUDENT, TaskLog, TaskResult, read_results, start_or_continue
from nano_atlas.benches.scores import Report, summary, tables
from nano_atlas.config import Preset, option, parse, run_script
from nano_atlas.data import Problem, derive_seed, load_problems
from nano_atlas.episode import (
    Draft,
    Episode,
    Sketch,
    attempt,
    guided_questions,
    majority,
    read_drafts,
    read_episodes,
    read_sketches,
    sketch_questions,
    teaching_questions,
)
from nano_atlas.errors import UserError
from nano_atlas.reward import RewardConfig
from nano_atlas.runs import digest
from nano_atlas.runtime.deploy import evaluation_options, with_deployment
from nano_atlas.seats import Generation, Question, Reply, Seat

VOTE_TEMPERATURE = 0.7  # of the votes where all else is greedy: equal answers are no vote
BENCHES = ("nano", "gsm8k", "aime25", "crmarena", "tau2")


@dataclass(frozen=True)
class Config(ArmsConfig):
    preset: str = option("nano", "", group="what is evaluated")
    bench: str = option("nano", "benchmark; all but nano need their tasks as --data", BENCHES[:-1])
    data: Path | None = option(
        None, "JSONL of problems with gold answers", resumable=True
    )  # its contents are compared instead
    deploy: Path | None = option(
        None,
        "YAML file that says which student and teacher are in service; flags override it",
        resumable=True,
    )
    control: tuple[str, ...] = option(CONTROLS, "control arms", (*CONTROLS, "none"))
    samples: int = option(1, "answers per task and arm; above 1 the tables show avg@n, pass@n and maj@n")
    verifier: str = option(
        "exact", "how answers are compared: as numbers or words, or by algebra", ("exact", "math-verify")
    )
    seed: int = option(0, "of task choice, sampling, shuffling and bootstrap")
    out: Path = option(Path("runs/nano/eval"), "directory of the results", resumable=True)
    full: bool = option(
        False, "run all controls, and print every column instead of a summary", resumable=True
    )
    chunk: int = option(
        1024, "answers computed between two writes: what a killed run loses at most; small ones waste speed"
    )

    @property
    def controls(self) -> list[str]:
        return list(CONTROLS) if self.full else super().controls

    def check(self) -> None:
        if self.student is None and not self.tables:
            raise UserError(f"--preset {self.preset} needs --student DIRECTORY or URL")
        self.check_arms()
        if min(self.samples, self.chunk) < 1:
            raise UserError("--samples and --chunk must be at least 1")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"--temperature 0 gives {self.samples} times the same answer; raise it, or leave --samples out"
            )
        if self.bench == "nano" and (self.data or self.limit is None):
            raise UserError(
                "--bench nano makes its own tasks: it takes no --data and needs a number as --limit"
            )
        if self.bench != "nano" and not self.data and not self.tables:
            raise UserError(
                f"--bench {self.bench} needs --data FILE, its problems as JSONL with question and answer"
            )
        if self.bench == "crmarena" and self.verifier != "exact":
            raise UserError("--bench crmarena has a verifier of its own; leave --verifier out")


NANO = Path("runs/nano")
GPU = {
    "bench": "gsm8k",
    "teacher": ("sft=runs/sft/model", "grpo=runs/grpo/model"),
    "out": Path("runs/eval"),
    "device": "cuda",
    "dtype": "bfloat16",
}
PRESETS = {
    "nano": Preset(
        "the nano world with its student and teachers; CPU, 1 GB",
        {
            "student": str(world.STUDENT),
            "limit": 500,
            "chunk": 4096,
            "control": (SHUFFLED,),
            "teacher": (f"sft={NANO / 'teacher-sft/model'}", f"grpo={NANO / 'teacher-grpo/model'}"),
            "probe_tokens": 40,
            "teaching_tokens": 96,
            "answer_tokens": 120,
        },
    ),
    "24gb": Preset(
        "Qwen3-0.6B student, 0.6B teacher on one GPU, 6 GB; needs --data",
        GPU | {"student": "Qwen/Qwen3-0.6B"},
    ),
    "2gpu": Preset(
        "Qwen3-4B student, 1.7B teacher on the first GPU, 16 GB; needs --data",
        GPU | {"student": "Qwen/Qwen3-4B"},
    ),
    "80gb": Preset(
        "Qwen3-4B student, 8B teacher on one GPU, 30 GB; needs --data", GPU | {"student": "Qwen/Qwen3-4B"}
    ),
    "own": Preset(
        "checkpoints or URLs of your own, one teacher in memory at a time; needs --data, --student, --teacher",
        {"bench": "gsm8k", "out": Path("runs/eval")},
    ),
}
MADE_BY = {str(NANO / "teacher-sft/model"): "train_sft.py", str(NANO / "teacher-grpo/model"): "train_grpo.py"}


def main() -> None:
    bench = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    bench.add_argument("--bench")
    if bench.parse_known_args()[0].bench == "tau2":
        tau2.main(sys.argv[1:])
        return
    config = parse(Config, sys.argv[1:], with_deployment(PRESETS, sys.argv[1:], evaluation_options), __doc__)
    if not config.tables:
        run(config)
    report, stored = stored_report(config.out, Config)
    own = own_tables(stored, config.out)
    text = tables(report, stored.names) + own
    if not config.tables:
        write_report(config.out, report, text)
    print(text if config.full else brief(report, stored, config.out) + own)


def brief(report: Report, stored: Config, out: Path) -> str:
    controls = [arm for arm in (SHUFFLED,) if any(score.arm == arm for score in report.scores)]
    return (
        f"{summary(report, list(stored.teachers), controls, stored.names)}\nAccuracy in %, difference in points with its 95 % interval over "
        f"tasks. All columns: {out / 'tables.md'} (--full)\n"
    )


def run(config: Config) -> None:
    """Compute whatever config.out does not hold yet."""
    tasks = load_tasks(config)
    is_right = verifier(config)
    query = crmarena.salesforce() if config.bench == "crmarena" else None
    for spec in (config.student, *config.teachers.values()):
        require_checkpoint(spec, MADE_BY.get(spec))
    start_or_continue(
        config,
        config.contents()
        | {
            f"tasks {name}": digest(repr(problem).encode() for problem in problems)
            for name, problems in tasks.items()
        },
    )
    with closing(TaskLog(config.out / "tasks.jsonl")) as log:
        evaluate(
            config,
            tasks,
            log,
            is_right,
            lambda: open_student(config, query),
            lambda name: config.open(config.teachers[name], config.teacher_model),
        )


# ---------------------------------------------------------------------------------------------------------------- the arms


Script = Generator[
    tuple[Seat, list[Question]], list[list[Reply]], Iterable[TaskResult]
]  # asks, and is sent the replies


def evaluate(
    config: Config,
    tasks: dict[str, list[Problem]],
    log: TaskLog,
    is_right: Callable[[str, str], bool],
    open_student: Callable[[], Seat],
    open_teacher: Callable[[str], Seat],
) -> None:
    """Run each chunk of each arm that the log does not hold whole. Teachers are opened one at a time, and only if needed.

    Arms that need nothing of each other advance side by side, and a chunk takes tasks of all domains: all that they ask of a seat at
    once is one call, so that the sampler's rows are full until its last. Chunks are the same in every run of a configuration, and
    one that was cut short is computed again as it was: an answer does not depend on where a run was interrupted.
    """
    size = max(1, config.chunk // config.samples)
    problems = [problem for domain in tasks.values() for problem in domain]
    chunks = [problems[start : start + size] for start in range(0, len(problems), size)]
    left = sum(
        len(chunk) for arm in config.arms for chunk in chunks if not log.has(arm, chunk, config.samples)
    )
    if not left:
        return
    print(
        f"{len(problems)} tasks ({', '.join(tasks)}), {len(config.arms)} arms ({', '.join(config.arms)}); results in {config.out}",
        file=sys.stderr,
    )  # like the progress; the tables alone are the output
    student = open_student()
    controls = [
        arm for arm in config.controls if arm != TWO_VOTES
    ]  # these take from the teachers, or need their token counts
    stages = [
        [arm for arm in config.arms if arm in (STUDENT, TWO_VOTES)],
        *([name] for name in config.teachers),
        controls,
    ]
    total = len(problems) * len(config.arms)
    with tqdm(total=total, initial=total - left, unit="task", desc="evaluation") as bar:
        for stage in stages:
            pending = {
                arm: [chunk for chunk in chunks if not log.has(arm, chunk, config.samples)] for arm in stage
            }
            scripts = {
                arm: script_of(arm, config, tasks, log, student, open_teacher)
                for arm in stage
                if pending[arm]
            }
            for chunk in chunks:
                running = [script(chunk) for arm, script in scripts.items() if chunk in pending[arm]]
                for results in side_by_side(running, progress=", ".join(scripts)):
                    log.append(judged(results, is_right))
                    bar.update(len(chunk))
            del scripts  # and with them a teacher, before the next one is loaded


def side_by_side(scripts: Sequence[Script], progress: str | None = None) -> list[Iterable[TaskResult]]:
    """What the scripts return; whatever they ask of the same seat in the same round is one call of it."""
    finished = {}
    replies: dict[int, list[list[Reply]] | None] = dict.fromkeys(
        range(len(scripts))
    )  # to send to each that still runs
    while replies:
        asked: dict[int, tuple[Seat, list[Question]]] = {}
        for index, told in replies.items():
            try:
                asked[index] = scripts[index].send(told)
            except StopIteration as end:
                finished[index] = end.value
        replies = {index: [] for index in asked}
        for seat in {id(seat): seat for seat, _ in asked.values()}.values():
            mine = [
                (index, question)
                for index, (whose, questions) in asked.items()
                if whose is seat
                for question in questions
            ]
            for (index, _), answers in zip(
                mine, seat.ask([question for _, question in mine], progress), strict=True
            ):
                replies[index].append(answers)
    return [finished[index] for index in range(len(scripts))]


def script_of(
    arm: str,
    config: Config,
    tasks: dict[str, list[Problem]],
    log: TaskLog,
    student: Seat,
    open_teacher: Callable[[str], Seat],
) -> Callable[[Sequence[Problem]], Script]:
    """The arm's script for a chunk; what it takes from earlier arms is looked up once."""
    if arm == STUDENT:
        return partial(answer_alone, config, student)
    if arm == SHUFFLED:
        donors = {
            (name, task): donor
            for name, domain in tasks.items()
            for task, donor in derange(domain, config.seed).items()
        }
        return partial(answer_shuffled, config, student, log, donors)
    if arm in (TWO_VOTES, SAME_BUDGET):
        votes = {
            name: 2 if arm == TWO_VOTES else same_budget(config, domain, log)
            for name, domain in tasks.items()
        }
        return partial(answer_by_vote, config, student, arm, votes)
    return partial(
        answer_taught, config, student, log, arm, student if arm == UNTRAINED else open_teacher(arm)
    )


def answer_alone(config: Config, student: Seat, chunk: Sequence[Problem]) -> Script:
    replies = yield student, sketch_questions(chunk, config.episode, config.seed, config.samples)
    return [
        TaskResult(
            STUDENT,
            problem.domain,
            problem.id,
            sample,
            problem.answer,
            alone,
            sketch.approach,
            sketch.approach_tokens,
        )
        for problem, sketch in zip(chunk, read_sketches(chunk, replies))
        for sample, alone in enumerate(sketch.baselines)
    ]


def answer_taught(
    config: Config, student: Seat, log: TaskLog, arm: str, teacher: Seat, chunk: Sequence[Problem]
) -> Script:
    sketches, styles = known_sketches(config, chunk, log), ["adaptive"] * len(chunk)
    replies = yield teacher, teaching_questions(sketches, styles, config.episode, config.seed, config.samples)
    drafts = read_drafts(sketches, styles, replies)
    answers = yield student, guided_questions(drafts, config.episode, config.seed)
    return task_results(config, arm, read_episodes(drafts, answers, teacher, RewardConfig()))


def answer_shuffled(
    config: Config,
    student: Seat,
    log: TaskLog,
    donors: dict[tuple[str, str], Problem],
    chunk: Sequence[Problem],
) -> Script:
    """Sample i of a task gets the teaching that the last teacher wrote for sample i of the task's donor."""
    last = list(config.teachers)[-1]
    given = [result for p in chunk for result in log.get(last, donors[p.domain, p.id], config.samples)]
    sketches = [sketch for sketch in known_sketches(config, chunk, log) for _ in range(config.samples)]
    drafts = [
        Draft(
            sketch,
            SHUFFLED,
            Reply(result.teacher_text, result.teacher_tokens, result.is_teacher_truncated),
            result.teaching,
        )
        for sketch, result in zip(sketches, given, strict=True)
    ]
    answers = yield student, guided_questions(drafts, config.episode, config.seed)
    return task_results(config, SHUFFLED, read_episodes(drafts, answers, student, RewardConfig()))


def answer_by_vote(
    config: Config, student: Seat, arm: str, votes: dict[str, int], chunk: Sequence[Problem]
) -> Script:
    """Each answer is the majority of `votes[domain]` fresh ones, at the price of all of them."""
    generation = Generation(config.answer_tokens, config.temperature or VOTE_TEMPERATURE, config.top_p)
    wanted = [(problem, sample) for problem in chunk for sample in range(config.samples)]
    replies = yield (
        student,
        [
            Question(
                protocol.baseline_messages(p.question),
                generation,
                derive_seed(config.seed, arm, p.domain, p.id, sample),
                votes[p.domain],
            )
            for p, sample in wanted
        ],
    )
    return [
        TaskResult(
            arm,
            p.domain,
            p.id,
            sample,
            p.answer,
            majority([attempt(reply, p.answer) for reply in answers]),
            "",
            0,
        )
        for (p, sample), answers in zip(wanted, replies, strict=True)
    ]


def same_budget(config: Config, problems: Sequence[Problem], log: TaskLog) -> int:
    """Answers of the student alone that cost at least what one of the last teacher's pair does, in generated tokens."""
    pair, alone = (
        mean(result.all_tokens for problem in problems for result in log.get(arm, problem, config.samples))
        for arm in (list(config.teachers)[-1], STUDENT)
    )
    return math.ceil(pair / max(alone, 1))


def known_sketches(config: Config, chunk: Sequence[Problem], log: TaskLog) -> list[Sketch]:
    """What the student did alone, from the log: the same for every arm."""
    alone = [(problem, log.get(STUDENT, problem, config.samples)) for problem in chunk]
    return [
        Sketch(problem, r[0].approach, r[0].approach_tokens, [result.attempt for result in r])
        for problem, r in alone
    ]


def task_results(config: Config, arm: str, episodes: Sequence[Episode]) -> Iterator[TaskResult]:
    for index, episode in enumerate(episodes):
        sketch, problem, reply = episode.sketch, episode.sketch.problem, episode.reply
        yield TaskResult(
            arm,
            problem.domain,
            problem.id,
            index % config.samples,
            problem.answer,
            episode.guided,
            sketch.approach,
            sketch.approach_tokens,
            reply.text,
            reply.tokens,
            reply.is_truncated,
            episode.teaching,
            episode.is_leak,
        )


# ------------------------------------------------------------------------------------------------------ tasks and verifiers


def load_tasks(config: Config) -> dict[str, list[Problem]]:
    """Problems by domain; a file is one domain, called after the benchmark, or, in CRMArena, one per kind of task."""
    if config.bench == "nano":
        return {domain: world.held_out(domain, config.limit, config.seed) for domain in world.DOMAINS}
    if config.bench == "crmarena":
        return crmarena.load_tasks(config.data, config.limit)
    problems = load_problems(config.data)[: config.limit]
    return {config.bench: [dataclasses.replace(problem, domain=config.bench) for problem in problems]}


def open_student(config: Config, query: crmarena.Query | None) -> Seat:
    seat = config.open(config.student, config.student_model)
    return crmarena.QueryingSeat(seat, query) if query else seat


def verifier(config: Config) -> Callable[[str, str], bool]:
    """Says of an extracted answer and the gold one whether they are equal."""
    if config.bench == "crmarena":
        return crmarena.is_correct
    if config.verifier == "exact":
        return protocol.is_correct
    try:
        import math_verify
    except ImportError:
        raise UserError(
            "--verifier math-verify needs a package: pip install 'math-verify[antlr4_13_2]'"
        ) from None
    # Both as boxes: bare text like "1/2" is otherwise only understood in part. The order (gold, answer) matters to it.
    return lambda answer, gold: math_verify.verify(
        *(math_verify.parse(f"\\boxed{{{text}}}") for text in (gold, answer))
    )


def judged(results: Iterable[TaskResult], is_right: Callable[[str, str], bool]) -> Iterator[TaskResult]:
    for result in results:
        answer = result.attempt.answer
        is_correct = answer is not None and is_right(answer, result.gold)
        yield dataclasses.replace(result, attempt=dataclasses.replace(result.attempt, is_correct=is_correct))


def own_tables(config: Config, out: Path) -> str:
    if config.bench != "crmarena":
        return ""
    return crmarena.tables(read_results(out / "tasks.jsonl")[0].values(), config.arms, config.names)


if __name__ == "__main__":
    run_script(main)
