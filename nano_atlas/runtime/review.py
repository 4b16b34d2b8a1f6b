"""Which sessions may train the next teacher: review by people, and an alarm when rewards drift.

A session is recorded as `approved`, or as `pending` where --require-approval says so or its reward is out of line; people change that
by --approve and --quarantine, with a note. Their decisions are a journal of their own, `reviews.jsonl`: traces are never rewritten.

Out of line: the reward's z-score, or its robust z-score by the median absolute deviation (x 1.4826), against the last 50 sessions of
the same kind is 3 or more in absolute value. The session itself is not among those it is compared with; in atlas-sdk it is. And the
robust score counts only where the median deviation is at least a third of the standard deviation: teaching rewards have few distinct
values, and where most sessions earn nearly the same, it is almost zero and would make every other reward an alarm.
"""

import json
from collections import defaultdict, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, pstdev

from nano_atlas.errors import UserError
from nano_atlas.runtime.journal import Journal, read_lines

STATUSES = ("pending", "approved", "quarantined")
WINDOW, LEAST_SAMPLES, ALERT = 50, 5, 3.0
MAD_SCALE = 1.4826  # makes the median absolute deviation of a normal distribution its standard deviation


class Drift:
    """Rewards of recent sessions by kind of task."""

    def __init__(self):
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def assess(self, learning_key: str, reward: float | None) -> dict | None:
        """{z, mad_z, drift_alert, ...} of a session not added yet; None without a reward or with fewer than 5 sessions before it.

        A score whose measure of spread is too small is None and gives no alert.
        """
        recent = self._recent[learning_key]
        if reward is None or len(recent) < LEAST_SAMPLES:
            return None
        middle = median(recent)
        spread, mad = pstdev(recent), MAD_SCALE * median(abs(value - middle) for value in recent)
        z = (reward - fmean(recent)) / spread if spread > 1e-9 else None
        mad_z = (reward - middle) / mad if mad > max(1e-9, spread / 3) else None
        alert = any(score is not None and abs(score) >= ALERT for score in (z, mad_z))
        return {"z": z, "mad_z": mad_z, "samples": len(recent), "drift_alert": alert}

    def add(self, learning_key: str, reward: float | None) -> None:
        if reward is not None:
            self._recent[learning_key].append(reward)


@dataclass(frozen=True)
class Review:
    session_id: str
    status: str
    note: str
    at: str  # ISO 8601


def read_reviews(path: Path) -> dict[str, Review]:
    """The latest decision on each session that has one."""
    if not path.exists() or not path.stat().st_size:
        return {}
    reviews = {}
    for number, line in read_lines(path):
        try:
            fields = json.loads(line)
            review = Review(fields["session_id"], fields["status"], fields["note"], fields["at"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}:{number}: not a review ({error}); delete this line") from None
        reviews[review.session_id] = review
    return reviews


def record_reviews(
    path: Path, names: tuple[str, ...], known: list[str], status: str, note: str, at: str
) -> list[str]:
    """Decide on the sessions that `names` are the ids, or unique beginnings of ids, of. Raises UserError, and then decides on none."""
    full = []
    for name in names:
        meant = [session_id for session_id in known if session_id.startswith(name)]
        if len(meant) != 1:
            raise UserError(
                f"session {name}: {'no such session' if not meant else f'{len(meant)} sessions begin like this'}"
            )
        full += meant
    with Journal(path) as journal:
        journal.append(asdict(Review(name, status, note, at)) for name in full)
    return full
