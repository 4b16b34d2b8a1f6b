"""From traces to the next teacher, and whether it may go into service.

`train_grpo.py --problems` continues the teacher in service on the exported traces; then both teachers teach the same held-out tasks,
greedily, on the same sketches. The new one is promoted only if it is *not worse*: the lower end of the 90 % interval of the mean difference
(paired bootstrap, so 95 % on this one side) is above -MARGIN. `promotion.json` says why, `deploy.yaml` which teacher is in service.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from nano_atlas import data, runs, world
from nano_atlas.episode import EpisodeConfig, seeds, sketch, teach
from nano_atlas.errors import UserError
from nano_atlas.reward import RewardConfig
from nano_atlas.runtime import deploy, traces
from nano_atlas.runtime.options import Config
from nano_atlas.schedule import play
from nano_atlas.seats import Seat
from nano_atlas.stats import in_points, paired_bootstrap

ROOT = Path(__file__).parents[2]  # where the scripts are
HELD_OUT = 500  # nano-world problems that decide, without --held-out
MARGIN = 0.02  # largest loss of accuracy that still counts as not worse


def compare(seats: Sequence[Seat], problems: Sequence[data.Problem], episodes: EpisodeConfig) -> dict:
    """The paired test of a student's old and new teacher (seats: these three) -> accuracies alone, old and new, and the decision."""
    student, *teachers = seats
    greedy, seed, scores = episodes.greedy(), seeds("promotion"), []
    sketches = play([sketch(problem, greedy, seed) for problem in problems], {"student": student}, "held out")
    for teacher in teachers:
        scripts = [teach(alone, greedy, RewardConfig(), seed, teacher.count_tokens) for alone in sketches]
        taught = play(scripts, {"student": student, "teacher": teacher}, "held out")
        scores.append([episode.guided.score for (episode,) in taught])
    old, new = scores
    gains = [after - before for before, after in zip(old, new)]
    interval = paired_bootstrap(gains, confidence=0.9)
    is_promoted = interval[0] >= -MARGIN
    verdict = f"{'not worse than' if is_promoted else 'may be worse than the'} -{100 * MARGIN:g} points"
    reason = f"new - old = {in_points(fmean(gains), interval)} on {len(gains)} held-out tasks: {verdict}"
    accuracies = {"alone": fmean(s.baseline_accuracy for s in sketches), "old": fmean(old), "new": fmean(new)}
    return {"is_promoted": is_promoted, "reason": reason, **accuracies, "interval": interval}


def run_rounds(config: Config, tasks: Sequence[data.Problem], run: Callable, open_seat: Callable) -> None:
    """Runtime, export, training and promotion, over and over; what is done of a round is not done again.
    run, open_seat: of runtime_loop.py. Raises UserError where a training fails; the same command repeats its round."""
    if len(tasks) < config.rounds:
        raise UserError(f"--rounds {config.rounds} needs at least as many tasks, not {len(tasks)}")
    nano = world.held_out(config.domain, HELD_OUT, f"promotion/{config.seed}")
    problems = data.load_problems(config.held_out) if config.held_out else nano
    cuts = [round(part * len(tasks) / config.rounds) for part in range(config.rounds + 1)]
    for number, (start, end) in enumerate(zip(cuts, cuts[1:]), start=1):
        folder = config.out / f"round-{number}"
        print(f"round {number}: {end - start} tasks with the teacher {config.teacher}")
        print(traces.summary(run(replace(config, out=folder / "runtime"), tasks[start:end])))
        traces.export_traces(folder / "runtime/traces.jsonl", folder / "export.jsonl", config)
        decision = runs.read_json(folder / "promotion.json")
        if not decision:
            pair = {"teacher": config.teacher, "student": config.student, "out": folder / "grpo"}
            pair["answer_format"] = config.answer_format
            preset = "" if config.preset == "own" else f"--preset {config.preset} "
            call("train_grpo.py", preset + config.train_options, problems=folder / "export.jsonl", **pair)
            places = [config.teacher, str(folder / "grpo/model")]
            decision = compare([open_seat(config, at) for at in (config.student, *places)], problems, config)
            decision["teacher"] = places[decision["is_promoted"]]
            deploy.write_deployment(config.out / "deploy.yaml", decision["teacher"])
            runs.write_json(folder / "promotion.json", decision)
        said = "{reason}; alone {alone:.1%}, old {old:.1%}, new {new:.1%}".format(**decision)
        print(f"round {number}: {'' if decision['is_promoted'] else 'not '}promoted: {said}")
        config = replace(config, teacher=decision["teacher"])


def call(script: str, more: str = "", **options: object) -> None:
    """Run one of the scripts with these options, and `more` of them as one text. Raises UserError where it fails."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, str(ROOT / script), *flags, *shlex.split(more)]
    if (code := subprocess.run(command).returncode) != 0:
        raise UserError(f"{shlex.join(command)} failed with exit code {code}; its message is above")
