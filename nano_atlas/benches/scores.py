"""The scores of each arm of an evaluation, paired comparisons, and their tables.

An *arm* is one way of answering the same tasks: the student alone, the student with some teacher, or a control.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nano_atlas import stats
from nano_atlas.benches.results import STUDENT, TaskResult
from nano_atlas.episode import majority


@dataclass(frozen=True)
class Comparison:
    """One arm minus another on the same tasks. A task's score is the share of its samples that are right."""

    domain: str
    arm: str
    other: str
    tasks: int
    delta: float  # mean difference of scores, in [-1, 1]
    interval: tuple[float, float]  # its 95 % interval, paired bootstrap over tasks
    p_value: float | None  # McNemar, exact; None for several samples per task, where it does not apply
    improved: int  # tasks
    degraded: int
    non_degradation: float  # share of tasks that are not worse
    non_degradation_correct: (
        float | None
    )  # the same of the tasks that `other` ever got right: no other task *can* get worse


@dataclass(frozen=True)
class Score:
    """One arm in one domain. Rates in [0, 1] over all answers; lengths in generated tokens per answer."""

    domain: str
    arm: str
    tasks: int
    accuracy: float  # with several samples: avg@n
    error: float | None  # its standard error over tasks
    interval: tuple[float, float] | None  # 95 %, Wilson; None for several samples per task
    pass_at_k: dict[int, float]  # at least one of k samples is right
    pass_hat_k: dict[int, float]  # all k samples are right
    majority: float  # the most frequent answer of a task's samples is right: maj@n
    completion: float  # an answer could be extracted
    truncated: float
    student_tokens: float
    all_tokens: float  # answer + probe + teacher's whole completion
    leak: float | None  # the teaching holds the gold answer
    leak_free_accuracy: float | None  # of the answers whose teaching does not
    malformed: float | None  # there is no teaching
    versus_student: Comparison | None


@dataclass(frozen=True)
class Report:
    scores: list[Score]
    differences: list[Comparison]  # between teachers


Tasks = dict[str, list[TaskResult]]  # the samples of each task, by its id


def make_report(
    results: Iterable[TaskResult], arms: Sequence[str], teachers: Sequence[str], samples: int, seed: int = 0
) -> Report:
    """Score each arm on the tasks of which it has all `samples`, and compare it on those that the student alone has too.

    arms: in the order of the tables; teachers: those among them of which the last is compared with each earlier one.
    """
    found: dict[str, dict[str, Tasks]] = {}  # by domain and arm
    for result in sorted(results, key=lambda result: result.sample):
        found.setdefault(result.domain, {}).setdefault(result.arm, {}).setdefault(result.id, []).append(
            result
        )
    scores, differences = [], []
    for by_arm in found.values():
        complete = {
            arm: {name: task for name, task in by_arm.get(arm, {}).items() if len(task) == samples}
            for arm in arms
        }
        complete = {arm: tasks for arm, tasks in complete.items() if tasks}
        for arm, tasks in complete.items():
            scores.append(
                _score(
                    tasks,
                    None
                    if arm == STUDENT or STUDENT not in complete
                    else compare(tasks, complete[STUDENT], seed),
                )
            )
        *earlier, last = [name for name in teachers if name in complete] or [None]
        differences += [compare(complete[last], complete[name], seed) for name in earlier]
    return Report(scores, differences)


def _share_right(task: list[TaskResult]) -> float:
    return sum(result.attempt.is_correct for result in task) / len(task)


def compare(tasks: Tasks, others: Tasks, seed: int = 0) -> Comparison:
    """The arm of `tasks` minus the arm of `others`, on the tasks that both have."""
    shared = [name for name in tasks if name in others]
    before = [_share_right(others[name]) for name in shared]
    changes = [_share_right(tasks[name]) - score for name, score in zip(shared, before)]
    could_degrade = [change for change, score in zip(changes, before) if score > 0]
    improved, degraded = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    first, other = tasks[shared[0]], others[shared[0]]
    return Comparison(
        first[0].domain,
        first[0].arm,
        other[0].arm,
        len(shared),
        sum(changes) / len(shared),
        interval=stats.paired_bootstrap(changes, seed=seed),
        p_value=stats.mcnemar(improved, degraded) if len(first) == len(other) == 1 else None,
        improved=improved,
        degraded=degraded,
        non_degradation=1 - degraded / len(shared),
        non_degradation_correct=1 - degraded / len(could_degrade) if could_degrade else None,
    )


def _score(tasks: Tasks, versus_student: Comparison | None) -> Score:
    answers = [result for task in tasks.values() for result in task]
    samples = len(answers) // len(tasks)
    right = [sum(result.attempt.is_correct for result in task) for task in tasks.values()]
    accuracy, error = stats.mean_and_error([count / samples for count in right])

    some = (*(2**power for power in range(samples.bit_length())), samples)
    is_taught = any(result.teacher_tokens for result in answers)
    leak_free = [result.attempt.is_correct for result in answers if not result.is_leak]

    def mean(value: Callable[[TaskResult], float]) -> float:
        return sum(map(value, answers)) / len(answers)

    return Score(
        answers[0].domain,
        answers[0].arm,
        len(tasks),
        accuracy,
        None if math.isnan(error) else error,
        interval=stats.wilson_interval(sum(right), len(tasks)) if samples == 1 else None,
        pass_at_k={k: sum(stats.pass_at_k(samples, count, k) for count in right) / len(right) for k in some},
        pass_hat_k={
            k: sum(stats.pass_hat_k(samples, n, k) for n in right) / len(right) for k in range(1, samples + 1)
        },
        majority=sum(majority([result.attempt for result in task]).is_correct for task in tasks.values())
        / len(tasks),
        completion=mean(lambda result: result.attempt.answer is not None),
        truncated=mean(lambda result: result.attempt.is_truncated),
        student_tokens=mean(lambda result: result.attempt.tokens),
        all_tokens=mean(lambda result: result.all_tokens),
        leak=mean(lambda result: result.is_leak) if is_taught and answers[0].gold else None,
        leak_free_accuracy=sum(leak_free) / len(leak_free)
        if is_taught and answers[0].gold and leak_free
        else None,
        malformed=mean(lambda result: result.teaching is None) if is_taught else None,
        versus_student=versus_student,
    )


