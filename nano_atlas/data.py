"""JSONL files of problems and of training texts, and batches made of them.

The teacher is trained and evaluated on *problems*. An *example* is a tokenised text with a mask of the
learned tokens. Three kinds of lines become examples, distinguished by their fields:

    {"problem_text", "student_approach", "teacher_diagnosis", "teacher_teaching"}   a demonstration (Arc-ATLAS-Teach-v0)
    {"messages": [{"role", "content"}, ...]}                                        a chat; its assistant turns are learned
    {"prompt", "completion"}                                                        plain texts, or lists of messages

Nothing is truncated: examples that are too long are left out, counted and reported. Every error names file and line.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path

import torch
from torch import Tensor

from nano_atlas import protocol
from nano_atlas.answers import answer_key, extract_answer
from nano_atlas.config import derive_seed
from nano_atlas.errors import UserError, say
from nano_atlas.runs import read_jsonl, refuse
from nano_atlas.text import parse_json
from nano_atlas.tokenizer import Tokenizer

NANO_PROBLEMS = 4096  # independent of --steps, so that a run continued with more steps keeps its problems
HELD_OUT = 0.05  # largest share of the problems kept for evaluation in training
QUESTION_FIELDS = ("problem_text", "question", "problem", "prompt", "input")
ANSWER_FIELDS = ("ground_truth", "answer", "solution")
TRACE_FIELDS = {"question": "task", "answer": "ground_truth", "id": "session_id", "domain": "learning_key"}
SHAPES = {dict: "an object, {...}", list: "a list, [...]"}
STATUSES = ("pending", "approved", "quarantined")  # of a session's review
DEMONSTRATION_FIELDS = ("problem_text", "student_approach", "teacher_diagnosis", "teacher_teaching")


def _text(record: dict, field: str, where: str) -> str:
    value = record.get(field)
    if isinstance(value, str) and value.strip():
        return value
    found = f"a {type(value).__name__}" if isinstance(value, dict | list) else json.dumps(value)[:60]
    raise UserError(f"{where}: the field {field!r} must be a non-empty text, not {found}")


def present(record: dict) -> dict:
    """The record without fields that are null or an empty text."""
    return {field: value for field, value in record.items() if value not in (None, "")}


def section(record: dict, name: str, where: str, kind=dict):
    """An object or list in a record, or its JSON as text (databases); empty if absent. Raises UserError."""
    value = record.get(name) or kind()
    try:
        value = parse_json(value) if isinstance(value, str) else value
        return present(value) if kind is dict else list.copy(value)
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{where}: the field {name!r} must hold {SHAPES[kind]}") from None


@dataclass(frozen=True)
class Problem:
    id: str
    question: str
    answer: str | None  # gold; in no prompt, but see protocol.privileged_messages
    domain: str = ""
    solution: str = field(default="", compare=False, repr=False)  # the way to the answer, if the data have it


def load_problems(path: Path | str, *, needs_answer=True, skip_bad=False) -> list[Problem]:
    """Problems of the usual layouts: GSM8K and AIME {question|problem, answer}, Arc's RL file {prompt, ground_truth},
    {problem_text|input, solution}, and session traces of this runtime or of atlas-sdk {task, ...}.

    A problem without `id` is named after its line, `test:17`. Unusable traces are left out and counted.
    Raises UserError for a bad line; with skip_bad the line is left out and reported.
    """
    problems, traced, left_out, bad = {}, set(), Counter(), []
    complain = bad.append if skip_bad else refuse
    for number, record in read_jsonl(path, complain):
        record, where = present(record), f"{path}:{number}"
        try:
            if is_trace(record):
                record, reason = _from_trace(record, where, needs_answer)
                task = str(record["question"]), str(record.get("answer"))
                if reason or task in traced:
                    left_out[reason or "the same task again"] += 1
                    continue
                traced.add(task)
            problem = _problem(record, where, f"{Path(path).stem}:{number}", needs_answer)
        except UserError as error:
            complain(str(error))
            continue
        if problem.id in problems:
            complain(f"{where}: an earlier line also has the id {problem.id!r}; ids must be unique")
        problems.setdefault(problem.id, problem)
    if bad:
        say("\n  ".join([f"left out {len(bad)} malformed lines of {path}:", *bad]))
    if not problems:
        raise UserError(f"{path}: no problem to train on; traces left out: {in_words(left_out)}")
    if left_out:
        say(f"{path}: {len(problems)} problems; traces left out: {in_words(left_out)}")
    return list(problems.values())


def is_trace(record: dict) -> bool:  # of a session, ours or atlas-sdk's
    found = present(record)
    return "task" in found and found.keys().isdisjoint(QUESTION_FIELDS)


def in_words(reasons: Counter) -> str:
    return ", ".join(f"{count} {reason[:80]}" for reason, count in reasons.most_common(12)) or "none"


def teaching_of(trace: dict, where: str) -> dict | str:
    """{"messages"} of a session trace: what the teacher was asked and its reply before the best trial; or why it
    is not learned. Earlier replies had trials of their own, which scored less. Without a stored prompt
    (atlas-sdk) it is made from the plan, and the reply from the last guidance of each step. Raises UserError.
    """
    try:
        events, steps = (section(trace, name, where, list) for name in ("trajectory_events", "steps"))
        replies = [
            e for e in events if {"messages", "text"} <= e.keys() and protocol.parse_teaching(e["text"])
        ]
        if replies:  # each was tried once
            trials = section(steps[0], "metadata", where)["attempt_history"][1:]
            best = max(zip(replies, trials), key=lambda pair: pair[1]["verdict"]["score"] or 0.0)[0]
            messages, text, is_whole = best["messages"], best["text"], not best["is_truncated"]
        else:
            plan = section(section(trace, "plan", where), "steps", where, list) or steps
            numbered = [f"{number}. {step['description']}" for number, step in enumerate(plan, start=1)]
            approach = "\n".join(numbered) if len(plan) != 1 else plan[0]["description"]  # as in our lanes
            style = section(trace, "outcome", where).get("strategy", "adaptive")
            given = [section(step, "guidance", where, list) for step in steps]
            messages = protocol.teacher_messages(trace["task"], approach, style)
            text = protocol.teacher_target(None, "\n".join(texts[-1] or "" for texts in given if texts))
            is_whole = protocol.parse_teaching(text)
        chat = {"messages": [*messages, {"role": "assistant", "content": text}]}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a trace of this version ({error!r:.80}); remove the line") from None
    return chat if is_whole else "no complete teaching"


def _from_trace(trace: dict, where: str, needs_answer: bool) -> tuple[dict, str | None]:
    """(a problem's record, why it is left out or None). atlas-sdk stores the ground truth in the metadata."""
    merged = section(trace, "session_metadata", where) | trace
    record = {field: merged[key] for field, key in TRACE_FIELDS.items() if key in merged}
    for what, key, good in (("session", "status", "succeeded"), ("review", "review_status", "approved")):
        if merged.get(key, good) != good and not (what == "review" and "is_exported" in trace):
            remedy = ": --export it, after --approve or with --review-status" if what == "review" else ""
            return record, f"{what} {str(merged[key])[:40]}{remedy}"
    return record, "no ground truth" if needs_answer and "answer" not in record else None


def _problem(record: dict, where: str, name: str, needs_answer: bool) -> Problem:
    question = next(filter(record.__contains__, QUESTION_FIELDS), None)
    if question is None:
        raise UserError(f"{where}: no question; one of the fields {', '.join(QUESTION_FIELDS)} must hold it")
    field = next(filter(record.__contains__, ANSWER_FIELDS), None)
    if field is None and needs_answer:
        raise UserError(f"{where}: no gold answer; one of the fields {', '.join(ANSWER_FIELDS)} must hold it")
    answer = None if field is None else _gold_answer(record, field, where)
    name, domain = record.get("id", name), record.get("domain", "")
    solution = record.get("solution", record.get(field, ""))
    return Problem(str(name), _text(record, question, where), answer, str(domain), str(solution))


def _gold_answer(record: dict, field: str, where: str) -> str:
    """A number as text; from a text GSM8K's last line `#### 18`, else inside `<solution>` or `\\boxed{}`, else all of it."""
    if type(record[field]) in (int, float):
        return f"{Decimal(str(record[field])):f}"  # not 1e-05
    text = _text(record, field, where)
    before, _, answer = text.rstrip().rpartition("####")  # may also be a Markdown heading
    if isinstance(answer_key(answer), str):
        is_last_line = before[-1:] in ("", "\n") and "\n" not in answer
        answer = extract_answer(text) or (answer if is_last_line else text)
    if not answer.strip():
        raise UserError(f"{where}: the field {field!r} has no answer after its last ####")
    return answer.strip()


def training_data(config) -> tuple[list[Problem], list[Problem]]:  # training, held out; for train_grpo.py
    if config.problems is None:
        from nano_atlas import world

        held_out = world.held_out("math", config.eval_problems, "validation")
        return world.training_problems(NANO_PROBLEMS, config.seed), held_out
    problems = load_problems(config.problems, needs_answer=config.verifier == "exact")
    order = random.Random(derive_seed(config.seed, "held out")).sample(problems, len(problems))
    count = min(round(HELD_OUT * len(problems)), config.eval_problems)
    return order[count:], order[:count]


def problems_of_step(problems: Sequence[Problem], step: int, per_step: int, seed: int) -> list[Problem]:
    """The problems of a training step: each problem once per epoch, in an order that depends on (seed, epoch)."""
    chosen = []
    for index in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(index, len(problems))
        problem = random.Random(derive_seed(seed, "epoch", epoch)).sample(problems, len(problems))[place]
        chosen.append(replace(problem, id=f"{problem.id}@{epoch}"))
    return chosen


@dataclass(frozen=True)
class Example:
    input_ids: list[int]
    is_target: list[bool]  # learned tokens: the assistant's, with the token that ends its turn


def load_examples(paths, tokenizer, max_length: int, thinking=False, selection=None) -> list[Example]:
    """All examples of at most `max_length` tokens. thinking: Qwen3's option, as in sampling later. selection:
    has `min_reward`, `min_gain` and `review_status`, for session traces; None: there are none. Raises UserError.
    """
    examples = []
    for path in paths:
        made, spelled = [], []
        for number, record in _lines(path, selection):
            made += make_examples(record, tokenizer, f"{path}:{number}", thinking, spelled)
        if spelled:
            what = f"{len(spelled)} lines, from this one on, have control tokens in prompt or completion"
            say(f"{spelled[0]}: {what}; they are learned as plain text. Write lists of messages instead")
        short = [example for example in made if len(example.input_ids) <= max_length]
        examples += short
        if count := len(made) - len(short):
            say(f"left out: {count} examples of {path}: longer than {max_length} tokens")
    if not examples:
        raise UserError(f"no example has at most {max_length} tokens; raise --max-length")
    return examples


def _lines(path: Path, selection) -> Iterable[tuple[int | str, dict]]:
    """The lines of a data file; of session traces (as the first line) the teachings that helped, as chats."""
    if not is_trace(next(read_jsonl(path))[1]):
        return read_jsonl(path)
    from nano_atlas.runtime import options, traces

    names = "min_reward", "min_gain", "review_status"
    return traces.teachings(path, options.Config(**{name: getattr(selection, name) for name in names}))


def make_examples(record: dict, tokenizer, where: str, thinking=False, spelled=None) -> list[Example]:
    """The examples of one line; appends `where` to `spelled` if a plain text contains the text of a control token."""
    prompt, record = [], present(record)  # the assistant turns of the prompt are not learned
    if "messages" in record:
        messages = _messages(record, "messages", where)
    elif "problem_text" in record or "teacher_teaching" in record:
        question, approach, *target = (_text(record, field, where) for field in DEMONSTRATION_FIELDS)
        style = {"style": _text(record, "strategy", where)} if "strategy" in record else {}
        prompt = protocol.teacher_messages(question, approach, **style)
        messages = [{"role": "assistant", "content": protocol.teacher_target(*target)}]
    elif "prompt" in record and "completion" in record:
        read = _text if isinstance(record["prompt"], str) else _messages
        prompt, messages = (read(record, field, where) for field in ("prompt", "completion"))
    else:
        expected = f"{', '.join(DEMONSTRATION_FIELDS)}; or messages; or prompt and completion"
        raise UserError(f"{where}: {', '.join(record)[:200]} make no training example; expected {expected}")
    try:
        if not isinstance(prompt, str):
            return _chat_examples([*prompt, *messages], len(prompt), tokenizer, thinking)
        prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if spelled is not None and any(map(tokenizer.spells_control_token, (prompt, messages))):
        spelled.append(where)
    is_target = [False] * len(prompt_ids) + [True] * (len(ids) + 1)
    return [Example([*prompt_ids, *ids, tokenizer.eos_ids[0]], is_target)]


def _messages(record: dict, field: str, where: str) -> protocol.Messages:
    messages = record[field]
    are_dicts = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    if are_dicts and all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        return messages
    shape = '{"role": "...", "content": "..."} with texts as values'
    raise UserError(f"{where}: {field!r} must be a non-empty list of {shape}")


def _chat_examples(messages, first: int, tokenizer: Tokenizer, thinking: bool) -> list[Example]:
    """Learns the assistant turns from index `first` on, each after exactly the prompt that it would be generated from.

    A turn that continues the previous text (the usual case) extends the last example. If the template
    rewrites earlier turns (Qwen3 drops their reasoning), the turn starts a new example.
    """
    examples: list[Example] = []
    for turn in [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]:
        prompt = tokenizer.chat_ids(messages[:turn], enable_thinking=thinking)
        text = tokenizer.chat_ids(messages[: turn + 1], False, enable_thinking=thinking)
        # A line break that the template adds after the end token is never generated, so it is not learned.
        end = max((i + 1 for i in range(len(prompt), len(text)) if text[i] in tokenizer.eos_ids), default=0)
        if text[: len(prompt)] != prompt or not end:
            fault = "does not continue its own generation prompt with the answer and an end token"
            remedy = "fix it, or use prompt and completion texts"
            raise UserError(f"message {turn}: the chat template {fault}; {remedy}")
        is_target = [False] * len(prompt) + [True] * (end - len(prompt))
        if examples and text[: len(examples[-1].input_ids)] == examples[-1].input_ids:
            earlier = examples.pop().is_target
            is_target[: len(earlier)] = earlier
        examples.append(Example(text[:end], is_target))
    if not examples:
        raise UserError("no assistant message to learn from")
    return examples


@dataclass(frozen=True)
class Batch:
    """Concatenated documents for `Transformer` and `PackedAttention(lengths)`; a document's last token is only a target."""

    input_ids: Tensor  # [N] int64
    lengths: list[int]  # tokens of each document in input_ids; they sum to N
    target_positions: Tensor  # [M] int64, positions in input_ids whose *next* token is learned
    targets: Tensor  # [M] int64, these next tokens


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    is_target = torch.tensor([flag for example in examples for flag in example.is_target[1:]])
    next_ids = torch.tensor([token for example in examples for token in example.input_ids[1:]])
    input_ids = torch.tensor([token for example in examples for token in example.input_ids[:-1]])
    lengths = [len(example.input_ids) - 1 for example in examples]
    positions, targets = is_target.nonzero()[:, 0], next_ids[is_target]
    return Batch(input_ids.to(device), lengths, positions.to(device), targets.to(device))


def count_targets(examples: Iterable[Example]) -> int:
    return sum(sum(example.is_target[1:]) for example in examples)


def pack(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Micro-batches of indices, longest first: rows x longest <= `tokens_per_batch` tokens; a longer document is alone."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_per_batch:
            batches.append([])
        batches[-1].append(index)
    return batches


def steps_per_epoch(lengths: Sequence[int], tokens_per_step: int) -> int:
    return min(len(lengths), math.ceil(sum(lengths) / tokens_per_step))


def shuffle_epoch(lengths, tokens_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of the documents of each optimizer step: each once, in an order that depends on (seed, epoch).

    Steps have equally many documents, `tokens_per_step` tokens on average; grouping by length is only *within* a step.
    """
    order = list(range(len(lengths)))
    random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
    steps = steps_per_epoch(lengths, tokens_per_step)
    cuts = [round(step * len(order) / steps) for step in range(steps + 1)]
    return [order[start:end] for start, end in zip(cuts, cuts[1:])]
