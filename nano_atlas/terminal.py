"""Progress bars, on stderr."""

import sys

from tqdm import tqdm

from nano_atlas.errors import IS_SILENT

LOG_EVERY = 60.0  # seconds between two lines of a bar in a log


class Bar(tqdm):
    """The time left is a mean over steps, and unknown (`?`) until there are two.

    In a file or pipe a whole line now and then: a bar that draws over itself fills a log with control characters.
    """

    def __init__(self, *args, disable=False, **options):
        self.is_cold, self.is_log = True, not sys.stderr.isatty()
        log = {"mininterval": LOG_EVERY, "delay": LOG_EVERY, "leave": False} if self.is_log else {}
        super().__init__(*args, disable=disable or IS_SILENT, miniters=0, smoothing=0, **options | log)

    def step(self, count: int = 1, is_new: bool = True) -> None:
        """So many more are done. Counter and clock start after the first new step: it also loads, compiles, allocates."""
        if self.is_cold and not self.disable:
            self.initial, self.start_t, self.is_cold = self.n + count, self._time(), not is_new
        self.update(count)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:
        if not self.is_log:
            return super().display(msg, pos)
        if msg is None:
            self.fp.write(f"{self}\n")
