"""GRPO: train the teacher on how much its teaching improves a frozen student.

    python train_grpo.py                                                                   # CPU: the nano world's teacher
    python train_grpo.py --preset 80gb --teacher runs/sft/model --student Qwen/Qwen3-0.6B --problems gsm8k.jsonl --out runs/grpo
    python train_grpo.py --traces traces.jsonl --teacher runs/nano/teacher-grpo/model --out runs/nano/round2  # on what the runtime exported
    python train_grpo.py --reward exact ...      # plain RL of the student itself on right or wrong: the control without a teacher
    torchrun --nproc-per-node 8 train_grpo.py --preset 2gpu --optimizer-device auto ...    # eight GPUs; the same options on any number

One step: P problems; one probe and K answers per problem by the student alone; G teachings per problem by the current policy; one
guided answer each; reward; advantages within each group; one update (or several). Log-probabilities are those of the sampled
token ids after the very prompt they were sampled from, at the sampling temperature, and each step checks that the trainer agrees
with the sampler about them.

    OUT/model, OUT/best     the teacher at the end, and where it did best on the held-out problems
    OUT/metrics.jsonl       one record per step           OUT/episodes.jsonl    samples of whole episodes
    OUT/state               what the same command continues from

Against the published recipe (ATLAS): the gradient is on the prompt that was sampled from; the sampler has the current weights;
probe and baselines are shared by a group; the reward compares the guided answer with the student's own; the KL anchor is the SFT
checkpoint unless --reference-mixing says otherwise. In one process models may sit on different GPUs; under torchrun each rank
shards the policy and has the frozen models, and a copy to sample from, to itself.
"""

import copy
import dataclasses
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from nano_atlas import distributed, protocol, world
from nano_atlas.checkpoint import load_model, save_model
from nano_atlas.config import Preset, option, parse, refuse_changes, run_script, to_json
from nano_atlas.data import Problem, derive_seed, load_problems
from nano_atlas.episodes import Episode, attempt, sketch_problems, teach, teaching_metrics
from nano_atlas.errors import UserError
from nano_atlas.files import read_json, write_json
from nano_atlas.memory import needs
from nano_atlas.metrics import RunLog
from nano_atlas.model import Transformer
from nano_atlas.optim import (
    SCHEDULES, MasterAdamW, latest_training_state, learning_rate, load_training_state, save_training_state,
)
from nano_atlas.policy import Sample, UpdateConfig, mix_reference, update, usable
from nano_atlas.reward import RewardConfig, group_advantages
from nano_atlas.seats import EmbeddedSeat, Generation
from nano_atlas.tokenizer import Tokenizer
from nano_atlas.traces import problems_from_traces

NANO = Path("runs/nano")
GPU = {"dtype": "bfloat16", "gradient_checkpointing": True, "tokens_per_batch": 8192}
PRESETS = {
    "nano": Preset("the nano world on a CPU, 1 GB", {
        "student": NANO / "student/model", "teacher": NANO / "teacher-sft/model", "out": NANO / "teacher-grpo",
        "steps": 100, "problems_per_step": 16, "baseline_samples": 4, "lr": 2e-4, "schedule": "cosine", "probe_tokens": 40, "teaching_tokens": 96,
        "answer_tokens": 120, "tokens_per_batch": 8192, "eval_every": 20, "eval_problems": 200, "save_every": 1,
    }),
    "24gb": Preset(f"0.6B teacher and student on one GPU: {needs('Qwen/Qwen3-0.6B', 'Qwen/Qwen3-0.6B', 1, 32, 2560)}; --problems", {
        **GPU, "student": Path("Qwen/Qwen3-0.6B"), "answer_tokens": 1024, "teaching_tokens": 1024, "cache_rows": 32,
    }),
    "80gb": Preset(f"1.7B teacher, 4B student on one GPU: {needs('Qwen/Qwen3-1.7B', 'Qwen/Qwen3-4B', 1, 48, 4608)}; --problems", {
        **GPU, "student": Path("Qwen/Qwen3-4B"), "answer_tokens": 2048, "teaching_tokens": 2048, "cache_rows": 48,
    }),
    "2gpu": Preset(f"8B teacher, 4B student on two 80 GB GPUs: {needs('Qwen/Qwen3-8B', 'Qwen/Qwen3-4B', 2)} on the host; --problems", {
        **GPU, "student": Path("Qwen/Qwen3-4B"), "optimizer_device": "cpu", "answer_tokens": 4096, "teaching_tokens": 4096,
        "cache_rows": 16,
    }),
}


