"""What the runtime learns across sessions without training: the student's record, teaching strategies, skills.

*Strategies.* Each kind of task (learning key, the domain) has a bandit over the teaching styles: Thompson sampling with
Gaussian priors (Agrawal & Goyal 2013, arXiv:1209.3353, algorithm 2). A strategy with the sum `total` of rewards in
`count` sessions draws from a normal with mean total / (count + 1) and variance 1 / (count + 1); the highest draw wins.

*Skills.* A --skill-writer reads each session with a reward of at least SKILL_REWARD and proposes entries of a playbook:
a cue to look for in task and approach, and an instruction for the teacher, a teaching strategy, or both.
"""

import json
import math
import random
import re
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from nano_atlas import protocol, runs
from nano_atlas.answers import last_json, reveals_answer
from nano_atlas.config import derive_seed
from nano_atlas.runtime.judges import Line
from nano_atlas.runtime.traces import Outcome

WINDOW = 50  # latest scores of the student alone that are its record
SKILL_REWARD = 0.8  # least session reward from which skills are learned
SKILLS_PER_TASK = 3
PLAYBOOK_SIZE = 50  # most active entries; beyond it the one with the least effect is removed
WITHHELD = 0.2  # share of matching sessions in which an entry is withheld, to measure its effect
LONGEST_TEXT = 200  # characters of a cue or an imperative
PARTICULARS = r"\d{4}-\d\d-\d\d|\b\d{4,}\b|https?:|[\w.]*/[\w./]+|\w+@\w+|[A-Z]{2,}-\d+"  # dates, paths, ids
SKILL_REQUEST = (
    "This guidance worked well. Write what is worth remembering for *similar* tasks, at most two entries, as JSON: "
    '{"entries": [{"cue": {"type": "keyword", "pattern": "..."}, "action": {"imperative": "...", "strategy": null}}]}. '
    "The cue is looked for in task and approach; the imperative (one sentence) tells the teacher what to do then; strategy may be one "
    f"of {', '.join(protocol.TEACHING_STYLES)}. No names, dates, numbers or answers of this task."
)


@dataclass
class Entry:
    """A skill: what to tell the teacher if a cue is found."""

    id: str
    kind: str  # of the cue: "keyword"; other kinds in older traces are ignored
    pattern: str
    imperative: str | None
    strategy: str | None
    sessions_observed: int = 0
    hits: int = 0  # sessions whose task or approach the cue matched
    adoptions: int = 0  # those of the hits in which it was used
    rewards: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))  # without, with it

    def count(self, outcome: Outcome) -> None:
        self.sessions_observed += 1
        if self.id in outcome.matched:
            is_used = self.id in outcome.skills
            self.hits, self.adoptions = self.hits + 1, self.adoptions + is_used
            self.rewards[is_used].extend([] if outcome.reward is None else [outcome.reward])

    @property
    def effect(self) -> float | None:
        """Mean reward with minus without it, or None while one is unknown."""
        without, used = self.rewards
        return fmean(used) - fmean(without) if without and used else None

    def is_useless(self) -> bool:
        """The published pruning rules: rarely found; harmful; or often used without effect."""
        hits, observed = self.hits, self.sessions_observed
        if (observed >= 10 and hits / observed < 0.05) or (observed >= 20 and hits < 2):
            return True
        limit = 0.01 if hits >= 10 and self.adoptions / hits > 0.5 else -0.01
        return observed >= 10 and hits >= 5 and self.effect is not None and self.effect < limit


