"""From sampled completions to micro-batches: where each token is predicted, and its index among the step's tokens.

The prompt of a group is computed once for all its completions (`SharedPromptAttention`). Two completions [7,
8, 9] and [7, 5] of the prompt [1, 2, 3] become

    input_ids   1 2 3 | 7 8 | 7         prompt, then the completions without their last tokens
    predictors  2 3 4   2 5             position in input_ids whose hidden state predicts each completion token
    targets     7 8 9   7 5             the completion tokens; only these get gradient
    rows        0 1 2   3 4             index into the step's flat per-token arrays
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from nano_atlas import distributed
from nano_atlas.gpu import FlexAttention
from nano_atlas.loss import token_stats
from nano_atlas.model import SharedPromptAttention, Transformer
from nano_atlas.sampler import Rollout


@dataclass
class Sample:
    """One completion of the policy."""

    rollout: Rollout
    advantage: float  # how much better its reward is than its group's mean
    reference_prompt: tuple[int, ...] = ()  # of the KL reference; (): the prompt that it was drawn after

    @property
    def of_reference(self) -> Self:
        rollout = replace(self.rollout, prompt_ids=self.reference_prompt)
        return replace(self, rollout=rollout) if self.reference_prompt else self


@dataclass
class StepTokens:
    """One step's T completion tokens in flat arrays, `[T]` float32 on the policy's device."""

    weights: Tensor  # in the step's loss
    advantages: Tensor
    sampled_logprobs: Tensor  # as the sampler reported them
    reference: Tensor | None  # the frozen reference's log-probs (k3), or its hidden states [T, D] (exact)
    old_logprobs: Tensor | None  # of the policy before the step's first update; None in that update


@dataclass
class PolicyBatch:
    """A micro-batch of N tokens with M completion tokens among them."""

    input_ids: Tensor  # [N] int64: prompts, completions without their last tokens, padding to a block
    attention: SharedPromptAttention | FlexAttention
    predictors: Tensor  # [M] int64: position in input_ids whose hidden state predicts each completion token
    targets: Tensor  # [M] int64: the completion tokens
    rows: Tensor  # [M] int64: index into the step's flat per-token arrays


def policy_batches(samples: Sequence[Sample], tokens_per_batch: int, model, own=None) -> list[PolicyBatch]:
    """Cut a step's samples into micro-batches of at most `tokens_per_batch` tokens (a longer completion is alone).

    model: computes them. own: indices of the samples to take; None: all.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in range(len(samples)) if own is None else own:
        groups.setdefault(tuple(samples[index].rollout.prompt_ids), []).append(index)
    batches: list[list[tuple[tuple[int, ...], list[int]]]] = [[]]
    room = tokens_per_batch
    for prompt in sorted(groups, key=len):  # similar lengths together
        for index in sorted(groups[prompt], key=lambda i: len(samples[i].rollout.completion_ids)):
            size = len(samples[index].rollout.completion_ids) - 1
            is_new = not batches[-1] or batches[-1][-1][0] != prompt
            if batches[-1] and size + is_new * len(prompt) > room:
                batches.append([])
                room, is_new = tokens_per_batch, True
            if is_new:
                batches[-1].append((prompt, []))
            batches[-1][-1][1].append(index)
            room -= size + is_new * len(prompt)
    starts = [0, *accumulate(len(sample.rollout.completion_ids) for sample in samples)]
    return [_policy_batch(samples, batch, starts, model) for batch in batches if batch]


def longest_samples(prompt: int, completion: int, groups: int, group_size: int, tokens_per_batch: int):
    """-> samples of the largest possible micro-batch, and its tokens. prompt, completion: the longest, in tokens."""
    samples: list[Sample] = []
    tokens = 0
    for group in range(groups):
        for size in [prompt + completion - 1] + [completion - 1] * (group_size - 1):
            if samples and tokens + size > tokens_per_batch:
                return samples, tokens
            samples.append(Sample(Rollout((group,) * prompt, [0] * completion, [], "length", 0), 0.0))
            tokens += size
    return samples, tokens


