"""The learning curve of README: accuracy on held-out problems while GRPO trains the nano world's teacher, a thin line per run and their mean.

    for seed in 42 43 44 45 46; do
        python train_sft.py --seed $seed --out runs/nano-$seed/teacher-sft
        python train_grpo.py --seed $seed --teacher runs/nano-$seed/teacher-sft/model --out runs/nano-$seed/teacher-grpo --eval-every 2
    done
    python -m benchmarks.curves runs/nano-4?

Step 0, the SFT teacher, is evaluated here, on the same problems. The SVG has no fixed background and follows the reader's colour scheme.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import train_grpo
from nano_atlas import episode
from nano_atlas.config import parse, run_script
from nano_atlas.data import training_data
from nano_atlas.errors import UserError
from nano_atlas.presets import presets
from nano_atlas.runs import read_jsonl, replace_text
from nano_atlas.schedule import play
from nano_atlas.seats import open_seat

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 150, 18, 48  # margins of the plot
STYLE = """
    text { font: 13px system-ui, sans-serif; fill: #1f2328 }
    .grid { stroke: #d1d9e0 }
    .seed { fill: none; stroke: #f0883e; stroke-width: 1; opacity: .55 }
    .mean { fill: none; stroke: #bc4c00; stroke-width: 3 }
    .alone { fill: none; stroke: #0969da; stroke-width: 2; stroke-dasharray: 6 4 }
    .guided-name { fill: #bc4c00 } .alone-name { fill: #0969da }
    @media (prefers-color-scheme: dark) {
      text { fill: #f0f6fc } .grid { stroke: #3d444d }
      .mean { stroke: #f0883e } .alone { stroke: #4493f8 } .guided-name { fill: #f0883e } .alone-name { fill: #4493f8 }
    }"""

Curve = dict[int, float]  # by step, from 0 to 1


NAMES = "eval/student_accuracy", "eval/baseline_accuracy"


def read_curves(run: Path) -> list[Curve]:
    """Accuracy with teaching, and alone, at each evaluation of a run, and before its first step. Raises UserError where there are none."""
    path = run / "teacher-grpo/metrics.jsonl"
    rows = [{"step": 0, **before_training(run)}, *(row for _, row in read_jsonl(path) if NAMES[0] in row)]
    if len(rows) == 1:
        raise UserError(f"{path} has no {NAMES[0]}; train with --eval-every 2")
    return [{row["step"]: row[name] for row in rows} for name in NAMES]


def before_training(run: Path) -> dict[str, float]:
    """What train_grpo.py would log at step 0."""
    config = parse(
        train_grpo.Config, ["--teacher", str(run / "teacher-sft/model")], presets("train_grpo"), ""
    )
    seats = {"student": open_seat(config.student), "teacher": open_seat(str(config.teacher))}
    (_, held_out), seed = training_data(config), episode.seeds("evaluation")
    sketches = play([episode.sketch(problem, config.greedy(), seed) for problem in held_out], seats)
    return train_grpo.evaluate(config, seats, sketches)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Over the runs that have a step; all runs of a figure should have the same steps."""
    steps = sorted({step for curve in curves for step in curve})
    return {step: fmean(curve[step] for curve in curves if step in curve) for step in steps}


def svg(guided: Sequence[Curve], alone: Sequence[Curve]) -> str:
    last = max(step for curve in guided for step in curve)
    x = lambda step: LEFT + step / last * (WIDTH - LEFT - RIGHT)
    y = lambda share: HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
    points = lambda curve: " ".join(f"{x(step):.1f},{y(share):.1f}" for step, share in curve.items())
    line = lambda curve, kind: f'<polyline class="{kind}" points="{points(curve)}"/>'
    label = lambda at, to, text, more="": f'<text x="{at:.1f}" y="{to:.1f}" {more}>{text}</text>'
    middle, right = 'text-anchor="middle"', 'text-anchor="end"'
    bold, base = mean_curve(guided), mean_curve(alone)
    start, end = (list(bold.items())[i] for i in (0, -1))
    shown = f"{100 * start[1]:.0f} % at step {start[0]}, {100 * end[1]:.0f} % at step {end[0]}"
    parts = [
        f"<title>Held-out accuracy with teaching, mean of {len(guided)} seeds: {shown}</title>",
        f"<style>{STYLE}\n  </style>",
    ]
    for percent in range(0, 101, 25):
        parts.append(f'<path class="grid" d="M{LEFT} {y(percent / 100):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(label(LEFT - 8, y(percent / 100) + 4, f"{percent} %", right))
    for step in range(0, last + 1, max(1, last // 4)):
        parts.append(label(x(step), HEIGHT - BOTTOM + 20, step, middle))
    parts.append(label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "GRPO step", middle))
    parts += [line(curve, "seed") for curve in guided] + [line(base, "alone"), line(bold, "mean")]
    at = WIDTH - RIGHT + 10
    parts.append(label(at, y(end[1]) - 2, f"with teaching, {100 * end[1]:.0f} %", 'class="guided-name"'))
    parts.append(label(at, y(end[1]) + 14, f"({len(guided)} seeds, thin)", 'class="guided-name"'))
    alone_now = list(base.values())[-1]
    parts.append(label(at, y(alone_now) + 4, f"alone, {100 * alone_now:.0f} %", 'class="alone-name"'))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">'
    return "\n  ".join([head, *parts]) + "\n</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="directories with teacher-sft and teacher-grpo")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/curve.svg"), help="the SVG (default: docs/curve.svg)"
    )
    given = parser.parse_args()
    guided, alone = zip(*map(read_curves, given.runs))
    replace_text(given.out, svg(guided, alone))
    print(given.out)


if __name__ == "__main__":
    run_script(main)
