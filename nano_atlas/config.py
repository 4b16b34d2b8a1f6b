"""From one frozen dataclass to a command line: `parse` makes a flag of each `option`, as train_sft.py shows.

Flags override the preset; the preset overrides the defaults. A method `check()` may refuse contradictory values.
"""

import argparse
import dataclasses
import hashlib
import json
import operator
import os
import signal
import sys
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError
from torch import OutOfMemoryError

from nano_atlas.distributed import is_first_failure, process_group, size
from nano_atlas.errors import UserError
from nano_atlas.text import finite, masked

MEMORY_REMEDY = """
Lower --cache-rows (sampling) or --tokens-per-batch, or use --gradient-checkpointing or --optimizer-device cpu;
outside of training: --dtype bfloat16, shorter --answer-tokens, or a model behind a URL."""
DISK_REMEDY = "; saved files are unchanged, and the same command continues from them"
METAVARS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
BOUNDS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le, "below": operator.lt}


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed that depends on all parts. Seeds derived from (seed, step) need no saved generator state."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


class Preset(NamedTuple):
    help: str  # the machine it is for, and the memory it needs
    overrides: Mapping[str, Any]


def option(default: Any, help: str, choices=(), *, group="", resumable=False, **bounds) -> Any:
    """A dataclass field that becomes `--its-name`; `group` starts a section of `--help`.

    resumable: may change when an interrupted run continues (how long, how often); other options (what is
    computed) may not. bounds: of a number, or of each number of a tuple; keys of BOUNDS.
    """
    metadata = {"help": help, "choices": choices, "group": group, "resumable": resumable, "bounds": bounds}
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def _options(cls: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if "help" in field.metadata]


def _add_option(group: Any, field: dataclasses.Field, kind: Any, default: Any) -> None:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    text = f"{field.metadata['help']} (default: {'none' if shown in ('', 'None') else shown})"
    settings = {"dest": field.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if kind is bool:
        group.add_argument(flag_of(field.name), action=argparse.BooleanOptionalAction, **settings)
        return
    is_optional = type(None) in typing.get_args(kind)
    kind = typing.get_args(kind)[0] if is_optional else kind
    if typing.get_origin(kind) is tuple:
        kind, *more = typing.get_args(kind)
        settings["nargs"] = "*" if more[-1] is Ellipsis else 1 + len(more)

    read = finite if kind is float else kind

    def convert(text: str) -> Any:
        return None if is_optional and text.lower() == "none" else read(text)

    convert.__name__ = kind.__name__  # argparse names it: "invalid int value: 'x'"
    choices = field.metadata["choices"]
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else METAVARS[kind]
    settings |= {"type": convert, "choices": choices or None, "metavar": metavar}
    group.add_argument(flag_of(field.name), **settings)


def parse(cls: Any, argv: Sequence[str], presets: Mapping[str, Preset], description: str) -> Any:
    """A `cls` from the command line; with `presets`, its first field is the preset's name. Raises UserError."""
    if presets:  # a table, before the options
        table = [f"    {name:<19}{preset.help}" for name, preset in presets.items()]
        description += "\n".join(["\nPresets (--preset NAME --help shows the values of one):\n", *table])
    style = {"usage": "%(prog)s [options]", "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = _Parser(description=description, allow_abbrev=False, **style)
    options, kinds, group = _options(cls), typing.get_type_hints(cls), parser
    chosen = _Parser(add_help=False, allow_abbrev=False)
    chosen.add_argument("--preset", default=options[0].default, choices=list(presets) or None)
    preset = presets[chosen.parse_known_args(argv)[0].preset] if presets else Preset("", {})
    for field in options:
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        if field.name == "preset":
            text = f"where the values of the other options come from (default: {field.default})"
            group.add_argument("--preset", default=field.default, metavar="NAME", help=text)
        else:
            _add_option(group, field, kinds[field.name], preset.overrides.get(field.name, field.default))
    given = vars(parser.parse_args(argv))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    config = cls(**{**preset.overrides, **values})
    for field in options:
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            for name, bound in field.metadata["bounds"].items():
                if number is not None and not BOUNDS[name](number, bound):
                    rule = f"{name.replace('_', ' ')} {bound}"
                    raise UserError(f"{flag_of(field.name)} must be {rule}, not {number}")
    if hasattr(config, "check"):
        config.check()
    return config


def to_json(config: Any) -> dict[str, Any]:
    """The fields as JSON values (paths as text, tuples as lists); secrets in URLs are masked, because files get this."""
    return json.loads(masked(json.dumps(dataclasses.asdict(config), default=str)))


def refuse_changes(config: Any, saved: Mapping[str, Any], where: str) -> None:
    """Raises UserError naming each option that is not resumable and differs from a run's `saved` JSON."""
    now, saved = to_json(config), to_json(type(config)()) | dict(saved)
    fixed = [field.name for field in _options(config) if not field.metadata["resumable"]]
    changed = [f"{flag_of(name)} {saved[name]} -> {now[name]}" for name in fixed if saved[name] != now[name]]
    if changed:
        anew = "start over with --restart" if "restart" in now else "delete it"
        remedy = f"Use the earlier options to continue it, choose another --out, or {anew}"
        raise UserError(f"{where} was started with other options: {', '.join(changed)}. {remedy}")


def run_script(main: Callable[[], None], is_parallel: bool = False) -> None:
    """Run a script's `main`; an error that the user can fix is printed as one line. is_parallel: torchrun may start it."""
    # read at the first use of a GPU; prevents fragmentation by batches of varying lengths
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with process_group():
        try:
            if size() > 1 and not is_parallel:
                raise UserError("this script runs as one process: start it with python, not with torchrun")
            if size() == 1:  # torchrun stops its processes with SIGTERM; they exit silently
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            main()
        except Exception as error:
            if not is_first_failure():
                time.sleep(1)  # torchrun ends the job at the first exit; the rank that reports exits first
                os._exit(1)  # a normal exit would print torch's errors about lost connections
            if isinstance(error, BrokenPipeError):  # the reader of our output, such as `head`, has exited
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(141)
            if not isinstance(error, OutOfMemoryError | OSError | SafetensorError | UserError):
                raise
            remedy = MEMORY_REMEDY if isinstance(error, OutOfMemoryError) else DISK_REMEDY
            remedy = "" if isinstance(error, UserError) else remedy
            print(masked(f"error: {error}{remedy}"), file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command continues from the last saved state", file=sys.stderr)
            sys.exit(130)