def _policy_batch(samples: Sequence[Sample], batch: list, starts: Sequence[int], model) -> PolicyBatch:
    device = model.head_weight.device
    kind = FlexAttention if model.is_compiled and device.type == "cuda" else SharedPromptAttention
    prompts = [prompt for prompt, _ in batch]
    members = [(place, index) for place, (_, indices) in enumerate(batch) for index in indices]
    completions = [samples[index].rollout.completion_ids for _, index in members]
    prompt_ends = list(accumulate(map(len, prompts)))
    predictors, rows, offset = [], [], prompt_ends[-1]
    for (place, index), completion in zip(members, completions):
        predictors += [prompt_ends[place] - 1, *range(offset, offset + len(completion) - 1)]
        rows += range(starts[index], starts[index + 1])
        offset += len(completion) - 1
    ids = [token for prompt in prompts for token in prompt]
    ids += [token for completion in completions for token in completion[:-1]]
    prompt_lengths, lengths = [len(prompt) for prompt in prompts], [len(c) - 1 for c in completions]
    attention = kind(prompt_lengths, lengths, [place for place, _ in members], device)
    return PolicyBatch(
        input_ids=torch.tensor(ids + [0] * (len(attention.positions) - len(ids)), device=device),
        attention=attention,
        predictors=torch.tensor(predictors, device=device),
        targets=torch.tensor([token for completion in completions for token in completion], device=device),
        rows=torch.tensor(rows, device=device),
    )


def predicting_states(model: Transformer, batch: PolicyBatch) -> Tensor:
    """The hidden states `[M, D]` that predict the batch's completion tokens."""
    hidden = model(batch.input_ids, batch.attention.positions, batch.attention)
    return hidden.index_select(0, batch.predictors)


def own_states(model, samples, tokens_per_batch: int, own=None) -> Iterator[tuple[PolicyBatch, Tensor]]:
    """(micro-batch, its `predicting_states`) of the samples in `own`. Collective: the model may be sharded."""
    batches = policy_batches(samples, tokens_per_batch, model, own)
    filler = batches or policy_batches(samples, tokens_per_batch, model, [0])
    for batch, is_own in distributed.in_step(batches, filler[0]):
        states = predicting_states(model, batch)
        if is_own:
            yield batch, states


@torch.no_grad()
def completion_logprobs(model, samples, tokens_per_batch: int, temperature: float, own=None) -> Tensor:
    """Log-probs `[T]` float32 of a step's completion tokens at the sampling temperature; 0 for samples not in `own`."""
    tokens = sum(len(sample.rollout.completion_ids) for sample in samples)
    logprobs = torch.zeros(tokens, device=model.head_weight.device)
    for batch, states in own_states(model, samples, tokens_per_batch, own):
        logprobs[batch.rows] = token_stats(states, model.head_weight, batch.targets, temperature).logprobs
    return logprobs


@torch.no_grad()
def reference_values(reference, samples: Sequence[Sample], config, own, device) -> Tensor | None:
    """What the KL needs of the frozen reference for a step's T completion tokens; 0 for samples not in `own`.

    config.kl "k3": log-probs, `[T]` float32. Otherwise the hidden states that predict the tokens, `[T, D]` in
    the reference's dtype, from which the loss computes the logits. None without a reference.
    """
    if reference is None:
        return None
    samples, limit = [sample.of_reference for sample in samples], config.tokens_per_batch
    if config.kl == "k3":
        return completion_logprobs(reference, samples, limit, config.teacher_temperature, own).to(device)
    tokens, head = sum(len(sample.rollout.completion_ids) for sample in samples), reference.head_weight
    values = torch.zeros(tokens, head.shape[1], dtype=reference.compute_dtype or head.dtype, device=device)
    for batch, states in own_states(reference, samples, limit, own):
        values[batch.rows] = states
    return values
