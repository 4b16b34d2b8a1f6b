"""How fast traces are replayed, exported and loaded, and in how much memory.

python -m benchmarks.bench_traces [COUNT]
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

from nano_atlas import world
from nano_atlas.data import Problem, load_problems
from nano_atlas.runs import Journal
from nano_atlas.runtime.guard import Trial
from nano_atlas.runtime.judges import Verdict
from nano_atlas.runtime.lanes import Session
from nano_atlas.runtime.review import Selection, export_traces
from nano_atlas.runtime.traces import past_outcomes, session_record


def make_trace(index: int, task: world.Task) -> dict:
    """A session of the nano world as the lane paired leaves it; one in two has a gain."""
    right = Trial("guided", task.solution, task.answer, 40, False, Verdict(1.0, "exact", True))
    wrong = Trial("alone", task.solution, "?", 40, False, Verdict(float(index % 2), "exact", False))
    teaching = world.plan(task.chain)
    said = {"tokens": 40, "prompt_tokens": 100, "is_truncated": False, "text": teaching}
    actors = {"probe": "student", "alone": "student", "teaching": "teacher", "guided": "student"}
    session = Session(
        f"{index:024x}", Problem(f"t{index}", f"{index} {task.question}", task.answer, "math"), 0
    )
    session.lane, session.learning_key, session.created_at = "paired", "math", "2026-01-01T00:00:00.000+00:00"
    session.approach, session.teachings, session.trials = teaching, [teaching], [wrong, right]
    session.events = [{"event": kind, "actor": actor, **said} for kind, actor in actors.items()]
    session.chosen, session.reward = 1, 1.9
    return session_record(session, review="approved", metadata={}, learning_history={"count": index})[1]


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    tasks = world.tasks("math", 1000, "bench")
    with tempfile.TemporaryDirectory() as folder:
        path, half = Path(folder) / "traces.jsonl", Path(folder) / "half.jsonl"
        with Journal(path) as journal:
            journal.append(make_trace(index, tasks[index % 1000]) for index in range(count))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{count:,} traces, {path.stat().st_size / 1e6:,.0f} MB")

        def measure(name, function) -> None:
            wall, used = time.perf_counter(), time.process_time()
            done = function()
            wall, used = time.perf_counter() - wall, time.process_time() - used
            more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1e3
            rates = f"{done / used:>9,.0f} /s of processor time, {done / wall:>9,.0f} /s"
            print(f"{name:<30} {done:>9,} records, {wall:6.1f} s, {rates}, peak memory +{more:,.0f} MB")

        with Journal(path) as journal:
            measure("start (replay of outcomes)", lambda: sum(1 for _ in past_outcomes(journal)))
        measure("export of those with a gain", lambda: export_traces(path, half, Selection(min_gain=0.5))[1])
        measure("load as training problems", lambda: len(load_problems(path)))


if __name__ == "__main__":
    main()
