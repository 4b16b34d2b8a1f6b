"""Scores of each arm, paired comparisons, and tables. Rates in [0, 1], lengths in generated tokens per answer."""

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from statistics import fmean, stdev
from textwrap import wrap

from nano_atlas import stats
from nano_atlas.benches import arms
from nano_atlas.benches.arms import ALONE, CONTROLS, SHUFFLED, STUDENT, ArmsConfig, TaskResult
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json, replace_text, write_json
from nano_atlas.terminal import WIDTH

Tasks = dict[str, list[TaskResult]]  # the samples of each task, by its id
Report = dict[str, list[dict]]  # "scores" of each arm, "differences" of the last teacher to each earlier one
NOTE = """\
Rates in %, differences in percentage points with their 95 % interval (paired bootstrap over tasks). *Not worse*: tasks on which the
student with teaching is at least as good as alone, of all tasks and of those it gets right alone. *TES*: gain x share answered, per
1,000 tokens of the teacher. *Answered*: an answer could be extracted; *cut off*: it ran into the limit of tokens. Tokens are generated
tokens per answer: the student's answer, and answer + probe + teacher. *Leaks*: teachings that hold the gold answer; *without*:
accuracy where the teaching holds none; *malformed*: no teaching could be extracted, and the student's own answer counts.
"""


def percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.1f}"


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def points(versus: dict) -> str:
    return stats.in_points(versus["delta"], versus["interval"])


# A column: head, key in a comparison or score, format; for scores also the value of one answer (None: not counted).
VERSUS_STUDENT = [
    ("McNemar p", "p_value", p_value), ("improved", "improved", str), ("degraded", "degraded", str),
    ("not worse", "non_degradation", percent), ("…of right", "non_degradation_correct", percent),
    ("TES", "teaching_efficiency", lambda score: "–" if score is None else f"{score:.2f}"),
]  # fmt: skip
MEANS: list[tuple[str, str, Callable, Callable[[TaskResult], float | None]]] = [
    ("answered", "completion", percent, lambda r: r.attempt.answer is not None),
    ("cut off", "truncated", percent, lambda r: r.attempt.is_truncated),
    ("student tokens", "student_tokens", "{:.0f}".format, lambda r: r.attempt.tokens),
    ("all tokens", "all_tokens", "{:.0f}".format, lambda r: r.all_tokens),
    ("leaks", "leak", percent, lambda r: r.is_leak if r.gold and r.arm not in ALONE else None),
    ("without", "leak_free_accuracy", percent,
     lambda r: r.attempt.score if r.gold and r.arm not in ALONE and not r.is_leak else None),
    ("malformed", "malformed", percent, lambda r: r.teaching is None if r.arm not in ALONE else None),
]  # fmt: skip


def make_report(results: Iterable[TaskResult], config: ArmsConfig) -> Report:
    """Scores each arm on tasks with all samples, and compares it with the student on the tasks that both have."""
    groups: dict[tuple[str, str], Tasks] = {}
    for result in sorted(results, key=lambda result: result.sample):
        groups.setdefault((result.domain, result.arm), {}).setdefault(result.id, []).append(result)
    report: Report = {"scores": [], "differences": []}
    for domain in dict.fromkeys(domain for domain, _ in groups):
        found: dict[str, Tasks] = {}  # by arm, in the order of the tables
        for arm in dict.fromkeys([*config.arms, *CONTROLS]):
            tasks = groups.get((domain, arm), {}).items()
            if whole := {name: task for name, task in tasks if len(task) == config.samples}:
                found[arm] = whole
                versus = None if arm == STUDENT else compare(whole, found.get(STUDENT, {}), config.seed)
                report["scores"].append(score(whole) | {"versus_student": versus})
        *earlier, last = [found[name] for name in config.teachers if name in found] or [{}]
        report["differences"] += filter(None, (compare(last, other, config.seed) for other in earlier))
    return report


