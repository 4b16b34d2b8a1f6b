"""Decisions on sessions that survive, and what they let through to the export."""

import pytest

from nano_atlas.errors import UserError
from nano_atlas.runs import Journal
from nano_atlas.runtime.options import Config
from nano_atlas.runtime.traces import (
    export_traces,
    read_traces,
    record_reviews,
    reviewed_traces,
    show_sessions,
)


@pytest.fixture
def directory(tmp_path):
    """Of three sessions, the last of which is pending."""
    with Journal(tmp_path / "traces.jsonl") as journal:
        for name, review in (("abc1", "approved"), ("abd2", "approved"), ("xyz3", "pending")):
            outcome = {"session_id": name, "lane": "paired", "review": review, "reward": 1.5}
            journal.append([{"outcome": outcome, "task": f"Task \u2028 {name}?", "ground_truth": "\ud800"}])
    return tmp_path


def decided(directory) -> dict:
    read = reviewed_traces(directory / "traces.jsonl")
    return {o.session_id: (o.review, trace["review_notes"]) for o, trace in read if "review_notes" in trace}


def test_the_latest_decision_counts_and_an_unclear_name_decides_nothing(directory):
    assert record_reviews(directory, ("abc", "x"), "quarantined", "odd") == ["abc1", "xyz3"]
    record_reviews(directory, ("abc1",), "approved", "")
    for names, complaint in ((("ab",), "2 sessions have an id"), (("xyz3", "no"), "no sessions have an id")):
        with pytest.raises(UserError, match=complaint):
            record_reviews(directory, names, "approved", "")
    assert decided(directory) == {"abc1": ("approved", ""), "xyz3": ("quarantined", "odd")}
    with (directory / "reviews.jsonl").open("ab") as file:
        file.write(b'{"torn')
    assert len(decided(directory)) == 2
    record_reviews(directory, ("abd",), "approved", "")
    assert len(decided(directory)) == 3


def test_what_is_exported_and_shown_follows_the_decisions(directory):
    source, target = directory / "traces.jsonl", directory / "export.jsonl"
    assert list(show_sessions(directory, "pending")) == ["xyz3  reward +1.500  paired  Task xyz3?"]
    assert export_traces(source, target, Config()) == (2, 3)
    record_reviews(directory, ("abc1",), "quarantined", "a leak")
    record_reviews(directory, ("xyz3",), "approved", "checked by hand")
    assert list(show_sessions(directory, "pending")) == []
    assert list(show_sessions(directory, "approved"))[1:] == [
        "xyz3  reward +1.500  paired  Task xyz3?",
        "  checked by hand",
    ]
    assert export_traces(source, target, Config()) == (2, 3)
    (_, first), (outcome, trace) = read_traces(target)
    assert "review_notes" not in first and first["ground_truth"] == "\ufffd"
    assert (outcome.review, trace["review_status"], trace["review_notes"]) == ("approved",) * 2 + (
        "checked by hand",
    )


def test_an_export_that_would_be_empty_leaves_the_file_that_is_there(directory):
    source, target = directory / "traces.jsonl", directory / "export.jsonl"
    export_traces(source, target, Config())
    before = target.read_bytes()
    with pytest.raises(UserError, match="select none of its 3 traces"):
        export_traces(source, target, Config(min_reward=9.0))
    assert target.read_bytes() == before
    with pytest.raises(UserError, match="the trace file itself"):
        export_traces(source, source, Config())
