"""Which student and teacher are in service, and when a new teacher is promoted.

A YAML file names the pair. The runtime and the evaluation read it with --deploy, and promotion rewrites it:

    teacher:
      llm: {provider: huggingface, model: /models/atlas-teacher-grpo, temperature: 0.2, max_output_tokens: 512}

A `student:` section has the same form. Providers: `huggingface` (model: a checkpoint directory), `openai` (a server
at api_base; model: its name there), `http` and `python` (model: as in `agents`).

With --rounds a new teacher is promoted only if it is *not worse* on held-out tasks: the lower end of the 90 %
interval of the mean difference (paired bootstrap; one-sided 95 %) is at least -MARGIN. See `promotion.json`.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from nano_atlas import data, runs, world
from nano_atlas.commands import SCRIPTS
from nano_atlas.config import to_json
from nano_atlas.episode import EpisodeConfig, seeds, sketch, teach
from nano_atlas.errors import UserError
from nano_atlas.functions import verifier_seat
from nano_atlas.presets import presets
from nano_atlas.reward import RewardConfig
from nano_atlas.runtime import learning, traces
from nano_atlas.runtime.options import Config
from nano_atlas.schedule import play
from nano_atlas.seats import Seat, is_url
from nano_atlas.stats import in_points, paired_bootstrap
from nano_atlas.text import masked

SPECS = dict(huggingface="{model}", python="{model}", http="post+{model}", openai="{api_base}#{model}")
LENGTHS = {"student": "--answer-tokens", "teacher": "--teaching-tokens"}
SHARED = (*(field.name for field in fields(EpisodeConfig) if field.metadata), "device", "dtype")
OPTIONS = ("provider", "temperature", "max_output_tokens")  # all other keys must occur in the provider's spec
HELD_OUT = 500  # nano-world problems for the comparison, without --held-out
MARGIN = 0.02  # largest loss of accuracy that still counts as not worse


def with_deployment(argv: Sequence[str], is_evaluation: bool = False) -> list[str]:
    """Puts the settings of the --deploy file as flags before `argv`. An evaluation ignores its temperatures."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deploy", nargs="?")
    path = parser.parse_known_args(argv)[0].deploy
    seats, flags = read_deployment(path) if path else {}, []
    temperatures = dict(zip(LENGTHS, EpisodeConfig.temperature))
    for name, llm in seats.items():
        named = "deployed=" if is_evaluation and name == "teacher" else ""
        flags += [f"--{name}", named + llm["spec"]]
        flags += [LENGTHS[name], str(llm["max_output_tokens"])] if "max_output_tokens" in llm else []
        temperatures[name] = llm.get("temperature", temperatures[name])
    if not is_evaluation and any("temperature" in llm for llm in seats.values()):
        flags += ["--temperature", *map(str, temperatures.values())]
    return [*flags, *argv]


