"""train_grpo.py end to end on checkpoints of 50k parameters whose students and teachers draw from four phrases each."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import SMALL, records
from conftest import grpo_flags as flags
from conftest import run_grpo as run
from safetensors.torch import load_file

import train_grpo
from nano_atlas import optim, protocol
from nano_atlas.batching import Sample, completion_logprobs
from nano_atlas.checkpoint import load_model
from nano_atlas.config import parse, run_script
from nano_atlas.data import Problem, problems_of_step, training_data
from nano_atlas.errors import UserError
from nano_atlas.presets import presets
from nano_atlas.sampler import Sampler
from nano_atlas.seats import Generation, Question, TokenSeat
from nano_atlas.tokenizer import Tokenizer
from train_grpo import Config, update

PRESETS = presets("train_grpo")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def is_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def copy_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def updates(monkeypatch) -> list[dict]:
    """What each call of `update` was given, with copies of the weights before it."""
    seen = []

    def spy(config, policy, reference, optimizer, samples, rate, is_fresh):
        copies = {"policy": copy_of(policy), "reference": reference and copy_of(reference)}
        seen.append({"samples": samples, "is_fresh": is_fresh, **copies})
        return update(config, policy, reference, optimizer, samples, rate, is_fresh)

    monkeypatch.setattr(train_grpo, "update", spy)
    return seen


@pytest.fixture
def rollouts(monkeypatch) -> list[list]:
    """The groups of episodes that each call of `roll_out` returned."""
    seen, real = [], train_grpo.roll_out

    def spy(*arguments):
        groups, metrics = real(*arguments)
        seen.append(groups)
        return groups, metrics

    monkeypatch.setattr(train_grpo, "roll_out", spy)
    return seen


# ----------------------------------------------------------------------------------------------------------- a whole run


def test_a_run_trains_the_teacher_alone_on_the_very_tokens_it_sampled(place, tmp_path, updates, rollouts):
    frozen = {name: weights(place / name) for name in ("teacher", "student")}
    metrics = run(place, tmp_path / "out")
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    for record in metrics:
        assert (
            record["sampling/logp_diff_max"] <= 1e-4
        )  # trainer and sampler: same weights, same prompts, same tokens
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0 and record["clip_ratio"] == 0
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[-1]["kl"] > 1e-4

    tokenizer = Tokenizer.from_directory(place / "teacher")
    for groups, seen in zip(rollouts, updates, strict=True):
        episodes = [episode for group in groups for episode in group]
        for episode, sample in zip(episodes, seen["samples"], strict=True):
            question, approach = episode.sketch.problem.question, episode.sketch.approach
            asked = tokenizer.chat_ids(protocol.teacher_messages(question, approach))
            assert list(sample.rollout.prompt_ids) == asked and sample.advantage == episode.advantage
    assert [sample.rollout.weight_version for seen in updates for sample in seen["samples"][:1]] == [
        0,
        1,
        2,
        3,
    ]

    assert is_same(weights(place / "teacher"), frozen["teacher"]) and is_same(
        weights(place / "student"), frozen["student"]
    )
    assert all(is_same(seen["reference"], updates[0]["reference"]) for seen in updates)
    assert not is_same(weights(tmp_path / "out/model"), frozen["teacher"])
    final = copy_of(load_model(tmp_path / "out/model"))
    assert all(torch.isfinite(tensor).all() for tensor in final.values())


def test_the_records_hold_the_metrics_people_know_and_whole_episodes(place, tmp_path):
    metrics = run(place, tmp_path / "out", steps=2)
    known = {"reward", "reward_std", "kl", "entropy", "clip_ratio", "completions/mean_length", "completions/truncated_ratio",
             "loss", "grad_norm", "lr", "student_accuracy", "baseline_accuracy", "accuracy_delta", "improvement_rate",
             "degradation_rate", "non_degradation_rate", "token_efficiency", "teaching_length_mean", "leak_rate",
             "malformed_rate", "unreadable_rate", "zero_variance_ratio"}  # fmt: skip
    assert all(known <= set(record) for record in metrics)
    assert "eval/reward" not in metrics[0] and "eval/reward" in metrics[1]
    episodes = records(tmp_path / "out/episodes.jsonl")
    assert [record["step"] for record in episodes] == [1, 1, 2, 2]
    for record in episodes:
        assert {
            "question",
            "approach",
            "baselines",
            "completion",
            "guided",
            "reward",
            "advantage",
            "is_leak",
        } <= set(record)
        assert record["teaching"] == (protocol.parse_teaching(record["completion"]) or "")
        assert len(record["baselines"]) == 2


def test_grpo_learns_what_the_reward_asks_for(place, tmp_path):
    """Of four phrases one is a leak, one a teaching and two are no teaching at all: it ends with the teaching.

    The student does not listen, so harm is noise here and left out of the reward.
    """
    metrics = run(place, tmp_path / "out", steps=16, lr=2e-3, beta=0.0, problems_per_step=4, group_size=8, eval_every=0,
                  degradation_penalty=0.0)  # fmt: skip
    first, last = ({name: sum(record[name] for record in part) / 3 for name in ("reward", "leak_rate", "malformed_rate")}
                   for part in (metrics[:3], metrics[-3:]))  # fmt: skip
    assert last["leak_rate"] + last["malformed_rate"] < 0.1 < first["leak_rate"] + first["malformed_rate"]
    assert last["reward"] > first["reward"] + 0.2


def test_the_student_itself_can_be_trained_on_right_and_wrong(place, tmp_path):
    """The control; its completions are answers, so --teaching-tokens does not bound them."""
    metrics = run(place, tmp_path / "out", reward="exact", steps=12, lr=2e-3, problems_per_step=4, group_size=8, eval_every=12,
                  normalization="constant", teaching_tokens=1)  # fmt: skip
    assert sum(record["reward"] for record in metrics[-3:]) / 3 > metrics[0]["reward"] + 0.1
    assert metrics[-1]["eval/reward"] == 1.0
    assert not is_same(weights(tmp_path / "out/model"), weights(place / "student"))


def test_traces_of_the_runtime_are_a_source_of_problems(place, tmp_path, rollouts):
    """The one-touch second round: what one run's episodes export, another trains on."""
    traces = [{"task": f"Pick one of {i}.", "ground_truth": "1"} for i in range(4)]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    run(place, tmp_path / "out", steps=1, problems=tmp_path / "traces.jsonl", eval_every=0)
    asked = {group[0].sketch.problem.question for groups in rollouts for group in groups}
    assert len(asked) == 2 and asked <= {trace["task"] for trace in traces}


