"""Many sessions side by side: each is a generator that yields the calls it needs and is sent the replies.

    def script():
        probe, alone = yield [Call("student", "probe", ...), Call("student", "alone", ...)]
        return alone.text

So a lane reads as if it were alone in the world, and yet the calls of all sessions to a checkpoint go through its sampler in one
batch, while those to endpoints and agents run in up to `workers` threads, each session going on as soon as its replies are
there. A call that fails gives a Fault in place of its Reply; the other sessions do not notice.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from nano_atlas.errors import UserError
from nano_atlas.protocol import Messages
from nano_atlas.seats import EmbeddedSeat, Generation, Question, Reply, Seat

LONGEST_REPLY = (
    1_000_000  # characters; more is a fault of the agent, and would be copied into prompts and traces
)
Key = TypeVar("Key")


@dataclass(frozen=True)
class Call:
    seat: str  # who is asked: "student", "teacher", "judge", ...
    kind: str  # what for: "probe", "alone", "teaching", ...
    messages: Messages
    generation: Generation
    seed: int

    @property
    def question(self) -> Question:
        return Question(self.messages, self.generation, self.seed)


class Fault(Exception):
    """What went wrong with one call. It stands in the list of replies, and is raised by a session that cannot go on without."""


Script = Generator[
    list[Call], list[Reply | Fault], Any
]  # yields calls, is sent their replies, returns the finished session


def drive(
    scripts: Mapping[Key, Script], seats: Mapping[str, Seat], workers: int = 16, timeout: float = 600.0
) -> Iterator[dict[Key, Any]]:
    """Runs all scripts; yields what they return, in groups, as soon as they are done.

    timeout: seconds from the start of a call to an endpoint or agent after which it counts as failed. Its thread cannot be
    stopped; it is left behind, and does not count as a worker any more.
    """
    replies: dict[Key, list[Reply | Fault | None]] = {}
    finished: dict[Key, Any] = {}
    batched: list[tuple[Key, int, Call]] = []
    queued: deque[tuple[Key, int, Call]] = deque()
    flying: dict[Future, tuple[Key, int, Call, float]] = {}  # with the time at which it is given up

    def advance(key: Key, received: list | None) -> None:
        try:
            calls = scripts[key].send(received)
        except StopIteration as end:
            finished[key] = end.value
            return
        replies[key] = [None] * len(calls)
        for index, call in enumerate(calls):
            (batched if is_batched(seats[call.seat]) else queued).append((key, index, call))

    def arrive(key: Key, index: int, reply: Reply | Fault) -> None:
        replies[key][index] = reply
        if None not in replies[key]:
            advance(key, replies.pop(key))

    for key in scripts:
        advance(key, None)
    while finished or flying or queued or batched:
        if finished:
            done, finished = finished, {}
            yield done
        while queued and len(flying) < workers:
            key, index, call = queued.popleft()
            flying[_in_thread(ask_one, seats[call.seat], call)] = (
                key,
                index,
                call,
                time.monotonic() + timeout,
            )
        if flying:
            next_deadline = min(deadline for *_, deadline in flying.values())
            wait(flying, max(0.0, next_deadline - time.monotonic()), FIRST_COMPLETED)
            for future, (key, index, call, deadline) in list(flying.items()):
                if future.done() or time.monotonic() >= deadline:
                    del flying[future]
                    late = Fault(f"{call.seat}: no reply within {timeout:g} seconds")
                    arrive(key, index, future.result() if future.done() else late)
        elif batched:
            calls, batched = batched, []
            for (key, index, _), reply in zip(calls, _ask_together(seats, [call for *_, call in calls])):
                arrive(key, index, reply)


def is_batched(seat: Seat) -> bool:
    """Whether a seat wants many calls at once: a checkpoint does, and agents and endpoints say so themselves."""
    return getattr(seat, "is_batched", isinstance(seat, EmbeddedSeat))


def ask_one(seat: Seat, call: Call) -> Reply | Fault:
    """One call to a seat; whatever somebody else's agent raises becomes a Fault."""
    try:
        ((reply,),) = seat.ask([call.question])
    except Exception as error:  # a UserError, or anything at all from a user's function
        return Fault(f"{call.seat}: {type(error).__name__}: {str(error)[:500]}")
    if not reply.text.strip():
        return Fault(f"{call.seat}: returned nothing")
    if len(reply.text) > LONGEST_REPLY:
        return Fault(f"{call.seat}: returned {len(reply.text):,} characters; the limit is {LONGEST_REPLY:,}")
    return reply


def _ask_together(seats: Mapping[str, Seat], calls: list[Call]) -> list[Reply | Fault]:
    """Calls of the same seat go together; if that fails (a prompt too long for the model), one by one."""
    replies: list[Reply | Fault | None] = [None] * len(calls)
    groups: dict[int, list[int]] = {}
    for index, call in enumerate(calls):
        groups.setdefault(id(seats[call.seat]), []).append(index)
    for indices in groups.values():
        group = [calls[index] for index in indices]
        seat = seats[group[0].seat]
        try:
            answers = [reply for (reply,) in seat.ask([call.question for call in group])]
        except UserError:
            answers = [ask_one(seat, call) for call in group]
        for index, answer in zip(indices, answers, strict=True):
            replies[index] = answer
    return replies


def _in_thread(function: Callable, *arguments: Any) -> Future:
    """Unlike a pool's, a daemon thread that hangs does not keep the program from ending."""
    future: Future = Future()

    def work() -> None:
        future.set_result(function(*arguments))

    threading.Thread(target=work, daemon=True).start()
    return future
