"""How much of the sampler's own speed an evaluation keeps: 500 tasks of the nano world, all arms.

    python -m benchmarks.bench_eval                               # checkpoints of `python train_sft.py` under runs/nano
    python -m benchmarks.bench_eval --chunk 256                   # what writing more often costs

An evaluation is run, and every request that it makes of a model is kept. Then each model gets all of its requests in one call of
its sampler, as if no answer depended on another: as many tokens at the sampler's own speed. Prompts that the evaluation had to send in
different calls differ in their first token there, so that the one call does not save reading them again. Times are CPU times.
"""

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import eval as evaluation
from nano_atlas import answers, world
from nano_atlas.benches.arms import STUDENT, TaskLog
from nano_atlas.config import option, parse, run_script
from nano_atlas.presets import presets
from nano_atlas.sampler import Request


@dataclass(frozen=True)
class Config:
    student: str = option(str(world.STUDENT), "checkpoint directory")
    teacher: tuple[str, ...] = option(("sft=runs/nano/teacher-sft/model",), "NAME=DIRECTORY, one or more")
    tasks: int = option(500, "of the math domain", above=0)
    chunk: int = option(evaluation.CHUNK, "answers per arm between two writes", above=0)
    rounds: int = option(5, "evaluations, and calls of the sampler alone", above=0)


class Kept:
    """A sampler that keeps the requests made of it."""

    def __init__(self, sampler):
        self.sampler, self.requests, self.calls, self.tokens = sampler, [], 0, 0

    def generate(self, requests, progress=None):
        rollouts = self.sampler.generate(requests)
        for request, group in zip(requests, rollouts):
            for rollout in group:  # just as long again
                length = len(rollout.completion_ids)
                params = replace(request.params, max_tokens=length, stop_token_ids=())
                ids = self.calls, *request.prompt_ids[1:]
                self.requests.append(Request(ids, params, seed=len(self.requests)))
                self.tokens += length
        self.calls += 1
        return rollouts


def cpu_seconds(work, *arguments) -> float:
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


def main() -> None:
    options = parse(Config, sys.argv[1:], {}, __doc__)
    evaluation.CHUNK = options.chunk
    tasks = {"math": world.held_out("math", options.tasks, 0)}
    evaluated, alone = [], []  # CPU seconds
    for round in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder, TaskLog(Path(folder, "tasks.jsonl")) as log:
            argv = ["--student", options.student, "--teacher", *options.teacher, "--out", folder]
            config = parse(evaluation.Config, argv, presets("eval"), "")
            seats = {STUDENT: config.open(config.student)}
            seats |= {name: config.open(spec) for name, spec in config.teachers.items()}
            for seat in seats.values():
                seat.sampler = Kept(seat.sampler)
            kept = [seat.sampler for seat in seats.values()]
            work = evaluation.evaluate, config, tasks, log, answers.is_correct, seats.__getitem__
            evaluated.append(cpu_seconds(*work))
            alone.append(sum(cpu_seconds(sampler.sampler.generate, sampler.requests) for sampler in kept))
        tokens, calls = sum(sampler.tokens for sampler in kept), sum(sampler.calls for sampler in kept)
        print(
            f"round {round}: {tokens:,} tokens in {calls} calls; CPU time of the evaluation {evaluated[-1]:.1f} s, "
            f"of the sampler alone {alone[-1]:.1f} s: {100 * alone[-1] / evaluated[-1]:.1f} %"
        )
    share = median(100 * mine / whole for mine, whole in zip(alone, evaluated))
    fastest = 100 * min(alone) / min(evaluated)
    print(
        f"of the sampler's throughput the evaluation keeps {share:.1f} % (median), {fastest:.1f} % by the fastest"
    )


if __name__ == "__main__":
    run_script(main)
