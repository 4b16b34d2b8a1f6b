"""How much of the sampler's own speed an evaluation keeps: 500 tasks of the nano world, all arms.

    python benchmarks/bench_eval.py                               # checkpoints of `python train_sft.py` under runs/nano
    python benchmarks/bench_eval.py --chunk 256                   # what writing more often costs

An evaluation is run, and every request that it makes of a model is kept. Then each model gets all of its requests in one call of
its sampler, as if no answer depended on another: as many tokens at the sampler's own speed. Prompts that the evaluation had to send in
different calls differ in their first token there, so that the one call does not save reading them again. Both take turns; CPU time is
counted, because it says more than the clock on a machine that is shared.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from operator import truediv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import eval as evaluation  # noqa: E402
from nano_atlas import protocol, world  # noqa: E402
from nano_atlas.benches.results import TaskLog  # noqa: E402
from nano_atlas.config import parse  # noqa: E402
from nano_atlas.sampler import Request  # noqa: E402


class Kept:
    """A sampler that keeps the requests made of it."""

    def __init__(self, sampler):
        self.sampler, self.requests, self.calls, self.tokens = sampler, [], 0, 0

    def generate(self, requests, progress=None):
        rollouts = self.sampler.generate(requests)
        for request, group in zip(requests, rollouts):
            for rollout in group:
                params = replace(
                    request.params, max_tokens=len(rollout.completion_ids), stop_token_ids=()
                )  # just as long again
                self.requests.append(
                    Request((self.calls, *request.prompt_ids[1:]), params, seed=len(self.requests))
                )
                self.tokens += params.max_tokens
        self.calls += 1
        return rollouts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", default=str(world.STUDENT))
    parser.add_argument("--teacher", nargs="*", default=["sft=runs/nano/teacher-sft/model"])
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--chunk", type=int, default=evaluation.PRESETS["nano"].overrides["chunk"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tasks = {"math": world.held_out("math", options.tasks, 0)}
    evaluated, alone = [], []
    for round in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            argv = [
                "--student",
                options.student,
                "--teacher",
                *options.teacher,
                "--chunk",
                str(options.chunk),
                "--out",
                folder,
            ]
            config = parse(evaluation.Config, argv, evaluation.PRESETS, "")
            seats = {
                name: config.open(spec, None)
                for name, spec in {"student": config.student, **config.teachers}.items()
            }
            for seat in seats.values():
                seat.sampler = Kept(seat.sampler)
            log = TaskLog(Path(folder, "tasks.jsonl"))
            start = time.process_time()
            evaluation.evaluate(
                config, tasks, log, protocol.is_correct, lambda: seats["student"], seats.__getitem__
            )
            evaluated.append(time.process_time() - start)
            log.close()
            start = time.process_time()
            for seat in seats.values():
                seat.sampler.sampler.generate(seat.sampler.requests)
            alone.append(time.process_time() - start)
            tokens, calls = (
                sum(getattr(seat.sampler, name) for seat in seats.values()) for name in ("tokens", "calls")
            )
            print(
                f"round {round}: {tokens:,} tokens in {calls} calls; CPU time of the evaluation {evaluated[-1]:.1f} s, "
                f"of the sampler alone {alone[-1]:.1f} s: {100 * alone[-1] / evaluated[-1]:.1f} %"
            )
    print(
        f"of the sampler's own throughput the evaluation keeps {100 * statistics.median(map(truediv, alone, evaluated)):.1f} % (median), "
        f"{100 * min(alone) / min(evaluated):.1f} % by the fastest of each"
    )


if __name__ == "__main__":
    main()
