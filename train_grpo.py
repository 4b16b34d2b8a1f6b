"""GRPO: train the teacher on how much its teaching improves a frozen student.

    python train_grpo.py                                                                # CPU: the nano world's teacher
    python train_grpo.py --preset qwen3-1.7b-80gb --problems gsm8k.jsonl --out runs/grpo
    python train_grpo.py --problems traces.jsonl --teacher runs/nano/teacher-grpo/model --out runs/nano/round2  # runtime traces
    python train_grpo.py --reward exact ...    # plain RL of the student itself on right or wrong: the control without a teacher
    torchrun --nproc-per-node 8 train_grpo.py --preset qwen3-8b-2gpu --optimizer-device auto ...    # eight GPUs

One step (the loop at the end of `train`):

    roll_out     P problems; for each, the student's approach and K answers alone, G teachings by the policy, a guided answer for
                 each, and the reward: how much better that answer is (nano_atlas/episode.py, nano_atlas/reward.py)
    advantages   reward minus the mean of its group
    update       gradient on the teacher's sampled tokens, each after the very prompt it was sampled from; no token of a prompt gets any
    sync         the sampler gets the new weights

    OUT/model, OUT/best     the teacher at the end, and where it did best on the held-out problems
    OUT/metrics.jsonl       one record per step           OUT/episodes.jsonl    samples of whole episodes
    OUT/state               what the same command continues from

What lies where (nano_atlas/layout.py): on --device the policy (weights, gradients) and, unless --optimizer-device says otherwise,
AdamW's float32 masters and moments; with one GPU the frozen student and reference beside them, with two on the second. Under
torchrun each rank has its rows of the policy, of gradients and of AdamW's state, and whole copies of the frozen models.

Against the published recipe (ATLAS): the gradient is on the prompt that was sampled from; the sampler has the current weights;
probe and baselines are shared by a group; the reward compares the guided answer with the student's own; an advantage is not divided
by the deviation of its group (--advantage-scale; README, "The trap of the deviation"); the KL anchor is the SFT checkpoint.
"""

import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev

import torch
from torch import Tensor
from tqdm import tqdm

from nano_atlas import distributed, protocol
from nano_atlas.batching import Sample, completion_logprobs, policy_batches, predicting_states
from nano_atlas.checkpoint import save_model
from nano_atlas.config import derive_seed, option, parse, refuse_changes, run_script, to_json
from nano_atlas.data import Problem, load_problems
from nano_atlas.episode import (
    Episode,
    EpisodeConfig,
    SeedOf,
    Sketch,
    attempt,
    episode,
    episode_record,
    seeds,
    sketch,
    teach,
    teaching_metrics,
)  # fmt: skip
from nano_atlas.errors import UserError
from nano_atlas.layout import LayoutConfig, choose_layout, load, open_policy, open_student
from nano_atlas.loss import fused_token_loss
from nano_atlas.model import Transformer
from nano_atlas.optim import (
    SCHEDULES,
    MasterAdamW,
    latest_training_state,
    learning_rate,
    load_training_state,
    save_training_state,
)  # fmt: skip
from nano_atlas.presets import presets
from nano_atlas.reward import RewardConfig, step_advantages
from nano_atlas.runs import RunLog, read_json, write_json
from nano_atlas.schedule import Call, Script, ask, play
from nano_atlas.seats import Generation, Seat
from nano_atlas.tokenizer import Tokenizer

NANO_PROBLEMS = (
    4096  # whatever --steps is, so that a run that is continued for longer goes on with the same ones
)
WARMUP = 0.03  # share of the steps over which the learning rate rises
BETAS = (0.9, 0.999)
CLIP_NORM = 1.0  # longest gradient (global norm); a longer one is scaled down to it
IMPORTANCE_CAP = 2.0  # largest weight p_trainer / p_sampler of a token
HELD_OUT = 0.05  # largest share of the problems kept for evaluation
EPISODES_PER_STEP = 2  # written to episodes.jsonl


