"""The scores of each arm of an evaluation, paired comparisons, and their tables.

An *arm* is one way of answering the same tasks: the student alone, the student with some teacher, or a control.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

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
    non_degradation_correct: float | None  # the same of the tasks that `other` ever got right


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
    differences: list[Comparison]  # of the last teacher to each earlier one

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(score.domain for score in self.scores))


Tasks = dict[str, list[TaskResult]]  # the samples of each task, by its id


def make_report(
    results: Iterable[TaskResult], arms: Sequence[str], teachers: Sequence[str], samples: int, seed: int = 0
) -> Report:
    """Score each arm on the tasks of which it has all `samples`, and compare it on those that the student alone has too.

    arms: in the order of the tables; teachers: those among them of which the last is compared with each earlier one.
    """
    found: dict[tuple[str, str, str], list[TaskResult]] = {}  # by domain, arm and task
    for result in sorted(results, key=lambda result: result.sample):
        found.setdefault((result.domain, result.arm, result.id), []).append(result)
    whole: dict[tuple[str, str], Tasks] = {}  # by domain and arm
    for (domain, arm, name), task in found.items():
        if len(task) == samples:
            whole.setdefault((domain, arm), {})[name] = task
    report = Report([], [])
    for domain in dict.fromkeys(domain for domain, _ in whole):
        alone = whole.get((domain, STUDENT))
        for arm in arms:
            if tasks := whole.get((domain, arm)):
                versus = compare(tasks, alone, seed) if alone and arm != STUDENT else None
                report.scores.append(score(tasks, versus))
        *earlier, last = [whole[domain, name] for name in teachers if (domain, name) in whole] or [{}]
        report.differences.extend(compare(last, other, seed) for other in earlier)
    return report


def compare(tasks: Tasks, others: Tasks, seed: int = 0) -> Comparison:
    """The arm of `tasks` minus the arm of `others`, on the tasks that both have."""
    shared = [name for name in tasks if name in others]
    before, after = (
        [fmean(result.attempt.is_correct for result in arm[name]) for name in shared]
        for arm in (others, tasks)
    )
    changes = [new - old for new, old in zip(after, before)]
    could_degrade = sum(share > 0 for share in before)
    improved, degraded = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    first, other = tasks[shared[0]], others[shared[0]]
    return Comparison(
        domain=first[0].domain,
        arm=first[0].arm,
        other=other[0].arm,
        tasks=len(shared),
        delta=fmean(changes),
        interval=stats.paired_bootstrap(changes, seed=seed),
        p_value=stats.mcnemar(improved, degraded) if len(first) == len(other) == 1 else None,
        improved=improved,
        degraded=degraded,
        non_degradation=1 - degraded / len(shared),
        non_degradation_correct=1 - degraded / could_degrade if could_degrade else None,
    )


def score(tasks: Tasks, versus_student: Comparison | None) -> Score:
    """Of one arm in one domain, with the same number of samples of every task."""
    answers = [result for task in tasks.values() for result in task]
    samples = len(answers) // len(tasks)
    right = [sum(result.attempt.is_correct for result in task) for task in tasks.values()]
    accuracy, error = stats.mean_and_error([count / samples for count in right])
    is_taught = any(result.teacher_tokens for result in answers)
    has_gold = is_taught and bool(answers[0].gold)
    leak_free = [result.attempt.is_correct for result in answers if not result.is_leak]
    ks = range(1, samples + 1)
    return Score(
        domain=answers[0].domain,
        arm=answers[0].arm,
        tasks=len(tasks),
        accuracy=accuracy,
        error=None if math.isnan(error) else error,
        interval=stats.wilson_interval(sum(right), len(tasks)) if samples == 1 else None,
        pass_at_k={k: fmean(stats.pass_at_k(samples, count, k) for count in right) for k in ks},
        pass_hat_k={k: fmean(stats.pass_hat_k(samples, count, k) for count in right) for k in ks},
        majority=fmean(majority([result.attempt for result in task]).is_correct for task in tasks.values()),
        completion=fmean(result.attempt.answer is not None for result in answers),
        truncated=fmean(result.attempt.is_truncated for result in answers),
        student_tokens=fmean(result.attempt.tokens for result in answers),
        all_tokens=fmean(result.all_tokens for result in answers),
        leak=fmean(result.is_leak for result in answers) if has_gold else None,
        leak_free_accuracy=fmean(leak_free) if has_gold and leak_free else None,
        malformed=fmean(result.teaching is None for result in answers) if is_taught else None,
        versus_student=versus_student,
    )


# ---------------------------------------------------------------------------------------------------------------- tables


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.1f}"


def _p_value(p: float | None) -> str:
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _points(comparison: Comparison) -> str:
    return stats.in_points(comparison.delta, comparison.interval)


Column = Callable[[Score], str]


def _versus(show: Callable[[Comparison], str]) -> Column:
    return lambda score: show(score.versus_student) if score.versus_student else ""


ACCURACY: dict[str, Column] = {"accuracy": lambda score: _percent(score.accuracy)}
AVERAGES: dict[str, Column] = {  # the same with n samples per task
    "avg@{n}": lambda score: " ± ".join(filter(None, map(_percent, (score.accuracy, score.error)))),
    "pass@{n}": lambda score: _percent(score.pass_at_k[max(score.pass_at_k)]),
    "pass^{n}": lambda score: _percent(score.pass_hat_k[max(score.pass_hat_k)]),
    "maj@{n}": lambda score: _percent(score.majority),
}
COLUMNS: dict[str, Column] = {
    "Δ to alone": _versus(_points),
    "McNemar p": _versus(lambda versus: _p_value(versus.p_value)),
    "improved": _versus(lambda versus: str(versus.improved)),
    "degraded": _versus(lambda versus: str(versus.degraded)),
    "not worse": _versus(lambda versus: _percent(versus.non_degradation)),
    "…of right": _versus(lambda versus: _percent(versus.non_degradation_correct)),
    "answered": lambda score: _percent(score.completion),
    "cut off": lambda score: _percent(score.truncated),
    "student tokens": lambda score: f"{score.student_tokens:.0f}",
    "all tokens": lambda score: f"{score.all_tokens:.0f}",
    "leaks": lambda score: _percent(score.leak),
    "without": lambda score: _percent(score.leak_free_accuracy),
    "malformed": lambda score: _percent(score.malformed),
}
NOTE = """\
Rates in %, differences in percentage points with their 95 % interval (paired bootstrap over tasks). *Not worse*: tasks on which the
student with teaching is at least as good as alone, of all tasks and of those it gets right alone. *Answered*: an answer could be
extracted; *cut off*: it ran into the limit of tokens. Tokens are generated tokens per answer: the student's answer, and answer + probe
+ teacher. *Leaks*: teachings that hold the gold answer; *without*: accuracy where the teaching holds none; *malformed*: no teaching
could be extracted, and the student's own answer counts.
"""


def tables(report: Report, names: Mapping[str, str]) -> str:
    """Markdown: per domain one row per arm, and below it the differences between teachers. `names`: what to call an arm."""
    lines: list[str] = []
    for domain in report.domains:
        scores = [score for score in report.scores if score.domain == domain]
        samples, tasks = max(scores[0].pass_at_k), scores[0].tasks
        columns = (ACCURACY if samples == 1 else AVERAGES) | COLUMNS
        rows = [["", *(head.format(n=samples) for head in columns)]]
        for score in scores:
            so_far = "" if score.tasks == tasks else f" (so far {score.tasks} tasks)"
            rows.append([names[score.arm] + so_far, *(show(score) for show in columns.values())])
        lines += [f"### {domain}: {tasks} tasks", "", *table(rows), ""]
        for gain in report.differences:
            if gain.domain == domain:
                sizes = f"**{_points(gain)}**, McNemar p {_p_value(gain.p_value)}"
                changed = f"{gain.improved} improved, {gain.degraded} degraded"
                lines += [f"{names[gain.arm]} − {names[gain.other]}: {sizes}, {changed}", ""]
    return "\n".join([*lines, NOTE])


def summary(report: Report, teachers: list[str], control: str, names: Mapping[str, str]) -> str:
    """Markdown: per domain the accuracy of the student alone, of each teacher and of a control, and what the last teacher is better
    than the one before it (or, if it is the only one, than the student alone)."""
    found = {(score.domain, score.arm): score for score in report.scores}
    compared = [*report.differences, *(score.versus_student for score in report.scores)]
    gains = {(gain.domain, gain.other, gain.arm): gain for gain in compared if gain}
    arms = [STUDENT, *teachers, *({control} & {arm for _, arm in found})]
    pair = [STUDENT, *teachers][-2:]
    rows = [["tasks", *(names[arm] for arm in arms), " − ".join(names[arm] for arm in reversed(pair))]]
    for domain in report.domains:
        scores = [found.get((domain, arm)) for arm in arms]
        tasks = max(score.tasks for score in scores if score)
        gain = gains.get((domain, *pair))
        cells = [_percent(score and score.accuracy) for score in scores]
        rows.append([f"{domain} ({tasks})", *cells, f"**{_points(gain)}**" if gain else ""])
    note = "Accuracy in %, difference in points with its 95 % interval over tasks."
    return "\n".join([*table(rows if teachers else [row[:-1] for row in rows]), "", note, ""])


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is its head, the first column is text and the others are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        for row in rows
    ]
    return ["| " + " | ".join(row) + " |" for row in (aligned[0], rule, *aligned[1:])]
