"""The embedded sampler against transformers' `generate`, the training forward and the exact distribution."""

from itertools import groupby

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nano_atlas import sampler as sampler_module
from nano_atlas.errors import UserError
from nano_atlas.gpu import compile_layers
from nano_atlas.model import ModelConfig, PackedAttention, Transformer
from nano_atlas.sampler import Generation, Request, Sampler, draw_tokens


@torch.no_grad()
def tiny_model(seed: int = 0, tied: bool = True, vocab_size: int = 61, spread: float = 3.0) -> Transformer:
    """A random Qwen3-layout model whose layers outweigh its embeddings; `spread` is about the logits' standard deviation."""
    config = ModelConfig(
        "qwen3", vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=tied, qk_norm=True,
    )  # fmt: skip
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 2 * noise / parameter.shape[1] ** 0.5)
    model.head_weight.mul_(spread / 2)
    return model


@torch.no_grad()
def training_logprobs(model: Transformer, prompt_ids, completion_ids, temperature: float) -> np.ndarray:
    """Log-probs of a completion as the training forward sees it: one packed document, plain float32 log-softmax."""
    ids = torch.tensor([*prompt_ids, *completion_ids])
    attention = PackedAttention([len(ids)])
    logits = model(ids, attention.positions, attention) @ model.head_weight.T
    logprobs = (logits / temperature).log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return logprobs.gather(1, torch.tensor(completion_ids)[:, None]).squeeze(1).numpy()


def mixed_requests() -> list[Request]:
    """Different prompts, lengths, parameters, seeds and sample counts; two of them share a prompt."""
    return [
        Request((1, 2, 3), Generation(20), n=3, seed=1),
        Request((9,), Generation(7, temperature=0.7), n=2, seed=2),
        Request(tuple(range(30)), Generation(25, temperature=1.3, top_p=0.8), n=4, seed=3),
        Request((1, 2, 3), Generation(12, temperature=0.0), n=1, seed=4),
        Request((5, 4, 3, 2), Generation(30), n=5, seed=5, stop_token_ids=(7, 11)),
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_is_transformers_generate(tied):
    """Same weights, temperature 0, several prompt lengths in one batch: token for token what transformers generates."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model(tied=tied)
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    names = (names + "max_position_embeddings rms_norm_eps tie_word_embeddings").split()
    config = transformers.Qwen3Config(
        **{name: getattr(model.config, name) for name in names},
        rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_theta},
    )
    oracle = transformers.Qwen3ForCausalLM(config).eval()
    oracle.load_state_dict(model.state_dict(), strict=not tied)
    oracle.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(0, 61, (length,), generator=generator).tolist() for length in (1, 2, 7, 30, 30, 64)
    ]
    rollouts = Sampler(model).generate([Request(tuple(p), Generation(24, temperature=0.0)) for p in prompts])
    for prompt, (rollout,) in zip(prompts, rollouts):
        ids = torch.tensor([prompt])
        expected = oracle.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        assert rollout.completion_ids == expected[0, len(prompt) :].tolist()
        assert rollout.finish_reason == "length"


@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_are_those_of_the_training_forward(tied):
    """Each sampled id, re-scored by the packed training forward at the request's temperature, agrees to 1e-4 nats."""
    model = tiny_model(tied=tied)
    requests = mixed_requests()
    for request, rollouts in zip(requests, Sampler(model, max_rows=4).generate(requests)):
        assert len(rollouts) == request.n
        for rollout in rollouts:
            temperature = request.generation.temperature or 1.0
            expected = training_logprobs(model, request.prompt_ids, rollout.completion_ids, temperature)
            assert rollout.prompt_ids == request.prompt_ids
            np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)


def test_seeds_reproduce_and_samples_differ():
    """The same seed gives the same samples; another seed, or another sample index, gives others."""
    sampler = Sampler(tiny_model())
    first, again, other = (
        sampler.generate([Request((1, 2), Generation(16), n=4, seed=seed)])[0] for seed in (8, 8, 9)
    )
    assert first == again
    completions = [tuple(r.completion_ids) for r in first + other]
    assert len(set(completions)) == 8


