"""The teaching reward against the published table, and group advantages against numpy in float64."""

import numpy as np
import pytest
from conftest import ScriptedSeat

import eval as evaluation
from nano_atlas import episode
from nano_atlas.benches import arms
from nano_atlas.benches.arms import TaskLog
from nano_atlas.data import Problem
from nano_atlas.protocol import PROBE_REQUEST
from nano_atlas.reward import RewardConfig, efficiency, step_advantages, teaching_reward
from nano_atlas.runtime.lanes import Session, run_session
from nano_atlas.runtime.options import Config
from nano_atlas.schedule import play


@pytest.mark.parametrize(("tokens", "improved", "kept"), [(0, 2.0, 1.0), (100, 1.5, 0.75), (400, 1.2, 0.6)])
def test_the_published_table(tokens, improved, kept):
    assert teaching_reward(0, 1, tokens) == pytest.approx(improved)
    assert teaching_reward(1, 1, tokens) == pytest.approx(kept)
    assert teaching_reward(0, 0, tokens) == 0.0
    assert teaching_reward(1, 0, tokens) == -2.0  # harm costs the same at any length


@pytest.mark.parametrize("baseline", [0.25, 0.5, 0.75])
def test_a_fractional_baseline_scales_gain_and_harm(baseline):
    assert teaching_reward(baseline, 1, 100) == pytest.approx((1 - baseline) * 1.5)
    assert teaching_reward(baseline, 0, 100) == pytest.approx(-2 * baseline)


def test_the_expected_reward_of_a_teaching_without_effect_is_negative_where_the_baseline_varies():
    """b = 1/2 and a guided answer that is right as often: 1/2 * gain + 1/2 * harm. Doing nothing must not pay."""
    assert (teaching_reward(0.5, 1, 100) + teaching_reward(0.5, 0, 100)) / 2 < 0


@pytest.mark.parametrize(("baseline", "guided"), [(0, 1), (1, 1), (0, 0), (1, 0), (0.5, 1)])
def test_a_leak_forfeits_every_gain_and_costs_the_penalty(baseline, guided):
    honest = teaching_reward(baseline, guided, 10)
    assert teaching_reward(baseline, guided, 10, is_leak=True) == pytest.approx(min(honest, 0) - 1)


@pytest.mark.parametrize(("option", "value", "situation", "reward"), [
    ("degradation_penalty", 0.0, (1, 0, 100, False), 0.0),
    ("degradation_penalty", 3.0, (0.5, 0, 100, False), -1.5),
    ("efficiency_weight", 0.0, (0, 1, 100, False), 1.0),
    ("efficiency_weight", 2.0, (1, 1, 100, False), 1.0),
])  # fmt: skip
def test_every_coefficient_changes_the_reward(option, value, situation, reward):
    changed = RewardConfig(**{option: value})
    assert teaching_reward(*situation, changed) == pytest.approx(reward)
    assert teaching_reward(*situation) != pytest.approx(reward)


def test_efficiency_falls_from_one_by_half_per_hundred_tokens():
    assert [efficiency(tokens) for tokens in (0, 100, 300)] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("size", [2, 3, 8, 32])
def test_advantages_are_the_formulas_of_the_papers(size):
    rewards = np.random.default_rng(size).normal(size=(5, size)) * np.array([[1], [0.01], [3], [1], [1]])
    centred = rewards - rewards.mean(1, keepdims=True)
    deviations = rewards.std(1, ddof=1, keepdims=True)
    expected = {
        "std": centred / (deviations + 1e-4),  # GRPO
        "batch": centred / (np.sqrt((deviations**2).mean()) + 1e-4),
        "none": centred,  # Dr. GRPO
    }
    for scale, values in expected.items():
        np.testing.assert_allclose(step_advantages(rewards.tolist(), scale), values, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scale", ["std", "batch", "none"])
def test_equal_rewards_give_exactly_zero_advantages(scale):
    """Exactly, because a group without variance is recognised by it: seven times 0.7 do not add up to 4.9 in floating point."""
    for reward in (0.0, 0.7, -0.1, 1.5238095238095237):
        for size in (2, 3, 7, 8):
            assert step_advantages([[reward] * size] * 2, scale) == [[0.0] * size] * 2


def test_the_trap_of_the_deviation():
    """README's two groups: four of eight right, and eight right of which half are four tokens briefer. Divided by its own deviation,
    the second pushes as hard as the first, towards brevity; otherwise it weighs what its rewards weigh."""
    long, short = (teaching_reward(0.0, 1.0, tokens) for tokens in (12, 8))
    decisive, trivial = [long, 0.0] * 4, [long, short] * 4
    pushes = {
        scale: [max(group) for group in step_advantages([decisive, trivial], scale)]
        for scale in ("std", "batch", "none")
    }
    assert pushes["std"] == pytest.approx([0.935, 0.930], abs=1e-3)
    assert pushes["none"] == pytest.approx([0.946, 0.0165], abs=1e-3)
    assert pushes["batch"][0] / pushes["batch"][1] == pytest.approx(pushes["none"][0] / pushes["none"][1])


# ------------------------------------------------------------------------------------------------- one rule for all


@pytest.mark.parametrize("gold", ["18", "19"])  # the student is right, or wrong
def test_a_malformed_teaching_is_worth_the_same_in_training_evaluation_and_runtime(
    tmp_path, monkeypatch, gold
):
    """Nobody asks the student again: its own answer stands, and the teacher has lost half a point, whatever that answer is worth."""
    problem = Problem("p", "What is 6 times 3?", gold, "math")
    student = ScriptedSeat(
        lambda prompt, *_: "Add." if PROBE_REQUEST in prompt else "<solution>18</solution>"
    )
    seats = {"student": student, "teacher": ScriptedSeat(lambda *_: "<teaching>Multiply.")}
    is_right, count = gold == "18", student.count_tokens
    probe_and_answer = 2

    (trained,) = play(
        [episode.episode(problem, episode.EpisodeConfig(), RewardConfig(), episode.seeds(0), count, 1, 1)],
        seats,
    )
    assert (trained[0].reward, trained[0].guided.is_correct) == (-0.5, is_right)
    assert len(student.asked) == probe_and_answer

    config = evaluation.Config(
        bench="gsm8k", student="http://s", teacher=("t=http://t",), control=(), out=tmp_path
    )
    with TaskLog(tmp_path / "tasks.jsonl") as log:
        by_url = {"http://s": seats["student"], "http://t": seats["teacher"]}
        monkeypatch.setattr(evaluation.Config, "open", lambda _, url: by_url[url])
        how = evaluation.Arms(config, {"math": [problem]}, log)
        arms.fill(log, config, [problem], how.answer)
        alone, taught = (log.get(arm, problem)[0] for arm in ("student", "t"))
    assert (
        taught.teaching is None and taught.attempt == alone.attempt and alone.attempt.is_correct == is_right
    )
    assert len(student.asked) == 2 * probe_and_answer

    session = Session(session_id="s", task=problem, seed=0)
    play([run_session(session, Config(), count)], seats)
    assert (session.reward, session.is_malformed) == (-0.5, True)
    assert len(student.asked) == 3 * probe_and_answer
