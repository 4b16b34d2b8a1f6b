"""Checkpoint directories: round trips through transformers, names of the real layouts, faults, memory, atomic replacement."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import FAMILIES, QWEN3, one_thread, reference_model  # noqa: F401 (a fixture)
from test_tokenizer import chat_like
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.pretrain import initialize
from nano_atlas.checkpoint import config_from_dict, load_model, read_config, save_model
from nano_atlas.errors import UserError
from nano_atlas.model import Transformer
from nano_atlas.runs import atomic_directory
from nano_atlas.tokenizer import CHATML, Tokenizer

ROOT = Path(__file__).parent.parent


def tiny_model(seed: int = 0, **changes) -> Transformer:
    return initialize(Transformer(config_from_dict(QWEN3 | changes)), seed)


@pytest.mark.parametrize(("dtype", "max_shard_bytes"), [(torch.float32, 60_000), (torch.bfloat16, 5e9)],
                         ids=["float32-sharded", "bfloat16-one-file"])  # fmt: skip
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_round_trip_through_transformers_is_bit_identical(tmp_path, family, is_tied, dtype, max_shard_bytes):
    """transformers -> load_model -> save_model -> transformers: same weights, same configuration, same logits, to the bit."""
    reference_model(family, is_tied).to(dtype).save_pretrained(tmp_path / "theirs")
    save_model(
        tmp_path / "ours", load_model(tmp_path / "theirs", dtype), None, max_shard_bytes=max_shard_bytes
    )
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (max_shard_bytes < 5e9)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")
    after, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", output_loading_info=True
    )
    assert not any(report.values()) and before.dtype == after.dtype == dtype
    expected = before.state_dict()
    assert after.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.state_dict().items())
    input_ids = torch.arange(50)[None]
    assert torch.equal(after(input_ids).logits, before(input_ids).logits)
    assert read_config(tmp_path / "ours") == read_config(tmp_path / "theirs")
    theirs, ours = (AutoConfig.from_pretrained(tmp_path / name) for name in ("theirs", "ours"))
    for field in (
        "rope_parameters",
        "rms_norm_eps",
        "architectures",
        "model_type",
        "tie_word_embeddings",
        "dtype",
    ):
        assert getattr(ours, field) == getattr(theirs, field)


# Shapes from the published config.json files.
REAL_LAYOUTS = {
    "Qwen3-8B": {  # also the layout of Arc-Intelligence/ATLAS-8B-Thinking
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rope_theta": 1000000, "rope_scaling": None, "tie_word_embeddings": False, "attention_bias": False,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36, "hidden_act": "silu",
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "rope_theta": 1000000, "rope_scaling": None, "tie_word_embeddings": True, "attention_bias": False,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28,
    },
    "Llama-3.1-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "tie_word_embeddings": False,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
    "Mistral-7B-v0.3": {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", REAL_LAYOUTS)
def test_real_layouts_map_by_name_alone(layout):
    """At full size, without memory: parameter names and shapes are those of transformers' model."""
    with torch.device("meta"):
        ours = Transformer(config_from_dict(REAL_LAYOUTS[layout]))
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**REAL_LAYOUTS[layout]))
    expected = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    assert {name: parameter.shape for name, parameter in ours.named_parameters()} == expected


