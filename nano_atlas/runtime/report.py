"""What a run of the runtime amounts to: metrics of a batch of sessions, and the report at its end."""

from collections import Counter
from collections.abc import Sequence
from statistics import mean

from nano_atlas.protocol import TEACHING_STYLES
from nano_atlas.runtime.guard import degradation_bound
from nano_atlas.runtime.lanes import LANES
from nano_atlas.runtime.traces import Outcome

METRICS = {  # the value for one session (None: nobody knows), the label in the report (none: not there), and a note
    "reward": (lambda o: o.reward, "", ""),
    "baseline_accuracy": (lambda o: o.baseline, "student alone", ""),
    "returned_accuracy": (lambda o: o.returned, "returned", "(the best of all attempts, see guard.py)"),
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
        **{f"strategy/{style}": mean(o.strategy == style for o in outcomes) for style in TEACHING_STYLES},
    }


def summary(outcomes: Sequence[Outcome]) -> str:
    """The end-of-run report."""
    m, failed = runtime_metrics(outcomes), sum(outcome.status == "failed" for outcome in outcomes)
    lines = [f"{len(outcomes)} tasks, {sum(o.baseline is not None for o in outcomes)} scored"]
    lines[0] += f", {failed} FAILED (the same command tries them again)" if failed else ""
    gain = f"{100 * (m['accuracy_delta'] or 0):+.1f}"
    for name, (_, label, note) in METRICS.items():
        if label and m[name] is not None:
            lines.append(f"  {label:<18} {m[name]:7.1%}   {note.format(gain=gain)}".rstrip())
    for style in TEACHING_STYLES:
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
