"""Non-degradation: what is promised about the answer that is returned, and how the promise is measured.

*Verified* (ground truth, or a Python evaluator). An answer with help is returned only if it scores at least as high as the student's own:
with any teacher, on every task, the returned answer is never worse. How much the teaching itself helps is the guided score.

*Judged.* Picking the higher of two noisy scores picks luck too. An answer with help is returned only if its score is above the student's
own by more than z standard errors of the difference. How rare harm then is, is measured: a share (`--audit`) of the returned answers
with help is judged *again*, with the student's own, by new samples. The summary states the Wilson upper bound of the share that comes
out worse. It holds for tasks like those audited, and not against a judge that is wrong about both answers alike.

*Nobody can score.* Nothing is promised: the answer with help is returned unless only the student's own has a final answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from nano_atlas.runtime.judges import Verdict
from nano_atlas.stats import wilson_interval

CONFIDENCE = 0.95  # that a judged answer with help is better, before it is returned; and of the bound on harm


@dataclass
class Trial:
    """One answer of the student, and the verdict on it."""

    kind: str  # "alone" (always the first), "guided" or "coached"
    text: str
    answer: str | None  # what stands in <solution>
    tokens: int
    is_truncated: bool
    verdict: Verdict | None = None  # None: not judged yet

    @property
    def score(self) -> float | None:
        return self.verdict.score


def choose_trial(trials: Sequence[Trial]) -> int:
    """Which trial is returned; the module's docstring says why."""
    alone, last = trials[0], len(trials) - 1
    if alone.verdict.by == "nobody":
        return 0 if trials[last].answer is None and alone.answer is not None else last
    scored = [index for index in range(1, len(trials)) if trials[index].score is not None]
    if alone.score is None or not scored:
        return 0
    best = max(scored, key=lambda index: trials[index].score)
    gain, noise = (
        trials[best].score - alone.score,
        math.hypot(trials[best].verdict.deviation, alone.verdict.deviation),
    )
    if alone.verdict.by == "judges":
        return best if gain > NormalDist().inv_cdf(CONFIDENCE) * noise else 0
    return best if gain >= 0 else 0


def degradation_bound(audited_gains: Sequence[float]) -> tuple[int, float]:
    """How many audited answers came out below the student's own, and the one-sided upper bound of their share (Wilson)."""
    worse = sum(gain < 0 for gain in audited_gains)
    return worse, wilson_interval(worse, len(audited_gains), 2 * CONFIDENCE - 1)[1]
