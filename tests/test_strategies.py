"""The bandit: it finds the best strategy, wastes little on the way, and does the same thing again under the same seed."""

import math
import random
import statistics

import pytest

from nano_atlas.runtime.learning import Experience
from nano_atlas.runtime.traces import Outcome

PAYOFFS = {"adaptive": 0.1, "concise": 0.6, "detailed": -0.2}  # mean rewards; the bandit does not know them


def earned(kind: str, strategy: str, reward: float | None) -> Outcome:
    return Outcome("s", kind, "paired", strategy, reward=reward)


def play(rounds: int, seed: int, batch: int = 1) -> list[str]:
    """Rewards are +-1 with the mean above. A batch is chosen as a whole before any of its rewards is known."""
    experience, world, chosen = Experience(list(PAYOFFS)), random.Random(f"world {seed}"), []
    for start in range(0, rounds, batch):
        picks = [experience.choose_strategy("math", seed * 10**6 + start + i) for i in range(batch)]
        for pick in picks:
            experience.learn(earned("math", pick, 1.0 if world.random() < (1 + PAYOFFS[pick]) / 2 else -1.0))
        chosen += picks
    return chosen


@pytest.mark.parametrize("batch", [1, 32])
def test_it_learns_the_best_strategy(batch):
    late = [pick for seed in range(20) for pick in play(640, seed, batch)[-160:]]
    assert late.count("concise") / len(late) > 0.9


def test_it_earns_more_than_a_uniform_choice():
    earned = statistics.mean(PAYOFFS[pick] for seed in range(20) for pick in play(300, seed))
    assert earned > statistics.mean(PAYOFFS.values()) + 0.25


def test_with_no_experience_every_strategy_is_tried_equally():
    experience = Experience(list(PAYOFFS))
    counts = [
        sum(experience.choose_strategy("math", seed) == name for seed in range(3000)) for name in PAYOFFS
    ]
    expected = 1000
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    assert chi_square < 13.8  # 2 degrees of freedom, p = 0.001


def test_the_chance_of_a_choice_is_that_of_the_gaussian_posterior():
    # Oracle: two independent normals, P(a > b) = Phi((mean_a - mean_b) / sqrt(var_a + var_b)).
    experience = Experience(["a", "b"])
    for reward in (1.0, 0.0, 0.5):
        experience.learn(earned("math", "a", reward))
    experience.learn(earned("math", "b", 0.8))
    gap = (1.5 / 4 - 0.8 / 2) / math.sqrt(1 / 4 + 1 / 2)
    expected = 0.5 * (1 + math.erf(gap / math.sqrt(2)))
    share = sum(experience.choose_strategy("math", seed) == "a" for seed in range(20_000)) / 20_000
    assert share == pytest.approx(expected, abs=0.015)


def test_the_same_seed_and_rewards_give_the_same_choices():
    assert play(200, seed=3) == play(200, seed=3)
    assert play(200, seed=3) != play(200, seed=4)


def test_what_is_learned_about_one_kind_of_task_does_not_touch_another():
    experience, fresh = Experience(["a", "b"]), Experience(["a", "b"])
    for _ in range(50):
        experience.learn(earned("telecom", "a", 1.0))
        experience.learn(earned("telecom", "b", -1.0))
    assert [experience.choose_strategy("math", seed) for seed in range(50)] == [
        fresh.choose_strategy("math", seed) for seed in range(50)
    ]
    assert {experience.choose_strategy("telecom", seed) for seed in range(50)} == {"a"}


def test_an_unscored_session_is_not_a_reward_of_zero():
    experience = Experience(["a", "b"])
    experience.learn(earned("math", "a", None))
    assert experience.history("math") == {"count": 0, "average_score": None, "strategies": {}}


def test_history_reports_counts_and_averages():
    experience = Experience(["a", "b"])
    for name, reward in (("b", 1.0), ("a", 0.5), ("b", 0.0)):
        experience.learn(earned("math", name, reward))
    assert experience.history("math") == {
        "count": 3,
        "average_score": 0.5,
        "strategies": {"a": {"count": 1, "average_score": 0.5}, "b": {"count": 2, "average_score": 0.5}},
    }
