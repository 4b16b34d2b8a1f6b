"""What a teaching is worth: how much it improved the student, with a penalty for harm; and advantages within a group.

The formula is the published one before its penalty was removed (ATLAS, commit e2c00bc), which is also the one the paper
describes: with baseline accuracy b, guided correctness a, d = a - b, L teaching tokens and efficiency e = 100 / (100 + L),

    d < 0            -penalty |d|             harm costs more than help earns
    d = 0, a = 1     keep (1 + w e)           a student that was right stayed right
    d = 0, a = 0     0
    d > 0            d (1 + w e)              help earns, and brief help earns more
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nano_atlas.config import option


@dataclass(frozen=True)
class RewardConfig:
    degradation_penalty: float = option(
        2.0, "reward lost per unit of accuracy that a teaching destroys", group="reward of a teaching"
    )
    keep_correct: float = option(0.5, "reward for a student that was right and stayed right")
    efficiency_weight: float = option(1.0, "weight w of the brevity bonus e = 100 / (100 + teaching tokens)")
    leak_penalty: float = option(
        1.0, "subtracted, with every positive reward forfeited, when a teaching contains the answer"
    )
    malformed_penalty: float = option(
        0.5, "subtracted when there is no <teaching>…</teaching>; the student then got nothing"
    )


def teaching_reward(
    baseline: float,
    guided: float,
    teaching_tokens: int,
    is_leak: bool = False,
    config: RewardConfig = RewardConfig(),
) -> float:
    """baseline: mean correctness of the student alone, in [0, 1]; guided: correctness with the teaching, in [0, 1]."""
    gain = guided - baseline
    bonus = 1 + config.efficiency_weight * efficiency(teaching_tokens)
    if gain < 0:
        reward = config.degradation_penalty * gain
    elif gain == 0:
        reward = config.keep_correct * bonus * guided
    else:
        reward = gain * bonus
    return min(reward, 0.0) - config.leak_penalty if is_leak else reward


def efficiency(teaching_tokens: int) -> float:
    return 100 / (100 + teaching_tokens)


def step_advantages(rewards_PG: Sequence[Sequence[float]], scale: str = "none") -> list[list[float]]:
    """How much better each teaching was than the others of its problem: r - mean of its group, for P groups of G rewards.

    scale   "none"   as it is: a point of reward is worth the same everywhere (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783)
            "batch"  over the standard deviation within groups of the whole step: one number for all
            "std"    over the group's own standard deviation + 1e-4 (GRPO, as published)

    Deviations are unbiased. See README, "The trap of the deviation", for why "std" is not the default.
    """
    centred_PG = []
    for rewards_G in rewards_PG:
        mean = sum(rewards_G) / len(rewards_G)
        is_flat = min(rewards_G) == max(
            rewards_G
        )  # a rounded mean would leave 1e-16, which counts as a difference
        centred_PG.append([0.0 if is_flat else reward - mean for reward in rewards_G])
    if scale == "none":
        return centred_PG
    variances_P = [sum(c * c for c in centred_G) / (len(centred_G) - 1) for centred_G in centred_PG]
    if scale == "batch":
        variances_P = [sum(variances_P) / len(variances_P)] * len(variances_P)
    return [
        [c / (variance**0.5 + 1e-4) for c in centred_G]
        for centred_G, variance in zip(centred_PG, variances_P)
    ]
