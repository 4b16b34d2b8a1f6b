"""Messages and errors for people, on stderr beside the progress bars. stdout is for a script's result."""

import os
import sys

from tqdm import tqdm

IS_SILENT = os.environ.get("RANK", "0") != "0"  # under torchrun only rank 0 prints


class UserError(Exception):
    """Something the user can fix; the message says what was wrong, where (file and line), and what to do."""


def say(message: str) -> None:
    if not IS_SILENT:
        (tqdm.write if sys.stderr.isatty() else print)(message, file=sys.stderr)  # tqdm.write: above the bars
