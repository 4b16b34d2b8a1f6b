"""What several tests share: a byte tokenizer, small random checkpoints whose samples are lively, and scripted seats."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import AddedToken

from benchmarks.pretrain import initialize
from nano_atlas.checkpoint import save_model
from nano_atlas.model import ModelConfig, Transformer
from nano_atlas.seats import Reply
from nano_atlas.tokenizer import Tokenizer

os.environ.pop("WANDB_PROJECT", None)  # the tests' runs are nobody's project
TAGS = [f"<{slash}{name}>" for name in ("thinking", "teaching", "solution") for slash in ("", "/")]
TEACHER_WORDS = ("<teaching>Go.</teaching>", "<teaching>It is 1.</teaching>", "hm", "<|im_end|>")
STUDENT_WORDS = ("<solution>1</solution>", "<solution>2</solution>", "hm", "<|im_end|>")


def byte_tokenizer() -> Tokenizer:
    """Every byte a token, ChatML's two control tokens, and the protocol's tags and the words above as tokens of their own."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    words = (*TAGS, *TEACHER_WORDS[:3], *STUDENT_WORDS[:2])
    backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    return Tokenizer(backend, eos_token="<|im_end|>")


def lively_model(seed: int, likely: Sequence[str], tokenizer: Tokenizer) -> Transformer:
    """A random model of about 50k parameters that draws `likely` tokens almost only; which of them, depends on the context.

    Channel 0 of every embedding is the same, so column 0 of the head works as a bias on each token.
    """
    config = ModelConfig(
        "qwen3", tokenizer.vocab_size, 48, 64, 2, 4, 2, 8, max_position_embeddings=1024, qk_norm=True
    )
    model = initialize(Transformer(config), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 20
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight *= 0.3
        model.lm_head.weight[:, 0] = -60.0
        model.lm_head.weight[[tokenizer.backend.token_to_id(word) for word in likely], 0] = 0.0
    return model


def lively_checkpoint(path: Path, seed: int, likely: Sequence[str]) -> Path:
    tokenizer = byte_tokenizer()
    save_model(path, lively_model(seed, likely, tokenizer), tokenizer)
    return path


class ScriptedSeat:
    """Replies `rule(prompt, seed, index of the sample)`, and remembers every prompt in `asked`, every call in `calls`."""

    def __init__(self, rule: Callable[[str, int, int], str]):
        self.rule, self.asked, self.calls = rule, [], []

    def ask(self, questions, progress=None):
        self.calls.append(list(questions))
        replies = []
        for conversation, _, seed, n in questions:
            assert [message["role"] for message in conversation] == ["user"]
            prompt = conversation[0]["content"]
            self.asked.append(prompt)
            texts = [self.rule(prompt, seed, index) for index in range(n)]
            replies.append([Reply(text, len(text.split()) + 1, "..." in text) for text in texts])
        return replies

    def count_tokens(self, text):
        return len(text.split())


SMALL = {  # options that make train_grpo.py take a tenth of a second per step
    "device": "cpu", "problems_per_step": 2, "group_size": 4, "baseline_samples": 2, "probe_tokens": 3, "teaching_tokens": 6,
    "answer_tokens": 6, "temperature": (1.0, 0.8), "lr": 3e-3,
    "tokens_per_batch": 600, "eval_every": 2, "save_every": 2, "steps": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A directory with `teacher`, `student` and `problems.jsonl`."""
    path = tmp_path_factory.mktemp("grpo")
    lively_checkpoint(path / "teacher", 1, TEACHER_WORDS)
    lively_checkpoint(path / "student", 2, STUDENT_WORDS)
    problems = [
        {"id": f"p{i}", "question": f"Pick {'one' if i % 2 else 'the first'} of {i}.", "answer": "1"}
        for i in range(40)
    ]
    (path / "problems.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


def grpo_flags(place: Path, out: Path, **options) -> list[str]:
    places = {
        "teacher": place / "teacher",
        "student": place / "student",
        "problems": place / "problems.jsonl",
    }
    options = places | SMALL | options
    argv = ["--out", str(out)]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            argv += [flag, *map(str, value)]
        elif value is not None:
            argv.append(f"{flag}={value}")
    return argv


def run_grpo(place: Path, out: Path, **options) -> list[dict]:
    import train_grpo

    train_grpo.main(grpo_flags(place, out, **options))
    return records(out / "metrics.jsonl")


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
