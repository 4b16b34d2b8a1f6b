"""Data as people bring it: JSONL files of problems and of training texts, and batches made of them.

A *problem* is what the teacher is trained and evaluated on. An *example* is a tokenised text with a mask of the tokens that are
learned. Three kinds of lines become examples, told apart by their fields:

    {"problem_text", "student_approach", "teacher_diagnosis", "teacher_teaching"}   a demonstration (Arc-ATLAS-Teach-v0)
    {"messages": [{"role", "content"}, ...]}                                        a chat; its assistant turns are learned
    {"prompt", "completion"}                                                        texts as they are, or lists of messages

Nothing is ever truncated: an example that is too long is left out, counted and reported. Every error names file and line.
"""

import functools
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nano_atlas import protocol
from nano_atlas.errors import UserError
from nano_atlas.runs import replacing
from nano_atlas.tokenizer import Tokenizer

QUESTION_FIELDS = ("problem_text", "question", "problem", "prompt", "input")
ANSWER_FIELDS = ("ground_truth", "answer", "solution")
DEMONSTRATION_FIELDS = ("problem_text", "student_approach", "teacher_diagnosis", "teacher_teaching")


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed that depends on all parts, the same on every machine: `derive_seed(config.seed, "rollouts", step)`.

    Randomness that is a function of (seed, step) has no state, so a resumed run needs none restored.
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# ------------------------------------------------------------------------------------------------------------- reading


def read_jsonl(path: Path | str, bad: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each line that is not blank.

    Raises UserError for a file that is missing or empty, and for a line that is not UTF-8, not JSON or not an object; with a list
    `bad`, the complaint about such a line is added to it instead, and the line left out.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    is_empty = True
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.isspace():
                continue
            is_empty = False
            try:
                record = _parse_line(raw, number, f"{path}:{number}")
            except UserError as error:
                if bad is None:
                    raise
                bad.append(str(error))
                continue
            yield number, record
    if is_empty:
        raise UserError(f"{path}: empty; it should have one JSON object per line")


def _parse_line(raw: bytes, number: int, where: str) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); "
            "each line must be one complete JSON object, {...}"
        ) from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, but each line must be an object, {{...}}")
    return record


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one object per line; the file appears under its name only when it is complete."""
    with replacing(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record[field]
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{where}: the field {field!r} must be a non-empty text, not {json.dumps(value)[:60]}"
        )
    return value


# ------------------------------------------------------------------------------------------------------------ problems


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
    ground_truth}, {problem_text|input, solution}. The gold answer is what follows GSM8K's `####`, the inside of `<solution>` or
    `\\boxed{}`, or else the whole text; numbers are taken as their text. Without an `id` a problem is called after its line,
    `test:17`.

    Raises UserError for a line without question, without answer (unless `needs_answer` is off), or with an id seen before; with a
    list `bad`, the complaint is added to it instead, and the line left out.
    """
    problems: dict[str, Problem] = {}
    lines: dict[str, int] = {}
    for number, record in read_jsonl(path, bad):
        where = f"{path}:{number}"
        try:
            problem = _problem(record, where, f"{Path(path).stem}:{number}", needs_answer)
            if problem.id in problems:
                raise UserError(
                    f"{where}: the id {problem.id!r} is that of line {lines[problem.id]} too; ids must differ"
                )
        except UserError as error:
            if bad is None:
                raise
            bad.append(str(error))
            continue
        lines[problem.id] = number
        problems[problem.id] = problem
    return list(problems.values())


def _problem(record: dict[str, Any], where: str, name: str, needs_answer: bool) -> Problem:
    question = next((field for field in QUESTION_FIELDS if field in record), None)
    if question is None:
        raise UserError(f"{where}: no question; one of the fields {', '.join(QUESTION_FIELDS)} must hold it")
    answer = _gold_answer(record, where)
    if answer is None and needs_answer:
        raise UserError(f"{where}: no gold answer; one of the fields {', '.join(ANSWER_FIELDS)} must hold it")
    return Problem(
        str(record.get("id", name)), _text(record, question, where), answer, str(record.get("domain", ""))
    )


def _gold_answer(record: dict[str, Any], where: str) -> str | None:
    field = next((field for field in ANSWER_FIELDS if record.get(field) is not None), None)
    if field is None:
        return None
    if isinstance(record[field], (int, float)) and not isinstance(record[field], bool):
        return str(record[field])
    text = _text(record, field, where)
    answer = text.rpartition("####")[2] if "####" in text else protocol.extract_answer(text) or text
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


