"""Which sessions may train the next teacher: selection by numbers, and review by people.

A session is recorded as `approved`, or as `pending` with --require-approval. People change that by --approve and --quarantine, with a
note. Traces are never rewritten: decisions have a file of their own, `reviews.jsonl`, and the latest on a session counts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

from nano_atlas.config import option
from nano_atlas.errors import UserError
from nano_atlas.runs import Journal, replacing
from nano_atlas.runtime.traces import Outcome, read_traces

STATUSES = ("pending", "approved", "quarantined")


@dataclass(frozen=True)
class Selection:
    """Which traces are worth training on. One without the number in question is left out: nobody knows whether it qualifies."""

    min_reward: float | None = option(None, "least session reward of a selected trace", group="selection")
    min_gain: float | None = option(None, "least gain: score with help minus alone (-1 to 1)")
    min_signal: float | None = option(
        None, "least |gain|, or disagreement of judges: something to learn from"
    )
    only: tuple[str, ...] = option((), "only traces of these lanes or kinds of task (learning keys)")
    since: str = option("", "only sessions begun since START, or in START..END (ISO 8601, UTC)")
    review_status: tuple[str, ...] = option(("approved",), "only traces with these review states", STATUSES)

    def check(self) -> None:
        for time in filter(None, self.since.partition("..")[::2]):
            try:
                datetime.fromisoformat(time)
            except ValueError:
                raise UserError(
                    f"--since {self.since}: {time} is no time such as 2026-01-31 or 2026-01-31T12:00"
                ) from None

    def takes(self, outcome: Outcome, review: str | None = None) -> bool:
        """review: the latest status, where it differs from the recorded one."""
        start, _, end = self.since.partition("..")
        signal = None
        if outcome.gain is not None or outcome.disagreement:
            signal = max(abs(outcome.gain or 0.0), outcome.disagreement)
        bounds = [(outcome.reward, self.min_reward), (outcome.gain, self.min_gain), (signal, self.min_signal)]
        return (
            outcome.status == "succeeded"
            and (review or outcome.review) in self.review_status
            and all(least is None or (value is not None and value >= least) for value, least in bounds)
            and (not self.only or outcome.lane in self.only or outcome.learning_key in self.only)
            and outcome.created_at >= start
            and (not end or "" < outcome.created_at < end)
        )

    @classmethod
    def is_default(cls, config: "Selection") -> bool:
        return all(getattr(config, f.name) == f.default for f in fields(cls))


def read_reviews(directory: Path) -> dict[str, dict[str, str]]:
    """The latest decision {session_id, status, note, at} on each session that has one, by session id."""
    path = directory / "reviews.jsonl"
    if not path.exists():
        return {}
    with Journal(path) as journal:
        return {review["session_id"]: review for _, review in journal.records()}


def record_reviews(directory: Path, names: tuple[str, ...], status: str, note: str) -> list[str]:
    """Decide on the sessions that `names` are the ids, or unique beginnings of ids, of. Raises UserError, and then decides on none."""
    known = {outcome.session_id for outcome, _ in read_traces(directory / "traces.jsonl")}
    decided = []
    for name in names:
        meant = [session_id for session_id in known if session_id.startswith(name)]
        if len(meant) != 1:
            raise UserError(f"session {name}: {len(meant) or 'no'} sessions begin like this")
        decided += meant
    at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with Journal(directory / "reviews.jsonl") as journal:
        journal.append({"session_id": name, "status": status, "note": note, "at": at} for name in decided)
    return decided


def export_traces(source: Path, target: Path, selection: Selection) -> tuple[int, int]:
    """Write the selected traces of `source` to `target`, as a whole or not at all; returns how many, and of how many."""
    if target.exists() and target.samefile(source):
        raise UserError(f"--export {target} is the trace file itself; choose another name")
    reviews = read_reviews(source.parent)
    total = selected = 0
    with replacing(target) as file:
        for outcome, trace in read_traces(source):
            total += 1
            review = reviews.get(outcome.session_id)
            if selection.takes(outcome, review and review["status"]):
                selected += 1
                if review:
                    trace |= {"review_status": review["status"], "review_notes": review["note"]}
                    trace["outcome"]["review"] = review["status"]
                file.write(json.dumps(trace).encode() + b"\n")
        if selected == 0:
            raise UserError(f"{source}: none of its {total} traces is selected, so {target} was not written")
    return selected, total


def show_sessions(directory: Path, status: str) -> Iterator[str]:
    """One line per session whose latest review status this is."""
    reviews = read_reviews(directory)
    for outcome, trace in read_traces(directory / "traces.jsonl"):
        latest = {"status": outcome.review, "note": ""} | reviews.get(outcome.session_id, {})
        if outcome.status == "succeeded" and latest["status"] == status:
            reward = "unscored" if outcome.reward is None else f"reward {outcome.reward:+.3f}"
            task = " ".join(trace["task"].split())[:60]
            yield f"{outcome.session_id}  {reward}  {outcome.lane}  {task}  {latest['note']}".rstrip()
