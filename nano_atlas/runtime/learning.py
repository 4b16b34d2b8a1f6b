"""What the runtime learns from session to session, without touching a weight: the student's record, teaching strategies, skills.

There is no state file. `Experience` is rebuilt by replaying the outcomes in the traces, so it cannot disagree with them, and an
interrupted run makes the choices that an uninterrupted one would have made.

*Strategies.* Each kind of task (its learning key, the domain) has a bandit over the ways of teaching: Thompson sampling with Gaussian
priors (Agrawal & Goyal 2013, arXiv:1209.3353, algorithm 2). The mean reward of a strategy that earned `total` in `count` sessions is
drawn from Normal(total / (count + 1), 1 / (count + 1)), and the highest draw wins.

*Skills.* A --skill-writer (endpoint, checkpoint or Python function) reads each session that earned at least SKILL_REWARD and proposes
entries of a playbook: a cue that is looked for in task and approach, and an imperative for the teacher's prompt, a teaching strategy,
or both. In one matching session of five an entry is withheld, so that its effect (mean reward with minus without) compares sessions
of the same kind; atlas-sdk compares with sessions that the cue does not match.
"""

import hashlib
import json
import math
import random
import re
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from nano_atlas.answers import last_json, reveals_answer
from nano_atlas.config import derive_seed
from nano_atlas.protocol import TEACHING_STYLES

WINDOW = 50  # latest answers of the student alone that make its record
SKILL_REWARD = 0.8  # least session reward from which skills are learned
SKILLS_PER_TASK = 3
PLAYBOOK_SIZE = 50  # most entries in force; beyond it the one with the least effect goes
WITHHELD = 0.2  # share of matching sessions in which an entry is withheld
LONGEST_TEXT = 200  # characters of a cue or an imperative
# dates, ids, addresses, paths
PARTICULARS = r"\d{4}-\d\d-\d\d|\b\d{4,}\b|https?:|[\w.]*/[\w./]+|\w+@\w+|[A-Z]{2,}-\d+"
SKILL_REQUEST = (
    "This guidance worked well. Write what is worth remembering for *similar* tasks, at most two entries, as JSON: "
    '{"entries": [{"cue": {"type": "keyword" or "regex", "pattern": "..."}, "action": {"imperative": "...", "strategy": null}}]}. '
    "The cue is looked for in task and approach; the imperative (one sentence) tells the teacher what to do then; strategy may be one "
    f"of {', '.join(TEACHING_STYLES)}. No names, dates, numbers or answers of this task."
)


class Experience:
    """What earlier sessions taught: a function of their outcomes, in the order of learning."""

    def __init__(self, strategies: Sequence[str]):
        self.strategies, self.playbook = Strategies(strategies), Playbook()
        self.records: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))  # by learning key

    def learn(self, outcomes: Iterable[Any]) -> None:
        """From traces.Outcome of sessions that ran side by side: none of them could use what another one taught."""
        outcomes = [outcome for outcome in outcomes if outcome.status == "succeeded"]
        for outcome in outcomes:
            self.strategies.learn(outcome.learning_key, outcome.strategy, outcome.reward)
            self.playbook.learn(outcome.matched, outcome.skills, outcome.reward)
            if outcome.baseline is not None:
                self.records[outcome.learning_key].append(outcome.baseline)
        for outcome in outcomes:
            self.playbook.add(outcome.learned)


class Strategies:
    """A bandit per learning key. `strategies` are the names to choose from, such as protocol.TEACHING_STYLES."""

    def __init__(self, strategies: Sequence[str]):
        self.strategies = tuple(strategies)
        self._rewards: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def choose(self, learning_key: str, seed: int) -> str:
        """The strategy for one task; a pure function of the rewards learned so far and the seed."""
        stream, draws = random.Random(seed), {}
        for name in self.strategies:
            rewards = self._rewards[learning_key][name]
            draws[name] = stream.gauss(sum(rewards) / (len(rewards) + 1), 1 / math.sqrt(len(rewards) + 1))
        return max(draws, key=draws.__getitem__)

    def learn(self, learning_key: str, strategy: str, reward: float | None) -> None:
        """Count one outcome. An unscored session (None) teaches nothing: that is not a reward of zero."""
        if reward is not None:
            self._rewards[learning_key][strategy].append(reward)

    def history(self, learning_key: str) -> dict[str, Any]:
        """Sessions and average reward with one kind of task, over all strategies and by strategy, as they go into a trace."""
        used = {name: rewards for name, rewards in sorted(self._rewards[learning_key].items()) if rewards}
        by_strategy = {name: {"count": len(r), "average_score": fmean(r)} for name, r in used.items()}
        rewards = [reward for group in used.values() for reward in group]
        average = fmean(rewards) if rewards else None
        return {"count": len(rewards), "average_score": average, "strategies": by_strategy}


# ------------------------------------------------------------------------------------------------------------- skills


