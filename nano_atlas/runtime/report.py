"""What a run of the runtime amounts to: metrics of a batch of sessions, and the report at its end."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import mean

from nano_atlas.protocol import TEACHING_STYLES
from nano_atlas.runtime.capability import LANES
from nano_atlas.runtime.guard import degradation_bound
from nano_atlas.runtime.traces import Outcome


def runtime_metrics(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """Averages over sessions; those that need a score are None where no session has one."""

    def average(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return mean(known) if known else None

    tokens = sum((Counter(outcome.tokens) for outcome in outcomes), Counter())
    costs = [outcome.cost for outcome in outcomes if outcome.cost is not None]
    return {
        "reward": average(o.reward for o in outcomes),
        "baseline_accuracy": average(o.baseline for o in outcomes),
        "student_accuracy": average(o.guided for o in outcomes),
        "returned_accuracy": average(o.returned for o in outcomes),
        "accuracy_delta": average(o.gain for o in outcomes),
        "non_degradation_rate": average(None if o.gain is None else float(o.gain >= 0) for o in outcomes),
        "leak_rate": average(float(o.is_leak) for o in outcomes if o.reward is not None),
        "malformed_rate": mean(o.is_malformed for o in outcomes),
        "truncated_rate": mean(o.is_truncated for o in outcomes),
        "failed_rate": mean(o.status == "failed" for o in outcomes),
        "helped_returned_rate": mean(o.returned_attempt not in ("", "alone") for o in outcomes),
        "cost": sum(costs) if costs else None,
        **{f"tokens/{actor}": count for actor, count in sorted(tokens.items())},
        **{f"lane/{lane}": mean(o.lane == lane for o in outcomes) for lane in LANES},
        **{f"strategy/{style}": mean(o.strategy == style for o in outcomes) for style in TEACHING_STYLES},
    }


def summary(outcomes: Sequence[Outcome]) -> str:
    """The end-of-run report."""
    metrics = runtime_metrics(outcomes)
    scored = [outcome for outcome in outcomes if outcome.baseline is not None]
    rewarded = [outcome for outcome in outcomes if outcome.reward is not None]
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    lines = [
        f"{len(outcomes)} tasks, {len(scored)} scored"
        + f", {failed} FAILED (the same command tries them again)" * (failed > 0)
    ]
    if scored:
        lines += [
            f"  student alone      {metrics['baseline_accuracy']:7.1%}",
            f"  returned           {metrics['returned_accuracy']:7.1%}   (the best of all attempts, see nano_atlas/runtime/guard.py)",
        ]
    if rewarded:
        lines += [
            f"  guided             {metrics['student_accuracy']:7.1%}   ({100 * metrics['accuracy_delta']:+.1f} points)",
            f"  not degraded       {metrics['non_degradation_rate']:7.1%}   leaks {metrics['leak_rate']:.1%}",
            "  strategy           chosen     gain   reward",
        ]
        for style in TEACHING_STYLES:
            mine = [outcome for outcome in rewarded if outcome.strategy == style]
            if mine:
                gain, reward = (
                    mean(outcome.gain for outcome in mine),
                    mean(outcome.reward for outcome in mine),
                )
                lines.append(f"    {style:<16} {len(mine):6d}   {100 * gain:+6.1f}   {reward:+.3f}")
    audited = [outcome.audited_gain for outcome in outcomes if outcome.audited_gain is not None]
    if audited:
        worse, bound = degradation_bound(audited)
        lines.append(
            f"  judged again       {worse} of {len(audited)} returned answers with help are below the student's own: "
            f"at most {bound:.1%} at 95 % confidence, by this judge"
        )
    lanes = {lane: metrics[f"lane/{lane}"] for lane in LANES}
    lines.append(
        f"  lanes              {', '.join(f'{lane} {share:.0%}' for lane, share in lanes.items() if share)}"
    )
    lines.append(
        f"  without <teaching> {metrics['malformed_rate']:7.1%}   cut off by a length limit {metrics['truncated_rate']:.1%}"
    )
    pending = sum(outcome.review == "pending" for outcome in outcomes)
    if pending:
        lines.append(f"  held for review    {pending:7d}   (--show pending, then --approve or --quarantine)")
    actors = {
        name.removeprefix("tokens/"): count for name, count in metrics.items() if name.startswith("tokens/")
    }
    spent = "" if metrics["cost"] is None else f"; cost {metrics['cost']:.4f}"
    lines.append(
        f"  tokens generated   {', '.join(f'{actor} {count:,}' for actor, count in actors.items())}{spent}"
    )
    return "\n".join(lines)
