"""Agents of other people in the seats: a Python function, an HTTP service, a chat model with tools. Faults in them stay theirs.

    DIRECTORY                        a checkpoint
    http://host:port#model           an OpenAI-compatible server
    module:tools@http://host:port    the same, whose model may call the Python functions in a list
    post+http://host/path#a.b        any HTTP service: POST {"prompt", "metadata"}, reply text at a.b of the JSON that comes back
    module:function                  function(prompt=..., metadata=...), plain, async or a generator of pieces

A function returns a text, or a dict {"content": text, "usage": {"prompt_tokens", "completion_tokens"}}. `metadata` holds the
messages, the seed and the sampling options. Each call has a thread of its own, so it works under a running event loop too.
"""

import asyncio
import functools
import importlib
import inspect
import json
import sys
import typing
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nano_atlas.errors import UserError
from nano_atlas.seats import Client, EndpointSeat, Question, Reply, Seat, is_url, open_seat

TOOL_ROUNDS = 16  # requests per answer; an agent that still wants tools after them has failed
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


def load_object(spec: str) -> Any:
    """What `module:name` names, modules in the current directory included. Raises UserError."""
    module, _, name = spec.partition(":")
    try:
        if "" not in sys.path:
            sys.path.insert(0, "")
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{spec}: {error}; it should be MODULE:NAME of something importable") from None


def resolve(value: Any) -> Any:
    """The result of a function that may be plain, async, or a generator of either kind; also under a running event loop."""

    async def finish(started: Any) -> Any:
        return [piece async for piece in started] if inspect.isasyncgen(started) else await started

    if inspect.isasyncgen(value) or inspect.isawaitable(value):
        with ThreadPoolExecutor(1) as pool:
            value = pool.submit(asyncio.run, finish(value)).result()
    if inspect.isgenerator(value):
        value = list(value)
    is_pieces = isinstance(value, list) and all(isinstance(piece, str) for piece in value)
    return "".join(value) if is_pieces else value


class PythonAgent:
    """A seat in which a function answers, one conversation at a time. It may raise anything."""

    is_batched = False

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> list[list[Reply]]:
        return [[self.reply(q, q.seed + place) for place in range(q.n)] for q in questions]

    def reply(self, question: Question, seed: int) -> Reply:
        prompt = question.messages[-1]["content"]
        metadata = {"messages": question.messages, "seed": seed, **asdict(question.generation)}
        value = resolve(self.function(prompt=prompt, metadata=metadata))
        value = value if isinstance(value, dict) else {"content": value}
        content, usage = value.get("content"), value.get("usage") or {}
        if not isinstance(content, str):
            raise TypeError(f"returned {type(content).__name__} instead of a text")
        written = int(usage.get("completion_tokens") or self.count_tokens(content))
        return Reply(
            content, written, False, None, int(usage.get("prompt_tokens") or self.count_tokens(prompt))
        )

    def count_tokens(self, text: str) -> int:
        """About four characters a token."""
        return (len(text) + 3) // 4


class ToolAgent(PythonAgent):
    """A chat model at an endpoint that may call Python functions before it answers."""

    def __init__(self, endpoint: EndpointSeat, tools: Sequence[Callable[..., Any]]):
        self.endpoint = endpoint
        self.functions = {tool.__name__: tool for tool in tools}
        self.schemas = [tool_schema(tool) for tool in tools]

    def reply(self, question: Question, seed: int) -> Reply:
        messages, read, written = list(question.messages), 0, 0
        for _ in range(TOOL_ROUNDS):
            choice, reply = self.endpoint.complete(messages, question.generation, seed, tools=self.schemas)
            read, written = read + reply.prompt_tokens, written + reply.tokens
            calls = choice["message"].get("tool_calls")
            if not calls:
                return Reply(reply.text, written, reply.is_truncated, None, read)
            messages.append({"role": "assistant", "content": reply.text, "tool_calls": calls})
            for call in calls:
                result = self._call(call["function"])
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        raise UserError(f"still calls tools after {TOOL_ROUNDS} rounds")

    def _call(self, wanted: dict[str, str]) -> str:
        """What a tool returns, or its complaint, so that the model can correct its call."""
        try:
            value = resolve(self.functions[wanted["name"]](**json.loads(wanted["arguments"] or "{}")))
            return value if isinstance(value, str) else json.dumps(value, default=str)
        except Exception as error:  # of a user's function, on arguments that a model made up
            return f"error: {type(error).__name__}: {error}"


def http_service(url: str, timeout: float = 120.0) -> Callable[..., dict]:
    """The function of an agent behind HTTP. url: its address, and after # where the text is in its JSON (default: response)."""
    url, _, path = url.removeprefix("post+").partition("#")
    client = Client(url, timeout=timeout, tries=1)  # the service may not be idempotent

    def ask(prompt: str, metadata: dict) -> dict:
        value = body = client.request("POST", "", {"prompt": prompt, "metadata": metadata})
        for key in (path or "response").split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        return {"content": value, "usage": body.get("usage")}

    return ask


def tool_schema(function: Callable[..., Any]) -> dict:
    """A Python function as OpenAI's tool: name, docstring, and a JSON type for each annotated parameter."""
    hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters
    properties = {}
    for name in parameters:
        kind = hints.get(name, str)
        properties[name] = {"type": JSON_TYPES.get(typing.get_origin(kind) or kind, "string")}
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    schema = {"type": "object", "properties": properties, "required": required}
    about = {"name": function.__name__, "description": inspect.getdoc(function) or "", "parameters": schema}
    return {"type": "function", "function": about}


def open_agent(spec: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Seat:
    """A seat from any of these kinds of `spec`. Raises UserError for one that cannot be opened."""
    tools, _, url = spec.partition("@")
    if spec.startswith(("post+http://", "post+https://")):
        return PythonAgent(http_service(spec))
    if not is_url(spec) and is_url(url):
        return ToolAgent(open_seat(url), load_object(tools))
    if not is_url(spec) and ":" in spec and not Path(spec).exists():
        function = load_object(spec)
        if not callable(function):
            raise UserError(f"{spec} is a {type(function).__name__}, not a function")
        return PythonAgent(function)
    return open_seat(spec, device, dtype)
