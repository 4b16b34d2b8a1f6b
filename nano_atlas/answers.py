"""Reading finished texts back: the final answer, whether two answers are equal, whether a text gives one away, and JSON in prose."""

import json
import re
from decimal import Decimal
from typing import Any


def visible(completion: str) -> str:
    """The completion without a reasoning model's leading <think>…</think> block, and without one that never closes."""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def extract_answer(completion: str, answer_format: str = "solution") -> str | None:
    """The last <solution> of the visible text, else its last \\boxed{}, else None. Loose numbers are not guessed from, unless the
    format (a key of protocol.ANSWER_FORMATS) is "last-number": then the last one is the answer where there is neither.
    """
    text = visible(completion)
    # from the nearest opening tag, because a text may speak of the tag before it uses it
    solutions = re.findall(r"<solution>((?:(?!<solution>).)*?)</solution>", text, re.DOTALL)
    boxed = _last_boxed(solutions[-1] if solutions else text)
    answer = solutions[-1] if solutions and boxed is None else boxed
    if answer is None and answer_format == "last-number":
        answer = next(reversed(numbers_in(text)), None)
    return (answer or "").strip() or None


def _last_boxed(text: str) -> str | None:
    _, opening, rest = text.rpartition("\\boxed{")
    depth = 1
    for index, character in enumerate(rest if opening else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:index]
    return None


DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # with thousands separators or without; "3,18" is two numbers


def numbers_in(text: str) -> list[str]:
    # a sign right behind a word is a minus between two numbers, or a hyphen
    return re.findall(rf"(?:(?<![\w)\]])[+-])?(?:{DIGITS}(?:\.\d+)?|\.\d+)", text)


def _number(text: str) -> Decimal | None:
    plain = text.strip().strip("$").removesuffix(".").removesuffix("%").strip()
    return Decimal(plain.replace(",", "")) if re.fullmatch(rf"[+-]?({DIGITS}(\.\d*)?|\.\d+)", plain) else None


def answer_key(answer: str) -> Decimal | tuple[str, ...]:
    """What two equal answers have in common: the number ("016" = 16, "1,000" = 1000), else the case-folded words."""
    value = _number(answer)
    return tuple(answer.casefold().strip(" .").split()) if value is None else value


def is_correct(answer: str | None, gold: str) -> bool:
    return answer is not None and answer_key(answer) == answer_key(gold)


def reveals_answer(teaching: str, gold: str) -> bool:
    """Whether the gold answer stands anywhere in the teaching: as a number of equal value, or as whole words.

    Deliberately strict: a number of the question that happens to equal the answer counts too.
    """
    value = _number(gold)
    if value is not None:
        return any(_number(found) == value for found in numbers_in(teaching))
    words = re.escape(" ".join(gold.casefold().strip(" .").split()))
    return re.search(rf"(?<!\w){words}(?!\w)", " ".join(teaching.casefold().split())) is not None


def last_json(text: str, *keys: str) -> dict[str, Any] | None:
    """The last JSON object of the visible text that has all `keys`, however deep in prose or code fences it stands."""
    text, decoder, found, start = visible(text), json.JSONDecoder(), None, 0
    while (start := text.find("{", start)) >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start += 1
            continue
        if isinstance(value, dict) and all(key in value for key in keys):
            found = value
        start = end
    return found
