"""What a run of the runtime amounts to: metrics of a batch of sessions, and the report at its end."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import mean

from nano_atlas.protocol import TEACHING_STYLES
from nano_atlas.runtime.guard import degradation_bound
from nano_atlas.runtime.lanes import LANES
from nano_atlas.runtime.traces import Outcome


def average(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def runtime_metrics(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Averages over sessions; those that need a score are None where no session has one."""
    tokens = sum((Counter(outcome.tokens) for outcome in outcomes), Counter())
    return {
        "reward": average(o.reward for o in outcomes),
        "baseline_accuracy": average(o.baseline for o in outcomes),
        "student_accuracy": average(o.guided for o in outcomes),
        "returned_accuracy": average(o.returned for o in outcomes),
        "accuracy_delta": average(o.gain for o in outcomes),
        "non_degradation_rate": average(o.gain >= 0 for o in outcomes if o.gain is not None),
        "leak_rate": average(o.is_leak for o in outcomes if o.reward is not None),
        "malformed_rate": mean(o.is_malformed for o in outcomes),
        "truncated_rate": mean(o.is_truncated for o in outcomes),
        "failed_rate": mean(o.status == "failed" for o in outcomes),
        "helped_returned_rate": mean(o.returned_attempt not in ("", "alone") for o in outcomes),
        **{f"tokens/{actor}": count for actor, count in sorted(tokens.items())},
        **{f"lane/{lane}": mean(o.lane == lane for o in outcomes) for lane in LANES},
        **{f"strategy/{style}": mean(o.strategy == style for o in outcomes) for style in TEACHING_STYLES},
    }


ROWS = {
    "student alone": "baseline_accuracy",
    "returned": "returned_accuracy",
    "guided": "student_accuracy",
    "not degraded": "non_degradation_rate",
    "leaks": "leak_rate",
    "without <teaching>": "malformed_rate",
    "cut off": "truncated_rate",
}


def summary(outcomes: Sequence[Outcome]) -> str:
    """The end-of-run report."""
    m = runtime_metrics(outcomes)
    scored = sum(outcome.baseline is not None for outcome in outcomes)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    lines = [f"{len(outcomes)} tasks, {scored} scored"]
    if failed:
        lines[0] += f", {failed} FAILED (the same command tries them again)"
    notes = {"returned": "the best of all attempts, see guard.py", "cut off": "by a length limit"}
    if m["accuracy_delta"] is not None:
        notes["guided"] = f"{100 * m['accuracy_delta']:+.1f} points"
    for label, name in ROWS.items():
        if m[name] is not None:
            note = f"   ({notes[label]})" if label in notes else ""
            lines.append(f"  {label:<18} {m[name]:7.1%}{note}")
    for style in TEACHING_STYLES:
        mine = [o for o in outcomes if o.strategy == style and o.reward is not None]
        if mine:
            gain, reward = 100 * mean(o.gain for o in mine), mean(o.reward for o in mine)
            lines.append(
                f"  strategy {style:<12} chosen {len(mine):5d}, gain {gain:+6.1f}, reward {reward:+.3f}"
            )
    audited = [outcome.audited_gain for outcome in outcomes if outcome.audited_gain is not None]
    if audited:
        worse, bound = degradation_bound(audited)
        found = f"{worse} of {len(audited)} returned answers with help are below the student's own"
        lines.append(f"  judged again       {found}: at most {bound:.1%} at 95 % confidence, by this judge")
    shares = [f"{lane} {m[f'lane/{lane}']:.0%}" for lane in LANES if m[f"lane/{lane}"]]
    lines.append(f"  lanes              {', '.join(shares)}")
    pending = sum(outcome.review == "pending" for outcome in outcomes)
    if pending:
        lines.append(f"  held for review    {pending:7d}   (--show pending, then --approve or --quarantine)")
    tokens = [f"{name[7:]} {count:,}" for name, count in m.items() if name.startswith("tokens/")]
    lines.append(f"  tokens generated   {', '.join(tokens)}")
    return "\n".join(lines)
