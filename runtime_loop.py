"""The runtime: a teacher helps a frozen student with each task, finds out which way of teaching works, and leaves traces.

    python runtime_loop.py                                       # the nano world, on a CPU
    python runtime_loop.py --preset own --tasks tasks.jsonl --student http://localhost:8000 --teacher DIR --out runs/mine
    python runtime_loop.py --export hard.jsonl --min-signal 1    # select traces; then: python train_grpo.py --traces hard.jsonl
    python runtime_loop.py --rounds 3                            # run, export, train, test, promote, three times over
    python runtime_loop.py --serve 8080                          # the pair behind an OpenAI-compatible endpoint

Student, teacher and judges are each a checkpoint directory, the URL of an OpenAI-compatible server, an HTTP service or a Python
function (`agents`). A line of the tasks file has a `question` and, where it is known, an `answer`. The loop has the three parts of
the published one:

    task analysis     how much help: a lane (`lanes`), by the student's record (`capability`); its approach, its own answer, and
                      the gap to full score
    experimentation   a strategy for each task, by what has worked so far (`strategies`), and skills (`playbook`); every answer is
                      validated (`judges`), and the best one returned, never one below the student's own (`guard`)
    trace export      each session appended to traces.jsonl (`traces`); --export selects those worth training on (`review`)

The traces are the only state. Strategies, skills, records and metrics are rebuilt by replaying them, so a run that was killed
continues where it stopped, and repeats only the sessions that were under way. Sessions in which an agent failed are recorded as such;
the same command tries those again. A task is known by its content (domain, question, answer): lines may move, and a task edited
since is a new one.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from nano_atlas import world
from nano_atlas.checkpoint import is_checkpoint
from nano_atlas.config import Preset, option, parse, refuse_changes, run_script, to_json
from nano_atlas.data import Problem, derive_seed, load_problems
from nano_atlas.errors import UserError
from nano_atlas.runs import RunLog, checkpoint_digest, read_json, write_json
from nano_atlas.runtime.agents import open_agent
from nano_atlas.runtime.deploy import with_deployment
from nano_atlas.runtime.experience import Experience, ExperienceConfig, new_session, now, record
from nano_atlas.runtime.export import export_traces, known_sessions, show_sessions
from nano_atlas.runtime.lanes import run_session
from nano_atlas.runtime.promotion import PromotionConfig, train_and_promote
from nano_atlas.runtime.report import runtime_metrics, summary
from nano_atlas.runtime.review import STATUSES, record_reviews
from nano_atlas.runtime.serve import Answer, ServeConfig, serve
from nano_atlas.runtime.sessions import drive, is_batched
from nano_atlas.runtime.traces import Outcome, Selection, TraceWriter
from nano_atlas.seats import Seat

NANO_TEACHERS = ("runs/nano/teacher-grpo/model", "runs/nano/teacher-sft/model")  # the first that exists


@dataclass(frozen=True)
class Config(Selection, ServeConfig, PromotionConfig, ExperienceConfig):
    preset: str = option("nano", "", group="run")
    tasks: Path | None = option(None, "JSONL of tasks; none: tasks of the nano world", resumable=True)
    skip_bad: bool = option(
        False, "leave out malformed lines of --tasks, count and show them", resumable=True
    )
    domain: str = option(
        "math", "kind of nano-world tasks, without --tasks", choices=list(world.DOMAINS), resumable=True
    )
    count: int = option(200, "number of nano-world tasks, without --tasks", resumable=True)
    student_model: str | None = option(None, "model name at the student's URL (none: the first it serves)")
    teacher_model: str | None = option(None, "model name at the teacher's URL (none: the first it serves)")
    student_tools: str | None = option(
        None, "MODULE:NAME of a list of Python functions that the student's endpoint may call"
    )
    deploy: Path | None = option(
        None,
        "YAML file that says which student and teacher are in service; flags override it",
        resumable=True,
    )
    out: Path = option(
        Path("runs/nano/runtime"), "directory of traces.jsonl and metrics.jsonl", resumable=True
    )
    restart: bool = option(False, "start over; earlier traces are kept under another name", resumable=True)
    batch: int = option(32, "tasks that are worked on together, between two updates of strategies and skills")
    workers: int = option(16, "most calls to endpoints and agents at a time", resumable=True)
    timeout: float = option(600.0, "seconds after which such a call has failed", resumable=True)
    device: str = option("cpu", "where checkpoints run, such as cpu or cuda")
    dtype: str = option("float32", "of checkpoints", ("float32", "bfloat16"))
    export: Path | None = option(
        None,
        "write the selected traces to this file, and run no task",
        group="review and export",
        resumable=True,
    )
    show: str | None = option(
        None, "list sessions of this review status, and run no task", STATUSES, resumable=True
    )
    approve: tuple[str, ...] = option((), "ids (or their beginnings) of sessions to approve", resumable=True)
    quarantine: tuple[str, ...] = option(
        (), "the same of sessions that must not train a teacher", resumable=True
    )
    note: str = option("", "why, for --approve and --quarantine", resumable=True)

    def check(self) -> None:
        for base in (Selection, ServeConfig, PromotionConfig, ExperienceConfig):
            base.check(self)
        for name in ("batch", "count", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1")
        if self.retries < 0 or self.timeout <= 0 or not self.strategies:
            raise UserError("--retries must be at least 0, --timeout above 0, and --strategies at least one")
        actions = [
            name for name in ("export", "show", "approve", "quarantine", "rounds") if getattr(self, name)
        ]
        actions += ["serve"] * (self.serve is not None)
        if len(actions) > 1:
            raise UserError(f"--{' and --'.join(actions)} are different things to do; use one of them")
        if not set(actions) & {"export", "rounds"} and not Selection.is_default(self):
            raise UserError(
                "the options that select traces are for --export FILE and --rounds; add one of them"
            )
        if actions and self.restart:
            raise UserError(
                f"--{actions[0]} needs the traces that --restart would set aside; use one of them"
            )
        if self.note and not (self.approve or self.quarantine):
            raise UserError(
                "--note says why a session is approved or quarantined; add --approve or --quarantine"
            )
        needed = [self.student, self.teacher] + ([] if "serve" in actions else [self.tasks])
        if (
            not set(actions) & {"export", "show", "approve", "quarantine"}
            and self.preset != "nano"
            and None in needed
        ):
            raise UserError(
                f"--preset {self.preset} needs --tasks"
                + " --student --teacher (or --deploy)" * (self.preset == "own")
            )


GPU = {"teacher": "runs/grpo/model", "out": Path("runs/runtime"), "device": "cuda", "dtype": "bfloat16"}
PRESETS = {
    "nano": Preset(
        "the nano world with its student and teacher; CPU, 1 GB",
        {
            "student": str(world.STUDENT),
            "probe_tokens": 40,
            "teaching_tokens": 96,
            "answer_tokens": 120,
            "lane": "paired",
        },
    ),
    "24gb": Preset(
        "Qwen3-0.6B student, 0.6B teacher on one GPU, 6 GB; needs --tasks",
        GPU | {"student": "Qwen/Qwen3-0.6B"},
    ),
    "2gpu": Preset(
        "Qwen3-4B student, 1.7B teacher on the first GPU, 16 GB; needs --tasks",
        GPU | {"student": "Qwen/Qwen3-4B"},
    ),
    "80gb": Preset(
        "Qwen3-4B student, 8B teacher on one GPU, 30 GB; needs --tasks", GPU | {"student": "Qwen/Qwen3-4B"}
    ),
    "own": Preset(
        "models or agents of your own; needs --tasks, --student, --teacher", {"out": Path("runs/runtime")}
    ),
}


# ------------------------------------------------------------------------------------------------------------- the loop


def run(config: Config, tasks: Sequence[Problem], seats: Mapping[str, Seat]) -> list[Outcome]:
    """Bring every task to a trace, and return the outcome of each in the order of the tasks."""
    path = config.out / "traces.jsonl"
    with (
        TraceWriter(path) as writer,
        RunLog(config.out) as log,
        tqdm(total=len(tasks), unit="task", desc="runtime") as bar,
    ):
        settle_options(config)
        experience = Experience(config)
        ids = session_ids(tasks)
        done = {past.session_id: past for past in writer.outcomes()}  # the last record of a session counts
        done = {name: past for name, past in done.items() if past.status == "succeeded"}
        wanted = set(ids)
        for past in done.values():
            if (
                past.session_id not in wanted
            ):  # experience with tasks that are no longer in the file still counts
                experience.learn(past)

        # Batches are fixed by position, and experience grows by whole batches: a run that was interrupted, be it in the middle of
        # a batch, makes the same choices as one that never was.
        for start in range(0, len(tasks), config.batch):
            batch = ids[start : start + config.batch]
            missing = {name: task for name, task in zip(batch, tasks[start:]) if name not in done}
            sessions = {name: new_session(name, task, experience, config) for name, task in missing.items()}
            scripts = {
                name: run_session(
                    session,
                    config,
                    list(experience.records[session.learning_key]),
                    seats["teacher"].count_tokens,
                )
                for name, session in sessions.items()
            }
            for finished in drive(scripts, seats, config.workers, config.timeout):
                recorded = [record(session, experience, config) for session in finished.values()]
                writer.append(trace for _, trace in recorded)
                done |= {outcome.session_id: outcome for outcome, _ in recorded}
                bar.update(len(recorded))
            outcomes = [done[name] for name in batch]
            experience.learn(*outcomes)
            log.log(start + len(batch), **runtime_metrics(outcomes), skills=len(experience.playbook.entries))
            bar.update(len(batch) - len(missing))
    if config.skill_writer:
        write_json(
            config.out / "playbook.json", {"entries": experience.playbook.summary()}
        )  # to read; nothing reads it back
    return [done[name] for name in ids]


def session_ids(tasks: Sequence[Problem]) -> list[str]:
    """Names that depend on the content of a task alone; the second of two equal tasks is told from the first by its count."""
    seen: Counter[str] = Counter()
    names = []
    for task in tasks:
        content = json.dumps([task.domain, task.question, task.answer])
        seen[content] += 1
        names.append(hashlib.sha256(f"{seen[content]} {content}".encode()).hexdigest()[:24])
    return names


def settle_options(config: Config) -> None:
    """A directory holds one experiment: other options, or other weights, than those it began with are refused."""
    path = config.out / "config.json"
    specs = {"student": config.student, "teacher": config.teacher}
    weights = {
        name: checkpoint_digest(Path(spec)) for name, spec in specs.items()
    }  # a URL does not show its weights
    if not path.exists():
        write_json(path, {"options": to_json(config), "weights": weights})
    saved = read_json(path)
    refuse_changes(config, saved["options"], str(config.out))
    changed = [
        f"{name} ({getattr(config, name)})" for name in weights if weights[name] != saved["weights"][name]
    ]
    if changed:
        raise UserError(
            f"{config.out} holds traces of other weights of the {' and the '.join(changed)}. "
            "Choose another --out, or start over with --restart"
        )


def set_aside(directory: Path) -> None:
    """For --restart: rename traces and reviews (all else is made from them) and forget the options."""
    with TraceWriter(directory / "traces.jsonl"):  # not while another process writes it
        number = next(n for n in range(1, sys.maxsize) if not (directory / f"traces.{n}.jsonl").exists())
        for name in ("traces", "reviews"):
            if (directory / f"{name}.jsonl").exists():
                (directory / f"{name}.jsonl").rename(directory / f"{name}.{number}.jsonl")
    (directory / "config.json").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ rounds, serving, the command


def run_rounds(config: Config, tasks: Sequence[Problem]) -> None:
    """Runtime, export, training and promotion, over and over; a round that is done is not done again."""
    problems = world.held_out(config.domain, config.held_out_count, f"promotion/{config.seed}")
    if config.held_out is not None:
        problems = load_problems(config.held_out)
    if len(tasks) < config.rounds:
        raise UserError(f"--rounds {config.rounds} needs at least as many tasks, not {len(tasks)}")
    cuts = [round(part * len(tasks) / config.rounds) for part in range(config.rounds + 1)]
    for number, (start, end) in enumerate(zip(cuts, cuts[1:]), start=1):
        folder = config.out / f"round-{number}"
        this = dataclasses.replace(config, out=folder / "runtime")
        print(f"round {number}: {end - start} tasks with the teacher {this.teacher}")
        print(summary(run(this, tasks[start:end], open_seats(this))))
        export_traces(this.out / "traces.jsonl", folder / "export.jsonl", config)
        decision = train_and_promote(
            folder,
            folder / "export.jsonl",
            this.teacher,
            this.student,
            problems,
            config,
            Path(__file__).with_name("train_grpo.py"),
            lambda spec: open_seat_of(config, spec),
        )
        print(
            f"round {number}: {'promoted' if decision.is_promoted else 'not promoted'}: {decision.reason}; "
            f"alone {decision.alone:.1%}, old {decision.old:.1%}, new {decision.new:.1%}"
        )
        config = dataclasses.replace(config, teacher=decision.teacher)


def serve_pair(config: Config, seats: Mapping[str, Seat]) -> None:
    """Answer requests as sessions, one trace each; strategies and skills learn from those that can be scored."""
    lock = (
        threading.Lock()
    )  # of the experience and the journal; and of the sampler, which takes one caller at a time
    is_embedded = any(is_batched(seat) for seat in seats.values())
    with TraceWriter(config.out / "traces.jsonl") as writer:
        settle_options(config)
        experience = Experience(config)
        for past in writer.outcomes():
            experience.learn(past)

        def answer(question: str, options: dict) -> Answer:
            this = dataclasses.replace(
                config,
                seed=options.get("seed", derive_seed(config.seed, uuid.uuid4().hex)),
                student_temperature=options.get("temperature", config.student_temperature),
                answer_tokens=min(options.get("max_tokens", config.answer_tokens), config.answer_tokens),
            )
            name = uuid.uuid4().hex[:24]
            with lock:
                session = new_session(name, Problem(name, question, None), experience, this)
                script = run_session(
                    session,
                    this,
                    list(experience.records[session.learning_key]),
                    seats["teacher"].count_tokens,
                )
            with lock if is_embedded else contextlib.nullcontext():
                (_,) = drive({name: script}, seats, config.workers, config.timeout)
            with lock:
                outcome, trace = record(session, experience, this)
                writer.append([trace])
                experience.learn(outcome)
            if not session.trials:
                raise UserError(session.fault)
            chosen = session.trials[session.chosen]
            return Answer(
                chosen.text,
                chosen.is_truncated,
                sum(outcome.prompt_tokens.values()),
                sum(outcome.tokens.values()),
            )

        serve(config, answer)


def open_seat_of(config: Config, spec: str, model: str | None = None, tools: str | None = None) -> Seat:
    return open_agent(
        spec, model=model, tools=tools, device=config.device, dtype=getattr(torch, config.dtype)
    )


def open_seats(config: Config) -> dict[str, Seat]:
    """Everybody a session may talk to, by the names that its calls use."""
    names = ("teacher", "judge", "large judge", "probe", "skill writer")
    wanted = {
        name: (
            getattr(config, name.replace(" ", "_")),
            getattr(config, f"{name.replace(' ', '_')}_model"),
            None,
        )
        for name in names
    }
    wanted["student"] = (config.student, config.student_model, config.student_tools)
    opened = {
        spec: open_seat_of(config, *spec) for spec in dict.fromkeys(wanted.values()) if spec[0] is not None
    }
    return {name: opened[spec] for name, spec in wanted.items() if spec in opened}


def find_teacher() -> str:
    """The nano world's teacher: trained by GRPO, or by SFT only where that has not happened yet."""
    for place in NANO_TEACHERS:
        if is_checkpoint(place):
            if place != NANO_TEACHERS[0]:
                print(f"there is no {NANO_TEACHERS[0]} yet; the teacher is {place}, before GRPO")
            return place
    raise UserError(
        f"no teacher in {' or '.join(NANO_TEACHERS)}; run `python train_grpo.py`, or name one with --teacher"
    )


