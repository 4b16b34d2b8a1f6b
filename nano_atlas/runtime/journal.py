"""A journal: a JSONL file that is only ever appended to, by one process at a time, and survives kill -9 at any instant.

A record is one line that ends with the CRC-32 of all before it, `..., "crc32": "89abcdef"}`; any JSON reader reads it.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nano_atlas.errors import UserError

TAIL = len(', "crc32": "00000000"}')


def to_line(record: dict[str, Any]) -> bytes:
    """Raises ValueError for a number that is not finite, which JSON does not have."""
    body = json.dumps(record, allow_nan=False)[:-1].encode()  # ASCII, so half a surrogate pair is kept too
    return body + b', "crc32": "%08x"}\n' % zlib.crc32(body)


def is_whole(line: bytes) -> bool:
    """Whether the checksum at the end of the line is that of the rest."""
    end = len(line) - TAIL - line.endswith(b"\n")
    return end > 0 and line[end : end + TAIL] == b', "crc32": "%08x"}' % zlib.crc32(memoryview(line)[:end])


def read_lines(path: Path | str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of each record; also of a JSONL file without checksums, such as atlas-sdk writes.

    A last line that its writer has not finished is no record yet. Raises UserError for a file that is missing or empty, and for a
    record that does not match its checksum.
    """
    path, number = Path(path), 0
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if is_whole(line):
                yield number, line
            elif b', "crc32": "' in line[-TAIL - 1 :]:
                raise UserError(
                    f"{path}:{number}: damaged, the record does not match its checksum; delete this line"
                )
            elif not line.isspace() and (line.endswith(b"\n") or line.rstrip().endswith(b"}")):
                yield number, line
    if not number:
        raise UserError(f"{path}: empty; it should have one JSON object per line")


class Journal:
    """Appends to a file that no other process may write meanwhile; a last line that a crash tore is cut off.

    Raises UserError if another process holds the file.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(
                self._file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the system releases it when the process ends, in any way
        except OSError:
            self._file.close()
            raise UserError(
                f"{self.path}: another process is writing this file; wait for it or choose another --out"
            ) from None
        self._mend()

    def _mend(self) -> None:
        size = end = self._file.seek(0, os.SEEK_END)
        last = b""
        while end > 0 and b"\n" not in last:  # backwards, because the file may be large
            start = max(0, end - 2**16)
            self._file.seek(start)
            last, end = self._file.read(end - start) + last, start
        torn = last.rpartition(b"\n")[2]
        if torn and is_whole(torn):
            self._file.write(b"\n")
        elif torn:
            self._file.truncate(size - len(torn))
        self._sync()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Returns when the records are on the disk."""
        self._file.write(b"".join([to_line(record) for record in records]))
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
