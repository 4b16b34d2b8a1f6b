"""The model against transformers: same logits for each family, for padded and for packed batches."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.pretrain import initialize
from nano_atlas.checkpoint import config_from_dict, load_model
from nano_atlas.errors import UserError
from nano_atlas.gpu import compile_layers
from nano_atlas.model import ModelConfig, PackedAttention, Transformer

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # so short that all three branches of the scaling occur
}
FAMILIES = {
    "llama": {"model_type": "llama"},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 1},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small only lose time between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference_model(family: str, is_tied: bool = False, seed: int = 0, **sizes):
    """A model of transformers whose every parameter is random, biases and norms included, and large enough to matter."""
    torch.manual_seed(seed)
    options = SIZES | FAMILIES[family] | {"tie_word_embeddings": is_tied, "dtype": torch.float32} | sizes
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**options), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model


def our_logits(model, documents: list[list[int]]) -> list[torch.Tensor]:
    """Logits `[length, V]` of each document, computed in one packed batch."""
    attention = PackedAttention([len(document) for document in documents])
    hidden = model(torch.tensor(sum(documents, [])), attention.positions, attention)
    return list((hidden @ model.head_weight.T).split(attention.lengths))


def documents(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, SIZES["vocab_size"], (length,), generator=generator).tolist() for length in lengths
    ]


@pytest.mark.parametrize("is_sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(tmp_path, family, is_tied, is_sharded):
    """Documents of unequal lengths, packed here, each alone there: within 1e-4 in float32."""
    reference = reference_model(family, is_tied)
    reference.save_pretrained(tmp_path, max_shard_size="100KB" if is_sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == is_sharded
    model = load_model(tmp_path)
    batch = documents(5, 90, 1, 31)
    for document, logits in zip(batch, our_logits(model, batch), strict=True):
        expected = reference(torch.tensor([document])).logits[0]
        assert expected.abs().max() > 1  # the comparison would be vacuous on near-zero logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_those_of_a_padded_batch(tmp_path, family, side):
    """The tokens of a batch that transformers computes with padding and a mask come out the same without any padding."""
    reference = reference_model(family)
    reference.save_pretrained(tmp_path)
    batch = documents(7, 40, 23)
    input_ids = torch.zeros(3, 40, dtype=torch.long)
    mask = torch.zeros(3, 40, dtype=torch.long)
    for row, document in enumerate(batch):
        place = slice(40 - len(document), 40) if side == "left" else slice(0, len(document))
        input_ids[row, place], mask[row, place] = torch.tensor(document), 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = reference(input_ids, attention_mask=mask, position_ids=positions).logits
    for row, logits in enumerate(our_logits(load_model(tmp_path), batch)):
        torch.testing.assert_close(logits, expected[row][mask[row].bool()], atol=1e-4, rtol=0)


@torch.no_grad()
def test_trailing_padding_changes_nothing(tmp_path):
    """Padding left over in a document, or as a document of its own at the end of a batch, does not reach the real tokens."""
    reference_model("qwen3").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    (first, second) = documents(12, 9)
    expected = our_logits(model, [first, second])
    padded = our_logits(model, [first + [0] * 5, second, [0] * 30])
    torch.testing.assert_close(padded[0][:12], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(padded[1], expected[1], atol=1e-5, rtol=0)


def test_gradients_equal_transformers_and_survive_recomputation(tmp_path):
    """Gradients of packed documents are those of transformers, and gradient checkpointing does not change them."""
    reference = reference_model("qwen3", is_tied=True)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    batch = documents(6, 17, 3)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(logits.logsumexp(-1).square().mean() for logits in our_logits(model, batch)).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.recompute_activations = True
    recomputed = gradients()
    for document in batch:
        reference(torch.tensor([document])).logits[0].logsumexp(-1).square().mean().backward()
    expected = dict(reference.named_parameters())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(gradient, expected[name].grad, atol=2e-4, rtol=1e-3)


def test_compiled_layers_are_the_plain_ones_and_compile_once_for_all(monkeypatch):
    """Same states and gradients; neither another layer nor another number of tokens compiles anything anew."""
    shape = ModelConfig("qwen3", 61, 32, 48, 4, 4, 2, 8, qk_norm=True)
    plain, compiled = (initialize(Transformer(shape), 0) for _ in range(2))
    assert not compile_layers(plain).is_compiled  # a small vocabulary, no GPU
    monkeypatch.setenv("NANO_ATLAS_COMPILE", "1")
    assert compile_layers(compiled).is_compiled
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in compiled.named_parameters()] == names
    compilations = []
    for lengths in ([5, 3], [14, 6], [30], [7, 7, 7]):
        attention, found = PackedAttention(lengths), []
        for model in (plain, compiled):
            model.zero_grad()
            model.recompute_activations = lengths == [30]
            hidden = model(torch.arange(sum(lengths)) % 61, attention.positions, attention)
            hidden.square().sum().backward()
            found.append([hidden, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
        compilations.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert compilations[1:] == compilations[1:2] * 3, compilations


QWEN3 = SIZES | FAMILIES["qwen3"]
REFUSED = [
    ("model_type", {"model_type": "gemma3"}),
    ("model_type", {"model_type": None}),
    ("model_type", {"model_type": "qwen3_moe", "num_experts": 8}),
    ("num_experts", {"num_experts": 8}),
    ("num_local_experts", {"model_type": "mistral", "num_local_experts": 8}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("mlp_bias", {"model_type": "llama", "mlp_bias": True}),
    ("attention_bias", {"model_type": "llama", "attention_bias": True}),
    ("attention_bias", {"attention_bias": True}),
    ("pretraining_tp", {"model_type": "llama", "pretraining_tp": 2}),
    ("quantization_config", {"quantization_config": {"quant_method": "fp8"}}),
    ("use_sliding_window", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}),
    ("sliding_window", {"model_type": "mistral", "sliding_window": 4096}),
    ("sliding_window", {"model_type": "mistral"}),  # an absent field means 4096 to transformers
    ("layer_types", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("linear", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ("longrope", {"rope_parameters": {"rope_type": "longrope"}}),
    ("mrope_section", {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}),
    ("full_attention", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    (
        "low_freq_factor",
        {"rope_parameters": {k: v for k, v in LLAMA3_ROPE.items() if k != "low_freq_factor"}},
    ),
    ("rope_theta", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}),
    ("hidden_size", {"hidden_size": None}),
    ("vocab_size", {"vocab_size": "many"}),
    ("num_key_value_heads", {"num_key_value_heads": 3}),
]


@pytest.mark.parametrize(
    ("field", "changes"), REFUSED, ids=[f"{n}-{field}" for n, (field, _) in enumerate(REFUSED)]
)
def test_what_the_model_does_not_compute_is_refused_by_name(field, changes):
    config_from_dict(QWEN3)
    with pytest.raises(UserError, match=rf"config.json: .*{field}"):
        config_from_dict(QWEN3 | changes)


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_of_both_styles_are_the_same(family):
    """transformers 4 wrote rope_theta and rope_scaling, transformers 5 writes rope_parameters."""
    new = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}} | FAMILIES[family]
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    rope = dict(new["rope_parameters"])
    old |= {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope if rope["rope_type"] == "llama3" else None,
    }
    assert config_from_dict(old) == config_from_dict(new)
    assert config_from_dict(old | {"rope_parameters": new["rope_parameters"]}) == config_from_dict(new)


def test_unused_features_are_accepted():
    """Qwen states a window that is switched off; Llama 3 states neutral values; without head_dim the width is divided."""
    off = {
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "attention_dropout": 0.0,
    }
    assert config_from_dict(QWEN3 | off | {"layer_types": ["full_attention"] * 3}) == config_from_dict(QWEN3)
    neutral = {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "hidden_act": "silu"}
    llama = SIZES | {"model_type": "llama"} | neutral
    config = config_from_dict(llama)
    assert (config.head_dim, config.rope_theta, config.rope_scaling, config.qk_norm) == (
        16,
        10_000.0,
        None,
        False,
    )
    del llama["num_key_value_heads"]
    assert config_from_dict(llama).num_key_value_heads == 4
