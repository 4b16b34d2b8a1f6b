"""How much of the sampler's own speed an evaluation keeps: 500 tasks of the nano world, all arms.

    python -m benchmarks.bench_eval     # checkpoints of `python train_sft.py` under runs/nano

Every request that an evaluation makes of a model is kept. Then each model gets all of its requests in one call of its sampler, as if
no answer depended on another. Prompts of different calls differ in their first token there, so that none is read only once.
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
    """A sampler that keeps the requests made of it, each just as long again."""

    def __init__(self, sampler):
        self.sampler, self.requests, self.calls, self.tokens = sampler, [], 0, 0

    def generate(self, requests, progress=None):
        rollouts = self.sampler.generate(requests)
        for request, rollout in ((r, rollout) for r, group in zip(requests, rollouts) for rollout in group):
            length, ids = len(rollout.completion_ids), (self.calls, *request.prompt_ids[1:])
            params = replace(request.params, max_tokens=length, stop_token_ids=())
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
            specs = {STUDENT: config.student, **config.teachers}
            seats = {name: config.open(spec) for name, spec in specs.items()}
            for seat in seats.values():
                seat.sampler = Kept(seat.sampler)
            kept = [seat.sampler for seat in seats.values()]
            arguments = config, tasks, log, answers.is_correct, seats.__getitem__
            evaluated.append(cpu_seconds(evaluation.evaluate, *arguments))
            alone.append(sum(cpu_seconds(k.sampler.generate, k.requests) for k in kept))
        size = f"{sum(s.tokens for s in kept):,} tokens in {sum(s.calls for s in kept)} calls"
        print(f"round {round}: {size}; CPU seconds {evaluated[-1]:.1f}, of the sampler alone {alone[-1]:.1f}")
    share = median(mine / whole for mine, whole in zip(alone, evaluated))
    print(f"of the sampler's throughput the evaluation keeps {100 * share:.1f} % (median)")


if __name__ == "__main__":
    run_script(main)
