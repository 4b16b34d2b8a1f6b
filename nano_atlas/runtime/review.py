"""Which sessions may train the next teacher: selection by numbers, and review by people.

A session is recorded as `approved`, or as `pending` with --require-approval. People change that by --approve and --quarantine, with a
note. Traces are never rewritten: decisions have a file of their own, `reviews.jsonl`, and the latest on a session counts.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

from nano_atlas.config import option
from nano_atlas.errors import UserError
from nano_atlas.runs import Journal, replacing
from nano_atlas.runtime.traces import Outcome, Trace, read_traces

STATUSES = ("pending", "approved", "quarantined")


@dataclass(frozen=True)
class Selection:
    """Which traces are worth training on. One without the number in question is left out: nobody knows whether it qualifies."""

    min_reward: float | None = option(None, "least session reward of a selected trace", group="selection")
    min_gain: float | None = option(None, "least gain: score with help minus alone (-1 to 1)")
    min_signal: float | None = option(None, "least |gain|, or disagreement of the judges")
    only: tuple[str, ...] = option((), "only traces of these lanes or kinds of task (learning keys)")
    since: str = option("", "only sessions begun since START, or in START..END (ISO 8601, UTC)")
    review_status: tuple[str, ...] = option(("approved",), "only traces with these review states", STATUSES)

    def check(self) -> None:
        for time in filter(None, self.since.split("..")):
            try:
                datetime.fromisoformat(time)
            except ValueError:
                expected = "no time such as 2026-01-31 or 2026-01-31T12:00"
                raise UserError(f"--since {self.since}: {time} is {expected}") from None

    def takes(self, outcome: Outcome) -> bool:
        start, _, end = self.since.partition("..")
        signal = max(abs(outcome.gain or 0.0), outcome.disagreement)
        bounds = [(outcome.reward, self.min_reward), (outcome.gain, self.min_gain), (signal, self.min_signal)]
        return (
            outcome.status == "succeeded"
            and outcome.review in self.review_status
            and all(least is None or (value is not None and value >= least) for value, least in bounds)
            and (not self.only or outcome.lane in self.only or outcome.learning_key in self.only)
            and (not self.since or (start or "0") <= outcome.created_at < (end or "9999"))
        )

    @classmethod
    def is_default(cls, config: "Selection") -> bool:
        return all(getattr(config, field.name) == field.default for field in fields(cls))


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
    at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with Journal(directory / "reviews.jsonl") as journal:
        journal.append({"session_id": name, "status": status, "note": note, "at": at} for name in decided)
    return decided


def export_traces(source: Path, target: Path, selection: Selection) -> tuple[int, int]:
    """Write the selected traces of `source` to `target`, as a whole or not at all; returns how many, and of how many."""
    if target.exists() and target.samefile(source):
        raise UserError(f"--export {target} is the trace file itself; choose another name")
    total = selected = 0
    with replacing(target) as file:
        for outcome, trace in reviewed_traces(source):
            total += 1
            if selection.takes(outcome):
                selected += 1
                file.write(json.dumps(trace).encode() + b"\n")
        if selected == 0:
            raise UserError(f"{source}: none of its {total} traces is selected, so {target} was not written")
    return selected, total


def show_sessions(directory: Path, status: str) -> Iterator[str]:
    """One line per session whose latest review status this is."""
    for outcome, trace in reviewed_traces(directory / "traces.jsonl"):
        if outcome.status == "succeeded" and outcome.review == status:
            reward = "unscored" if outcome.reward is None else f"reward {outcome.reward:+.3f}"
            task, note = " ".join(trace["task"].split())[:60], trace.get("review_notes", "")
            yield f"{outcome.session_id}  {reward}  {outcome.lane}  {task}  {note}".rstrip()