@dataclass(frozen=True)
class RunConfig:
    preset: str = option("nano", "", group="run")
    teacher: Path = option(Path("runs/sft/model"), "checkpoint the policy starts from, and the KL reference")
    student: str = option(
        "Qwen/Qwen3-0.6B", "checkpoint of the frozen student, or URL[#model] of an OpenAI-compatible endpoint"
    )
    problems: Path | None = option(
        None, "JSONL of problems with gold answers, or traces; the nano preset makes its own"
    )
    out: Path = option(Path("runs/grpo"), "directory of the run: models, metrics, episodes, state")
    restart: bool = option(
        False, "delete what --out holds of an earlier run instead of continuing it", resumable=True
    )
    seed: int = option(42, "fixes the order of the problems and every sample")
    reward: str = option(
        "teaching",
        "what is rewarded: teaching (the student's improvement) or exact (the policy's own answer)",
        ["teaching", "exact"],
    )
    steps: int = option(250, "optimizer steps to train", above=0, resumable=True)
    eval_every: int = option(
        25, "steps between evaluations on held-out problems (0: never)", at_least=0, resumable=True
    )
    eval_problems: int = option(
        200, f"held-out problems, answered greedily; of a file at most {HELD_OUT:.0%}", at_least=0
    )
    save_every: int = option(10, "steps between training states", above=0, resumable=True)
    wandb: str = option("", "mirror the metrics to this Weights & Biases project", resumable=True)


@dataclass(frozen=True)
class GrpoConfig:
    problems_per_step: int = option(4, "problems P per step", group="GRPO", above=0)
    group_size: int = option(8, "teachings G sampled per problem", at_least=2)
    baseline_samples: int = option(
        4, "answers K of the student alone per problem; their mean is the baseline b", above=0
    )
    advantage_scale: str = option(
        "none", "what a reward minus its group's mean is divided by: nothing (Dr. GRPO), the step's std, the group's std (as published)",
        ["none", "batch", "std"],
    )  # fmt: skip
    beta: float = option(0.04, "weight of the KL to the reference (nats)", at_least=0)
    kl: str = option(
        "k3",
        "KL per token: k3 (estimated from the sampled token) or exact (over the vocabulary)",
        ["k3", "exact"],
    )
    clip: tuple[float, float] = option(
        (0.2, 0.2),
        "no gradient at ratios below 1 - LOW with negative, above 1 + HIGH with positive advantages",
        at_least=0,
    )
    normalization: str = option(
        "sequence",
        "weights of tokens: sequence (GRPO), token (DAPO), constant (Dr. GRPO)",
        ["sequence", "token", "constant"],
    )
    updates_per_batch: int = option(
        1, "optimizer updates per step; above 1, ratios are clipped against the first", above=0
    )
    tokens_per_batch: int = option(
        16384, "most tokens in one micro-batch, which is what memory depends on", above=0
    )
    lr: float = option(1e-6, "peak learning rate", above=0)
    schedule: str = option("constant", "learning rate after the warm-up", SCHEDULES)


@dataclass(frozen=True)
class Config(LayoutConfig, RewardConfig, EpisodeConfig, GrpoConfig, RunConfig):
    max_logp_diff: float = (
        0.1  # nats; stop if trainer and sampler differ by more in the mean log-prob of fresh samples
    )

    @property
    def longest_completion(self) -> int:
        return self.answer_tokens if self.reward == "exact" else self.teaching_tokens

    def check(self) -> None:
        if self.teacher_temperature <= 0:
            raise UserError(
                "--temperature: the teacher's must be above 0: a greedy policy samples no group to compare"
            )
        if not self.problems and self.preset != "nano":
            raise UserError("name the problems to train on with --problems FILE")


# ----------------------------------------------------------------------------------------------------- rollout, advantages


@dataclass
class Batch:
    """What one step trains on."""

    groups: list[list[Episode]]  # P groups of G; `reply.rollout` has the sampled ids and log-probs
    metrics: dict[str, float]

    @property
    def samples(self) -> list[Sample]:
        return [
            Sample(episode.reply.rollout, episode.advantage) for group in self.groups for episode in group
        ]


