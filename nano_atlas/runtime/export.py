"""Selecting traces: the export that trains the next teacher, and the list that people review."""

import json
from collections.abc import Iterator
from pathlib import Path

from nano_atlas.errors import UserError
from nano_atlas.runs import replacing
from nano_atlas.runtime.journal import read_lines
from nano_atlas.runtime.review import Review, read_reviews
from nano_atlas.runtime.traces import Selection, parse_trace, read_head


def export_traces(source: Path, target: Path, selection: Selection) -> tuple[int, int]:
    """Write the selected traces of `source` to `target` as a whole; returns how many were selected, and of how many."""
    if target.exists() and target.samefile(source):
        raise UserError(f"--export {target} is the trace file itself; choose another name")
    reviews = read_reviews(source.with_name("reviews.jsonl"))
    total = selected = 0
    with replacing(target) as file:
        for number, line in read_lines(source):
            total += 1
            outcome = read_head(line, f"{source}:{number}").outcome
            review = reviews.get(outcome.session_id)
            if selection.takes(outcome, review and review.status):
                selected += 1
                file.write(line if review is None else reviewed(line, review))
        if selected == 0:
            raise UserError(
                f"{source}: none of its {total} traces is selected; {target} was not written; loosen the selection"
            )
    return selected, total


def reviewed(line: bytes, review: Review) -> bytes:
    """The record with a later decision in it; without checksum, since it is not the one that was written."""
    trace = parse_trace(line, review.session_id) | {
        "review_status": review.status,
        "review_notes": review.note,
    }
    trace["outcome"]["review"] = review.status
    trace.pop("crc32")
    return json.dumps(trace).encode() + b"\n"


def show_sessions(directory: Path, status: str) -> Iterator[str]:
    """One line per session whose latest review status this is."""
    reviews = read_reviews(directory / "reviews.jsonl")
    for number, line in read_lines(directory / "traces.jsonl"):
        outcome, task, _ = read_head(line, f"{directory}:{number}")
        review = reviews.get(outcome.session_id)
        if outcome.status == "succeeded" and (review.status if review else outcome.review) == status:
            reward = "unscored" if outcome.reward is None else f"reward {outcome.reward:+.3f}"
            yield f"{outcome.session_id}  {reward}  {outcome.lane}  {' '.join(task.split())[:60]}  {review.note if review else ''}".rstrip()


def known_sessions(path: Path) -> list[str]:
    return list(
        dict.fromkeys(
            read_head(line, f"{path}:{number}").outcome.session_id for number, line in read_lines(path)
        )
    )
