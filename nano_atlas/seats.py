"""A seat is a student or a teacher one can talk to: a checkpoint in this process or on vLLM, or any OpenAI-compatible endpoint.

Whoever asks does not know which it has: `ask` takes questions and gives replies. A seat with a sampler also returns the
exact token ids and log-probabilities of each reply, which is what training needs.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from tqdm import tqdm

from nano_atlas.checkpoint import load_model
from nano_atlas.client import Client, check_choices
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


class Question(NamedTuple):
    """A conversation that is to be continued."""

    messages: Messages
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
        """`question.n` replies to each. Ask as much as possible at once: a sampler has its rows full until the last questions."""
        ...

    def count_tokens(self, text: str) -> int:
        """Length of a text in this seat's tokens."""
        ...


class TokenSeat:
    """A model behind a sampler, in this process or on vLLM servers (`rollout.VllmSampler` has the interface of `Sampler`), and its
    tokenizer."""

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer, *, thinking: bool = False):
        self.sampler, self.tokenizer = sampler, tokenizer
        self.template_options = {"enable_thinking": thinking}  # Qwen3's switch; other templates ignore it

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> list[list[Reply]]:
        requests = [
            Request(
                tuple(self.prompt_ids(messages)),
                SamplingParams(g.max_tokens, g.temperature, g.top_p, self.tokenizer.eos_ids),
                n,
                seed,
            )
            for messages, g, seed, n in questions
        ]
        return [
            [self._reply(rollout) for rollout in group]
            for group in self.sampler.generate(requests, progress=progress)
        ]

    def prompt_ids(self, messages: Messages) -> list[int]:
        return self.tokenizer.chat_ids(messages, add_generation_prompt=True, **self.template_options)

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _reply(self, rollout: Rollout) -> Reply:
        text = self.tokenizer.decode(rollout.completion_ids)
        return Reply(
            text,
            len(rollout.completion_ids),
            rollout.finish_reason == "length",
            rollout,
            len(rollout.prompt_ids),
        )


class EmbeddedSeat(TokenSeat):
    """A model in this process. It samples with whatever weights `model` has at the moment of the call."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, thinking: bool = False, **sampler_options
    ):
        super().__init__(Sampler(model, **sampler_options), tokenizer, thinking=thinking)


class EndpointSeat:
    """A chat endpoint that speaks the OpenAI protocol, such as `vllm serve`; the key comes from OPENAI_API_KEY."""

    def __init__(
        self, url: str, model: str | None = None, *, workers: int = 16, timeout: float = 120.0, tries: int = 4
    ):
        self.client = Client(url, connections=workers, timeout=timeout, tries=tries)
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        models = self.client.request("GET", "/v1/models").get("data") or []
        if not models:
            raise UserError(
                f"{self.client.url}/v1/models lists no model; name one with --student-model or --teacher-model"
            )
        return models[0]["id"]

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> list[list[Reply]]:
        """Each reply is a request of its own: not every server knows `n`, and none counts the tokens of each of n replies."""

        def one(job: tuple[Question, int]) -> Reply:
            (messages, generation, seed, _), place = job
            body = {
                "model": self.model,
                "messages": messages,
                "max_tokens": generation.max_tokens,
                "temperature": generation.temperature,
                "top_p": generation.top_p,
                "seed": (seed + place) % 2**31,
            }
            answer = self.client.request("POST", "/v1/chat/completions", body, check=check_choices(1))
            (choice,) = answer["choices"]
            text, usage = (choice.get("message") or {}).get("content") or "", answer.get("usage") or {}
            is_truncated = choice.get("finish_reason") == "length"
            return Reply(
                text, usage.get("completion_tokens", 0), is_truncated, None, usage.get("prompt_tokens", 0)
            )

        jobs = [(question, place) for question in questions for place in range(question.n)]
        with ThreadPoolExecutor(self.client.connections) as pool:
            replies = iter(
                list(
                    tqdm(
                        pool.map(one, jobs),
                        total=len(jobs),
                        desc=progress,
                        disable=progress is None,
                        leave=False,
                    )
                )
            )
        return [list(islice(replies, question.n)) for question in questions]

    def count_tokens(self, text: str) -> int:
        """An endpoint does not show its tokenizer: about four characters a token."""
        return (len(text) + 3) // 4


def is_url(spec: str) -> bool:
    return spec.startswith(("http://", "https://"))


def open_seat(
    spec: str,
    *,
    model: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> EmbeddedSeat | EndpointSeat:
    """A URL becomes an EndpointSeat (of `model`, or of the first one it lists); anything else is a checkpoint directory.

    Raises UserError for a directory without a checkpoint and for an endpoint that does not answer.
    """
    if is_url(spec):
        return EndpointSeat(spec, model)
    return EmbeddedSeat(load_model(spec, dtype, device), Tokenizer.from_directory(spec))
