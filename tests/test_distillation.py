"""On-policy distillation: train_grpo.py with --reward none and the exact KL to another model, or to itself with the solution."""

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, grpo_flags, records, run_grpo

import train_grpo
from benchmarks import distill
from benchmarks.pretrain import initialize
from nano_atlas import protocol, world
from nano_atlas.batching import Sample
from nano_atlas.checkpoint import load_model, save_model
from nano_atlas.config import parse
from nano_atlas.data import load_problems
from nano_atlas.errors import UserError
from nano_atlas.model import ModelConfig, PackedAttention, Transformer
from nano_atlas.presets import presets
from nano_atlas.runs import write_jsonl
from nano_atlas.sampler import Generation
from nano_atlas.seats import Question, open_seat
from nano_atlas.tokenizer import Tokenizer

KL = {"reward": "none", "kl": "exact"}


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    """Another width, depth and head, which also has three rows more than there are tokens."""
    path, tokenizer = tmp_path_factory.mktemp("larger") / "model", byte_tokenizer()
    sizes = tokenizer.vocab_size + 3, 64, 96, 3, 4, 2, 16
    model = initialize(Transformer(ModelConfig("qwen3", *sizes, qk_norm=True)), 5)
    with torch.no_grad():
        model.lm_head.weight *= 30  # far from uniform
        model.lm_head.weight[-3:] = 0.0
    save_model(path, model, tokenizer)
    return path


def config_of(place: Path, **options) -> train_grpo.Config:
    return parse(train_grpo.Config, grpo_flags(place, Path("unused"), **options), presets("train_grpo"), "")


def logprobs_of(model, prompt, completion, rows: int, temperature: float) -> torch.Tensor:
    """Of the whole vocabulary at each completion token, `[T, rows]` float64, one sequence at a time."""
    ids = torch.tensor([*prompt, *completion[:-1]])
    hidden = model(ids, torch.arange(len(ids)), PackedAttention([len(ids)]))[len(prompt) - 1 :]
    return (hidden @ model.head_weight.T[:, :rows]).double().div(temperature).log_softmax(-1)


class Kept:
    """An optimizer that keeps the gradients instead of using them."""

    def __init__(self, model):
        self.model = model

    def step(self, rate):
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
        return 0.0


@pytest.mark.parametrize(
    "options", [{"kl": "exact"}, {"kl": "privileged"}, {"kl": "exact", "updates_per_batch": 2}]
)
@pytest.mark.parametrize("tokens_per_batch", [10_000, 150])
def test_the_gradient_is_that_of_the_reverse_kl_over_the_whole_vocabulary(
    place, larger, options, tokens_per_batch
):
    """Mean over tokens, then over completions, of sum_v p (log p - log q), on the policy's own samples, in float64.

    The reference may be larger, and with `privileged` it reads another prompt than the policy.
    """
    config = config_of(
        place, reference=larger, reward="none", tokens_per_batch=tokens_per_batch, beta=0.5, **options
    )
    policy, reference = load_model(place / "teacher"), load_model(larger)
    tokenizer = Tokenizer.from_directory(place / "teacher")
    prompts = [tokenizer.chat_ids(protocol.user_turn(f"Pick {i}.")) for i in range(3)]
    secrets = [tokenizer.chat_ids(protocol.user_turn(f"It is {i * 111}. Pick {i}.")) for i in range(3)]
    seat, drawn = open_seat(str(place / "teacher")), Generation(6, config.teacher_temperature)
    questions = [Question(protocol.user_turn(f"Pick {i}."), drawn, i, 4) for i in range(3)]
    replies = [[reply.rollout for reply in group] for group in seat.ask(questions)]
    is_informed = config.kl == "privileged"
    samples = [
        Sample(rollout, 0.0, tuple(secret) if is_informed else ())
        for group, secret in zip(replies, secrets)
        for rollout in group
    ]
    optimizer = Kept(policy)
    metrics = train_grpo.update(config, policy, reference, optimizer, samples, 0.0)

    oracle, rows, total, mean = load_model(place / "teacher").double(), len(policy.head_weight), 0.0, []
    other = load_model(larger).double()
    for prompt, secret, group in zip(prompts, secrets, replies):
        for rollout in group:
            assert list(rollout.prompt_ids) == prompt
            written = prompt, rollout.completion_ids, rows, config.teacher_temperature
            p = logprobs_of(oracle, *written)
            q = logprobs_of(other, secret if is_informed else prompt, *written[1:]).detach()
            kl_T = (p.exp() * (p - q)).sum(-1)
            mean += kl_T.tolist()
            total = total + config.beta * kl_T.mean() / len(samples)
    total.backward()
    assert metrics["kl"] == pytest.approx(sum(mean) / len(mean), rel=1e-4) and metrics["kl"] > 0.1
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-4)
    times = config.updates_per_batch  # `Kept` clears nothing: the same gradient again
    for name, parameter in oracle.named_parameters():
        expected = (times * parameter.grad).float()
        torch.testing.assert_close(optimizer.gradients[name], expected, rtol=1e-3, atol=1e-6, msg=name)


