"""The fused loss, and GRPO's formula in it, against formulas in float64 over the full logits and against TRL's trainer."""

import math
import types
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from nano_atlas import loss as loss_module
from nano_atlas.loss import fused_token_loss, token_stats
from train_grpo import IMPORTANCE_CAP, GrpoConfig, grpo_token_loss, k3_kl, token_weights

N, D, V = 23, 8, 37


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 6 tokens, the last of 5, so that every test sums over chunks; no compiler unless a test asks for it."""
    monkeypatch.setattr(loss_module, "MAX_CHUNK_TOKENS", 7)
    monkeypatch.setenv("NANO_ATLAS_COMPILE", "0")


def inputs(dtype=torch.float32, seed=0, tokens=N, vocabulary=V, device="cpu"):
    """Hidden states and a head (leaves), targets, weights, advantages, and log-probs near the policy's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(tokens, D).to(dtype), normal(vocabulary, D).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    logprobs = (
        (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1).float()
    )
    data = dict(
        hidden=hidden, weight=weight, targets=targets, token_weights=normal(tokens).abs(), advantages=normal(tokens),
        old_logprobs=logprobs + 0.3 * normal(tokens), ref_logprobs=logprobs + 0.5 * normal(tokens),
        sampled_logprobs=logprobs + 0.7 * normal(tokens),
        ref_hidden=normal(tokens, 5).to(dtype), ref_weight=normal(vocabulary, 5).to(dtype),
    )  # fmt: skip
    data = {name: value.to(device) for name, value in data.items()}
    data["hidden"].requires_grad_()
    data["weight"].requires_grad_()
    return types.SimpleNamespace(**data, reference=(data["ref_hidden"], data["ref_weight"]))


def grpo_loss(x, temperature=1.0, kl="k3", is_first=False, **options):
    """train_grpo.py's formula in the fused loss. is_first: the step's first update, where the old log-probs are the present ones."""

    def token_loss(logprobs, exact_kl, rows):
        old = logprobs.detach() if is_first else x.old_logprobs[rows]
        divergence = k3_kl(logprobs, x.ref_logprobs[rows]) if kl == "k3" else exact_kl
        config = GrpoConfig(**options)
        return grpo_token_loss(
            logprobs, old, x.sampled_logprobs[rows], x.advantages[rows], divergence, config
        )

    reference = x.reference if kl == "exact" else None
    more = {"temperature": temperature, "reference": reference}
    return fused_token_loss(x.hidden, x.weight, x.targets, token_loss, x.token_weights, **more)


def sft_loss(hidden, weight, targets, token_weights):
    return fused_token_loss(hidden, weight, targets, lambda logprobs, kl, rows: -logprobs, token_weights)


def naive_logprobs(hidden, weight, temperature=1.0):
    """[N, V] float64, differentiable: what the fused loss must agree with without ever having it."""
    return (hidden.double() @ weight.double().T / temperature).log_softmax(-1)


def picked(logprobs, targets):
    return logprobs.gather(1, targets[:, None]).squeeze(1)


def naive_grpo(x, temperature, kl, is_first, clip, beta):
    """DeepSeekMath equation 3, token by token, in float64, with truncated importance weights."""
    logprobs = naive_logprobs(x.hidden, x.weight, temperature)
    chosen = picked(logprobs, x.targets)
    old = chosen.detach() if is_first else x.old_logprobs.double()
    ratio = torch.exp(chosen - old)
    policy = torch.minimum(ratio * x.advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * x.advantages)
    importance = torch.exp(old - x.sampled_logprobs).clamp(max=IMPORTANCE_CAP)
    if kl == "exact":
        ref = naive_logprobs(x.ref_hidden, x.ref_weight, temperature)
        divergence = (logprobs.exp() * (logprobs - ref)).sum(-1)
    else:
        divergence = torch.exp(x.ref_logprobs - chosen) - (x.ref_logprobs - chosen) - 1
    return (x.token_weights * (beta * divergence - importance * policy)).sum(), chosen, divergence


def gradients(loss, x):
    return torch.autograd.grad(loss, (x.hidden, x.weight))


