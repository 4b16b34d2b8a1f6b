"""A seat is a student or a teacher one can talk to: a checkpoint in this process, or any OpenAI-compatible endpoint.

Whoever asks does not know which it has: `ask` takes conversations and gives replies. The embedded seat also returns the exact
token ids and log-probabilities of each reply, which is what training needs.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import httpx
import torch
from tqdm import tqdm

from nano_atlas.checkpoint import load_model
from nano_atlas.errors import UserError
from nano_atlas.model import Transformer
from nano_atlas.protocol import Messages
from nano_atlas.sampler import Request, Rollout, Sampler, SamplingParams
from nano_atlas.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generation:
    """How to sample a reply."""

    max_tokens: int
    temperature: float = 0.7
    top_p: float = 1.0


@dataclass
class Reply:
    text: str
    tokens: int  # generated tokens, the end-of-turn token included
    is_truncated: bool  # it ran into max_tokens
    rollout: Rollout | None = None  # exact ids and log-probs (embedded seats only)
    prompt_tokens: int = 0  # read for this reply, where the seat knows


class Seat(Protocol):
    def ask(
        self, conversations: Sequence[Messages], generation: Generation, seeds: Sequence[int], n: int = 1, progress: str | None = None
    ) -> list[list[Reply]]:
        """n replies to each conversation; `seeds` has one entry per conversation."""
        ...

    def count_tokens(self, text: str) -> int:
        """Length of a text in this seat's tokens."""
        ...


class EmbeddedSeat:
    """A model in this process. It samples with whatever weights `model` has at the moment of the call."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, thinking: bool = False, **sampler_options):
        self.tokenizer = tokenizer
        self.sampler = Sampler(model, **sampler_options)
        self.template_options = {"enable_thinking": thinking}  # Qwen3's switch; other templates ignore it

    def ask(self, conversations, generation, seeds, n=1, progress=None) -> list[list[Reply]]:
        params = SamplingParams(
            max_tokens=generation.max_tokens,
            temperature=generation.temperature,
            top_p=generation.top_p,
            stop_token_ids=self.tokenizer.eos_ids,
        )
        requests = [
            Request(tuple(self.prompt_ids(messages)), params, n=n, seed=seed)
            for messages, seed in zip(conversations, seeds, strict=True)
        ]
        return [[self._reply(rollout) for rollout in group] for group in self.sampler.generate(requests, progress=progress)]

    def prompt_ids(self, messages: Messages) -> list[int]:
        return self.tokenizer.chat_ids(messages, add_generation_prompt=True, **self.template_options)

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _reply(self, rollout: Rollout) -> Reply:
        text = self.tokenizer.decode(rollout.completion_ids)
        return Reply(text, len(rollout.completion_ids), rollout.finish_reason == "length", rollout, len(rollout.prompt_ids))


class EndpointSeat:
    """A chat endpoint that speaks the OpenAI protocol, such as `vllm serve`; the key comes from OPENAI_API_KEY."""

    def __init__(self, url: str, model: str | None = None, *, workers: int = 16, timeout: float = 120.0, tries: int = 4):
        self.url = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1") + "/v1"
        key = self._key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"
        limits = httpx.Limits(max_connections=workers)
        self.client = httpx.Client(timeout=timeout, limits=limits, headers={"Authorization": f"Bearer {key}"})
        self.workers, self.tries = workers, tries
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        models = self._request("GET", "/models").get("data") or []
        if not models:
            raise UserError(f"{self.url}/models lists no model; name one with --student-model or --teacher-model")
        return models[0]["id"]

    def ask(self, conversations, generation, seeds, n=1, progress=None) -> list[list[Reply]]:
        def one(job: tuple[Messages, int]) -> list[Reply]:
            messages, seed = job
            body = {
                "model": self.model,
                "messages": messages,
                "n": n,
                "max_tokens": generation.max_tokens,
                "temperature": generation.temperature,
                "top_p": generation.top_p,
                "seed": seed % 2**31,
            }
            answer = self._request("POST", "/chat/completions", body)
            usage = answer.get("usage") or {}
            total, read = usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0)
            return [
                Reply(choice["message"].get("content") or "", round(total / n), choice.get("finish_reason") == "length", None, read)
                for choice in answer["choices"]
            ]

        jobs = list(zip(conversations, seeds, strict=True))
        with ThreadPoolExecutor(self.workers) as pool:
            return list(tqdm(pool.map(one, jobs), total=len(jobs), desc=progress, disable=progress is None, leave=False))

    def count_tokens(self, text: str) -> int:
        """An endpoint does not show its tokenizer: about four characters a token."""
        return (len(text) + 3) // 4

    def _request(self, method: str, path: str, body: dict | None = None) -> dict:
        """One call with retries on 429, 5xx and transport errors; raises UserError with the last cause."""
        cause = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(min(2.0**attempt, 20.0) / 2)
            try:
                response = self.client.request(method, self.url + path, json=body)
            except httpx.TransportError as error:
                cause = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 200:
                try:
                    return response.json()
                except ValueError:
                    cause = f"not JSON: {response.text[:200]!r}"
                    continue
            cause = f"HTTP {response.status_code}: {response.text[:200]}"
            if response.status_code != 429 and response.status_code < 500:
                break
        cause = cause.replace(self._key, "***")  # some servers repeat the key that they refuse
        raise UserError(f"{self.url}{path} failed ({cause}); check that the server is up and serves this model")


def is_url(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def open_seat(
    spec: str, *, model: str | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> EmbeddedSeat | EndpointSeat:
    """A URL becomes an EndpointSeat (of `model`, or of the first one it lists); anything else is a checkpoint directory.

    Raises UserError for a directory without a checkpoint and for an endpoint that does not answer.
    """
    if is_url(spec):
        return EndpointSeat(spec, model)
    return EmbeddedSeat(load_model(spec, dtype, device), Tokenizer.from_directory(spec))
