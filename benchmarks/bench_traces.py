"""How fast 100,000 traces are written, exported and loaded, and in how much memory.

python -m benchmarks.bench_traces [COUNT]
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

from nano_atlas import world
from nano_atlas.data import Problem
from nano_atlas.runtime.export import export_traces
from nano_atlas.runtime.guard import Trial
from nano_atlas.runtime.journal import to_line
from nano_atlas.runtime.judges import Verdict
from nano_atlas.runtime.lanes import Session
from nano_atlas.runtime.traces import Selection, TraceWriter, problems_from_traces, session_outcome, trace_of


def make_trace(index: int, task: world.Task) -> dict:
    """A session of the nano world as the lane paired leaves it; one in two has a gain."""
    right = Trial("guided", task.solution, task.answer, 40, False, Verdict(1.0, "exact", True))
    wrong = Trial("alone", task.solution, "?", 40, False, Verdict(float(index % 2), "exact", False))
    teaching = world.plan(task.chain)
    events = [
        {
            "event": kind,
            "actor": actor,
            "tokens": 40,
            "prompt_tokens": 100,
            "is_truncated": False,
            "text": teaching,
        }
        for kind, actor in (
            ("probe", "student"),
            ("alone", "student"),
            ("teaching", "teacher"),
            ("guided", "student"),
        )
    ]
    session = Session(f"{index:024x}", Problem(f"t{index}", f"{index} {task.question}", task.answer, task.domain), 0, "adaptive", task.domain,
                      lane="paired",
                      created_at="2026-01-01T00:00:00.000+00:00", approach=teaching, teachings=[teaching], trials=[wrong, right],
                      events=events, chosen=1, reward=1.9)  # fmt: skip
    return trace_of(session, session_outcome(session, "approved", {}), {}, {"count": index})


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    tasks = world.tasks("math", 1000, "bench")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traces.jsonl"
        with path.open("wb") as file:
            for index in range(count):
                file.write(to_line(make_trace(index, tasks[index % 1000])))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{count:,} traces, {path.stat().st_size / 1e6:,.0f} MB")

        def measure(name, function) -> None:
            wall, used = time.perf_counter(), time.process_time()
            done = function()
            wall, used = time.perf_counter() - wall, time.process_time() - used
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(
                f"{name:<34} {done:>9,} records   {count / used:>9,.0f} /s of processor time   {count / wall:>9,.0f} /s   peak memory "
                f"+{(peak - memory) / 1e3:,.0f} MB"
            )

        half = Path(folder) / "half.jsonl"
        with TraceWriter(path) as writer:
            measure("start (mend, replay outcomes)", lambda: sum(1 for _ in writer.outcomes()))
        measure("export of those with a gain", lambda: export_traces(path, half, Selection(min_gain=0.5))[1])
        measure("load all as training problems", lambda: len(problems_from_traces(path)[0]))


if __name__ == "__main__":
    main()