def score(tasks: Tasks) -> dict:
    """One arm in one domain; all tasks have the same number of samples."""
    answers = [result for task in tasks.values() for result in task]
    count, samples = len(tasks), len(answers) // len(tasks)
    right = [sum(result.attempt.is_correct for result in task) for task in tasks.values()]
    means = [fmean(result.attempt.score for result in task) for task in tasks.values()]
    row = {"domain": answers[0].domain, "arm": answers[0].arm, "tasks": count, "accuracy": fmean(means)}
    row["error"] = stdev(means) / sqrt(count) if count > 1 else None  # standard error, over tasks
    is_rate = samples == 1 and {*means} <= {0, 1}
    row["interval"] = stats.wilson_interval(sum(right), count) if is_rate else None
    for estimate in stats.pass_at_k, stats.pass_hat_k:
        rates = {k: fmean(estimate(samples, c, k) for c in right) for k in range(1, samples + 1)}
        row[estimate.__name__] = rates
    row["majority"] = fmean(arms.majority([r.attempt for r in task]).score for task in tasks.values())
    for _, name, _, value in MEANS:
        values = [number for result in answers if (number := value(result)) is not None]
        row[name] = fmean(values) if values else None
    return row


def compare(tasks: Tasks, others: Tasks, seed: int = 0) -> dict | None:
    """`tasks` minus `others` on the tasks that both have, or None. A task's score is its share of right samples."""
    shared = [name for name in tasks if name in others]
    if not shared:
        return None
    pairs = [[fmean(r.attempt.score for r in arm[name]) for arm in (others, tasks)] for name in shared]
    changes = [after - before for before, after in pairs]
    improved, degraded = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    could_degrade = sum(before > 0 for before, _ in pairs)
    first, *more = tasks[shared[0]]
    row = {"domain": first.domain, "arm": first.arm, "other": others[shared[0]][0].arm, "tasks": len(shared)}
    row |= {"delta": fmean(changes), "interval": stats.paired_bootstrap(changes, seed)}
    row["p_value"] = None if more else stats.mcnemar(improved, degraded)  # a test of single answers
    taught = [result for name in shared for result in tasks[name]]
    tokens = sum(result.teacher_tokens for result in taught)
    answered = sum(result.attempt.answer is not None for result in taught)
    row["teaching_efficiency"] = 1000 * fmean(changes) * answered / tokens if tokens else None
    row |= {"improved": improved, "degraded": degraded, "non_degradation": 1 - degraded / len(shared)}
    return row | {"non_degradation_correct": 1 - degraded / could_degrade if could_degrade else None}


def finish(config: ArmsConfig, own: Callable | None = None, faults: dict[str, list[str]] | None = None):
    """Prints and, without --tables, writes the tables. own(config, results): more Markdown of a benchmark."""
    saved = read_json(config.out / "run.json")
    results = list(arms.read_results(config.out / "tasks.jsonl").values())
    if not saved or not results:
        raise UserError(f"{config.out} holds no results yet; run the evaluation without --tables first")
    stored = type(config)(**saved["config"] | {"out": config.out})
    report, added = make_report(results, stored), own(stored, results) if own else ""
    if faults:
        counts = ", ".join(f"{arm} {len(why)}" for arm, why in faults.items())
        what = f"Infrastructure errors (tasks without a result; the same command tries them again): {counts}"
        lines = wrap(f"{what}; the first: {next(iter(faults.values()))[0]}", WIDTH, break_on_hyphens=False)
        added = "\n".join(["", *lines, added])
    text = tables(report) + added
    if not config.tables:
        write_json(config.out / "results.json", {"run": saved, **report, "errors": faults})
        replace_text(config.out / "tables.md", text)
    if not config.full:
        text = f"{summary(report, stored)}All columns: {config.out / 'tables.md'} (--full)\n{added}"
    print(text)