def test_result_does_not_depend_on_the_batch():
    """Alone, together, in another order, in one row, in three, with syncs every 5 steps: the same tokens for each request."""
    model, requests = tiny_model(), mixed_requests()
    together = Sampler(model).generate(requests)
    runs = {
        "alone": [Sampler(model).generate([request])[0] for request in requests],
        "reversed": Sampler(model).generate(requests[::-1])[::-1],
        "one row": Sampler(model, max_rows=1).generate(requests),
        "three rows": Sampler(model, max_rows=3).generate(requests),
        "rare syncs": Sampler(model, max_rows=6, steps_per_sync=5).generate(requests),
    }
    for name, results in runs.items():
        for rollouts, expected in zip(results, together):
            assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in expected], name
            assert [r.finish_reason for r in rollouts] == [r.finish_reason for r in expected], name
            for rollout, other in zip(rollouts, expected):
                np.testing.assert_allclose(rollout.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("steps_per_sync", [1, 6])
def test_stop_tokens_end_a_sample_and_are_included(steps_per_sync):
    """With stop tokens a sample is the prefix, up to and with the first of them, of the same sample without."""
    sampler, stops = Sampler(tiny_model(), steps_per_sync=steps_per_sync), (5, 17, 40)
    free, stopped = (
        sampler.generate([Request((1, 2), Generation(40), n=20, seed=1, stop_token_ids=ids)])[0]
        for ids in ((), stops)
    )
    assert {r.finish_reason for r in stopped} == {"stop", "length"}
    for long, short in zip(free, stopped):
        ends = [i for i, token in enumerate(long.completion_ids) if token in stops]
        length = ends[0] + 1 if ends else 40
        assert short.completion_ids == long.completion_ids[:length]
        assert len(short.logprobs) == length
        assert short.finish_reason == ("stop" if ends else "length")


def test_parameters_are_per_row():
    """Every sample of one batch obeys its own max_tokens and temperature."""
    requests = [
        Request((3, 1), Generation(n, temperature=t), n=2)
        for n, t in ((1, 1.0), (4, 0.0), (9, 0.05), (30, 3.0))
    ]
    results = Sampler(tiny_model()).generate(requests)
    for request, rollouts in zip(requests, results):
        assert [len(r.completion_ids) for r in rollouts] == [request.generation.max_tokens] * 2
    assert results[1][0].completion_ids == results[1][1].completion_ids  # greedy samples are all the same
    assert results[3][0].completion_ids != results[3][1].completion_ids


def test_samples_follow_the_softmax():
    """First tokens of 4,000 samples against the training forward's probabilities: chi-square; the temperature counts."""
    model, prompt, n = tiny_model(vocab_size=20, spread=1.5), (3, 1, 4), 4000
    attention = PackedAttention([3])
    with torch.no_grad():
        logits = model(torch.tensor(prompt), attention.positions, attention)[-1] @ model.head_weight.T
    for temperature in (0.7, 1.0, 1.5):
        rollouts = Sampler(model, max_rows=1000).generate(
            [Request(prompt, Generation(1, temperature), n=n, seed=5)]
        )[0]
        counts = np.bincount([r.completion_ids[0] for r in rollouts], minlength=20)
        expected = (logits.double() / temperature).softmax(-1).numpy() * n
        rare = expected < 5  # chi-square wants at least 5 per cell: rare tokens share one
        observed = np.append(counts[~rare], counts[rare].sum())
        cells = np.append(expected[~rare], expected[rare].sum())
        assert stats.chisquare(observed[cells > 0], cells[cells > 0]).pvalue > 1e-3


@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.9])
def test_top_p_stays_in_the_nucleus_and_renormalises(top_p):
    """Draws lie in the smallest set of likeliest tokens with mass >= top_p and follow its renormalised probabilities."""
    n, generator = 20_000, torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(30, generator=generator)
    uniforms = torch.from_numpy(np.random.default_rng(1).random((n, 1)))
    tokens, logprobs = draw_tokens(
        logits.repeat(n, 1), uniforms, torch.ones(n, 1), top_p=torch.full((n, 1), top_p)
    )

    probs = logits.double().softmax(-1).numpy()
    order = np.argsort(-probs)
    size = int(np.searchsorted(probs[order].cumsum(), top_p)) + 1
    nucleus = order[:size]
    counts = np.bincount(tokens, minlength=30)
    assert set(np.flatnonzero(counts)) <= set(nucleus)
    expected = probs[nucleus] / probs[nucleus].sum() * n
    assert size == 1 or stats.chisquare(counts[nucleus], expected).pvalue > 1e-3
    np.testing.assert_allclose(logprobs, logits.log_softmax(-1)[tokens], atol=1e-5)  # before truncation


