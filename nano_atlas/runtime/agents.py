"""Opens a seat from its description: a checkpoint, a server, an HTTP service or a Python function.

    DIRECTORY                        a checkpoint
    http://host:port#model           an OpenAI-compatible server
    post+http://host/path#a.b        an HTTP service: POST {"prompt", "metadata"}; the reply's text is at a.b of its JSON
    module:function                  function(prompt=, metadata=): plain, async or a generator of text pieces

A function returns a text, or a dict {"content": text, "usage": {"prompt_tokens", "completion_tokens"}}. `metadata`
holds the messages, the seed and the sampling options. An agent runs its own tools. Each call runs in its own thread.
"""

import asyncio
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch

from nano_atlas.client import Client, is_url
from nano_atlas.errors import UserError
from nano_atlas.seats import EndpointSeat, Question, Reply, Seat, estimate_tokens, open_seat, read_reply


@dataclass
class Agent:
    """A seat that calls `reply(question, seed)` for one question at a time. `reply` may raise anything."""

    reply: Callable[[Question, int], Reply]
    is_batched = False
    count_tokens = staticmethod(estimate_tokens)

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> list[list[Reply]]:
        return [[self.reply(q, q.seed + place) for place in range(q.n)] for q in questions]


def open_agent(spec: str, device="cpu", dtype=torch.float32, timeout=600.0, connections=16) -> Seat:
    """The seat that `spec` describes. timeout (seconds) and connections: see Client. Raises UserError."""
    limits = {"timeout": timeout, "connections": connections}
    if spec.startswith("post+http"):  # one attempt: the service may not be idempotent
        url, _, path = spec.removeprefix("post+").partition("#")
        client = Client(url, tries=1, **limits)
        return Agent(partial(call_function, partial(post, client, path or "response")))
    if is_url(spec):
        return EndpointSeat(spec, **limits)
    if ":" not in spec or Path(spec).exists():
        return open_seat(spec, device, dtype)
    return Agent(partial(call_function, load_object(spec)))


def load_object(spec: str) -> Callable:
    """Imports the function `module:name`, also from the current directory. Raises UserError."""
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


def call_function(function: Callable[..., Any], question: Question, seed: int) -> Reply:
    prompt = question.messages[-1]["content"]
    metadata = {"messages": question.messages, "seed": seed, **asdict(question.generation)}
    value = resolve(function(prompt=prompt, metadata=metadata))
    value = value if isinstance(value, dict) else {"content": value}
    return read_reply(value.get("content"), value.get("usage"), prompt)


def post(client: Client, path: str, prompt: str, metadata: dict) -> dict:
    """A function for `call_function`: takes the text at `path` of the service's JSON reply."""
    value = body = client.request("POST", "", {"prompt": prompt, "metadata": metadata})
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return {"content": value, "usage": body.get("usage")}
