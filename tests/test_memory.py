"""The formulas of memory.py against the bytes of real tensors, and the presets' claims against the formulas."""

import pytest
import torch

import train_grpo
from benchmarks import memory
from benchmarks.pretrain import initialize
from nano_atlas import lora
from nano_atlas.config import parse
from nano_atlas.errors import UserError
from nano_atlas.layout import Layout
from nano_atlas.model import ModelConfig, PackedAttention, Transformer
from nano_atlas.optim import MasterAdamW
from nano_atlas.presets import presets
from nano_atlas.sampler import CachedAttention

SHAPES = [
    ModelConfig("qwen3", 97, 256, 512, 4, 8, 2, 32, qk_norm=True),
    ModelConfig("qwen2", 101, 96, 160, 3, 6, 3, 16, attention_bias=True, tie_word_embeddings=True),
]
DTYPES = [torch.float32, torch.bfloat16]
RANKS = [0, 16]  # of the adapters; 0: all weights are trained


def run(model: Transformer, lengths: list[int]) -> torch.Tensor:
    attention = PackedAttention(lengths)
    return model(torch.zeros(sum(lengths), dtype=torch.int64), attention.positions, attention)


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.model_type)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", RANKS)
def test_weights_gradients_and_optimizer_state_to_the_byte(shape, dtype, rank):
    model = initialize(Transformer(shape), 0).to(dtype)
    assert memory.parameters(shape) == sum(p.numel() for p in model.parameters())
    lora.adapt(model, rank, 0)
    optimizer = MasterAdamW(model)
    hidden = run(model, [5])
    (hidden @ model.head_weight.T).float().sum().backward()
    items = memory.training(shape, 5, dtype.itemsize, rank=rank)
    gradients = optimizer.gradient_sums or {name: p.grad for name, p in optimizer.parameters.items()}
    assert items["policy"] == bytes_of(model.parameters())
    assert items["gradients"] == bytes_of(gradients.values())
    optimizer.step(1e-3)
    state = dict(optimizer.state_tensors())  # masters and moments
    kept = sum(t.nbytes for name, t in state.items() if not name.endswith(".step"))
    own = sum(m.nbytes for name, m in optimizer.masters.items() if m is optimizer.parameters[name])
    assert items["masters, moments"] == kept - own  # a float32 weight is its own master


def test_known_models_have_the_published_numbers_of_parameters():
    published = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
        "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-4B": 4_022_468_096,
        "Qwen/Qwen3-8B": 8_190_735_360,
    }
    assert {name: memory.parameters(memory.known_config(name)) for name in published} == published
    with pytest.raises(UserError, match="no model at Qwen/Qwen4"):
        memory.known_config("Qwen/Qwen4")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cache_to_the_byte(dtype):
    cache = CachedAttention(SHAPES[0], 3, 17, dtype, torch.device("cpu"))
    assert memory.kv_cache(SHAPES[0], 3, 17, dtype.itemsize) == cache.kv.nbytes


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.model_type)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_activations_to_five_percent_of_what_autograd_keeps(shape, dtype, is_checkpointed, rank):
    model = initialize(Transformer(shape), 0).to(dtype)
    lora.adapt(model, rank, 0)
    model.recompute_activations = is_checkpointed
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by storage: views of one tensor count once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    lengths = [64] * 4
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = run(model, lengths)
        keep(hidden)  # the loss does
    counted = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    expected = memory.activations(shape, sum(lengths), is_checkpointed, dtype.itemsize, rank)
    if is_checkpointed:  # the layer that is recomputed exists in the backward pass only
        expected -= sum(lengths) * memory.layer_activations(shape, dtype.itemsize, rank)
    assert counted == pytest.approx(expected, rel=0.05)


