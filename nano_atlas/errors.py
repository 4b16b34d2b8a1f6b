"""What a script tells people on stderr, beside its progress bars: an error that ends it, and messages. stdout is for its result."""

import os
import sys

from tqdm import tqdm

IS_SILENT = os.environ.get("RANK", "0") != "0"  # of the processes that torchrun starts, only the first speaks


class UserError(Exception):
    """Something the user can fix; the message says what was wrong, where (file and line), and what to do."""


def say(message: str) -> None:
    if not IS_SILENT:
        (tqdm.write if sys.stderr.isatty() else print)(message, file=sys.stderr)  # above the bars
