"""The whole path on a checkpoint that `transformers` made: SFT, GRPO, runtime, export, GRPO on the traces, evaluation.

Random weights and GSM8K problems (tests/data, MIT, OpenAI): nothing is learned here, everything has to run and to fit together.
"""

import json
import runpy
import sys
from pathlib import Path

import pytest
import tokenizers

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
GSM8K = ROOT / "tests/data/gsm8k_excerpt.jsonl"


def make_checkpoint(path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(GSM8K.read_text().splitlines(), trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(path)
    config = transformers.Qwen3Config(
        vocab_size=backend.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=backend.token_to_id("<|im_end|>"), bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(monkeypatch, capsys):
    """`python script *options`, in this process; returns what it printed."""

    def run(script: str, *options: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_script_runs_a_checkpoint_made_by_transformers_on_gsm8k(tmp_path, run):
    base, sft, grpo, live, second = (tmp_path / name for name in ("base", "sft", "grpo", "live", "second"))
    make_checkpoint(base)
    problems = lines(GSM8K)
    demonstrations = tmp_path / "demonstrations.jsonl"
    demonstrations.write_text("".join(json.dumps({
        "problem_text": p["question"], "student_approach": "Add everything.", "teacher_diagnosis": "It must be checked.",
        "teacher_teaching": "Work out one quantity after the other."}) + "\n" for p in problems))  # fmt: skip

    machine = ("--preset", "own", "--device", "cpu")
    sizes = ("--steps", 4, "--lr", 1e-2, "--tokens-per-step", 2048, "--tokens-per-batch", 1024)
    run("train_sft.py", *machine, "--data", demonstrations, "--model", base, "--out", sft, *sizes)
    losses = [record["loss"] for record in lines(sft / "metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < losses[0]

    lengths = ("--probe-tokens", 6, "--teaching-tokens", 12, "--answer-tokens", 8)
    sizes = (
        "--steps",
        2,
        "--problems-per-step",
        2,
        "--group-size",
        3,
        "--baseline-samples",
        2,
        "--eval-every",
        2,
        *lengths,
    )
    policy = (*machine, "--student", base, *sizes)
    run("train_grpo.py", *policy, "--problems", GSM8K, "--teacher", sft / "model", "--out", grpo)
    records = lines(grpo / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2] and "eval/student_accuracy" in records[-1]
    assert max(record["sampling/logp_diff_max"] for record in records) < 1e-4

    pair = ("--student", base, "--teacher", grpo / "model", "--tasks", GSM8K)
    run("runtime_loop.py", "--preset", "own", *pair, "--out", live, *lengths)
    assert [trace["task"] for trace in lines(live / "traces.jsonl")] == [p["question"] for p in problems]
    exported = tmp_path / "traces.jsonl"
    run("runtime_loop.py", "--preset", "own", "--out", live, "--export", exported)
    assert len(lines(exported)) == len(problems)

    run("train_grpo.py", *policy, "--problems", exported, "--teacher", grpo / "model", "--out", second)
    assert len(lines(second / "metrics.jsonl")) == 2

    teachers = (f"sft={sft / 'model'}", f"grpo={second / 'model'}")
    given = ("--bench", "gsm8k", "--data", GSM8K, "--student", base, "--teacher", *teachers)
    table = run("eval.py", "--preset", "own", *given, "--full", "--out", tmp_path / "eval", *lengths)
    assert "gsm8k: 12 tasks" in table and "| shuffled" in table and "untrained" in table
