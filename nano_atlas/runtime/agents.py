"""Agents of other people in the seats: a Python function, an HTTP service, a chat model with tools. Faults in them stay theirs.

    DIRECTORY                        a checkpoint
    http://host:port                 an OpenAI-compatible server (with `tools`: MODULE:NAME of a list of Python functions)
    post+http://host/path#a.b        any HTTP service: POST {"prompt", "metadata"}, reply text at a.b of the JSON that comes back
    module:function                  function(prompt=..., metadata=...), plain, async or a generator of pieces

A Python function returns a text, or a dict {"content": text, "usage": {"prompt_tokens", "completion_tokens"}}. Each is called from
a thread of its own, so it works under a running event loop too. `metadata` holds the messages, the seed and the sampling options.
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
from nano_atlas.protocol import Messages
from nano_atlas.seats import Client, EndpointSeat, Generation, Question, Reply, Seat, is_url, open_seat

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
    if inspect.isasyncgen(value):

        async def collect(pieces: Any = value) -> list:
            return [piece async for piece in pieces]

        value = collect()
    if inspect.isawaitable(value):

        async def finish(awaited: Any = value) -> Any:
            return await awaited

        with ThreadPoolExecutor(1) as pool:
            value = pool.submit(asyncio.run, finish()).result()
    elif inspect.isgenerator(value):
        value = list(value)
    return (
        "".join(value)
        if isinstance(value, list) and all(isinstance(piece, str) for piece in value)
        else value
    )


class Agent:
    """A seat that answers one conversation at a time, with `reply`."""

    is_batched = False

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> list[list[Reply]]:
        return [
            [self.reply(q.messages, q.generation, q.seed + index) for index in range(q.n)] for q in questions
        ]

    def count_tokens(self, text: str) -> int:
        return (len(text) + 3) // 4

    def reply(self, messages: Messages, generation: Generation, seed: int) -> Reply:
        """May raise anything."""
        raise NotImplementedError

    def _reply(self, content: Any, prompt: str, usage: dict | None = None) -> Reply:
        if not isinstance(content, str):
            raise TypeError(f"returned {type(content).__name__} instead of a text")
        usage = usage or {}
        read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
        count = self.count_tokens
        return Reply(
            content,
            count(content) if written is None else written,
            False,
            None,
            count(prompt) if read is None else read,
        )


class PythonAgent(Agent):
    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def reply(self, messages, generation, seed) -> Reply:
        metadata = {"messages": messages, "seed": seed, **asdict(generation)}
        prompt = messages[-1]["content"]
        value = resolve(self.function(prompt=prompt, metadata=metadata))
        if isinstance(value, dict):
            return self._reply(value.get("content"), prompt, value.get("usage"))
        return self._reply(value, prompt)


class HttpAgent(Agent):
    def __init__(self, url: str, timeout: float = 120.0):
        url, _, path = url.removeprefix("post+").partition("#")
        self.path = path or "response"
        self.client = Client(url, timeout=timeout, tries=1)  # nobody promises that it may be asked twice

    def reply(self, messages, generation, seed) -> Reply:
        prompt = messages[-1]["content"]
        metadata = {"messages": messages, "seed": seed, **asdict(generation)}
        value = body = self.client.request("POST", "", {"prompt": prompt, "metadata": metadata})
        for key in self.path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        return self._reply(value, prompt, body.get("usage"))


class ToolAgent(Agent):
    """A chat model at an endpoint that may call Python functions before it answers."""

    def __init__(self, endpoint: EndpointSeat, tools: Sequence[Callable[..., Any]]):
        self.endpoint = endpoint
        self.functions = {tool.__name__: tool for tool in tools}
        self.tools = [tool_schema(tool) for tool in tools]

    def reply(self, messages, generation, seed) -> Reply:
        messages, read, written = list(messages), 0, 0
        for _ in range(TOOL_ROUNDS):
            body = {
                "model": self.endpoint.model,
                "messages": messages,
                "tools": self.tools,
                "seed": seed % 2**31,
                "max_tokens": generation.max_tokens,
                "temperature": generation.temperature,
                "top_p": generation.top_p,
            }
            answer = self.endpoint.client.request("POST", "/v1/chat/completions", body, choices=1)
            usage, choice = answer.get("usage") or {}, answer["choices"][0]
            read, written = read + usage.get("prompt_tokens", 0), written + usage.get("completion_tokens", 0)
            calls = choice["message"].get("tool_calls")
            if not calls:
                text = choice["message"].get("content") or ""
                return Reply(text, written, choice.get("finish_reason") == "length", None, read)
            messages.append(
                {"role": "assistant", "content": choice["message"].get("content") or "", "tool_calls": calls}
            )
            messages += [
                {"role": "tool", "tool_call_id": call["id"], "content": self._call(call["function"])}
                for call in calls
            ]
        raise UserError(f"still calls tools after {TOOL_ROUNDS} rounds")

    def _call(self, wanted: dict[str, str]) -> str:
        """What a tool returns, or its complaint: the model may mend its call."""
        try:
            value = resolve(self.functions[wanted["name"]](**json.loads(wanted["arguments"] or "{}")))
            return value if isinstance(value, str) else json.dumps(value, default=str)
        except Exception as error:  # of a user's function, on arguments that a model made up
            return f"error: {type(error).__name__}: {error}"


def tool_schema(function: Callable[..., Any]) -> dict:
    """A Python function as OpenAI's tool: name, docstring, and a JSON type for each annotated parameter."""
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters
    properties = {
        name: {
            "type": JSON_TYPES.get(typing.get_origin(hints.get(name, str)) or hints.get(name, str), "string")
        }
        for name in parameters
    }
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    schema = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {
            "name": function.__name__,
            "description": inspect.getdoc(function) or "",
            "parameters": schema,
        },
    }


def open_agent(
    spec: str,
    *,
    model: str | None = None,
    tools: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Seat:
    """A seat from any of the four kinds of `spec`. Raises UserError for one that cannot be opened."""
    if tools is not None and not is_url(spec):
        raise UserError(f"tools {tools} can be given to an OpenAI-compatible URL only, not to {spec}")
    if spec.startswith(("post+http://", "post+https://")):
        return HttpAgent(spec)
    if not is_url(spec) and ":" in spec and not Path(spec).exists():
        function = load_object(spec)
        if not callable(function):
            raise UserError(f"{spec} is a {type(function).__name__}, not a function")
        return PythonAgent(function)
    seat = open_seat(spec, model=model, device=device, dtype=dtype)
    return seat if tools is None else ToolAgent(seat, load_object(tools))
