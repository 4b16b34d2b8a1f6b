"""What the runtime learns while it works: guided accuracy over tasks, with and without strategies and skills, and elsewhere after.

    python -m benchmarks.online                      # after train_sft.py; the teacher is the one before GRPO
    python -m benchmarks.online --teacher runs/nano/teacher-grpo/model --out runs/nano/online-grpo

    fixed         the teacher is always asked in the same style
    strategies    a bandit chooses among the styles and learns from every reward (nano_atlas/runtime/strategies.py)
    skills        always the same style, but entries of a playbook may choose another (nano_atlas/runtime/playbook.py)

Weights never change. Each arm works through the same tasks of one domain and then, with what it has learned, through those of
another; `new` works through the second domain alone. The skill writer, for which the nano world has no model, is a rule: where
guidance went as far as the thing that is asked for, it proposes to be detailed in all problems with such a rule.
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
from nano_atlas import protocol, world
from nano_atlas.config import option, parse, refuse_changes, run_script, to_json
from nano_atlas.data import Problem
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json, replace_text, write_json
from nano_atlas.stats import mean_in_points

ARMS = {
    "fixed": ["--strategies", "adaptive"],
    "strategies": ["--strategies", *protocol.TEACHING_STYLES],
    "skills": ["--strategies", "adaptive", "--skill-writer", "benchmarks.online:write_skills"],
}


@dataclass(frozen=True)
class Config:
    teacher: str = option("runs/nano/teacher-sft/model", "checkpoint of the teacher", group="experiment")
    domains: tuple[str, ...] = option(("math", "telecom"), "first and second domain", list(world.DOMAINS))
    tasks: int = option(256, "tasks of each domain")
    seeds: int = option(3, "runs of each arm, each with its own tasks and choices", resumable=True)
    window: int = option(64, "tasks per column of the table", resumable=True)
    out: Path = option(Path("runs/nano/online"), "directory of the results")

    def check(self) -> None:
        if len(self.domains) != 2 or min(self.tasks, self.seeds, self.window) < 1 or self.tasks % self.window:
            raise UserError(
                "--domains takes two, --tasks must be a multiple of --window, and all numbers at least 1"
            )


def write_skills(prompt: str, metadata: dict) -> str:
    """The rule that stands in for a skill writer: what is asked for is the last thing that the guidance names."""
    session = json.loads(prompt.rpartition("\n\n")[2])
    told = re.fullmatch(r"To find (\w+), work out (?:.*, )?(\w+)\.", session["guidance"])
    if not told or told[1] != told[2]:
        return '{"entries": []}'
    entry = {"cue": {"type": "keyword", "pattern": "Each is the one it names"}, "action": {"imperative": "", "strategy": "detailed"},
             "scope": {"category": "reinforcement"}}  # fmt: skip
    return json.dumps({"entries": [entry]})


def work(config: Config, arm: str, seed: int, tasks: Sequence[Problem], name: str) -> list[dict]:
    """The outcome of each task, from the file of an earlier call where there is one."""
    path = config.out / f"{name}-{seed}.json"
    if not path.exists():
        out = config.out / f"{name}-{seed}"
        argv = ["--teacher", config.teacher, "--out", str(out), "--seed", str(seed), *ARMS[arm]]
        run = parse(runtime_loop.Config, argv, runtime_loop.PRESETS, "")
        outcomes = runtime_loop.run(run, tasks, runtime_loop.open_seats(run))
        keys = ("learning_key", "baseline", "guided", "reward", "strategy", "skills")
        write_json(path, {"outcomes": [{key: getattr(outcome, key) for key in keys} for outcome in outcomes]})
        shutil.rmtree(out)
    return read_json(path)["outcomes"]


def table(config: Config, results: dict[str, list[list[dict]]]) -> str:
    """Guided accuracy (%) of each window of tasks, over all seeds; then the difference of the last half of a domain to `fixed`."""
    first, second = config.domains
    starts = range(0, config.tasks, config.window)
    columns = [
        f"{domain} {start + 1}–{start + config.window}" for domain in config.domains for start in starts
    ]
    lines = [
        "| | " + " | ".join(columns) + f" | last half, {first}: Δ to fixed | {second}: Δ to new |",
        "| --- |" + " ---: |" * (len(columns) + 2),
    ]
    for arm, runs in results.items():
        is_new = arm.startswith("new")
        cells = [""] * (len(columns) // 2) if is_new else []
        size = len(runs[0])
        cells += [
            f"{100 * fmean(o['guided'] for run in runs for o in run[start : start + config.window]):.1f}"
            for start in range(0, size, config.window)
        ]
        half = slice(config.tasks // 2, config.tasks)
        cells.append(
            ""
            if is_new or arm == "fixed"
            else difference([run[half] for run in results["fixed"]], [run[half] for run in runs])
        )
        fresh = results.get(f"new, {arm}")
        cells.append(difference(fresh, [run[config.tasks :] for run in runs]) if fresh else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    alone = [o["baseline"] for run in results["fixed"] for o in run]
    count = len(alone) // len(results["fixed"])
    lines += [
        "",
        f"Student alone {100 * fmean(alone):.1f} %. {config.seeds} seeds, {count} tasks each; Δ in points, 95 % interval over tasks.",
    ]
    return "\n".join(lines)


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
