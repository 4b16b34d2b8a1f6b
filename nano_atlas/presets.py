"""The presets: one table, named after model and machine, with the same names and models in every script.

Their memory is computed by `python -m benchmarks.memory` (weights, gradients, optimizer, activations, KV cache).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nano_atlas.config import Preset

STUDENT = Path(__file__).parent / "world" / "student"  # it comes with the package
NANO = Path("runs/nano")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
NANO_SAMPLING = {"student": str(STUDENT), "probe_tokens": 40, "teaching_tokens": 96, "answer_tokens": 120}


def _preset(help: str, run: Path, train_sft: dict, train_grpo: dict, evaluation: dict, runtime: dict):
    """The options of each script, and where it finds what the one before it has made."""
    sft, grpo = run / "teacher-sft", run / "teacher-grpo"
    teachers = f"sft={sft / 'model'}", f"grpo={grpo / 'model'}"
    return help, {
        "train_sft": {"out": sft} | train_sft,
        "train_grpo": {"out": grpo, "teacher": sft / "model"} | train_grpo,
        "eval": {"out": run / "eval", "teacher": teachers} | evaluation,
        "runtime_loop": {"out": run / "runtime", "teacher": str(grpo / "model")} | runtime,
    }


def _language_model(help: str, run: str, student, teacher, lengths: int, rows: int, gpus, **more: Any):
    """lengths: longest teaching and answer (tokens); rows: decoded at once; gpus: number, GB of each; more: of training."""
    training = {"dtype": "bfloat16", "gradient_checkpointing": True, "tokens_per_batch": 8192} | more
    sampling = {"student": student, "teaching_tokens": lengths, "answer_tokens": lengths}
    using = {"device": more.get("device", "cuda"), "dtype": training["dtype"], **sampling}
    sft = {"model": Path(teacher), **training}
    grpo = {"cache_rows": rows, **sampling, **training}
    return *_preset(help, Path("runs") / run, sft, grpo, {"bench": "gsm8k", **using}, using), gpus


TABLE = {  # from small to large
    "nano": _preset(
        "the nano world with its student and teachers, on a CPU or GPU, 1 GB", NANO,
        {"model": STUDENT, "epochs": 6, "tokens_per_step": 8192, "tokens_per_batch": 4096, "lr": 1e-3, "weight_decay": 0.01,
         "held_out": 0.05},
        {"steps": 40, "problems_per_step": 16, "lr": 2e-4, "schedule": "cosine", "tokens_per_batch": 8192, "eval_every": 20,
         "save_every": 1, "rollout": ("embedded",), **NANO_SAMPLING},
        {"bench": "nano", "limit": 500, "control": ("shuffled",), **NANO_SAMPLING},
        {"lane": "paired", **NANO_SAMPLING}),
    "smollm2": _language_model(
        "SmolLM2-135M-Instruct as student and teacher, on a CPU (float32, 9 GB) or a GPU (bfloat16, 10 GB); --data, --problems, --tasks",
        "smollm2", SMOLLM2, SMOLLM2, 256, 64, (1, 10), tokens_per_batch=4096, gradient_checkpointing=False,
        **({} if torch.cuda.is_available() else {"dtype": "float32", "device": "cpu"})),
    "qwen3-0.6b-24gb": _language_model("Qwen3-0.6B as student and teacher, on one 24 GB GPU", "qwen3-0.6b",
        "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", 1024, 32, (1, 24)),
    "qwen3-1.7b-80gb": _language_model("Qwen3-1.7B teaches Qwen3-4B, on one 80 GB GPU", "qwen3-1.7b",
        "Qwen/Qwen3-4B", "Qwen/Qwen3-1.7B", 2048, 48, (1, 80)),
    "qwen3-8b-2gpu": _language_model(
        "Qwen3-8B teaches Qwen3-4B, on two 80 GB GPUs, the optimizer's state (98 GB) on the host", "qwen3-8b",
        "Qwen/Qwen3-4B", "Qwen/Qwen3-8B", 4096, 16, (2, 80), optimizer_device="cpu"),
    "own": ("models of yours, named by flags, with the lengths and step sizes of the published recipe", {
        "train_sft": {}, "train_grpo": {}, "eval": {"bench": "gsm8k", "out": Path("runs/eval")},
        "runtime_loop": {"out": Path("runs/runtime")}}),
}  # fmt: skip


def presets(script: str) -> dict[str, Preset]:
    """The presets of a script: "train_sft", "train_grpo", "eval" or "runtime_loop"."""
    return {name: Preset(help, settings[script]) for name, (help, settings, *_) in TABLE.items()}


def suggestion(gigabytes: Sequence[float] | None = None) -> str:
    """A line that names the largest preset for these GPUs (10^9 bytes of each; None: those that are here), "" where none fits."""
    here = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    cards = [gpu.total_memory / 1e9 for gpu in here] if gigabytes is None else gigabytes
    needs = {name: need for name, (_, _, *gpus) in TABLE.items() for need in gpus}  # "24 GB" may be 23.7
    fitting = [n for n, (count, size) in needs.items() if sum(card >= 0.95 * size for card in cards) >= count]
    return f"{len(cards)} GPU of {min(cards):.0f} GB: --preset {fitting[-1]} would fit" if fitting else ""
