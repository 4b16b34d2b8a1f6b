"""Experiments of many runs: each run is a job that writes a result file, and that file means it is done."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

from nano_atlas.errors import UserError
from nano_atlas.stats import in_points, paired_bootstrap

ROOT = Path(__file__).parents[1]


class Job(NamedTuple):
    result: Path  # the last thing that `run` writes
    run: Callable[[], None]
    threads: int = 1  # of each of its processes


def run_jobs(jobs: Sequence[Job], label: str) -> None:
    """Run the jobs that have no result yet, as many at a time as there are cores for their threads. A job that fails does not stop the
    others: it is reported at the end, and the same command tries it again."""
    failures, missing = [], [job for job in jobs if not job.result.exists()]

    def attempt(job: Job) -> None:
        try:
            job.run()
        except (subprocess.CalledProcessError, UserError) as error:
            failures.append(f"no {job.result}: {error}")
        progress.update()

    with tqdm(total=len(missing), desc=label, unit="job", disable=not missing) as progress:
        for threads in sorted({job.threads for job in missing}):
            with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // threads)) as pool:
                list(pool.map(attempt, [job for job in missing if job.threads == threads]))
    for failure in failures:
        print(failure, file=sys.stderr)


def call(log: Path, threads: int, *command: object) -> None:
    """Run `python COMMAND` with its output appended to `log`. Raises CalledProcessError."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, command)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        print("$", *words, file=file, flush=True)
        subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=environment, check=True)


def markdown(head: str, rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """A Markdown table; head: names of columns with " | " between them, of which the first `texts` are text, the others numbers."""
    columns = head.split(" | ")
    rule = ["---" if column < texts else "--:" for column in range(len(columns))]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, rule, *rows))


def mean_in_points(differences: Sequence[float]) -> str:
    """The mean of paired differences with its 95 % interval, in percentage points."""
    return in_points(fmean(differences), paired_bootstrap(differences))
