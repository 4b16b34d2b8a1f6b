"""What came of the sessions of a run, and which of them may train the next teacher.

The report at the end of a run; selection by numbers; review by people: a session is recorded as `approved`, or as `pending` with
--require-approval, and --approve and --quarantine change that, with a note. Traces are never rewritten: decisions have a file of their
own, `reviews.jsonl`, and the latest on a session counts.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from nano_atlas.errors import UserError
from nano_atlas.runs import Journal, read_jsonl, replace_text
from nano_atlas.runtime.judges import degradation_bound
from nano_atlas.runtime.options import LANES, STYLES, Config
from nano_atlas.runtime.traces import Outcome, Trace, now, read_traces

METRICS = {  # the value for one session (None: nobody knows), the label in the report (none: not there), and a note
    "reward": (lambda o: o.reward, "", ""),
    "baseline_accuracy": (lambda o: o.baseline, "student alone", ""),
    "returned_accuracy": (lambda o: o.returned, "returned", "(the best of all attempts, see judges.py)"),
    "student_accuracy": (lambda o: o.guided, "guided", ""),
    "accuracy_delta": (lambda o: o.gain, "", ""),
    "non_degradation_rate": (lambda o: None if o.gain is None else o.gain >= 0, "not degraded", "(gain {gain} points)"),
    "leak_rate": (lambda o: None if o.reward is None else o.is_leak, "leaks", ""),
    "malformed_rate": (lambda o: o.is_malformed, "without <teaching>", ""),
    "truncated_rate": (lambda o: o.is_truncated, "cut off", "(by a length limit)"),
    "failed_rate": (lambda o: o.status == "failed", "", ""),
    "helped_returned_rate": (lambda o: o.returned_attempt not in ("", "alone"), "", ""),
}  # fmt: skip


def runtime_metrics(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Averages over the sessions where a value is known, None where it never is; and shares of lanes and strategies."""
    known = {name: [x for o in outcomes if (x := of(o)) is not None] for name, (of, *_) in METRICS.items()}
    tokens = sum((Counter(outcome.tokens) for outcome in outcomes), Counter())
    return {
        **{name: mean(values) if values else None for name, values in known.items()},
        **{f"tokens/{actor}": count for actor, count in sorted(tokens.items())},
        **{f"lane/{lane}": mean(o.lane == lane for o in outcomes) for lane in LANES},
        **{f"strategy/{style}": mean(o.strategy == style for o in outcomes) for style in STYLES},
    }


def summary(outcomes: Sequence[Outcome]) -> str:
    m, failed = runtime_metrics(outcomes), sum(outcome.status == "failed" for outcome in outcomes)
    lines = [f"{len(outcomes)} tasks, {sum(o.baseline is not None for o in outcomes)} scored"]
    lines[0] += f", {failed} FAILED (the same command tries them again)" if failed else ""
    gain = f"{100 * (m['accuracy_delta'] or 0):+.1f}"
    for name, (_, label, note) in METRICS.items():
        if label and m[name] is not None:
            lines.append(f"  {label:<18} {m[name]:7.1%}   {note.format(gain=gain)}".rstrip())
    for style in STYLES:
        mine = [o for o in outcomes if o.strategy == style and o.reward is not None]
        if mine:
            gain, reward = 100 * mean(o.gain for o in mine), mean(o.reward for o in mine)
            told = f"{len(mine):7d}   (gain {gain:+.1f} points, reward {reward:+.3f})"
            lines.append(f"  {style + ' teaching':<18} {told}")
    if audited := [o.audited_gain for o in outcomes if o.audited_gain is not None]:
        worse, bound = degradation_bound(audited)
        found = f"{worse} of {len(audited)} returned answers with help are below the student's own"
        lines.append(f"  judged again       {found}: at most {bound:.1%} at 95 % confidence, by this judge")
    if pending := sum(outcome.review == "pending" for outcome in outcomes):
        lines.append(f"  held for review    {pending:7d}   (--show pending, then --approve or --quarantine)")
    lanes = ", ".join(f"{lane} {m[f'lane/{lane}']:.0%}" for lane in LANES if m[f"lane/{lane}"])
    tokens = ", ".join(f"{name[7:]} {count:,}" for name, count in m.items() if name.startswith("tokens/"))
    return "\n".join([*lines, f"  lanes              {lanes}", f"  tokens generated   {tokens}"])


def is_selected(outcome: Outcome, config: Config) -> bool:
    """One without the number in question is left out: nobody knows whether it qualifies."""
    start, _, end = config.since.partition("..")
    known = (outcome.reward, outcome.gain, max(abs(outcome.gain or 0.0), outcome.disagreement))
    least = (config.min_reward, config.min_gain, config.min_signal)
    return (
        outcome.status == "succeeded"
        and outcome.review in config.review_status
        and all(bound is None or (x is not None and x >= bound) for x, bound in zip(known, least))
        and (not config.only or outcome.lane in config.only or outcome.learning_key in config.only)
        and (not config.since or (start or "0") <= outcome.created_at < (end or "9999"))
    )


def reviewed_traces(path: Path) -> Iterator[tuple[Outcome, Trace]]:
    """All records of a trace file, the latest decision on each written in."""
    reviews = {}
    if (decisions := path.with_name("reviews.jsonl")).exists():
        reviews = {review["session_id"]: review for _, review in read_jsonl(decisions, is_journal=True)}
    for outcome, trace in read_traces(path):
        if review := reviews.get(outcome.session_id):
            outcome.review = review["status"]
            trace |= {"outcome": asdict(outcome), "review_status": outcome.review}
            trace["review_notes"] = review["note"]
        yield outcome, trace


def record_reviews(directory: Path, names: tuple[str, ...], status: str, note: str) -> list[str]:
    """Decide on the sessions whose ids begin with `names`. Raises UserError, and decides on none, where a name fits not just one."""
    known, decided = {outcome.session_id for outcome, _ in read_traces(directory / "traces.jsonl")}, []
    for name in names:
        meant = [session_id for session_id in known if session_id.startswith(name)]
        if len(meant) != 1:
            raise UserError(f"session {name}: {len(meant) or 'no'} sessions begin like this")
        decided += meant
    about = {"status": status, "note": note, "at": now()}
    with Journal(directory / "reviews.jsonl") as journal:
        journal.append({"session_id": name, **about} for name in decided)
    return decided


def export_traces(source: Path, target: Path, config: Config) -> tuple[int, int]:
    """Write the selected traces of `source` to `target`, as a whole or not at all; returns how many, and of how many."""
    if target.exists() and target.samefile(source):
        raise UserError(f"--export {target} is the trace file itself; choose another name")
    found = list(reviewed_traces(source))
    selected = [trace for outcome, trace in found if is_selected(outcome, config)]
    if not selected:
        raise UserError(f"{source}: none of its {len(found)} traces is selected, so {target} was not written")
    replace_text(target, "".join(json.dumps(trace) + "\n" for trace in selected))
    return len(selected), len(found)


def show_sessions(directory: Path, status: str) -> Iterator[str]:
    """One line per session whose latest review status this is."""
    for outcome, trace in reviewed_traces(directory / "traces.jsonl"):
        if outcome.status == "succeeded" and outcome.review == status:
            reward = "unscored" if outcome.reward is None else f"reward {outcome.reward:+.3f}"
            task, note = " ".join(trace["task"].split())[:60], trace.get("review_notes", "")
            yield f"{outcome.session_id}  {reward}  {outcome.lane}  {task}  {note}".rstrip()