@dataclass
class Entry:
    id: str
    kind: str  # of the cue: "keyword" | "regex"
    pattern: str
    imperative: str | None
    strategy: str | None
    sessions_observed: int = 0
    hits: int = 0  # sessions whose task or approach the cue matched
    adoptions: int = 0  # of these, the ones in which it was used
    rewards_with: list[float] = field(default_factory=list)
    rewards_without: list[float] = field(default_factory=list)

    def matches(self, text: str) -> bool:
        if self.kind == "regex":
            return re.search(self.pattern, text[:20_000], re.IGNORECASE) is not None
        return self.pattern.casefold() in text.casefold()

    @property
    def effect(self) -> float | None:
        """Mean reward with minus without, or None while one of them is unknown."""
        is_known = self.rewards_with and self.rewards_without
        return fmean(self.rewards_with) - fmean(self.rewards_without) if is_known else None

    def is_useless(self) -> bool:
        """By the published rules of pruning."""
        effect, hits, observed = self.effect, self.hits, self.sessions_observed
        is_rare = observed >= 10 and hits / observed < 0.05
        is_harmful = observed >= 10 and hits >= 5 and effect is not None and effect < -0.01
        is_idle = hits >= 10 and self.adoptions / hits > 0.5 and effect is not None and effect < 0.01
        return is_rare or is_harmful or is_idle or (observed >= 20 and hits < 2)


class Playbook:
    """All entries in force. `retrieve` is a pure function of what was learned so far and the seed."""

    def __init__(self):
        self.entries: dict[str, Entry] = {}
        self.pruned: set[str] = set()  # never learned again

    def retrieve(self, text: str, seed: int) -> tuple[list[Entry], list[str]]:
        """Entries to use with a task, best known effect first, and the ids of all that match it."""
        matching = [entry for entry in list(self.entries.values()) if entry.matches(text)]
        matching.sort(key=lambda entry: -(entry.effect or 0.0))
        used = [e for e in matching if derive_seed(seed, "withheld", e.id) >= WITHHELD * 2**63]
        return used[:SKILLS_PER_TASK], [entry.id for entry in matching]

    def learn(self, matched: list[str], used: list[str], reward: float | None) -> None:
        """Count one finished session into every entry in force when it began, then prune."""
        for entry in list(self.entries.values()):
            entry.sessions_observed += 1
            if entry.id in matched:
                entry.hits += 1
                entry.adoptions += entry.id in used
                if reward is not None:
                    (entry.rewards_with if entry.id in used else entry.rewards_without).append(reward)
            if entry.is_useless():
                self._drop(entry)

    def add(self, proposals: list[dict]) -> None:
        """Entries that sessions proposed, as `read_entries` returns them."""
        for proposal in proposals:
            if proposal["id"] not in self.entries and proposal["id"] not in self.pruned:
                self.entries[proposal["id"]] = Entry(**proposal)
        while len(self.entries) > PLAYBOOK_SIZE:
            self._drop(min(self.entries.values(), key=lambda e: (e.effect or 0.0, -e.sessions_observed)))

    def _drop(self, entry: Entry) -> None:
        del self.entries[entry.id]
        self.pruned.add(entry.id)

    def summary(self) -> list[dict[str, Any]]:
        names = ("id", "kind", "pattern", "imperative", "strategy", "hits", "adoptions", "effect")
        return [{name: getattr(entry, name) for name in names} for entry in self.entries.values()]


def read_entries(text: str, secret: str | None) -> list[dict[str, Any]]:
    """The first two entries in a skill writer's reply that pass the gates, as arguments of Entry.

    An entry is actionable (a short imperative or a known strategy), its cue is not empty and can be looked for, and it is general: no
    dates, long numbers, addresses, paths or incident ids, and not the answer of the task (`secret`).
    """
    proposals, entries = (last_json(text, "entries") or {}).get("entries"), []
    for raw in proposals if isinstance(proposals, list) else []:
        try:
            kind, pattern = raw["cue"]["type"], str(raw["cue"]["pattern"] or "").strip()
            imperative = str(raw["action"].get("imperative") or "").strip()
            strategy = raw["action"].get("strategy")
        except (TypeError, KeyError, AttributeError):
            continue
        strategy = strategy if strategy in list(TEACHING_STYLES) else None
        gates = (
            kind == "keyword" or (kind == "regex" and _is_safe_regex(pattern)),
            2 <= len(pattern) <= LONGEST_TEXT,
            (imperative or strategy) and len(imperative) <= LONGEST_TEXT,
            not re.search(PARTICULARS, f"{imperative} {pattern}"),
            not (secret and reveals_answer(imperative, secret)),
        )
        if all(gates):
            cue = {"type": kind, "pattern": pattern}
            content = {"cue": cue, "action": {"imperative": imperative or None, "strategy": strategy}}
            name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
            entries.append({"id": name, "kind": kind, "pattern": pattern, **content["action"]})
    return entries[:2]


def _is_safe_regex(pattern: str) -> bool:
    """It compiles, and has no repetition of a repetition such as "(a+)+", a search for which can take for ever."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return re.search(r"[+*}]\??\)+[+*{]", pattern) is None
