"""The presets: one table, named after model and machine, with the same names in every script.

Their memory is computed by `python -m benchmarks.memory` (weights, gradients, optimizer, activations, KV cache).
"""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nano_atlas.config import Preset
from nano_atlas.errors import say

STUDENT = Path(__file__).parent / "world" / "student"  # part of the package
NANO = Path("runs/nano")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
NANO_SAMPLING = {"student": str(STUDENT), "probe_tokens": 40, "teaching_tokens": 96, "answer_tokens": 120}


def _preset(help: str, run: Path, train_sft: dict, train_grpo: dict, evaluation: dict, runtime: dict):
    """The options of each script; each reads the output of the one before it."""
    sft, grpo = run / "teacher-sft", run / "teacher-grpo"
    teachers = f"sft={sft / 'model'}", f"grpo={grpo / 'model'}"
    return help, {
        "train_sft": {"out": sft} | train_sft,
        "train_grpo": {"out": grpo, "teacher": sft / "model"} | train_grpo,
        "eval": {"out": run / "eval", "teacher": teachers} | evaluation,
        "runtime_loop": {"out": run / "runtime", "teacher": str(grpo / "model")} | runtime,
    }


def _language_model(help: str, run: str, student, teacher, lengths: int, rows: int, gpus, **more: Any):
    """lengths: longest teaching and answer (tokens); rows: decoded at once; gpus: (number, GB each); more: for training."""
    training = {"dtype": "bfloat16", "gradient_checkpointing": True, "tokens_per_batch": 8192} | more
    sampling = {"student": student, "teaching_tokens": lengths, "answer_tokens": lengths}
    using = {"device": more.get("device", "cuda"), "dtype": training["dtype"], **sampling}
    lr = ({"lr": 1e-4}, {"lr": 1e-5}) if "lora_rank" in more else ({}, {})  # ten times those of all weights
    sft = {"model": Path(teacher), **training, **lr[0]}
    grpo = {"cache_rows": rows, **sampling, **training, **lr[1]}
    return *_preset(help, Path("runs") / run, sft, grpo, {"bench": "gsm8k", **using}, using), gpus


TABLE = {  # from small to large
    "nano": _preset(
        "a toy world with its own student and teacher; CPU or GPU, 1 GB", NANO,
        {"model": STUDENT, "epochs": 6, "tokens_per_step": 8192, "tokens_per_batch": 4096, "lr": 1e-3, "weight_decay": 0.01,
         "held_out": 0.05},
        {"steps": 40, "problems_per_step": 16, "lr": 2e-4, "schedule": "cosine", "tokens_per_batch": 8192, "eval_every": 20,
         "save_every": 1, "rollout": ("embedded",), **NANO_SAMPLING},
        {"bench": "nano", "limit": 500, "control": ("shuffled",), **NANO_SAMPLING},
        {"lane": "paired", **NANO_SAMPLING}),
    "smollm2": _language_model(
        "SmolLM2-135M as student and teacher; CPU (float32, 9 GB) or GPU (10 GB)",
        "smollm2", SMOLLM2, SMOLLM2, 256, 64, (1, 10), tokens_per_batch=4096, gradient_checkpointing=False,
        **({} if torch.cuda.is_available() else {"dtype": "float32", "device": "cpu"})),
    "qwen3-0.6b-24gb": _language_model("Qwen3-0.6B as student and teacher; one 24 GB GPU", "qwen3-0.6b",
        "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", 1024, 32, (1, 24)),
    "qwen3-1.7b-80gb": _language_model("Qwen3-1.7B teaches Qwen3-4B; one 80 GB GPU", "qwen3-1.7b",
        "Qwen/Qwen3-4B", "Qwen/Qwen3-1.7B", 2048, 48, (1, 80)),
    "qwen3-8b-80gb": _language_model("Qwen3-8B teaches Qwen3-4B, by LoRA; one 80 GB GPU", "qwen3-8b-lora",
        "Qwen/Qwen3-4B", "Qwen/Qwen3-8B", 4096, 32, (1, 80), lora_rank=32),
    "qwen3-8b-2gpu": _language_model(
        "Qwen3-8B teaches Qwen3-4B; two 80 GB GPUs, 98 GB of host memory", "qwen3-8b",
        "Qwen/Qwen3-4B", "Qwen/Qwen3-8B", 4096, 16, (2, 80), optimizer_device="cpu"),
    "own": ("your own models; lengths and step sizes of the published recipe", {
        "train_sft": {}, "train_grpo": {}, "eval": {"bench": "gsm8k", "out": Path("runs/eval")},
        "runtime_loop": {"out": Path("runs/runtime")}}),
}  # fmt: skip
# with the preset's options, on one core
NANO_TIMES = dict(train_sft="1 minute", train_grpo="1.5 minutes", eval="1 minute", runtime_loop="10 seconds")


def presets(script: str) -> dict[str, Preset]:
    """script: "train_sft", "train_grpo", "eval" or "runtime_loop"."""
    return {name: Preset(help, settings[script]) for name, (help, settings, *_) in TABLE.items()}


def announce(script: str, config: Any, work: str, time="the bar shows the time left after two steps") -> None:
    """Prints a script's first line: what it does, how long that takes, and where the result will be."""
    preset = getattr(config, "preset", "")
    if preset == "nano":
        usual = type(config)(**presets(script)[preset].overrides)
        is_usual = config == replace(usual, out=config.out, seed=config.seed, restart=config.restart)
        time = f"about {NANO_TIMES[script]} on a CPU" if is_usual else time
    say(f"{script}: {preset and f'preset {preset}, '}{work}, {time}; out {config.out}")


def look_at(out: Path) -> None:
    """Prints the last line: the command that shows the result, with the other runs of runs/NAME/."""
    shown = out.parent if out.parent.parent == NANO.parent else out
    say(f"look at it: python -m nano_atlas.report {shlex.quote(str(shown))}")
