"""AdamW on master weights, the learning-rate schedules, and training states that resume exactly."""

import json
import math

import pytest
import torch
from torch import nn

from nano_atlas.errors import UserError
from nano_atlas.optim import MasterAdamW, learning_rate, load_training_state, save_training_state


def small_model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    dtype = next(model.parameters()).dtype
    (model(x.to(dtype)).float().square().mean() * scale).backward()


def test_updates_are_those_of_the_adamw_paper_in_float64():
    model = small_model()
    betas, eps, decay, clip = (0.9, 0.95), 1e-8, 0.1, 0.05
    optimizer = MasterAdamW(model, betas=betas, weight_decay=decay, clip_norm=clip)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step, rate in enumerate((0.1, 0.03, 0.01), start=1):
        backward(model, step)
        gradients = {name: p.grad.double() for name, p in model.named_parameters()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert optimizer.step(rate) == pytest.approx(norm, rel=1e-5)
        for name, w in weights.items():
            g = gradients[name] * min(1, clip / norm)
            first[name] = betas[0] * first[name] + (1 - betas[0]) * g
            second[name] = betas[1] * second[name] + (1 - betas[1]) * g**2
            m, v = first[name] / (1 - betas[0] ** step), second[name] / (1 - betas[1] ** step)
            w *= 1 - rate * (decay if w.ndim > 1 else 0)  # vectors do not decay
            w -= rate * m / (v.sqrt() + eps)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), weights[name], rtol=1e-5, atol=1e-7)
            assert p.grad is None


def test_updates_too_small_for_bfloat16_add_up_in_the_masters():
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = MasterAdamW(model, weight_decay=0.0)
    for _ in range(100):
        model.weight.sum().backward()
        optimizer.step(1e-4)  # 1 - 1e-4 is 1 in bfloat16
    torch.testing.assert_close(optimizer.masters["weight"].detach(), torch.full((4, 4), 0.99))
    assert (
        model.weight.dtype == torch.bfloat16
        and model.weight[0, 0].item() == torch.tensor(0.99).bfloat16().item()
    )


def test_gradients_of_a_bfloat16_model_are_summed_in_float32():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = MasterAdamW(model, clip_norm=1e9)
    for _ in range(300):  # in bfloat16 the sum would stop at 256, where 1 is half a unit of the last place
        model.weight.sum().backward()
    assert model.weight.grad is None
    assert optimizer.step(0.0) == 300


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted():
    model = small_model()
    optimizer = MasterAdamW(model)
    backward(model, 1)
    optimizer.step(0.1)
    before = {key: tensor.clone() for key, tensor in optimizer.state_tensors()}
    backward(model, 2, scale=math.inf)
    assert not math.isfinite(optimizer.step(0.1))
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(before[key], tensor) for key, tensor in optimizer.state_tensors())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupted_run_ends_with_the_same_bits_as_an_uninterrupted_one(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("nano_atlas.optim.SHARD_BYTES", 100)  # several files
    straight = small_model(dtype)
    optimizer = MasterAdamW(straight)
    for seed in range(6):
        backward(straight, seed)
        optimizer.step(0.01)

    first = small_model(dtype)
    optimizer = MasterAdamW(first)
    for seed in range(3):
        backward(first, seed)
        optimizer.step(0.01)
    save_training_state(tmp_path, optimizer, 3, epoch=0)
    state = tmp_path / "step-00000003"
    assert len(list(state.glob("*.safetensors"))) > 1

    torch.manual_seed(9)
    second = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)  # with other weights
    optimizer = MasterAdamW(second)
    assert load_training_state(state, optimizer) == {"step": 3, "skipped_steps": 0, "epoch": 0}
    for seed in range(3, 6):
        backward(second, seed)
        optimizer.step(0.01)
    for a, b in zip(straight.parameters(), second.parameters()):
        assert torch.equal(a, b)


def test_the_two_newest_states_are_kept_and_an_incomplete_one_is_never_seen(tmp_path, monkeypatch):
    model = small_model()
    optimizer = MasterAdamW(model)
    for step in (8, 9, 10):
        save_training_state(tmp_path / "state", optimizer, step)

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nano_atlas.optim.write_json", killed)
        save_training_state(tmp_path / "state", optimizer, 11)
    kept = sorted(path.name for path in (tmp_path / "state").glob("step-*"))
    assert kept == ["step-00000009", "step-00000010"]


def test_three_steps_in_a_row_without_finite_gradients_end_the_run():
    model = small_model()
    optimizer, before = MasterAdamW(model), copy_of(model)
    for seed, scale in enumerate((math.nan, math.nan, 1.0, math.nan, math.inf)):
        backward(model, seed, scale)
        optimizer.step(0.01)
    assert optimizer.skipped_steps == 4 and copy_of(model) != before
    backward(model, 9, math.nan)
    with pytest.raises(UserError, match=r"3 steps in a row .* --lr"):
        optimizer.step(0.01)


def copy_of(model: nn.Module) -> list:
    return [parameter.tolist() for parameter in model.parameters()]


def test_a_state_of_another_model_is_refused_by_the_name_of_the_tensor(tmp_path):
    save_training_state(tmp_path, MasterAdamW(small_model()), 1)
    state = tmp_path / "step-00000001"
    wider = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    deeper = nn.Sequential(*small_model(), nn.Linear(3, 3))
    with pytest.raises(UserError, match=r"0.weight.\w+ \[5, 6\] does not fit this model; .* --restart"):
        load_training_state(state, MasterAdamW(wider))
    with pytest.raises(UserError, match=r"missing 3.bias.master, 3.weight.master; .* --restart"):
        load_training_state(state, MasterAdamW(deeper))
    with pytest.raises(UserError, match=r"2.* does not fit this model; .* --restart"):
        load_training_state(state, MasterAdamW(small_model()[:1]))
    (state / "state-00000.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="damaged"):
        load_training_state(state, MasterAdamW(small_model()))


def test_a_state_is_safetensors_and_json(tmp_path):
    save_training_state(tmp_path, MasterAdamW(small_model()), 1, seed=4)
    state = tmp_path / "step-00000001"
    assert {path.suffix for path in state.iterdir()} == {".safetensors", ".json"}
    assert json.loads((state / "state.json").read_text())["seed"] == 4


def test_learning_rates():
    cosine = [learning_rate(step, 100, 2.0, 0.1, "cosine") for step in range(100)]
    assert cosine[0] == pytest.approx(2 / 11) and cosine[9] == pytest.approx(20 / 11)  # above 0 at once
    assert cosine[10] == 2.0 and cosine[55] == pytest.approx(1.0) and 0 < cosine[99] < 0.01
    assert [learning_rate(step, 100, 2.0, 0.0, "constant") for step in (0, 99)] == [2.0, 2.0]