# ---------------------------------------------------------------------------------------------------------------- tables

NOTE = (
    "Rates in %, differences in percentage points with their 95 % interval (paired bootstrap over tasks). *Not worse*: tasks "
    "on which the student with teaching is at least as good as alone, of all tasks and of those it gets right alone. "
    "*Answered*: an answer could be extracted; *cut off*: it ran into the limit of tokens. Tokens are generated tokens per "
    "answer: the student's answer, and answer + probe + teacher. *Leaks*: teachings that hold the gold answer; *without*: "
    "accuracy where the teaching holds none; *malformed*: no teaching could be extracted, and the student got none."
)


def tables(report: Report, names: dict[str, str] | None = None) -> str:
    """Markdown: per domain one row per arm, and below it the differences between teachers. `names`: what to call an arm."""
    names = names or {}
    lines: list[str] = []
    for domain in dict.fromkeys(score.domain for score in report.scores):
        scores = [score for score in report.scores if score.domain == domain]
        most = max(scores[0].pass_at_k)
        accuracy = (
            ["accuracy"] if most == 1 else [f"avg@{most}", f"pass@{most}", f"pass^{most}", f"maj@{most}"]
        )
        rows = [
            [
                "",
                *accuracy,
                "Δ to alone",
                "McNemar p",
                "improved",
                "degraded",
                "not worse",
                "…of right",
                "answered",
                "cut off",
                "student tokens",
                "all tokens",
                "leaks",
                "without",
                "malformed",
            ]
        ]
        rows += [_row(score, names.get(score.arm, score.arm), scores[0].tasks) for score in scores]
        lines += [f"### {domain}: {scores[0].tasks} tasks", "", *table(rows), ""]
        for difference in report.differences:
            if difference.domain == domain:
                arm, other = (names.get(name, name) for name in (difference.arm, difference.other))
                lines += [
                    f"{arm} − {other}: **{_points(difference)}**, McNemar p {_p_value(difference.p_value)}, "
                    f"{difference.improved} improved, {difference.degraded} degraded",
                    "",
                ]
    return "\n".join([*lines, NOTE, ""])


def summary(
    report: Report, teachers: Sequence[str], controls: Sequence[str] = (), names: dict[str, str] | None = None
) -> str:
    """Markdown: one row per domain with the accuracy of the student alone, each teacher and each control, and what the last teacher is
    better than the one before it (or, if it is the only one, than the student alone)."""
    names, arms = names or {}, [STUDENT, *teachers, *controls]
    found = {(score.domain, score.arm): score for score in report.scores}
    gains = {
        difference.domain: difference for difference in report.differences
    }  # to the teacher before the last, which is its last
    if len(teachers) == 1:
        gains = {
            domain: score.versus_student
            for (domain, arm), score in found.items()
            if arm == teachers[0] and score.versus_student
        }
    head = ["tasks", *(names.get(arm, arm) for arm in arms)]
    if gains:
        gain = next(iter(gains.values()))
        head.append(" − ".join(names.get(arm, arm) for arm in (gain.arm, gain.other)))
    rows = [head]
    for domain in dict.fromkeys(score.domain for score in report.scores):
        scores = [found.get((domain, arm)) for arm in arms]
        rows.append(
            [
                f"{domain} ({max(score.tasks for score in scores if score)})",
                *(_percent(score and score.accuracy) for score in scores),
            ]
        )
        if gains:
            rows[-1].append(f"**{_points(gains[domain])}**" if domain in gains else "")
    return "\n".join([*table(rows), ""])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is its head, the first column is text and the others are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        for row in rows
    ]
    return ["| " + " | ".join(row) + " |" for row in (aligned[0], rule, *aligned[1:])]


def _row(score: Score, name: str, expected_tasks: int) -> list[str]:
    name += "" if score.tasks == expected_tasks else f" (so far {score.tasks} tasks)"
    row = [name, f"{100 * score.accuracy:.1f}"]
    most = max(score.pass_at_k)
    if most > 1:
        error = "" if score.error is None else f" ± {100 * score.error:.1f}"
        row = [
            name,
            row[1] + error,
            *map(_percent, (score.pass_at_k[most], score.pass_hat_k[most], score.majority)),
        ]
    versus = score.versus_student
    row += (
        ["", "", "", "", "", ""]
        if versus is None
        else [
            _points(versus),
            _p_value(versus.p_value),
            str(versus.improved),
            str(versus.degraded),
            _percent(versus.non_degradation),
            _percent(versus.non_degradation_correct),
        ]
    )
    return row + [
        _percent(score.completion),
        _percent(score.truncated),
        f"{score.student_tokens:.0f}",
        f"{score.all_tokens:.0f}",
        _percent(score.leak),
        _percent(score.leak_free_accuracy),
        _percent(score.malformed),
    ]


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.1f}"


def _points(comparison: Comparison) -> str:
    return stats.in_points(comparison.delta, comparison.interval)


def _p_value(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
