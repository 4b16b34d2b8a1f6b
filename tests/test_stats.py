"""Each statistic against an independent formula: scipy where it has one, an enumeration where it has not."""

import itertools
import math
import random

import numpy as np
import pytest

from nano_atlas.stats import mcnemar, paired_bootstrap, pass_at_k, pass_hat_k, wilson_interval


@pytest.mark.parametrize("successes, trials", [(0, 1), (0, 500), (3, 500), (233, 500), (500, 500), (17, 30)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_interval_is_that_of_scipy(successes, trials, confidence):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, trials, confidence) == pytest.approx(tuple(expected), abs=1e-12)


def test_wilson_ends_are_where_the_score_test_just_rejects():
    """The definition: an end p of the interval satisfies |rate - p| = z sqrt(p (1 - p) / n)."""
    rate, trials = 31 / 97, 97
    for end in wilson_interval(31, 97):
        assert abs(rate - end) == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / trials), abs=1e-9)


@pytest.mark.parametrize("improved, degraded", [(0, 0), (1, 0), (0, 6), (10, 3), (3, 10), (48, 52), (120, 4)])
def test_mcnemar_is_the_exact_binomial_test(improved, degraded):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(improved, improved + degraded).pvalue if improved + degraded else 1.0
    assert mcnemar(improved, degraded) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_of_a_few_tasks_by_counting_coin_flips():
    """5 improved, 1 degraded: of the 64 outcomes of six flips, 14 are at least as lopsided."""
    lopsided = sum(abs(sum(flips) - 3) >= 2 for flips in itertools.product((0, 1), repeat=6))
    assert mcnemar(5, 1) == pytest.approx(lopsided / 64)


def test_mcnemar_of_many_tasks_does_not_overflow():
    assert 0 < mcnemar(2000, 1500) < 1e-15


def test_bootstrap_agrees_with_resampling_task_by_task():
    """The multinomial shortcut is the textbook bootstrap: same interval as scipy's, up to Monte Carlo error."""
    stats = pytest.importorskip("scipy.stats")
    differences = np.array([1] * 90 + [-1] * 12 + [0] * 398, dtype=float)
    options = {"method": "percentile", "vectorized": True, "batch": 500, "rng": np.random.default_rng(7)}
    expected = stats.bootstrap((differences,), np.mean, n_resamples=10_000, **options).confidence_interval
    assert paired_bootstrap(differences) == pytest.approx(tuple(expected), abs=0.004)


def test_bootstrap_of_real_valued_differences_is_close_to_the_normal_interval():
    differences = np.random.default_rng(3).normal(0.2, 1.0, size=800)
    mean, error = differences.mean(), differences.std() / math.sqrt(800)
    expected = (mean - 1.96 * error, mean + 1.96 * error)
    assert paired_bootstrap(differences) == pytest.approx(expected, abs=0.006)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    generator, truth = np.random.default_rng(0), 0.15 - 0.05
    draws = [generator.choice([1, -1, 0], p=[0.15, 0.05, 0.8], size=300) for _ in range(400)]
    intervals = [paired_bootstrap(draw, seed=index) for index, draw in enumerate(draws)]
    assert 0.92 < np.mean([low <= truth <= high for low, high in intervals]) < 0.98


def test_bootstrap_depends_on_its_seed_and_not_on_the_order_of_tasks():
    differences = [1, 0, 0, -1, 1, 0.5] * 20
    found, other = (paired_bootstrap(differences, seed) for seed in (1, 2))
    assert found == paired_bootstrap(random.Random(0).sample(differences, len(differences)), 1) != other
    assert paired_bootstrap([0.0] * 50) == (0.0, 0.0)


@pytest.mark.parametrize("correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(correct, k):
    is_right = [True] * correct + [False] * (5 - correct)
    subsets = list(itertools.combinations(is_right, k))
    assert pass_at_k(5, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased():
    """Over many draws of n samples, the estimate's mean is 1 - (1 - p)^k; the naive 1 - (1 - c/n)^k is not."""
    generator = np.random.default_rng(0)
    correct = generator.binomial(8, 0.2, size=20_000)
    assert np.mean([pass_at_k(8, int(c), 4) for c in correct]) == pytest.approx(1 - 0.8**4, abs=0.01)
    assert np.mean(1 - (1 - correct / 8) ** 4) < 1 - 0.8**4 - 0.02


@pytest.mark.parametrize("samples, correct, k", [(4, 0, 1), (4, 3, 2), (4, 4, 4), (4, 3, 4), (8, 5, 3)])
def test_pass_hat_k_counts_the_subsets_that_are_all_right(samples, correct, k):
    subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_hat_k(samples, correct, k) == pytest.approx(sum(map(all, subsets)) / len(subsets))
    assert pass_hat_k(samples, correct, 1) == pass_at_k(samples, correct, 1)