def test_distillation_asks_the_student_for_its_approach_alone_and_comes_nearer_to_the_reference(
    place, larger, tmp_path, monkeypatch
):
    asked, real = [], train_grpo.roll_out

    def spy(config, seats, problems, step):
        student, ask = seats["student"], seats["student"].ask

        def heard(questions, progress=None):
            asked.extend(question.messages[0]["content"] for question in questions)
            return ask(questions, progress)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(student, "ask", heard)
            return real(config, seats, problems, step)

    monkeypatch.setattr(train_grpo, "roll_out", spy)
    metrics = run_grpo(place, tmp_path / "out", reference=larger, beta=1.0, steps=30, eval_every=15, **KL)
    assert len(asked) == 30 * 2 and all(protocol.PROBE_REQUEST in prompt for prompt in asked)
    assert sum(r["kl"] for r in metrics[-5:]) < 0.8 * sum(r["kl"] for r in metrics[:5])
    assert {record["reward"] for record in metrics} == {0.0}
    assert not any("student_accuracy" in record for record in metrics)  # nobody answered
    assert all(
        "eval/student_accuracy" in metrics[step] and "eval/reward" in metrics[step] for step in (14, 29)
    )
    episodes = records(tmp_path / "out/episodes.jsonl")
    assert episodes[0]["guided"] is None and episodes[0]["baselines"] == [] and episodes[0]["approach"]


def test_the_privileged_reference_reads_the_solution_and_nobody_else_does(place, tmp_path, monkeypatch):
    """GSM8K's whole rationale, or else the answer, in the reference's prompt; for teachings and for answers."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "Pick one.", "answer": "Half of 2 is 1.\\n#### 1"}\n' * 1)
    (problem,) = load_problems(problems)
    assert (problem.answer, problem.solution) == ("1", "Half of 2 is 1.\n#### 1")
    seen, real = [], train_grpo.update

    def spy(config, policy, reference, optimizer, samples, rate, is_fresh):
        seen.append(samples)
        return real(config, policy, reference, optimizer, samples, rate, is_fresh)

    monkeypatch.setattr(train_grpo, "update", spy)
    options = {"problems": problems, "problems_per_step": 1, "kl": "privileged", "steps": 1, "eval_every": 0}
    run_grpo(place, tmp_path / "teacher", reward="none", **options)
    run_grpo(place, tmp_path / "answers", reward="exact", **options)
    decode = Tokenizer.from_directory(place / "teacher").decode
    for samples, request in zip(seen, ("Student's approach", "Solve step by step")):
        for sample in samples:
            read, asked = (
                decode(list(sample.of_reference.rollout.prompt_ids)),
                decode(list(sample.rollout.prompt_ids)),
            )
            assert "Half of 2 is 1." in read and "Half of 2" not in asked
            assert request in read and asked.partition("Pick one.")[2] == read.partition("Pick one.")[2]
            assert sample.of_reference.rollout.completion_ids == sample.rollout.completion_ids


@pytest.mark.parametrize("options, message", [
    ({"reward": "none"}, "--reward none needs --kl exact --reference DIRECTORY, or --kl privileged"),
    ({"reward": "none", "kl": "exact"}, "--reward none needs"),
    ({"reward": "none", "reference": "larger"}, "--reward none needs"),
    ({"reward": "none", "kl": "privileged", "beta": 0.0}, "--reward none needs"),
    ({"reward": "nothing"}, "nothing: "),
])  # fmt: skip
def test_a_run_without_anything_to_learn_from_is_refused(place, options, message):
    with pytest.raises(UserError, match=message):
        config_of(place, **options)


def test_a_reference_with_other_tokens_is_refused_with_the_difference(place, larger, tmp_path):
    model = load_model(place / "teacher")
    save_model(tmp_path / "other", model, byte_tokenizer())
    (tmp_path / "other/digests.json").unlink()
    file = tmp_path / "other/tokenizer.json"
    file.write_text(file.read_text().replace('"hm"', '"mh"'))
    with pytest.raises(
        UserError, match=r"other needs the policy's tokenizer \(2 tokens differ, .* of its family"
    ):
        run_grpo(place, tmp_path / "out", reference=tmp_path / "other", **KL)
    with pytest.raises(UserError, match=r"0 tokens differ, 269 logits for the policy's 272"):
        run_grpo(place, tmp_path / "out", teacher=larger, reference=place / "teacher", **KL)


def test_the_experiments_informed_teacher_reads_half_of_the_solutions_and_its_control_none(tmp_path):
    tasks = world.tasks("math", 40, "demonstrations/7")
    lines = [world.demonstration(task, "None.", "adaptive", is_thorough=False) for task in tasks]
    write_jsonl(tmp_path / "demonstrations.jsonl", lines)
    told = [
        distill.informed_demonstrations(tmp_path / "demonstrations.jsonl", 7, has) for has in (True, False)
    ]
    informed, control = ([chat["messages"] for chat in chats] for chats in told)
    is_read = ["Solution, for you only: " in chat[0]["content"] for chat in informed]
    assert 10 < sum(is_read) < 30 and not any("Solution" in chat[0]["content"] for chat in control)
    for task, has, seen, plain in zip(tasks, is_read, informed, control, strict=True):
        assert seen[1] == plain[1] and (task.solution in seen[0]["content"]) == has
        assert (world.plan(task.chain) in plain[1]["content"]) or not has


@pytest.mark.parametrize("kl", ["k3", "exact"])
def test_grpo_with_another_reference_starts_with_a_kl_above_zero(place, larger, tmp_path, kl):
    metrics = run_grpo(place, tmp_path / "out", reference=larger, kl=kl, steps=1, eval_every=0)
    assert metrics[0]["kl"] > 0.1 and metrics[0]["reward_std"] >= 0
