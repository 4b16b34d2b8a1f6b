"""Many concurrent conversations. Each is a generator that yields calls and is sent the replies:

    def script():
        (approach,), answers = yield from ask(Call("student", "probe", ...), Call("student", "alone", ..., n=4))
        return answers

Calls of all scripts to the same checkpoint are sampled in one batch; calls to endpoints and agents run in threads, and
each script continues when its replies are complete. A failed call sends a Fault instead of replies, to its own script.
"""

import threading
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

from nano_atlas.protocol import Messages
from nano_atlas.seats import Fault, Generation, Question, Reply, Seat
from nano_atlas.text import clean, masked


@dataclass(frozen=True)
class Call:
    seat: str  # who is asked: "student", "teacher", "judge", ...
    kind: str  # purpose: "probe", "alone", "teaching", ...
    messages: Messages
    generation: Generation
    seed: int
    n: int = 1  # replies

    @property
    def question(self) -> Question:
        return Question(self.messages, self.generation, self.seed, self.n)


class Job(NamedTuple):
    key: Any  # of its script
    index: int  # in the list of calls that the script yielded
    call: Call


Script = Generator[list[Call], list, Any]  # yields calls; is sent a list of replies, or a Fault, for each


def ask(*calls: Call) -> Script:
    """The replies to all calls; raises the first Fault among them."""
    answers = (yield list(calls)) if calls else []
    for answer in answers:
        if isinstance(answer, Fault):
            raise answer
    return answers


def caught(script: Script) -> Script:
    """A script that returns what `script` returns, or the Fault that ended it."""
    try:
        return (yield from script)
    except Fault as fault:
        return fault


def play(scripts: Sequence[Script], seats: Mapping[str, Seat], progress=None) -> list[Any]:
    """The scripts' results, in order. They run in lockstep: one call of each seat per round for all. Raises their errors."""
    results = {}
    for finished in drive(dict(enumerate(scripts)), seats, is_lockstep=True, progress=progress):
        results |= finished
    return [results[index] for index in range(len(scripts))]


def play_most(scripts: Sequence[Script], seats: Mapping[str, Seat], progress=None) -> list[Any]:
    """As `play`, without scripts that ended with a Fault; raises the first Fault if all did."""
    results = play([caught(script) for script in scripts], seats, progress)
    kept = [result for result in results if not isinstance(result, Fault)]
    if results and not kept:
        raise results[0]
    return kept


def drive(scripts, seats, workers=16, timeout=600.0, is_lockstep=False, progress=None):
    """Runs all `scripts` {key: Script}; yields groups {key: result} as soon as scripts finish.

    timeout: seconds after which a call to an endpoint or agent fails. Its thread continues, but does not count as a worker.
    """
    answers: dict[Any, list] = {}  # of each waiting script, None for pending ones
    finished: dict[Any, Any] = {}
    batched: list[Job] = []  # for checkpoints; wait until no other call is running
    queued: deque[Job] = deque()  # wait for a thread
    flying: dict[Future, tuple[Job, float]] = {}  # running, with their deadlines

    def advance(key: Any, received: list | None) -> None:
        try:
            calls = scripts[key].send(received)
        except StopIteration as end:
            finished[key] = end.value
            return
        answers[key] = [None] * len(calls)
        for index, call in enumerate(calls):
            is_batched = is_lockstep or getattr(seats[call.seat], "is_batched", False)
            (batched if is_batched else queued).append(Job(key, index, call))

    def arrive(job: Job, answer: list[Reply] | Fault) -> None:
        answers[job.key][job.index] = answer
        if None not in answers[job.key]:
            advance(job.key, answers.pop(job.key))

    for key in scripts:
        advance(key, None)
    while finished or answers:
        if finished:
            done, finished = finished, {}
            yield done
        while queued and len(flying) < workers:
            job, future = queued.popleft(), Future()
            flying[future] = job, time.monotonic() + timeout
            # unlike a pool's thread, a daemon thread that hangs does not block the exit of the program
            threading.Thread(target=_ask_one, args=(seats, job.call, future), daemon=True).start()
        if flying:
            first = min(deadline for _, deadline in flying.values())
            wait(flying, max(0.0, first - time.monotonic()), FIRST_COMPLETED)
            for future, (job, deadline) in list(flying.items()):
                if future.done() or time.monotonic() >= deadline:
                    del flying[future]
                    late = Fault(f"{job.call.seat}: no reply within {timeout:g} seconds")
                    arrive(job, future.result() if future.done() else late)
        elif batched:
            seat = seats[batched[0].call.seat]
            mine = [job for job in batched if seats[job.call.seat] is seat]
            batched = [job for job in batched if seats[job.call.seat] is not seat]
            mine.sort(key=lambda job: job.index)  # first calls of all scripts, second calls, ...
            replies = seat.ask([job.call.question for job in mine], progress)
            for job, answer in zip(mine, replies):
                arrive(job, answer)


def _ask_one(seats: Mapping[str, Seat], call: Call, future: Future) -> None:
    """One call to a seat; any exception of a user's agent becomes a Fault."""
    try:
        (replies,) = seats[call.seat].ask([call.question])
    except BaseException as error:  # even SystemExit in a user's function, because a script waits
        replies = f"{type(error).__name__}: {error}"
    if not isinstance(replies, list):
        replies = Fault(f"{call.seat}: {clean(masked(str(replies)))[:500]}")
    elif not all(reply.text.strip() or reply.is_truncated for reply in replies):
        replies = Fault(f"{call.seat}: returned nothing")
    future.set_result(replies)