def read_entries(text: str, secret: str | None) -> list[dict[str, Any]]:
    """The first two valid entries in a skill writer's reply, as arguments of Entry. secret: the task's answer."""
    proposals, entries = (last_json(text, "entries") or {}).get("entries"), []
    for raw in proposals if isinstance(proposals, list) else []:
        try:
            kind, pattern = raw["cue"]["type"], raw["cue"]["pattern"].strip()
            told, strategy = (raw["action"].get("imperative") or "").strip(), raw["action"].get("strategy")
        except (TypeError, KeyError, AttributeError):
            continue
        strategy = strategy if strategy in list(protocol.TEACHING_STYLES) else None
        is_short = 2 <= len(pattern) <= LONGEST_TEXT and len(told) <= LONGEST_TEXT
        is_particular = re.search(PARTICULARS, f"{told} {pattern}") or secret and reveals_answer(told, secret)
        if kind == "keyword" and is_short and (told or strategy) and not is_particular:
            action = {"imperative": told or None, "strategy": strategy}
            content = {"cue": {"type": kind, "pattern": pattern}, "action": action}
            name = runs.digest([json.dumps(content, sort_keys=True).encode()])[:12]
            entries.append({"id": name, "kind": kind, "pattern": pattern, **action})
    return entries[:2]


class Experience:
    """A function of the outcomes in all traces, in order; there is no state file."""

    def __init__(self, strategies: Sequence[str] = ()):
        self.strategies, self.line = strategies, Line(silent=1)
        self.records = defaultdict(lambda: deque(maxlen=WINDOW))  # by learning key: scores of the student
        self.rewards = defaultdict(lambda: defaultdict(list))  # by learning key and strategy
        self.entries: dict[str, Entry] = {}  # active skills by id
        self.known: set[str] = set()  # ids, also of removed entries: they are never learned again

    def learn(self, *outcomes: Outcome) -> None:
        """Learns from one batch of sessions. Unscored rewards are left out, not counted as zero."""
        outcomes = [outcome for outcome in outcomes if outcome.status == "succeeded"]
        for outcome in outcomes:
            if outcome.reward is not None:
                self.rewards[outcome.learning_key][outcome.strategy].append(outcome.reward)
            if outcome.baseline is not None:
                self.records[outcome.learning_key].append(outcome.baseline)
            for entry in list(self.entries.values()):
                entry.count(outcome)
                if entry.is_useless():
                    del self.entries[entry.id]
        keywords = [entry for outcome in outcomes for entry in outcome.learned if entry["kind"] == "keyword"]
        new = {entry["id"]: Entry(**entry) for entry in keywords if entry["id"] not in self.known}
        self.entries, self.known = self.entries | new, self.known | set(new)
        while len(self.entries) > PLAYBOOK_SIZE:
            worst = min(self.entries.values(), key=lambda e: (e.effect or 0.0, -e.sessions_observed))
            del self.entries[worst.id]

    def retrieve(self, text: str, seed: int) -> tuple[list[Entry], list[str]]:
        """Entries to use with a task, best known effect first, and the ids of all that match it."""
        text, entries = text.casefold(), list(self.entries.values())
        matching = [entry for entry in entries if entry.pattern.casefold() in text]
        matching.sort(key=lambda entry: -(entry.effect or 0.0))
        used = [e for e in matching if derive_seed(seed, "withheld", e.id) >= WITHHELD * 2**63]
        return used[:SKILLS_PER_TASK], [entry.id for entry in matching]

    def choose_strategy(self, learning_key: str, seed: int) -> str:
        stream, draws = random.Random(seed), {}
        for name in self.strategies:
            rewards = self.rewards[learning_key][name]
            draws[name] = stream.gauss(sum(rewards) / (len(rewards) + 1), 1 / math.sqrt(len(rewards) + 1))
        return max(draws, key=draws.__getitem__)

    def history(self, learning_key: str) -> dict[str, Any]:
        """For the trace: sessions and average reward on one kind of task, in total and by strategy."""
        average = lambda of: {"count": len(of), "average_score": fmean(of) if of else None}
        used = {name: rewards for name, rewards in sorted(self.rewards[learning_key].items()) if rewards}
        strategies = {name: average(rewards) for name, rewards in used.items()}
        return average(sum(used.values(), [])) | {"strategies": strategies}
