r"""GRPO: train the teacher on how much its teaching improves a frozen student.

    try it, on a CPU   python train_grpo.py                                   (after train_sft.py)
    on one GPU         python train_grpo.py --preset qwen3-1.7b-80gb --problems gsm8k.jsonl
    on eight GPUs      torchrun --nproc-per-node 8 train_grpo.py --preset qwen3-8b-2gpu \
                           --optimizer-device auto --problems gsm8k.jsonl
    will it fit?       python train_grpo.py --preset qwen3-8b-2gpu --show-layout     (loads nothing)
    distillation       python train_grpo.py --reward none --kl exact --reference DIR

One step (the loop in `train`):

    roll_out     P problems: the student's approach and K answers alone, G teachings, an answer with each.
                 Reward: how much better the guided answer is (no <teaching>: -0.5). Advantage: reward - mean
    update       gradient on the teacher's sampled tokens, each after the prompt it was sampled from
    sync         the sampler gets the new weights

OUT gets model (the last teacher; with --lora-rank also adapter), best (the teacher with the highest reward on
held-out problems), metrics.jsonl (a record per step; also sent to Weights & Biases if WANDB_PROJECT is set),
episodes.jsonl (some whole episodes) and state (to continue from). With two GPUs, student and reference are on
the second, unless vLLM fills it. Under torchrun each rank holds its rows of policy, gradients and AdamW's state,
and whole copies of the frozen models.

Differences from the published recipe: gradients use the prompt that was sampled from; the sampler has the current
weights; a group shares probe and baselines; the reward compares the guided answer with the student's own;
advantages are not divided by their group's deviation (README: the trap); the KL reference is the SFT checkpoint.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import stdev

import torch
from torch import Tensor

from nano_atlas import batching, distributed, episode, functions, optim, protocol, runs
from nano_atlas.batching import Sample, StepTokens, policy_batches, predicting_states, reference_values
from nano_atlas.checkpoint import load_trainable, save_adapter, save_model
from nano_atlas.config import option, parse, run_script, to_json
from nano_atlas.data import problems_of_step, training_data
from nano_atlas.episode import Episode, EpisodeConfig, Sketch
from nano_atlas.errors import UserError, say
from nano_atlas.layout import LayoutConfig, Pipeline, choose_layout, open_others, open_policy, open_reference
from nano_atlas.loss import fused_token_loss
from nano_atlas.model import Transformer
from nano_atlas.presets import announce, look_at, presets
from nano_atlas.reward import RewardConfig, step_advantages
from nano_atlas.runs import RunLog, read_json
from nano_atlas.schedule import play_most
from nano_atlas.seats import Seat, TokenSeat
from nano_atlas.terminal import Bar
from nano_atlas.tokenizer import Tokenizer

WARMUP = 0.03  # share of the steps with a rising learning rate
ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.0, "clip_norm": 1.0}
IMPORTANCE_CAP = 2.0  # largest weight p_trainer / p_sampler of a token
EPISODES_PER_STEP = 2  # written to episodes.jsonl
REWARDS, SCALES = ("teaching", "exact", "none"), ("none", "batch", "std")
NORMALIZATIONS, KLS = ("sequence", "token", "constant"), ("k3", "exact", "privileged")
REWARD_HELP = "the student's gain (teaching), the policy's own answer (exact), none, or function MODULE:NAME"
KL_HELP = (
    "estimated from sampled tokens (k3), exact, or exact and the reference sees the solution (privileged)"
)


@dataclass(frozen=True)
class GrpoConfig:
    preset: str = option("nano", "", group="run")
    teacher: Path = option(Path("runs/sft/model"), "checkpoint to start from")
    reference: Path | None = option(None, "KL reference, any model with this tokenizer (none: the start)")
    student: str = option("Qwen/Qwen3-0.6B", "frozen student: checkpoint, or URL[#MODEL] of a server")
    problems: Path | None = option(None, "JSONL of problems with answers, or of traces")
    out: Path = option(Path("runs/grpo"), "output: models, metrics, episodes, state", resumable=True)
    restart: bool = option(False, "delete the earlier run in --out, and start over", resumable=True)
    seed: int = option(42, "random seed: order of the problems, all samples")
    reward: str = option("teaching", REWARD_HELP)
    steps: int = option(250, "optimizer steps", above=0, resumable=True)
    eval_every: int = option(25, "steps between two evaluations (0: never)", at_least=0, resumable=True)
    eval_problems: int = option(200, "most problems held out for evaluation", at_least=0)
    save_every: int = option(10, "steps between two states to continue from", above=0, resumable=True)
    show_layout: bool = option(False, "print the memory on each device (GB), and stop", resumable=True)

    problems_per_step: int = option(4, "problems per step (P)", group="GRPO", above=0)
    group_size: int = option(8, "teachings per problem (G)", at_least=2)
    baseline_samples: int = option(4, "answers of the student alone (K); their mean is the baseline", above=0)
    advantage_scale: str = option("none", "divide by: none, std of the step (batch) or group", SCALES)
    beta: float = option(0.04, "weight of the KL to the reference", at_least=0)
    kl: str = option("k3", KL_HELP, KLS)
    clip: tuple[float, float] = option((0.2, 0.2), "clip the ratio to [1 - LOW, 1 + HIGH]", at_least=0)
    normalization: str = option("sequence", "mean of token losses, see token_weights", NORMALIZATIONS)
    updates_per_batch: int = option(1, "optimizer updates on each step's samples", above=0)
    tokens_per_batch: int = option(16384, "most tokens in a micro-batch; lower it to save memory", above=0)
    lr: float = option(1e-6, "peak learning rate", above=0)
    schedule: str = "constant"  # of the learning rate after the warm-up; the preset nano takes "cosine"


@dataclass(frozen=True)
class Config(LayoutConfig, RewardConfig, EpisodeConfig, GrpoConfig):
    max_logp_diff: float = 0.1  # largest mean difference of trainer and sampler, nats per fresh token

    @property
    def completion_tokens(self) -> int:  # longest completion of the policy
        return self.answer_tokens if self.reward == "exact" else self.teaching_tokens

    def check(self) -> None:
        if self.reward not in REWARDS and ":" not in self.reward:
            raise UserError(f"--reward {self.reward}: use {', '.join(REWARDS)}, or a function MODULE:NAME")
        is_pulled = self.beta and (self.kl == "privileged" or self.kl == "exact" and self.reference)
        if self.reward == "none" and not is_pulled:
            raise UserError("--reward none needs --kl exact --reference DIRECTORY, or --kl privileged")
        if self.teacher_temperature <= 0:
            raise UserError("--temperature: the teacher's must be above 0, so that its teachings differ")
        if not self.problems and self.preset != "nano" and not self.show_layout:
            raise UserError(f"--preset {self.preset} needs --problems FILE to train on")


# ----------------------------------------------------------------------------------------------------- rollout, advantages


def roll_out(config, seats: Mapping[str, Seat], problems, step) -> tuple[list[list[Episode]], dict]:
    """-> P groups of G episodes with rewards and advantages, and metrics. seats: "student"; the policy is "teacher"."""
    started, seed = time.perf_counter(), episode.seeds((config.seed, "step", step))
    chosen = problems_of_step(problems, step, config.problems_per_step, config.seed)
    if config.reward == "exact":
        scripts = [episode.answer(problem, config, seed, config.group_size) for problem in chosen]
    else:
        counts = seats["teacher"].count_tokens, config.baseline_samples, config.group_size
        rewards = None if config.reward == "none" else config
        scripts = [episode.episode(problem, config, rewards, seed, *counts) for problem in chosen]
    groups, metrics = play_episodes(config, scripts, seats, f"step {step + 1}")
    rewards_PG = [[one.reward for one in group] for group in groups]
    for group, advantages_G in zip(groups, step_advantages(rewards_PG, config.advantage_scale)):
        for one, advantage in zip(group, advantages_G):
            one.advantage = advantage
    metrics["reward_std"] = sum(map(stdev, rewards_PG)) / len(rewards_PG)
    metrics["zero_variance_ratio"] = sum(min(r_G) == max(r_G) for r_G in rewards_PG) / len(rewards_PG)
    return groups, metrics | {"seconds/rollout": time.perf_counter() - started}


def play_episodes(config, scripts, seats, label=None) -> tuple[list[list[Episode]], dict]:
    """The groups of the scripts that no fault of student or verifier ended, with rewards, and their metrics."""
    groups = play_most(scripts, seats, None if distributed.rank() else label)
    if ":" in config.reward:
        reward_of = functions.open_reward(config.reward)
        for one in chain(*groups):
            one.reward = reward_of(one)
    return groups, episode.teaching_metrics([*chain(*groups)]) | {"unanswered": len(scripts) - len(groups)}


# ----------------------------------------------------------------------------------------------------------------- the loss


def grpo_token_loss(logprobs, old_logprobs, sampled_logprobs, advantages, kl, config: GrpoConfig) -> Tensor:
    """The loss of each token, `[T]` float32 (DeepSeekMath, arXiv:2402.03300, equation 3). Arguments `[T]`, in nats.

    logprobs: of the policy, with gradient. old_logprobs: of the policy before the step's first update (equal in that
    update). sampled_logprobs: as the sampler reported them. They differ slightly from the trainer's (kernels,
    precision; with --overlap they are one update old), so the policy's term is weighted by p_old / p_sampler, truncated
    (Ionides 2008; for LLMs Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").
    With --reward none only beta * KL is left: on-policy distillation, by the reverse KL (arXiv:2306.13649).
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
    """The weight of each token in the step's loss, for each of B completions; independent of the micro-batches.

    "sequence"  1 / (B * length)    mean over tokens, then over completions: GRPO, arXiv:2402.03300
    "token"     1 / sum(lengths)    mean over tokens: DAPO, arXiv:2503.14476
    "constant"  1 / (B * longest)   independent of the lengths: Dr. GRPO, arXiv:2503.20783; longest: the token limit
    """
    if mode == "token":
        return [1 / sum(lengths)] * len(lengths)
    return [1 / (len(lengths) * (length if mode == "sequence" else longest)) for length in lengths]


def backward(config, policy: Transformer, reference, samples, own, tokens: StepTokens) -> tuple[Tensor, ...]:
    """Accumulates the gradient of the step's loss -> loss `[]`; log-probs, entropy and KL of all tokens, `[T]` each.

    own: indices of the samples that this rank computes; every rank gets the statistics of all tokens.
    """
    device, is_k3 = policy.head_weight.device, config.kl == "k3" and tokens.reference is not None
    loss_sum = torch.zeros((), device=device)
    logprobs_T, entropy_T, kl_T = torch.zeros(3, len(tokens.weights), device=device)
    batches = policy_batches(samples, config.tokens_per_batch, policy, own)
    filler = batches[0] if batches else policy_batches(samples, config.tokens_per_batch, policy, [0])[0]
    for batch, is_own in distributed.in_step(batches, filler):
        hidden, head = predicting_states(policy, batch), policy.head_weight
        exact = None
        if tokens.reference is not None and not is_k3:  # a larger head has only more padding
            exact = tokens.reference[batch.rows], reference.head_weight[: len(head)]

        def token_loss(logprobs: Tensor, exact_kl: Tensor | None, chunk: slice) -> Tensor:
            t = batch.rows[chunk]
            old = logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs[t]
            kl = k3_kl(logprobs, tokens.reference[t]) if is_k3 else exact_kl
            sampled, advantages = tokens.sampled_logprobs[t], tokens.advantages[t]
            return grpo_token_loss(logprobs, old, sampled, advantages, kl, config)

        weights = tokens.weights[batch.rows] * is_own
        options = {"temperature": config.teacher_temperature, "reference": exact}
        loss, stats = fused_token_loss(hidden, head, batch.targets, token_loss, weights, **options)
        loss.backward()
        loss_sum += loss.detach()
        if is_own:
            logprobs_T[batch.rows], entropy_T[batch.rows] = stats.logprobs, stats.entropy
            if is_k3:
                kl_T[batch.rows] = k3_kl(stats.logprobs, tokens.reference[batch.rows])
            elif exact is not None:
                kl_T[batch.rows] = stats.kl
    for values in (loss_sum, logprobs_T, entropy_T, kl_T):
        distributed.sum_over_ranks(values)
    return loss_sum, logprobs_T, entropy_T, kl_T


def update(config, policy: Transformer, reference, optimizer, samples, rate, is_fresh=True) -> dict:
    """All optimizer updates on one step's samples -> metrics; token statistics are those of the first update.

    is_fresh: the current weights drew the samples. Raises UserError if trainer and sampler disagree about fresh ones.
    """
    started, device = time.perf_counter(), policy.head_weight.device
    lengths = [len(sample.rollout.completion_ids) for sample in samples]
    weights = token_weights(lengths, config.normalization, config.completion_tokens)
    kept = range(len(samples))
    if reference is None:  # then samples with advantage zero have no gradient and are skipped
        kept = [index for index in kept if samples[index].advantage] or kept
    samples, lengths, weights = ([values[index] for index in kept] for values in (samples, lengths, weights))

    def per_token(values: Sequence[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(torch.tensor(lengths)).to(device)

    own = distributed.shares(lengths)[distributed.rank()]
    frozen = reference_values(reference, samples, config, own, device)
    sampled = torch.tensor([x for sample in samples for x in sample.rollout.logprobs], device=device)
    advantages = per_token([sample.advantage for sample in samples])
    tokens = StepTokens(per_token(weights), advantages, sampled, frozen, old_logprobs=None)

    metrics, (low, high) = {}, config.clip
    for _ in range(config.updates_per_batch):
        loss, logprobs, entropy, kl = backward(config, policy, reference, samples, own, tokens)
        if tokens.old_logprobs is None:
            tokens.old_logprobs = logprobs
            difference, importance = (logprobs - sampled).abs(), (logprobs - sampled).exp()
            metrics = {
                "loss": loss.item(), "kl": kl.mean().item(), "entropy": entropy.mean().item(), "clip_ratio": 0.0, "grad_norm": 0.0,
                "sampling/logp_diff_mean": difference.mean().item(),
                "sampling/logp_diff_max": difference.max().item(),
                "sampling/importance_mean": importance.clamp(max=IMPORTANCE_CAP).mean().item(),
                "sampling/importance_capped": (importance > IMPORTANCE_CAP).float().mean().item(),
            }  # fmt: skip
            if is_fresh and not difference.mean() <= config.max_logp_diff:
                raise UserError(
                    f"trainer and sampler disagree about the sampled tokens by {difference.mean():.3f} nats on average, "
                    f"above {config.max_logp_diff}: the sampler has other weights or prompts than the trainer"
                )
        ratio = (logprobs - tokens.old_logprobs).exp()
        is_clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
        metrics["clip_ratio"] += is_clipped.float().mean().item() / config.updates_per_batch
        metrics["grad_norm"] += optimizer.step(rate) / config.updates_per_batch
    return metrics | {"seconds/update": time.perf_counter() - started}


# ----------------------------------------------------------------------------------------------------------------- training


def to_samples(config: Config, group: Sequence[Episode], teacher: TokenSeat) -> list[Sample]:
    """With --kl privileged, the prompt of the reference has the problem's solution."""
    prompt, one = (), group[0]  # a group shares both prompts
    if config.kl == "privileged":
        messages = protocol.privileged_messages(one.messages, one.sketch.problem.solution)
        prompt = tuple(teacher.prompt_ids(messages))
    return [Sample(one.reply.rollout, one.advantage, prompt) for one in group]


def evaluate(config: Config, seats: Mapping[str, Seat], sketches: Sequence[Sketch]) -> dict[str, float]:
    """Metrics `eval/...` of the policy as a teacher of the held-out problems, with greedy decoding."""
    greedy, seed, count = config.greedy(), episode.seeds("evaluation"), seats["teacher"].count_tokens
    if config.reward == "exact":
        scripts = [episode.answer(sketch.problem, greedy, seed, 1) for sketch in sketches]
    else:
        scripts = [episode.teach(sketch, greedy, config, seed, count) for sketch in sketches]
    return {f"eval/{name}": value for name, value in play_episodes(config, scripts, seats)[1].items()}


def dry_step(config: Config, policy: Transformer, reference, optimizer, teacher, problems) -> None:
    """Forward and backward pass of the largest possible micro-batch, with zero gradients: does it fit in memory?"""
    question = max((problem.question for problem in problems), key=len)
    is_exact, length = config.reward == "exact", config.completion_tokens
    messages = protocol.baseline_messages(question) if is_exact else protocol.teacher_messages(question, "")
    prompt = len(teacher.prompt_ids(messages)) + (0 if is_exact else config.probe_tokens)
    sizes = config.problems_per_step, config.group_size, config.tokens_per_batch
    samples, tokens = batching.longest_samples(prompt, length, *sizes)
    zeros, own = torch.zeros(len(samples) * length, device=policy.head_weight.device), range(len(samples))
    with optimizer.dry_step(tokens):
        frozen = reference_values(reference, samples, config, own, zeros.device)
        backward(config, policy, reference, samples, own, StepTokens(zeros, zeros, zeros, frozen, None))


def train(config: Config) -> None:
    resumed = runs.open_run(config)
    done = read_json(resumed / "state.json")["step"] if resumed else 0
    if done >= config.steps and runs.is_saved(config.out, done):
        return print(f"{config.out}/model is already trained, {done} steps; more: --steps, anew: --restart")
    for spec in {config.verifier, config.reward} - {"exact", *REWARDS}:
        functions.load_object(spec)  # a missing one is named now, not after the models are loaded
    problems, held_out = training_data(config)
    start = config.student if config.reward == "exact" else config.teacher
    layout = choose_layout(config, "" if config.reward == "exact" else config.student, config.kl)
    policy, tokenizer = load_trainable(start, config, layout.policy), Tokenizer.from_directory(start)
    reference = open_reference(config, layout, start, policy, tokenizer)
    tokenizer.config |= {"enable_thinking": True} if config.thinking else {}
    optimizer = optim.MasterAdamW(policy, **ADAMW, state_device=config.optimizer_device)
    base = runs.checkpoint_digest(start) if config.lora_rank else None
    record = optim.load_training_state(resumed, optimizer, base) if resumed else {"step": 0, "best": None}
    first_step, best, metrics = record["step"], record.get("best"), {}
    runs.begin_run(config, resumed)
    say(f"{len(problems)} problems; {len(held_out)} held out")

    with (
        ExitStack() as servers,
        RunLog(config.out / "metrics.jsonl", first_step, to_json(config)) as log,
        RunLog(config.out / "episodes.jsonl", first_step) as episodes,
        Bar(desc=config.out.name, total=config.steps, initial=first_step, unit="step") as progress,
    ):
        teacher = open_policy(config, layout, policy, tokenizer, first_step, servers)
        seats = {"teacher": teacher} | open_others(config, layout, servers)
        sketches = [Sketch(problem, "", 0, []) for problem in held_out]
        if "student" in seats and config.eval_every:
            greedy, seed = config.greedy(), episode.seeds("evaluation")
            sketches = play_most([episode.sketch(problem, greedy, seed) for problem in held_out], seats)
        if policy.head_weight.device.type in optim.DRY_STEP_ON:
            teacher.sampler.rest()
            dry_step(config, policy, reference, optimizer, teacher, problems)
        produce = partial(roll_out, config, seats, problems)
        rollouts = Pipeline(produce, teacher.sampler, config.steps - 1, config.overlap)

        for step in range(first_step, config.steps):
            is_last = step + 1 == config.steps
            rate = optim.learning_rate(step, config.steps, config.lr, WARMUP, config.schedule)
            (groups, metrics), is_fresh = rollouts.take(step)
            samples = [*chain(*(to_samples(config, group, teacher) for group in groups))]
            metrics |= update(config, policy, reference, optimizer, samples, rate, is_fresh)
            metrics["sampling/parity"] = rollouts.sync(policy, step + 1)

            if sketches and config.eval_every and ((step + 1) % config.eval_every == 0 or is_last):
                metrics |= evaluate(config, seats, sketches)
                if best is None or metrics["eval/reward"] > best:
                    best = metrics["eval/reward"]
                    save_model(config.out / "best", policy, tokenizer)
            if step == first_step and metrics.get("unreadable_rate", 0) > 0.2:
                say("many answers could not be read; another --answer-format, or more --answer-tokens?")
            for group in groups[:EPISODES_PER_STEP]:
                episodes.log(step + 1, **episode.episode_record(group[0]))
            log.log(step + 1, **metrics, lr=rate, skipped_steps=optimizer.skipped_steps)
            progress.set_postfix_str(f"reward {metrics['reward']:.2f}, kl {metrics['kl']:.3f}", refresh=False)
            progress.step()
            if (step + 1) % config.save_every == 0 or is_last:
                optim.save_training_state(config.out / "state", optimizer, step + 1, best=best, base=base)

    save_adapter(config.out / "adapter", policy, start)
    save_model(config.out / "model", policy, tokenizer, step=max(first_step, config.steps))
    print(f"{config.out}: model, {'best, ' * (best is not None)}metrics.jsonl, episodes.jsonl, state")
    if best is not None and (ahead := best - metrics.get("eval/reward", best)) > 0:
        print(f"held-out problems: best is {ahead:.3f} (reward) above model; --teacher {config.out / 'best'}")
    look_at(config.out)


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, sys.argv[1:] if argv is None else argv, presets("train_grpo"), __doc__)
    if config.show_layout:
        from benchmarks import memory

        return print(memory.layout_table(config))
    work = f"{config.steps} steps of {config.problems_per_step} problems x {config.group_size}"
    announce("train_grpo", config, f"{work} {'answers' if config.reward == 'exact' else 'teachings'}")
    with runs.owned(config.out):
        train(config)


if __name__ == "__main__":
    run_script(main, is_parallel=True)