def assert_close(ours, theirs, tolerance=2e-5):
    """Within `tolerance` of the largest number of the oracle: one scale per tensor, as gradients are used."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-3)


# ---- against float64 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_stats_are_the_textbook_formulas(temperature):
    x = inputs()
    stats = token_stats(x.hidden, x.weight, x.targets, temperature=temperature, reference=x.reference)
    logprobs = naive_logprobs(x.hidden, x.weight, temperature)
    ref_logprobs = naive_logprobs(x.ref_hidden, x.ref_weight, temperature)
    assert_close(stats.logprobs, picked(logprobs, x.targets))
    assert_close(stats.entropy, -(logprobs.exp() * logprobs).sum(-1))
    assert_close(stats.kl, (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in stats)
    assert token_stats(x.hidden, x.weight, x.targets).kl is None


def test_kl_to_itself_is_exactly_zero():
    x = inputs()
    assert not token_stats(x.hidden, x.weight, x.targets, reference=(x.hidden, x.weight)).kl.any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_sft_loss_value_and_gradients(dtype, tolerance):
    x = inputs(dtype)
    loss, stats = sft_loss(x.hidden, x.weight, x.targets, x.token_weights)
    chosen = picked(naive_logprobs(x.hidden, x.weight), x.targets)
    oracle = -(x.token_weights * chosen).sum()
    assert loss.dtype == torch.float32
    assert_close(loss, oracle, tolerance)
    assert_close(stats.logprobs, chosen, tolerance)
    for ours, theirs in zip(gradients(loss, x), gradients(oracle, x), strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("kl", ["k3", "exact"])
@pytest.mark.parametrize("clip", [(0.2, 0.28), (math.inf, math.inf)])
@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_grpo_loss_value_and_gradients(kl, clip, is_first, dtype, tolerance):
    x = inputs(dtype)
    if dtype == torch.bfloat16:  # a ratio on the edge of the clip may fall on either side of it in bfloat16
        stats = token_stats(x.hidden, x.weight, x.targets, temperature=0.7)
        x.old_logprobs = stats.logprobs + torch.tensor([0.0, 0.6, -0.6]).repeat(N)[:N]
    options = dict(clip=clip, beta=0.3, temperature=0.7, kl=kl, is_first=is_first)
    loss, stats = grpo_loss(x, **options)
    oracle, chosen, divergence = naive_grpo(x, **options)
    assert_close(loss, oracle, tolerance)
    assert_close(stats.logprobs, chosen, tolerance)
    if kl == "exact":
        assert_close(stats.kl, divergence, tolerance)
    for ours, theirs in zip(gradients(loss, x), gradients(oracle, x), strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, tolerance)


def test_only_ratios_that_are_beyond_the_clip_already_lose_their_policy_gradient():
    """Where the advantage pushes back towards 1, the gradient stays: the minimum is pessimistic, not symmetric."""
    x = inputs()
    x.token_weights = torch.ones(N)
    loss, stats = grpo_loss(x, beta=0.0, clip=(0.2, 0.3))
    (d_hidden,) = torch.autograd.grad(loss, x.hidden)
    ratio = (stats.logprobs - x.old_logprobs).exp()
    is_clipped = torch.where(x.advantages > 0, ratio > 1.3, ratio < 0.8)
    assert torch.equal(is_clipped, d_hidden.abs().sum(-1) == 0)
    assert 0 < is_clipped.sum() < ((ratio > 1.3) | (ratio < 0.8)).sum() < N


def test_any_formula_of_log_prob_and_exact_kl_can_be_trained_on():
    """A loss nobody ships: the core differentiates whatever formula it is given."""
    x = inputs()

    def token_loss(logprobs, kl, rows):
        return logprobs.exp() * x.advantages[rows] + kl.square()

    loss, _ = fused_token_loss(
        x.hidden, x.weight, x.targets, token_loss, x.token_weights, temperature=1.3, reference=x.reference
    )
    logprobs, ref = naive_logprobs(x.hidden, x.weight, 1.3), naive_logprobs(x.ref_hidden, x.ref_weight, 1.3)
    kl = (logprobs.exp() * (logprobs - ref)).sum(-1)
    oracle = (x.token_weights * (picked(logprobs, x.targets).exp() * x.advantages + kl.square())).sum()
    assert_close(loss, oracle)
    for ours, theirs in zip(gradients(loss, x), gradients(oracle, x), strict=True):
        assert_close(ours, theirs)


def test_tied_head_accumulates_both_of_its_gradients():
    """The head is also the embedding, and a gradient of an earlier micro-batch is already there."""
    x = inputs()
    ids = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))

    def total_gradient(loss_of):
        weight = x.weight.detach().clone().requires_grad_()
        for scale in (1.0, 0.5):  # two micro-batches; the second loss is scaled, as by a caller's own factor
            (scale * loss_of(F.embedding(ids, weight), weight)).backward()
        return weight.grad

    ours = total_gradient(lambda hidden, weight: sft_loss(hidden, weight, x.targets, x.token_weights)[0])
    theirs = total_gradient(
        lambda hidden, weight: -(x.token_weights * picked(naive_logprobs(hidden, weight), x.targets)).sum()
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen):
    x = inputs()
    getattr(x, frozen).requires_grad_(False)
    free = {"hidden": x.weight, "weight": x.hidden}[frozen]
    sft_loss(x.hidden, x.weight, x.targets, x.token_weights)[0].backward()
    oracle = -(x.token_weights * picked(naive_logprobs(x.hidden, x.weight), x.targets)).sum()
    assert getattr(x, frozen).grad is None
    assert_close(free.grad, torch.autograd.grad(oracle, free)[0])


def test_bfloat16_head_gradient_is_summed_over_chunks_in_float32(monkeypatch):
    """One large addend, then 64 that are each below half of its last bfloat16 digit: a bfloat16 sum would never grow."""
    monkeypatch.setattr(loss_module, "MAX_CHUNK_TOKENS", 1)
    hidden = torch.ones(65, D, dtype=torch.bfloat16)
    weight = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    token_weights = torch.tensor([256.0] + 64 * [0.5])
    sft_loss(hidden, weight, torch.zeros(65, dtype=torch.int64), token_weights)[0].backward()
    expected = torch.full((V, D), (256 + 64 * 0.5) / V)  # softmax is 1/V everywhere
    assert_close(weight.grad[1:], expected[1:], 1e-2)  # a bfloat16 sum is off by 11 %


def test_gradient_is_given_once_and_a_second_backward_says_so():
    x = inputs()
    loss, _ = sft_loss(x.hidden, x.weight, x.targets, x.token_weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_without_grad_and_without_tokens():
    x = inputs()
    with torch.no_grad():
        loss, _ = sft_loss(x.hidden, x.weight, x.targets, x.token_weights)
    assert not loss.requires_grad
    assert_close(loss, -(x.token_weights * picked(naive_logprobs(x.hidden, x.weight), x.targets)).sum())
    empty, stats = sft_loss(x.hidden[:0], x.weight, x.targets[:0], x.token_weights[:0])
    empty.backward()
    assert empty == 0 and stats.logprobs.shape == (0,) and x.weight.grad.abs().max() == 0


def only(x, rows):
    """The same data of some tokens."""
    short = types.SimpleNamespace(**vars(x))
    for name in (
        "targets",
        "token_weights",
        "advantages",
        "old_logprobs",
        "ref_logprobs",
        "sampled_logprobs",
    ):
        setattr(short, name, getattr(x, name)[rows])
    short.hidden = x.hidden[rows]
    return short


def test_a_token_of_weight_zero_counts_for_exactly_nothing():
    """As the documents of a rank that has fewer than the others, which computes one more for nothing."""
    x = inputs()
    x.token_weights[5:9] = 0
    loss, _ = grpo_loss(x)
    short, _ = grpo_loss(only(x, [*range(5), *range(9, N)]))
    d_hidden, d_weight = gradients(loss, x)
    short_d_hidden, short_d_weight = gradients(short, x)
    assert d_hidden[5:9].abs().max() == 0
    assert_close(loss, short)
    assert_close(d_hidden, short_d_hidden)
    assert_close(d_weight, short_d_weight)


# ---- against TRL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_type, mode", [("grpo", "sequence"), ("bnpo", "token"), ("dapo", "token"), ("dr_grpo", "constant")]
)
def test_grpo_loss_is_that_of_trl(loss_type, mode, monkeypatch):
    trl_imports = pytest.importorskip("trl.import_utils")
    monkeypatch.setattr(
        trl_imports, "is_vllm_available", lambda *_, **__: False
    )  # importing it takes seconds
    trl_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    lengths, longest, temperature = [4, 9, 1, 6], 9, 0.7
    x = inputs(tokens=len(lengths) * longest)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]  # [B, T]
    advantages = torch.tensor([1.2, -0.7, 0.4, -0.9])
    importance = (x.old_logprobs - x.sampled_logprobs).exp().clamp(max=IMPORTANCE_CAP)

    class Accelerator:
        num_processes = 1

        def gather(self, value):
            return value

        gather_for_metrics = gather

        def reduce(self, value, reduction):
            return value

    def logprobs_and_entropies(model, input_ids, attention_mask, logits_to_keep, **_):
        logits = (x.hidden @ x.weight.T / temperature).view(len(lengths), longest, V)
        return (
            selective_log_softmax(logits, input_ids[:, -logits_to_keep:]),
            entropy_from_logits(logits),
            None,
        )

    # the trainer's attributes that its loss reads, with nothing that needs a model, a dataset or a network
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=logprobs_and_entropies, loss_type=loss_type, beta=0.04, epsilon_low=0.2,
        epsilon_high=0.28, importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=True, vllm_importance_sampling_correction=True, max_completion_length=16, _entropy_bonus_enabled=False,
        aux_loss_enabled=False, current_gradient_accumulation_steps=1, accelerator=Accelerator(),
        args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        model=types.SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    theirs = trl_trainer.GRPOTrainer._compute_loss(
        trainer,
        None,
        dict(
            prompt_ids=torch.zeros(len(lengths), 2, dtype=torch.int64), prompt_mask=torch.ones(len(lengths), 2),
            completion_ids=x.targets.view(-1, longest), completion_mask=mask.long(), advantages=advantages,
            old_per_token_logps=x.old_logprobs.view(-1, longest), ref_per_token_logps=x.ref_logprobs.view(-1, longest),
            importance_sampling_ratio=importance.view(-1, longest), num_items_in_batch=mask.sum(),
        ),
    )  # fmt: skip
    weights = torch.tensor(token_weights(lengths, mode, 16))
    x.token_weights, x.advantages = (values.repeat_interleave(longest) for values in (weights, advantages))
    ours, stats = grpo_loss(only(x, mask.flatten()), clip=(0.2, 0.28), temperature=temperature)
    assert_close(ours, theirs)
    for our_gradient, their_gradient in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert_close(our_gradient, their_gradient)
    metrics, real = trainer._metrics["train"], mask.flatten()
    assert_close(k3_kl(stats.logprobs, x.ref_logprobs[real]).mean(), torch.tensor(metrics["kl"][0]))
    assert_close(stats.entropy.mean(), torch.tensor(metrics["entropy"][0]))


# ---- normalisation over the optimizer step ------------------------------------------------------------------------------


def test_token_weights_by_hand():
    assert token_weights([2, 6], "sequence", 10) == [1 / 4, 1 / 12]
    assert token_weights([2, 6], "token", 10) == [1 / 8, 1 / 8]
    assert token_weights([2, 6], "constant", 10) == [1 / 20, 1 / 20]


@pytest.mark.parametrize("mode", ["sequence", "token", "constant"])
def test_unequal_micro_batches_give_the_gradient_of_the_whole_step(mode):
    lengths = [5, 1, 8, 2, 4, 3]
    x = inputs(tokens=sum(lengths))
    per_sequence = torch.tensor(token_weights(lengths, mode, 12))
    x.token_weights = per_sequence.repeat_interleave(torch.tensor(lengths))

    def gradient(*splits):
        x.weight.grad = None
        for rows in splits:
            grpo_loss(only(x, rows))[0].backward()
        return x.weight.grad

    whole = gradient(slice(0, 23))
    assert_close(gradient(slice(0, 6), slice(6, 14), slice(14, 23)), whole)
    assert_close(gradient(slice(0, 20), slice(20, 23)), whole)


# ---- the published listing ----------------------------------------------------------------------------------------------


def test_published_listing_gives_nan_where_this_loss_is_finite():
    """The overview page's `grpo_loss` passes two log-softmaxes to F.kl_div without log_target, which then takes the log of the
    second one: log-probabilities are negative, so every term is NaN. Nor does it ever look up the token that was sampled.
    """
    x = inputs()
    policy_logprobs = (x.hidden @ x.weight.T).log_softmax(-1)
    reference_logprobs = (x.ref_hidden @ x.ref_weight.T).log_softmax(-1)

    page_policy_term = -(
        x.advantages[:, None] * policy_logprobs
    ).mean()  # the page multiplies by rewards, over all words
    page_kl_term = F.kl_div(policy_logprobs, reference_logprobs, reduction="batchmean")
    assert (page_policy_term + 0.04 * page_kl_term).isnan()

    assert reference_logprobs.max() < 0 and reference_logprobs.log().isnan().all()  # the cause
    as_torch_wants_it = F.kl_div(policy_logprobs, reference_logprobs, reduction="batchmean", log_target=True)
    assert as_torch_wants_it.isfinite()  # finite, but KL(reference || policy); GRPO's is the other way round
    kl = token_stats(x.hidden, x.weight, x.targets, reference=x.reference).kl
    assert_close(
        kl.mean(), F.kl_div(reference_logprobs, policy_logprobs, reduction="batchmean", log_target=True)
    )

    loss, _ = grpo_loss(x)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients(loss, x))


# ---- compiled kernels, errors, GPU --------------------------------------------------------------------------------------


def test_compiled_kernels_agree_and_do_not_recompile_for_every_length(monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("NANO_ATLAS_COMPILE", "1")
    torch._dynamo.reset()
    counters.clear()
    for tokens, vocabulary, temperature in [(23, V, 0.7), (12, V, 1.0), (19, V + 4, 0.9), (33, V + 9, 1.0)]:
        x = inputs(tokens=tokens, vocabulary=vocabulary)
        options = dict(clip=(0.2, 0.2), beta=0.04, temperature=temperature, kl="k3", is_first=False)
        loss, oracle = grpo_loss(x, **options)[0], naive_grpo(x, **options)[0]
        assert_close(loss, oracle)
        for ours, theirs in zip(gradients(loss, x), gradients(oracle, x), strict=True):
            assert_close(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 2  # one per kernel


def test_a_compiler_error_is_an_error(monkeypatch):
    """Never another answer: neither a silent fallback nor a half-written gradient."""
    monkeypatch.setenv("NANO_ATLAS_COMPILE", "1")

    def broken(*arguments):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(loss_module, "_compiled", lambda kernel: broken)
    x = inputs()
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        sft_loss(x.hidden, x.weight, x.targets, x.token_weights)
    monkeypatch.setenv("NANO_ATLAS_COMPILE", "yes")
    with pytest.raises(ValueError, match="NANO_ATLAS_COMPILE"):
        sft_loss(x.hidden, x.weight, x.targets, x.token_weights)


def test_inputs_that_do_not_fit_together_are_refused():
    x = inputs()

    def token_loss(logprobs, kl, rows):
        return -logprobs

    good = dict(
        hidden=x.hidden,
        weight=x.weight,
        targets=x.targets,
        token_loss=token_loss,
        token_weights=x.token_weights,
    )
    fused_token_loss(**good)
    for name, value, message in [
        ("hidden", x.hidden[None], "expected hidden"),
        ("weight", x.weight.T, "expected hidden"),
        ("hidden", x.hidden.bfloat16(), "both be float32 or bfloat16"),
        ("token_weights", x.token_weights[:, None], "expected hidden"),
        ("token_loss", lambda logprobs, kl, rows: -logprobs.sum(), "token_loss must return"),
    ]:
        with pytest.raises(ValueError, match=message):
            fused_token_loss(**{**good, name: value})
    for compiled in "01":  # a compiled kernel would kill the process
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NANO_ATLAS_COMPILE", compiled)
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                fused_token_loss(**{**good, "targets": x.targets.clone().fill_(V)})


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_on_a_gpu(monkeypatch, dtype, tolerance):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setenv("NANO_ATLAS_COMPILE", "1")
    x = inputs(dtype, device="cuda")
    options = dict(clip=(math.inf, math.inf), beta=0.3, temperature=0.7, kl="exact", is_first=True)
    loss, stats = grpo_loss(x, **options)
    oracle, chosen, divergence = naive_grpo(x, **options)
    assert_close(loss, oracle, tolerance)
    assert_close(stats.logprobs, chosen, 1e-4)  # a GPU returns float32 logits for bfloat16 too
    assert_close(stats.kl, divergence, 1e-4)
    for ours, theirs in zip(gradients(loss, x), gradients(oracle, x), strict=True):
        assert_close(ours, theirs, tolerance)
