"""From traces to the next teacher, and whether it may go into service.

One round: `train_grpo.py --problems` continues the teacher in service on the exported traces; then both teachers teach the same held-out
tasks, greedily, on the same sketches. The new one is promoted only if it is *not worse*: the lower end of the 90 % interval of the mean
difference (paired bootstrap, so 95 % on this one side) is above -MARGIN. Otherwise the old one stays. Either way `promotion.json` says
why, and `deploy.yaml` says which teacher is in service.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from nano_atlas import world
from nano_atlas.config import option
from nano_atlas.data import Problem, load_problems
from nano_atlas.episode import EpisodeConfig, seeds, sketch, teach
from nano_atlas.errors import UserError
from nano_atlas.reward import RewardConfig
from nano_atlas.runs import read_json, write_json
from nano_atlas.runtime.deploy import write_deployment
from nano_atlas.runtime.report import summary
from nano_atlas.runtime.review import export_traces
from nano_atlas.runtime.traces import Outcome
from nano_atlas.schedule import play
from nano_atlas.seats import Seat
from nano_atlas.stats import paired_bootstrap

TRAINER = Path(__file__).parents[2] / "train_grpo.py"
HELD_OUT = 500  # nano-world problems that decide, without --held-out
MARGIN = 0.02  # largest loss of accuracy that still counts as not worse


@dataclass(frozen=True)
class PromotionConfig:
    rounds: int = option(
        0, "times to run, export, train, test and promote", group="rounds", resumable=True, at_least=0
    )
    held_out: Path | None = option(
        None, "JSONL of problems that decide about promotion (none: of the nano world)", resumable=True
    )
    train_options: str = option("", "further options of train_grpo.py, as one text", resumable=True)


@dataclass(frozen=True)
class Decision:
    teacher: str  # in service from now on
    is_promoted: bool
    reason: str
    old: float  # guided accuracy on the held-out tasks
    new: float
    alone: float
    interval: Sequence[float]  # 90 %, of new - old


def compare(
    seats: Sequence[Seat], problems: Sequence[Problem], episodes: EpisodeConfig, places: Sequence[str]
) -> Decision:
    """The paired test. seats: the student, the old and the new teacher; places: where the two teachers are."""
    student, *teachers = seats
    greedy, seed = episodes.greedy(), seeds("promotion")
    sketches = play([sketch(problem, greedy, seed) for problem in problems], {"student": student}, "held out")
    scores = []
    for teacher in teachers:
        scripts = [teach(alone, greedy, RewardConfig(), seed, teacher.count_tokens) for alone in sketches]
        taught = play(scripts, {"student": student, "teacher": teacher}, "held out")
        scores.append([episode.guided.score for (episode,) in taught])
    old, new = scores
    differences = [after - before for before, after in zip(old, new)]
    low, high = paired_bootstrap(differences, confidence=0.9)
    is_promoted = low >= -MARGIN
    interval = f"{100 * fmean(differences):+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    verdict = f"{'not worse than' if is_promoted else 'may be worse than the'} -{100 * MARGIN:g} points"
    return Decision(
        teacher=places[is_promoted],
        is_promoted=is_promoted,
        reason=f"new - old = {interval} on {len(problems)} held-out tasks: {verdict}",
        old=fmean(old),
        new=fmean(new),
        alone=fmean(alone.baseline_accuracy for alone in sketches),
        interval=(low, high),
    )


def run_rounds(
    config: Any,
    tasks: Sequence[Problem],
    run: Callable[[Any, Sequence[Problem]], Sequence[Outcome]],
    open_seat: Callable[[Any, str], Seat],
) -> None:
    """Runtime, export, training and promotion, over and over; what is done of a round is not done again.

    config, run(config, tasks), open_seat(config, spec): of runtime_loop.py. Raises UserError where a training fails; the same
    command repeats its round.
    """
    if config.held_out is None:
        problems = world.held_out(config.domain, HELD_OUT, f"promotion/{config.seed}")
    else:
        problems = load_problems(config.held_out)
    if len(tasks) < config.rounds:
        raise UserError(f"--rounds {config.rounds} needs at least as many tasks, not {len(tasks)}")
    cuts = [round(part * len(tasks) / config.rounds) for part in range(config.rounds + 1)]
    for number, (start, end) in enumerate(zip(cuts, cuts[1:]), start=1):
        folder = config.out / f"round-{number}"
        this = replace(config, out=folder / "runtime")
        print(f"round {number}: {end - start} tasks with the teacher {this.teacher}")
        print(summary(run(this, tasks[start:end])))
        export_traces(this.out / "traces.jsonl", folder / "export.jsonl", config)
        if not (folder / "promotion.json").exists():
            new = train(folder, this)
            seats = [open_seat(config, spec) for spec in (this.student, this.teacher, new)]
            decision = compare(seats, problems, config, (this.teacher, new))
            write_deployment(config.out / "deploy.yaml", decision.teacher)
            write_json(folder / "promotion.json", asdict(decision))
        decision = Decision(**read_json(folder / "promotion.json"))
        print(
            f"round {number}: {'promoted' if decision.is_promoted else 'not promoted'}: {decision.reason}; "
            f"alone {decision.alone:.1%}, old {decision.old:.1%}, new {decision.new:.1%}"
        )
        config = replace(config, teacher=decision.teacher)


def train(folder: Path, config: Any) -> str:
    """The teacher that train_grpo.py makes of the one in service with `folder/export.jsonl`."""
    command = [sys.executable, str(TRAINER), "--problems", str(folder / "export.jsonl")]
    command += ["--teacher", config.teacher, "--student", config.student, "--out", str(folder / "grpo")]
    command += [] if config.preset == "own" else ["--preset", config.preset]
    command += shlex.split(config.train_options)
    code = subprocess.run(command).returncode
    if code != 0:
        raise UserError(f"{shlex.join(command)} failed with exit code {code}; its message is above")
    return str(folder / "grpo" / "model")