# ----------------------------------------------------------------------------------------------------- options of the loss


class Descent:
    """Plain gradient descent in the optimizer's place: weights after it differ as gradients do."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def step(self, rate):
        for parameter in self.model.parameters():
            parameter -= rate * parameter.grad
            parameter.grad = None
        return 0.0


def config_of(place: Path, **options) -> Config:
    return parse(Config, flags(place, Path("unused"), **options), PRESETS, "")


@pytest.fixture(scope="module")
def sampled(place) -> list[Sample]:
    """Completions of the policy, of 1 to 6 tokens, with the log-probs it gave them, and made-up advantages."""
    seat = TokenSeat(Sampler(load_model(place / "teacher")), Tokenizer.from_directory(place / "teacher"))
    conversations = [
        protocol.teacher_messages(f"Pick {word}.", "None.") for word in ("one", "any of the two")
    ]
    generation = Generation(6, SMALL["temperature"][1])
    groups = seat.ask(
        [Question(messages, generation, seed, n=4) for seed, messages in enumerate(conversations, start=1)]
    )
    replies = [reply for group in groups for reply in group]
    return [Sample(reply.rollout, (index + 1) * (-1) ** index) for index, reply in enumerate(replies)]


def after_update(place, samples, max_logp_diff=0.1, **options) -> tuple[dict[str, torch.Tensor], dict]:
    policy, reference = load_model(place / "teacher"), load_model(place / "student")
    config = dataclasses.replace(config_of(place, **options), max_logp_diff=max_logp_diff)
    reference = reference if config.beta else None
    metrics = update(config, policy, reference, Descent(policy), samples, 1e-2)
    return copy_of(policy), metrics


@pytest.mark.parametrize("normalization", ["sequence", "token", "constant"])
def test_unequal_micro_batches_take_the_same_step_as_one_batch(place, sampled, normalization):
    whole, whole_metrics = after_update(place, sampled, normalization=normalization, tokens_per_batch=10_000)
    for tokens_per_batch in (1, 203, 300):
        split, metrics = after_update(
            place, sampled, normalization=normalization, tokens_per_batch=tokens_per_batch
        )
        for name, tensor in whole.items():
            torch.testing.assert_close(split[name], tensor, rtol=0, atol=1e-6, msg=name)
        whole_metrics["seconds/update"] = metrics["seconds/update"]
        assert metrics == pytest.approx(whole_metrics, rel=1e-4, abs=1e-6)


def test_normalization_weighs_tokens_as_its_name_says(place, sampled):
    """On the policy that sampled, the ratio is 1 and without KL the loss is the weighted sum of -A."""
    lengths = [len(sample.rollout.completion_ids) for sample in sampled]
    assert len(set(lengths)) > 1
    advantages = [sample.advantage for sample in sampled]
    by_token = -sum(advantage * length for advantage, length in zip(advantages, lengths))
    by_sequence = -sum(advantages)
    expected = {"sequence": by_sequence / len(sampled), "token": by_token / sum(lengths),
                "constant": by_token / len(sampled) / 6}  # fmt: skip
    for normalization, loss in expected.items():
        _, metrics = after_update(place, sampled, normalization=normalization, beta=0.0)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)


def test_each_option_of_the_loss_changes_the_step(place, sampled):
    plain, _ = after_update(place, sampled)
    for changes in ({"beta": 0.5}, {"kl": "exact"}, {"normalization": "token"}, {"updates_per_batch": 2}):
        changed, _ = after_update(place, sampled, **changes)
        assert not is_same(plain, changed), changes
    twice, loose, tight = (
        after_update(place, sampled, updates_per_batch=2, **clips)
        for clips in ({}, {"clip": (10.0, 10.0)}, {"clip": (0.0, 0.0)})
    )
    assert (
        loose[1]["clip_ratio"] == 0 < tight[1]["clip_ratio"] <= 0.5
    )  # half of the updates start on the old policy itself
    assert not is_same(loose[0], tight[0]) and 0 <= twice[1]["clip_ratio"] <= tight[1]["clip_ratio"]


def test_the_norm_of_the_gradient_is_the_mean_over_the_updates(place, sampled):
    class Measured(Descent):
        norms = iter((1.0, 4.0))

        def step(self, rate):
            super().step(rate)
            return next(self.norms)

    policy, reference = load_model(place / "teacher"), load_model(place / "student")
    metrics = update(
        config_of(place, updates_per_batch=2), policy, reference, Measured(policy), sampled, 1e-2
    )
    assert metrics["grad_norm"] == 2.5


@pytest.mark.parametrize("normalization", ["sequence", "token", "constant"])
def test_without_a_kl_samples_without_an_advantage_are_left_out_but_count_in_the_mean(
    place, sampled, normalization, monkeypatch
):
    """The same weights as where they are computed, for which their advantage is not quite zero."""
    computed = []
    right = train_grpo.policy_batches
    monkeypatch.setattr(
        train_grpo, "policy_batches", lambda found, *a: computed.append(len(found)) or right(found, *a)
    )
    options = {"normalization": normalization, "beta": 0.0}
    flat, tiny = (
        [dataclasses.replace(s, advantage=value) if i % 3 else s for i, s in enumerate(sampled)]
        for value in (0.0, 1e-30)
    )
    short, _ = after_update(place, flat, **options)
    whole, _ = after_update(place, tiny, **options)
    assert computed == [3, 8]
    for name in whole:
        torch.testing.assert_close(short[name], whole[name], rtol=1e-6, atol=1e-7)
    after_update(place, flat, **options | {"beta": 0.04})  # with a KL all are needed
    assert computed[-1] == 8


@pytest.mark.parametrize(
    "options", [{}, {"kl": "exact"}, {"beta": 0.0}, {"tokens_per_batch": 64}, {"reward": "exact"}]
)
def test_the_dry_step_is_as_long_as_any_micro_batch_and_changes_nothing(
    place, tmp_path, options, monkeypatch, capsys
):
    plain = run(place, tmp_path / "plain", steps=2, **options)
    tokens, real = [], train_grpo.policy_batches

    def spy(*arguments):
        batches = real(*arguments)
        tokens.append(max(len(batch.input_ids) for batch in batches))
        return batches

    monkeypatch.setattr(optim, "DRY_STEP_ON", ("cpu",))
    monkeypatch.setattr(train_grpo, "policy_batches", spy)
    dry = run(place, tmp_path / "dry", steps=2, **options)
    assert is_same(weights(tmp_path / "plain/model"), weights(tmp_path / "dry/model"))
    assert [r["loss"] for r in plain] == [r["loss"] for r in dry]
    assert len(tokens) == 3 and tokens[0] >= max(tokens[1:])

    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    monkeypatch.setattr(train_grpo, "backward", too_large)
    with pytest.raises(
        UserError, match=r"micro-batch of \d+ tokens .*out of memory\): lower --tokens-per-batch"
    ):
        run(place, tmp_path / "large", steps=2, **options)
    monkeypatch.setattr(optim, "DRY_STEP_ON", ())
    with pytest.raises(SystemExit):  # in a step: every script says what to lower
        run_script(lambda: run(place, tmp_path / "larger", steps=2, **options))
    said = capsys.readouterr().err
    assert "error: CUDA out of memory" in said and "Lower --cache-rows" in said


def test_the_kl_is_that_to_the_reference(place, sampled):
    """k3 of both models' own log-probs, formula written out in float64."""
    models = (load_model(place / name) for name in ("teacher", "student"))
    ours, theirs = (
        completion_logprobs(model, sampled, 10_000, SMALL["temperature"][1]).double() for model in models
    )
    _, metrics = after_update(place, sampled)
    assert metrics["kl"] == pytest.approx(
        ((theirs - ours).exp() - (theirs - ours) - 1).mean().item(), rel=1e-4
    )


