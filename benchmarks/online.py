"""What the runtime learns while it works: guided accuracy over tasks, with and without strategies and skills, and elsewhere after.

    python -m benchmarks.online                      # after train_sft.py; the teacher is the one before GRPO
    python -m benchmarks.online --teacher runs/nano/teacher-grpo/model --out runs/nano/online-grpo

    fixed         the teacher is always asked in the same style
    strategies    a bandit chooses among the styles and learns from every reward (nano_atlas/runtime/learning.py)
    skills        always the same style, but entries of a playbook may choose another

Weights never change. Each arm works through the same tasks of one domain and then, with what it has learned, of another; `new` works
through the second domain alone. The nano world has no model that writes skills; a rule stands in for it (`write_skills`).
"""

import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import runtime_loop
from benchmarks.jobs import mean_in_points
from nano_atlas import protocol, world
from nano_atlas.config import option, parse, refuse_changes, run_script, to_json
from nano_atlas.data import Problem
from nano_atlas.errors import UserError
from nano_atlas.presets import presets
from nano_atlas.runs import read_json, replace_text, write_json

ARMS = {
    "fixed": ["--strategies", "adaptive"],
    "strategies": ["--strategies", *protocol.TEACHING_STYLES],
    "skills": ["--strategies", "adaptive", "--skill-writer", "benchmarks.online:write_skills"],
}


@dataclass(frozen=True)
class Config:
    teacher: str = option("runs/nano/teacher-sft/model", "checkpoint of the teacher", group="experiment")
    domains: tuple[str, str] = option(("math", "telecom"), "first and second domain", list(world.DOMAINS))
    tasks: int = option(256, "tasks of each domain, a multiple of --window", above=0)
    seeds: int = option(3, "runs of each arm, each with its own tasks and choices", above=0, resumable=True)
    window: int = option(64, "tasks per column of the table", above=0, resumable=True)
    out: Path = option(Path("runs/nano/online"), "directory of the results")

    def check(self) -> None:
        if self.tasks % self.window:
            raise UserError("--tasks must be a multiple of --window")


def write_skills(prompt: str, metadata: dict) -> str:
    """The rule that stands in for a skill writer: what is asked for is the last thing that the guidance names."""
    session = json.loads(prompt.rpartition("\n\n")[2])
    told = re.fullmatch(r"To find (\w+), work out (?:.*, )?(\w+)\.", session["guidance"])
    if not told or told[1] != told[2]:
        return '{"entries": []}'
    cue = {"type": "keyword", "pattern": "Each is the one it names"}
    return json.dumps({"entries": [{"cue": cue, "action": {"imperative": "", "strategy": "detailed"}}]})


def work(config: Config, arm: str, seed: int, tasks: Sequence[Problem], name: str) -> list[dict]:
    """The outcome of each task, from the file of an earlier call where there is one."""
    path = config.out / f"{name}-{seed}.json"
    if not path.exists():
        out = config.out / f"{name}-{seed}"
        argv = ["--teacher", config.teacher, "--out", str(out), "--seed", str(seed), *ARMS[arm]]
        outcomes = runtime_loop.run(parse(runtime_loop.Config, argv, presets("runtime_loop"), ""), tasks)
        keys = ("baseline", "guided")
        write_json(path, {"outcomes": [{key: getattr(outcome, key) for key in keys} for outcome in outcomes]})
        shutil.rmtree(out)
    return read_json(path)["outcomes"]


def table(config: Config, results: dict[str, list[list[dict]]]) -> str:
    """Guided accuracy (%) of each window of tasks, over all seeds; then the difference of the last half of a domain to `fixed`."""
    first, second = config.domains
    starts = range(0, config.tasks, config.window)
    columns = [f"{domain} {n + 1}–{n + config.window}" for domain in config.domains for n in starts]
    heads = [*columns, f"last half, {first}: Δ to fixed", f"{second}: Δ to new"]
    lines = [f"| | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    half = slice(config.tasks // 2, config.tasks)
    for arm, runs in results.items():
        windows = [slice(start, start + config.window) for start in range(0, len(runs[0]), config.window)]
        cells = [f"{100 * fmean(o['guided'] for run in runs for o in run[w]):.1f}" for w in windows]
        cells = [""] * (len(columns) - len(cells)) + cells + ["", ""]
        if f"new, {arm}" in results:
            cells[-2] = difference([run[half] for run in results["fixed"]], [run[half] for run in runs])
            cells[-1] = difference(results[f"new, {arm}"], [run[config.tasks :] for run in runs])
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    alone = [outcome["baseline"] for run in results["fixed"] for outcome in run]
    note = f"Student alone {100 * fmean(alone):.1f} %. {config.seeds} seeds, {2 * config.tasks} tasks each"
    return "\n".join([*lines, "", f"{note}; Δ in points, 95 % interval over tasks."])


def difference(before: list[list[dict]], after: list[list[dict]]) -> str:
    pairs = (pair for runs in zip(before, after, strict=True) for pair in zip(*runs, strict=True))
    return mean_in_points([new["guided"] - old["guided"] for old, new in pairs])


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    if saved := read_json(config.out / "online.json"):
        refuse_changes(config, saved, str(config.out))
    write_json(config.out / "online.json", to_json(config))
    results: dict[str, list[list[dict]]] = {}
    for seed in range(config.seeds):
        first, second = (world.held_out(domain, config.tasks, f"online/{seed}") for domain in config.domains)
        for arm in ARMS:
            results.setdefault(arm, []).append(work(config, arm, seed, [*first, *second], arm))
        for arm in ("strategies", "skills"):
            results.setdefault(f"new, {arm}", []).append(work(config, arm, seed, second, f"new-{arm}"))
    text = table(config, results)
    replace_text(config.out / "online.md", text + "\n")
    print(text)


if __name__ == "__main__":
    run_script(main)
