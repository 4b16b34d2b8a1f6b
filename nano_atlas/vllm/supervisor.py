"""Runs a command and ends it, with all its descendants, once the process that wanted it is gone. Needs nothing but Python.

    python -I supervisor.py DIRECTORY COMMAND ...

The parent holds the other end of standard input. However the parent ends, by kill -9 too, the system closes that pipe; then the
command's process group is ended and DIRECTORY ("" for none) is deleted. A byte on the pipe ends the command and spares the
directory. (A death signal set in the server alone would miss the engine, which is a child of the server.)
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time

PATIENCE = 10.0  # seconds between asking the group to end and ending it


def signal_group(leader: int, number: int) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        pass  # all of the group has ended already


def main() -> int:
    directory, *command = sys.argv[1:]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while child.poll() is None and not select.select([0], [], [], 0.2)[0]:
        pass
    is_alone = child.poll() is None and not os.read(0, 1)
    if child.poll() is None:
        signal_group(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    signal_group(child.pid, signal.SIGKILL)  # an orphaned engine would keep its memory and its cores
    if directory and is_alone:
        shutil.rmtree(directory, ignore_errors=True)
    return child.wait()


if __name__ == "__main__":
    sys.exit(min(abs(main()), 255))
