"""A seat is a student or a teacher one can talk to: a checkpoint in this process or on vLLM, or any OpenAI-compatible endpoint.

Whoever asks does not know which it has: `ask` takes questions and gives replies. A seat with a sampler also returns the
exact token ids and log-probabilities of each reply, which is what training needs.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import httpx
import torch
from tqdm import tqdm

from nano_atlas.checkpoint import load_model
from nano_atlas.errors import UserError
from nano_atlas.model import Transformer
from nano_atlas.protocol import Messages
from nano_atlas.sampler import Generation, Request, Rollout, Sampler
from nano_atlas.tokenizer import Tokenizer


class Question(NamedTuple):
    messages: Messages  # a conversation that is to be continued
    generation: Generation
    seed: int
    n: int = 1  # replies


@dataclass
class Reply:
    text: str
    tokens: int  # generated tokens, the end-of-turn token included
    is_truncated: bool  # it ran into max_tokens
    rollout: Rollout | None = None  # exact ids and log-probs (None from an endpoint)
    prompt_tokens: int = 0  # read for this reply, where the seat knows


class Seat(Protocol):
    def ask(self, questions: Sequence[Question], progress: str | None = None) -> list[list[Reply]]:
        """`question.n` replies to each; the more at once the better, because a sampler works on full rows."""

    def count_tokens(self, text: str) -> int:
        """Length of a text in this seat's tokens."""


class TokenSeat:
    """A model behind a sampler (`Sampler`, or `vllm.VllmSampler`, which has its interface) and its tokenizer.

    With `"enable_thinking": true` in its tokenizer_config.json, where --thinking of the trainers puts it, Qwen3 thinks first.
    """

    is_batched = True  # its sampler wants many questions at once

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer):
        self.sampler, self.tokenizer = sampler, tokenizer
        thinking = tokenizer.config.get("enable_thinking", False)
        self.template_options = {"enable_thinking": thinking}  # other templates ignore it

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> list[list[Reply]]:
        ends = self.tokenizer.eos_ids
        requests = [Request(tuple(self.prompt_ids(m)), g, n, seed, ends) for m, g, seed, n in questions]
        rollouts = self.sampler.generate(requests, progress=progress)
        return [[self._reply(rollout) for rollout in group] for group in rollouts]

    def prompt_ids(self, messages: Messages) -> list[int]:
        return self.tokenizer.chat_ids(messages, add_generation_prompt=True, **self.template_options)

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _reply(self, rollout: Rollout) -> Reply:
        ids, is_truncated = rollout.completion_ids, rollout.finish_reason == "length"
        # a template may have opened the thought, and what it wrote is no part of the completion
        asked = self.tokenizer.decode(rollout.prompt_ids[-16:], skip_special=False).rstrip()
        text = "<think>" * asked.endswith("<think>") + self.tokenizer.decode(ids)
        return Reply(text, len(ids), is_truncated, rollout, len(rollout.prompt_ids))


