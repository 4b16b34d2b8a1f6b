"""Runs a command, and ends it and all its descendants once the process that wanted it is gone. Needs nothing but Python.

    python -I supervisor.py DIRECTORY COMMAND ...

The parent holds the other end of standard input. However the parent ends, even by kill -9, the system closes that pipe; then the
command's process group is killed and DIRECTORY ("" for none) is deleted. A byte on the pipe ends the command and spares the
directory. (A death signal set on the server alone would miss the engine, which is a child of the server.)
"""

import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

PATIENCE = 10.0  # seconds between asking the group to end and killing it


def main() -> int:
    directory, *command = sys.argv[1:]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    is_orphan = False
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
    return child.wait()


if __name__ == "__main__":
    sys.exit(min(abs(main()), 255))