def test_importance_weights_scale_the_policy_gradient_up_to_the_cap(place, sampled):
    """Had the sampler drawn each token with 1 / r of the trainer's probability, the step would be min(r, 2) times as long."""
    start = load_model(place / "teacher")
    lengths = [len(s.rollout.completion_ids) for s in sampled]
    own = completion_logprobs(start, sampled, 10_000, SMALL["temperature"][1]).split(lengths)

    def drawn_with(ratio: float) -> tuple[dict[str, torch.Tensor], dict]:
        samples = [
            with_logprobs(s, (logprobs - math.log(ratio)).tolist()) for s, logprobs in zip(sampled, own)
        ]
        end, metrics = after_update(place, samples, beta=0.0, tokens_per_batch=10_000, max_logp_diff=2.0)
        return {name: end[name] - value for name, value in start.named_parameters()}, metrics

    plain, metrics = drawn_with(1.0)
    assert metrics["sampling/importance_mean"] == pytest.approx(1.0, abs=1e-6)
    for ratio, factor in ((0.5, 0.5), (1.5, 1.5), (3.0, 2.0)):
        step, metrics = drawn_with(ratio)
        for name, value in step.items():
            torch.testing.assert_close(value, factor * plain[name], rtol=1e-3, atol=1e-6, msg=name)
        assert metrics["sampling/importance_mean"] == pytest.approx(factor)
        assert metrics["sampling/importance_capped"] == (ratio > 2)
        assert metrics["sampling/logp_diff_mean"] == pytest.approx(abs(math.log(ratio)), rel=1e-4)


