"""A checkpoint that is named as on the Hugging Face Hub is found in the Hub's cache; what is not there is named with a remedy."""

import pytest
from conftest import STUDENT_WORDS, lively_checkpoint

import eval as evaluation
import runtime_loop
import train_sft
from nano_atlas.checkpoint import is_checkpoint
from nano_atlas.errors import UserError
from nano_atlas.runs import checkpoint_digest, find_checkpoint
from nano_atlas.seats import open_seat


@pytest.mark.parametrize("name", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_a_hub_id_is_found_in_the_cache_wherever_that_is(name, tmp_path, monkeypatch):
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    below = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}
    folder = tmp_path / below.get(name, ".cache/huggingface/hub") / "models--org--tiny"
    made = lively_checkpoint(folder / "snapshots/abc", 0, STUDENT_WORDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, str(tmp_path))
    assert not is_checkpoint("org/tiny")  # not without refs/main
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc\n")
    assert find_checkpoint("org/tiny") == made and is_checkpoint("org/tiny")
    assert checkpoint_digest("org/tiny") == checkpoint_digest(made)
    assert open_seat("org/tiny").count_tokens("abc") == 3
    (tmp_path / "org/tiny").mkdir(parents=True)  # what is there goes first
    assert find_checkpoint("org/tiny").name == "tiny"


@pytest.mark.parametrize("spec", ["org/tiny", "o" * 300, "org/" + "t" * 300])
@pytest.mark.parametrize(
    ("script", "options"),
    [
        (train_sft, ["--preset=own", "--data=x", "--model"]),
        (runtime_loop, ["--count=1", "--teacher=t", "--student"]),
        (evaluation, ["--student"]),
        (evaluation, ["--teacher"]),
    ],
)
def test_a_hub_id_that_is_not_there_is_answered_with_how_to_fetch_it(
    script, options, spec, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["script", "--out=out", *options, spec])
    with pytest.raises(UserError, match=f"hf download {spec} --local-dir {spec}"):
        script.main()
