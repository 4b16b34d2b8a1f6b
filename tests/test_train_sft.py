"""train_sft.py end to end on a model small enough for a test, and the properties its loss must have."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train_sft
from benchmarks.pretrain import initialize
from nano_atlas import optim, world
from nano_atlas.checkpoint import save_model
from nano_atlas.data import Example, collate
from nano_atlas.errors import UserError
from nano_atlas.model import ModelConfig, PackedAttention, Transformer
from nano_atlas.presets import presets
from nano_atlas.runs import checkpoint_digest
from nano_atlas.tokenizer import Tokenizer

SHAPE = ModelConfig("qwen3", 260, 32, 64, 2, 4, 2, 8, tie_word_embeddings=True, qk_norm=True)
SIZES = {
    "--tokens-per-step": "512",
    "--tokens-per-batch": "256",
    "--lr": "1e-2",
    "--held-out": "0.1",
    "--device": "cpu",
}
SMALL = [word for pair in SIZES.items() for word in pair]
PRESETS = presets("train_sft")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A random model over bytes, in Hugging Face layout."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_model(
        tmp_path / "init", initialize(Transformer(SHAPE), 0), Tokenizer(backend, eos_token="<|im_end|>")
    )
    return tmp_path / "init"


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    records = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(checkpoint: Path, data: Path, out: Path, *more: str) -> list[dict]:
    train_sft.main(["--model", str(checkpoint), "--data", str(data), "--out", str(out), *SMALL, *more])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def random_examples(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for _ in range(count):
        length = int(torch.randint(2, 30, (1,), generator=generator))
        ids = torch.randint(0, 260, (length,), generator=generator).tolist()
        prompt = int(torch.randint(1, length, (1,), generator=generator))
        examples.append(Example(ids, [False] * prompt + [True] * (length - prompt)))
    return examples


def packed_gradients(
    examples: list[Example], groups: list[list[int]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step whose documents are split into micro-batches as `groups` says."""
    model = initialize(Transformer(SHAPE), 0)
    target_tokens = sum(sum(example.is_target[1:]) for example in examples)
    loss = 0.0
    for group in groups:
        partial = train_sft.batch_loss(model, collate([examples[i] for i in group]), target_tokens)
        partial.backward()
        loss += partial.item()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def test_packed_documents_give_loss_and_gradients_of_each_document_alone():
    """Oracle: cross-entropy over the plain logits of one document at a time, in float64."""
    examples = random_examples(9)
    model = initialize(Transformer(SHAPE), 0).double()
    losses = []
    for example in examples:
        ids = torch.tensor(example.input_ids)
        attention = PackedAttention([len(ids) - 1])
        logits = model(ids[:-1], attention.positions, attention) @ model.head_weight.T
        losses.append(F.cross_entropy(logits, ids[1:], reduction="none")[torch.tensor(example.is_target[1:])])
    oracle = torch.cat(losses).mean()
    oracle.backward()
    loss, gradients = packed_gradients(examples, [list(range(9))])
    assert loss == pytest.approx(oracle.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name].double(), p.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_unequal_micro_batches_give_the_same_gradient_as_one_batch():
    examples = random_examples(9)
    loss, gradients = packed_gradients(examples, [list(range(9))])
    for groups in ([[0], [1, 2, 3, 4, 5, 6, 7, 8]], [[8, 0, 3], [1], [7, 2], [4, 5, 6]]):
        split_loss, split_gradients = packed_gradients(examples, groups)
        assert split_loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(split_gradients[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_training_lowers_loss_and_held_out_loss_and_writes_a_loadable_model(
    checkpoint, sums, tmp_path, capsys
):
    records = run(checkpoint, sums, tmp_path / "out", "--epochs", "25")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert (
        records[-1]["loss"] < 0.5 * records[0]["loss"] and records[-1]["eval_loss"] < 0.5 * records[0]["loss"]
    )
    assert records[-1]["epoch"] == 25 and records[-1]["lr"] < records[5]["lr"] and records[0]["grad_norm"] > 0
    assert set(records[0]) == {"step", "loss", "lr", "grad_norm", "epoch", "tokens", "target_tokens", "tokens_per_second",
                               "skipped_steps"}  # fmt: skip
    assert f"{tmp_path / 'out'}: model" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert tokenizer.eos_token == "<|im_end|>"
    assert torch.equal(
        theirs.state_dict()["model.embed_tokens.weight"],
        weights(tmp_path / "out")["model.embed_tokens.weight"],
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_interrupted_run_ends_with_the_same_weights_and_metrics(
    checkpoint, sums, tmp_path, monkeypatch, dtype
):
    options = ("--steps", "7", "--save-every", "2", "--dtype", dtype, "--gradient-checkpointing")
    straight = run(checkpoint, sums, tmp_path / "straight", *options)

    steps = 0

    def interrupted(*arguments):
        nonlocal steps
        steps += 1
        if steps == 6:  # after the state of step 4 and the record of step 5
            raise KeyboardInterrupt
        return rate(*arguments)

    rate = optim.learning_rate
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optim, "learning_rate", interrupted)
        run(checkpoint, sums, tmp_path / "resumed", *options)
    resumed = run(checkpoint, sums, tmp_path / "resumed", *options)

    for a, b in zip(straight, resumed, strict=True):
        assert {**a, "tokens_per_second": 0} == {**b, "tokens_per_second": 0}
    expected = weights(tmp_path / "straight")
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(tmp_path / "resumed").items())


def test_a_finished_run_is_not_repeated_and_other_options_or_data_are_refused(
    checkpoint, sums, tmp_path, capsys
):
    out = tmp_path / "out"
    run(checkpoint, sums, out, "--steps", "2")
    run(checkpoint, sums, out, "--steps", "2")
    assert "already trained" in capsys.readouterr().out
    assert len(run(checkpoint, sums, out, "--steps", "3")) == 3  # going on for longer is allowed
    with pytest.raises(UserError, match=r"--seed 42 -> 1\. .* --restart"):
        run(checkpoint, sums, out, "--seed", "1")
    sums.write_text(sums.read_text() + '{"prompt": "1+1=", "completion": "2"}\n')
    with pytest.raises(UserError, match="was trained on other data"):
        run(checkpoint, sums, out, "--steps", "3")
    assert len(run(checkpoint, sums, out, "--steps", "1", "--seed", "1", "--restart")) == 1


def test_over_long_examples_are_reported(checkpoint, sums, tmp_path, capsys):
    sums.write_text(sums.read_text() + json.dumps({"prompt": "x" * 99, "completion": "y"}) + "\n")
    run(checkpoint, sums, tmp_path / "out", "--steps", "1", "--max-length", "50")
    assert f"left out: 1 examples of {sums}: longer than 50 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "said"), [
    (["--model", "Qwen/Qwen3-none"], "hf download Qwen/Qwen3-none --local-dir Qwen/Qwen3-none"),
    (["--data", "none.jsonl"], "none.jsonl: no such file"),
    (["--preset", "own", "--data"], "--preset own needs --data FILE"),
    (["--device", "cuda:7"], "no device cuda:7"),
    (["--optimizer-device", "cuda:7"], "no device cuda:7"),
    (["--held-out", "1"], "--held-out must be below 1"),
    (["--lr", "0"], "--lr must be above 0"),
])  # fmt: skip
def test_contradictions_and_missing_things_are_explained(checkpoint, sums, tmp_path, options, said):
    with pytest.raises(UserError, match=said):
        run(checkpoint, sums, tmp_path / "out", *options)


