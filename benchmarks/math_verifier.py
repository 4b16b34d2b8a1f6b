"""Equality by algebra as a verifier, for training, evaluation and runtime: an example to copy.

    pip install "math-verify[antlr4_13_2]"
    python eval.py --preset own --bench gsm8k --data FILE --student DIR --verifier benchmarks.math_verifier:verify

Where answers are numbers or words, `--verifier exact` is enough. Here `x + 1` is `1 + x`.
"""

import logging

from math_verify import parse
from math_verify import verify as is_equal

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every call without its own time limit


def verify(question: str, answer: str | None, text: str, gold: str) -> bool:
    """answer: what was extracted from the whole reply `text`; None: nothing."""
    # boxed, because bare text such as 1/2 is parsed incompletely; its time limits are signals, which threads lack
    sides = [parse(f"\\boxed{{{side}}}", parsing_timeout=None) for side in (gold, answer or "")]
    return answer is not None and is_equal(*sides, timeout_seconds=None)  # the gold answer first