def read_deployment(path: Path | str) -> dict[str, dict[str, Any]]:
    """By seat: the keys of its `llm` section, and its `spec` for agents.open_agent. Raises UserError."""
    seats = {}
    try:
        for name, section in yaml.safe_load(Path(path).read_text(encoding="utf-8")).items():
            llm = section["llm"]
            template = SPECS.get(llm["provider"], "")
            extra = [key for key in llm if key not in OPTIONS and f"{{{key}}}" not in template]
            if extra or list(section) != ["llm"] or name not in LENGTHS or not template:
                raise UserError(f"{path}: {name}: {', '.join(section)}: {llm['provider']} {extra} is unknown")
            template = template if "model" in llm else template.removesuffix("#{model}")
            seats[name] = {**llm, "spec": template.format(**llm)}
    except (OSError, yaml.YAMLError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: not a deployment file ({cause})") from None
    return seats


def write_deployment(path: Path, teacher: str) -> None:
    """Replaces the teacher in the file and keeps its other content."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    content["teacher"] = {"llm": {"provider": "huggingface", "model": teacher}}
    runs.replace_text(path, yaml.safe_dump(content, sort_keys=False))


def compare(seats: Sequence[Seat], problems: Sequence[data.Problem], episodes: EpisodeConfig) -> dict:
    """Paired test of two teachers; seats: student, old teacher, new teacher -> decision and accuracies."""
    student, *teachers = seats
    greedy, seed, scores = episodes.greedy(), seeds("promotion"), []
    known = {"student": student, **verifier_seat(episodes.verifier)}
    sketches = play([sketch(problem, greedy, seed) for problem in problems], known, "held out")
    for teacher in teachers:
        scripts = [teach(alone, greedy, RewardConfig(), seed, teacher.count_tokens) for alone in sketches]
        taught = play(scripts, known | {"teacher": teacher}, "held out")
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
    """Repeats runtime, export, training and promotion, except what is already done. Raises UserError."""
    cuts = [round(part * len(tasks) / config.rounds) for part in range(config.rounds + 1)]
    parts = [tasks[start:end] for start, end in zip(cuts, cuts[1:])]
    if not all(any(task.answer is not None for task in part) for part in parts):
        raise UserError("each round needs tasks with a known answer: add some, or lower --rounds")
    for name, kinds in (("teacher", "directory"), ("student", "directory or URL")):
        if not can_train(name, spec := getattr(config, name)):
            raise UserError(f"--{name} {spec}: for --rounds it must be a checkpoint {kinds}")
    if (file := config.out / "deploy.yaml").exists():
        read_deployment(file)  # report errors now, not after the first round
    if config.held_out:
        problems = data.load_problems(config.held_out)
    else:
        problems = world.held_out(config.domain, HELD_OUT, f"promotion/{config.seed}")
    experience = learning.Experience(config.strategies)
    for number, part in enumerate(parts, start=1):
        folder = config.out / f"round-{number}"
        decision = runs.read_json(folder / "promotion.json")
        training = {n: getattr(config, n) for n in ("preset", "student", "teacher")} | shared(vars(config))
        if not decision:  # report options that do not fit before the round starts
            call("train_grpo.py", f"{config.train_options} --show-layout", **training)
        print(f"round {number}: {len(part)} tasks with the teacher {config.teacher}")
        working = replace(config, out=folder / "runtime")
        print(traces.summary(run(working, part, experience=experience), working.out))
        traces.export_traces(folder / "runtime/traces.jsonl", folder / "export.jsonl", config)
        if not decision:
            training |= {"problems": folder / "export.jsonl", "out": folder / "grpo"}
            call("train_grpo.py", config.train_options, **training)
            places = [config.teacher, str(folder / "grpo/model")]
            decision = compare([open_seat(config, at) for at in (config.student, *places)], problems, config)
            decision["teacher"] = places[decision["is_promoted"]]
            write_deployment(file, decision["teacher"])
            runs.write_json(folder / "promotion.json", decision)
        result = "{reason}; alone {alone:.1%}, old {old:.1%}, new {new:.1%}".format(**decision)
        print(f"round {number}: {'' if decision['is_promoted'] else 'not '}promoted: {result}")
        config = replace(config, teacher=decision["teacher"])


def shared(options: Mapping[str, Any]) -> dict[str, Any]:
    """The runtime's options that training takes over; not a greedy teacher's temperature, which samples no group."""
    return {name: options[name] for name in SHARED if name != "temperature" or options[name][1]}


def training_command(config: Config) -> str:
    """The command that trains a teacher on the --export file, with the options of the run in --out."""
    saved = to_json(config) | runs.kept(config.out / "run.json").get("config", {})
    usual = to_json(replace(Config(), **presets("runtime_loop")[saved["preset"]].overrides))
    told = {"preset": saved["preset"]} | {n: value for n, value in shared(saved).items() if value != usual[n]}
    for name in ("student", "teacher"):
        told[name] = saved[name] if can_train(name, saved[name]) else "DIRECTORY"
    outs = (config.out.parent / f"teacher-grpo-{number}" for number in count(2))
    told |= {"problems": config.export, "out": next(path for path in outs if not path.exists())}
    return masked(shlex.join(["python", "train_grpo.py", *flags_of(told)]))


def can_train(seat: str, spec: str | None) -> bool:
    """Whether train_grpo.py accepts `spec` for this seat: a directory, or for the student also a URL."""
    if spec is None or ":" not in spec or Path(spec).exists():
        return spec is not None
    return seat == "student" and is_url(spec)


def flags_of(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        flag, several = f"--{name.replace('_', '-')}", isinstance(value, list | tuple)
        yield from (flag, *map(str, value)) if several else [f"{flag}={value}"]


def call(script: str, more: str = "", **options: object) -> None:
    """Runs a script with `options` and the space-separated `more`. Raises UserError if it fails."""
    command = [sys.executable, str(SCRIPTS / script), *flags_of(options), *more.split()]
    if (code := subprocess.run(command).returncode) != 0:
        raise UserError(f"{shlex.join(command)} failed with exit code {code}; its message is above")
