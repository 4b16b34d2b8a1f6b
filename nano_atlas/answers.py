"""Reads finished texts: the final answer, whether two answers are equal, whether a text reveals one, JSON in
prose. All in linear time, because a reply may be a megabyte of anything."""

import json
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from nano_atlas.text import parse_json


def visible(completion: str) -> str:
    """The completion without a reasoning model's leading <think>…</think> block, closed or not."""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def tagged(text: str, tag: str) -> list[str]:
    """The non-empty contents of <tag>…</tag>, each from the nearest opening tag: a text may mention a tag before using it."""
    parts = (part.partition(f"</{tag}>") for part in text.split(f"<{tag}>")[1:])
    return [inside.strip() for inside, closing, _ in parts if closing and inside.strip()]


def extract_answer(completion: str, answer_format: str = "solution") -> str | None:
    """The last <solution> of the visible text, else its last \\boxed{}, else None; in the format
    "last-number" (formats are the keys of protocol.ANSWER_FORMATS) the last number instead of None.
    """
    text = visible(completion)
    solution = next(reversed(tagged(text, "solution")), None)
    answer = _last_boxed(solution or text) or solution
    if answer is None and answer_format == "last-number":
        answer = next(reversed(re.findall(rf"{NUMBER}(?:/\d+)?", plain(text))), None)
    return answer


def _last_boxed(text: str) -> str | None:
    _, opening, rest = re.sub(r"\\boxed\{\s*\}", "", text).rpartition("\\boxed{")
    depth = 1
    for brace in re.finditer("[{}]", rest if opening else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return rest[: brace.start()].strip()
    return None


TYPOGRAPHY = str.maketrans("−–－＋％．，／⁄", "---+%.,//", "$＄€£°\u200b")  # currencies and degrees are units
SAME = [
    (r"\\(?:left|right|displaystyle)(?![a-z])|\\[()\[\]!]|\^(?:\\circ|\{\\circ\})|\\(?=[%\s\d.+-]|$)", ""),
    (r"\{,\}|(?<=\d)(?:\\,|[\xa0\u2009\u202f])(?=\d{3}(?!\d))", ","),
    (r"\\[,;:]|\\q?quad(?![a-z])|~", " "),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac ?(?:\{(-?[\d,]+)\} ?\{([\d,]+)\}|(\d)(\d))", r" \1\3/\2\4"),
    (r"\\(?:text|math|operatorname|mbox)[a-z]* ?\{([^{}]*)\}", r" \1"),
]
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # with thousands separators or without; "3,18" is two numbers
UNSIGNED = rf"(?:{DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}}(?!\w))?"
NUMBER = rf"(?:(?<![\w)\]])[+-])?{UNSIGNED}"  # a sign right behind a word is a minus between two numbers, or a hyphen
RATIO = r"(?:(?<![\w.,])(\d{1,20}) )?(?<![\w.,])(\d{1,20})/0*([1-9]\d{0,19})"
# words beside a number are its unit, but these change its value
NO_UNIT = r"(?i)\b(?:and|or|not|to|plus|minus|times|pi|hundred|thousand|million|billion|dozen)\b|[,;](?!\d)|[<>≤≥≈≠!π]"
# each failed attempt to read JSON takes time proportional to the text, so the text is bounded
DECODER, LONGEST_JSON = json.JSONDecoder(), 20_000
ORDINARY = {"a", "i", "no", "none", "true", "false"}  # answers that are also words of any sentence


def plain(text: str) -> str:
    """The text with LaTeX and typography in one plain spelling: \\dfrac{1}{2} is 1/2, and 1{,}234 is 1,234."""
    text = text.translate(TYPOGRAPHY)
    for pattern, instead in SAME:
        text = re.sub(pattern, instead, text)
    return " ".join(text.split())


def _bare(answer: str) -> str:
    text = plain(answer).lstrip(' *_`"').rstrip(' .,;*_`"')
    return re.sub(r"^\(?([^()]*)\)$|^\{([^{}]*)\}$", r"\1\2", text).strip()


def _number(text: str, is_stated: bool = False) -> Decimal | Fraction | None:
    """The value of a bare text that is a number: -1,234.50, 1e-5, 25%, 2 1/2; is_stated: or states it: "x = 5", "It is 5 m"."""
    if is_stated and not re.search(NO_UNIT, text):
        last = re.split(r"=|:\** |\b(?:is|are) ", text)[-1].strip()
        amount = re.fullmatch(r"([\W\d_]*)(?:(?:[^\W\d_]{2}|[ghlms]\b)[^\d\\=*+]*(?:\^?\{?[23]\}?)?)?", last)
        text = amount[1].strip() if amount else text
    text = text.removesuffix("%").rstrip()
    if ratio := re.fullmatch(rf"([+-]?) ?{RATIO}", re.sub(r",(?=\d{3}\b)", "", text)):
        sign, whole, above, below = ratio.groups()
        return int(sign + "1") * (int(whole or 0) + Fraction(int(above), int(below)))
    return Decimal(re.sub("[, ]", "", text)) if re.fullmatch(rf"(?:[+-] ?)?{UNSIGNED}", text) else None


def answer_key(answer: str) -> Decimal | Fraction | str:
    """Equal for equal answers: the number ("016" = 16, "1,000" = 1000), else the case-folded words."""
    value = _number(text := _bare(answer))
    return re.sub(r"(?<=[^\w ]) | (?=[^\w ])", "", text.casefold()) if value is None else value


def is_correct(answer: str | None, gold: str) -> bool:
    """Whether they are equal, or one is a number that the other states: `18 dollars` is 18, but not `18 euros`."""
    sides = answer or "", gold
    found, right = map(answer_key, sides)
    if isinstance(found, str) != isinstance(right, str):
        found, right = (_number(_bare(side), is_stated=True) for side in sides)
    return found == right


def reveals_answer(teaching: str, gold: str) -> bool:
    """Whether the gold answer is in the teaching: as a number of equal value (even one of the question), or as whole words.

    An answer that is also an ordinary word (`A`) counts only before no other word (`A.`), or after "answer", "option" or "choice".
    """
    text, words = plain(teaching), _bare(gold)
    if (value := _number(words, is_stated=True)) is not None:
        is_whole = not re.search(r"/|\.0*[1-9]", words)  # 16/2 does not reveal 8, but 1/2 reveals 0.5
        ratios = () if is_whole else (ratio[0] for ratio in re.finditer(RATIO, text))
        return any(_number(found) == value for found in {*re.findall(NUMBER, text), *ratios})
    if words.casefold() in ORDINARY:
        named = rf"(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?: is)?:? {words}(?!\w)"
        return re.search(rf"{named}|(?<![\w'’])(?i:{words})(?![\w'’]| \S)", text) is not None
    return re.search(rf"(?<!\w){re.escape(words.casefold())}(?!\w)", text.casefold()) is not None


def last_json(text: str, *keys: str) -> dict[str, Any] | None:
    """The last JSON object with all `keys`, in prose or code fences, in the last LONGEST_JSON visible characters."""
    text, found, start = visible(text)[-LONGEST_JSON:], None, 0
    while (start := text.find("{", start)) >= 0:
        try:
            value, end = DECODER.raw_decode(text, start)
            # parsed again, to refuse what JSON does not allow: NaN, infinity, half a surrogate pair
            found = parse_json(text[start:end]) if all(key in value for key in keys) else found
        except (ValueError, RecursionError):
            start += 1
            continue
        start = end
    return found
