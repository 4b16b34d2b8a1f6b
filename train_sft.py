"""Supervised fine-tuning: teach a model by demonstration, before reinforcement learning improves it.

    python train_sft.py                                                    # CPU: the nano world's teacher, from its student
    python train_sft.py --preset 24gb --data sft.jsonl --model Qwen/Qwen3-0.6B --out runs/teacher-sft       # one GPU
    torchrun --nproc-per-node 8 train_sft.py --preset 80gb --optimizer-device auto --data sft.jsonl --out runs/teacher-sft  # eight

Data are JSONL files of Arc-ATLAS-Teach-v0 demonstrations, chats, or prompt/completion pairs (nano_atlas/data.py); a model is a
directory in Hugging Face layout. Only what the assistant says is learned. The same command continues an interrupted run.

    OUT/model           the result: a directory that transformers, vLLM and the other scripts load
    OUT/metrics.jsonl   one record per optimizer step
    OUT/state           masters and moments of the optimizer, to continue from

Against the published recipe (ATLAS: Qwen3-8B, 16 documents a step, 10 epochs, ZeRO-3): the target is the text that GRPO samples
later, `<thinking>..</thinking><teaching>..</teaching>` after the student's approach in the prompt, and not a text with labels
of its own; a step is measured in tokens; on one GPU the optimizer's state may live on another or in host memory.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.memory import needs
from nano_atlas import distributed, world
from nano_atlas.checkpoint import is_checkpoint, load_model, save_model
from nano_atlas.config import Preset, option, parse, refuse_changes, run_script, to_json
from nano_atlas.data import (
    Example,
    collate,
    count_targets,
    derive_seed,
    load_examples,
    pack,
    padding_share,
    shuffle_epoch,
    steps_per_epoch,
    write_jsonl,
)
from nano_atlas.errors import UserError
from nano_atlas.loss import batch_loss
from nano_atlas.model import PackedAttention, Transformer
from nano_atlas.optim import (
    SCHEDULES,
    MasterAdamW,
    latest_training_state,
    learning_rate,
    load_training_state,
    save_training_state,
)
from nano_atlas.runs import RunLog, checkpoint_digest, files_digest, read_json, write_json
from nano_atlas.seats import open_seat
from nano_atlas.tokenizer import Tokenizer

NANO = Path("runs/nano")
DEMONSTRATIONS = 900
GPU = {"dtype": "bfloat16", "gradient_checkpointing": True, "compile": True, "tokens_per_batch": 8192}
PRESETS = {
    "nano": Preset(
        "the nano world's teacher on a CPU, 1 GB, from its student",
        {
            "model": world.STUDENT,
            "out": NANO / "teacher-sft",
            "epochs": 6,
            "tokens_per_step": 8192,
            "tokens_per_batch": 4096,
            "lr": 1e-3,
            "weight_decay": 0.01,
            "held_out": 0.05,
        },
    ),
    "24gb": Preset(
        f"Qwen3-0.6B on one 24 GB GPU: {needs('Qwen/Qwen3-0.6B')}", {**GPU, "model": Path("Qwen/Qwen3-0.6B")}
    ),
    "2gpu": Preset(
        f"Qwen3-1.7B on two 24 GB GPUs: {needs('Qwen/Qwen3-1.7B', host=True)} on the second",
        {**GPU, "model": Path("Qwen/Qwen3-1.7B"), "optimizer_device": "cuda:1"},
    ),
    "80gb": Preset(
        f"Qwen3-8B on one 80 GB GPU: {needs('Qwen/Qwen3-8B', host=True)} on the host",
        {**GPU, "model": Path("Qwen/Qwen3-8B"), "optimizer_device": "cpu"},
    ),
}


@dataclass(frozen=True)
class Config:
    preset: str = option("nano", "", group="run")
    out: Path = option(Path("runs/sft"), "directory of the run: model, metrics, state")
    restart: bool = option(
        False, "delete what --out holds of an earlier run instead of continuing it", resumable=True
    )
    seed: int = option(
        42,
        "fixes the order of the examples, which ones are held out, and the demonstrations of the nano world",
    )

    data: tuple[Path, ...] = option(
        (), "JSONL files to learn from; the nano preset makes its own", group="data"
    )
    max_length: int = option(4096, "longest example, in tokens; longer ones are left out and counted")
    shuffle: bool = option(
        True, "take the examples in random order; --no-shuffle keeps that of the files, as a curriculum"
    )
    held_out: float = option(0.02, "share of the examples (0 to 1) that is not learned and gives eval_loss")
    eval_data: tuple[Path, ...] = option(
        (), "JSONL files that give eval_loss, with those that --held-out takes from --data"
    )
    thinking: bool = option(
        False, "render prompts with Qwen3's thinking mode on; other chat templates ignore it"
    )

    model: Path = option(Path("Qwen/Qwen3-0.6B"), "checkpoint directory to start from", group="model")
    device: str = option(
        "auto", "where the model is: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one", resumable=True
    )
    optimizer_device: str = option(
        "auto",
        "where masters and moments are (12 bytes per parameter); auto: beside the model",
        resumable=True,
    )
    dtype: str = option(
        "float32", "compute precision; masters and moments are float32 always", ["float32", "bfloat16"]
    )
    gradient_checkpointing: bool = option(
        False, "keep one activation per layer, recompute the rest: less memory, 4/3 the time"
    )
    compile: bool = option(False, "compile the layers (torch.compile): faster, after a minute")

    epochs: int = option(3, "passes over the data", group="optimization", resumable=True)
    steps: int | None = option(None, "optimizer steps, instead of --epochs", resumable=True)
    tokens_per_step: int = option(32768, "tokens in one optimizer step, on average")
    tokens_per_batch: int = option(8192, "most tokens in one micro-batch, which is what memory depends on")
    lr: float = option(1e-5, "peak learning rate")
    schedule: str = option("cosine", "learning rate after the warm-up", SCHEDULES)
    warmup: float = option(0.05, "share of the steps (0 to 1) over which the learning rate rises")
    betas: tuple[float, float] = option((0.9, 0.95), "decay of Adam's two running means, per step")
    weight_decay: float = option(1e-4, "decoupled decay of the matrices, times the learning rate, per step")
    clip_norm: float = option(1.0, "longest gradient (global norm); a longer one is scaled down to it")

    eval_every: int = option(
        100, "optimizer steps between evaluations of eval_loss", group="records", resumable=True
    )
    save_every: int = option(100, "optimizer steps between training states", resumable=True)
    keep: int = option(1, "number of training states to keep", resumable=True)
    wandb_project: str = option("", "mirror the metrics to this Weights & Biases project", resumable=True)
    wandb_run_name: str = option("", "name of the run there; by default that of --out", resumable=True)

    def check(self) -> None:
        for name in (
            "max_length",
            "epochs",
            "tokens_per_step",
            "tokens_per_batch",
            "lr",
            "clip_norm",
            "eval_every",
            "save_every",
            "keep",
        ):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        if self.steps is not None and self.steps <= 0:
            raise UserError(f"--steps must be above 0, not {self.steps}")
        for name in ("held_out", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"--{name.replace('_', '-')} must be from 0 to below 1, not {getattr(self, name)}"
                )
        if not self.data and self.preset != "nano":
            raise UserError("--data names no file to learn from")
        if self.tokens_per_batch > self.tokens_per_step:
            raise UserError(
                f"--tokens-per-batch {self.tokens_per_batch} is more than --tokens-per-step {self.tokens_per_step}"
            )
        if self.wandb_run_name and not self.wandb_project:
            raise UserError("--wandb-run-name needs --wandb-project")


# --------------------------------------------------------------------------------------------------------------- setup


def load(config: Config) -> tuple[Transformer, Tokenizer]:
    if not is_checkpoint(config.model):
        raise UserError(
            f"no model at {config.model}; fetch one with `hf download {config.model} --local-dir {config.model}`, "
            "or name another directory with --model"
        )
    if config.optimizer_device != "auto":
        distributed.device(config.optimizer_device)
    model = load_model(
        config.model, dtype=getattr(torch, config.dtype), device=distributed.device(config.device)
    )
    model.recompute_activations = config.gradient_checkpointing
    if config.compile:
        # The lengths of the documents differ in every batch; a compiler that saw them would compile for each anew.
        PackedAttention.__call__ = torch.compiler.disable(PackedAttention.__call__)
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    distributed.shard(model)
    return model, Tokenizer.from_directory(config.model)


def split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples; which ones are held out depends on the seed and on the number of examples only."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "held out"))
    order = torch.randperm(len(examples), generator=generator).tolist()
    held = set(order[: round(share * len(examples))])
    return [e for i, e in enumerate(examples) if i not in held], [
        e for i, e in enumerate(examples) if i in held
    ]


def data_digest(paths: Sequence[Path]) -> str:
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; --data and --eval-data must name JSONL files")
    return files_digest(paths)


# ---------------------------------------------------------------------------------------------------------------- loop


def micro_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[list[int]]]:
    """Of each rank, the documents (by index) of each of its micro-batches."""
    shares = distributed.shares(lengths)
    return [
        [[share[i] for i in group] for group in pack([lengths[i] for i in share], tokens_per_batch)]
        for share in shares
    ]


@torch.no_grad()
def evaluate(
    model: Transformer, examples: list[Example], tokens_per_batch: int, device: torch.device
) -> float:
    """Mean -log p of the target tokens, in nats."""
    lengths = [len(example.input_ids) - 1 for example in examples]
    target_tokens = count_targets(examples)
    loss = torch.zeros((), device=device)
    for documents, is_own in distributed.in_step(
        micro_batches(lengths, tokens_per_batch)[distributed.rank()], [0]
    ):
        loss += batch_loss(model, collate([examples[i] for i in documents], device), target_tokens) * is_own
    return distributed.sum_over_ranks(loss).item()


def train(config: Config) -> None:
    state_dir, options_file = config.out / "state", config.out / "options.json"
    data_hash = data_digest((*config.data, *config.eval_data))
    if config.restart and distributed.rank() == 0:
        for directory in (state_dir, config.out / "model"):
            shutil.rmtree(directory, ignore_errors=True)
    distributed.wait()
    resumed = latest_training_state(state_dir)
    record = read_json(resumed / "state.json") if resumed else {}
    if resumed:
        saved_options = to_json(Config()) | read_json(options_file)  # what was no option then had its default
        refuse_changes(config, saved_options, str(config.out))
        if record["data"] != data_hash:
            raise UserError(
                f"{config.out} was trained on other contents of {', '.join(map(str, config.data))}; "
                "choose another --out, or start over with --restart"
            )
        is_longer = any(saved_options[name] != getattr(config, name) for name in ("steps", "epochs"))
        if record["is_finished"] and not is_longer and (config.out / "model").is_dir():
            print(f"{config.out / 'model'} is already trained ({record['step']} steps)")
            return

    model, tokenizer = load(config)
    device = model.head_weight.device
    examples, left_out = load_examples(config.data, tokenizer, config.max_length, thinking=config.thinking)
    learned, held_out = split(examples, config.held_out, config.seed)
    if not learned:
        raise UserError(f"all {len(examples)} examples are held out; lower --held-out or add data")
    if config.eval_data:
        held_out += load_examples(config.eval_data, tokenizer, config.max_length, thinking=config.thinking)[0]
    lengths = [len(example.input_ids) - 1 for example in learned]
    epoch_steps = steps_per_epoch(lengths, config.tokens_per_step)
    total_steps = config.steps or config.epochs * epoch_steps
    print(
        f"{len(learned)} examples, {sum(lengths):,} tokens, {epoch_steps} steps per epoch; {len(held_out)} held out"
    )
    for reason, count in left_out.items():
        print(f"left out: {count} examples of {reason}")

    optimizer = MasterAdamW(
        model,
        betas=config.betas,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        state_device=None if config.optimizer_device == "auto" else config.optimizer_device,
    )
    first_step = load_training_state(resumed, optimizer)["step"] if resumed else 0
    distributed.wait()  # all have read the earlier options
    if distributed.rank() == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(options_file, to_json(config))

    with (
        RunLog(
            config.out,
            first_step,
            wandb_project=config.wandb_project,
            wandb_run_name=config.wandb_run_name,
            config=to_json(config),
        ) as log,
        tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            desc=config.out.name,
            disable=distributed.rank() > 0,
        ) as progress,
    ):
        for step in range(first_step, total_steps):
            started = time.perf_counter()
            epoch, index = divmod(step, epoch_steps)
            if index == 0 or step == first_step:
                plan = shuffle_epoch(lengths, config.tokens_per_step, config.seed, epoch, config.shuffle)
            documents = plan[index]
            step_lengths = [lengths[i] for i in documents]
            batches = micro_batches(step_lengths, config.tokens_per_batch)
            target_tokens = count_targets([learned[i] for i in documents])
            loss = torch.zeros((), device=device)
            for micro_batch, is_own in distributed.in_step(batches[distributed.rank()], [0]):
                batch = collate([learned[documents[i]] for i in micro_batch], device)
                partial_loss = batch_loss(model, batch, target_tokens) * is_own
                partial_loss.backward()
                loss += partial_loss.detach()
            distributed.sum_over_ranks(loss)
            rate = learning_rate(step, total_steps, config.lr, config.warmup, config.schedule)
            grad_norm = optimizer.step(rate)

            is_last = step + 1 == total_steps
            tokens_per_second = sum(step_lengths) / (time.perf_counter() - started)
            is_evaluated = held_out and ((step + 1) % config.eval_every == 0 or is_last)
            eval_loss = evaluate(model, held_out, config.tokens_per_batch, device) if is_evaluated else None
            log.log(
                step + 1,
                loss=loss.item(),
                eval_loss=eval_loss,
                lr=rate,
                grad_norm=grad_norm,
                epoch=(step + 1) / epoch_steps,
                tokens=sum(step_lengths),
                target_tokens=target_tokens,
                tokens_per_second=tokens_per_second,
                padding_share=padding_share(sum(batches, []), step_lengths),
                skipped_steps=optimizer.skipped_steps,
            )
            progress.set_postfix_str(f"loss {loss.item():.3f}, {tokens_per_second:,.0f} tokens/s")
            progress.update()
            if (step + 1) % config.save_every == 0 or is_last:
                extra = {"data": data_hash, "is_finished": is_last}
                save_training_state(state_dir, optimizer, step + 1, extra, config.keep)

    save_model(config.out / "model", model, tokenizer)
    print(f"model: {config.out / 'model'}   metrics: {log.path}   state: {state_dir}")


# ---------------------------------------------------------------------------------------------------- nano world, main


def make_nano_demonstrations(path: Path, student: Path, seed: int) -> None:
    """The student states its approach to problems of its own, and the world's rule adds diagnosis and teaching."""
    write_jsonl(path, world.demonstrations(DEMONSTRATIONS, seed, open_seat(str(student))))


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, sys.argv[1:] if argv is None else argv, PRESETS, __doc__)
    if config.model == world.STUDENT and checkpoint_digest(config.model) != world.STUDENT_DIGEST:
        raise UserError(
            f"{config.model} is not the student that came with this version; `git checkout {config.model}` restores it"
        )
    if distributed.rank() == 0:
        print(f"{config.preset}: {PRESETS[config.preset].help}", flush=True)
    if not config.data:  # only the nano preset may leave them out
        config = replace(config, data=(config.out / "demonstrations.jsonl",))
        if distributed.rank() == 0 and (config.restart or not latest_training_state(config.out / "state")):
            make_nano_demonstrations(config.data[0], config.model, config.seed)
        distributed.wait()
    train(config)


if __name__ == "__main__":
    run_script(main, is_parallel=True)
