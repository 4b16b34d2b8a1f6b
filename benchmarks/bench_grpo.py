"""Seconds per GRPO step on a real model: nano_atlas beside TRL's GRPOTrainer with transformers' generation.

    python -m benchmarks.bench_grpo --model DIR       # SmolLM2-135M, for example (benchmarks/smollm2.py makes one)
    python -m benchmarks.bench_grpo --model DIR --device cuda --dtype bfloat16 --new-tokens 512 --trl-batch 8

The task is one that both can do: the policy answers by itself (`--reward exact`), P prompts, G completions of
exactly N tokens each, KL to a frozen reference, one update. The arms take turns on the same prompts; the first
step of each is not counted. The table gives medians and the median of the per-round ratio. Of a step, what is
not rollout is update; the reference's log-probs are part of that.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import train_grpo
from benchmarks.jobs import markdown
from nano_atlas import optim
from nano_atlas.batching import Sample
from nano_atlas.checkpoint import load_model
from nano_atlas.config import option, parse, run_script
from nano_atlas.data import Problem
from nano_atlas.protocol import baseline_messages
from nano_atlas.sampler import Sampler
from nano_atlas.seats import TokenSeat
from nano_atlas.tokenizer import Tokenizer

RATE = 1e-5


@dataclass(frozen=True)
class Config:
    model: Path = option(Path("runs/smollm2/base"), "checkpoint")
    prompts: int = option(4, "P")
    group_size: int = option(8, "G")
    new_tokens: int = option(48, "tokens of each completion")
    steps: int = option(2, "measured steps of each arm per round", above=0)
    rounds: int = option(3, "rounds", above=0)
    threads: int = option(2, "CPU threads")
    dtype: str = option("float32", "of the models", ["float32", "bfloat16"])
    device: str = option("cpu", "cpu or cuda")
    tokens_per_batch: int = option(16384, "tokens in one of our micro-batches", above=0)
    trl_batch: int | None = option(None, "completions in one of TRL's micro-batches (none: all)", above=0)
    questions: tuple[str, ...] = ()  # instead of those about pens


def questions(config: Config) -> list[str]:
    return list(config.questions) or [
        f"A shop sells {i + 3} boxes of {i + 12} pens each and then {i} more pens. How many pens is that?"
        for i in range(config.prompts)
    ]


class Ours:
    def __init__(self, config: Config):
        dtype = getattr(torch, config.dtype)
        self.policy, self.reference = (load_model(config.model, dtype, config.device) for _ in range(2))
        tokenizer = Tokenizer.from_directory(config.model)
        tokenizer.eos_ids = ()  # every completion has its full length
        self.seats = {"teacher": TokenSeat(Sampler(self.policy), tokenizer)}
        self.optimizer = optim.MasterAdamW(self.policy, **train_grpo.ADAMW)
        self.problems = [Problem(str(i), text, "1") for i, text in enumerate(questions(config))]
        self.config = train_grpo.Config(
            reward="exact", problems_per_step=config.prompts, group_size=config.group_size, answer_tokens=config.new_tokens,
            temperature=(1.0, 1.0), dtype=config.dtype, device=config.device, tokens_per_batch=config.tokens_per_batch,
        )  # fmt: skip
        self.step = 0

    def run(self, steps: int) -> list[dict[str, float]]:
        """Seconds of each step, and of its rollout."""
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            groups, metrics = train_grpo.roll_out(self.config, self.seats, self.problems, self.step)
            # made-up advantages: without a difference within a group there would be no gradient to time
            samples = [
                Sample(one.reply.rollout, (-1.0) ** i) for group in groups for i, one in enumerate(group)
            ]
            train_grpo.update(self.config, self.policy, self.reference, self.optimizer, samples, RATE)
            wait(self.config.device)
            whole = time.perf_counter() - started
            seconds.append({"step": whole, "rollout": metrics["seconds/rollout"]})
            self.step += 1
        return seconds


class Trl:
    def __init__(self, config: Config):
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        ends: list[tuple[float, float]] = []  # of steps: when, and seconds of rollouts by then
        rollouts: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_, **__):
                wait(config.device)
                ends.append((time.perf_counter(), sum(rollouts)))

        class Trainer(GRPOTrainer):
            def _generate(self, *arguments, **options):
                started = time.perf_counter()
                result = super()._generate(*arguments, **options)
                wait(config.device)
                rollouts.append(time.perf_counter() - started)
                return result

        self.ends, self.folder = ends, tempfile.TemporaryDirectory()
        count = config.prompts * config.group_size
        batch = min(count, config.trl_batch or count)
        self.arguments = GRPOConfig(
            output_dir=self.folder.name, per_device_train_batch_size=batch,
            gradient_accumulation_steps=count // batch, num_generations=config.group_size,
            max_completion_length=config.new_tokens, generation_kwargs={"min_new_tokens": config.new_tokens}, temperature=1.0,
            beta=0.04, learning_rate=RATE, lr_scheduler_type="constant", report_to="none", save_strategy="no", logging_strategy="no",
            use_cpu=config.device == "cpu", bf16=False, gradient_checkpointing=False, max_steps=config.steps + 1, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"prompt": baseline_messages(text)} for text in questions(config)]
        model = AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, config.dtype))
        reward = lambda completions, **_: [float(i % 2) for i in range(len(completions))]
        self.trainer = Trainer(
            model, reward, self.arguments, Dataset.from_list(rows * 64), callbacks=[Clock()],
            processing_class=AutoTokenizer.from_pretrained(config.model),
        )  # fmt: skip

    def run(self, steps: int) -> list[dict[str, float]]:
        self.ends.clear()
        self.trainer.train()
        pairs = zip(self.ends, self.ends[1:])
        return [{"step": end - start, "rollout": after - before} for (start, before), (end, after) in pairs]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    found = {name: statistics.median(step[name] for step in steps) for name in ("step", "rollout")}
    return found | {"update": found["step"] - found["rollout"]}


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    torch.set_num_threads(config.threads)
    arms = {"nano_atlas": Ours(config), "TRL": Trl(config)}
    arms["nano_atlas"].run(1)
    rounds = []
    for _ in range(config.rounds):
        rounds.append({name: medians(arm.run(config.steps)) for name, arm in arms.items()})
        print({name: round(found["step"], 2) for name, found in rounds[-1].items()}, flush=True)
    rows = []
    for name in arms:
        ratios = [one["TRL"]["step"] / one[name]["step"] for one in rounds]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        every = [f"{value:.1f}" for value in medians([one[name] for one in rounds]).values()]
        rows.append([name, *every, spread])
    print(markdown("arm | seconds per step | rollout | update | times as fast as TRL", rows))


if __name__ == "__main__":
    run_script(main)
