"""Which student and which teacher are in service: a small YAML file that the runtime and the evaluation read and promotion rewrites.

    teacher:
      llm: {provider: huggingface, model: /models/atlas-teacher-grpo, temperature: 0.2, max_output_tokens: 512}

A `student:` section has the same form. Providers: `huggingface` (model: a checkpoint directory), `openai` (an OpenAI-compatible
server at api_base; model: its name there, if it serves several), `http` and `python` (model: as in `agents`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from nano_atlas import episode, runs
from nano_atlas.errors import UserError

SPECS = dict(huggingface="{model}", python="{model}", http="post+{model}", openai="{api_base}#{model}")
LENGTHS = {"student": "--answer-tokens", "teacher": "--teaching-tokens"}
OPTIONS = ("provider", "temperature", "max_output_tokens")  # the other keys are those of a provider's spec


def with_deployment(argv: Sequence[str], is_evaluation: bool = False) -> list[str]:
    """The command line, with what the file of --deploy says put before it as flags, so that explicit flags override the file.
    eval.py gives its teachers names, and samples both seats at its own --temperature."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deploy", nargs="?")
    path = parser.parse_known_args(argv)[0].deploy
    seats, flags = read_deployment(path) if path else {}, []
    temperatures = dict(zip(LENGTHS, episode.EpisodeConfig.temperature))
    for name, llm in seats.items():
        named = "deployed=" if is_evaluation and name == "teacher" else ""
        flags += [f"--{name}", named + llm["spec"]]
        flags += [LENGTHS[name], str(llm["max_output_tokens"])] if "max_output_tokens" in llm else []
        temperatures[name] = llm.get("temperature", temperatures[name])
    if not is_evaluation and any("temperature" in llm for llm in seats.values()):
        flags += ["--temperature", *map(str, temperatures.values())]
    return [*flags, *argv]


def read_deployment(path: Path | str) -> dict[str, dict[str, Any]]:
    """The keys of each `llm` section, and its `spec` for agents.open_agent, by seat. Raises UserError for what it does not know."""
    seats = {}
    try:
        for name, section in yaml.safe_load(Path(path).read_text(encoding="utf-8")).items():
            llm = section["llm"]
            template = SPECS.get(llm["provider"], "")
            extra = [key for key in llm if key not in OPTIONS and f"{{{key}}}" not in template]
            if extra or list(section) != ["llm"] or name not in LENGTHS or not template:
                raise UserError(f"{path}: {name}: {', '.join(section)}: {llm['provider']} {extra} is unknown")
            template = template if "model" in llm else template.removesuffix("#{model}")
            seats[name] = {**llm, "spec": template.format(**llm)}
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{path}: not a deployment file ({cause})") from None
    return seats


def write_deployment(path: Path, teacher: str) -> None:
    """Put another teacher checkpoint into service; what the file says of the student stays. The file is replaced as a whole."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    content["teacher"] = {"llm": {"provider": "huggingface", "model": teacher}}
    runs.replace_text(path, yaml.safe_dump(content, sort_keys=False))
