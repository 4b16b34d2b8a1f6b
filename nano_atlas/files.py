"""JSON files, files and directories that are replaced as a whole, and digests of what a run depends on."""

import ctypes
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nano_atlas.errors import UserError


def read_json(path: Path) -> dict:
    """The JSON object in a file, or an empty one where there is no such file. Raises UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the file anew from its source") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def write_json(path: Path, value: dict) -> None:
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends without an exception: a reader, or a process killed meanwhile,
    finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """Of names and contents, in the given order: the same files under another directory have the same digest."""
    parts: list[bytes] = []
    for path in paths:
        with path.open("rb") as file:
            parts += [path.name.encode(), hashlib.file_digest(file, "sha256").digest()]
    return digest(parts)


def checkpoint_digest(path: Path) -> str:
    """Of what makes a checkpoint directory answer as it does: weights, configuration, tokenizer and chat template."""
    patterns = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "*.jinja")
    return files_digest(sorted(file for pattern in patterns for file in path.glob(pattern)))


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a new directory to fill, which takes the place of `path` when the block ends without an exception.

    A reader, or a process killed at any moment, finds the old directory or the new one. What killed processes left lying beside
    `path` is removed. Where the system cannot exchange two directories (not Linux, some network file systems) there is an
    instant without `path`; a kill at that instant is mended by the next call.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    for entry in path.parent.iterdir():
        leftover = re.fullmatch(rf"(?:\.(saving|replaced)-(\d+)-)+{re.escape(path.name)}", entry.name)
        if leftover and not _is_another_live_process(int(leftover[2])):
            if leftover[1] == "replaced" and not path.exists():
                entry.rename(path)
            else:
                shutil.rmtree(entry)
    folder = path.parent / f".saving-{os.getpid()}-{path.name}"
    folder.mkdir()
    try:
        yield folder
        for file in filter(Path.is_file, folder.rglob("*")):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())  # the contents reach the disk before the name does
        if path.exists():
            _exchange(folder, path)
        else:
            folder.rename(path)
    finally:
        if folder.exists():
            shutil.rmtree(folder)  # the incomplete new directory, or the old one after the exchange


def _exchange(first: Path, second: Path) -> None:
    """Swaps two directories in one step by Linux's renameat2(RENAME_EXCHANGE), or in three where there is no such call."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 is None or renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) != 0:
        aside = second.parent / f".replaced-{os.getpid()}-{second.name}"
        second.rename(aside)
        first.rename(second)
        aside.rename(first)


def _is_another_live_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()
