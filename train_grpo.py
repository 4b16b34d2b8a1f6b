"""GRPO: train the teacher on how much its teaching improves a frozen student.

    python train_grpo.py                                                                   # CPU: the nano world's teacher
    python train_grpo.py --preset 80gb --teacher runs/sft/model --student Qwen/Qwen3-0.6B --problems gsm8k.jsonl --out runs/grpo
    python train_grpo.py --traces traces.jsonl --teacher runs/nano/teacher-grpo/model --out runs/nano/round2  # on what the runtime exported
    python train_grpo.py --reward exact ...      # plain RL of the student itself on right or wrong: the control without a teacher
    torchrun --nproc-per-node 8 train_grpo.py --preset 2gpu --optimizer-device auto ...    # eight GPUs; the same options on any number

One step: P problems; one probe and K answers per problem by the student alone; G teachings per problem by the current policy; one
guided answer each; reward; advantages (reward minus the mean of its group); one update (or several). Log-probabilities are those
of the sampled token ids after the very prompt they were sampled from, at the sampling temperature, and each step checks that the
trainer agrees with the sampler about them.

    OUT/model, OUT/best     the teacher at the end, and where it did best on the held-out problems
    OUT/metrics.jsonl       one record per step           OUT/episodes.jsonl    samples of whole episodes
    OUT/state               what the same command continues from

Against the published recipe (ATLAS): the gradient is on the prompt that was sampled from; the sampler has the current weights;
probe and baselines are shared by a group; the reward compares the guided answer with the student's own; an advantage is not divided
by the deviation of its group, which would make the smallest term of the reward as strong as the largest (--advantage-scale); the
KL anchor is the SFT checkpoint unless --reference-mixing says otherwise. In one process models may sit on different GPUs; under
torchrun each rank shards the policy and has the frozen models, and a copy to sample from, to itself.

Who samples is chosen in nano_atlas/layout.py, or with --rollout: this process, or vLLM servers that get the weights after each
update. With --overlap they sample step t + 1 while step t trains, from weights that are one update old; importance weights correct
for that. The state holds those samples, so a continued run trains on the very same ones.
"""

import dataclasses
import random
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from tqdm import tqdm

from benchmarks.memory import needs
from nano_atlas import distributed, protocol, world
from nano_atlas.batching import Batch, Sample, UpdateConfig, mix_reference, update, usable
from nano_atlas.checkpoint import save_model
from nano_atlas.config import Preset, option, parse, refuse_changes, run_script, to_json
from nano_atlas.data import Problem, derive_seed, load_problems
from nano_atlas.episode import Episode, attempt, episode_record, sketch_problems, teach, teaching_metrics
from nano_atlas.errors import UserError
from nano_atlas.layout import LayoutConfig, choose_layout, load, open_policy, open_student
from nano_atlas.optim import (
    SCHEDULES,
    MasterAdamW,
    latest_training_state,
    learning_rate,
    load_training_state,
    save_training_state,
)
from nano_atlas.reward import RewardConfig, step_advantages
from nano_atlas.runs import RunLog, read_json, write_json
from nano_atlas.runtime.traces import problems_from_traces
from nano_atlas.seats import Generation, Question, Seat, TokenSeat
from nano_atlas.tokenizer import Tokenizer

