"""What runs where: the choice that follows from the machine, and what is refused. No model is loaded."""

import dataclasses
import re
from pathlib import Path

import pytest

import train_grpo
from benchmarks import memory
from nano_atlas import layout as layout_room
from nano_atlas.config import parse
from nano_atlas.errors import UserError
from nano_atlas.layout import Layout, LayoutConfig, choose_layout
from nano_atlas.presets import TABLE, presets
from nano_atlas.vllm.sampler import memory_share

FAR = ("http://far", "https://farther")


@pytest.mark.parametrize(("gpus", "has_vllm", "rollout", "student", "expected"), [
    (0, True, "auto", "dir", ("cpu", "cpu", False, "cpu", "", ())),
    (0, True, "vllm", "dir", ("cpu", "cpu", False, "cpu", "cpu", ())),
    (0, False, FAR, "dir", ("cpu", "cpu", False, "cpu", "", FAR)),
    (1, True, "auto", "dir", ("cuda:0", "cuda:0", False, "cuda:0", "", ())),
    (1, True, "vllm", "dir", ("cuda:0", "cuda:0", False, "cuda:0", "cuda:0", ())),
    (2, True, "auto", "dir", ("cuda:0", "cuda:1", True, "cuda:0", "cuda:1", ())),
    (2, True, "auto", "", ("cuda:0", "", False, "cuda:0", "cuda:1", ())),
    (2, True, "auto", "https://far", ("cuda:0", "", False, "cuda:0", "cuda:1", ())),
    (2, True, "embedded", "dir", ("cuda:0", "cuda:1", False, "cuda:1", "", ())),
    (2, False, "auto", "dir", ("cuda:0", "cuda:1", False, "cuda:1", "", ())),
    (2, False, FAR, "dir", ("cuda:0", "cuda:1", False, "cuda:0", "", FAR)),
    (4, True, "vllm:cuda:1,2", "dir", ("cuda:0", "cuda:3", True, "cuda:0", "cuda:1,2", ())),
    (4, True, "vllm:cpu", "dir", ("cuda:0", "cuda:3", True, "cuda:0", "cpu", ())),
])  # fmt: skip
def test_the_layout_follows_from_what_is_there(
    monkeypatch, capsys, gpus, has_vllm, rollout, student, expected
):
    monkeypatch.setattr(layout_room, "find_spec", lambda name: "found" if has_vllm else None)
    flags = ["--rollout", *([rollout] if isinstance(rollout, str) else rollout)]
    chosen = choose_layout(parse(LayoutConfig, flags, {}, ""), student, "k3", gpus)
    assert dataclasses.astuple(chosen) == expected
    said, out = capsys.readouterr().err, capsys.readouterr().out
    assert said.startswith(f"{gpus} GPUs, vLLM {'is' if has_vllm else 'is not'} installed: ") and not out
    student, reference = chosen.student or "no device", chosen.reference
    assert f"policy on {chosen.policy}, student on {student}, reference on {reference}; " in said
    assert (f"vLLM on {chosen.server}" in said) is bool(chosen.server)


def test_the_policys_gpu_may_be_another_than_the_first():
    """The rest runs on the last of the others; an exact KL needs whole distributions side by side."""
    chosen = choose_layout(LayoutConfig(device="cuda:1", rollout=("embedded",)), "dir", "exact", 2)
    assert chosen == Layout("cuda:1", "cuda:0", False, "cuda:1")
    assert choose_layout(LayoutConfig(device="cuda", rollout=("vllm",)), "dir", "k3", 1).server == "cuda:0"


@pytest.mark.parametrize(("student", "server", "share"), [
    ("cuda:1", "cuda:1", 0.45), ("cuda:1", "cuda:0,1", 0.45), ("cuda:1", "cuda:2", 0.9), ("", "cuda:1", 0.9),
])  # fmt: skip
def test_two_models_on_one_gpu_have_half_of_it_each(student, server, share):
    layout = Layout("cuda:3", student, bool(student), "cuda:3", server)
    assert memory_share(layout, server) == share and memory_share(layout, "cuda:3") == 0.35
    assert memory_share(layout, student) == share


@pytest.mark.parametrize(("gpus", "options", "said"), [
    (0, {"device": "cuda"}, "no device cuda:0: this machine has 0 GPUs"),
    (2, {"rollout": ("vllm:cuda:1,2",)}, "no device cuda:2: this machine has 2 GPUs"),
    (2, {"rollout": ("vllm:gpu",)}, "--rollout must be auto, embedded, vllm, vllm:DEVICE or URLs"),
    (2, {"rollout": ("http://far", "vllm")}, "--rollout must be auto, embedded, vllm, vllm:DEVICE or URLs"),
    (2, {"rollout": ()}, "--rollout must be auto, embedded, vllm, vllm:DEVICE or URLs"),
    (0, {"overlap": True}, "--overlap needs --rollout vllm"),
])  # fmt: skip
def test_a_layout_that_cannot_be_is_refused(gpus, options, said):
    with pytest.raises(UserError, match=said):
        choose_layout(LayoutConfig(**options), "dir", "k3", gpus)


