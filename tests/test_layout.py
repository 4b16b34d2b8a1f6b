"""What runs where: the choice that follows from the machine, and what is refused. No model is loaded."""

import dataclasses

import pytest

from nano_atlas import layout as layout_room
from nano_atlas.config import parse
from nano_atlas.errors import UserError
from nano_atlas.layout import Layout, LayoutConfig, choose_layout
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
    assert (
        f"{gpus} GPUs, vLLM {'is' if has_vllm else 'is not'} installed: {chosen}" in capsys.readouterr().out
    )


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
    (0, {"device": "cuda"}, "there is no device cuda:0 here"),
    (2, {"rollout": ("vllm:cuda:1,2",)}, "there is no device cuda:2 here"),
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
    with pytest.raises(UserError, match="under torchrun name GPUs .* --rollout vllm:cuda:6,7"):
        choose_layout(LayoutConfig(rollout=("vllm",)), "dir", "k3", 8)
    chosen = choose_layout(LayoutConfig(rollout=("vllm:cuda:6,7",)), "dir", "k3", 8)
    assert chosen == Layout("cuda:1", "cuda:1", False, "cuda:1", "cuda:6,7")
