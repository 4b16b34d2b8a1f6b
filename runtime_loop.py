r"""The runtime: a teacher helps a frozen student with each task, learns how to teach, and records traces.

    try it, on a CPU   python runtime_loop.py                          (after train_grpo.py)
    your own tasks     python runtime_loop.py --preset own --tasks tasks.jsonl \
                           --student http://localhost:8000 --teacher DIRECTORY --out runs/mine
    select traces      python runtime_loop.py --export hard.jsonl --min-signal 1
    improve by itself  python runtime_loop.py --rounds 3    (run, export, train, test, promote)
    serve the pair     python runtime_loop.py --serve 8080  (an OpenAI-compatible endpoint)

A line of the tasks file has a `question` and, if known, an `answer`. The three parts are the published ones:

    task analysis     how much help (a lane), by the student's record; how to teach, by past gains (`learning`)
    experimentation   answer, teaching, answer again (`lanes`); judged; the best is returned (`judges`)
    trace export      each session goes to traces.jsonl; --export selects those worth training on (`traces`)

The traces are the only state; everything else is rebuilt from them. The same command continues an interrupted run
and repeats failed sessions. A task is identified by its content, not by its line. The teacher may change between
runs of the same --out: finished sessions stay (each names its teacher), and what was learned from them still counts.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from math import ceil
from pathlib import Path

import torch

from nano_atlas import functions, runs, schedule, world
from nano_atlas.config import parse, run_script
from nano_atlas.data import Problem, load_problems
from nano_atlas.errors import UserError, say
from nano_atlas.presets import announce, look_at, presets
from nano_atlas.runtime import agents, deploy, lanes, learning, traces
from nano_atlas.runtime.options import Config
from nano_atlas.seats import Seat
from nano_atlas.terminal import Bar

WRITTEN = ("traces.jsonl", "metrics.jsonl", "reviews.jsonl", "playbook.json")  # a run's, beside run.json


def run(config: Config, tasks, seats: dict | None = None, experience=None) -> list[traces.Outcome]:
    """Run every task that has no trace yet; returns all outcomes. experience: a `learning.Experience`, updated here."""
    seats, experience = seats or open_seats(config), experience or learning.Experience(config.strategies)
    settle_options(config)
    bar = {"total": ceil(len(tasks) / config.batch), "unit": "batch", "desc": "runtime"}
    logged = config.out / "traces.jsonl", config.out / "metrics.jsonl"
    with runs.Journal(logged[0]) as journal, runs.RunLog(logged[1]) as log, Bar(**bar) as progress:
        forecast(config, tasks)
        ids, weights = session_ids(tasks), runs.checkpoint_digest(config.teacher)
        done = {o.session_id: o for o, _ in traces.read_traces(journal.path) if o.status == "succeeded"}
        wanted = set(ids)
        for past in done.values():
            if past.session_id not in wanted:  # tasks no longer in the file still count as experience
                experience.learn(past)

        # Fixed batches, and experience updated once per batch: an interrupted run makes the same choices.
        for start in range(0, len(tasks), config.batch):
            batch, scripts = ids[start : start + config.batch], {}
            for name, task in zip(batch, tasks[start:]):
                if name not in done:
                    session = lanes.new_session(name, task, experience, config)
                    session.metadata["teacher_weights"] = weights
                    scripts[name] = lanes.run_session(session, config, seats["teacher"].count_tokens)
            for finished in schedule.drive(scripts, seats, workers=config.workers, timeout=config.timeout):
                recorded = [traces.session_record(session) for session in finished.values()]
                journal.append(trace for _, trace in recorded)
                done |= {outcome.session_id: outcome for outcome, _ in recorded}
            outcomes = [done[name] for name in batch]
            experience.learn(*outcomes)
            log.log(start + len(batch), **traces.runtime_metrics(outcomes), skills=len(experience.entries))
            progress.step(is_new=bool(scripts))
    if config.skill_writer:  # for people to read; never read back
        entries = [asdict(entry) | {"effect": entry.effect} for entry in experience.entries.values()]
        runs.write_json(config.out / "playbook.json", {"entries": entries})
    return [done[name] for name in ids]


def session_ids(tasks: Sequence[Problem]) -> list[str]:
    """Digests of the tasks' contents; equal tasks are numbered."""
    seen, names = Counter(), []
    for task in tasks:
        content = json.dumps([task.domain, task.question, task.answer])
        seen[content] += 1
        names.append(runs.digest([f"{seen[content]} {content}".encode()])[:24])
    return names


