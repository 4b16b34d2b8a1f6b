"""Data as people bring it: JSONL files of problems and of training texts, and batches made of them.

A *problem* is what the teacher is trained and evaluated on. An *example* is a tokenised text with a mask of the tokens that are
learned. Three kinds of lines become examples, told apart by their fields:

    {"problem_text", "student_approach", "teacher_diagnosis", "teacher_teaching"}   a demonstration (Arc-ATLAS-Teach-v0)
    {"messages": [{"role", "content"}, ...]}                                        a chat; its assistant turns are learned
    {"prompt", "completion"}                                                        texts as they are, or lists of messages

Nothing is ever truncated: an example that is too long is left out, counted and reported. Every error names file and line.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nano_atlas import protocol
from nano_atlas.answers import extract_answer
from nano_atlas.config import derive_seed
from nano_atlas.errors import UserError
from nano_atlas.runs import read_jsonl
from nano_atlas.tokenizer import Tokenizer

QUESTION_FIELDS = ("problem_text", "question", "problem", "prompt", "input")
ANSWER_FIELDS = ("ground_truth", "answer", "solution")
DEMONSTRATION_FIELDS = ("problem_text", "student_approach", "teacher_diagnosis", "teacher_teaching")


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        shown = json.dumps(value)[:60]
        raise UserError(f"{where}: the field {field!r} must be a non-empty text, not {shown}")
    return value


@dataclass(frozen=True)
class Problem:
    id: str
    question: str
    answer: str | None  # gold; never part of a prompt
    domain: str = ""


def load_problems(
    path: Path | str, *, needs_answer: bool = True, bad: list[str] | None = None
) -> list[Problem]:
    """Read problems in any of the usual layouts: GSM8K and AIME {question|problem, answer}, Arc's RL file {prompt,
    ground_truth}, {problem_text|input, solution}, and session traces of this runtime or of atlas-sdk {task, ...}.

    Without an `id` a problem is called after its line, `test:17`. A trace is left out, and how many were is printed, if its
    session failed, is not approved or has no ground truth, or if its task has been there before.

    Raises UserError for a line without question, without answer (unless `needs_answer` is off), or with an id seen before; with a
    list `bad`, the complaint is added to it instead, and the line left out.
    """
    problems: dict[str, Problem] = {}
    left_out: Counter[str] = Counter()
    traced: set[tuple] = set()
    for number, record in read_jsonl(path, bad):
        where, name = f"{path}:{number}", f"{Path(path).stem}:{number}"
        try:
            if "task" in record and not record.keys() & set(QUESTION_FIELDS):
                record, reason = _from_trace(record, name, needs_answer)
                task = record["question"], record["answer"]
                if reason or task in traced:
                    left_out[reason or "the same task again"] += 1
                    continue
                traced.add(task)
            problem = _problem(record, where, name, needs_answer)
            if problem.id in problems:
                raise UserError(f"{where}: an earlier line has the id {problem.id!r} too; ids must differ")
            problems[problem.id] = problem
        except UserError as error:
            if bad is None:
                raise
            bad.append(str(error))
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        if not problems:
            raise UserError(f"{path}: no trace here makes a problem ({reasons})")
        print(f"{path}: {len(problems)} problems; traces left out: {reasons}")
    return list(problems.values())


def _from_trace(trace: dict[str, Any], name: str, needs_answer: bool) -> tuple[dict[str, Any], str | None]:
    """(a problem's record, why it is left out if it is). atlas-sdk keeps a ground truth in the metadata only."""
    metadata = trace.get("session_metadata") or {}
    merged = {key: value for part in (metadata, trace) for key, value in part.items() if value is not None}
    answer = str(merged.get("ground_truth", "")).strip() or None
    reasons = {
        f"session {merged.get('status')}": merged.get("status", "succeeded") != "succeeded",
        f"review {merged.get('review_status')}": merged.get("review_status", "approved") != "approved",
        "no ground truth": needs_answer and answer is None,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    named = {"id": merged.get("session_id", name), "domain": merged.get("learning_key", "")}
    return {"question": trace["task"], "answer": answer, **named}, reason


def _problem(record: dict[str, Any], where: str, name: str, needs_answer: bool) -> Problem:
    question = next((field for field in QUESTION_FIELDS if field in record), None)
    if question is None:
        raise UserError(f"{where}: no question; one of the fields {', '.join(QUESTION_FIELDS)} must hold it")
    field = next((field for field in ANSWER_FIELDS if record.get(field) is not None), None)
    if field is None and needs_answer:
        raise UserError(f"{where}: no gold answer; one of the fields {', '.join(ANSWER_FIELDS)} must hold it")
    answer = None if field is None else _gold_answer(record, field, where)
    name, domain = str(record.get("id", name)), str(record.get("domain", ""))
    return Problem(name, _text(record, question, where), answer, domain)


def _gold_answer(record: dict[str, Any], field: str, where: str) -> str:
    """What follows GSM8K's `####`, the inside of `<solution>` or `\\boxed{}`, or else the whole text; a number as its text."""
    if type(record[field]) in (int, float):
        return str(record[field])
    text = _text(record, field, where)
    answer = text.rpartition("####")[2] if "####" in text else extract_answer(text) or text
    if not answer.strip():
        raise UserError(f"{where}: the field {field!r} ends before its answer")
    return answer.strip()


def problems_of_step(problems: Sequence[Problem], step: int, per_step: int, seed: int) -> list[Problem]:
    """The problems of a training step: every problem once per epoch, in an order given by (seed, epoch)."""
    chosen = []
    for index in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(index, len(problems))
        order = random.Random(derive_seed(seed, "epoch", epoch)).sample(range(len(problems)), len(problems))
        chosen.append(replace(problems[order[place]], id=f"{problems[order[place]].id}@{epoch}"))
    return chosen


@dataclass(frozen=True)
class Example:
    input_ids: list[int]
    is_target: list[bool]  # learned tokens: what the assistant says, with the token that ends its turn


def load_examples(
    paths: Sequence[Path | str], tokenizer: Tokenizer, max_length: int, *, thinking: bool = False
) -> tuple[list[Example], Counter[str]]:
    """Tokenise every line of the files; also count, by reason, the examples left out (longer than `max_length` tokens).

    `thinking` is Qwen3's switch, and must be the one that the model is later sampled with; other templates ignore it.

    Raises UserError for a line of no known kind, with a missing or empty field, or with nothing to learn in it.
    """
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        for number, record in read_jsonl(path):
            for example in make_examples(record, tokenizer, f"{path}:{number}", thinking=thinking):
                if len(example.input_ids) > max_length:
                    left_out[f"{path}: longer than {max_length} tokens"] += 1
                else:
                    examples.append(example)
    if not examples:
        raise UserError(f"no example left to train on: {dict(left_out)}; raise --max-length")
    return examples, left_out


def make_examples(
    record: dict[str, Any], tokenizer: Tokenizer, where: str, *, thinking: bool = False
) -> list[Example]:
    """The example of one line (several if the chat template rewrites earlier turns, see `_chat_examples`)."""
    if "messages" in record:
        messages, first = _messages(record, "messages", where), 0
    elif "problem_text" in record or "teacher_teaching" in record:
        question, approach, *target = (_text(record, field, where) for field in DEMONSTRATION_FIELDS)
        style = {"style": _text(record, "strategy", where)} if "strategy" in record else {}
        prompt = protocol.teacher_messages(question, approach, **style)
        answer = {"role": "assistant", "content": protocol.teacher_target(*target)}
        messages, first = [*prompt, answer], len(prompt)
    elif "prompt" in record and "completion" in record:
        if isinstance(record["prompt"], str):
            prompt_ids = tokenizer.encode(_text(record, "prompt", where))
            completion_ids = tokenizer.encode(_text(record, "completion", where)) + [tokenizer.eos_ids[0]]
            is_target = [False] * len(prompt_ids) + [True] * len(completion_ids)
            return [Example(prompt_ids + completion_ids, is_target)]
        prompt = _messages(record, "prompt", where)
        messages, first = prompt + _messages(record, "completion", where), len(prompt)
    else:
        expected = f"{', '.join(DEMONSTRATION_FIELDS)}; or messages; or prompt and completion"
        raise UserError(f"{where}: {', '.join(record)} make no training example; expected {expected}")
    return _chat_examples(messages, first, tokenizer, where, thinking)


def _messages(record: dict[str, Any], field: str, where: str) -> protocol.Messages:
    messages = record[field]
    are_dicts = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    if not are_dicts or not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        shape = '{"role": "...", "content": "..."} with texts as values'
        raise UserError(f"{where}: {field!r} must be a non-empty list of {shape}")
    return messages


def _chat_examples(
    messages: protocol.Messages, first: int, tokenizer: Tokenizer, where: str, thinking: bool
) -> list[Example]:
    """Learn the assistant turns from index `first` on, each exactly as it would be generated: after the prompt of that turn.

    The mask comes from rendering prefixes, not from searching for markers: what the template writes for `messages[:turn + 1]`
    beyond the generation prompt of `messages[:turn]`, up to the end-of-turn token, is learned. Usually each turn continues the
    text before it, and the whole chat is one example. Where a template rewrites earlier turns (Qwen3 drops their reasoning), a
    turn starts an example of its own.
    """
    turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    if not turns:
        raise UserError(f"{where}: no assistant message to learn from")
    examples: list[Example] = []
    for turn in turns:
        prompt = tokenizer.chat_ids(messages[:turn], enable_thinking=thinking)
        text = tokenizer.chat_ids(messages[: turn + 1], False, enable_thinking=thinking)
        # A template may write a line break after the end of the turn; it is never generated, so it is not learned either.
        ends = [i + 1 for i in range(len(prompt), len(text)) if text[i] in tokenizer.eos_ids]
        if text[: len(prompt)] != prompt or not ends:
            fault = "does not continue its own generation prompt with the answer and an end token"
            remedy = "fix it, or use prompt and completion texts"
            raise UserError(f"{where}: message {turn}: the chat template {fault}; {remedy}")
        continues = examples and text[: len(examples[-1].input_ids)] == examples[-1].input_ids
        known = examples.pop() if continues else Example([], [])
        masked = known.is_target + [False] * (len(prompt) - len(known.is_target))
        examples.append(Example(text[: ends[-1]], masked + [True] * (ends[-1] - len(prompt))))
    return examples


@dataclass(frozen=True)
class Batch:
    """Documents end to end, for `Transformer` and `PackedAttention(lengths)`; a document's last token is a target only."""

    input_ids: Tensor  # [N] int64
    lengths: list[int]  # tokens of each document in input_ids; they sum to N
    target_positions: Tensor  # [M] int64, places in input_ids whose *next* token is learned
    targets: Tensor  # [M] int64, those next tokens


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    is_target = torch.tensor([flag for example in examples for flag in example.is_target[1:]])
    input_ids = torch.tensor([token for example in examples for token in example.input_ids[:-1]])
    next_ids = torch.tensor([token for example in examples for token in example.input_ids[1:]])
    lengths = [len(example.input_ids) - 1 for example in examples]
    positions, targets = is_target.nonzero()[:, 0], next_ids[is_target]
    return Batch(input_ids.to(device), lengths, positions.to(device), targets.to(device))


def count_targets(examples: Iterable[Example]) -> int:
    return sum(sum(example.is_target[1:]) for example in examples)


def pack(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group documents (by index) into micro-batches whose padded view, rows x longest, has at most `tokens_per_batch` tokens.

    Longest first, so that a batch holds documents of similar length and the attention kernel sees little padding. A document
    beyond the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_per_batch:
            batches.append([])
        batches[-1].append(index)
    return batches


def padding_share(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Padded slots / all slots of the attention kernel's views, 0 (none) to 1."""
    slots = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    return 1 - sum(lengths[index] for batch in batches for index in batch) / slots


def steps_per_epoch(lengths: Sequence[int], tokens_per_step: int) -> int:
    return min(len(lengths), math.ceil(sum(lengths) / tokens_per_step))


def shuffle_epoch(
    lengths: Sequence[int], tokens_per_step: int, seed: int, epoch: int, is_shuffled: bool = True
) -> list[list[int]]:
    """The documents (by index) of each optimizer step of an epoch: each once, in an order given by (seed, epoch) or in their own.

    Every epoch has the same number of steps with the same number of documents (give or take one), `tokens_per_step` tokens each
    on average. Documents are grouped by length only *within* a step, so no step sees only short or only long ones.
    """
    order = list(range(len(lengths)))
    if is_shuffled:
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    steps = steps_per_epoch(lengths, tokens_per_step)
    cuts = [round(step * len(order) / steps) for step in range(steps + 1)]
    return [order[start:end] for start, end in zip(cuts, cuts[1:])]