def test_a_broken_line_ends_the_script_with_file_line_and_exit_code_2(checkpoint, tmp_path, capsys):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(SystemExit) as stop:
        train_sft.run_script(lambda: run(checkpoint, data, tmp_path / "out"))
    assert stop.value.code == 2
    assert f"error: {data}:2: prompt make no training example" in capsys.readouterr().err


def test_the_dry_step_is_as_long_as_any_micro_batch_and_changes_nothing(
    checkpoint, sums, tmp_path, monkeypatch
):
    plain = run(checkpoint, sums, tmp_path / "plain", "--steps", "2")
    tokens, real = [], train_sft.batch_loss

    def spy(model, batch, target_tokens):
        tokens.append(len(batch.input_ids))
        return real(model, batch, target_tokens)

    monkeypatch.setattr(optim, "DRY_STEP_ON", ("cpu",))
    monkeypatch.setattr(train_sft, "batch_loss", spy)
    dry = run(checkpoint, sums, tmp_path / "dry", "--steps", "2")
    assert [r["loss"] for r in plain] == [r["loss"] for r in dry]
    assert tokens[0] == max(tokens) > 200

    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    monkeypatch.setattr(train_sft, "batch_loss", too_large)
    with pytest.raises(UserError, match="does not fit .*out of memory.*: lower --tokens-per-batch"):
        run(checkpoint, sums, tmp_path / "large", "--steps", "2")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_sets_options_that_exist_and_agree(name):
    data = [] if name == "nano" else ["--data", "x.jsonl"]
    config = train_sft.parse(train_sft.Config, ["--preset", name, *data], PRESETS, "")
    for option, value in PRESETS[name].overrides.items():
        assert getattr(config, option) == value


def test_evaluation_data_of_their_own(checkpoint, sums, tmp_path):
    """Nothing of them is learned, and eval_loss is theirs: hard to guess, while the sums are learned."""
    others = tmp_path / "others.jsonl"
    others.write_text(
        "".join(json.dumps({"prompt": f"{a}+1=", "completion": "zzzz"}) + "\n" for a in range(10))
    )
    records = run(
        checkpoint, sums, tmp_path / "out", "--held-out", "0", "--eval-data", str(others), "--epochs", "5"
    )
    assert records[-1]["eval_loss"] > 2 * records[-1]["loss"]
    others.write_text(others.read_text().replace("z", "y"))
    with pytest.raises(UserError, match="was trained on other data"):
        run(
            checkpoint, sums, tmp_path / "out", "--held-out", "0", "--eval-data", str(others), "--epochs", "6"
        )


def test_without_options_the_shipped_student_states_approaches_and_becomes_the_teacher(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_sft, "NANO_DEMONSTRATIONS", 20)
    before = checkpoint_digest(world.STUDENT)
    train_sft.main(["--steps", "2"])
    out = tmp_path / "runs/nano/teacher-sft"
    assert (
        len((out / "metrics.jsonl").read_text().splitlines()) == 2
        and checkpoint_digest(out / "model") != before
    )
    demonstrations = (out / "demonstrations.jsonl").read_text()
    assert len(demonstrations.splitlines()) == 20 and checkpoint_digest(world.STUDENT) == before
    capsys.readouterr()
    train_sft.main(["--steps", "2"])  # everything is there: nothing is made again
    assert "is already trained" in capsys.readouterr().out
    train_sft.main(["--steps", "2", "--seed", "1", "--restart"])  # the demonstrations are of the seed, too
    assert (out / "demonstrations.jsonl").read_text() != demonstrations
    (out / "demonstrations.jsonl").write_text(demonstrations)
    with pytest.raises(UserError, match="was trained on other data"):
        train_sft.main(["--steps", "3", "--seed", "1"])
