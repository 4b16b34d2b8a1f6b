"""The reward of a teaching: how much it improved the student, with a penalty for harm; advantages within a group.

The formula is that of the paper and of the published code before its penalty was removed (ATLAS, commit e2c00bc). With
the student's score b alone and a with the teaching, d = a - b, L teaching tokens and efficiency e = 100 / (100 + L):

    d < 0            -penalty |d|             harm costs more than help earns
    d = 0, a > 0     keep a (1 + w e)         the student was right and stays right
    d = 0, a = 0     0
    d > 0            d (1 + w e)              brief help earns more
    leak             min(r, 0) - 1            a teaching that contains the answer never earns a positive reward
    malformed        -0.5                     no <teaching>: the student got nothing, so its score does not count
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nano_atlas.config import option

KEEP_CORRECT = 0.5
LEAK_PENALTY = 1.0
MALFORMED_PENALTY = 0.5


@dataclass(frozen=True)
class RewardConfig:
    degradation_penalty: float = option(2.0, "factor of a loss of accuracy", group="reward", at_least=0)
    efficiency_weight: float = option(1.0, "weight of the brevity bonus, 100 / (100 + tokens)", at_least=0)


def teaching_reward(alone, guided, teaching_tokens=0, is_leak=False, config=RewardConfig()) -> float:
    """alone, guided: the student's scores in [0, 1] without and with the teaching; guided None: there was no <teaching>."""
    if guided is None:
        return -MALFORMED_PENALTY
    gain, bonus = guided - alone, 1 + config.efficiency_weight * efficiency(teaching_tokens)
    if gain < 0:
        reward = config.degradation_penalty * gain
    else:
        reward = (gain if gain > 0 else KEEP_CORRECT * guided) * bonus
    return min(reward, 0.0) - LEAK_PENALTY if is_leak else reward


def efficiency(teaching_tokens: int) -> float:
    return 100 / (100 + teaching_tokens)


def step_advantages(rewards_PG: Sequence[Sequence[float]], scale: str = "none") -> list[list[float]]:
    """Reward - mean of its group, divided by a scale, for P groups of G rewards.

    scale   "none"   1: a point of reward has the same weight everywhere (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783)
            "batch"  the standard deviation within groups, over the whole step, + 1e-4: one number for all
            "std"    the group's own standard deviation + 1e-4 (GRPO, as published)

    Deviations are unbiased. README, "The trap of the deviation", says why "std" is not the default.
    """
    centred_PG = []
    for rewards_G in rewards_PG:
        # exact for equal rewards: rounding of the mean would leave 1e-16, which "std" would scale up
        mean = rewards_G[0] if min(rewards_G) == max(rewards_G) else sum(rewards_G) / len(rewards_G)
        centred_PG.append([reward - mean for reward in rewards_G])
    if scale == "none":
        return centred_PG
    variances_P = [sum(c * c for c in centred_G) / (len(centred_G) - 1) for centred_G in centred_PG]
    if scale == "batch":
        variances_P = [sum(variances_P) / len(variances_P)] * len(variances_P)
    scales_P = [variance**0.5 + 1e-4 for variance in variances_P]
    return [[c / scale for c in centred_G] for centred_G, scale in zip(centred_PG, scales_P)]
