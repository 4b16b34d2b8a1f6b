"""What enters from outside, from files and from models: text that can be written again, and JSON of finite numbers."""

import json
import math
import re
from typing import Any

HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of a surrogate, which may lack its other half


def clean(text: str) -> str:
    """Half a surrogate pair, which no file can hold as UTF-8, becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_json(text: str | bytes) -> Any:
    """As `json.loads`, with `clean` texts. Raises ValueError and nothing else: for what is no JSON or no UTF-8, for NaN, infinity and
    integers of thousands of digits, and for what is nested too deeply.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")  # with a byte order mark or without
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if HALF_PAIR.search(text):
            value = json.loads(clean(json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def number(value: Any) -> float:
    """A finite number as JSON has it, or written as text there. Raises ValueError."""
    if type(value) not in (int, float, str):
        raise ValueError(f"a {type(value).__name__} is no number")
    return _finite(str(value))


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number
