"""A user's Python functions, `MODULE:NAME` of something importable, also from the current directory.

    verifier   function(question=, answer=, text=, gold=) -> a score from 0 to 1, or None: unknown
    reward     function(episode) -> a number; episode: an `episode.Episode`, which holds the published reward
    agent      see runtime/agents.py

Each may be plain or async. Verifiers and agents run in threads with a time limit; what they raise is a Fault.
"""

import asyncio
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from nano_atlas.errors import UserError
from nano_atlas.schedule import Call, ask, caught, drive
from nano_atlas.seats import Answers, Fault, Question, Reply, estimate_tokens

SECONDS = 60.0  # for a call of a verifier in training and evaluation


@dataclass
class Agent:
    """A seat that calls `reply(question, seed)` for one question at a time. `reply` may raise anything."""

    reply: Callable[[Question, int], Reply]
    is_batched = False
    count_tokens = staticmethod(estimate_tokens)

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> list[list[Reply]]:
        return [[self.reply(q, q.seed + place) for place in range(q.n)] for q in questions]


@dataclass
class SideBySide:
    """A verifier's seat for `play`: its calls run in threads of SECONDS each, and fail each for itself."""

    seat: Agent

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> Answers:
        calls = (Call("verifier", "verifier", *question) for question in questions)
        scripts, answers = {i: caught(ask(call)) for i, call in enumerate(calls)}, {}
        for finished in drive(scripts, {"verifier": self.seat}, timeout=SECONDS):
            answers |= finished
        return [one if isinstance(one, Fault) else one[0] for _, one in sorted(answers.items())]


def load_object(spec: str) -> Callable:
    """Imports the function. Raises UserError."""
    module, _, name = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = reduce(getattr, name.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"{spec}: {cause}; it should be MODULE:NAME of something importable") from None
    if callable(found):
        return found
    raise UserError(f"{spec} is a {type(found).__name__}, not a function")


def resolve(value: Any) -> Any:
    """The result of a function: plain, async, or a generator of either kind. Not for use inside a running event loop."""

    async def finish() -> Any:
        return "".join([piece async for piece in value]) if inspect.isasyncgen(value) else await value

    if inspect.isasyncgen(value) or inspect.isawaitable(value):
        return asyncio.run(finish())
    return "".join(value) if inspect.isgenerator(value) else value


def verifier_seat(spec: str, is_lockstep=True) -> dict[str, Agent | SideBySide]:
    """{"verifier": seat} for `episode.verify`; {} for exact. is_lockstep: for `play`. Raises UserError."""
    if spec == "exact":
        return {}
    function = load_object(spec)

    def reply(question: Question, seed: int) -> Reply:
        value = resolve(function(**question.messages[0]))
        if isinstance(value, str | bytes) or not (value is None or 0 <= float(value) <= 1):
            raise ValueError(f"the score must be a number between 0 and 1, not {value!r:.80}")
        return Reply(json.dumps(None if value is None else float(value)), 0, False)

    return {"verifier": SideBySide(Agent(reply)) if is_lockstep else Agent(reply)}


def open_reward(spec: str) -> Callable[[Any], float]:
    """The function, with a UserError that names it for what it raises, and for what is no finite number."""
    function = load_object(spec)

    def reward(episode: Any) -> float:
        try:
            if math.isfinite(value := float(resolve(function(episode)))):
                return value
            raise ValueError(f"it returned {value}, not a finite number")
        except Exception as error:  # a user's function may raise anything
            raise UserError(f"--reward {spec}: {type(error).__name__}: {error}") from error

    return reward