class EmbeddedSeat(TokenSeat):
    """A model in this process. It samples with whatever weights `model` has at the moment of the call."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, **options):
        super().__init__(Sampler(model, **options), tokenizer)


class ServerLost(UserError):
    """The server did not answer, or only with errors of its own, however often it was asked. A restart may fix that."""


class Client:
    """JSON over HTTP to one server, with retries, over kept-alive connections that threads may share.

    url: with or without `/v1` or `/v1/chat/completions`. connections: most requests under way at once. timeout: seconds for an
    answer. tries: attempts per request, the waits doubling from 1 s. The key comes from OPENAI_API_KEY and is never shown.
    """

    def __init__(self, url: str, *, connections: int = 16, timeout: float = 120.0, tries: int = 4):
        self.url = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        self.connections, self.tries = connections, tries
        self._key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # no limit on the wait for a free connection: it says how much there is to do, not how the server is
        patience = httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None)
        is_here = "//127.0.0.1" in url or "//localhost" in url  # no proxy leads back to this machine
        headers = {"Authorization": f"Bearer {self._key}"}
        self._http = httpx.Client(timeout=patience, limits=limits, headers=headers, trust_env=not is_here)

    def close(self) -> None:
        """Ends what is under way, in whichever thread."""
        self._http.close()

    def request(self, method: str, path: str, body=None, choices: int | None = None, **limits) -> dict:
        """The server's JSON answer (`{}` where it is empty). choices: how many it must hold; limits: other tries, timeout.

        Other answers, 429, 5xx and transport errors are tried again, then raise ServerLost; any other status raises UserError.
        """
        patience = limits.get("timeout", httpx.USE_CLIENT_DEFAULT)
        for attempt in range(limits.get("tries", self.tries)):
            if attempt:
                time.sleep(min(2.0 ** (attempt - 1), 20.0))
            try:
                response = self._http.request(method, self.url + path, json=body, timeout=patience)
            except (httpx.RequestError, httpx.InvalidURL) as error:
                cause = f"{type(error).__name__}: {error}"
                is_final = isinstance(error, (httpx.InvalidURL, httpx.UnsupportedProtocol))  # a wrong address
            else:
                answer, cause = _read_answer(response, choices)
                is_final = response.status_code not in (200, 429) and response.status_code < 500
                if cause is None:
                    return answer
            if is_final:
                break
        cause, kind = cause.replace(self._key, "***"), UserError if is_final else ServerLost
        raise kind(f"{self.url}{path} failed ({cause}); check that the server is up and serves this model")


def _read_answer(response: httpx.Response, choices: int | None) -> tuple[dict, str | None]:
    """The answer, and what is wrong with it."""
    shown = response.text[:300]
    if response.status_code != 200:
        return {}, f"HTTP {response.status_code}: {shown}"
    try:
        answer = response.json() if response.content else {}
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        return {}, f"not JSON, or no object: {shown!r}"
    found = answer.get("choices") if isinstance(answer.get("choices"), list) else []
    return answer, None if choices in (None, len(found)) else f"{len(found)} choices, not {choices}: {shown}"


class EndpointSeat:
    """A chat endpoint that speaks the OpenAI protocol, such as `vllm serve`. model: by default the first that it lists."""

    def __init__(self, url: str, model: str | None = None, **limits):
        self.client, self.model = Client(url, **limits), model
        if model is None:
            models = self.client.request("GET", "/v1/models").get("data") or []
            if not models:
                raise UserError(f"{url}/v1/models lists no model; name one after the address: URL#MODEL")
            self.model = models[0]["id"]

    def complete(self, messages, generation: Generation, seed: int, **more) -> tuple[dict, Reply]:
        """One chat completion: the server's choice, and the same as a Reply. more: fields of the request, such as tools."""
        g, body = generation, {"model": self.model, "messages": messages, "seed": seed % 2**31, **more}
        body |= {"max_tokens": g.max_tokens, "temperature": g.temperature, "top_p": g.top_p}
        answer = self.client.request("POST", "/v1/chat/completions", body, choices=1)
        (choice,), usage = answer["choices"], answer.get("usage") or {}
        text = (choice.get("message") or {}).get("content") or ""
        read, written = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        return choice, Reply(text, written, choice.get("finish_reason") == "length", None, read)

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> list[list[Reply]]:
        """Each reply is a request of its own: not every server knows `n`, and none counts the tokens of each of n replies."""
        asked = [(q.messages, q.generation, q.seed + place) for q in questions for place in range(q.n)]
        with ThreadPoolExecutor(self.client.connections) as pool:
            answers = pool.map(lambda call: self.complete(*call)[1], asked)
            replies = iter(list(tqdm(answers, progress, len(asked), disable=not progress, leave=False)))
        return [list(islice(replies, question.n)) for question in questions]

    def count_tokens(self, text: str) -> int:
        """An endpoint does not show its tokenizer: about four characters a token."""
        return (len(text) + 3) // 4


def is_url(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def open_seat(spec: str, device="cpu", dtype=torch.float32, **options) -> EmbeddedSeat | EndpointSeat:
    """`URL` or `URL#model` becomes an EndpointSeat; anything else is a checkpoint directory, for an EmbeddedSeat with `options`.

    Raises UserError for a directory without a checkpoint and for an endpoint that does not answer.
    """
    if is_url(spec):
        url, _, model = spec.partition("#")
        return EndpointSeat(url, model or None)
    return EmbeddedSeat(load_model(spec, dtype, device), Tokenizer.from_directory(spec), **options)
