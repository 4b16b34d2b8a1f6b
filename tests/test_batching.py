"""Log-probs and gradients with a group's prompt computed once, against every sequence computed alone."""

import random

import pytest
import torch
from torch.nn.attention import flex_attention

from benchmarks.pretrain import initialize
from nano_atlas import batching, gpu
from nano_atlas.batching import Sample, completion_logprobs, policy_batches, predicting_states
from nano_atlas.gpu import FlexAttention, compile_layers
from nano_atlas.model import ModelConfig, PackedAttention, SharedPromptAttention, Transformer
from nano_atlas.sampler import Rollout

TEMPERATURE = 0.7
HEADS = [(4, 4), (4, 2), (4, 1)]  # query and key heads: plain, grouped-query, multi-query


@pytest.fixture(autouse=True, params=["padded", "flex"])
def kernel(request, monkeypatch):
    """Every test with both attention objects; on a CPU torch has FlexAttention's formulas, with gradients, but refuses them."""
    if request.param == "flex":
        monkeypatch.setattr(batching, "SharedPromptAttention", FlexAttention)
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
        monkeypatch.setattr(flex_attention, "_warn_once", lambda **_: None)  # "use torch.compile()"
    return request.param


def filled(tokens: int, kernel: str) -> int:
    """As many tokens as are computed."""
    return -(-tokens // 128) * 128 if kernel == "flex" else tokens


def make_model(heads=(4, 2)) -> Transformer:
    model = initialize(Transformer(ModelConfig("qwen3", 61, 32, 48, 2, *heads, 8, qk_norm=True)), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 10 if parameter.ndim == 2 else 1  # away from uniform distributions
    return model


def make_samples() -> list[Sample]:
    """Groups of 4, 1, 3 and 2 completions, two of one token, in mixed order; one prompt is a single token."""
    draws = random.Random(0)
    samples = []
    for prompt_length, lengths in ((9, (3, 1, 7, 4)), (4, (6,)), (1, (2, 5, 1)), (13, (8, 8))):
        prompt = tuple(draws.choices(range(61), k=prompt_length))
        for length in lengths:
            samples.append(
                Sample(
                    Rollout(prompt, draws.choices(range(61), k=length), [], "stop", 0), draws.uniform(-1, 1)
                )
            )
    draws.shuffle(samples)
    return samples


def alone(model: Transformer, sample: Sample) -> torch.Tensor:
    """The oracle: one sequence, ordinary causal attention, log-softmax over plain logits in float64."""
    prompt, completion = list(sample.rollout.prompt_ids), sample.rollout.completion_ids
    ids = torch.tensor(prompt + completion)
    attention = PackedAttention([len(ids) - 1])
    hidden = model(ids[:-1], attention.positions, attention)[len(prompt) - 1 :]
    logprobs = torch.log_softmax((hidden @ model.head_weight.T).double() / TEMPERATURE, dim=-1)
    return logprobs.gather(1, ids[len(prompt) :, None]).squeeze(1)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens_per_batch", [1, 20, 40, 10_000])
def test_log_probs_are_those_of_each_sequence_alone(heads, tokens_per_batch):
    model, samples = make_model(heads), make_samples()
    expected = torch.cat([alone(model, sample).detach() for sample in samples])  # in the order of the samples
    logprobs = completion_logprobs(model, samples, tokens_per_batch, TEMPERATURE)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens_per_batch", [20, 10_000])
def test_gradients_are_those_of_each_sequence_alone(heads, tokens_per_batch):
    """Through the shared prompt, too: all its completions pull on it."""
    model, samples = make_model(heads), make_samples()
    sum(sample.advantage * alone(model, sample).sum() for sample in samples).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    advantages = torch.cat(
        [torch.full((len(sample.rollout.completion_ids),), sample.advantage) for sample in samples]
    )
    for batch in policy_batches(samples, tokens_per_batch, model):
        logits = predicting_states(model, batch) @ model.head_weight.T / TEMPERATURE
        chosen = torch.log_softmax(logits, dim=-1).gather(1, batch.targets[:, None]).squeeze(1)
        (chosen * advantages[batch.rows]).sum().backward()
    for name, parameter in model.named_parameters():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 40, 10_000])