def with_logprobs(sample: Sample, logprobs: list[float]) -> Sample:
    return dataclasses.replace(sample, rollout=dataclasses.replace(sample.rollout, logprobs=logprobs))


def test_stale_samples_may_differ_and_fresh_ones_may_not(place, sampled):
    shifted = [with_logprobs(s, [p - 1 for p in s.rollout.logprobs]) for s in sampled]
    policy = load_model(place / "teacher")
    with pytest.raises(
        UserError, match="trainer and sampler disagree about the sampled tokens by 1.000 nats"
    ):
        update(config_of(place, beta=0.0), policy, None, Descent(policy), shifted, 1e-2)
    metrics = update(config_of(place, beta=0.0), policy, None, Descent(policy), shifted, 1e-2, is_fresh=False)
    assert metrics["sampling/importance_capped"] == 1.0


def test_several_updates_per_batch_are_clipped_against_the_first(place, tmp_path):
    metrics = run(place, tmp_path / "out", steps=2, updates_per_batch=3, lr=2e-2, eval_every=0)
    assert any(record["clip_ratio"] > 0 for record in metrics)
    assert all(record["sampling/logp_diff_max"] <= 1e-4 for record in metrics)


def test_equal_rewards_move_nothing_but_the_kl(place, tmp_path):
    """A greedy-like policy and student: all rewards of a group are equal, and there is no gradient without KL."""
    metrics = run(place, tmp_path / "out", steps=2, temperature=(1e-3, 1e-3), beta=0.0, eval_every=0)
    assert [record["zero_variance_ratio"] for record in metrics] == [1.0, 1.0]
    assert [record["grad_norm"] for record in metrics] == [0.0, 0.0]
    assert is_same(weights(tmp_path / "out/model"), weights(place / "teacher"))


# -------------------------------------------------------------------------------------------------------------- resuming


TIMES = dict.fromkeys(("seconds/rollout", "seconds/update"))
TWICE = {"updates_per_batch": 2, "steps": 5}


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "out"
    run(place, out, **TWICE)
    return out