def roll_out(config: Config, seats: Mapping[str, Seat], problems: Sequence[Problem], step: int) -> Batch:
    """One step's episodes with rewards and advantages. The seats are "student" and "teacher", the policy."""
    started, seed = time.perf_counter(), seeds((config.seed, "step", step))
    chosen = problems_of_step(problems, step, config.problems_per_step, config.seed)
    if config.reward == "exact":
        scripts = [answer(problem, config, seed, config.group_size) for problem in chosen]
    else:
        count = seats["teacher"].count_tokens
        scripts = [
            episode(problem, config, config, seed, count, config.baseline_samples, config.group_size)
            for problem in chosen
        ]
    groups = play(scripts, seats)
    rewards_PG = [[episode.reward for episode in group] for group in groups]
    for group, advantages_G in zip(groups, step_advantages(rewards_PG, config.advantage_scale)):
        for episode_, advantage in zip(group, advantages_G):
            episode_.advantage = advantage
    metrics = teaching_metrics(sum(groups, [])) | {
        "reward_std": sum(map(stdev, rewards_PG)) / len(rewards_PG),
        "zero_variance_ratio": sum(not any(e.advantage for e in group) for group in groups) / len(groups),
        "seconds/rollout": time.perf_counter() - started,
    }
    return Batch(groups, metrics)


def answer(problem: Problem, config: Config, seed: SeedOf, group_size: int) -> Script:
    """The control without a teacher: the policy answers by itself and is rewarded for being right -> list[Episode]."""
    generation = Generation(config.answer_tokens, config.teacher_temperature, config.top_p)
    call = Call(
        "teacher",
        "alone",
        protocol.baseline_messages(problem.question),
        generation,
        seed("alone", problem.id),
        group_size,
    )
    (replies,) = yield from ask(call)
    attempts = [attempt(reply, problem.answer) for reply in replies]
    alone = Sketch(problem, "", 0, attempts)
    return [Episode(alone, "", reply, "", 0, own, False, own.score) for reply, own in zip(replies, attempts)]


def problems_of_step(problems: Sequence[Problem], step: int, per_step: int, seed: int) -> list[Problem]:
    """The problems of a step: every problem once per epoch, in an order given by (seed, epoch)."""
    chosen = []
    for index in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(index, len(problems))
        order = random.Random(derive_seed(seed, "epoch", epoch)).sample(range(len(problems)), len(problems))
        chosen.append(replace(problems[order[place]], id=f"{problems[order[place]].id}@{epoch}"))
    return chosen


# ----------------------------------------------------------------------------------------------------------------- the loss


def grpo_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    sampled_logprobs: Tensor,
    advantages: Tensor,
    kl: Tensor | None,
    config: GrpoConfig,
) -> Tensor:
    """The loss of each token, `[T]` float32 (DeepSeekMath, arXiv:2402.03300, equation 3); all arguments `[T]`, log-probs in nats.

    logprobs: of the policy, with gradient; old_logprobs: of the policy that the step began with, which are the same numbers in the
    step's first update; sampled_logprobs: what the sampler reported. Sampler and trainer never compute quite the same (kernels,
    precision), and with --overlap the sampler is one update behind, so the policy's term is weighted by p_old / p_sampler,
    truncated (Ionides 2008; for LLMs Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    """
    low, high = config.clip
    ratio = (logprobs - old_logprobs).exp()
    importance = (old_logprobs - sampled_logprobs).exp().clamp(max=IMPORTANCE_CAP)
    loss = -importance * torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return loss if kl is None else loss + config.beta * kl


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) from sampled tokens, `r - 1 - log r` with r = p_ref / p.

    J. Schulman, "Approximating KL divergence" (2020), estimator k3; DeepSeekMath (arXiv:2402.03300), equation 4.
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


