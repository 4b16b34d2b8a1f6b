"""Text and JSON from outside (files, models, servers): valid Unicode, finite numbers, no secrets in messages."""

import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

KEYS = "OPENAI_API_KEY", "NANO_ATLAS_API_KEY", "SALESFORCE_PASSWORD", "SALESFORCE_SECURITY_TOKEN"  # variables
USER_OF_URL = re.compile(r"//[^/\s?#\"'<>]*@")
KEY_OF_URL = re.compile(r"(?i)((?:[?&][\w.-]{,40}|\bapi.?)(?:key|token|secret|pass\w*|sig\w*)=)[^&#\s\"']+")
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of a surrogate; its other half may be missing


def clean(text: str) -> str:
    """Replaces half a surrogate pair, which UTF-8 cannot encode, by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def masked(text: str) -> str:
    """Masks secrets: user and password of a URL, its parameters such as api_key, and the values of KEYS."""
    text = KEY_OF_URL.sub(r"\1***", USER_OF_URL.sub("//***@", text))
    for key in (os.environ.get(name, "").strip() for name in KEYS):
        text = text.replace(key, "***") if len(key) >= 4 else text
    return text


def finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def number(value: Any) -> float:
    """A finite number, or a text that is one. Raises ValueError."""
    if type(value) not in (int, float, str):
        raise ValueError(f"a {type(value).__name__} is no number")
    return finite(str(value))


def parse_json(text: str | bytes, read_float: Callable[[str], float] = finite) -> Any:
    """As `json.loads`, with `clean` texts. Raises only ValueError: for invalid JSON or UTF-8, NaN, infinity,
    integers of thousands of digits, and deep nesting. read_float: `float` allows NaN and infinity.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")  # with or without a byte order mark
    try:
        value = json.loads(text, parse_constant=read_float, parse_float=read_float)
        return json.loads(clean(json.dumps(value, ensure_ascii=False))) if HALF_PAIR.search(text) else value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