def test_under_torchrun_each_rank_has_its_gpu_and_the_servers_gpus_are_named(monkeypatch):
    monkeypatch.setattr(layout_room.distributed, "size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match="under torchrun, name GPUs .* --rollout vllm:cuda:6,7"):
        choose_layout(LayoutConfig(rollout=("vllm",)), "dir", "k3", 8)
    chosen = choose_layout(LayoutConfig(rollout=("vllm:cuda:6,7",)), "dir", "k3", 8)
    assert chosen == Layout("cuda:1", "cuda:1", False, "cuda:1", "cuda:6,7")


# ----------------------------------------------------------------------------------------------------------- --show-layout

LEARNING = {"policy", "masters, moments", "gradients", "activations", "fused loss"}
FROZEN, SAMPLING = {"reference"}, {"student", "KV cache"}
SERVED = {"sampler's copy", "student", memory.VLLM_CACHE}
CARDS = {"nano": 2e9, "own": 80e9} | {name: gpus[0][1] * 1e9 for name, (_, _, *gpus) in TABLE.items() if gpus}
PRESETS = [name for name in TABLE if name != "own"]  # it names no model


def grpo_config(*flags: str) -> train_grpo.Config:
    return parse(train_grpo.Config, ["--show-layout", *flags], presets("train_grpo"), "")


def on_devices(config, monkeypatch, gpus: int, has_vllm: bool, card: float, host=256e9) -> tuple[dict, dict]:
    """{device: what is on it}, and {device: verdict}, from the table."""
    monkeypatch.setattr(layout_room, "find_spec", lambda name: "found" if has_vllm else None)
    cards = {f"cuda:{index}": card for index in range(gpus)} | {"cpu": host}
    text, _, notes = memory.layout_table(config, gpus, cards).partition("\n\n")
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    columns = {device.split(",")[0]: number for number, device in enumerate(header) if number}
    table = {row[0]: row for row in rows}
    names = [name for name in table if name in memory.ROWS]
    found = {device: {name for name in names if table[name][n]} for device, n in columns.items()}
    remedy = r"(\S+) does not fit: try (.+?)(?= \S+ does not fit:| By formula)"
    remedies = dict(re.findall(remedy, " ".join(notes.split())))
    fits = {device: table["fits"][n] for device, n in columns.items()}
    assert remedies.keys() == {device for device, said in fits.items() if said == "no"}
    return found, {device: remedies.get(device, said) for device, said in fits.items()}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("gpus", "has_vllm"), [(0, True), (1, True), (2, False), (2, True)])
def test_every_preset_is_where_its_layout_says_and_fits_its_card(monkeypatch, preset, gpus, has_vllm):
    """The nano world samples in the trainer's process whatever is there; 8B on one GPU is not what its preset promises."""
    is_small = preset == "smollm2" and gpus > 0  # its options depend on whether this machine has a GPU
    config = grpo_config("--preset", preset, *("--device auto --dtype bfloat16".split() if is_small else ()))
    found, fits = on_devices(config, monkeypatch, gpus, has_vllm, CARDS[preset])
    learning, host, frozen = LEARNING, set(), FROZEN - ({"reference"} if config.lora_rank else set())
    if preset == "qwen3-8b-2gpu" and gpus:
        learning, host = LEARNING - {"masters, moments"}, {"masters, moments"}
    if gpus < 2:
        expected = {"cuda:0" if gpus else "cpu": learning | frozen | SAMPLING}
    elif has_vllm and preset != "nano":
        expected = {"cuda:0": learning | frozen, "cuda:1": SERVED}
        host = host | {"weights in shared memory"}
    else:
        expected = {"cuda:0": learning | {"KV cache"}, "cuda:1": frozen | SAMPLING}
    assert found == expected | ({"cpu": host} if host else {})
    if gpus >= (2 if preset == "qwen3-8b-2gpu" else 1):
        assert set(fits.values()) == {"yes"}


def test_the_small_presets_fit_the_host_that_their_help_states(monkeypatch):
    for preset, host in (("nano", 1e9), ("smollm2", 9e9)):
        flags = ("--device", "cpu", "--dtype", "float32")
        _, fits = on_devices(grpo_config("--preset", preset, *flags), monkeypatch, 0, False, 0, host)
        assert fits == {"cpu": "yes"}


