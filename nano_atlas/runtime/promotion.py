"""From traces to the next teacher, and whether it may go into service.

One round: `train_grpo.py --traces` continues the teacher in service on the exported traces; then both teachers teach the same held-out
tasks, greedily, on the same sketches. The new one is promoted only if it is *not worse*: the lower end of the 90 % interval of the mean
difference (paired bootstrap, so 95 % on this one side) is above -margin. Otherwise the old one stays. Either way `promotion.json` says
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
from nano_atlas.episode import EpisodeConfig, sketch_problems, teach
from nano_atlas.errors import UserError
from nano_atlas.reward import RewardConfig
from nano_atlas.runs import read_json, write_json
from nano_atlas.runtime.deploy import write_deployment
from nano_atlas.seats import Seat
from nano_atlas.stats import paired_bootstrap


@dataclass(frozen=True)
class PromotionConfig:
    rounds: int = option(
        0,
        "run, export, train, test and promote this many times, each on the next part of the tasks",
        group="rounds",
        resumable=True,
    )
    held_out: Path | None = option(
        None, "JSONL of problems that decide about promotion (none: of the nano world)", resumable=True
    )
    held_out_count: int = option(500, "number of nano-world problems, without --held-out", resumable=True)
    margin: float = option(
        0.02, "largest loss of accuracy (0 to 1) that still counts as not worse", resumable=True
    )
    train_options: str = option("", "further options of train_grpo.py, as one text", resumable=True)

    def check(self) -> None:
        if self.rounds < 0 or self.held_out_count < 1 or not 0 <= self.margin <= 1:
            raise UserError(
                "--rounds must be at least 0, --held-out-count at least 1, --margin between 0 and 1"
            )


@dataclass(frozen=True)
class Decision:
    teacher: str  # in service from now on
    is_promoted: bool
    reason: str
    old: float  # guided accuracy on the held-out tasks
    new: float
    alone: float
    interval: tuple[float, float]  # 90 %, of new - old


def compare(
    student: Seat,
    old: Seat,
    new: Seat,
    problems: Sequence[Problem],
    episodes: EpisodeConfig,
    margin: float,
    places: tuple[str, str],
) -> Decision:
    """The paired test. places: where the old and the new teacher are."""
    greedy = EpisodeConfig(episodes.probe_tokens, episodes.teaching_tokens, episodes.answer_tokens).greedy()
    sketches = sketch_problems(student, problems, greedy, "promotion", progress="held out")
    arms = [
        [
            float(episode.guided.is_correct)
            for (episode,) in teach(
                student, seat, sketches, greedy, RewardConfig(), "promotion", progress="held out"
            )
        ]
        for seat in (old, new)
    ]
    differences = [after - before for before, after in zip(*arms)]
    low, high = paired_bootstrap(differences, confidence=0.9)
    is_promoted = low >= -margin
    found = f"new - old = {100 * fmean(differences):+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] on {len(problems)} held-out tasks"
    reason = (
        f"{found}: {'not worse than' if is_promoted else 'may be worse than the'} -{100 * margin:g} points"
    )
    return Decision(
        places[is_promoted],
        is_promoted,
        reason,
        fmean(arms[0]),
        fmean(arms[1]),
        fmean(s.baseline_accuracy for s in sketches),
        (low, high),
    )


def train_and_promote(
    folder: Path,
    traces: Path,
    teacher: str,
    student: str,
    problems: Sequence[Problem],
    config,
    trainer: Path,
    open_seat: Callable[[str], Seat],
) -> Decision:
    """Training and the test of one round; whatever of it is done already is not done again.

    trainer: the script train_grpo.py. Raises UserError where it fails; the round is then undecided, and the same command repeats it.
    """
    path = folder / "promotion.json"
    if path.exists():
        saved = read_json(path)
        return Decision(**{**saved, "interval": tuple(saved["interval"])})
    preset = [] if config.preset == "own" else ["--preset", config.preset]
    command = [
        sys.executable,
        str(trainer),
        *preset,
        "--traces",
        str(traces),
        "--teacher",
        teacher,
        "--student",
        student,
        "--out",
        str(folder / "grpo"),
        *shlex.split(config.train_options),
    ]
    code = subprocess.run(command).returncode
    if code != 0:
        raise UserError(f"{shlex.join(command)} failed with exit code {code}; its message is above")
    new = str(folder / "grpo" / "model")
    decision = compare(
        open_seat(student),
        open_seat(teacher),
        open_seat(new),
        problems,
        config,
        config.margin,
        (teacher, new),
    )
    write_deployment(folder.parent / "deploy.yaml", decision.teacher)
    write_json(path, asdict(decision))
    return decision
