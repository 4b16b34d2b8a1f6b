"""How wide results are, and progress bars, on stderr."""

import sys

from tqdm import tqdm

from nano_atlas.errors import IS_SILENT

WIDTH = 100  # columns of what is printed without --full
LOG_EVERY = 60.0  # seconds between two lines of a bar in a log


class Bar(tqdm):
    """The time left is estimated from the mean time per step, and `?` before the second step.

    In a file or pipe it prints a line now and then, because redrawing would fill a log with control characters.
    """

    def __init__(self, *args, disable=False, **options):
        self.is_cold, self.is_log = True, not sys.stderr.isatty()
        log = {"mininterval": LOG_EVERY, "delay": LOG_EVERY, "leave": False} if self.is_log else {}
        super().__init__(*args, disable=disable or IS_SILENT, miniters=0, smoothing=0, **options | log)

    def step(self, count: int = 1, is_new: bool = True) -> None:
        """Counts steps. The clock starts after the first new one, because that also loads, compiles and allocates."""
        if self.is_cold and not self.disable:
            self.initial, self.start_t, self.is_cold = self.n + count, self._time(), not is_new
        self.update(count)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        if not self.is_log:
            return super().display(msg, pos)
        if msg is None:
            self.fp.write(f"{self}\n")
