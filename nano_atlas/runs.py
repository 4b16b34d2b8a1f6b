"""What a run leaves on disk: files replaced as a whole, journals that are only appended to, metrics, and digests."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from nano_atlas.config import refuse_changes, to_json
from nano_atlas.distributed import rank
from nano_atlas.errors import UserError
from nano_atlas.text import parse_json


def read_json(path: Path) -> dict:
    """The JSON object in a file, or an empty one where there is no such file. Raises UserError."""
    try:
        value = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # no JSON, or no UTF-8
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
    """A new file that takes the place of `path` when the block ends without an exception; until then the old one is there."""
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
    patterns = (
        "*.safetensors config.json generation_config.json tokenizer* *.jinja special_tokens_map.json".split()
    )
    return files_digest(sorted(file for pattern in patterns for file in path.glob(pattern)))


def keep_to(config: Any, path: Path, contents: Mapping[str, str]) -> None:
    """A directory holds one experiment: writes its options to `path`, and digests of whatever else a name may come to mean.

    Raises UserError for other options or contents than those it began with.
    """
    if saved := read_json(path):
        refuse_changes(config, saved["config"], str(path.parent))
        if changed := [name for name in contents if saved["contents"].get(name) != contents[name]]:
            what = f"{path.parent} was begun with other contents than now: {', '.join(changed)}"
            raise UserError(f"{what}; choose another --out, or start over with --restart")
    write_json(path, {"config": to_json(config), "contents": contents})


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields a new directory to fill, which takes the place of `path` when the block ends without an exception.

    Killed at any moment it leaves the old directory or the new one, the old one perhaps under another name until the next call.
    """
    path = Path(path).resolve()
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        for file in filter(Path.is_file, new.rglob("*")):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # the contents reach the disk before the name does
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def refuse(message: str) -> NoReturn:
    raise UserError(message)


def read_jsonl(path: Path | str, complain=refuse, is_journal=False) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) for each line that is not blank. Raises UserError for a file that is missing or empty.

    complain: is told of a line that is not UTF-8, not JSON or not an object, which is left out if it does not raise.
    is_journal: a `Journal` may be writing the file, which is empty at first; a last line without its line break is not a record yet.
    """
    path, is_empty = Path(path), True
    try:
        opened = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from error
    with opened as file:
        for number, raw in enumerate(file, start=1):
            if raw.isspace() or (is_journal and not raw.endswith(b"\n")):
                continue
            try:
                record, fault = parse_json(raw), None
                if not isinstance(record, dict):
                    fault = f"a JSON {type(record).__name__}, but each line must be an object, {{...}}"
            except UnicodeDecodeError as error:
                fault = f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8"
            except ValueError as error:
                is_syntax = isinstance(error, json.JSONDecodeError)
                place = f"{error.msg} at column {error.colno}" if is_syntax else str(error).partition(";")[0]
                fault = f"not JSON ({place}); each line must be one JSON object, {{...}}"
                if is_empty and raw.strip()[-1:] in (b"[", b"{", b","):
                    fault += "; this is one JSON array or object over several lines: one object per line"
            is_empty = False
            if fault is None:
                yield number, record
            else:
                complain(f"{path}:{number}: {fault}")
    if is_empty and not is_journal:
        raise UserError(f"{path}: empty; it should have one JSON object per line")


def _to_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"  # ASCII: writable, whatever the texts are


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with replacing(path) as file:
        file.writelines(map(_to_line, records))


class Journal(AbstractContextManager):
    """A JSONL file that is only ever appended to, by one process at a time, and survives kill -9 at any instant.

    A last line that a crash tore is cut off when the file is opened. Raises UserError if another process has the file open.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, however it does
        except OSError:
            self._file.close()
            remedy = "wait for its end, or choose another --out"
            raise UserError(f"{path}: another process writes it; {remedy}") from None
        self._file.seek(0)
        self._file.truncate(sum(len(line) for line in self._file if line.endswith(b"\n")))

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line number, record) of all that is in the file. Raises UserError for a damaged line."""
        return read_jsonl(self.path, is_journal=True)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Returns when the records are on the disk."""
        self._file.write(b"".join(map(_to_line, records)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def keep(self, lines: int) -> None:
        """Drop all but the first lines."""
        self._file.seek(0)
        self._file.truncate(sum(len(self._file.readline()) for _ in range(lines)))

    def __exit__(self, *exception: object) -> None:
        self._file.close()


class RunLog(ExitStack):
    """A record `{"step": 12, "loss": 1.5, ...}` per line; given the run's config, also on Weights & Biases if WANDB_PROJECT is set.

    A run that continues after `resumed_step` computes the later steps again, so their records are dropped first: every step is in
    the file once. Only rank 0 writes. Raises UserError when the file is damaged.
    """

    def __init__(self, path: Path, resumed_step: int = 0, config: Any = None):
        super().__init__()
        self._journal = self._wandb = None
        if rank() > 0:
            return
        self._journal = self.enter_context(Journal(path))
        steps = []
        for number, record in self._journal.records():
            if "step" not in record:
                raise UserError(f"{path}:{number}: no metrics record; fix or delete it, or use --restart")
            steps.append(record["step"])
        self._journal.keep(sum(step <= resumed_step for step in steps))
        if config is not None and (project := os.environ.get("WANDB_PROJECT")):
            try:
                import wandb
            except ImportError:
                raise UserError("WANDB_PROJECT needs a package: pip install wandb, or unset it") from None
            id_file = path.with_name("wandb_run.txt")  # so that a continued run goes on in the same graph
            if resumed_step == 0 or not id_file.exists():
                id_file.write_text(uuid.uuid4().hex)
            options = {"project": project, "name": path.resolve().parent.name, "config": config}
            self._wandb = wandb.init(**options, id=id_file.read_text(), resume="allow")
            self.callback(self._wandb.finish)

    def log(self, step: int, **metrics: Any) -> None:
        """Write one record: floats to 6 significant digits, or null if not finite."""
        for name, value in metrics.items():
            if isinstance(value, float):
                metrics[name] = float(f"{value:.6g}") if math.isfinite(value) else None
        if self._journal is not None:
            self._journal.append([{"step": step, **metrics}])
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
