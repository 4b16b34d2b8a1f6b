"""Skills: what sessions that went well taught about teaching, kept as entries of a playbook and used in similar tasks.

    cue        a keyword or a regular expression, looked for in task and approach: when the skill applies
    action     one imperative sentence for the teacher's prompt, or a teaching strategy to use, or both
    scope      reinforcement or differentiation; the kind of task (learning key) that it comes from
    impact     how often it applied and was used, and the mean reward with and without it

A --skill-writer (an endpoint, a checkpoint or a Python function) reads each session that earned at least --skill-reward and proposes
entries; `read_entries` keeps those that pass the gates. In one matching session of five an entry is withheld, so that "without"
means the same kind of task, and the difference is the entry's doing (atlas-sdk compares with sessions the cue does not match).
Pruning is by the published rules, `is_useless`. Like everything else the playbook is rebuilt by replaying the traces.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from nano_atlas import protocol
from nano_atlas.config import option
from nano_atlas.data import derive_seed
from nano_atlas.runtime.strategies import Record

WITHHELD = 0.2  # share of matching sessions in which an entry is withheld
LONGEST_SENTENCE = 200  # characters
PARTICULARS = re.compile(
    r"\d{4}-\d\d-\d\d|\b\d{4,}\b|https?:|[\w.]*/[\w./]+|\w+@\w+|[A-Z]{2,}-\d+"
)  # dates, ids, addresses, paths


@dataclass(frozen=True)
class SkillConfig:
    skill_writer: str | None = option(
        None, "checkpoint, URL or agent that writes skills (none: no skills)", group="skills"
    )
    skill_writer_model: str | None = option(None, "model name at its URL (none: the first it serves)")
    skill_reward: float = option(0.8, "least session reward from which skills are learned")
    skills_per_task: int = option(3, "most skills used in one task")
    skill_characters: int = option(1000, "most characters of skills in one prompt")
    playbook_size: int = option(50, "most entries in force; beyond it the one with the least effect goes")


@dataclass
class Entry:
    id: str
    cue: dict[str, str]  # {type: keyword | regex, pattern}
    action: dict[str, str | None]  # {imperative, strategy}
    scope: dict[str, str]  # {category, learning_key}
    provenance: dict[str, str] = field(default_factory=dict)  # {session_id}
    sessions_observed: int = 0
    hits: int = 0  # sessions whose task or approach the cue matched
    adoptions: int = 0  # of these, the ones in which it was used
    incidents: set[str] = field(default_factory=set)  # distinct tasks it matched
    reward_with: Record = field(default_factory=Record)
    reward_without: Record = field(default_factory=Record)

    def matches(self, text: str) -> bool:
        if self.cue["type"] == "regex":
            return re.search(self.cue["pattern"], text[:20_000], re.IGNORECASE) is not None
        return self.cue["pattern"].casefold() in text.casefold()

    @property
    def effect(self) -> float | None:
        """Mean reward with minus without, or None while one of them is unknown."""
        if not self.reward_with.count or not self.reward_without.count:
            return None
        return self.reward_with.mean - self.reward_without.mean

    def is_useless(self) -> bool:
        if self.sessions_observed < 10:
            return False
        effect = self.effect
        return (
            self.hits / self.sessions_observed < 0.05
            or (effect is not None and effect < -0.01 and self.hits >= 5)
            or (effect is not None and effect < 0.01 and self.adoptions / self.hits > 0.5 and self.hits >= 10)
            or (self.sessions_observed >= 20 and len(self.incidents) < 2)
        )


class Playbook:
    """All entries in force. `retrieve` is a pure function of what was learned so far and the seed."""

    def __init__(self, config: SkillConfig):
        self.config = config
        self.entries: dict[str, Entry] = {}
        self.pruned: set[str] = set()  # never learned again

    def retrieve(self, text: str, seed: int) -> tuple[list[Entry], list[str]]:
        """Entries to use with a task, and the ids of all that match it; best known effect first, unknown before harmful ones."""
        matching = [entry for entry in list(self.entries.values()) if entry.matches(text)]
        matching.sort(key=lambda entry: -(entry.effect or 0.0))
        used: list[Entry] = []
        length = 0
        for entry in matching:
            is_withheld = derive_seed(seed, "withheld", entry.id) < WITHHELD * 2**63
            cost = len(entry.action["imperative"] or "")
            if (
                not is_withheld
                and len(used) < self.config.skills_per_task
                and length + cost <= self.config.skill_characters
            ):
                used.append(entry)
                length += cost
        return used, [entry.id for entry in matching]

    def learn(self, session_id: str, matched: list[str], used: list[str], reward: float | None) -> None:
        """Count one finished session into every entry in force when it began, then prune."""
        for entry in list(self.entries.values()):
            entry.sessions_observed += 1
            if entry.id in matched:
                entry.hits += 1
                entry.adoptions += entry.id in used
                entry.incidents.add(session_id)
                if reward is not None:
                    (entry.reward_with if entry.id in used else entry.reward_without).add(reward)
            if entry.is_useless():
                self._drop(entry)

    def add(self, proposals: list[dict]) -> None:
        """What sessions proposed. Not before all that ran beside them are counted: they could not have used it."""
        for proposal in proposals:
            entry = Entry(**proposal)
            if entry.id not in self.entries and entry.id not in self.pruned:
                self.entries[entry.id] = entry
        while len(self.entries) > self.config.playbook_size:
            self._drop(
                min(self.entries.values(), key=lambda entry: (entry.effect or 0.0, -entry.sessions_observed))
            )

    def _drop(self, entry: Entry) -> None:
        del self.entries[entry.id]
        self.pruned.add(entry.id)

    def summary(self) -> list[dict[str, Any]]:
        return [
            {
                "id": e.id,
                "cue": e.cue,
                "action": e.action,
                "scope": e.scope,
                "hits": e.hits,
                "adoptions": e.adoptions,
                "effect": e.effect,
            }
            for e in self.entries.values()
        ]


def read_entries(text: str, learning_key: str, session_id: str, secret: str | None) -> list[dict]:
    """The entries in a skill writer's reply that pass the gates, as arguments of Entry; the others are left out one by one.

    Actionable: an imperative sentence of at most 200 characters, or a known strategy. Cue: not empty; a regular expression compiles.
    General: no dates, long numbers, addresses, paths or incident ids, and not the answer of the task (`secret`).
    """
    entries = []
    for raw in (protocol.last_json(text, "entries") or {}).get("entries") or []:
        cue, action = (raw.get("cue"), raw.get("action")) if isinstance(raw, dict) else (None, None)
        if not isinstance(cue, dict) or not isinstance(action, dict):
            continue
        kind, pattern = cue.get("type"), str(cue.get("pattern") or "").strip()
        imperative, strategy = str(action.get("imperative") or "").strip(), action.get("strategy")
        strategy = strategy if strategy in protocol.TEACHING_STYLES else None
        if (
            kind not in ("keyword", "regex")
            or not 2 <= len(pattern) <= 200
            or not (imperative or strategy)
            or len(imperative) > LONGEST_SENTENCE
        ):
            continue
        if kind == "regex" and not _compiles(pattern):
            continue
        if PARTICULARS.search(imperative + " " + pattern) or (
            secret and protocol.reveals_answer(imperative, secret)
        ):
            continue
        scope = raw.get("scope") if isinstance(raw.get("scope"), dict) else {}
        category = (
            scope.get("category")
            if scope.get("category") in ("reinforcement", "differentiation")
            else "reinforcement"
        )
        content = {
            "cue": {"type": kind, "pattern": pattern},
            "action": {"imperative": imperative or None, "strategy": strategy},
        }
        name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        entries.append(
            {
                "id": name,
                **content,
                "scope": {"category": category, "learning_key": learning_key},
                "provenance": {"session_id": session_id},
            }
        )
    return entries[:2]


def _compiles(pattern: str) -> bool:
    """Also refuses repetitions of repetitions, "(a+)+": a search for them can take for ever."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return re.search(r"[+*}]\??\)+[+*{]", pattern) is None
