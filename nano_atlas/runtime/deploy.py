"""Which student and which teacher are in service: a small YAML file that the runtime and the evaluation read and promotion rewrites.

    teacher:
      llm:
        provider: huggingface
        model: /models/atlas-teacher-grpo
        temperature: 0.2

A `student:` section has the same form. Providers: `huggingface` (model: a checkpoint directory), `openai` (an OpenAI-compatible
server at api_base, with an optional model name), `http` and `python` (model: as in `agents`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nano_atlas.config import Preset
from nano_atlas.errors import UserError
from nano_atlas.runs import replace_text

PROVIDERS = ("huggingface", "openai", "http", "python")


@dataclass(frozen=True)
class Deployed:
    """One model in service. None: not said."""

    spec: str  # for agents.open_agent
    model: str | None = None  # name at a server
    temperature: float | None = None
    max_output_tokens: int | None = None


def read_deployment(path: Path | str) -> dict[str, Deployed]:
    """The seats that the file fills, by name ("student", "teacher"). Raises UserError for anything it does not know."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    _refuse_unknown(content, ("student", "teacher"), f"{path}: ")
    seats = {}
    for name, section in content.items():
        _refuse_unknown(section, ("llm",), f"{path}: {name}.")
        seats[name] = _deployed(section.get("llm"), f"{path}: {name}.llm.")
    return seats


def _refuse_unknown(section: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(section, dict) or not section:
        raise UserError(f"{where.rstrip('. :')} must be a section with the keys {', '.join(known)}")
    for key in section:
        if key not in known:
            raise UserError(f"{where}{key}: unknown; there are {', '.join(known)}")


def _deployed(llm: Any, where: str) -> Deployed:
    _refuse_unknown(llm, ("provider", "model", "api_base", "temperature", "max_output_tokens"), where)
    provider, model, base = llm.get("provider"), llm.get("model"), llm.get("api_base")
    temperature, tokens = llm.get("temperature"), llm.get("max_output_tokens")
    if provider not in PROVIDERS:
        raise UserError(f"{where}provider: {provider!r} is unknown; there are {', '.join(PROVIDERS)}")
    needed = {"api_base": base} if provider == "openai" else {"model": model}
    for key, value in needed.items():
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}{key}: provider {provider} needs it, as a text")
    if (base is not None) != (provider == "openai"):
        raise UserError(f"{where}api_base belongs to provider openai")
    for key, value, kinds in (("temperature", temperature, (int, float)), ("max_output_tokens", tokens, int)):
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or value < 0):
            raise UserError(f"{where}{key}: {value!r} is not a number of at least 0")
    if provider == "openai":
        return Deployed(base, model, temperature, tokens)
    return Deployed(
        f"post+{model.removeprefix('post+')}" if provider == "http" else model, None, temperature, tokens
    )


def runtime_options(name: str, seat: Deployed) -> dict[str, Any]:
    """A seat as options of runtime_loop.py."""
    tokens = {"student": "answer_tokens", "teacher": "teaching_tokens"}[name]
    return {
        name: seat.spec,
        f"{name}_model": seat.model,
        f"{name}_temperature": seat.temperature,
        tokens: seat.max_output_tokens,
    }


def evaluation_options(name: str, seat: Deployed) -> dict[str, Any]:
    """A seat as options of eval.py, which samples both seats at its own --temperature."""
    options = runtime_options(name, seat) | (
        {"teacher": (f"deployed={seat.spec}",)} if name == "teacher" else {}
    )
    return {key: value for key, value in options.items() if key != f"{name}_temperature"}


def with_deployment(
    presets: Mapping[str, Preset],
    argv: Sequence[str],
    options: Callable[[str, Deployed], dict[str, Any]] = runtime_options,
) -> dict[str, Preset]:
    """Every preset with the values of `--deploy FILE`, where argv has it: the file overrides presets, and explicit flags the file."""
    path = next(
        (
            value.removeprefix("--deploy=")
            for flag, value in zip(["", *argv], [*argv, ""])
            if flag == "--deploy" or value.startswith("--deploy=")
        ),
        None,
    )
    overrides: dict[str, Any] = {}
    for name, seat in read_deployment(path).items() if path else ():
        overrides |= {key: value for key, value in options(name, seat).items() if value is not None}
    return {name: Preset(preset.help, {**preset.overrides, **overrides}) for name, preset in presets.items()}


def write_deployment(path: Path, teacher: str, temperature: float | None = None) -> None:
    """Put another teacher checkpoint into service; what the file says of the student stays. The file is replaced as a whole."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    llm = {"provider": "huggingface", "model": teacher} | (
        {} if temperature is None else {"temperature": temperature}
    )
    replace_text(path, yaml.safe_dump({**content, "teacher": {"llm": llm}}, sort_keys=False))
