"""A seat is a model in a role, such as student or teacher: a checkpoint here or on vLLM, or an OpenAI-compatible endpoint.

All have the same interface. Only a seat with a sampler returns the token ids and log-probabilities that training needs.
"""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch

from nano_atlas.checkpoint import load_model
from nano_atlas.client import Client, ServerLost, is_url
from nano_atlas.errors import UserError, say
from nano_atlas.protocol import Messages
from nano_atlas.sampler import Generation, Request, Rollout, Sampler
from nano_atlas.terminal import Bar
from nano_atlas.text import clean, masked
from nano_atlas.tokenizer import Tokenizer

# request fields that a server may refuse -> the name to use instead (None: omit it); how servers word a refusal
REFUSABLE = {"max_tokens": "max_completion_tokens", "seed": None, "top_p": None, "temperature": None}
REFUSAL = re.compile("(un|not |n.t )support|un(known|recogni|expect)|not (permit|allow)|cannot both", re.I)


class Question(NamedTuple):
    messages: Messages
    generation: Generation
    seed: int
    n: int = 1  # replies


@dataclass
class Reply:
    text: str
    tokens: int  # generated, including the end-of-turn token
    is_truncated: bool  # it reached max_tokens
    rollout: Rollout | None = None  # exact ids and log-probs (None from an endpoint)
    prompt_tokens: int = 0  # 0: unknown


class Fault(UserError):
    """The error of one call, returned instead of its replies; a script that needs them raises it."""


Answers = list[list[Reply] | Fault]  # one for each question


def read_reply(content: Any, usage: Any, prompt: str, is_truncated: bool = False) -> Reply:
    """A Reply from a text, or joined parts of type "text"; token counts from `usage`, else estimated. Raises UserError."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, dict):
            part = part.get("text") if part.get("type", "text") in ("text", "output_text") else ""
        if not isinstance(part, str):
            raise UserError(f"returned {type(part).__name__} instead of a text")
        texts.append(part)
    text, usage = clean("".join(texts)), usage if isinstance(usage, dict) else {}
    counts = (usage.get("completion_tokens"), text), (usage.get("prompt_tokens"), prompt)
    is_count = lambda number: type(number) is int and 0 < number < 2**53  # exact as a float
    written, read = (number if is_count(number) else estimate_tokens(said) for number, said in counts)
    return Reply(text, written, is_truncated, None, read)


def in_groups(replies: Iterable[Reply | Fault], questions: Sequence[Question]) -> Answers:
    """A flat sequence of replies, grouped by question. A Fault among a question's replies replaces all of them."""
    replies = iter(replies)
    groups = [list(islice(replies, question.n)) for question in questions]
    return [next((reply for reply in group if isinstance(reply, Fault)), group) for group in groups]


def estimate_tokens(text: str) -> int:
    """For an unknown tokenizer: about four characters per token."""
    return (len(text) + 3) // 4


class Seat(Protocol):
    def ask(self, questions: Sequence[Question], progress: str | None = None) -> Answers:
        """`question.n` replies to each, or a Fault. Many questions at once are faster: they fill the sampler's rows."""

    def count_tokens(self, text: str) -> int:
        """Length of a text in this seat's tokens."""


class TokenSeat:
    """A model behind a sampler (`Sampler` or `VllmSampler`). The tokenizer's config may hold Qwen3's "enable_thinking"."""

    is_batched = True  # ask many questions at once

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer):
        self.sampler, self.tokenizer = sampler, tokenizer
        self.template_options = {"enable_thinking": tokenizer.config.get("enable_thinking", False)}

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> Answers:
        ends = self.tokenizer.eos_ids
        try:
            requests = [Request(tuple(self.prompt_ids(m)), g, n, seed, ends) for m, g, seed, n in questions]
            rollouts = self.sampler.generate(requests, progress=progress)
        except ServerLost:
            raise
        except UserError as error:  # a prompt may be too long: halve the batch to find it
            if len(questions) <= 1:
                return [Fault(str(error)) for _ in questions]
            half = len(questions) // 2
            return self.ask(questions[:half], progress) + self.ask(questions[half:], progress)
        return [[self._reply(rollout) for rollout in group] for group in rollouts]

    def prompt_ids(self, messages: Messages) -> list[int]:
        return self.tokenizer.chat_ids(messages, add_generation_prompt=True, **self.template_options)

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def _reply(self, rollout: Rollout) -> Reply:
        ids, is_truncated = rollout.completion_ids, rollout.finish_reason == "length"
        # a template may end the prompt with <think>; the reply's text must contain it
        asked = self.tokenizer.decode(rollout.prompt_ids[-16:], skip_special=False).rstrip()
        text = "<think>" * asked.endswith("<think>") + self.tokenizer.decode(ids)
        return Reply(text, len(ids), is_truncated, rollout, len(rollout.prompt_ids))


