"""A whole step of GRPO in forty lines of plain PyTorch, next to the one that trains: they must come to the same weights.

Two problems, two teachings each, a vocabulary of twelve tokens. `by_hand` takes nothing of this package but the model's forward
pass, and does one thing after the other: rewards, advantages, log-probs, ratio, clip, KL, gradient, clipping, AdamW. What
train_grpo.py does instead for speed (prompts computed once, logits in chunks, micro-batches) is tested to give the same.
"""

import copy

import pytest
import torch

import train_grpo
from benchmarks.pretrain import initialize
from nano_atlas.batching import Sample
from nano_atlas.model import ModelConfig, PackedAttention, Transformer
from nano_atlas.optim import MasterAdamW
from nano_atlas.reward import step_advantages, teaching_reward
from nano_atlas.sampler import Rollout

PROMPTS_P = [[1, 7, 3, 2], [5, 11]]
TEACHINGS_PG = [[[4, 9, 2, 4, 1, 0], [8, 0]], [[0], [10, 1, 1, 6, 0]]]  # token 0 ends a teaching
OUTCOMES_PG = [
    [(0.5, 1.0, 6), (0.5, 0.0, 2)],
    [(0.0, 0.0, 1), (0.0, 1.0, 5)],
]  # student alone, guided, tokens
SAMPLER_ERRORS_PG = [
    [-0.3, 0.1],
    [-1.0, 0.2],
]  # the sampler's log-probs minus the trainer's; -1.0 passes the cap
TEMPERATURE, BETA, CLIP, IMPORTANCE_CAP, UPDATES = 0.7, 0.04, 0.2, 2.0, 2
RATE, BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = 3e-2, (0.9, 0.999), 1e-8, 0.1, 1.0


def token_logprobs(model, prompt, completion):
    """Of each completion token, after the very prompt it was sampled from and at the sampling temperature: [T]."""
    attention = PackedAttention([len(prompt) + len(completion) - 1])
    hidden = model(torch.tensor(prompt + completion[:-1]), attention.positions, attention)
    logits_TV = (hidden @ model.head_weight.T)[len(prompt) - 1 :] / TEMPERATURE
    return logits_TV.log_softmax(-1)[range(len(completion)), completion]


def by_hand(policy, reference, sampler_logprobs):
    """Two updates on one batch; returns for each the loss, the length of the gradient, and the share of clipped tokens."""
    # 1. Reward of a teaching: what the student gained, more for a brief one; harm costs double.
    rewards_PG = [[(guided - alone) * (1 + 100 / (100 + tokens)) if guided > alone else 2.0 * (guided - alone)
                   for alone, guided, tokens in outcomes_G] for outcomes_G in OUTCOMES_PG]  # fmt: skip
    # 2. Advantage: how much better than the other teachings of the same problem.
    advantages = [
        reward - sum(rewards_G) / len(rewards_G) for rewards_G in rewards_PG for reward in rewards_G
    ]
    sequences = [(prompt, teaching) for prompt, group in zip(PROMPTS_P, TEACHINGS_PG) for teaching in group]
    with torch.no_grad():
        old = [token_logprobs(policy, *sequence) for sequence in sequences]
        anchor = [token_logprobs(reference, *sequence) for sequence in sequences]
    parameters = list(policy.parameters())
    means, squares = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    history, n_tokens = [], sum(len(teaching) for _, teaching in sequences)
    for step in range(1, UPDATES + 1):
        loss, n_clipped = 0.0, 0
        for i, sequence in enumerate(sequences):
            logprobs = token_logprobs(policy, *sequence)
            # 3. Probability ratio to the policy that the batch started from, clipped.
            ratio = (logprobs - old[i]).exp()
            gain = torch.minimum(ratio * advantages[i], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[i])
            n_clipped += (gain < ratio * advantages[i]).sum().item()
            # 4. The sampler's log-probs are never quite the trainer's: weigh by their ratio, truncated.
            importance = (old[i] - sampler_logprobs[i]).exp().clamp(max=IMPORTANCE_CAP)
            # 5. KL to the reference, estimated from the sampled token (k3).
            log_ratio = anchor[i] - logprobs
            kl = log_ratio.exp() - log_ratio - 1
            # 6. The mean over the tokens of a teaching, then over the teachings.
            loss = loss + (BETA * kl - importance * gain).mean() / len(sequences)
        gradients = torch.autograd.grad(loss, parameters)
        norm = sum(gradient.square().sum() for gradient in gradients).sqrt()
        history.append((loss.item(), norm.item(), n_clipped / n_tokens))
        with torch.no_grad():  # 7. AdamW with a gradient of length 1 at most; matrices decay.
            for p, gradient, mean, square in zip(parameters, gradients, means, squares):
                gradient = gradient * min(1.0, CLIP_NORM / norm)
                mean += (1 - BETAS[0]) * (gradient - mean)
                square += (1 - BETAS[1]) * (gradient**2 - square)
                p *= 1 - RATE * WEIGHT_DECAY * (p.ndim > 1)
                unbiased_mean, unbiased_square = (
                    mean / (1 - BETAS[0] ** step),
                    square / (1 - BETAS[1] ** step),
                )
                p -= RATE * unbiased_mean / (unbiased_square.sqrt() + EPS)
    return history


