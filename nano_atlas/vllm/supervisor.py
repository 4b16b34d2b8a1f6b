"""python -I supervisor.py DIRECTORY COMMAND ... runs a command, and kills its process group if a byte arrives on stdin.

The parent holds the other end of stdin. If the parent ends, even by kill -9, stdin closes; then DIRECTORY is deleted too
("" for none). (PR_SET_PDEATHSIG would only reach the server, not its child, the engine.) Only the standard library.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL

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
        os.killpg(child.pid, signal.SIGKILL)  # an orphaned engine would keep its memory and cores
    if directory and is_orphan:
        shutil.rmtree(directory, ignore_errors=True)
    sys.exit(min(abs(child.wait()), 255))
