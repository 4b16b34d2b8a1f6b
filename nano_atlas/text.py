"""What enters from outside, from files and from models: text that can be written again, and JSON of finite numbers."""

import json
import math
import os
import re
from collections.abc import Callable
from typing import Any

KEYS = "OPENAI_API_KEY", "NANO_ATLAS_API_KEY", "SALESFORCE_PASSWORD", "SALESFORCE_SECURITY_TOKEN"  # variables
USER_OF_URL = re.compile(r"//[^/\s?#\"'<>]*@")
KEY_OF_URL = re.compile(r"(?i)((?:[?&][\w.-]{,40}|\bapi.?)(?:key|token|secret|pass\w*|sig\w*)=)[^&#\s\"']+")
HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of a surrogate, which may lack its other half


def clean(text: str) -> str:
    """Half a surrogate pair, which no file can hold as UTF-8, becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def masked(text: str) -> str:
    """Without secrets: user and password of a URL, the values of its parameters such as api_key, and the keys that we have."""
    text = KEY_OF_URL.sub(r"\1***", USER_OF_URL.sub("//***@", text))
    for key in (os.environ.get(name, "").strip() for name in KEYS):
        text = text.replace(key, "***") if len(key) >= 4 else text
    return text


def finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def number(value: Any) -> float:
    """A finite number as JSON has it, or written as text there. Raises ValueError."""
    if type(value) not in (int, float, str):
        raise ValueError(f"a {type(value).__name__} is no number")
    return finite(str(value))


def parse_json(text: str | bytes, read_float: Callable[[str], float] = finite) -> Any:
    """As `json.loads`, with `clean` texts. Raises ValueError and nothing else: for what is no JSON or no UTF-8, for NaN, infinity and
    integers of thousands of digits, and for what is nested too deeply. read_float: `float` where numbers may be anything.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")  # with a byte order mark or without
    try:
        value = json.loads(text, parse_constant=read_float, parse_float=read_float)
        return json.loads(clean(json.dumps(value, ensure_ascii=False))) if HALF_PAIR.search(text) else value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
