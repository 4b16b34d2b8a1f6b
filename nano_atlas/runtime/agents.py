"""Opens a seat from its description: a checkpoint, a server, an HTTP service or a Python function.

    DIRECTORY                        a checkpoint
    http://host:port#model           an OpenAI-compatible server
    post+http://host/path#a.b        an HTTP service: POST {"prompt", "metadata"}; the reply's text is at a.b of its JSON
    module:function                  function(prompt=, metadata=): plain, async or a generator of text pieces

A function returns a text, or a dict {"content": text, "usage": {"prompt_tokens", "completion_tokens"}}. `metadata`
holds the messages, the seed and the sampling options. An agent runs its own tools. Each call runs in its own thread.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nano_atlas.client import Client, is_url
from nano_atlas.functions import Agent, load_object, resolve
from nano_atlas.seats import EndpointSeat, Question, Reply, Seat, open_seat, read_reply


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
