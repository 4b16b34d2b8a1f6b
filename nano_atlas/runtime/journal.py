"""A JSONL file that one process at a time appends to, and that survives a kill at any instant."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nano_atlas.data import read_jsonl
from nano_atlas.errors import UserError


class Journal:
    """A last line without line break was torn by a crash and is cut off. Raises UserError if another process holds the file."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(
                f"{self.path}: another process is writing this file; wait for it or choose another --out"
            ) from None
        self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return read_jsonl(self.path) if self.path.stat().st_size else iter(())

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        lines = [json.dumps(record, allow_nan=False).encode() + b"\n" for record in records]
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