def token_weights(lengths: Sequence[int], mode: str, longest: int) -> list[float]:
    """What each token of each of B completions weighs in the step's loss, however the step is cut into micro-batches.

    "sequence"  1 / (B * length)    mean over tokens, then over completions: GRPO, arXiv:2402.03300
    "token"     1 / sum(lengths)    mean over tokens: DAPO, arXiv:2503.14476
    "constant"  1 / (B * longest)   no length in it at all: Dr. GRPO, arXiv:2503.20783; longest: what a completion may have
    """
    if mode == "token":
        return [1 / sum(lengths)] * len(lengths)
    return [1 / (len(lengths) * (length if mode == "sequence" else longest)) for length in lengths]


def update(
    config: Config,
    policy: Transformer,
    reference: Transformer | None,
    optimizer: MasterAdamW,
    samples: Sequence[Sample],
    rate: float,
    is_fresh: bool = True,
) -> dict[str, float]:
    """All optimizer updates on one step's samples; returns metrics, those of the sampled tokens from the first update.

    T tokens were sampled in the step. All ranks are given all samples; each computes its share, and gets the statistics of all.
    is_fresh: the samples are from the present weights; then UserError is raised when trainer and sampler disagree about them.
    """
    started, device = time.perf_counter(), policy.head_weight.device
    lengths = [len(sample.rollout.completion_ids) for sample in samples]

    def per_token(values: Sequence[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(torch.tensor(lengths)).to(device)

    weights_T = per_token(token_weights(lengths, config.normalization, config.longest_completion))
    advantages_T = per_token([sample.advantage for sample in samples])
    sampled_T = torch.tensor(
        [logprob for sample in samples for logprob in sample.rollout.logprobs], device=device
    )
    own = distributed.shares(lengths)[distributed.rank()]
    batching = config.tokens_per_batch, config.teacher_temperature
    is_k3, old_T, metrics = reference is not None and config.kl == "k3", None, {}
    ref_T = completion_logprobs(reference, samples, *batching, own).to(device) if is_k3 else None

    for _ in range(config.updates_per_batch):
        loss_sum, now_T, entropy_T, kl_T = (
            torch.zeros((), device=device),
            *torch.zeros(3, len(sampled_T), device=device),
        )
        batches = policy_batches(samples, config.tokens_per_batch, device, own)
        filler = batches[0] if batches else policy_batches(samples, config.tokens_per_batch, device, [0])[0]
        for batch, is_own in distributed.in_step(batches, filler):
            exact = None
            if reference is not None and config.kl == "exact":
                with torch.no_grad():
                    exact = predicting_states(reference, batch), reference.head_weight

            def token_loss(logprobs: Tensor, exact_kl: Tensor | None, chunk: slice) -> Tensor:
                t = batch.rows[chunk]
                old = logprobs.detach() if old_T is None else old_T[t]
                kl = k3_kl(logprobs, ref_T[t]) if is_k3 else exact_kl
                return grpo_token_loss(logprobs, old, sampled_T[t], advantages_T[t], kl, config)

            loss, stats = fused_token_loss(
                predicting_states(policy, batch), policy.head_weight, batch.targets, token_loss, weights_T[batch.rows] * is_own,
                temperature=config.teacher_temperature, reference=exact,
            )  # fmt: skip
            loss.backward()
            loss_sum += loss.detach()
            if is_own:
                now_T[batch.rows], entropy_T[batch.rows] = stats.logprobs, stats.entropy
                kl_T[batch.rows] = (
                    k3_kl(stats.logprobs, ref_T[batch.rows]) if is_k3 else 0.0 if exact is None else stats.kl
                )
        for values in (loss_sum, now_T, entropy_T, kl_T):
            distributed.sum_over_ranks(values)
        if old_T is None:
            difference, importance = (now_T - sampled_T).abs(), (now_T - sampled_T).exp()
            metrics = {
                "loss": loss_sum.item(), "kl": kl_T.mean().item(), "entropy": entropy_T.mean().item(),
                "sampling/logp_diff_mean": difference.mean().item(), "sampling/logp_diff_max": difference.max().item(),
                "sampling/importance_mean": importance.clamp(max=IMPORTANCE_CAP).mean().item(),
                "sampling/importance_capped": (importance > IMPORTANCE_CAP).float().mean().item(),
                "clip_ratio": 0.0, "grad_norm": 0.0,
            }  # fmt: skip
            if is_fresh and not metrics["sampling/logp_diff_mean"] <= config.max_logp_diff:
                raise UserError(
                    f"trainer and sampler disagree about the sampled tokens by {metrics['sampling/logp_diff_mean']:.3f} nats on "
                    f"average ({config.max_logp_diff} are allowed): the sampler's weights or prompts are not the trainer's"
                )
            old_T = now_T
        ratio_T, (low, high) = (now_T - old_T).exp(), config.clip
        is_clipped = ((ratio_T < 1 - low) & (advantages_T < 0)) | ((ratio_T > 1 + high) & (advantages_T > 0))
        metrics["clip_ratio"] += is_clipped.float().mean().item() / config.updates_per_batch
        metrics["grad_norm"] += optimizer.step(rate) / config.updates_per_batch
    return metrics | {"seconds/update": time.perf_counter() - started}


# ----------------------------------------------------------------------------------------------------------------- training


class Rollouts:
    """The batch of each step from the sampler, which gets the new weights after each update.

    With --overlap the next step is sampled while this one trains, from weights that are one update old.
    """

    def __init__(self, config: Config, seats: Mapping[str, Seat], problems: Sequence[Problem]):
        self.config, self.seats, self.problems, self.sampler = (
            config,
            seats,
            problems,
            seats["teacher"].sampler,
        )
        self.thread, self.upcoming = ThreadPoolExecutor(1), None

    def take(self, step: int) -> tuple[Batch, bool]:
        """-> the batch, and whether it is from the present weights."""
        is_fresh = self.upcoming is None
        batch = roll_out(self.config, self.seats, self.problems, step) if is_fresh else self.upcoming.result()
        self.upcoming = None
        if self.config.overlap and step + 1 < self.config.steps:
            self.upcoming = self.thread.submit(roll_out, self.config, self.seats, self.problems, step + 1)
        else:
            self.sampler.rest()
        return batch, is_fresh

    def sync(self, policy: Transformer, version: int) -> float:
        """The sampler gets the policy's weights, once nothing is sampled from the old ones; returns the parity difference (nats)."""
        if self.upcoming is not None:
            self.upcoming.result()
        return self.sampler.sync(policy, version)


def load_data(config: Config) -> tuple[list[Problem], list[Problem]]:
    """(training, held-out) problems."""
    if config.problems is None:
        from nano_atlas import world

        return world.training_problems(NANO_PROBLEMS, config.seed), world.held_out(
            "math", config.eval_problems, "validation"
        )
    problems = load_problems(config.problems)
    order = random.Random(derive_seed(config.seed, "held out")).sample(problems, len(problems))
    count = min(round(HELD_OUT * len(problems)), config.eval_problems)
    return order[count:], order[:count]


def evaluate(config: Config, seats: Mapping[str, Seat], sketches: Sequence[Sketch]) -> dict[str, float]:
    """Metrics of the policy as a teacher of the held-out problems, everything greedy; names begin with `eval/`."""
    greedy, seed, count = config.greedy(), seeds("evaluation"), seats["teacher"].count_tokens
    if config.reward == "exact":
        scripts = [answer(sketch.problem, greedy, seed, 1) for sketch in sketches]
    else:
        scripts = [teach(sketch, greedy, config, seed, count) for sketch in sketches]
    metrics = teaching_metrics([group[0] for group in play(scripts, seats)])
    return {f"eval/{name}": value for name, value in metrics.items()}


def train(config: Config) -> None:
    state_dir, options_file = config.out / "state", config.out / "options.json"
    if config.restart and distributed.rank() == 0:
        shutil.rmtree(config.out, ignore_errors=True)
    distributed.wait()
    resumed = latest_training_state(state_dir)
    if resumed:
        refuse_changes(config, read_json(options_file), str(config.out))
        if read_json(resumed / "state.json")["step"] >= config.steps and (config.out / "model").is_dir():
            print(f"{config.out / 'model'} is already trained; more with --steps, anew with --restart")
            return
    problems, held_out = load_data(config)
    is_taught = config.reward == "teaching"
    start, flag = (config.teacher, "--teacher") if is_taught else (config.student, "--student")
    layout = choose_layout(config, config.student if is_taught else "", config.kl)
    policy = load(
        start,
        layout.policy,
        config.dtype,
        f"train it with `python train_sft.py`, or name another with {flag}",
    )
    policy.recompute_activations = config.gradient_checkpointing
    distributed.shard(policy)
    reference = load(start, layout.reference, config.dtype, "") if config.beta else None
    tokenizer = Tokenizer.from_directory(start)
    state_device = None if config.optimizer_device == "auto" else config.optimizer_device
    optimizer = MasterAdamW(
        policy, betas=BETAS, weight_decay=0.0, clip_norm=CLIP_NORM, state_device=state_device
    )
    record = load_training_state(resumed, optimizer) if resumed else {"step": 0, "best": None}
    first_step, best = record["step"], record["best"]
    distributed.wait()  # all have read the earlier options
    if distributed.rank() == 0:
        write_json(options_file, to_json(config))
    print(
        f"{len(problems)} problems, {len(held_out)} held out; {config.problems_per_step} x {config.group_size} completions a step"
    )

    with (
        ExitStack() as servers,
        RunLog(config.out, first_step, wandb=config.wandb, config=to_json(config)) as log,
        RunLog(config.out, first_step, filename="episodes.jsonl") as episodes,
        tqdm(
            total=config.steps,
            initial=first_step,
            unit="step",
            desc=config.out.name,
            disable=distributed.rank() > 0,
        ) as progress,
    ):
        seats: dict[str, Seat] = {
            "teacher": open_policy(config, layout, policy, tokenizer, first_step, servers)
        }
        sketches = [Sketch(problem, "", 0, []) for problem in held_out]
        if is_taught:
            seats["student"] = open_student(config, layout, servers)
            if config.eval_every:
                sketches = play(
                    [sketch(problem, config.greedy(), seeds("evaluation")) for problem in held_out], seats
                )
        rollouts = Rollouts(config, seats, problems)

        for step in range(first_step, config.steps):
            is_last = step + 1 == config.steps
            rate = learning_rate(step, config.steps, config.lr, WARMUP, config.schedule)
            batch, is_fresh = rollouts.take(step)
            metrics = batch.metrics | update(
                config, policy, reference, optimizer, batch.samples, rate, is_fresh
            )
            metrics["sampling/parity"] = rollouts.sync(policy, step + 1)

            if sketches and config.eval_every and ((step + 1) % config.eval_every == 0 or is_last):
                metrics |= evaluate(config, seats, sketches)
                if best is None or metrics["eval/reward"] > best:
                    best = metrics["eval/reward"]
                    save_model(config.out / "best", policy, tokenizer)
            for group in batch.groups[:EPISODES_PER_STEP]:
                episodes.log(step + 1, **episode_record(group[0]))
            log.log(step + 1, **metrics, lr=rate, skipped_steps=optimizer.skipped_steps)
            progress.set_postfix_str(f"reward {metrics['reward']:.2f}, kl {metrics['kl']:.3f}")
            progress.update()
            if (step + 1) % config.save_every == 0 or is_last:
                save_training_state(state_dir, optimizer, step + 1, {"best": best})

    save_model(config.out / "model", policy, tokenizer)
    print(
        f"model: {config.out / 'model'}   metrics: {config.out / 'metrics.jsonl'}   episodes: {config.out / 'episodes.jsonl'}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    train(parse(Config, sys.argv[1:] if argv is None else argv, presets("train_grpo"), __doc__))


if __name__ == "__main__":
    run_script(main, is_parallel=True)
