"""From one frozen dataclass to a command line.

    @dataclass(frozen=True)
    class Config:
        preset: str = option("nano", "", group="run")               # filled from --preset
        steps: int | None = option(None, "optimizer steps", resumable=True)
        betas: tuple[float, float] = option((0.9, 0.95), "decay of Adam's running means", group="optimizer")

    config = parse(Config, sys.argv[1:], {"nano": Preset("CPU, 1 GB", {"steps": 100})}, "what the script does")

Every field is an option and every option is a field. Explicit flags override the preset, the preset overrides the defaults; a
`check()` method, where the class has one, raises UserError for values that contradict each other.
"""

import argparse
import dataclasses
import difflib
import json
import math
import os
import select
import sys
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from nano_atlas.distributed import is_first_failure, process_group, size
from nano_atlas.errors import UserError

ConfigType = TypeVar("ConfigType")


class Preset(NamedTuple):
    """A named set of option values; `help` says for which machine, and how much memory it needs."""

    help: str
    overrides: Mapping[str, Any]


def option(
    default: Any, help: str, choices: Sequence[Any] | None = None, *, group: str = "", resumable: bool = False
) -> Any:
    """A dataclass field that becomes `--its-name`. `help` gives meaning and unit; defaults are appended to it.

    `group` starts a section of `--help`, which lasts until the next field with a group. A `resumable` option may differ when an
    interrupted run is continued (how long, how often), any other may not (what is computed).
    """
    metadata = {"help": help, "choices": choices, "group": group, "resumable": resumable}
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, so that every script reports every mistake in the same way."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _number(kind: type, text: str) -> int | float:
    value = kind(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "none" if value is None or text == "" else text


def _add_option(
    group: argparse._ArgumentGroup, field: dataclasses.Field, kind: Any, presets: Mapping[str, Preset]
) -> None:
    help_text, choices = field.metadata["help"], field.metadata["choices"]
    values = {
        name: preset.overrides[field.name]
        for name, preset in presets.items()
        if field.name in preset.overrides
    }
    defaults = "; ".join(
        f"{name}: {_shown(value)}" for name, value in {"default": field.default, **values}.items()
    )
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    settings["help"] = f"{help_text} ({defaults})".replace("%", "%%")
    if kind is bool:
        group.add_argument(_flag(field.name), action=argparse.BooleanOptionalAction, **settings)
        return
    is_optional = type(None) in typing.get_args(kind)
    if is_optional:
        (kind,) = [part for part in typing.get_args(kind) if part is not type(None)]
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        settings["nargs"] = "*" if parts[-1] is Ellipsis else len(parts)
        kind = parts[0]
    if kind not in (int, float, str, Path):
        raise TypeError(f"{field.name}: an option cannot have the type {field.type}")

    def convert(text: str) -> Any:
        if is_optional and text.lower() == "none":
            return None
        return _number(kind, text) if kind in (int, float) else kind(text)

    convert.__name__ = kind.__name__  # argparse names it: "invalid int value: 'x'"
    metavar = {int: "N", float: "X", Path: "PATH", str: "TEXT"}[kind]
    settings["metavar"] = "{" + ",".join(map(str, choices)) + "}" if choices else metavar
    group.add_argument(_flag(field.name), type=convert, choices=choices, **settings)


def parse(
    cls: type[ConfigType], argv: Sequence[str], presets: Mapping[str, Preset], description: str
) -> ConfigType:
    """Build `cls` from the command line; its field `preset`, where there is one, is the name of the preset to start from.

    Raises UserError for an unknown option (with the closest existing one), a malformed value, or what `cls.check()` refuses.
    """
    parser = _Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds, group = typing.get_type_hints(cls), parser
    for field in dataclasses.fields(cls):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        if field.name == "preset":
            about = "; ".join(f"{name}: {preset.help}" for name, preset in presets.items())
            group.add_argument(
                "--preset",
                default=field.default,
                choices=list(presets),
                metavar="NAME",
                help=f"start from these values ({about}) (default: {field.default})".replace("%", "%%"),
            )
        else:
            _add_option(group, field, kinds[field.name], presets)
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        name = unknown[0].split("=")[0]
        close = difflib.get_close_matches(name.replace("_", "-"), known, n=1)
        raise UserError(
            f"unknown option {unknown[0]}" + (f"; did you mean {close[0]}?" if close else " (see --help)")
        )
    values = vars(given)
    overrides = presets[values["preset"]].overrides if "preset" in values else {}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    config = cls(**{**overrides, **values})
    check: Callable[[], None] | None = getattr(config, "check", None)
    if check is not None:
        check()
    return config


def to_json(config: Any) -> dict[str, Any]:
    """The fields as JSON values (paths as text, tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def refuse_changes(config: Any, saved: Mapping[str, Any], where: str) -> None:
    """Raise UserError naming each option, but for the resumable ones, in which `config` differs from a run's `saved` JSON. An option
    that did not exist then had its default."""
    now, saved = to_json(config), to_json(type(config)()) | dict(saved)
    fixed = [field.name for field in dataclasses.fields(config) if not field.metadata["resumable"]]
    changed = [f"{_flag(name)} {saved[name]} -> {now[name]}" for name in fixed if saved[name] != now[name]]
    if changed:
        anew = "start over with --restart" if "restart" in now else "delete it"
        raise UserError(
            f"{where} was started with other options: {', '.join(changed)}. "
            f"Repeat the earlier ones to continue it, choose another --out, or {anew}"
        )


def run_script(main: Callable[[], None], is_parallel: bool = False) -> None:
    """Run a script's `main`, and end with one readable line where the user can mend what went wrong.

    is_parallel: the script has work for several processes of torchrun. Of these the first that fails says why, and the others,
    which fail of its absence, nothing.
    """
    with process_group():
        try:
            if size() > 1 and not is_parallel:
                raise UserError(
                    "this script is work for one process: start it with python, not with torchrun"
                )
            main()
        except SystemExit:
            raise
        except BaseException as error:
            if not is_first_failure():
                time.sleep(
                    1
                )  # torchrun ends the job at the first exit, which the one that says why should be
                os._exit(1)  # at an orderly end, torch would report that the others are gone
            if isinstance(error, UserError):
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)
            if isinstance(error, KeyboardInterrupt):
                print("\ninterrupted; the same command continues from the last saved state", file=sys.stderr)
                sys.exit(130)
            if isinstance(error, BrokenPipeError) and _reader_has_left():
                sys.exit(141)  # as a shell reports it
            raise


def _reader_has_left() -> bool:
    """Whether our output goes to a program, such as `head`, that has read enough."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in pipe.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
    return True
