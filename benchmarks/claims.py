"""What was published about ATLAS, beside what was measured here.

    python -m benchmarks.claims runs/*/results.json

The published column is data below, with where each number stands; the measured one comes from result files of eval.py alone, and
says "not measured" where no file has the benchmark. A file of another student, teacher or task set than the publication's is still
shown: the question is whether the *kind* of claim holds where it can be checked, with its interval and its controls.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nano_atlas.benches.results import STUDENT
from nano_atlas.config import run_script
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json
from nano_atlas.stats import in_points

Row = dict[str, Any]  # a Score of results.json, with its Comparison in "versus_student"


@dataclass(frozen=True)
class Claim:
    text: str
    published: str
    source: str  # where it stands, and what was found about it
    benches: tuple[str, ...]
    measure: str  # a key of MEASURES


def _accuracy(score: Row) -> str:
    error = (
        f" [{100 * score['interval'][0]:.1f}, {100 * score['interval'][1]:.1f}]"
        if score["interval"]
        else (f" ± {100 * score['error']:.1f}" if score["error"] is not None else "")
    )
    return f"{100 * score['accuracy']:.1f}{error} %"


MEASURES: dict[str, Callable[[Row, Row], str]] = {  # of the student alone and the arm in question
    "gain": lambda alone, arm: (
        f"{in_points(arm['versus_student']['delta'], arm['versus_student']['interval'])} points"
    ),
    "accuracy": lambda alone, arm: f"{_accuracy(arm)}, alone {_accuracy(alone)}",
    "completion": lambda alone, arm: (
        f"{100 * arm['completion']:.1f} %, alone {100 * alone['completion']:.1f} %"
    ),
    "non-degradation": lambda alone, arm: (
        f"{100 * arm['versus_student']['non_degradation']:.1f} % of all tasks"
        + (
            ""
            if arm["versus_student"]["non_degradation_correct"] is None
            else f", {100 * arm['versus_student']['non_degradation_correct']:.1f} % of those right alone"
        )
    ),
    "tokens": lambda alone, arm: (
        f"student {100 * (arm['student_tokens'] / max(alone['student_tokens'], 1) - 1):+.1f} %, "
        f"with probe and teacher {100 * (arm['all_tokens'] / max(alone['student_tokens'], 1) - 1):+.1f} %"
    ),
}

MATHS = ("nano", "gsm8k", "aime25")
CLAIMS = (
    Claim("average accuracy rises", "+15.73 points", "technical report, table 1: 4B student, 8B teacher, training distribution, n and "
          "interval not given", MATHS, "gain"),
    Claim("more answers are completed", "68.8 -> 100 %", "technical report, table 1; equals 22 of 32; completion is not defined", MATHS,
          "completion"),
    Claim("teaching almost never harms", "97 % not degraded", "technical report, table 1; equals 31 of 32; a teacher that says nothing has "
          "100 %", MATHS, "non-degradation"),
    Claim("the student needs fewer tokens", "-37.2 % (report), -50 % (README)", "technical report, table 1; the same digits are an average "
          "efficiency term 0.372 in an earlier document", MATHS, "tokens"),
    Claim("AIME-25 accuracy", "46 %", "documentation only; no number of samples (46 % is not k/30)", ("aime25",), "accuracy"),
    Claim("τ²-bench success", "4.1 -> 24 %", "Judgment Gap, figure 1a: the 49 mms_issue tasks of telecom, 2/49 and 12/49 in one attempt; "
          "the only public code of it shows the gold actions to the teacher", ("tau2",), "accuracy"),
    Claim("CRM policy violations", "54 % (documentation), 69.2 % (overview)", "Judgment Gap, figure 1b: 69.2 % is recall at 17.5 % "
          "specificity; its accuracy is 30.2 % of 53; 54 % is in no paper", ("crmarena",), "accuracy"),
)  # fmt: skip


def claims_table(files: list[Path]) -> str:
    """Markdown: a row per claim and domain measured. Raises UserError for a file that is no results.json of eval.py."""
    found = []
    for path in files:
        results = read_json(path)
        if not {"run", "scores"} <= results.keys():
            raise UserError(f"{path}: not a results.json of eval.py")
        found.append((path, results))
    lines = [
        "| claim | published | where it comes from | measured here | n | controls, the same measure | file |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        rows = [
            row
            for path, results in found
            if results["run"]["config"]["bench"] in claim.benches
            for row in _measured(claim, path, results)
        ]
        for row in rows or [("not measured", "", "", "")]:
            lines.append(f"| {' | '.join((claim.text, claim.published, claim.source, *row))} |")
    return "\n".join(lines)


def _measured(claim: Claim, path: Path, results: Row) -> list[tuple[str, str, str, str]]:
    measure, config, rows = MEASURES[claim.measure], results["run"]["config"], []
    for domain in dict.fromkeys(score["domain"] for score in results["scores"]):
        scores = {score["arm"]: score for score in results["scores"] if score["domain"] == domain}
        taught = [arm for arm in scores if arm not in (STUDENT, *config["control"])]
        if STUDENT not in scores or not taught:
            continue
        alone, controls = scores[STUDENT], [arm for arm in config["control"] if arm in scores]
        for arm in taught[-1:]:  # the last teacher, the one that the controls are made of
            against = "; ".join(f"{name}: {measure(alone, scores[name])}" for name in controls)
            rows.append(
                (
                    f"{domain}, {arm}: {measure(alone, scores[arm])}",
                    str(scores[arm]["tasks"]),
                    against or "none",
                    str(path),
                )
            )
    return rows


def main() -> None:
    if any(argument.startswith("-") for argument in sys.argv[1:]):
        raise UserError("usage: python -m benchmarks.claims RESULTS.json ...")
    for path in map(Path, sys.argv[1:]):
        if not path.is_file():
            raise UserError(f"{path}: no such file; eval.py writes results.json into its --out")
    print(claims_table([Path(argument) for argument in sys.argv[1:]]))


if __name__ == "__main__":
    run_script(main)