def test_every_completion_token_is_predicted_once_and_batches_keep_to_their_size(kernel, tokens_per_batch):
    samples = make_samples()
    tokens = [token for sample in samples for token in sample.rollout.completion_ids]
    owners = [index for index, s in enumerate(samples) for _ in s.rollout.completion_ids]
    batches = policy_batches(samples, tokens_per_batch, make_model())
    rows = torch.cat([batch.rows for batch in batches])
    assert sorted(rows.tolist()) == list(range(len(tokens)))
    assert [tokens[row] for row in rows] == torch.cat([batch.targets for batch in batches]).tolist()
    for batch in batches:
        is_single = len({owners[row] for row in batch.rows}) == 1
        assert len(batch.input_ids) <= filled(tokens_per_batch, kernel) or is_single
    assert len(batches) == {1: len(samples), 10_000: 1}.get(tokens_per_batch, len(batches))


def test_a_prompt_is_computed_once_for_its_group(kernel):
    samples = make_samples()
    (batch,) = policy_batches(samples, 10_000, make_model())
    prompts = {sample.rollout.prompt_ids for sample in samples}
    completions = sum(len(s.rollout.completion_ids) - 1 for s in samples)
    assert len(batch.input_ids) == filled(sum(map(len, prompts)) + completions, kernel)


def test_completions_of_one_token_need_no_token_of_their_own():
    model = make_model()
    samples = [Sample(Rollout((5, 6, 7), [token], [], "stop", 0), 1.0) for token in (1, 2, 3)]
    expected = torch.cat([alone(model, sample).detach() for sample in samples])
    torch.testing.assert_close(
        completion_logprobs(model, samples, 100, TEMPERATURE).double(), expected, rtol=0, atol=1e-5
    )


def test_positions_go_on_after_the_prompt():
    attention = FlexAttention([3, 1], [2, 0, 4], [0, 0, 1], "cpu")
    assert attention.positions.tolist() == [0, 1, 2, 0, 3, 4, 1, 2, 3, 4, *range(118)]
    padded = SharedPromptAttention([3, 1], [2, 0, 4], [0, 0, 1], "cpu")
    assert padded.positions.tolist() == attention.positions.tolist()[:10]


@pytest.mark.processes
@torch.no_grad()
def test_one_kernel_serves_every_batch(kernel, monkeypatch):
    """Compiled for a CPU, which can do the forward pass: at most one kernel more after the first batch."""
    if kernel == "padded":
        pytest.skip("it compiles nothing")
    monkeypatch.undo()
    monkeypatch.setattr(
        gpu, "_flex_kernel", lambda _: torch.compile(flex_attention.flex_attention, dynamic=True)
    )
    torch._dynamo.reset()
    graphs = []
    for prompts, completions, prompt_of in (
        ([30, 70], [20, 1, 30, 50], [0, 0, 1, 1]), ([300, 40, 1], [120, 100, 30, 50, 9], [0, 0, 1, 1, 2]),
        ([37], [200, 100, 39, 50], [0] * 4), ([50] * 9, [2] * 9, range(9)),
    ):  # fmt: skip
        kinds = [
            kind(prompts, completions, prompt_of, "cpu") for kind in (SharedPromptAttention, FlexAttention)
        ]
        computed, tokens = len(kinds[1].positions), sum(prompts) + sum(completions)
        q, k, v = (torch.randn(computed, heads, 32) for heads in (4, 2, 2))
        expected = kinds[0](0, q[:tokens], k[:tokens], v[:tokens])
        torch.testing.assert_close(kinds[1](0, q, k, v)[:tokens], expected, rtol=1e-5, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] - graphs[0] <= 1, graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_on_a_gpu(monkeypatch, kernel, dtype, bound):
    """Compiled layers with FlexAttention's kernel, and plain ones with the padded one, against the CPU: log-probs and gradients."""
    monkeypatch.undo()
    monkeypatch.setenv("NANO_ATLAS_COMPILE", "1" if kernel == "flex" else "0")
    samples, found = make_samples(), []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        model = initialize(Transformer(ModelConfig("qwen3", 61, 64, 96, 2, 4, 2, 32, qk_norm=True)), 0)
        model = model.to(device, kind)
        if device == "cuda":
            compile_layers(model)
        (batch,) = policy_batches(samples, 10_000, model)
        assert isinstance(batch.attention, FlexAttention) == (device == "cuda" and kernel == "flex")
        logits = predicting_states(model, batch) @ model.head_weight.T
        logprobs = logits.float().log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
        logprobs.square().sum().backward()
        found.append([logprobs.detach(), *(p.grad for p in model.parameters())])
    for expected, computed in zip(*found, strict=True):
        assert (computed.float().cpu() - expected).norm() <= bound * expected.norm()
