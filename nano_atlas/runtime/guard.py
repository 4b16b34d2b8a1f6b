"""Non-degradation: what is promised about the answer that is returned, and how the promise is measured.

*Verified* (ground truth, or a Python evaluator). Every answer is verified, the student's own included, and one with help is
returned only if it scores at least as high. So with any teacher, however harmful, and on every single task, the returned answer
is never worse than the student alone. It is the better of several attempts *by verification*: how much the teaching itself helps is
the guided score, reported beside it.

*Judged.* A judge's score is noisy, and picking the higher of two noisy scores picks luck too. An answer with help is returned only
if its score is above the student's own by more than z standard errors of the difference (`--confidence`); where a score is missing,
the student's own answer is returned. That makes harm rare, and how rare is measured instead of assumed: of the answers with help
that were returned, a share (`--audit`) is judged *again*, together with the student's own, by new samples that had no part in the
choice. The share that comes out worse has a Wilson upper bound, which is what the summary states: "at most x % of the returned
answers are worse than the student's own, at 95 % confidence, according to this judge". It holds for tasks like those audited, and
not against a judge that is wrong about both answers alike.

*Nobody can score.* Then nothing is promised: the answer with help is returned unless it lacks a final answer and the student's own
has one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from nano_atlas.config import option
from nano_atlas.errors import UserError
from nano_atlas.runtime.judges import Verdict
from nano_atlas.stats import wilson_interval


@dataclass(frozen=True)
class GuardConfig:
    confidence: float = option(
        0.95,
        "confidence (0.5 to 1) that a judged answer with help is better, before it is returned",
        group="non-degradation",
    )
    audit: float = option(
        0.2, "share (0 to 1) of judged answers with help that are judged again, to measure harm"
    )

    def check(self) -> None:
        if not 0.5 <= self.confidence < 1 or not 0 <= self.audit <= 1:
            raise UserError("--confidence must be at least 0.5 and below 1, --audit between 0 and 1")


@dataclass
class Trial:
    """One answer of the student, and the verdict on it."""

    kind: str  # "alone" (always the first), "guided", "coached" or "stepwise"
    text: str
    answer: str | None  # what stands in <solution>
    tokens: int
    is_truncated: bool
    verdict: Verdict


def choose_trial(trials: Sequence[Trial], confidence: float = 0.95) -> int:
    """Which trial is returned; the module's docstring says why."""
    alone, helped = trials[0], trials[1:]
    if not helped:
        return 0
    if alone.verdict.by == "nobody":
        best = len(helped)
        return 0 if trials[best].answer is None and alone.answer is not None else best
    scored = [index for index, trial in enumerate(trials) if index and trial.verdict.score is not None]
    if alone.verdict.score is None or not scored:
        return 0
    best = max(scored, key=lambda index: trials[index].verdict.score)
    gain = trials[best].verdict.score - alone.verdict.score
    if alone.verdict.by != "judges":
        return best if gain >= 0 else 0
    margin = NormalDist().inv_cdf(confidence) * math.hypot(
        trials[best].verdict.deviation, alone.verdict.deviation
    )
    return best if gain > margin else 0


def degradation_bound(audited_gains: Sequence[float], confidence: float = 0.95) -> tuple[int, float]:
    """How many audited answers came out below the student's own, and the one-sided upper bound of their share (Wilson)."""
    worse = sum(gain < 0 for gain in audited_gains)
    return worse, wilson_interval(worse, len(audited_gains), 2 * confidence - 1)[1]