def random_model(seed: int) -> Transformer:
    model = initialize(Transformer(ModelConfig("qwen3", 12, 16, 24, 2, 2, 1, 8, qk_norm=True)), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 10 if parameter.ndim == 2 else 1  # away from uniform distributions
    return model


@pytest.mark.parametrize("tokens_per_batch", [1, 1000])
def test_a_step_of_training_is_the_step_written_out_by_hand(tokens_per_batch):
    start, reference = random_model(1), random_model(2)
    expected, policy = copy.deepcopy(start).double(), copy.deepcopy(start)
    sequences = [(prompt, teaching) for prompt, group in zip(PROMPTS_P, TEACHINGS_PG) for teaching in group]
    errors = [error for group in SAMPLER_ERRORS_PG for error in group]
    with torch.no_grad():
        sampler_logprobs = [
            token_logprobs(start, *sequence) + error for sequence, error in zip(sequences, errors)
        ]
    first, second = by_hand(expected, copy.deepcopy(reference).double(), sampler_logprobs)

    config = train_grpo.Config(temperature=(0.7, TEMPERATURE), beta=BETA, clip=(CLIP, CLIP), updates_per_batch=UPDATES,
                               tokens_per_batch=tokens_per_batch, max_logp_diff=1.0)  # fmt: skip
    assert train_grpo.IMPORTANCE_CAP == IMPORTANCE_CAP
    optimizer = MasterAdamW(policy, betas=BETAS, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
    rewards = [[teaching_reward(*outcome) for outcome in group] for group in OUTCOMES_PG]
    advantages = [advantage for group in step_advantages(rewards) for advantage in group]
    samples = [
        Sample(Rollout(tuple(prompt), teaching, logprobs.tolist(), "stop", 0), advantage)
        for (prompt, teaching), logprobs, advantage in zip(sequences, sampler_logprobs, advantages)
    ]
    metrics = train_grpo.update(config, policy, reference, optimizer, samples, RATE)

    assert metrics["loss"] == pytest.approx(first[0], rel=1e-4)
    for name, index in (("grad_norm", 1), ("clip_ratio", 2)):
        assert metrics[name] == pytest.approx((first[index] + second[index]) / UPDATES, rel=1e-4)
    # everything took part: the clip, the cap, the KL, the clipping of the gradient
    assert second[2] > 0 and metrics["sampling/importance_capped"] > 0 and metrics["kl"] > 0.01
    assert first[1] > CLIP_NORM
    before = dict(start.named_parameters())
    for (name, ours), theirs in zip(policy.named_parameters(), expected.parameters(), strict=True):
        assert not torch.equal(ours, before[name]), name
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-3 * RATE, msg=name)
