"""Which sessions may train the next teacher: selection by numbers, and review by people.

A session is recorded as `approved`, or as `pending` with --require-approval. People change that by --approve and --quarantine, with a
note. Traces are never rewritten: decisions have a file of their own, `reviews.jsonl`, and the latest on a session counts.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from nano_atlas.errors import UserError
from nano_atlas.runs import Journal, replace_text
from nano_atlas.runtime.options import Config
from nano_atlas.runtime.traces import Outcome, Trace, now, read_traces


def is_selected(outcome: Outcome, config: Config) -> bool:
    """One without the number in question is left out: nobody knows whether it qualifies."""
    start, _, end = config.since.partition("..")
    signal = max(abs(outcome.gain or 0.0), outcome.disagreement)
    least = (config.min_reward, config.min_gain, config.min_signal)
    known = (outcome.reward, outcome.gain, signal)
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
        with Journal(decisions) as journal:
            reviews = {review["session_id"]: review for _, review in journal.records()}
    for outcome, trace in read_traces(path):
        if review := reviews.get(outcome.session_id):
            outcome.review = review["status"]
            trace |= {"outcome": asdict(outcome), "review_status": outcome.review}
            trace["review_notes"] = review["note"]
        yield outcome, trace


def record_reviews(directory: Path, names: tuple[str, ...], status: str, note: str) -> list[str]:
    """Decide on the sessions whose ids begin with `names`. Raises UserError, and decides on none, where a name fits not just one."""
    known = {outcome.session_id for outcome, _ in read_traces(directory / "traces.jsonl")}
    decided = []
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
    traces = list(reviewed_traces(source))
    selected = [trace for outcome, trace in traces if is_selected(outcome, config)]
    if not selected:
        raise UserError(
            f"{source}: none of its {len(traces)} traces is selected, so {target} was not written"
        )
    replace_text(target, "".join(json.dumps(trace) + "\n" for trace in selected))
    return len(selected), len(traces)


def show_sessions(directory: Path, status: str) -> Iterator[str]:
    """One line per session whose latest review status this is."""
    for outcome, trace in reviewed_traces(directory / "traces.jsonl"):
        if outcome.status == "succeeded" and outcome.review == status:
            reward = "unscored" if outcome.reward is None else f"reward {outcome.reward:+.3f}"
            task, note = " ".join(trace["task"].split())[:60], trace.get("review_notes", "")
            yield f"{outcome.session_id}  {reward}  {outcome.lane}  {task}  {note}".rstrip()
