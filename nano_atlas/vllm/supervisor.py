"""Runs a command until it ends or standard input says so, and leaves none of its descendants. Needs nothing but Python.

    python -I supervisor.py DIRECTORY COMMAND ...

The parent holds the other end of standard input, which the system closes however the parent ends, even by kill -9: then DIRECTORY
is deleted too ("" for none). A byte instead spares it. (A death signal for the server alone would miss the engine, its child.)
"""

import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

PATIENCE = 10.0  # seconds between asking the process group to end and killing it

if __name__ == "__main__":
    directory, *command = sys.argv[1:]
    child, is_orphan = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True), False
    while child.poll() is None:
        if select.select([0], [], [], 0.2)[0]:
            is_orphan = not os.read(0, 1)
            os.killpg(child.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                child.wait(PATIENCE)
            break
    with suppress(ProcessLookupError):  # all have ended already
        os.killpg(child.pid, signal.SIGKILL)  # an orphaned engine would keep its memory and its cores
    if directory and is_orphan:
        shutil.rmtree(directory, ignore_errors=True)
    sys.exit(min(abs(child.wait()), 255))