def load_tasks(config: Config) -> list[Problem]:
    if (
        config.tasks is None
    ):  # the traces may train the next teacher, so the nano tasks are not those that eval.py holds out
        return world.held_out(config.domain, config.count, f"runtime/{config.seed}")
    bad: list[str] | None = [] if config.skip_bad else None
    tasks = load_problems(config.tasks, needs_answer=False, bad=bad)
    if bad:
        print(f"left out {len(bad)} malformed lines of {config.tasks}:", *bad, sep="\n  ")
    return tasks


def main() -> None:
    config = parse(Config, sys.argv[1:], with_deployment(PRESETS, sys.argv[1:]), __doc__)
    traces = config.out / "traces.jsonl"
    if config.export is not None:
        selected, total = export_traces(traces, config.export, config)
        print(
            f"{config.export}: {selected} of {total} traces; next: python train_grpo.py --traces {config.export}"
        )
        return
    if config.show is not None:
        print(*show_sessions(config.out, config.show), sep="\n")
        return
    if config.approve or config.quarantine:
        status = "approved" if config.approve else "quarantined"
        known = known_sessions(traces)
        for name in record_reviews(
            config.out / "reviews.jsonl",
            config.approve or config.quarantine,
            known,
            status,
            config.note,
            now(),
        ):
            print(f"{name} {status}")
        return
    if config.teacher is None:
        config = dataclasses.replace(config, teacher=find_teacher())
    if config.rounds:
        run_rounds(config, load_tasks(config))
        return
    if config.serve is not None:
        serve_pair(config, open_seats(config))
        return
    tasks, seats = load_tasks(config), open_seats(config)
    if config.restart:
        set_aside(config.out)
    print(summary(run(config, tasks, seats)))
    print(f"  traces             {traces}")


if __name__ == "__main__":
    run_script(main)