def tables(report: Report) -> str:
    """Per domain: one row per arm, then the differences between teachers."""
    lines: list[str] = []
    for domain in dict.fromkeys(row["domain"] for row in report["scores"]):
        found = [row for row in report["scores"] if row["domain"] == domain]
        tasks, rows = found[0]["tasks"], [["", *cells(found[0])]]
        for row in found:
            so_far = "" if row["tasks"] == tasks else f" (so far {row['tasks']} tasks)"
            rows.append([row["arm"] + so_far, *cells(row).values()])
        lines += table(rows, f"{domain}: {tasks} tasks")
        for gain in (gain for gain in report["differences"] if gain["domain"] == domain):
            size = f"**{points(gain)}**, McNemar p {p_value(gain['p_value'])}"
            changed = f"{gain['improved']} improved, {gain['degraded']} degraded"
            lines += [f"{gain['arm']} − {gain['other']}: {size}, {changed}", ""]
    return "\n".join([*lines, NOTE])


def cells(row: dict) -> dict[str, str]:
    """A score as text, by column head."""
    n, accuracy, versus = len(row["pass_at_k"]), percent(row["accuracy"]), row["versus_student"]
    shown = {"accuracy": accuracy}
    if n > 1:
        rates = row["pass_at_k"][n], row["pass_hat_k"][n], row["majority"]
        shown = {f"avg@{n}": f"{accuracy} ± {percent(row['error'])}"}
        shown |= zip((f"pass@{n}", f"pass^{n}", f"maj@{n}"), map(percent, rates))
    shown["Δ to alone"] = points(versus) if versus else ""
    shown |= {head: show(versus[name]) if versus else "" for head, name, show in VERSUS_STUDENT}
    return shown | {head: "" if row[name] is None else show(row[name]) for head, name, show, _ in MEANS}


def summary(report: Report, config: ArmsConfig) -> str:
    """Per domain: accuracy of student, teachers and shuffled control, and the gain over the previous teacher."""
    found = {(row["domain"], row["arm"]): row for row in report["scores"]}
    compared = [*report["differences"], *(row["versus_student"] for row in report["scores"])]
    gains = {(gain["domain"], gain["other"], gain["arm"]): points(gain) for gain in compared if gain}
    pair = [STUDENT, *config.teachers][-2:]
    shown = [arm for arm in (STUDENT, *config.teachers, SHUFFLED) if arm in {arm for _, arm in found}]
    gap = " − ".join(reversed(pair))
    rows, unread = [["tasks", *shown, gap if len(gap) < 25 else "difference"]], [["unread", *shown]]
    for domain in dict.fromkeys(domain for domain, _ in found):
        here = [found.get((domain, arm)) for arm in shown]
        gain = f"**{gains[domain, *pair]}**" if (domain, *pair) in gains else ""
        count = max(row["tasks"] for (of, _), row in found.items() if of == domain)
        rows.append([f"{domain} ({count})", *(percent(row and row["accuracy"]) for row in here), gain])
        unread.append([domain, *(percent(row and 1 - row["completion"]) for row in here)])
    lines = narrow(rows if config.teachers else [row[:-1] for row in rows])
    lines.append("Accuracy in %, difference in points with its 95 % interval over tasks.")
    lines += [f"difference: {gap}"] if rows[0][-1] != gap else []
    if any(row["completion"] < 1 for row in report["scores"]):
        lines += ["", *narrow(unread), "Answers in % without a final answer, which count as wrong."]
        lines.append("Another --answer-format, or more --answer-tokens, may help.")
    return "\n".join([*lines, ""])


def narrow(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table, transposed if it is too wide."""
    return min(table(rows), table([*zip(*rows)]), key=lambda lines: max(WIDTH, len(lines[0])))


def table(rows: Sequence[Sequence[str]], title: str = "") -> list[str]:
    """Lines of a Markdown table; the first row is the head, the first column is text, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    head, *body = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
    return [*([f"### {title}", ""] if title else []), *lines, ""]