@pytest.mark.parametrize(("ranks", "gpus"), [(8, 8), (16, 8)])
def test_under_torchrun_each_of_eight_or_sixteen_80_gb_gpus_has_its_part(monkeypatch, ranks, gpus):
    monkeypatch.setattr(memory.distributed, "size", lambda: ranks)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    flags = "--preset", "qwen3-8b-2gpu", "--optimizer-device"
    found, fits = on_devices(grpo_config(*flags, "auto"), monkeypatch, gpus, True, memory.CARD)
    sharded = LEARNING | {"gathered by FSDP2", "sampler's copy"}
    assert found == {"cuda:0": sharded | FROZEN | SAMPLING} and fits == {"cuda:0": "yes"}
    found, _ = on_devices(grpo_config(*flags, "cpu"), monkeypatch, gpus, True, memory.CARD)
    assert found["cpu"] == {"masters, moments"} and "masters, moments" not in found["cuda:0"]
    served = grpo_config(*flags, "auto", "--rollout", "vllm:cuda:6,7")
    found, fits = on_devices(served, monkeypatch, gpus, True, memory.CARD)
    assert found["cuda:6"] == found["cuda:7"] == {"sampler's copy", memory.VLLM_CACHE}
    assert set(fits.values()) == {"yes"}


def test_the_table_says_which_option_to_lower(monkeypatch):
    def said(flags: str, card: float, gpus=1, has_vllm=False) -> list[str]:
        config = grpo_config(*flags.split())
        return list(on_devices(config, monkeypatch, gpus, has_vllm, card)[1].values())

    small = "--preset qwen3-0.6b-24gb "
    assert said(small, 18e9) == ["a lower --cache-rows"]
    assert said(small, 16e9) == ["--optimizer-device cpu"]
    options = small + "--cache-rows 1 --tokens-per-batch 32768 --optimizer-device cpu "
    assert said(options, 12e9)[0] == "a lower --tokens-per-batch"
    plain = said(options + "--no-gradient-checkpointing", 12e9)[0]
    assert plain == "--gradient-checkpointing or a lower --tokens-per-batch"
    assert said(small, 8e9) == ["--lora-rank 32, more GPUs, or smaller models"]
    assert said(small + "--lora-rank 32", 3e9) == ["more GPUs, or smaller models"]
    assert said(small + "--dtype float32", 8e9) == ["--dtype bfloat16"]
    assert "more GPUs for vLLM" in said("--preset qwen3-8b-2gpu", 24e9, 2, True)[1]
    monkeypatch.setenv("NANO_ATLAS_VLLM_ARGS", "--gpu-memory-utilization=0.04")
    assert "more GPUs for vLLM" in said(small, 24e9, 2, True)[1]


def test_what_runs_at_the_same_time_is_there_at_the_same_time():
    items = {"policy": 10, "gradients": 5, "KV cache": 3}
    assert memory.peak(items) == 15 and memory.peak(items, is_overlapped=True) == 18
    assert (
        memory.peak(items | {memory.VLLM_SHARED: 30}) == 10 + 33
    )  # on the policy's GPU: it sleeps in the update
    assert memory.peak({"sampler's copy": 2, memory.VLLM_CACHE: 30, "student": 1}) == 33


def test_show_layout_loads_no_weights_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_grpo, "train", None)
    train_grpo.main(["--show-layout", "--preset", "qwen3-8b-2gpu", "--device", "cpu"])
    out, said = capsys.readouterr()
    assert "policy on cpu" in said and "| policy           |      16 |" in out and "not measured" in out
    assert max(map(len, out.splitlines())) <= 100
    with pytest.raises(UserError, match="no model at my/teacher, because it has no config.json"):
        train_grpo.main(["--show-layout", "--teacher", "my/teacher"])
    with pytest.raises(UserError, match="no model at runs/sft/model"):
        train_grpo.main(["--show-layout", "--preset", "own"])
    assert not list(Path().iterdir())


def test_a_checkpoint_that_is_there_comes_before_the_table(monkeypatch, place, tmp_path):
    flags = ("--device", "cpu", "--teacher", str(place / "teacher"), "--student", str(place / "student"))
    config = grpo_config("--preset", "own", *flags)
    policy = memory.known_config(str(memory.start_of(config)))
    assert policy == memory.read_config(place / "teacher")
    monkeypatch.chdir(tmp_path)
    Path("Qwen").mkdir()
    Path("Qwen/Qwen3-8B").symlink_to(place / "teacher")
    assert memory.known_config("Qwen/Qwen3-8B") == policy
    nano = grpo_config()
    assert memory.start_of(nano) == presets("train_sft")["nano"].overrides["model"]  # SFT has not run yet


def test_the_nano_story_asks_for_no_device_and_no_server():
    """So it runs on the first GPU where there is one."""
    for script in ("train_sft", "train_grpo"):
        assert not {"device", "optimizer_device"} & presets(script)["nano"].overrides.keys()
    assert presets("train_grpo")["nano"].overrides["rollout"] == ("embedded",)
