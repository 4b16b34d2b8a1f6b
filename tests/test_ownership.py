"""A run owns what it wrote and nothing else: what is deleted, what is called trained, what is noticed when files are damaged."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from test_checkpoint import tiny_model
from torch import nn

import eval as evaluation
import runtime_loop
import train_sft
from nano_atlas import runs, world
from nano_atlas.benches import arms
from nano_atlas.checkpoint import load_model, save_model
from nano_atlas.config import option, run_script
from nano_atlas.errors import UserError
from nano_atlas.optim import MasterAdamW, load_training_state, save_training_state
from nano_atlas.runs import RunLog, begin_run, is_saved, open_run, owned
from nano_atlas.runtime.options import Config as RuntimeConfig

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class RunConfig:
    out: Path = option(Path("runs"), "where", resumable=True)
    teacher: Path = option(Path("teacher"), "what it reads")
    lr: float = option(0.1, "what is computed")
    steps: int = option(9, "how long", resumable=True)
    restart: bool = option(False, "start over", resumable=True)


def optimizer() -> MasterAdamW:
    return MasterAdamW(nn.Linear(3, 2))


def a_run(out: Path, *steps: int, **options) -> RunConfig:
    """A run that has saved the states of these steps, and a model after the last one."""
    config = RunConfig(out, **options)
    begin_run(config, open_run(config))
    for step in steps:
        save_training_state(out / "state", optimizer(), step)
    save_model(out / "model", tiny_model(), None, step=steps[-1])
    with RunLog(out / "metrics.jsonl") as log:
        log.log(1, loss=1.0)
    return config


def flip_a_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_a_run_continues_with_the_options_it_was_started_with_or_starts_over(tmp_path):
    config = a_run(tmp_path, 1)
    assert open_run(replace(config, steps=12)) == tmp_path / "state" / "step-00000001"
    with pytest.raises(UserError, match=r"other options: --lr 0.1 -> 0.2"):
        open_run(replace(config, lr=0.2))
    assert open_run(replace(config, lr=0.2, restart=True)) is None


def test_starting_over_deletes_what_the_run_wrote_and_only_once_all_is_checked(tmp_path):
    config = replace(a_run(tmp_path, 1, 2), restart=True)
    for mine in ("data.jsonl", "sft/model/config.json", "state/notes.txt"):
        (tmp_path / mine).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / mine).write_text("the user's own")
    before = sorted(tmp_path.rglob("*"))
    assert open_run(config) is None and sorted(tmp_path.rglob("*")) == before
    begin_run(config, None)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["data.jsonl", "options.json", "sft/model/config.json", "state/notes.txt"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("place", ["model/notes.txt", "best/config.json", "model", "best"])
def test_what_lies_in_a_runs_place_and_is_not_its_own_is_refused_at_the_start(tmp_path, place, restart):
    config = replace(a_run(tmp_path, 1), restart=restart)
    if place == "model":
        shutil.rmtree(tmp_path / place)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("mine")
    with pytest.raises(UserError, match="holds files that no run has written .*; move it"):
        open_run(config)
    assert (tmp_path / place).read_text() == "mine"


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["model", "state", "metrics.jsonl"])
def test_a_directory_in_which_no_run_began_is_left_alone(tmp_path, name, restart):
    a_run(tmp_path / "other", 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "other" / name).rename(tmp_path / "mine" / name)
    with pytest.raises(UserError, match=f"{name} belongs to no run here"):
        open_run(RunConfig(tmp_path / "mine", restart=restart))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("place", ["model", "best", "state/step-00000001", "model/../model"])
def test_a_run_does_not_read_what_it_writes(tmp_path, place, restart):
    with pytest.raises(UserError, match=r"--teacher .* is written by this run"):
        open_run(RunConfig(tmp_path, teacher=tmp_path / place, restart=restart))


@pytest.mark.parametrize("spoil", [
    lambda state: (state / "state.json").unlink(),
    lambda state: (state / "state.json").write_text("{}"),
    lambda state: (state / "digests.json").write_text("{"),
    lambda state: [file.unlink() for file in state.iterdir()],
    lambda state: [shutil.rmtree(state), state.write_text("a file")],
    lambda state: (state / "state-00000.safetensors").write_bytes(b"short"),
])  # fmt: skip
def test_a_run_goes_on_from_the_state_before_a_damaged_one(tmp_path, spoil, capsys):
    config = a_run(tmp_path, 3, 6, 9)
    spoil(tmp_path / "state" / "step-00000009")
    assert open_run(config) == tmp_path / "state" / "step-00000006"
    assert "step-00000009" in capsys.readouterr().err
    spoil(tmp_path / "state" / "step-00000006")
    with pytest.raises(UserError, match="every state is damaged; start over with --restart"):
        open_run(config)


def test_every_flipped_bit_of_a_state_and_of_a_checkpoint_is_noticed(tmp_path):
    rng, config = random.Random(0), a_run(tmp_path, 1)
    state, model = tmp_path / "state/step-00000001", tmp_path / "model"
    for folder, load in ((state, lambda: open_run(config)), (model, lambda: load_model(model))):
        for file in sorted(folder.iterdir()):
            before = file.read_bytes()
            for _ in range(0 if file.name == "digests.json" else 10):
                flip_a_bit(file, rng)
                with pytest.raises(UserError, match="damaged|whole"):
                    load()
                file.write_bytes(before)
        load()


def test_a_checkpoint_that_was_changed_on_purpose_says_how_to_keep_the_change(tmp_path):
    save_model(tmp_path / "m", tiny_model(), None)
    (tmp_path / "m/config.json").write_text((tmp_path / "m/config.json").read_text() + "\n")
    with pytest.raises(UserError, match="config.json is damaged.* delete digests.json"):
        load_model(tmp_path / "m")
    (tmp_path / "m/digests.json").unlink()
    load_model(tmp_path / "m")


def test_the_model_of_an_earlier_step_is_not_called_trained(tmp_path):
    config = a_run(tmp_path, 4)
    save_training_state(tmp_path / "state", optimizer(), 8)  # and killed before the model of step 8
    assert open_run(config).name == "step-00000008"
    assert is_saved(tmp_path, 4) and not is_saved(tmp_path, 8)


def test_a_model_without_a_state_is_not_trained_over(tmp_path):
    config = a_run(tmp_path, 4)
    shutil.rmtree(tmp_path / "state")  # to save room, say
    with pytest.raises(UserError, match="no state to continue from; .* --restart"):
        open_run(config)


def test_a_run_copied_under_another_name_goes_on(tmp_path):
    a_run(tmp_path / "first", 2)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    assert open_run(RunConfig(tmp_path / "second")) == tmp_path / "second/state/step-00000002"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "2"}\n', b'{"step": NaN}\n']
)
def test_a_damaged_metrics_file_is_named_and_starting_over_removes_it(tmp_path, content):
    config = a_run(tmp_path, 1)
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="metrics.jsonl:1"):
        RunLog(tmp_path / "metrics.jsonl", resumed_step=1)
    begin_run(config, None)
    RunLog(tmp_path / "metrics.jsonl").close()


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    """The first is another process, which is killed: its claim ends with it."""
    script = f"from nano_atlas import runs; import time; from pathlib import Path; claim = runs.claim(Path({str(tmp_path)!r}, '.lock'))"
    first = subprocess.Popen(
        [sys.executable, "-c", f"{script}; print(flush=True); time.sleep(60)"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    first.stdout.readline()
    with pytest.raises(UserError, match="another process is writing it; wait"):
        train_sft.main(["--out", str(tmp_path), "--device", "cpu"])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    first.kill()
    first.wait()
    with owned(tmp_path):
        pass


def test_wandb_without_a_key_is_one_line(tmp_path, monkeypatch):
    class Wandb:
        def init(**options):
            raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setenv("WANDB_PROJECT", "atlas")
    with pytest.raises(UserError, match="api_key not configured .*`wandb login`, or unset it"):
        RunLog(tmp_path / "metrics.jsonl", config={})


@pytest.mark.parametrize("make", [
    lambda place: runs.write_json(place, {}),
    lambda place: save_model(place, tiny_model(), None),
    lambda place: runs.claim(place / ".lock"),
    lambda place: RunLog(place / "metrics.jsonl"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["a file in the way", "a full disk"])
def test_what_the_disk_refuses_ends_a_script_with_one_line(tmp_path, make, kind, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "out"
    if kind == "a full disk":
        if not Path("/dev/full").exists():
            pytest.skip("this system has no /dev/full")
        place = tmp_path / "out"

        def full(*arguments, **options):
            raise OSError(28, "No space left on device", str(place))

        for name in ("open", "mkdir"):
            monkeypatch.setattr(Path, name, full)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: make(place))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.processes
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_says_how_to_continue(tmp_path, sent):
    command = [sys.executable, "train_sft.py", "--out", str(tmp_path), "--device", "cpu"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background inherits SIG_IGN
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=environment, preexec_fn=heard)
    while not (tmp_path / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"the same command continues" in said


def test_a_state_that_is_read_again_is_the_one_that_was_written(tmp_path):
    config = a_run(tmp_path, 5)
    assert load_training_state(open_run(config), optimizer())["step"] == 5
    assert json.loads((tmp_path / "model/digests.json").read_text())["step"] == 5


@pytest.mark.parametrize("name", ["traces.jsonl", "metrics.jsonl", "playbook.json"])
def test_the_runtime_leaves_files_of_others_alone(tmp_path, name):
    """Also those of a training run, whose metrics have the same name."""
    (tmp_path / name).write_text('{"step": 1}')
    for action in (
        lambda: runtime_loop.set_aside(tmp_path),
        lambda: runtime_loop.run(
            RuntimeConfig(out=tmp_path, student="a", teacher="b"), [], {"student": None}
        ),
    ):
        with pytest.raises(UserError, match=f"{name} belongs to no run here"):
            action()
    assert [path.name for path in tmp_path.iterdir()] == [name] and (
        tmp_path / name
    ).read_text() == '{"step": 1}'


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["tasks.jsonl", "results.json", "tables.md"])
def test_an_evaluation_leaves_files_of_others_alone(tmp_path, name, restart):
    (tmp_path / name).write_text("mine")
    config = evaluation.Config(student=str(world.STUDENT), out=tmp_path, restart=restart)
    with pytest.raises(UserError, match=f"{name} belongs to no run here"):
        arms.start_or_continue(config, {})
    assert (tmp_path / name).read_text() == "mine"


def test_passwords_of_urls_are_in_no_file_and_in_no_error(tmp_path, capsys):
    """And another password is no other option."""
    url = "http://user:hunter2@host/v1?api_key=abc123"
    config = a_run(tmp_path, 1, teacher=url)
    assert open_run(replace(config, teacher=url.replace("hunter2", "other"))) is not None
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(SystemExit):
        run_script(lambda: open_run(replace(config, lr=0.5, teacher=f"{url}/other")))
    for secret in (b"hunter2", b"abc123"):
        assert not any(secret in content for content in (*written, capsys.readouterr().err.encode()))