@pytest.mark.parametrize(("function", "call"), [
    ("roll_out", 1),  # before anything is saved
    ("update", 4),  # in step 4, after the state of step 2
    ("evaluate", 2),  # after the update of step 4
    ("save_training_state", 2),  # when step 4 is in the metrics and its state is not there
    ("save_model", 1),  # when all is done but the last model
])  # fmt: skip
def test_an_interrupted_run_ends_exactly_as_an_uninterrupted_one(
    place, tmp_path, straight, monkeypatch, function, call
):
    module = train_grpo.optim if function == "save_training_state" else train_grpo
    out, calls, real = tmp_path / "out", [], getattr(module, function)

    def interrupted(*arguments, **options):
        if function != "save_model" or arguments[0].name == "model":
            calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, function, interrupted)
        run(place, out, **TWICE)
    resumed = run(place, out, **TWICE)
    expected = records(straight / "metrics.jsonl")
    assert [{**record, **TIMES} for record in resumed] == [{**record, **TIMES} for record in expected]
    assert (out / "episodes.jsonl").read_text() == (straight / "episodes.jsonl").read_text()
    assert is_same(weights(out / "model"), weights(straight / "model"))
    assert is_same(weights(out / "best"), weights(straight / "best"))


def test_a_finished_run_is_not_repeated_and_other_options_are_refused(place, tmp_path, capsys):
    run(place, tmp_path / "out", steps=2)
    run(place, tmp_path / "out", steps=2)
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--beta 0\.04 -> 0\.1\. .* --restart"):
        run(place, tmp_path / "out", steps=2, beta=0.1)
    assert len(run(place, tmp_path / "out", steps=3)) == 3
    assert len(run(place, tmp_path / "out", steps=1, beta=0.1, restart=True)) == 1


def test_held_out_problems_stay_held_out(place, tmp_path):
    """Evaluating on more or fewer of them would move problems between the two sets in the middle of a run."""
    run(place, tmp_path / "out", steps=2)
    with pytest.raises(UserError, match="--eval-problems 200 -> 1"):
        run(place, tmp_path / "out", steps=3, eval_problems=1)
    training, held_out = training_data(config_of(place))
    assert len(training) == 38 and len(held_out) == 2
    assert not {p.id for p in training} & {p.id for p in held_out}
    assert (training, held_out) == training_data(config_of(place, steps=99))


def test_every_problem_comes_once_per_epoch_in_an_order_of_its_own():
    problems = [Problem(str(i), f"q{i}", "1") for i in range(10)]
    steps = [problems_of_step(problems, step, 4, seed=0) for step in range(10)]
    asked = [problem.question for step in steps for problem in step]
    epochs = [asked[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == sorted(problem.question for problem in problems) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (
        len({problem.id for step in steps for problem in step}) == 40
    )  # seeds come from ids: no draw is repeated
    assert steps == [problems_of_step(problems, step, 4, seed=0) for step in range(10)]
    assert steps != [problems_of_step(problems, step, 4, seed=1) for step in range(10)]


# ------------------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_sets_options_that_exist_and_agree(name):
    data = [] if name == "nano" else ["--problems", "x.jsonl"]
    config = parse(Config, ["--preset", name, *data], PRESETS, "")
    for option, value in PRESETS[name].overrides.items():
        assert getattr(config, option) == value


@pytest.mark.parametrize(("options", "said"), [
    ({"problems": None, "preset": "own"}, "--preset own needs --problems FILE to train on"),
    ({"group_size": 1}, "--group-size must be at least 2, not 1"),
    ({"temperature": (1, 0)}, "--temperature: the teacher's must be above 0"),
    ({"clip": (-0.1, 0.2)}, "--clip must be at least 0, not -0.1"),
    ({"lr": 0}, "--lr must be above 0"),
    ({"normalization": "sentence"}, "sentence"),
])  # fmt: skip
def test_contradictions_are_explained(place, options, said):
    with pytest.raises(UserError, match=said):
        config_of(place, **options)


@pytest.mark.parametrize(("options", "said"), [
    ({"device": "cuda:99"}, "no device cuda:99: this machine has"),
    ({"problems": "none.jsonl"}, "none.jsonl: no such file"),
    ({"teacher": "nowhere"}, "no model at nowhere, .*; train one with train_sft.py"),
    ({"student": "nowhere"}, "no model at nowhere, .*hf download nowhere"),
    ({"student": "nowhere", "reward": "exact"}, "no model at nowhere, .*hf download nowhere"),
])  # fmt: skip
def test_missing_things_are_named(place, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        run(place, tmp_path / "out", **options)


def test_a_mistake_is_one_line_and_exit_code_2(place, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1?", "answer": "1"}\n{"question": "2?"}\n')
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: run(place, tmp_path / "out", problems=bad))
    assert stop.value.code == 2 and f"error: {bad}:2: no gold answer" in capsys.readouterr().err
    with pytest.raises(UserError, match="unrecognized arguments: --group-sise"):
        train_grpo.main(["--group-sise", "4"])
