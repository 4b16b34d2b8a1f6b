"""Which student and which teacher are in service: a small YAML file that the runtime and the evaluation read and promotion rewrites.

    teacher:
      llm:
        provider: huggingface
        model: /models/atlas-teacher-grpo
        temperature: 0.2
        max_output_tokens: 512

A `student:` section has the same form. Providers: `huggingface` (model: a checkpoint directory), `openai` (an OpenAI-compatible
server at api_base; model: its name there, if it serves several), `http` and `python` (model: as in `agents`).
"""

import argparse
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nano_atlas.config import option
from nano_atlas.errors import UserError
from nano_atlas.runs import replace_text

LLM_KEYS = ("provider", "model", "api_base", "temperature", "max_output_tokens")
NEEDED = {"huggingface": "model", "openai": "api_base", "http": "model", "python": "model"}  # by provider
KEY_VARIABLE = "NANO_ATLAS_API_KEY"


@dataclass(frozen=True)
class DeployConfig:
    deploy: Path | None = option(
        None, "YAML file that says which student and teacher are in service", group="service", resumable=True
    )
    serve: int | None = option(
        None, "port to serve the pair on, as an OpenAI-compatible endpoint (0: any free one)", resumable=True
    )
    host: str = option(
        "127.0.0.1",
        f"address to serve on; beyond this machine it needs a key in {KEY_VARIABLE}",
        resumable=True,
    )

    def check(self) -> None:
        is_local = self.host in ("127.0.0.1", "localhost", "::1")
        if self.serve is not None and not is_local and not os.environ.get(KEY_VARIABLE):
            raise UserError(f"--host {self.host}: set {KEY_VARIABLE} to a key that clients must send")


def with_deployment(argv: Sequence[str], is_evaluation: bool = False) -> list[str]:
    """The command line with what the file of --deploy says put before it as flags: explicit flags override the file, the file presets.

    eval.py samples both seats at its own --temperature and gives its teachers names.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deploy", nargs="?")
    path = parser.parse_known_args(argv)[0].deploy
    flags: list[str] = []
    for name, llm in read_deployment(path).items() if path else ():
        is_named = is_evaluation and name == "teacher"
        options = {f"--{name}": f"deployed={llm['spec']}" if is_named else llm["spec"]}
        options["--answer-tokens" if name == "student" else "--teaching-tokens"] = llm.get(
            "max_output_tokens"
        )
        if not is_evaluation:
            options[f"--{name}-temperature"] = llm.get("temperature")
        flags += [f"{flag}={value}" for flag, value in options.items() if value is not None]
    return [*flags, *argv]


def read_deployment(path: Path | str) -> dict[str, dict[str, Any]]:
    """The keys of each `llm` section, and `spec` for agents.open_agent, by seat. Raises UserError for anything it does not know."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    seats = {}
    for name, section in _section(content, ("student", "teacher"), f"{path}: ").items():
        llm = _section(section, ("llm",), f"{path}: {name}.").get("llm")
        seats[name] = _section(llm, LLM_KEYS, f"{path}: {name}.llm.")
        llm["spec"] = _spec(llm, f"{path}: {name}.llm.")
    return seats


def _section(value: Any, known: Collection[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise UserError(f"{where.rstrip('. :')} must be a section with the keys {', '.join(known)}")
    for key in value:
        if key not in known:
            raise UserError(f"{where}{key}: unknown; there are {', '.join(known)}")
    return value


def _spec(llm: dict[str, Any], where: str) -> str:
    provider, model, base = llm.get("provider"), llm.get("model"), llm.get("api_base")
    if provider not in NEEDED:
        raise UserError(f"{where}provider: {provider!r} is unknown; there are {', '.join(NEEDED)}")
    if not llm.get(NEEDED[provider]):
        raise UserError(f"{where}{NEEDED[provider]}: provider {provider} needs it")
    if base and provider != "openai":
        raise UserError(f"{where}api_base belongs to provider openai")
    if provider == "openai":
        return f"{base}#{model}" if model else base
    return f"post+{model}" if provider == "http" else model


def write_deployment(path: Path, teacher: str) -> None:
    """Put another teacher checkpoint into service; what the file says of the student stays. The file is replaced as a whole."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    content["teacher"] = {"llm": {"provider": "huggingface", "model": teacher}}
    replace_text(path, yaml.safe_dump(content, sort_keys=False))
