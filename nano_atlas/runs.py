"""A run's files: atomically replaced files and directories, append-only journals, metrics, digests."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from nano_atlas.config import flag_of, refuse_changes, to_json
from nano_atlas.distributed import rank, wait
from nano_atlas.errors import UserError, say
from nano_atlas.text import parse_json

# `atomic_directory` writes each file's digest here: it shows which files are ours and whether they are intact.
DIGESTS = "digests.json"
FOLDERS = "model", "best", "adapter"  # of a training run, beside its states
FILES = "metrics.jsonl", "episodes.jsonl"


def read_json(path: Path) -> dict:
    """The JSON object in a file, {} if there is no such file. Raises UserError."""
    try:
        value = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def write_json(path: Path, value: dict) -> None:
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace_text(path: Path, text: str | bytes) -> None:
    """Writes a temporary file that replaces `path` when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(text if isinstance(text, bytes) else text.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(parts: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """Digest of file names and contents, in the given order; it does not depend on the directory."""
    parts: list[bytes] = []
    for path in paths:
        with path.open("rb") as file:
            parts += [path.name.encode(), hashlib.file_digest(file, "sha256").digest()]
    return digest(parts)


def find_checkpoint(spec: str | Path) -> Path:
    """The directory `spec`; if there is none, that of the repository `spec` in the Hugging Face Hub's cache."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"), f"models--{spec}".replace("/", "--"))
    main = cache.expanduser() / "refs/main"
    is_cached = not os.path.exists(spec) and os.path.isfile(main)  # os.path: a name may be of any length
    return main.parents[1] / "snapshots" / main.read_text().strip() if is_cached else Path(spec)


def checkpoint_digest(spec: str | Path) -> str:
    """Digest of a checkpoint's weights, configuration, tokenizer and chat template."""
    patterns = "*.safetensors config.json generation_config.json tokenizer* *.jinja special_tokens_map.json"
    found = (file for pattern in patterns.split() for file in find_checkpoint(spec).glob(pattern))
    return files_digest(sorted(found))


def kept(path: Path) -> dict:
    """What `keep_to` wrote to `path`; {} if there is no such file. Raises UserError."""
    saved = read_json(path)
    if saved and not all(isinstance(saved.get(part), dict) for part in ("config", "contents")):
        raise UserError(f"{path} does not hold a run's options; choose another --out")
    return saved


def refuse_foreign(record: Path, written: Iterable[str]) -> None:
    """Raises UserError if `record` is missing, but files that match `written` (patterns) are in its directory."""
    found = [path for pattern in written for path in sorted(record.parent.glob(pattern))]
    if found and not record.exists():
        raise UserError(f"{found[0]} belongs to no run here (no {record.name}); choose another --out")


def keep_to(config: Any, path: Path, contents: Mapping[str, str], written: Iterable[str]) -> None:
    """Writes a run's options and the digests `contents` to `path`. Raises UserError if the run began with others."""
    refuse_foreign(path, written)
    if saved := kept(path):
        refuse_changes(config, saved["config"], str(path.parent))
        if changed := [name for name in contents if saved["contents"].get(name) != contents[name]]:
            what = f"{path.parent} was started with other contents: {', '.join(changed)}"
            raise UserError(f"{what}; choose another --out, or start over with --restart")
    write_json(path, {"config": to_json(config), "contents": contents})


@contextmanager
def atomic_directory(path: str | Path, has_digests=True, **about: Any) -> Iterator[Path]:
    """Yields a new directory; it replaces `path` when the block ends without an exception.

    Killed at any moment, it leaves the old or the new one (the old one may be renamed until the next call).
    Raises UserError if `path` holds files not written here. about: is added to digests.json.
    """
    path = Path(path).resolve()
    refuse_strangers(path)
    new, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        files = sorted(new.iterdir())
        digests = {file.name: has_digests and files_digest([file]) for file in files}
        write_json(new / DIGESTS, about | {"files": digests})
        for file in (*files, new / DIGESTS):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # contents must be on the disk before the rename
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def strangers(path: Path) -> list[str]:
    """The names at a path that `atomic_directory` did not write."""
    entries = path.iterdir() if path.is_dir() else filter(Path.exists, [path])
    return sorted({entry.name for entry in entries} - {DIGESTS, *_digests(path)})


def refuse_strangers(path: Path) -> None:
    if found := strangers(path):
        remedy = "move it, or choose another directory"
        raise UserError(f"{path} holds files that no run has written ({', '.join(found[:5])}); {remedy}")


def refuse_damage(path: Path) -> None:
    """Raises UserError if a file is not what `atomic_directory` wrote; directories without digests pass."""
    unreadable = {DIGESTS: "another digest"} if os.path.isfile(path / DIGESTS) else {}
    for name, known in (_digests(path) or unreadable).items():
        if not (path / name).is_file() or known and files_digest([path / name]) != known:
            remedy = f"copy it again, or delete {DIGESTS} beside it if the change is yours"
            raise UserError(f"{path / name} is damaged or was changed; {remedy}")


def _digests(path: Path) -> dict[str, Any]:
    """{file: digest}; {} if it cannot be read."""
    with suppress(UserError, AttributeError):
        return dict(read_json(path / DIGESTS).get("files", {}).items())
    return {}


def claim(path: Path) -> BinaryIO:
    """The file, locked for this process until it is closed or the process ends. Raises UserError if it is locked."""
    if path.parent.is_file():
        raise UserError(f"{path.parent} is a file; --out must be a directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        remedy = "wait until it ends, or choose another --out"
        raise UserError(f"{path}: another process is writing it; {remedy}") from None
    return file


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Locks a run's directory (UserError if another process has the lock); removes a new one if nothing was written."""
    made, lock = [place for place in (out, *out.parents) if not place.exists()], out / ".lock"
    with claim(lock) if rank() == 0 else nullcontext():
        try:
            yield
        finally:
            if made and rank() == 0 and list(out.iterdir()) == [lock]:
                lock.unlink()
                with suppress(OSError):  # a parent may hold something else by now
                    [place.rmdir() for place in made]


def open_run(config: Any) -> Path | None:
    """The newest undamaged state of the run in `config.out`, or None for a new run. Changes nothing.

    Raises UserError if the run has other options or only damaged states, if files that no run wrote are in
    the way, or if an option names a directory that this run writes.
    """
    out, options = config.out, config.out / "options.json"
    states = sorted((out / "state").glob("step-*"), reverse=True)
    folders = [out / name for name in FOLDERS]
    for folder in (*folders, *(states if config.restart else ())):
        refuse_strangers(folder)
    refuse_foreign(options, (*FOLDERS, "state", *FILES))
    own = {place.resolve() for place in (*folders, out / "state")}
    for name, value in to_json(config).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and own & {Path(text).resolve(), *Path(text).resolve().parents}:
                raise UserError(f"{flag_of(name)} {text} is written by this run; choose another --out")
    if config.restart or not (states or (out / "model").exists()):
        return None
    if not states:
        remedy = "choose another --out, or start over with --restart"
        raise UserError(f"{out} has a model, but no state to continue from; {remedy}")
    refuse_changes(config, read_json(options), str(out))
    for state in states:
        try:
            refuse_damage(state)
            if isinstance(read_json(state / "state.json").get("step"), int):
                return state
            raise UserError(f"{state}: state.json does not name the step")
        except (UserError, OSError) as error:
            say(f"{error}\ncontinuing from an earlier state, if there is one")
    raise UserError(f"{out}: every state is damaged; start over with --restart, or choose another --out")


def is_saved(out: Path, step: int) -> bool:
    """Whether the run's saved model is the one after `step` steps."""
    return read_json(out / "model" / DIGESTS).get("step") == step


def begin_run(config: Any, resumed: Path | None) -> None:
    """Called after all checks: a run that is not resumed deletes the files of an earlier run, and nothing else."""
    wait()  # until all ranks have read the state
    out = config.out
    if rank() == 0 and not resumed:
        for folder in (*(out / name for name in FOLDERS), *(out / "state").glob("step-*")):
            if not strangers(folder):
                shutil.rmtree(folder, ignore_errors=True)
        for name in FILES:
            (out / name).unlink(missing_ok=True)
    if rank() == 0:
        write_json(out / "options.json", to_json(config))
    wait()


def refuse(message: str) -> NoReturn:
    raise UserError(message)


def read_jsonl(path: Path | str, complain=refuse, is_journal=False) -> Iterator[tuple[int, dict]]:
    """Yields (line number from 1, object) for each line that is not blank. UserError: the file is missing or empty.

    complain: called for a line that is not a JSON object; if it does not raise, the line is skipped. is_journal: a
    `Journal` may be writing the file, so it may be empty, and a last line without line break is not a record yet.
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
            is_empty = False
            try:
                record = parse_json(raw)
                fault = f"a JSON {type(record).__name__}"
            except ValueError as error:
                record, fault = None, f"not JSON in UTF-8 ({error})"
            if isinstance(record, dict):
                yield number, record
            else:
                complain(f"{path}:{number}: {fault}; each line must be one JSON object, {{...}}")
    if is_empty and not is_journal:
        raise UserError(f"{path}: empty; it should have one JSON object per line")


def _to_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"  # ASCII: any text can be written


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    replace_text(path, b"".join(map(_to_line, records)))


class Journal(ExitStack):
    """An append-only JSONL file of one process at a time. After kill -9, at most the last line is torn; it is dropped."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self._file = path, self.enter_context(claim(path))
        self._file.seek(0)
        self._file.truncate(sum(len(line) for line in self._file if line.endswith(b"\n")))

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Returns after the records are on the disk."""
        self._file.write(b"".join(map(_to_line, records)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def keep(self, lines: int) -> None:
        """Drop all but the first lines."""
        self._file.seek(0)
        self._file.truncate(sum(len(self._file.readline()) for _ in range(lines)))


class RunLog(ExitStack):
    """One record `{"step": 12, "loss": 1.5, ...}` per line; with a config also on Weights & Biases, if WANDB_PROJECT is set.

    Records after `resumed_step` are dropped first, because a resumed run computes these steps again. Only
    rank 0 writes. Raises UserError if the file is damaged.
    """

    def __init__(self, path: Path, resumed_step: int = 0, config: Any = None):
        super().__init__()
        self._journal = self._wandb = None
        if rank() > 0:
            return
        self._journal = self.enter_context(Journal(path))
        records = list(read_jsonl(path, is_journal=True))
        for number, record in records:
            if not isinstance(record.get("step"), int):
                raise UserError(f"{path}:{number}: not a metrics record; delete the line, or use --restart")
        self._journal.keep(sum(record["step"] <= resumed_step for _, record in records))
        if config is not None and (project := os.environ.get("WANDB_PROJECT")):
            id_file = path.with_name("wandb_run.txt")  # a resumed run continues the same W&B run
            if resumed_step == 0 or not id_file.exists():
                id_file.write_text(uuid.uuid4().hex)
            options = {"project": project, "name": path.resolve().parent.name, "config": config}
            try:
                import wandb

                self._wandb = wandb.init(**options, id=id_file.read_text(), resume="allow")
            except Exception as error:  # without the package, a key or a network
                remedy = "run `pip install wandb` and `wandb login`, or unset it"
                raise UserError(f"WANDB_PROJECT is set, but W&B does not start: {error}; {remedy}") from error
            self.callback(self._wandb.finish)

    def log(self, step: int, **metrics: Any) -> None:
        """Writes one record: floats to 6 significant digits, or null if not finite."""
        for name, value in metrics.items():
            if isinstance(value, float):
                metrics[name] = float(f"{value:.6g}") if math.isfinite(value) else None
        if self._journal is not None:
            self._journal.append([{"step": step, **metrics}])
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