def test_draws_at_the_ends_of_the_unit_interval_have_mass():
    """Uniforms 0 and just below 1 never pick a token without probability."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).repeat(2, 1)
    uniforms = torch.tensor([[0.0], [np.nextafter(1.0, 0.0)]], dtype=torch.float64)
    assert draw_tokens(logits, uniforms, torch.ones(2, 1))[0].tolist() == [1, 2]


def test_live_weights_no_stale_cache():
    """After an in-place change of the parameters the very next generation is the changed model's (and only then)."""
    model = tiny_model()
    sampler = Sampler(model)
    request = Request((1, 2, 3), Generation(20, temperature=0.0))
    before = sampler.generate([request])[0][0]
    changed = tiny_model(seed=1)
    with torch.no_grad():
        for parameter, new in zip(model.parameters(), changed.parameters()):
            parameter.copy_(new)
    sampler.weight_version += 1
    after = sampler.generate([request])[0][0]
    fresh = Sampler(changed).generate([request])[0][0]
    assert after.completion_ids == fresh.completion_ids != before.completion_ids
    assert after.logprobs == fresh.logprobs
    assert (before.weight_version, after.weight_version) == (0, 1)


@pytest.mark.parametrize("max_rows", [256, 3])
def test_a_prompt_is_prefilled_once(max_rows):
    """8 samples and an identical prompt of another request: its tokens but the last run once, however few rows there are."""
    model, calls = tiny_model(), []
    model.register_forward_pre_hook(
        lambda module, args: calls.append((args[0].numel(), type(args[2]).__name__))
    )
    prompt, other = tuple(range(1, 41)), tuple(range(2, 23))
    params = Generation(6)
    requests = [
        Request(prompt, params, n=8),
        Request(other, params),
        Request(prompt, Generation(3), n=2, seed=1),
    ]
    Sampler(model, max_rows=max_rows).generate(requests)
    prefilled = sum(tokens for tokens, kind in calls if kind == "RecordingAttention")
    decoded = sum(tokens for tokens, kind in calls if kind == "CachedAttention")
    assert prefilled == 39 + 20
    assert decoded == 8 * 6 + 6 + 2 * 3  # one per token drawn: finished rows cost nothing


def test_finished_rows_leave_and_waiting_rows_enter():
    """16 samples of 2 tokens and one of 30 through 4 rows: the batch refills while the long one runs and shrinks at the end."""
    model, calls = tiny_model(), []
    model.register_forward_pre_hook(
        lambda module, args: calls.append((args[0].numel(), type(args[2]).__name__))
    )
    Sampler(model, max_rows=4).generate([Request((1,), Generation(2), n=16), Request((2,), Generation(30))])
    rows = [tokens for tokens, kind in calls if kind == "CachedAttention"]
    assert [(size, len(list(steps))) for size, steps in groupby(rows)] == [(4, 10), (2, 2), (1, 18)]


def test_prompts_beyond_one_prefill_batch(monkeypatch):
    """Prompts are prefilled in several batches when they exceed the token limit; nothing else changes."""
    model, requests = tiny_model(), mixed_requests()
    expected = Sampler(model).generate(requests)
    monkeypatch.setattr("nano_atlas.sampler.PREFILL_TOKENS", 4)
    assert [[r.completion_ids for r in rs] for rs in Sampler(model).generate(requests)] == [
        [r.completion_ids for r in rs] for rs in expected
    ]


def test_nothing_asked_nothing_done():
    """No request, or none of a request's samples: empty lists."""
    sampler = Sampler(tiny_model())
    assert sampler.generate([]) == []
    assert sampler.generate([Request((1,), Generation(4), n=0)]) == [[]]
    both = sampler.generate(
        [Request((1,), Generation(4), n=0), Request((1,), Generation(4))], progress="sampling"
    )
    assert [len(rollouts) for rollouts in both] == [0, 1]


