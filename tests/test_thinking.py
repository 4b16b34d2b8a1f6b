"""--thinking of the trainers stays with the checkpoint, so that whoever asks it later asks it in the same mode."""

import json

import pytest
from conftest import run_grpo

import train_sft
from nano_atlas.seats import open_seat


def is_thinking(path) -> bool:
    return open_seat(str(path)).template_options == {"enable_thinking": True}


@pytest.mark.parametrize("thinking", [True, False])
def test_the_mode_of_training_is_the_mode_of_use(place, tmp_path, thinking):
    data = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Go."}]
    data.write_text(json.dumps({"messages": chat}) + "\n")
    argv = ["--preset=own", f"--model={place / 'teacher'}", f"--data={data}", f"--out={tmp_path / 'sft'}"]
    train_sft.main([*argv, "--steps=1", "--device=cpu", "--held-out=0"] + ["--thinking"] * thinking)
    assert is_thinking(tmp_path / "sft/model") is thinking
    run_grpo(place, tmp_path / "grpo", teacher=tmp_path / "sft/model", steps=1, eval_every=0)
    assert is_thinking(tmp_path / "grpo/model") is thinking  # also without the flag
    assert is_thinking(place / "student") is False


def test_grpo_turns_the_mode_on(place, tmp_path):
    run_grpo(place, tmp_path, steps=1, eval_every=0, thinking=True)
    assert is_thinking(tmp_path / "model")