NANO = Path("runs/nano")
NANO_PROBLEMS = (
    4096  # whatever --steps is, so that a run that is continued for longer goes on with the same ones
)
GPU = {"dtype": "bfloat16", "gradient_checkpointing": True, "tokens_per_batch": 8192}
PRESETS = {
    "nano": Preset(
        "the nano world on a CPU, 1 GB",
        {
            "student": str(world.STUDENT),
            "teacher": NANO / "teacher-sft/model",
            "out": NANO / "teacher-grpo",
            "steps": 40,
            "problems_per_step": 16,
            "baseline_samples": 4,
            "lr": 2e-4,
            "schedule": "cosine",
            "probe_tokens": 40,
            "teaching_tokens": 96,
            "answer_tokens": 120,
            "tokens_per_batch": 8192,
            "eval_every": 20,
            "eval_problems": 200,
            "save_every": 1,
        },
    ),
    "24gb": Preset(
        f"0.6B teacher and student on one GPU: {needs('Qwen/Qwen3-0.6B', 'Qwen/Qwen3-0.6B', 1, 32, 2560)}; --problems",
        {
            **GPU,
            "student": "Qwen/Qwen3-0.6B",
            "answer_tokens": 1024,
            "teaching_tokens": 1024,
            "cache_rows": 32,
        },
    ),
    "80gb": Preset(
        f"1.7B teacher, 4B student on one GPU: {needs('Qwen/Qwen3-1.7B', 'Qwen/Qwen3-4B', 1, 48, 4608)}; --problems",
        {**GPU, "student": "Qwen/Qwen3-4B", "answer_tokens": 2048, "teaching_tokens": 2048, "cache_rows": 48},
    ),
    "2gpu": Preset(
        f"8B teacher, 4B student on two 80 GB GPUs: {needs('Qwen/Qwen3-8B', 'Qwen/Qwen3-4B', 2)} on the host; --problems",
        {
            **GPU,
            "student": "Qwen/Qwen3-4B",
            "optimizer_device": "cpu",
            "answer_tokens": 4096,
            "teaching_tokens": 4096,
            "cache_rows": 16,
        },
    ),
}