def test_gradients_still_work_after_sampling():
    """Generating leaves nothing behind that autograd refuses (inference tensors) and no mode switched."""
    model = tiny_model()
    Sampler(model).generate([Request((1, 2), Generation(3))])
    attention = PackedAttention([3])
    model(torch.tensor([1, 2, 3]), attention.positions, attention).sum().backward()
    assert all(p.grad is not None for p in model.model.layers.parameters())


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request((1,) * 100, Generation(29)), "request 1 has 100 tokens.*29.*embeddings = 128.*from 1 to 28"),
        (Request((), Generation(1)), "request 1 is empty"),
        (Request((1, 61), Generation(1)), "request 1 .* ids outside 0 ... 60"),
        (Request((1,), Generation(0)), "max_tokens = 0"),
    ],
)
def test_impossible_requests_are_named(request_, words):
    """The message says which request, what is wrong with it and what to do."""
    with pytest.raises(UserError, match=words):
        Sampler(tiny_model()).generate([Request((1,), Generation(1)), request_])


def test_broken_weights_are_named():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        Sampler(model).generate([Request((1,), Generation(2))])


def test_the_longest_possible_request():
    """prompt + max_tokens may fill max_position_embeddings exactly."""
    rollout = Sampler(tiny_model()).generate([Request((1,) * 100, Generation(28))])[0][0]
    assert len(rollout.completion_ids) == 28


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: a list of kernels, each with the very tensors that it had when it was recorded."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("slots", [4, 16, 1000])
@pytest.mark.parametrize("rows", [3, 5, 64])
def test_recorded_steps_replay_on_fixed_memory_and_draw_the_same(monkeypatch, rows, slots):
    """Numbers that a step would take from the host, and memory that it would not get again, show as other tokens."""
    tapes, requests = [], mixed_requests()
    expected = Sampler(tiny_model(), max_rows=rows).generate(requests)

    def on_tape(step, device, pool):
        state = {name: x.clone() for name, x in vars(batch[0]).items() if isinstance(x, torch.Tensor)}
        cache = batch[0].attention.kv.clone()
        with Tape() as tape:
            step()
        for name, x in state.items():  # recording runs nothing
            vars(batch[0])[name].copy_(x)
        batch[0].attention.kv.copy_(cache)
        step()
        tapes.append(tape)
        return tape.replay

    def remember(self, *arguments):
        batch[:] = [self]
        real(self, *arguments)

    batch, real = [], sampler_module._Batch.__init__
    monkeypatch.setattr(sampler_module._Batch, "__init__", remember)
    monkeypatch.setattr(sampler_module.gpu, "is_recorded", lambda device: True)
    monkeypatch.setattr(sampler_module, "RECORDED_SLOTS", slots)
    monkeypatch.setattr(sampler_module.gpu, "record", on_tape)
    for steps in (1, 3):
        sampler = Sampler(tiny_model(), max_rows=rows, steps_per_sync=steps)
        for ours, theirs in zip(sum(sampler.generate(requests), []), sum(expected, []), strict=True):
            assert ours.completion_ids == theirs.completion_ids
            np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    assert sum(tape.replays for tape in tapes) > 20
    for count, longest, *_ in batch[0].graphs:
        assert count.bit_count() == 1 or count == batch[0].max_rows
        assert longest % slots == 0 or longest == len(batch[0].attention.columns)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("setting", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(monkeypatch, setting, dtype):
    """float32 agrees with the CPU's log-probs of the same ids, bfloat16 with its own training forward; eager, and compiled and
    recorded."""
    monkeypatch.setenv("NANO_ATLAS_COMPILE", setting)
    model = compile_layers(tiny_model().to("cuda", dtype))
    requests = mixed_requests()
    results = Sampler(model).generate(requests)
    model = model.float().cpu()
    for request, rollouts in zip(requests, results):
        for rollout in rollouts:
            temperature = request.generation.temperature or 1.0
            expected = training_logprobs(model, request.prompt_ids, rollout.completion_ids, temperature)
            np.testing.assert_allclose(
                rollout.logprobs, expected, atol=1e-3 if dtype == torch.float32 else 0.3
            )