class EndpointSeat:
    """An endpoint with OpenAI's chat protocol, such as `vllm serve`.

    url: the base, or .../chat/completions; without a path /v1 is added. model: default is URL#MODEL, else the first listed.
    """

    count_tokens = staticmethod(estimate_tokens)

    def __init__(self, url: str, model: str | None = None, **limits):
        url, _, named = url.partition("#")
        base, mark, query = url.partition("?")
        base = base.rstrip("/")
        base = base + "/v1" if base.count("/") == 2 else base.removesuffix("/chat/completions")
        self.client = Client(base + mark + query, **limits)
        self.model = model or named or self._first_model()
        self.changes: dict[str, str | None] = {}  # fields that this server refused -> new name, or None

    def _first_model(self) -> str:
        listed = self.client.request("GET", "/models").get("data")
        for entry in listed if isinstance(listed, list) else ():
            if isinstance(entry, dict) and entry.get("id") and isinstance(entry["id"], str):
                return entry["id"]
        raise UserError(masked(f"{self.client.url} lists no model; name one: URL#MODEL"))

    def complete(self, messages, generation: Generation, seed: int, **more) -> tuple[dict, Reply]:
        """The server's choice, raw and as a Reply. Fields that it refuses are renamed or omitted from then on."""
        body = {"model": self.model, "messages": messages, "seed": seed % 2**31, **asdict(generation), **more}
        sent = {self.changes.get(name, name): value for name, value in body.items()}
        sent.pop(None, None)
        try:
            answer = self.client.request("POST", "/chat/completions", sent, choices=1)
        except UserError as error:
            refused = [name for name in REFUSABLE if name in sent and re.search(rf"\b{name}\b", str(error))]
            if not refused or not REFUSAL.search(str(error)):
                raise
            self.changes[refused[0]] = REFUSABLE[refused[0]]
            say(f"{masked(self.client.url)} refuses a field of the request; from now on: {self.changes}")
            return self.complete(messages, generation, seed, **more)
        (choice,) = answer["choices"]
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            raise UserError(masked(f"{self.client.url}: the reply has no message: {choice}")[:300])
        text = choice["message"].get("content")  # null with tool calls, or if reasoning used all tokens
        prompt = "".join(str(said.get("content") or "") for said in messages)
        is_truncated = choice.get("finish_reason") == "length"
        return choice, read_reply("" if text is None else text, answer.get("usage"), prompt, is_truncated)

    def ask(self, questions: Sequence[Question], progress: str | None = None) -> Answers:
        """One request per reply, because not every server supports `n`. After `connections` lost calls in a row, no more."""
        asked = [(q.messages, q.generation, q.seed + place) for q in questions for place in range(q.n)]
        lost: list[ServerLost] = []

        def answer(call: tuple) -> Reply | Fault:
            try:
                if len(seen := lost[:]) >= self.client.connections:
                    raise seen[-1]
                reply = self.complete(*call)[1]
                lost.clear()
                return reply
            except UserError as error:
                lost.extend([error] if isinstance(error, ServerLost) else [])
                return Fault(str(error))

        with ThreadPoolExecutor(self.client.connections) as pool:
            answers = Bar(pool.map(answer, asked), progress, len(asked), disable=not progress, leave=False)
            return in_groups(answers, questions)


def open_seat(spec: str, device="cpu", dtype=torch.float32, **options) -> TokenSeat | EndpointSeat:
    """An EndpointSeat for URL or URL#MODEL, else a TokenSeat for a checkpoint; options: for Sampler. Raises UserError."""
    if is_url(spec):
        return EndpointSeat(spec)
    sampler = Sampler(load_model(spec, dtype, device), **options)
    return TokenSeat(sampler, Tokenizer.from_directory(spec))
