"""Compares how answers are read here with math-verify and with lm-evaluation-harness's two GSM8K filters.

    python benchmarks/answer_check.py --gsm8k test.jsonl --runs runs/smollm2/eval-gsm8k/tasks.jsonl

Needs `pip install "math-verify[antlr4_13_2]"`. GSM8K's rationales are rewritten so that they end in each of FORMS; a file of --runs
holds a model's own replies. Prints, per form, how many answers each reader calls right, and every kind of disagreement with examples.
"""

import argparse
import json
import logging
import re
from collections import Counter, defaultdict
from pathlib import Path

from math_verify import parse, verify

from nano_atlas.answers import extract_answer, is_correct
from nano_atlas.data import load_problems

FORMS = (
    "#### {}", "<solution>{}</solution>", "<solution>${}</solution>", "<solution>{} dollars</solution>",
    "<solution>The answer is {}.</solution>", "\\boxed{{{}}}", "$\\boxed{{\\${}\\text{{ each}}}}$.", "The answer is {}.",
    "**The answer is $\\frac{{{}}}{{1}}$.**",
    "The answer is {wrong}.", "<solution>{wrong}</solution>",  # wrong by one
)  # fmt: skip
READERS = ("nano_atlas", "math-verify", "flexible", "strict")
FLEXIBLE, STRICT = r"(-?[$0-9.,]{2,})|(-?[0-9]+)", r"#### (\-?[0-9\.\,]+)"


def harness(text: str, gold: str, pattern: str, which: int) -> bool:
    """lm-eval's `gsm8k`: the first (strict) or last (flexible) match; `exact_match` removes the same things on both sides."""
    found = ["".join(groups) for groups in re.findall(pattern, text)] or ["[invalid]"]
    sides = [found[which].strip(), gold]
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        sides = [re.sub(ignored, "", side) for side in sides]
    return sides[0] == sides[1]


def verdicts(text: str, gold: str) -> dict[str, bool]:
    ours = is_correct(extract_answer(text, "last-number"), gold)  # reads the other two formats first
    tagged = text.rpartition("<solution>")[2].partition("</solution>")[
        0
    ]  # a tag that math-verify does not know
    theirs = bool(verify(parse(gold), parse(tagged)))
    return dict(
        zip(READERS, (ours, theirs, harness(text, gold, FLEXIBLE, -1), harness(text, gold, STRICT, 0)))
    )


def replies(gsm8k: list[Path], runs: list[Path]):
    """(form, text, gold) of everything that is compared."""
    for path in gsm8k:
        answers = [json.loads(line)["answer"] for line in path.open()]
        for problem, answer in zip(load_problems(path), answers, strict=True):
            wrong = int(problem.answer.replace(",", "")) + 1
            for form in FORMS:
                ending = form.format(problem.answer, wrong=wrong)
                yield form, answer.rpartition("####")[0] + ending, problem.answer
    for path in runs:
        for record in map(json.loads, path.open()):
            yield str(path), record["attempt"]["text"], record["gold"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gsm8k", type=Path, nargs="*", default=[])
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    logging.disable()
    counts, kinds = defaultdict(Counter), defaultdict(list)
    for form, text, gold in replies(**vars(parser.parse_args())):
        found = verdicts(text, gold)
        counts[form].update(["n", *(reader for reader in READERS if found[reader])])
        for other in READERS[1:3]:
            if found[other] != found["nano_atlas"]:
                kinds[f"`{form}`: {other} says {'right' if found[other] else 'wrong'}"].append(
                    (gold, text[-70:])
                )
    print("| ending | n |", " | ".join(READERS), "|\n|" + "---|" * 6)
    for form, count in counts.items():
        print(f"| `{form}` |", " | ".join(str(count[key]) for key in ("n", *READERS)), "|")
    for kind, examples in kinds.items():
        print(f"- {len(examples)} x {kind}:", *map(repr, examples[:3]), sep="\n    ")


if __name__ == "__main__":
    main()