def forecast(config: Config, tasks: Sequence[Problem] | None) -> None:
    """Warns of surprising settings. tasks: None for a server, whose requests have no known answer."""
    missing = tasks and sum(task.answer is None for task in tasks)
    if missing != 0 and config.verifier == "exact" and not config.judge:
        what = f"{missing} of {len(tasks)} tasks" if tasks else "the answers"
        fate = "the last answer with help is returned, even if it is worse"
        say(f"{what} cannot be scored (no known answer, --verifier or --judge): {fate}")
    is_adaptive = config.lane == "adaptive" or config.skill_writer or len(config.strategies) > 1
    if tasks and is_adaptive and len(tasks) <= config.batch:
        say(f"{len(tasks)} tasks are one batch, and within it nothing adapts: lower --batch {config.batch}")


def settle_options(config: Config) -> None:
    """Raises UserError if --out was started with other options or another student."""
    contents = {"weights of the student": runs.checkpoint_digest(config.student)}
    runs.keep_to(config, config.out / "run.json", contents, WRITTEN)


def set_aside(directory: Path) -> None:
    """For --restart: renames the files of the earlier run, to traces.jsonl.1 and so on."""
    runs.refuse_foreign(directory / "run.json", WRITTEN)
    number = next(n for n in count(1) if not Path(f"{directory}/traces.jsonl.{n}").exists())
    for path in filter(Path.exists, (directory / name for name in (*WRITTEN, "run.json"))):
        path.rename(f"{path}.{number}")


def open_seats(config: Config) -> dict[str, Seat]:
    """The seats of a session, by the names that its calls use; a checkpoint in several seats is loaded once."""
    names = ("student", "teacher", "judge", "large judge", "skill writer")
    specs = {name: getattr(config, name.replace(" ", "_")) for name in names}
    opened = {spec: open_seat(config, spec) for spec in dict.fromkeys(specs.values()) if spec is not None}
    seats = {name: opened[spec] for name, spec in specs.items() if spec is not None}
    return seats | functions.verifier_seat(config.verifier, is_lockstep=False)


def open_seat(config: Config, spec: str) -> Seat:
    name = config.preset
    if spec == presets("runtime_loop")[name].overrides.get("teacher") and not Path(spec).exists():
        sft, grpo = (f" --preset {name} --{file} FILE" * (name != "nano") for file in ("data", "problems"))
        made = f"python train_sft.py{sft} && python train_grpo.py{grpo}"
        raise UserError(f"{spec} does not exist yet; make it with: {made}")
    where = config.device, getattr(torch, config.dtype)
    return agents.open_agent(spec, *where, config.timeout, config.workers)


def load_tasks(config: Config) -> list[Problem]:
    if config.tasks is None:  # not the tasks of eval.py, because these may train the next teacher
        return world.held_out(config.domain, config.count, f"runtime/{config.seed}")
    return load_problems(config.tasks, needs_answer=False, skip_bad=config.skip_bad)


def main() -> None:
    config = parse(Config, deploy.with_deployment(sys.argv[1:]), presets("runtime_loop"), __doc__)
    if {"--approve", "--quarantine"} & set(sys.argv) and not (config.approve or config.quarantine):
        raise UserError("--approve and --quarantine need the ids of sessions; --show lists them")
    path, named = config.out / "traces.jsonl", config.approve or config.quarantine
    if config.export is not None:
        selected, total = traces.export_traces(path, config.export, config)
        try:
            how = f"{len(load_problems(config.export))} problems for\n    {deploy.training_command(config)}"
        except UserError as error:
            how = f"not for training: {error}"
        print(f"{config.export}: {selected} of {total} traces, {how}")
    elif config.show is not None:
        print("\n".join(traces.show_sessions(config.out, config.show)) or f"no session is {config.show}")
    elif named:
        status = "approved" if config.approve else "quarantined"
        for name in traces.record_reviews(config.out, named, status, config.note):
            print(f"{name} {status}")
    else:
        with runs.owned(config.out):
            work(config)


def work(config: Config) -> None:
    if config.serve is not None:
        from nano_atlas.runtime.serve import serve_pair

        announce("runtime_loop", config, f"a server at {':'.join(config.address)}", "until it is stopped")
        settle_options(config)
        forecast(config, None)
        return serve_pair(config, open_seats(config))
    plan = f"the tasks of {config.tasks}" if config.tasks else f"{config.count} tasks"
    announce("runtime_loop", config, f"{config.rounds} rounds of {plan}" if config.rounds else plan)
    tasks = load_tasks(config)
    if config.rounds:
        return deploy.run_rounds(config, tasks, run, open_seat)
    seats = open_seats(config)
    if config.restart:
        set_aside(config.out)
    outcomes = run(config, tasks, seats)
    print(traces.summary(outcomes, config.out))
    look_at(config.out)
    if outcomes and all(outcome.status == "failed" for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
