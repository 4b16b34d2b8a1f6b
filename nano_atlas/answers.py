"""Reading finished texts back: the final answer, whether two answers are equal, whether a text gives one away, and JSON in prose.

A reply may be a megabyte of anything: everything here takes time in proportion to its length.
"""

import json
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from nano_atlas.text import parse_json


def visible(completion: str) -> str:
    """The completion without a reasoning model's leading <think>…</think> block, and without one that never closes."""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def tagged(text: str, tag: str) -> list[str]:
    """What stands in <tag>…</tag>, unless it is empty; from the nearest opening tag, as a text may speak of a tag before it uses it."""
    parts = (part.partition(f"</{tag}>") for part in text.split(f"<{tag}>")[1:])
    return [inside.strip() for inside, closing, _ in parts if closing and inside.strip()]


def extract_answer(completion: str, answer_format: str = "solution") -> str | None:
    """The last <solution> of the visible text, else its last \\boxed{}, else None. Loose numbers are not guessed from, unless the
    format (a key of protocol.ANSWER_FORMATS) is "last-number": then the last one is the answer where there is neither.
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
# what makes another answer of a number, where other words beside it are its unit
NO_UNIT = r"(?i)\b(?:and|or|not|to|plus|minus|times|pi|hundred|thousand|million|billion|dozen)\b|[,;](?!\d)|[<>≤≥≈≠!π]"
ORDINARY = {"a", "i", "no", "none", "true", "false"}  # answers that are also words of any sentence


def plain(text: str) -> str:
    """The text with one way to write what LaTeX and typography write in several: \\dfrac{1}{2} is 1/2, and 1{,}234 is 1,234."""
    text = text.translate(TYPOGRAPHY)
    for pattern, instead in SAME:
        text = re.sub(pattern, instead, text)
    return " ".join(text.split())


def _bare(answer: str) -> str:
    text = plain(answer).lstrip(' *`"').rstrip(' .*`"')
    return re.sub(r"^\(?([^()]*)\)$|^\{([^{}]*)\}$", r"\1\2", text).strip()


def _number(text: str) -> Decimal | Fraction | None:
    """The value of a bare text that is a number and nothing else: -1,234.50, 1e-5, 25%, 1/2 or 2 1/2."""
    text = text.removesuffix("%").rstrip()
    if ratio := re.fullmatch(rf"([+-]?) ?{RATIO}", re.sub(r",(?=\d{3}\b)", "", text)):
        sign, whole, above, below = ratio.groups()
        return int(sign + "1") * (int(whole or 0) + Fraction(int(above), int(below)))
    return Decimal(re.sub("[, ]", "", text)) if re.fullmatch(rf"(?:[+-] ?)?{UNSIGNED}", text) else None


def _stated(text: str) -> Decimal | Fraction | None:
    """The number that a bare text is, or that it states: with a unit, behind an equals sign, "is" or a colon."""
    last = "" if re.search(NO_UNIT, text) else re.split(r"=|: |\b(?:is|are) ", text)[-1].strip()
    stated = re.fullmatch(r"([\W\d_]*)(?:[^\W\d_]{2}[^\d\\=*+]*(?:\^?[23])?)?", last)
    return _number(stated[1].strip() if stated else text)


def answer_key(answer: str) -> Decimal | Fraction | str:
    """What two equal answers have in common: the number ("016" = 16, "1,000" = 1000), else the case-folded words."""
    value = _number(text := _bare(answer))
    return re.sub(r"(?<=[^\w ]) | (?=[^\w ])", "", text.casefold()) if value is None else value


def is_correct(answer: str | None, gold: str) -> bool:
    """Whether they are equal, or one is a number that the other states: `18 dollars` is 18, but not `18 euros`."""
    found, right = answer_key(answer or ""), answer_key(gold)
    is_one_number = isinstance(found, str) != isinstance(right, str)
    return found == right or (is_one_number and _stated(_bare(answer or "")) == _stated(_bare(gold)))


def reveals_answer(teaching: str, gold: str) -> bool:
    """Whether the gold answer stands anywhere in the teaching: as a number of equal value, or as whole words.

    Deliberately strict: a number of the question that happens to equal the answer counts too. But an answer that is also a word of any
    sentence (`A`) must stand before no other word, as in `(A)` and `A.`, or behind "answer", "option" or "choice".
    """
    text, words = plain(teaching), _bare(gold)
    if (value := _stated(words)) is not None:
        is_whole = not re.search(r"/|\.0*[1-9]", words)  # 16/2 does not give 8 away, but 1/2 does 0.5
        ratios = () if is_whole else (ratio[0] for ratio in re.finditer(RATIO, text))
        return any(_number(found) == value for found in {*re.findall(NUMBER, text), *ratios})
    if words.casefold() in ORDINARY:
        named = rf"(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?: is)?:? {words}(?!\w)"
        return re.search(rf"{named}|(?<![\w'’])(?i:{words})(?![\w'’]| \S)", text) is not None
    return re.search(rf"(?<!\w){re.escape(words.casefold())}(?!\w)", text.casefold()) is not None


OBJECT = re.compile(r'\{(?=\s*(?:\}|"(?:[^"\\]|\\.)*+"\s*:))', re.DOTALL)  # how one begins


class _Uncounted(str):  # JSONDecodeError counts the lines before an error, which takes longer than finding it
    count = rfind = lambda *_: 0


def last_json(text: str, *keys: str) -> dict[str, Any] | None:
    """The last JSON object of the visible text that has all `keys`, however deep in prose or code fences it stands."""
    text, start, found, closed = _Uncounted(visible(text)), 0, None, []
    whole = lambda digits: int(digits) if len(digits) < 400 else float("inf")
    decoder = json.JSONDecoder(object_hook=lambda value: closed.append(value) or value, parse_int=whole)
    while match := OBJECT.search(text, start):
        start = match.start()
        closed.clear()
        try:
            _, start = decoder.raw_decode(text, start)
            del closed[:-1]  # objects inside an object are a part of it
        except json.JSONDecodeError as error:
            # What has closed before the error counts; what is open has failed. The last string may have been prose.
            opening = str.rfind(text, '"', start, max(start, str.rfind(text, '"', start, error.pos)))
            start = max(start, opening) + 1
        except RecursionError:
            start += 500  # among the many brackets that are open here
        if closed and (having := [value for value in closed if all(key in value for key in keys)]):
            try:
                found = parse_json(json.dumps(having[-1]))
            except (ValueError, RecursionError):
                continue  # it holds NaN or infinity, or is too deep
    return found
