"""What a run leaves on disk: JSON, files and directories replaced as a whole, metrics, and digests of what it depends on."""

import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from nano_atlas.distributed import rank
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


class RunLog:
    """Appends records `{"step": 12, "loss": 1.5, ...}` to `directory/filename`, each flushed as it is written.

    A run that starts or continues after `resumed_step` will compute the later steps again, so their records are dropped first:
    every step is in the file once. `config` goes to wandb only.
    Raises UserError when the file is damaged, or when a wandb project is named but wandb is not installed.
    """

    def __init__(
        self,
        directory: Path,
        resumed_step: int = 0,
        *,
        filename: str = "metrics.jsonl",
        wandb_project: str = "",
        wandb_run_name: str = "",
        config: dict[str, Any] | None = None,
    ):
        self.path = Path(directory) / filename
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_first = rank() == 0  # the other ranks write nothing
        if is_first and self.path.exists():
            _keep_until(self.path, resumed_step)
        self._file = (self.path if is_first else Path(os.devnull)).open("a", encoding="utf-8")
        self._wandb = None
        if wandb_project and is_first:
            try:
                import wandb
            except ImportError:
                raise UserError(
                    "--wandb-project needs wandb: pip install wandb, or leave the option out"
                ) from None
            id_file = self.path.with_name(
                "wandb_run.txt"
            )  # the run's id, so that a continued run goes on in the same graph
            if resumed_step == 0 or not id_file.exists():
                id_file.write_text(uuid.uuid4().hex)
            self._wandb = wandb.init(
                project=wandb_project,
                name=wandb_run_name or self.path.resolve().parent.name,
                id=id_file.read_text(),
                resume="allow",
                config=config,
            )

    def log(self, step: int, **metrics: Any) -> None:
        """Write one record: floats to 6 significant digits, or null if not finite; a metric that is None is left out."""
        record = {name: _rounded(value) for name, value in metrics.items() if value is not None}
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(record, step=step)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _keep_until(path: Path, last_step: int) -> None:
    """Rewrite the file, atomically, without the records after `last_step` and without a half-written last line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            if number < len(
                lines
            ):  # a torn last line is what an interrupted write leaves; anywhere else it is damage
                raise UserError(
                    f"{path}:{number}: not a metrics record; mend or delete the file, or use --restart"
                ) from None
    replace_text(path, "".join(line + "\n" for line in kept))
