"""Which student and which teacher are in service: a small YAML file that the runtime and the evaluation read and promotion rewrites.

    teacher:
      llm: {provider: huggingface, model: /models/atlas-teacher-grpo, temperature: 0.2, max_output_tokens: 512}

A `student:` section has the same form. Providers: `huggingface` (model: a checkpoint directory), `openai` (an OpenAI-compatible
server at api_base; model: its name there, if it serves several), `http` and `python` (model: as in `agents`).
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nano_atlas.config import option
from nano_atlas.episode import EpisodeConfig
from nano_atlas.errors import UserError
from nano_atlas.runs import replace_text

SPECS = {"huggingface": "{model}", "python": "{model}", "http": "post+{model}"}
SPECS["openai"] = "{api_base}#{model}"
LENGTHS = {"student": "--answer-tokens", "teacher": "--teaching-tokens"}
OPTIONS = ("provider", "temperature", "max_output_tokens")  # the other keys are those of a provider's spec
KEY_VARIABLE = "NANO_ATLAS_API_KEY"


@dataclass(frozen=True)
class DeployConfig:
    deploy: Path | None = option(None, "YAML that names the pair", group="service", resumable=True)
    serve: int | None = option(
        None, "port of an endpoint (0: any)", resumable=True, at_least=0, at_most=65535
    )
    host: str = option("127.0.0.1", f"address; others than this machine need {KEY_VARIABLE}", resumable=True)

    def check(self) -> None:
        is_local = self.host in ("127.0.0.1", "localhost", "::1")
        if self.serve is not None and not is_local and not os.environ.get(KEY_VARIABLE):
            raise UserError(f"--host {self.host}: set {KEY_VARIABLE} to a key that clients must send")


def with_deployment(argv: Sequence[str], is_evaluation: bool = False) -> list[str]:
    """The command line, with what the file of --deploy says put before it as flags, so that explicit flags override the file.

    eval.py gives its teachers names, and samples both seats at its own --temperature.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deploy", nargs="?")
    path = parser.parse_known_args(argv)[0].deploy
    seats, flags = read_deployment(path) if path else {}, []
    for name, llm in seats.items():
        named = "deployed=" if is_evaluation and name == "teacher" else ""
        flags += [f"--{name}", named + llm["spec"]]
        flags += [LENGTHS[name], str(llm["max_output_tokens"])] if "max_output_tokens" in llm else []
    defaults = dict(zip(LENGTHS, EpisodeConfig.temperature))
    given = {name: llm["temperature"] for name, llm in seats.items() if "temperature" in llm}
    if given and not is_evaluation:
        flags += ["--temperature", *map(str, (defaults | given).values())]
    return [*flags, *argv]


def read_deployment(path: Path | str) -> dict[str, dict[str, Any]]:
    """The keys of each `llm` section, and its `spec` for agents.open_agent, by seat. Raises UserError for what it does not know."""
    seats = {}
    try:
        for name, section in yaml.safe_load(Path(path).read_text(encoding="utf-8")).items():
            llm = section["llm"]
            template = SPECS.get(llm["provider"], "")
            unknown = [key for key in llm if key not in OPTIONS and f"{{{key}}}" not in template]
            if unknown or list(section) != ["llm"] or name not in LENGTHS or not template:
                found = f"{', '.join(section)}: {llm['provider']} {unknown}"
                raise UserError(f"{path}: {name}: {found} is unknown")
            if llm["provider"] == "openai":
                llm = {"model": ""} | llm
            seats[name] = {**llm, "spec": template.format(**llm).rstrip("#")}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: not a deployment file ({cause})") from None
    return seats


def write_deployment(path: Path, teacher: str) -> None:
    """Put another teacher checkpoint into service; what the file says of the student stays. The file is replaced as a whole."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    content["teacher"] = {"llm": {"provider": "huggingface", "model": teacher}}
    replace_text(path, yaml.safe_dump(content, sort_keys=False))
