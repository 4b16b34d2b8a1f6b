r"""Supervised fine-tuning (SFT): teach a model by demonstration, before reinforcement learning improves it.

    try it, on a CPU   python train_sft.py
    on one GPU         python train_sft.py --preset qwen3-0.6b-24gb --data sft.jsonl
    on eight GPUs      torchrun --nproc-per-node 8 train_sft.py --preset qwen3-8b-2gpu \
                           --optimizer-device auto --data sft.jsonl
    your own model     python train_sft.py --preset own --model DIRECTORY --data sft.jsonl

Data: JSONL files of Arc-ATLAS-Teach-v0 demonstrations, chats, or prompt/completion pairs (nano_atlas/data.py), or
session traces, whose teachings that helped are learned (docs/traces.md). A model is a directory in Hugging Face
layout. Only the assistant's tokens are learned. The same command continues an interrupted run. OUT gets model,
metrics.jsonl (also sent to Weights & Biases if WANDB_PROJECT is set) and state (to continue from).

Differences from the published recipe (ATLAS: Qwen3-8B, 16 documents a step, 10 epochs, ZeRO-3): the target has the
form that GRPO samples later, `<thinking>..</thinking><teaching>..</teaching>`, and the prompt has the student's
approach; a step is measured in tokens; the optimizer's state may be on another GPU or in host memory.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nano_atlas import data, distributed, optim, runs
from nano_atlas.checkpoint import load_trainable, save_adapter, save_model
from nano_atlas.config import derive_seed, option, parse, run_script, to_json
from nano_atlas.data import STATUSES, Example, collate, count_targets, load_examples
from nano_atlas.errors import UserError, say
from nano_atlas.loss import batch_loss
from nano_atlas.model import Transformer
from nano_atlas.presets import announce, presets
from nano_atlas.runs import RunLog, checkpoint_digest, digest, read_json, write_jsonl
from nano_atlas.terminal import Bar
from nano_atlas.tokenizer import Tokenizer

WARMUP = 0.05  # share of the steps with a rising learning rate; then cosine decay
NANO_DEMONSTRATIONS = 900


@dataclass(frozen=True)
class Config:
    preset: str = option("nano", "", group="run")
    model: Path = option(Path("Qwen/Qwen3-0.6B"), "checkpoint directory to start from")
    data: tuple[Path, ...] = option((), "JSONL files to train on; preset nano makes its own")
    out: Path = option(Path("runs/sft"), "output directory: model, metrics, state", resumable=True)
    restart: bool = option(False, "delete the earlier run in --out, and start over", resumable=True)
    seed: int = option(42, "random seed: order, held-out examples, nano demonstrations")
    eval_every: int = option(100, "steps between two evaluations of eval_loss", above=0, resumable=True)
    save_every: int = option(100, "steps between two states to continue from", above=0, resumable=True)

    max_length: int = option(4096, "longest example (tokens); skips longer ones", group="data", above=0)
    held_out: float = option(0.02, "share of the examples held out for eval_loss", at_least=0, below=1)
    eval_data: tuple[Path, ...] = option((), "more JSONL files for eval_loss")
    thinking: bool = option(False, "use Qwen3's thinking mode, and record it in the checkpoint")
    min_reward: float | None = option(0.1, "of traces: least reward of a session (0: it did not help)")
    min_gain: float | None = option(None, "of traces: least gain, score with help minus alone (-1 to 1)")
    review_status: tuple[str, ...] = option(("approved",), "of traces: only these states", STATUSES)

    epochs: int = option(3, "passes over the data", group="optimization", above=0, resumable=True)
    steps: int | None = option(None, "optimizer steps, instead of --epochs", above=0, resumable=True)
    tokens_per_step: int = option(32768, "tokens per optimizer step, on average", above=0)
    tokens_per_batch: int = option(8192, "most tokens in a micro-batch; lower it to save memory", above=0)
    lr: float = option(1e-5, "peak learning rate", above=0)
    weight_decay: float = 1e-4  # AdamW's, of matrices only

    device: str = option("auto", "device of the model: cpu, cuda:1, ...", group="layout", resumable=True)
    optimizer_device: str = option("auto", "device of AdamW's state (12 bytes a parameter)", resumable=True)
    dtype: str = option("float32", "compute precision; AdamW's state is float32", ["float32", "bfloat16"])
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, 4/3 of the time")
    lora_rank: int = option(0, "train adapters of this rank (LoRA, ten times --lr); 0: all", at_least=0)

    @property
    def files(self) -> tuple[Path, ...]:  # --data is optional with the nano preset only
        return self.data or (self.out / "demonstrations.jsonl",)

    def check(self) -> None:
        if not self.data and self.preset != "nano":
            raise UserError(f"--preset {self.preset} needs --data FILE to train on")


def load_data(config: Config, tokenizer: Tokenizer) -> tuple[list[Example], list[Example]]:
    """(training, held-out) examples. The split depends only on the seed and the number of examples."""
    tokenizer.config |= {"enable_thinking": True} if config.thinking else {}
    reading = tokenizer, config.max_length, tokenizer.config.get("enable_thinking", False), config
    examples = load_examples(config.files, *reading)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "held out"))
    order = torch.randperm(len(examples), generator=generator).tolist()
    held = set(order[: round(config.held_out * len(examples))])
    learned = [example for index, example in enumerate(examples) if index not in held]
    held_out = [example for index, example in enumerate(examples) if index in held]
    if not learned:
        raise UserError(f"all {len(examples)} examples are held out; lower --held-out or add data")
    if config.eval_data:
        held_out += load_examples(config.eval_data, *reading)
    return learned, held_out


def losses(model: Transformer, examples: Sequence[Example], tokens_per_batch: int) -> Iterator[Tensor]:
    """The loss `[]` of each of this rank's micro-batches; all ranks' sum is the mean -log p per target token (nats)."""
    total, device = count_targets(examples), model.head_weight.device
    lengths = [len(example.input_ids) - 1 for example in examples]
    share = distributed.shares(lengths)[distributed.rank()]
    groups = data.pack([lengths[i] for i in share], tokens_per_batch)
    own = [[examples[share[i]] for i in group] for group in groups]
    for documents, is_own in distributed.in_step(own, examples[:1]):
        yield batch_loss(model, collate(documents, device), total) * is_own


@torch.no_grad()
def evaluate(model: Transformer, examples: Sequence[Example], tokens_per_batch: int) -> float:
    return distributed.sum_over_ranks(sum(losses(model, examples, tokens_per_batch))).item()


def dry_step(config: Config, model: Transformer, optimizer, examples: Sequence[Example]) -> None:
    """Forward and backward pass of the largest possible micro-batch, with zero gradients: does it fit in memory?"""
    longest = max(examples, key=lambda example: len(example.input_ids))
    count = max(1, config.tokens_per_batch // (len(longest.input_ids) - 1))
    batch = collate([longest] * count, model.head_weight.device)
    with optimizer.dry_step(len(batch.input_ids)):
        (batch_loss(model, batch, 1) * 0).backward()


def train(config: Config, resumed: Path | None) -> None:  # resumed: the training state to continue from
    tokenizer = Tokenizer.from_directory(config.model)
    learned, held_out = load_data(config, tokenizer)
    data_digest = digest(str(text).encode() for text in (*learned, *held_out))  # also notices reviews
    lengths = [len(example.input_ids) - 1 for example in learned]
    epoch_steps = data.steps_per_epoch(lengths, config.tokens_per_step)
    total_steps = config.steps or config.epochs * epoch_steps
    say(f"{len(learned)} examples, {sum(lengths):,} tokens, {total_steps} steps; {len(held_out)} held out")
    if resumed:
        record = read_json(resumed / "state.json")
        if record.get("data") != data_digest:
            raise UserError(f"{config.out} was trained on other data; choose another --out, or use --restart")
        if record["step"] >= total_steps and runs.is_saved(config.out, record["step"]):
            return print(f"{config.out}/model is already trained, {record['step']} steps")

    model = load_trainable(config.model, config, distributed.device(config.device))
    where = config.optimizer_device
    optimizer = optim.MasterAdamW(model, weight_decay=config.weight_decay, state_device=where)
    base = checkpoint_digest(config.model) if config.lora_rank else None
    first_step = optim.load_training_state(resumed, optimizer, base)["step"] if resumed else 0
    if model.head_weight.device.type in optim.DRY_STEP_ON:
        dry_step(config, model, optimizer, learned)
    runs.begin_run(config, resumed)
    bar = {"total": total_steps, "initial": first_step, "unit": "step"}
    logged = config.out / "metrics.jsonl", first_step, to_json(config)
    with RunLog(*logged) as log, Bar(desc=config.out.name, **bar) as progress:
        for step in range(first_step, total_steps):
            started, is_last = time.perf_counter(), step + 1 == total_steps
            epoch, index = divmod(step, epoch_steps)
            if index == 0 or step == first_step:
                plan = data.shuffle_epoch(lengths, config.tokens_per_step, config.seed, epoch)
            examples = [learned[i] for i in plan[index]]
            loss = torch.zeros((), device=model.head_weight.device)
            for part in losses(model, examples, config.tokens_per_batch):
                part.backward()
                loss += part.detach()
            distributed.sum_over_ranks(loss)
            rate = optim.learning_rate(step, total_steps, config.lr, WARMUP, "cosine")
            metrics = {"loss": loss.item(), "lr": rate, "grad_norm": optimizer.step(rate)}
            tokens = sum(lengths[i] for i in plan[index])
            speed = tokens / (time.perf_counter() - started)

            if held_out and ((step + 1) % config.eval_every == 0 or is_last):
                metrics["eval_loss"] = evaluate(model, held_out, config.tokens_per_batch)
            metrics |= {"epoch": (step + 1) / epoch_steps, "tokens": tokens, "tokens_per_second": speed}
            metrics |= {"target_tokens": count_targets(examples), "skipped_steps": optimizer.skipped_steps}
            log.log(step + 1, **metrics)
            progress.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            progress.step()
            if (step + 1) % config.save_every == 0 or is_last:
                told = {"data": data_digest, "base": base}
                optim.save_training_state(config.out / "state", optimizer, step + 1, **told)

    save_adapter(config.out / "adapter", model, config.model)
    save_model(config.out / "model", model, tokenizer, step=max(first_step, total_steps))
    print(f"{config.out}: model, metrics.jsonl, state")


def write_nano_demonstrations(config: Config, path: Path) -> None:
    """The student writes its approach to generated problems; the world's rule adds diagnosis and teaching."""
    from nano_atlas import world
    from nano_atlas.seats import open_seat

    if config.model == world.STUDENT and checkpoint_digest(config.model) != world.STUDENT_DIGEST:
        remedy = f"`git checkout {config.model}` restores it"
        raise UserError(f"{config.model} is not the student that comes with this version; {remedy}")
    write_jsonl(path, world.demonstrations(NANO_DEMONSTRATIONS, config.seed, open_seat(str(config.model))))


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, sys.argv[1:] if argv is None else argv, presets("train_sft"), __doc__)
    announce("train_sft", config, f"{config.steps} steps" if config.steps else f"{config.epochs} epochs")
    with runs.owned(config.out):
        resumed = runs.open_run(config)
        if not (config.data or resumed or distributed.rank()):
            write_nano_demonstrations(config, *config.files)
        distributed.wait()
        train(config, resumed)


if __name__ == "__main__":
    run_script(main, is_parallel=True)
