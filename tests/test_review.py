"""Drift against a straight formula, and decisions that survive."""

import random
import statistics

import pytest

from nano_atlas.errors import UserError
from nano_atlas.runtime.review import Drift, read_reviews, record_reviews


def after(rewards, reward):
    drift = Drift()
    for value in rewards:
        drift.add("math", value)
    return drift.assess("math", reward)


def test_scores_are_those_of_the_last_fifty_without_the_session_itself():
    rewards = [random.Random(1).gauss(0.5, 0.2) for _ in range(80)] + [
        random.Random(i).gauss(0.5, 0.2) for i in range(50)
    ]
    found = after(rewards, 2.0)
    last = rewards[-50:]
    middle = statistics.median(last)
    assert found["z"] == pytest.approx((2.0 - statistics.fmean(last)) / statistics.pstdev(last))
    assert found["mad_z"] == pytest.approx(
        (2.0 - middle) / (1.4826 * statistics.median(abs(r - middle) for r in last))
    )
    assert found["drift_alert"] and found["samples"] == 50 and not after(rewards, 0.5)["drift_alert"]


def test_too_few_sessions_no_reward_and_other_kinds_give_no_alarm():
    assert after([0.5] * 4, 9.0) is None and after([0.5] * 9, None) is None
    drift = Drift()
    for _ in range(9):
        drift.add("crm", 0.5)
        drift.add("crm", None)
    assert drift.assess("math", 0.5) is None
    assert drift.assess("crm", 9.0) == {
        "z": None,
        "mad_z": None,
        "samples": 9,
        "drift_alert": False,
    }  # no spread, no scale


def test_where_most_rewards_are_equal_the_others_are_no_alarm():
    usual = [0.92, 0.92, 0.93, 1.85, 0.92, 0.0] * 8
    assert (
        after(usual, 1.85)["mad_z"] is None
        and not after(usual, 1.85)["drift_alert"]
        and after(usual, -2.0)["drift_alert"]
    )


def test_the_latest_decision_counts_and_an_unclear_name_decides_nothing(tmp_path):
    path, known = tmp_path / "reviews.jsonl", ["abc1", "abd2", "xyz3"]
    assert record_reviews(path, ("abc", "x"), known, "quarantined", "odd", "t0") == ["abc1", "xyz3"]
    record_reviews(path, ("abc1",), known, "approved", "", "t1")
    for names, complaint in ((("ab",), "2 sessions begin like this"), (("xyz3", "no"), "no such session")):
        with pytest.raises(UserError, match=complaint):
            record_reviews(path, names, known, "approved", "", "t2")
    assert {name: (review.status, review.note) for name, review in read_reviews(path).items()} == {
        "abc1": ("approved", ""),
        "xyz3": ("quarantined", "odd"),
    }
    with path.open("ab") as file:
        file.write(b'{"torn')
    record_reviews(path, ("abd",), known, "approved", "", "t3")
    assert len(read_reviews(path)) == 3 and read_reviews(tmp_path / "none.jsonl") == {}