@dataclass(frozen=True)
class Config(UpdateConfig, RewardConfig, LayoutConfig):
    preset: str = option("nano", "", group="run")
    out: Path = option(Path("runs/grpo"), "directory of the run: models, metrics, episodes, state")
    restart: bool = option(
        False, "delete what --out holds of an earlier run instead of continuing it", resumable=True
    )
    seed: int = option(42, "fixes the order of the problems and every sample")

    problems: Path | None = option(
        None, "JSONL of problems with gold answers; the nano preset makes its own", group="data"
    )
    traces: Path | None = option(None, "JSONL of traces exported by runtime_loop.py, instead of --problems")
    held_out: float = option(
        0.05, "share of the problems (0 to 1) kept for evaluation; the nano preset makes separate ones"
    )
    reward: str = option(
        "teaching",
        "what is rewarded: teaching (the student's improvement) or exact (the policy's own answer)",
        ["teaching", "exact"],
    )

    teacher: Path = option(
        Path("runs/sft/model"), "checkpoint the policy starts from, and the KL reference", group="models"
    )
    student: str = option(
        "Qwen/Qwen3-0.6B", "checkpoint of the frozen student, or the URL of any OpenAI-compatible endpoint"
    )
    student_model: str = option(
        "", "model to ask for where --student is a URL; by default the first that it lists"
    )

    steps: int = option(250, "optimizer steps to train", group="optimization", resumable=True)
    problems_per_step: int = option(4, "problems P per step")
    group_size: int = option(8, "teachings G sampled per problem")
    baseline_samples: int = option(
        4, "answers K of the student alone per problem; their mean is the baseline b"
    )
    lr: float = option(1e-6, "peak learning rate")
    schedule: str = option("constant", "learning rate after the warm-up", SCHEDULES)
    warmup: float = option(0.03, "share of the steps (0 to 1) over which the learning rate rises")
    betas: tuple[float, float] = option((0.9, 0.999), "decay of Adam's two running means, per update")
    weight_decay: float = option(0.0, "decoupled decay of the matrices, times the learning rate, per update")
    clip_norm: float = option(1.0, "longest gradient (global norm); a longer one is scaled down to it")

    advantage_scale: str = option(
        "none",
        "what a reward minus its group's mean is divided by: nothing (Dr. GRPO), the step's std, "
        "the group's std (as published)",
        ["none", "batch", "std"],
    )
    reference_mixing: float = option(
        0.0, "share of the policy mixed into the reference (0: frozen); the published run used 0.9"
    )
    reference_mixing_every: int = option(2, "steps between mixings, where --reference-mixing is above 0")

    eval_every: int = option(
        25, "steps between evaluations on held-out problems (0: never)", group="records", resumable=True
    )
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
        positive = (
            "steps",
            "problems_per_step",
            "baseline_samples",
            "updates_per_batch",
            "tokens_per_batch",
            "lr",
            "clip_norm",
            "save_every",
            "keep",
            "teaching_tokens",
            "answer_tokens",
            "reference_mixing_every",
            "cache_rows",
            "vllm_timeout",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        if self.group_size < 2:
            raise UserError(
                f"--group-size must be 2 or more, not {self.group_size}: an advantage compares within a group"
            )
        for name in ("held_out", "warmup", "reference_mixing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must be from 0 to 1, not {getattr(self, name)}")
        if self.teacher_temperature <= 0:
            raise UserError(
                "--teacher-temperature must be above 0: a greedy policy samples no group to compare"
            )
        if self.problems and self.traces:
            raise UserError("--problems and --traces exclude each other")
        if not (self.problems or self.traces) and self.preset != "nano":
            raise UserError("name the problems to train on with --problems FILE or --traces FILE")
        for name in (
            "probe_tokens",
            "beta",
            "clip_low",
            "clip_high",
            "importance_cap",
            "eval_every",
            "episodes_per_step",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be below 0, not {getattr(self, name)}")
        if self.reference_mixing and not self.beta:
            raise UserError("--reference-mixing has no effect with --beta 0")


# --------------------------------------------------------------------------------------------------------------- setup


def load_data(config: Config) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems."""
    if config.problems is None and config.traces is None:
        return world.training_problems(NANO_PROBLEMS, config.seed), world.held_out(
            "math", config.eval_problems, "validation"
        )
    if config.traces is not None:
        problems, left_out = problems_from_traces(config.traces)
        for reason, count in left_out.items():
            print(f"left out: {count} traces ({reason})")
    else:
        problems = load_problems(config.problems)
    order = random.Random(derive_seed(config.seed, "held out")).sample(problems, len(problems))
    count = min(round(config.held_out * len(problems)), config.eval_problems)
    if len(problems) - count < 1:
        raise UserError(
            f"no problem left to train on: {len(problems)} in all, {count} held out; lower --held-out"
        )
    return order[count:], order[:count]


# ------------------------------------------------------------------------------------------------------------ rollouts


def roll_out(
    config: Config, student: Seat | None, policy: TokenSeat, problems: Sequence[Problem], step: int
) -> Batch:
    started, episodes = time.perf_counter(), []
    chosen = problems_of_step(problems, step, config.problems_per_step, config.seed)
    if config.reward == "exact":
        metrics, groups = rollout_exact(config, policy, chosen, step)
    else:
        taught, groups = rollout_teaching(config, student, policy, chosen, step)
        metrics = teaching_metrics([episode for group in taught for episode in group])
        metrics["reward_std"] = sum(stdev(e.reward for e in group) for group in taught) / len(taught)
        episodes = [episode_record(group[0]) for group in taught[: config.episodes_per_step]]
    metrics["zero_variance_ratio"] = sum(not any(s.advantage for s in group) for group in groups) / len(
        groups
    )
    return Batch(groups, metrics, episodes, time.perf_counter() - started)


def rollout_teaching(
    config: Config, student: Seat, policy: TokenSeat, problems: Sequence[Problem], step: int
) -> tuple[list[list[Episode]], list[list[Sample]]]:
    """Groups of episodes, and the same groups as samples."""
    seed = (config.seed, "step", step)
    sketches = sketch_problems(student, problems, config, seed, config.baseline_samples)
    groups = teach(student, policy, sketches, config, config, seed, config.group_size)
    return groups, samples_of(config, groups)


def samples_of(config: Config, groups: Sequence[list[Episode]]) -> list[list[Sample]]:
    """Groups of episodes as samples, with their advantages, which the episodes get too."""
    for group, advantages in zip(
        groups, step_advantages([[e.reward for e in group] for group in groups], config.advantage_scale)
    ):
        for episode, advantage in zip(group, advantages):
            episode.advantage = advantage
    return [[Sample(episode.reply.rollout, episode.advantage) for episode in group] for group in groups]


def rollout_exact(
    config: Config, policy: TokenSeat, problems: Sequence[Problem], step: int
) -> tuple[dict, list[list[Sample]]]:
    """The control: the policy answers by itself and is rewarded for being right."""
    answering = Generation(config.answer_tokens, config.teacher_temperature, config.top_p)
    replies = policy.ask(
        [
            Question(
                protocol.baseline_messages(p.question),
                answering,
                derive_seed(config.seed, "step", step, p.id),
                config.group_size,
            )
            for p in problems
        ]
    )
    rewards = [
        [float(attempt(reply, p.answer).is_correct) for reply in group] for p, group in zip(problems, replies)
    ]
    groups = [
        [Sample(reply.rollout, advantage) for reply, advantage in zip(group, advantages)]
        for group, advantages in zip(replies, step_advantages(rewards, config.advantage_scale))
    ]
    flat = [reply for group in replies for reply in group]
    metrics = {
        "reward": sum(map(sum, rewards)) / len(flat),
        "reward_std": sum(map(stdev, rewards)) / len(rewards),
        "completions/mean_length": sum(reply.tokens for reply in flat) / len(flat),
        "completions/truncated_ratio": sum(reply.is_truncated for reply in flat) / len(flat),
    }
    return metrics, groups


# ---------------------------------------------------------------------------------------------------------------- loop


def evaluate(
    config: Config, student: Seat | None, policy: TokenSeat, sketches: Sequence, problems: Sequence[Problem]
) -> dict:
    """Metrics on the held-out problems, everything greedy; names begin with `eval/`."""
    if config.reward == "exact":
        answering = Generation(config.answer_tokens, 0.0)
        replies = policy.ask(
            [Question(protocol.baseline_messages(p.question), answering, 0) for p in problems]
        )
        is_correct = [attempt(reply[0], p.answer).is_correct for reply, p in zip(replies, problems)]
        return {"eval/reward": sum(is_correct) / len(is_correct)}
    groups = teach(student, policy, sketches, config.greedy(), config, "evaluation")
    return {f"eval/{name}": value for name, value in teaching_metrics([group[0] for group in groups]).items()}


def problems_of_step(problems: Sequence[Problem], step: int, per_step: int, seed: int) -> list[Problem]:
    """The problems of a step: every problem once per epoch, in an order given by (seed, epoch)."""
    chosen = []
    for index in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(index, len(problems))
        order = random.Random(derive_seed(seed, "epoch", epoch)).sample(range(len(problems)), len(problems))
        chosen.append(dataclasses.replace(problems[order[place]], id=f"{problems[order[place]].id}@{epoch}"))
    return chosen


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
            print(
                f"{config.out / 'model'} is already trained ({record['step']} steps); more with --steps, anew with --restart"
            )
            return
    problems, held_out = load_data(config)
    start, flag = (config.student, "--student") if config.reward == "exact" else (config.teacher, "--teacher")
    layout = choose_layout(config, config.student, config.reward == "teaching", config.kl)
    policy = load(
        start,
        layout.policy,
        config.dtype,
        f"train it with `python train_sft.py`, or name another with {flag}",
    )
    policy.recompute_activations = config.gradient_checkpointing
    distributed.shard(policy)
    reference_dir = (
        config.out / "reference"
    )  # one beside each state, so that a crash between the two mixes nothing twice
    anchor = reference_dir / resumed.name if resumed and config.reference_mixing else start
    reference = (
        load(anchor, layout.reference, config.dtype, "start over with --restart") if config.beta else None
    )
    tokenizer = Tokenizer.from_directory(start)
    optimizer = MasterAdamW(
        policy, betas=config.betas, weight_decay=config.weight_decay, clip_norm=config.clip_norm,
        state_device=None if config.optimizer_device == "auto" else config.optimizer_device,
    )  # fmt: skip
    record = load_training_state(resumed, optimizer) if resumed else {"step": 0, "best": None}
    first_step, best = record["step"], record["best"]
    distributed.wait()  # all have read the earlier options
    if distributed.rank() == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(options_file, to_json(config))
    print(
        f"{len(problems)} problems, {len(held_out)} held out; {config.problems_per_step} x {config.group_size} completions a step"
    )

    with (
        ThreadPoolExecutor(1) as ahead,  # samples one step ahead with --overlap
        ExitStack() as servers,
        RunLog(config.out, first_step, wandb_project=config.wandb_project, wandb_run_name=config.wandb_run_name,
               config=to_json(config)) as log,
        RunLog(config.out, first_step, filename="episodes.jsonl") as episodes,
        tqdm(total=config.steps, initial=first_step, unit="step", desc=config.out.name, disable=distributed.rank() > 0) as progress,
    ):  # fmt: skip
        policy_seat = open_policy(config, layout, policy, tokenizer, first_step, servers)
        sampler = policy_seat.sampler
        student = open_student(config, layout, servers) if config.reward == "teaching" else None
        sketches = (
            sketch_problems(student, held_out, config.greedy(), "evaluation")
            if student and config.eval_every
            else []
        )
        upcoming = ahead.submit(Batch.from_json, record["upcoming"]) if record.get("upcoming") else None
        for step in range(first_step, config.steps):
            is_last = step + 1 == config.steps
            started, is_ahead = time.perf_counter(), upcoming is not None
            batch = upcoming.result() if upcoming else roll_out(config, student, policy_seat, problems, step)
            rolled_out = time.perf_counter()
            upcoming = None
            if config.overlap and not is_last:
                upcoming = ahead.submit(roll_out, config, student, policy_seat, problems, step + 1)
            metrics, rate = (
                batch.metrics,
                learning_rate(step, config.steps, config.lr, config.warmup, config.schedule),
            )
            if samples := usable(config, batch.groups):
                if not upcoming:
                    sampler.rest()
                staleness = max(sampler.weight_version - sample.rollout.weight_version for sample in samples)
                metrics |= update(config, policy, reference, optimizer, samples, rate, staleness)
            if (
                reference is not None
                and config.reference_mixing
                and (step + 1) % config.reference_mixing_every == 0
            ):
                mix_reference(reference, policy, config.reference_mixing)
            updated = time.perf_counter()
            if upcoming:
                upcoming.result()  # all of it from the old weights
            if samples:
                metrics["sampling/parity"] = sampler.sync(policy, step + 1)
            ended = time.perf_counter()
            sampling = (0.0 if is_ahead else batch.seconds) + (upcoming.result().seconds if upcoming else 0.0)
            metrics |= {
                "lr": rate, "skipped_steps": optimizer.skipped_steps, "seconds/rollout": batch.seconds,
                "seconds/update": updated - rolled_out, "idle/trainer": 1 - (updated - rolled_out) / (ended - started),
                "idle/sampler": 1 - min(1.0, sampling / (ended - started)),
            }  # fmt: skip

            if held_out and config.eval_every and ((step + 1) % config.eval_every == 0 or is_last):
                metrics |= evaluate(config, student, policy_seat, sketches, held_out)
                if best is None or metrics["eval/reward"] > best:
                    best = metrics["eval/reward"]
                    save_model(config.out / "best", policy, tokenizer)
            for episode in batch.episodes:
                episodes.log(step + 1, **episode)
            log.log(step + 1, **metrics)
            progress.set_postfix_str(f"reward {metrics['reward']:.2f}, kl {metrics.get('kl', 0):.3f}")
            progress.update()
            if (step + 1) % config.save_every == 0 or is_last:
                if reference is not None and config.reference_mixing:
                    save_model(reference_dir / f"step-{step + 1:08d}", reference, tokenizer)
                extra = {
                    "best": best,
                    "upcoming": dataclasses.asdict(upcoming.result()) if upcoming else None,
                }
                save_training_state(state_dir, optimizer, step + 1, extra, config.keep)
                for old in reference_dir.glob("step-*") if distributed.rank() == 0 else ():
                    if not (state_dir / old.name).is_dir():
                        shutil.rmtree(old)

    save_model(config.out / "model", policy, tokenizer)
    print(
        f"model: {config.out / 'model'}   metrics: {config.out / 'metrics.jsonl'}   episodes: {config.out / 'episodes.jsonl'}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    train(parse(Config, sys.argv[1:] if argv is None else argv, PRESETS, __doc__))


if __name__ == "__main__":
    run_script(main, is_parallel=True)