def test_saved_directory_has_all_that_transformers_reads(tmp_path):
    """Configuration, ends of generation, padding, tokenizer and template survive, for them and for us."""
    tokenizer = chat_like(CHATML, eos_ids=[400, 402])
    save_model(tmp_path / "m", tiny_model(vocab_size=512).to(torch.bfloat16), tokenizer)
    generation, config = (
        GenerationConfig.from_pretrained(tmp_path / "m"),
        AutoConfig.from_pretrained(tmp_path / "m"),
    )
    assert generation.eos_token_id == config.eos_token_id == [400, 402]
    assert generation.pad_token_id == config.pad_token_id == tokenizer.pad_id == 400
    messages = [{"role": "user", "content": "hello"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    ours = Tokenizer.from_directory(tmp_path / "m")
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.chat_ids(messages) == tokenizer.chat_ids(messages) == expected
    assert (ours.eos_ids, ours.pad_id) == ((400, 402), 400)
    assert {tensor.dtype for tensor in load_file(tmp_path / "m" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_all_faulty_tensors_are_named_at_once(tmp_path):
    save_model(tmp_path / "m", tiny_model(), None, has_digests=False)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(
        16
    )  # stored by old versions, means nothing
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "m")
    message = str(caught.value)
    assert "3 problems" in message and "inv_freq" not in message
    assert "model.norm.weight: missing, should be [64]" in message
    assert "model.layers.1.mlp.up_proj.weight: [3, 64], should be [96, 64]" in message
    assert "model.layers.0.self_attn.q_proj.bias: [64], should be absent" in message


def test_tied_checkpoints_may_repeat_the_embedding_as_head(tmp_path):
    save_model(tmp_path / "m", tiny_model(tie_word_embeddings=True), None, has_digests=False)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert torch.equal(load_model(tmp_path / "m").head_weight, tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(UserError, match="lm_head.weight differs"):
        load_model(tmp_path / "m")
    for max_shard_bytes in (0, 5e9):  # a file each, and both in one
        save_model(
            tmp_path / "m",
            tiny_model(tie_word_embeddings=True),
            None,
            max_shard_bytes=max_shard_bytes,
            repeat_tied_head=True,
        )
        assert torch.equal(load_model(tmp_path / "m").head_weight, tensors["model.embed_tokens.weight"])
        names = [name for part in (tmp_path / "m").glob("*.safetensors") for name in load_file(part)]
        assert "lm_head.weight" in names and len(names) == len(tensors) + 1


def test_broken_directories_are_explained(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        load_model(tmp_path)
    save_model(tmp_path / "m", tiny_model(), None, max_shard_bytes=60_000)
    (tmp_path / "m" / "digests.json").unlink()
    shard = next((tmp_path / "m").glob("model-00002.*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"{shard.name} is not a complete safetensors file"):
        load_model(tmp_path / "m")
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is not a complete safetensors file .No such file"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="no model.safetensors and no index"):
        load_model(tmp_path / "m")


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    """The weights can be trained in place, and overwriting the file under a living model does not change it."""
    save_model(tmp_path / "m", tiny_model(), None)
    model = load_model(tmp_path / "m")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = tmp_path / "m" / "model.safetensors"
    with open(file, "r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    with torch.no_grad():
        model.head_weight.add_(1)


MEASURE_PEAK = """
import sys, torch
from nano_atlas.checkpoint import load_model

def kib(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])

tiny, large = sys.argv[1:]
load_model(tiny, torch.bfloat16)  # what the libraries need at their first use is not the checkpoint's
before = kib("VmRSS")
model = load_model(large, torch.bfloat16)
print((kib("VmHWM") - before) * 1024, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="resident memory is read from Linux's /proc"
)
def test_peak_memory_of_loading(tmp_path):
    """Resident memory, pages of the mapped file included, never grows by more than 1.2 times the checkpoint."""
    save_model(tmp_path / "tiny", tiny_model().to(torch.bfloat16), None)
    sizes = {
        "vocab_size": 8_000,
        "hidden_size": 768,
        "intermediate_size": 3_072,
        "num_hidden_layers": 8,
        "head_dim": 64,
    }
    with torch.device("meta"):
        model = Transformer(config_from_dict(QWEN3 | sizes)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    save_model(tmp_path / "large", model, None)
    command = [sys.executable, "-c", MEASURE_PEAK, str(tmp_path / "tiny"), str(tmp_path / "large")]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shutil.rmtree(tmp_path / "large")
    growth, size = map(int, output.split())
    assert size > 100e6
    assert 0.9 * size < growth < 1.2 * size


def write_value(path: Path, value: int) -> None:
    with atomic_directory(path) as folder:
        (folder / "value.json").write_text(str(value))


def value_at(path: Path) -> int:
    return int((path / "value.json").read_text())


def in_child(action) -> int:
    """A forked process that does something; its id."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    return child


def test_a_killed_save_leaves_the_old_directory_and_no_lasting_litter(tmp_path):
    path = tmp_path / "run" / "last"
    write_value(path, 1)

    def save_and_die():
        with atomic_directory(path) as folder:
            (folder / "value.json").write_text("2")
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(os.waitpid(in_child(save_and_die), 0)[1]) == signal.SIGKILL
    assert value_at(path) == 1
    assert len(list(path.parent.iterdir())) == 2  # the dead attempt lies beside it
    write_value(path, 3)
    assert value_at(path) == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["last"]


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """A process that replaces one checkpoint by another without pause is killed at several moments: one of the two is there."""
    models = [tiny_model(seed) for seed in (1, 2)]
    target = tmp_path / "target"
    save_model(target, models[0], None)

    def save_forever():
        for model in itertools.cycle(models):
            save_model(target, model, None)

    for moment in (0.004, 0.011, 0.023, 0.037, 0.05):  # seconds
        child = in_child(save_forever)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        whole = target if target.exists() else target.with_name(".target.old")  # between its two renames
        weight = load_model(whole).head_weight
        assert any(torch.equal(weight, model.head_weight) for model in models)
    save_model(target, models[1], None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_a_kill_between_the_two_renames_is_made_good_by_the_next_save(tmp_path):
    path = tmp_path / "last"
    write_value(path, 1)
    path.rename(tmp_path / ".last.old")  # what such a kill leaves
    with pytest.raises(KeyboardInterrupt), atomic_directory(path):
        raise KeyboardInterrupt
    assert value_at(path) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


def test_other_peoples_files_are_not_deleted(tmp_path):
    """Saving replaces a directory as a whole, so it refuses one that holds more than a checkpoint."""
    model = tiny_model()
    save_model(tmp_path / "m", model, None)
    (tmp_path / "m" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt"):
        save_model(tmp_path / "m", model, None)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"


def test_saved_configuration_serves_older_readers(tmp_path):
    """Both styles of rope parameters and of the dtype are written."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    save_model(tmp_path / "m", tiny_model(rope_parameters=rope), None)
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert saved["rope_parameters"] == rope
    assert saved["rope_scaling"] | {"rope_theta": saved["rope_theta"]} == rope
    assert saved["torch_dtype"] == saved["dtype"] == "float32"
    assert saved["architectures"] == ["Qwen3ForCausalLM"]