def test_8b_teacher_and_4b_student_fit_on_two_eight_and_sixteen_cards():
    text = memory.table(memory.Config())
    models = [memory.known_config(name) for name in ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B")]
    for gpus in (2, 8, 16):
        for items in memory.grpo(*models, gpus, 16, 8192, 8192).values():
            assert memory.peak(items) < memory.CARD - 2e9
            assert f"**{memory.gigabytes(memory.peak(items))}**" in text
    assert "| policy | 16 |  | 4.1 | 2.0 |" in text
    with pytest.raises(UserError, match="must be above 0"):
        memory.main(["--gpus", "0"])


@pytest.mark.parametrize(("name", "gpus", "card"), [
    ("qwen3-0.6b-24gb", 1, 24e9), ("qwen3-1.7b-80gb", 1, memory.CARD), ("qwen3-8b-80gb", 1, memory.CARD),
    ("qwen3-8b-2gpu", 2, memory.CARD),
])  # fmt: skip
def test_the_presets_fit_on_the_cards_that_their_names_state(name, gpus, card):
    sft, grpo = (presets(script)[name].overrides for script in ("train_sft", "train_grpo"))
    teacher, student = memory.known_config(str(sft["model"])), memory.known_config(grpo["student"])
    lengths = (
        512 + grpo["teaching_tokens"] + grpo["answer_tokens"]
    )  # a guided prompt holds question and teaching
    rank, tokens = grpo.get("lora_rank", 0), grpo["tokens_per_batch"]
    found = memory.grpo(teacher, student, gpus, grpo["cache_rows"], lengths, tokens, rank)
    tuning = memory.training(teacher, sft["tokens_per_batch"], is_offloaded=gpus == 2, rank=rank)
    for items in (*found.values(), tuning):
        assert memory.peak(items) < card - 1e9  # for CUDA's context
    for settings in (sft, grpo):
        assert settings["gradient_checkpointing"] and settings["dtype"] == "bfloat16"
        assert (settings.get("optimizer_device") == "cpu") == (gpus == 2)
        assert settings.get("lora_rank", 0) == rank


def test_adapters_need_no_reference_no_head_gradient_and_state_of_their_own_only():
    """8B with its 4B student on one GPU: 181 GB if all weights are trained, 67 GB with adapters (docs/real-models.md)."""
    models = [memory.known_config(name) for name in ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B")]
    (whole,), (adapted,) = (memory.grpo(*models, 1, 32, 8704, 8192, rank).values() for rank in (0, 32))
    assert [memory.gigabytes(memory.peak(items)) for items in (whole, adapted)] == ["181", "67"]
    trained, head = memory.trained_parameters(models[0], 32), 4 * 151936 * 4096
    assert trained == 87_293_952 and "reference" in whole and "reference" not in adapted
    assert adapted["gradients"] == 4 * trained and adapted["masters, moments"] == 12 * trained
    assert adapted["policy"] - whole["policy"] == 2 * trained
    assert whole["fused loss"] - adapted["fused loss"] >= head
    sharded = memory.training(models[0], 8192, ranks=8, rank=32)
    assert sharded["policy"] == (2 * memory.parameters(models[0]) + 4 * trained) // 8


def test_a_reference_of_another_size_is_counted_with_its_states():
    """Qwen3-8B scores Qwen3-0.6B's teachings: its weights in bfloat16, and 4,096 numbers for each of the step's tokens."""
    argv = "--preset qwen3-0.6b-24gb --problems p.jsonl --reward none --kl exact --reference Qwen/Qwen3-8B".split()
    config = parse(train_grpo.Config, argv, presets("train_grpo"), "")
    small, large = (memory.known_config(name) for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B"))
    layout = Layout("cuda:0", "cuda:0", False, "cuda:0")
    items = memory.of_layout(config, layout, small, small, {"cuda:0": 80e9, "cpu": 1e12})["cuda:0"]
    tokens = config.problems_per_step * config.group_size * config.teaching_tokens
    assert items["reference"] == 2 * memory.parameters(large) + 2 * tokens * large.hidden_size
