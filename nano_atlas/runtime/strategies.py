"""Which way of teaching works: a small bandit over teaching strategies that learns from every rewarded session.

Each kind of task (its *learning key*, here the domain) has a bandit of its own, because what helps in one need not help in
another. The bandit is Thompson sampling with Gaussian priors (Agrawal & Goyal 2013, arXiv:1209.3353, algorithm 2): the unknown
mean reward of a strategy that earned `total` in `count` sessions is drawn from

    Normal(total / (count + 1), spread^2 / (count + 1))

and the strategy with the highest draw is used. A strategy tried seldom has a wide distribution and gets its chance; one that
keeps losing is left alone. Since every task draws for itself, a whole batch can be assigned before any of its rewards is known.

There is no state file. `Strategies` is rebuilt by replaying the traces, so it cannot disagree with them, and an interrupted run
chooses exactly what an uninterrupted one would have chosen.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from nano_atlas.errors import UserError

SPREAD = (
    1.0  # standard deviation assumed of a single reward; the published reward lies between about -2 and 2
)


@dataclass
class Record:
    """What a strategy, or a skill, has earned so far."""

    count: int = 0
    total: float = 0.0

    def add(self, reward: float) -> None:
        self.count, self.total = self.count + 1, self.total + reward

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


class Strategies:
    """A bandit per learning key. `strategies` are the names to choose from, such as protocol.TEACHING_STYLES."""

    def __init__(self, strategies: Sequence[str], spread: float = SPREAD):
        self.strategies = tuple(strategies)
        self.spread = spread
        self._records: dict[str, dict[str, Record]] = {}
        if not self.strategies:
            raise UserError("there must be at least one teaching strategy to choose from")

    def choose(self, learning_key: str, seed: int) -> str:
        """The strategy for one task; a pure function of the rewards learned so far and the seed."""
        stream = random.Random(seed)
        draws = {name: self._draw(self._record(learning_key, name), stream) for name in self.strategies}
        return max(draws, key=draws.__getitem__)

    def _draw(self, record: Record, stream: random.Random) -> float:
        return stream.gauss(record.total / (record.count + 1), self.spread / math.sqrt(record.count + 1))

    def learn(self, learning_key: str, strategy: str, reward: float | None) -> None:
        """Count one outcome. None (no ground truth, so no reward) teaches nothing: it is not a reward of zero."""
        if reward is None:
            return
        if not math.isfinite(reward):
            raise ValueError(f"the reward of strategy {strategy!r} is {reward}")
        self._records.setdefault(learning_key, {}).setdefault(strategy, Record()).add(reward)

    def history(self, learning_key: str) -> dict:
        """The experience with one kind of task, as it goes into a trace: sessions, average reward, and both by strategy."""
        records = self._records.get(learning_key, {})
        count = sum(record.count for record in records.values())
        total = sum(record.total for record in records.values())
        by_strategy = {
            name: {"count": rec.count, "average_score": rec.mean} for name, rec in sorted(records.items())
        }
        return {"count": count, "average_score": total / count if count else None, "strategies": by_strategy}

    def _record(self, learning_key: str, strategy: str) -> Record:
        return self._records.get(learning_key, {}).get(strategy, Record())
