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

from nano_atlas.benches.arms import CONTROLS, STUDENT
from nano_atlas.benches.scores import points
from nano_atlas.config import run_script
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json


@dataclass(frozen=True)
class Claim:
    text: str
    published: str
    source: str  # where it stands, and what was found about it
    benches: tuple[str, ...]
    measure: str  # a key of MEASURES


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f} %"


def _accuracy(score: dict) -> str:
    spread = ""
    if score["interval"]:
        spread = " [{:.1f}, {:.1f}]".format(*(100 * bound for bound in score["interval"]))
    elif score["error"] is not None:
        spread = f" ± {100 * score['error']:.1f}"
    return f"{100 * score['accuracy']:.1f}{spread} %"


def _tokens(alone: dict, arm: dict) -> str:
    names = "student_tokens", "all_tokens"
    student, everyone = (100 * (arm[name] / max(alone["student_tokens"], 1) - 1) for name in names)
    return f"student {student:+.1f} %, with probe and teacher {everyone:+.1f} %"


def _non_degradation(alone: dict, arm: dict) -> str:
    of_all, of_right = (arm["versus_student"][f"non_degradation{of}"] for of in ("", "_correct"))
    return f"{_percent(of_all)} of all tasks, {_percent(of_right)} of those right alone"


MEASURES: dict[str, Callable[[dict, dict], str]] = {  # of the student alone and the arm in question
    "gain": lambda alone, arm: points(arm["versus_student"]) + " points",
    "accuracy": lambda alone, arm: f"{_accuracy(arm)}, alone {_accuracy(alone)}",
    "completion": lambda alone, arm: f"{_percent(arm['completion'])}, alone {_percent(alone['completion'])}",
    "non-degradation": _non_degradation,
    "tokens": _tokens,
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
    lines = [
        "| claim | published | where it comes from | measured here | n | controls, the same measure | file |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {path: read_json(path) for path in files}
    for path, results in found.items():
        if not {"run", "scores"} <= results.keys():
            raise UserError(f"{path}: not a results.json of eval.py")
    for claim in CLAIMS:
        rows = [row for path, results in found.items() for row in _measured(claim, path, results)]
        for row in rows or [("not measured", "", "", "")]:
            lines.append(f"| {' | '.join((claim.text, claim.published, claim.source, *row))} |")
    return "\n".join(lines)


def _measured(claim: Claim, path: Path, results: dict) -> list[tuple[str, str, str, str]]:
    """Per domain, of the last teacher, the one that the controls are made of: value, number of tasks, controls, file."""
    measure, rows = MEASURES[claim.measure], []
    if results["run"]["config"]["bench"] not in claim.benches:
        return []
    for domain in dict.fromkeys(score["domain"] for score in results["scores"]):
        scores = {score["arm"]: score for score in results["scores"] if score["domain"] == domain}
        taught = [arm for arm in scores if arm not in (STUDENT, *CONTROLS)]
        if STUDENT in scores and taught:
            alone, last = scores[STUDENT], taught[-1]
            controls = [f"{name}: {measure(alone, scores[name])}" for name in CONTROLS if name in scores]
            value = f"{domain}, {last}: {measure(alone, scores[last])}"
            rows.append((value, str(scores[last]["tasks"]), "; ".join(controls) or "none", str(path)))
    return rows


def main() -> None:
    print(claims_table(list(map(Path, sys.argv[1:]))))


if __name__ == "__main__":
    run_script(main)
