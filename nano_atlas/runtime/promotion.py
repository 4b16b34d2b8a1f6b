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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from nano_atlas.config import option
from nano_atlas.data import Problem
from nano_atlas.episode import EpisodeConfig, seeds, sketch, teach
from nano_atlas.errors import UserError
from nano_atlas.reward import RewardConfig
from nano_atlas.runs import read_json, write_json
from nano_atlas.runtime.deploy import write_deployment
from nano_atlas.schedule import play
from nano_atlas.seats import Seat
from nano_atlas.stats import paired_bootstrap

HELD_OUT = 500  # nano-world problems that decide, without --held-out
MARGIN = 0.02  # largest loss of accuracy that still counts as not worse


@dataclass(frozen=True)
class PromotionConfig:
    rounds: int = option(
        0,
        "times to run, export, train, test, promote, on parts of the tasks",
        group="rounds",
        resumable=True,
        at_least=0,
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


def train_and_promote(
    folder: Path, config, problems: Sequence[Problem], trainer: Path, open_seat: Callable[[str], Seat]
) -> Decision:
    """Training on `folder/export.jsonl` and the test of one round; a round that is decided is not done again.

    config: that of runtime_loop.py; trainer: train_grpo.py. Raises UserError where training fails; the same command repeats the round.
    """
    path, new = folder / "promotion.json", str(folder / "grpo" / "model")
    if path.exists():
        return Decision(**read_json(path))
    command = [sys.executable, str(trainer), "--problems", str(folder / "export.jsonl")]
    command += ["--teacher", config.teacher, "--student", config.student, "--out", str(folder / "grpo")]
    command += [] if config.preset == "own" else ["--preset", config.preset]
    command += shlex.split(config.train_options)
    code = subprocess.run(command).returncode
    if code != 0:
        raise UserError(f"{shlex.join(command)} failed with exit code {code}; its message is above")
    seats = [open_seat(spec) for spec in (config.student, config.teacher, new)]
    decision = compare(seats, problems, config, (config.teacher, new))
    write_deployment(folder.parent / "deploy.yaml", decision.teacher)
    write_json(path, asdict(decision))
    return decision
