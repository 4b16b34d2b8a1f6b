"""What the runtime learns from session to session, without touching a weight: the student's record, teaching strategies, skills.

There is no state file: `Experience` is rebuilt by replaying the outcomes in the traces.

*Strategies.* Each kind of task (its learning key, the domain) has a bandit over the ways of teaching: Thompson sampling with Gaussian
priors (Agrawal & Goyal 2013, arXiv:1209.3353, algorithm 2). The mean reward of a strategy that earned `total` in `count` sessions is
drawn from Normal(total / (count + 1), 1 / (count + 1)), and the highest draw wins.

*Skills.* A --skill-writer reads each session that earned at least SKILL_REWARD and proposes entries of a playbook: a cue that is looked
for in task and approach, and an imperative for the teacher's prompt, a teaching strategy, or both. In one matching session of five an
entry is withheld, so that its effect (mean reward with minus without) compares sessions of the same kind.
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
NESTED_REPETITION = r"[+*}]\??\)+[+*{]"  # such as "(a+)+", a search for which can take for ever
SKILL_REQUEST = (
    "This guidance worked well. Write what is worth remembering for *similar* tasks, at most two entries, as JSON: "
    '{"entries": [{"cue": {"type": "keyword" or "regex", "pattern": "..."}, "action": {"imperative": "...", "strategy": null}}]}. '
    "The cue is looked for in task and approach; the imperative (one sentence) tells the teacher what to do then; strategy may be one "
    f"of {', '.join(TEACHING_STYLES)}. No names, dates, numbers or answers of this task."
)


@dataclass
class Outcome:
    """The few numbers of a session that the runtime keeps in memory. Scores (0 to 1) are None where nobody could say."""

    session_id: str
    learning_key: str = ""
    lane: str = ""
    strategy: str = ""
    status: str = "succeeded"  # "succeeded" | "failed"
    review: str = "approved"  # "approved" | "pending" | "quarantined"
    created_at: str = ""  # ISO 8601
    returned_attempt: str = ""  # kind of the trial: "alone" | "guided" | "coached"
    reward: float | None = None
    baseline: float | None = None  # score of the student alone
    guided: float | None = None  # with help; that of the student alone where the teacher gave none
    returned: float | None = None
    disagreement: float = 0.0  # largest standard error of a judged score
    audited_gain: float | None = None  # returned minus baseline, judged again
    is_leak: bool = False
    is_malformed: bool = False
    is_truncated: bool = False  # an answer or a teaching ran into its length limit
    tokens: dict[str, int] = field(default_factory=dict)  # generated, by actor
    prompt_tokens: dict[str, int] = field(default_factory=dict)  # read, by actor
    matched: list[str] = field(default_factory=list)  # ids of skills whose cue applied
    skills: list[str] = field(default_factory=list)  # ids of skills that were used
    learned: list[dict] = field(default_factory=list)

    @property
    def gain(self) -> float | None:
        return None if self.guided is None or self.baseline is None else self.guided - self.baseline

    @property
    def usage(self) -> dict[str, int]:
        """As OpenAI counts tokens."""
        read, generated = sum(self.prompt_tokens.values()), sum(self.tokens.values())
        return {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}


class Experience:
    """What earlier sessions taught: a function of their outcomes, in the order of learning."""

    def __init__(self, strategies: Sequence[str]):
        self.strategies, self.playbook = Strategies(strategies), Playbook()
        self.records: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))  # by learning key

    def learn(self, outcomes: Iterable[Outcome]) -> None:
        """From sessions that ran side by side: none of them could use what another one taught."""
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
        self.rewards: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def choose(self, learning_key: str, seed: int) -> str:
        """The strategy for one task; a pure function of the rewards learned so far and the seed."""
        stream, draws = random.Random(seed), {}
        for name in self.strategies:
            rewards = self.rewards[learning_key][name]
            draws[name] = stream.gauss(sum(rewards) / (len(rewards) + 1), 1 / math.sqrt(len(rewards) + 1))
        return max(draws, key=draws.__getitem__)

    def learn(self, learning_key: str, strategy: str, reward: float | None) -> None:
        """Count one outcome. An unscored session (None) teaches nothing: that is not a reward of zero."""
        if reward is not None:
            self.rewards[learning_key][strategy].append(reward)

    def history(self, learning_key: str) -> dict[str, Any]:
        """Sessions and average reward with one kind of task, over all strategies and by strategy, as they go into a trace."""
        used = {name: rewards for name, rewards in sorted(self.rewards[learning_key].items()) if rewards}
        by_strategy = {name: {"count": len(r), "average_score": fmean(r)} for name, r in used.items()}
        rewards = sum(used.values(), [])
        average = fmean(rewards) if rewards else None
        return {"count": len(rewards), "average_score": average, "strategies": by_strategy}


@dataclass
class Entry:
    """A skill: what to tell the teacher where a cue is found."""

    id: str
    kind: str  # of the cue: "keyword" | "regex"
    pattern: str
    imperative: str | None
    strategy: str | None
    sessions_observed: int = 0
    hits: int = 0  # sessions whose task or approach the cue matched
    adoptions: int = 0  # of these, the ones in which it was used
    rewards: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))  # without, with it

    def matches(self, text: str) -> bool:
        pattern = self.pattern if self.kind == "regex" else re.escape(self.pattern)
        return re.search(pattern, text[:20_000], re.IGNORECASE) is not None

    @property
    def effect(self) -> float | None:
        """Mean reward with minus without, or None while one of them is unknown."""
        without, used = self.rewards
        return fmean(used) - fmean(without) if without and used else None

    def is_useless(self) -> bool:
        """By the published rules of pruning."""
        effect, hits, observed = self.effect, self.hits, self.sessions_observed
        is_rare = (observed >= 10 and hits / observed < 0.05) or (observed >= 20 and hits < 2)
        is_harmful = observed >= 10 and hits >= 5 and effect is not None and effect < -0.01
        is_idle = hits >= 10 and self.adoptions / hits > 0.5 and effect is not None and effect < 0.01
        return is_rare or is_harmful or is_idle


class Playbook:
    """All entries in force. `retrieve` is a pure function of what was learned so far and the seed."""

    def __init__(self):
        self.entries: dict[str, Entry] = {}
        self.known: set[str] = set()  # ids, also of entries that went: they are never learned again

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
                is_used = entry.id in used
                entry.hits, entry.adoptions = entry.hits + 1, entry.adoptions + is_used
                entry.rewards[is_used].extend([] if reward is None else [reward])
            if entry.is_useless():
                del self.entries[entry.id]

    def add(self, proposals: list[dict]) -> None:
        """Entries that sessions proposed, as `read_entries` returns them."""
        new = {entry["id"]: Entry(**entry) for entry in proposals if entry["id"] not in self.known}
        self.entries, self.known = self.entries | new, self.known | set(new)
        while len(self.entries) > PLAYBOOK_SIZE:
            worst = min(self.entries.values(), key=lambda e: (e.effect or 0.0, -e.sessions_observed))
            del self.entries[worst.id]


def read_entries(text: str, secret: str | None) -> list[dict[str, Any]]:
    """The first two entries in a skill writer's reply that pass the gates, as arguments of Entry. secret: the answer of the task."""
    proposals, entries = (last_json(text, "entries") or {}).get("entries"), []
    for raw in proposals if isinstance(proposals, list) else []:
        try:
            kind, pattern = raw["cue"]["type"], str(raw["cue"]["pattern"] or "").strip()
            imperative = str(raw["action"].get("imperative") or "").strip()
            strategy = raw["action"].get("strategy")
            re.compile(pattern if kind == "regex" else "")
        except (TypeError, KeyError, AttributeError, re.error, RecursionError, OverflowError):
            continue
        is_a_cue = kind in ("keyword", "regex") and 2 <= len(pattern) <= LONGEST_TEXT
        strategy = strategy if strategy in list(TEACHING_STYLES) else None
        is_actionable = (imperative or strategy) and len(imperative) <= LONGEST_TEXT
        is_general = not re.search(PARTICULARS, f"{imperative} {pattern}")
        is_general &= not (secret and reveals_answer(imperative, secret))
        if is_a_cue and is_actionable and is_general and not re.search(NESTED_REPETITION, pattern):
            action = {"imperative": imperative or None, "strategy": strategy}
            content = {"cue": {"type": kind, "pattern": pattern}, "action": action}
            name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
            entries.append({"id": name, "kind": kind, "pattern": pattern, **action})
    return entries[:2]