# ------------------------------------------------------------------------------------------------------------ examples


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
    render = functools.partial(tokenizer.chat_ids, enable_thinking=thinking)
    if "messages" in record:
        return _chat_examples(_messages(record, "messages", where), 0, render, tokenizer.eos_ids, where)
    if "problem_text" in record or "teacher_teaching" in record:
        missing = [field for field in DEMONSTRATION_FIELDS if field not in record]
        if missing:
            raise UserError(
                f"{where}: a demonstration needs the fields {', '.join(DEMONSTRATION_FIELDS)}; "
                f"missing: {', '.join(missing)}"
            )
        question, approach, diagnosis, teaching = (
            _text(record, field, where) for field in DEMONSTRATION_FIELDS
        )
        style = {"style": _text(record, "strategy", where)} if "strategy" in record else {}
        messages = protocol.teacher_messages(question, approach, **style)
        target = {"role": "assistant", "content": protocol.teacher_target(diagnosis, teaching)}
        return _chat_examples([*messages, target], len(messages), render, tokenizer.eos_ids, where)
    if "prompt" in record and "completion" in record:
        if isinstance(record["prompt"], str):
            prompt = tokenizer.encode(_text(record, "prompt", where))
            completion = tokenizer.encode(_text(record, "completion", where)) + [tokenizer.eos_ids[0]]
            return [Example(prompt + completion, [False] * len(prompt) + [True] * len(completion))]
        messages = _messages(record, "prompt", where)
        completion = _messages(record, "completion", where)
        return _chat_examples(messages + completion, len(messages), render, tokenizer.eos_ids, where)
    raise UserError(
        f"{where}: the fields {', '.join(record)} make no training example; expected "
        f"{', '.join(DEMONSTRATION_FIELDS)}; or messages; or prompt and completion"
    )


def _messages(record: dict[str, Any], field: str, where: str) -> protocol.Messages:
    messages = record[field]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {field!r} must be a non-empty list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise UserError(
                f'{where}: {field!r}[{index}] must be {{"role": "...", "content": "..."}} with texts as values'
            )
    return messages


def _chat_examples(
    messages: protocol.Messages,
    first: int,
    render: Callable[..., list[int]],
    eos_ids: Sequence[int],
    where: str,
) -> list[Example]:
    """Learn the assistant turns from index `first` on, each exactly as it would be generated: after the prompt of that turn.

    The mask comes from rendering prefixes, never from searching for markers: what the template writes for `messages[:turn + 1]`
    beyond the generation prompt of `messages[:turn]`, up to the end-of-turn token, is learned. Usually each turn continues the
    text before it and the whole chat is one example. Some templates rewrite earlier turns (Qwen3 drops their reasoning); such a
    turn starts an example of its own.
    """
    turns = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    if not turns:
        raise UserError(f"{where}: no assistant message to learn from")
    examples: list[Example] = []
    for turn in turns:
        prompt = render(messages[:turn], add_generation_prompt=True)
        text = render(messages[: turn + 1], add_generation_prompt=False)
        if text[: len(prompt)] != prompt:
            raise UserError(
                f"{where}: message {turn}: the chat template does not continue its own generation prompt with "
                "the answer, so there is no telling which tokens to learn; mend it or use prompt/completion texts"
            )
        # A template may write a line break after the end of the turn; it is never generated, so it is not learned either.
        end = next((i + 1 for i in range(len(text) - 1, len(prompt) - 1, -1) if text[i] in eos_ids), None)
        if end is None:
            raise UserError(
                f"{where}: message {turn}: the chat template ends no turn with an end token ({list(eos_ids)})"
            )
        continues = examples and text[: len(examples[-1].input_ids)] == examples[-1].input_ids
        known = examples.pop() if continues else Example([], [])
        masked = known.is_target + [False] * (len(prompt) - len(known.is_target))
        examples.append(Example(text[:end], masked + [True] * (end - len(prompt))))
    return examples


# ------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Documents end to end, for `Transformer` and `PackedAttention(lengths)`; a document's last token is a target only."""

    input_ids: Tensor  # [N] int64
    lengths: list[int]  # tokens of each document in input_ids; they sum to N
    target_positions: Tensor  # [M] int64, places in input_ids whose *next* token is learned
    targets: Tensor  # [M] int64, those next tokens


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    lengths = [len(example.input_ids) - 1 for example in examples]
    is_target = torch.tensor([flag for example in examples for flag in example.is_target[1:]])
    next_ids = torch.tensor([token for example in examples for token in example.input_ids[1:]])
    return Batch(
        input_ids=torch.tensor([token for example in examples for token in example.input_ids[:-1]]).to(
            device
        ),
        lengths=lengths,
        target_positions=is_target.nonzero()[:, 0].to(device),
        targets=next_ids[is_target].to(device),
    )


def count_targets(examples: Iterable[Example]) -> int:
    return sum(sum(example.is_target[1:]) for example in examples)


def pack(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group documents (by index) into micro-batches whose padded view, rows x longest, has at most `tokens_per_batch` tokens.

    Longest first, so that each batch holds documents of similar length and the attention kernel sees little padding. Bounding
    the padded view bounds the real tokens too, and one long document among many short ones cannot blow it up. A document beyond
    the budget is a batch of its own.
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
    """The documents (by index) of each optimizer step of an epoch: each document once, in an order given by (seed, epoch),
    or in their own where `is_shuffled` is off.

    Every epoch has the same number of steps with the same number of documents (give or take one), `tokens_per_step` tokens each
    on average. Documents are grouped by length only *within* a step, so no step sees only short or only long ones.
    """
    order = list(range(len(lengths)))
    if is_shuffled:
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    steps = steps_per_epoch(lengths, tokens_per_step)
    cuts = [round(step * len(order) / steps) for step in range(steps + 1)]
    return [order[start:end] for start, end in zip(cuts, cuts[1:])]