@dataclass(frozen=True)
class Config(UpdateConfig, RewardConfig):
    preset: str = option("nano", "", group="run")
    out: Path = option(Path("runs/grpo"), "directory of the run: models, metrics, episodes, state")
    restart: bool = option(False, "delete what --out holds of an earlier run instead of continuing it", resumable=True)
    seed: int = option(42, "fixes the order of the problems and every sample")

    problems: Path | None = option(None, "JSONL of problems with gold answers; the nano preset makes its own", group="data")
    traces: Path | None = option(None, "JSONL of traces exported by runtime_loop.py, instead of --problems")
    held_out: float = option(0.05, "share of the problems (0 to 1) kept for evaluation; the nano preset makes separate ones")
    reward: str = option("teaching", "what is rewarded: teaching (the student's improvement) or exact (the policy's own answer)",
                         ["teaching", "exact"])

    teacher: Path = option(Path("runs/sft/model"), "checkpoint the policy starts from, and the KL reference", group="models")
    student: Path = option(Path("Qwen/Qwen3-0.6B"), "checkpoint of the frozen student")
    device: str = option("auto", "where the policy is trained and sampled: cpu, cuda, cuda:1, ...")
    student_device: str = option("auto", "where the student is sampled; auto: a second GPU if there is one, else --device")
    reference_device: str = option("auto", "where the reference is; auto: beside the student (the policy for --kl exact)")
    optimizer_device: str = option("auto", "where masters and moments are (12 bytes per parameter); auto: beside the policy")
    dtype: str = option("float32", "compute precision; masters and moments are float32 always", ["float32", "bfloat16"])
    gradient_checkpointing: bool = option(False, "keep one activation per layer and recompute the rest: less memory, 4/3 the time")
    thinking: bool = option(False, "render prompts with Qwen3's thinking mode on; other chat templates ignore it")
    cache_rows: int = option(256, "most sequences decoded at once by each sampler (KV cache memory)")

    steps: int = option(250, "optimizer steps to train", group="optimization", resumable=True)
    problems_per_step: int = option(4, "problems P per step")
    group_size: int = option(8, "teachings G sampled per problem")
    baseline_samples: int = option(4, "answers K of the student alone per problem; their mean is the baseline b")
    lr: float = option(1e-6, "peak learning rate")
    schedule: str = option("constant", "learning rate after the warm-up", SCHEDULES)
    warmup: float = option(0.03, "share of the steps (0 to 1) over which the learning rate rises")
    betas: tuple[float, float] = option((0.9, 0.999), "decay of Adam's two running means, per update")
    weight_decay: float = option(0.0, "decoupled decay of the matrices, times the learning rate, per update")
    clip_norm: float = option(1.0, "longest gradient (global norm); a longer one is scaled down to it")

    advantage_scale: str = option("std", "divide centred rewards by the group's std, or by nothing (Dr. GRPO)", ["std", "none"])
    reference_mixing: float = option(0.0, "share of the policy mixed into the reference (0: frozen); the published run used 0.9")
    reference_mixing_every: int = option(2, "steps between mixings, where --reference-mixing is above 0")

    eval_every: int = option(25, "steps between evaluations on held-out problems (0: never)", group="records", resumable=True)
    eval_problems: int = option(200, "held-out problems per evaluation, answered greedily")
    save_every: int = option(10, "steps between training states", resumable=True)
    keep: int = option(1, "number of training states to keep", resumable=True)
    episodes_per_step: int = option(2, "whole episodes written to episodes.jsonl per step", resumable=True)
    wandb_project: str = option("", "mirror the metrics to this Weights & Biases project", resumable=True)
    wandb_run_name: str = option("", "name of the run there; by default that of --out", resumable=True)

    @property
    def longest_completion(self) -> int:
        return self.answer_tokens if self.reward == "exact" else self.teaching_tokens

    def check(self) -> None:
        positive = ("steps", "problems_per_step", "baseline_samples", "updates_per_batch", "tokens_per_batch", "lr", "clip_norm",
                    "save_every", "keep", "probe_tokens", "teaching_tokens", "answer_tokens", "reference_mixing_every", "cache_rows")
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        if self.group_size < 2:
            raise UserError(f"--group-size must be 2 or more, not {self.group_size}: an advantage compares within a group")
        for name in ("held_out", "warmup", "reference_mixing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must be from 0 to 1, not {getattr(self, name)}")
        if self.teacher_temperature <= 0:
            raise UserError("--teacher-temperature must be above 0: a greedy policy samples no group to compare")
        if self.problems and self.traces:
            raise UserError("--problems and --traces exclude each other")
        if not (self.problems or self.traces) and self.preset != "nano":
            raise UserError("name the problems to train on with --problems FILE or --traces FILE")
        for name in ("beta", "clip_low", "clip_high", "eval_every", "episodes_per_step"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be below 0, not {getattr(self, name)}")
        if self.reference_mixing and not self.beta:
            raise UserError("--reference-mixing has no effect with --beta 0")


# --------------------------------------------------------------------------------------------------------------- setup


def load_data(config: Config) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems."""
    if config.problems is None and config.traces is None:
        count = config.steps * config.problems_per_step
        return world.training_problems(count, config.seed), world.held_out("math", config.eval_problems, "validation")
    if config.traces is not None:
        problems, left_out = problems_from_traces(config.traces)
        for reason, count in left_out.items():
            print(f"left out: {count} traces ({reason})")
    else:
        problems = load_problems(config.problems)
    order = random.Random(derive_seed(config.seed, "held out")).sample(problems, len(problems))
    count = min(round(config.held_out * len(problems)), config.eval_problems)
    if len(problems) - count < 1:
        raise UserError(f"no problem left to train on: {len(problems)} in all, {count} held out; lower --held-out")
    return order[count:], order[:count]


def devices(config: Config) -> tuple[str, str, str]:
    """(policy, student, reference), from what is there; prints the choice with its reason."""
    gpus = torch.cuda.device_count()
    policy = distributed.device(config.device)
    has_second = gpus > 1 and distributed.size() == 1
    beside = "cuda:1" if has_second else policy
    student = beside if config.student_device == "auto" else distributed.device(config.student_device)
    beside = policy if config.kl == "exact" else student
    reference = beside if config.reference_device == "auto" else distributed.device(config.reference_device)
    if config.kl == "exact" and reference != policy:
        raise UserError(f"--kl exact compares whole distributions: the reference must be on {policy}, the policy's device")
    print(f"{gpus} GPUs: policy on {policy}, student on {student}, reference on {reference}")
    return policy, student, reference


def load(path: Path, device: str, dtype: str, made_by: str) -> Transformer:
    if not (path / "config.json").is_file():
        raise UserError(f"no model at {path}; {made_by}")
    return load_model(path, dtype=getattr(torch, dtype), device=device)


# ------------------------------------------------------------------------------------------------------------ rollouts


def rollout_teaching(
    config: Config, student: EmbeddedSeat, policy: EmbeddedSeat, problems: Sequence[Problem], step: int
) -> tuple[list[list[Episode]], list[list[Sample]]]:
    """Groups of episodes, and the same groups as samples."""
    seed = (config.seed, "step", step)
    sketches = sketch_problems(student, problems, config, seed, config.baseline_samples)
    groups = teach(student, policy, sketches, config, config, seed, config.group_size)
    for group in groups:
        for episode, advantage in zip(group, group_advantages([e.reward for e in group], config.advantage_scale)):
            episode.advantage = advantage
    return groups, [[Sample(episode.reply.rollout, episode.advantage) for episode in group] for group in groups]


def rollout_exact(config: Config, policy: EmbeddedSeat, problems: Sequence[Problem], step: int) -> tuple[dict, list[list[Sample]]]:
    """The control: the policy answers by itself and is rewarded for being right."""
    seeds = [derive_seed(config.seed, "step", step, problem.id) for problem in problems]
    answering = Generation(config.answer_tokens, config.teacher_temperature, config.top_p)
    replies = policy.ask([protocol.baseline_messages(p.question) for p in problems], answering, seeds, n=config.group_size)
    rewards = [[float(attempt(reply, p.answer).is_correct) for reply in group] for p, group in zip(problems, replies)]
    groups = [
        [Sample(reply.rollout, advantage) for reply, advantage in zip(group, group_advantages(r, config.advantage_scale))]
        for group, r in zip(replies, rewards)
    ]
    flat = [reply for group in replies for reply in group]
    metrics = {
        "reward": sum(map(sum, rewards)) / len(flat),
        "reward_std": sum(map(spread, rewards)) / len(rewards),
        "completions/mean_length": sum(reply.tokens for reply in flat) / len(flat),
        "completions/truncated_ratio": sum(reply.is_truncated for reply in flat) / len(flat),
    }
    return metrics, groups


def spread(values: Sequence[float]) -> float:
    """Unbiased standard deviation."""
    mean = sum(values) / len(values)
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


# ---------------------------------------------------------------------------------------------------------------- loop


def evaluate(config: Config, student: EmbeddedSeat, policy: EmbeddedSeat, sketches: Sequence, problems: Sequence[Problem]) -> dict:
    """Metrics on the held-out problems, everything greedy; names begin with `eval/`."""
    greedy = dataclasses.replace(config, student_temperature=0.0, teacher_temperature=0.0)
    if config.reward == "exact":
        answering = Generation(config.answer_tokens, 0.0)
        replies = policy.ask([protocol.baseline_messages(p.question) for p in problems], answering, [0] * len(problems))
        is_correct = [attempt(reply[0], p.answer).is_correct for reply, p in zip(replies, problems)]
        return {"eval/reward": sum(is_correct) / len(is_correct)}
    groups = teach(student, policy, sketches, greedy, config, "evaluation")
    return {f"eval/{name}": value for name, value in teaching_metrics([group[0] for group in groups]).items()}


def problems_of_step(problems: Sequence[Problem], step: int, per_step: int, seed: int) -> list[Problem]:
    """The problems of a step: every problem once per epoch, in an order given by (seed, epoch)."""
    chosen = []
    for index in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(index, len(problems))
        order = random.Random(derive_seed(seed, "epoch", epoch)).sample(range(len(problems)), len(problems))
        chosen.append(dataclasses.replace(problems[order[place]], id=f"{problems[order[place]].id}@{epoch}"))
    return chosen


def episode_record(episode: Episode) -> dict:
    return {
        "id": episode.sketch.problem.id, "question": episode.sketch.problem.question, "answer": episode.sketch.problem.answer,
        "approach": episode.sketch.approach, "baselines": [a.text for a in episode.sketch.baselines],
        "baseline_accuracy": episode.sketch.baseline_accuracy, "completion": episode.reply.text, "teaching": episode.teaching,
        "guided": episode.guided.text, "is_correct": episode.guided.is_correct, "is_leak": episode.is_leak,
        "reward": episode.reward, "advantage": episode.advantage,
    }  # fmt: skip


def train(config: Config) -> None:
    state_dir, options_file = config.out / "state", config.out / "options.json"
    if config.restart and distributed.rank() == 0:
        shutil.rmtree(config.out, ignore_errors=True)
    distributed.wait()
    resumed = latest_training_state(state_dir)
    if resumed:
        refuse_changes(config, read_json(options_file), str(config.out))
        record = read_json(resumed / "state.json")
        if record["step"] >= config.steps and (config.out / "model").is_dir():
            print(f"{config.out / 'model'} is already trained ({record['step']} steps); more with --steps, anew with --restart")
            return
    problems, held_out = load_data(config)
    policy_device, student_device, reference_device = devices(config)
    start = config.student if config.reward == "exact" else config.teacher
    flag = "--student" if config.reward == "exact" else "--teacher"
    policy = load(start, policy_device, config.dtype, f"train it with `python train_sft.py`, or name another with {flag}")
    policy.recompute_activations = config.gradient_checkpointing
    sampled = copy.deepcopy(policy) if distributed.size() > 1 else policy  # a sampler needs whole weights
    distributed.shard(policy)
    reference_dir = config.out / "reference"  # one beside each state, so that a crash between the two mixes nothing twice
    anchor = reference_dir / resumed.name if resumed and config.reference_mixing else start
    reference = load(anchor, reference_device, config.dtype, "start over with --restart") if config.beta else None
    tokenizer = Tokenizer.from_directory(start)
    options = {"thinking": config.thinking, "max_rows": config.cache_rows}
    policy_seat = EmbeddedSeat(sampled, tokenizer, **options)
    teacher = distributed.divide(policy_seat)
    student = None
    if config.reward == "teaching":
        frozen = load(config.student, student_device, config.dtype, "name the student's checkpoint directory with --student")
        student = distributed.divide(EmbeddedSeat(frozen, Tokenizer.from_directory(config.student), **options))

    optimizer = MasterAdamW(
        policy, betas=config.betas, weight_decay=config.weight_decay, clip_norm=config.clip_norm,
        state_device=None if config.optimizer_device == "auto" else config.optimizer_device,
    )  # fmt: skip
    record = load_training_state(resumed, optimizer) if resumed else {"step": 0, "best": None}
    first_step, best = record["step"], record["best"]
    policy_seat.sampler.weight_version = first_step
    if resumed and sampled is not policy:
        distributed.copy_parameters(policy, sampled)
    distributed.wait()  # all have read the earlier options
    if distributed.rank() == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(options_file, to_json(config))
    print(f"{len(problems)} problems, {len(held_out)} held out; {config.problems_per_step} x {config.group_size} completions a step")

    greedy = dataclasses.replace(config, student_temperature=0.0)
    sketches = sketch_problems(student, held_out, greedy, "evaluation") if student and config.eval_every else []
    with (
        RunLog(config.out, first_step, wandb_project=config.wandb_project, wandb_run_name=config.wandb_run_name,
               config=to_json(config)) as log,
        RunLog(config.out, first_step, filename="episodes.jsonl") as episodes,
        tqdm(total=config.steps, initial=first_step, unit="step", desc=config.out.name, disable=distributed.rank() > 0) as progress,
    ):  # fmt: skip
        for step in range(first_step, config.steps):
            started = time.perf_counter()
            chosen = problems_of_step(problems, step, config.problems_per_step, config.seed)
            if config.reward == "exact":
                metrics, groups = rollout_exact(config, teacher, chosen, step)
            else:
                taught, groups = rollout_teaching(config, student, teacher, chosen, step)
                metrics = teaching_metrics([episode for group in taught for episode in group])
                metrics["reward_std"] = sum(spread([e.reward for e in group]) for group in taught) / len(taught)
                for group in taught[: config.episodes_per_step]:
                    episodes.log(step + 1, **episode_record(group[0]))
            rolled_out = time.perf_counter()
            metrics["zero_variance_ratio"] = sum(not any(s.advantage for s in group) for group in groups) / len(groups)
            rate = learning_rate(step, config.steps, config.lr, config.warmup, config.schedule)
            samples = usable(config, groups)
            if samples:
                metrics |= update(config, policy, reference, optimizer, samples, rate)
                if sampled is not policy:
                    distributed.copy_parameters(policy, sampled)
                policy_seat.sampler.weight_version = step + 1
            if reference is not None and config.reference_mixing and (step + 1) % config.reference_mixing_every == 0:
                mix_reference(reference, policy, config.reference_mixing)
            metrics |= {"lr": rate, "seconds/rollout": rolled_out - started, "seconds/update": time.perf_counter() - rolled_out,
                        "skipped_steps": optimizer.skipped_steps}

            is_last = step + 1 == config.steps
            if held_out and config.eval_every and ((step + 1) % config.eval_every == 0 or is_last):
                metrics |= evaluate(config, student, teacher, sketches, held_out)
                if best is None or metrics["eval/reward"] > best:
                    best = metrics["eval/reward"]
                    save_model(config.out / "best", policy, tokenizer)
            log.log(step + 1, **metrics)
            progress.set_postfix_str(f"reward {metrics['reward']:.2f}, kl {metrics.get('kl', 0):.3f}")
            progress.update()
            if (step + 1) % config.save_every == 0 or is_last:
                if reference is not None and config.reference_mixing:
                    save_model(reference_dir / f"step-{step + 1:08d}", reference, tokenizer)
                save_training_state(state_dir, optimizer, step + 1, {"best": best}, config.keep)
                for old in reference_dir.glob("step-*") if distributed.rank() == 0 else ():
                    if not (state_dir / old.name).is_dir():
                        shutil.rmtree(old)

    save_model(config.out / "model", policy, tokenizer)
    print(f"model: {config.out / 'model'}   metrics: {config.out / 'metrics.jsonl'}   episodes: {config.out / 'episodes.jsonl'}")


def main(argv: Sequence[str] | None = None) -> None:
    train(parse(Config, sys.argv[1:] if argv is None else argv, PRESETS, __doc__))


if __name__ == "__main__":
    run_script(main, is_parallel=True)
