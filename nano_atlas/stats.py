"""Statistics of paired comparisons. Rates and differences are fractions, not percent."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a rate (Wilson 1927, J. Am. Stat. Assoc. 22).

    Unlike p ± z·SE it stays within [0, 1] and does not collapse at rates near 0 or 1, such as leak and harm rates.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, spread = successes / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(differences: Sequence[float], seed=0, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of `differences`, one per task (Efron 1979, Ann. Stat. 7).

    Tasks are drawn with replacement, both arms of a task together, so a task's difficulty cancels. The mean of a resample
    depends only on how often each *value* is drawn; these counts are multinomial and drawn directly.
    """
    values, counts = np.unique(np.asarray(differences, dtype=np.float64), return_counts=True)
    total, generator = counts.sum(), np.random.default_rng(seed)
    drawn = generator.multinomial(total, counts / total, size=10_000)  # [resamples, values]
    low, high = np.quantile(drawn @ values / total, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def in_points(delta: float, interval: tuple[float, float]) -> str:
    """A difference of rates and its interval, in percentage points."""
    low, high = interval
    return f"{100 * delta:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def mcnemar(improved: int, degraded: int) -> float:
    """Two-sided exact p-value of McNemar's test. Null hypothesis: tasks improve and degrade equally often."""
    changed = improved + degraded
    tail = sum(math.comb(changed, k) for k in range(min(improved, degraded) + 1))
    return min(1.0, 2 * tail / 2**changed)


def pass_hat_k(samples: int, correct: int, k: int) -> float:
    """pass^k: unbiased estimate of the chance that all of k samples are right (Yao et al. 2024, arXiv:2406.12045)."""
    return math.comb(correct, k) / math.comb(samples, k)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """pass@k: unbiased estimate of the chance that one of k samples is right (Chen et al. 2021, arXiv:2107.03374)."""
    return 1 - pass_hat_k(samples, samples - correct, k)  # not all of them are wrong
