"""The check for whoever has a GPU for a few minutes: it runs in small; what fails costs nothing else."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_correct, gpu_speed, memory
from benchmarks.gpu import Section
from benchmarks.gpu_probe import NO_TIME, NotHere, Probe, compared
from nano_atlas import model
from nano_atlas.errors import UserError

# ---- sections that processes of their own import from here


def fine(probe):
    probe.measure("first", lambda: {"value": 1.0})
    probe.measure("second", lambda: {"value": 2.0, "ok": True}, unit="m")


def raising(probe):
    probe.measure("before", lambda: {"value": 1.0})
    raise RuntimeError("out of luck")


def failing(probe):
    probe.measure("fails", lambda: 1 / 0)
    probe.measure("goes on", lambda: {"value": 1.0})
    probe.measure("not here", not_here)


def not_here():
    raise NotHere("no such card")


def hanging(probe):
    probe.measure("before", lambda: {"value": 1.0})
    probe.measure("hangs", time.sleep, 600)


def dying(probe):
    probe.measure("before", lambda: {"value": 1.0})
    probe.measure("dies", os.abort)
    probe.measure("after", lambda: {"value": 2.0})


def late(probe):
    time.sleep(probe.left() + 0.01)
    probe.measure("late", lambda: {"value": 1.0})


def wrong(probe):
    probe.measure("wrong", lambda: {"relative_error": 0.5, "ok": False})


def fakes(*names: str) -> dict[str, Section]:
    return {name: Section(f"test_gpu:{name}", 1, "") for name in names}


def run(tmp_path, sections, budget: float) -> tuple[bool, dict]:
    """-> whether it failed, and {section: {name: record}} of the file."""
    out = tmp_path / "gpu.json"
    config = gpu.Config(tuple(sections), budget, "cpu", out)
    results = gpu.measure(config, sections, out, {"card": "CPU"})
    written = json.loads(out.read_text())["sections"]
    found = {name: {one["name"]: one for one in entry["records"]} for name, entry in written.items()}
    assert all(list(found[name].values()) == records for name, records in results.items())
    return gpu.has_failed(results), found


# ---- the whole


@pytest.mark.processes
def test_every_section_runs_in_small_and_says_what_it_found(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--budget", "240", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert list(written["sections"]) == list(gpu.SECTIONS)
    records = [one for entry in written["sections"].values() for one in entry["records"]]
    failed = {one["name"]: one["error"] for one in records if "error" in one}
    assert all("ModuleNotFoundError" in error or "ImportError" in error for error in failed.values()), failed
    assert not [one for one in records if one.get("note") == NO_TIME]
    for name, entry in written["sections"].items():
        measured = [one for one in entry["records"] if "error" not in one and "note" not in one]
        assert measured or name == "story"
    correct = written["sections"]["correct"]["records"]
    assert len(correct) == 16 and all(one["ok"] for one in correct)
    printed = capsys.readouterr().out
    assert all(f"### {name}" in printed for name in gpu.SECTIONS)
    assert "not asked for" in printed


@pytest.mark.processes
def test_a_section_that_fails_costs_no_other_one_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    sections = {"late": Section("test_gpu:late", 0.01, "")} | fakes("fine", "raising", "failing", "dying")
    sections["unloadable"] = Section("test_gpu_of_nobody:unloadable", 1, "")
    has_failed, found = run(tmp_path, sections, 90)
    assert not has_failed  # none of them is the section `correct`
    assert found["fine"]["second"].items() >= {"value": 2.0, "ok": True, "unit": "m"}.items()
    assert found["raising"]["before"]["value"] == 1
    assert "out of luck" in found["raising"]["the section itself"]["error"]
    assert "ZeroDivisionError" in found["failing"]["fails"]["error"]
    assert found["failing"]["goes on"]["value"] == 1
    assert found["failing"]["not here"]["note"] == "no such card"
    # a process that dies is replaced, and goes on after the measurement that killed it
    assert found["dying"]["before"]["value"] == 1 and found["dying"]["after"]["value"] == 2
    assert "status -6" in found["dying"]["dies"]["error"]
    assert "status 1" in found["unloadable"]["the section itself"]["error"]
    assert found["late"]["late"]["note"] == NO_TIME
    log = (tmp_path / "gpu.log").read_text()
    assert "out of luck" in log and "test_gpu_of_nobody" in log


@pytest.mark.processes
def test_a_section_that_hangs_is_ended_and_what_it_found_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    started = time.monotonic()
    has_failed, found = run(tmp_path, fakes("hanging", "fine"), 12)
    assert time.monotonic() - started < 40
    assert found["hanging"]["before"]["value"] == 1
    assert found["hanging"]["hangs"]["error"].startswith("ended after")
    assert found["fine"]["second"]["value"] == 2
    # another call about the same card keeps the sections that it does not measure
    has_failed, found = run(tmp_path, fakes("wrong"), 30)
    assert has_failed and set(found) == {"hanging", "fine", "wrong"}


# ---- wrong numbers


def correct_in_small(tmp_path, seconds: float = 60) -> dict[str, dict]:
    probe = Probe("correct", tmp_path / "stream", seconds, SimpleNamespace(device="cpu"))
    gpu_correct.correct(probe)
    records = map(json.loads, probe.stream.read_text().splitlines())
    return {record["name"]: record for record in records}


def test_a_wrong_attention_fails_all_that_it_is_part_of(tmp_path, monkeypatch):
    right = model.attend
    monkeypatch.setattr(model, "attend", lambda q, k, v, mask=None: right(q * 1.3, k, v, mask))
    found = correct_in_small(tmp_path)
    assert {name.split(",")[0]: record["ok"] for name, record in found.items()} == {
        "logits": False, "loss": True, "SFT step": False, "GRPO step": False, "sampler": False,
    }  # fmt: skip
    assert gpu.has_failed({"correct": list(found.values())})


def test_without_time_nothing_is_measured(tmp_path):
    found = correct_in_small(tmp_path, seconds=-1)
    assert len(found) == 16 and all(record["note"] == NO_TIME for record in found.values())


def test_nan_never_passes():
    nan, right = torch.tensor([1.0, float("nan")]), torch.ones(2)
    assert compared({"a": (right, right), "b": (nan, right)}, 1.0)["ok"] is False
    assert compared({"b": (nan, right), "a": (right, right)}, 1.0)["of"] == "b"
    found = compared({"a": (right * 1.01, right), "b": (right * 1.02, right)}, 0.1, a=0.001)
    assert found == {"relative_error": pytest.approx(0.01), "of": "a", "bound": 0.001, "ok": False}


def test_the_exit_status_is_about_right_and_wrong():
    slow = {"sft": [{"name": "x", "error": "out of memory"}], "correct": [{"name": "x", "note": NO_TIME}]}
    assert not gpu.has_failed(slow)
    assert gpu.has_failed(slow | {"attention": [{"name": "x", "ok": False}]})
    assert gpu.has_failed({"correct": [{"name": "x", "error": "out of memory"}]})


# ---- arithmetic


def test_a_section_gets_its_share_of_what_is_left():
    assert gpu.box(100.0, [1, 3]) == 25
    assert gpu.box(75.0, [3]) == 75
    assert gpu.box(-2.0, [1, 3]) == 0


def test_flops_of_training_by_hand():
    c = memory.known_config("Qwen/Qwen3-0.6B")
    # q, k, v and o: 1024 x (2048 + 1024) x 2; three of the MLP; two norms, and those of q and k
    layer = 1024 * 3072 * 2 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128
    parameters = 28 * layer + 1024 + 151936 * 1024
    assert parameters == 596_049_920  # the head is the embedding
    assert gpu_speed.training_flops(c, 2048) == 6 * parameters + 704_643_072 == 4_280_942_592
    # 4 x heads x D_head x length for the whole square forward, half of it, and twice that backward
    assert 704_643_072 == 28 * 16 * 128 * (4 * 2048 // 2) * 3


def test_cards():
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert gpu.slug("CPU") == "cpu"
    assert gpu_speed.has_known_peak("NVIDIA H200") and gpu_speed.has_known_peak("NVIDIA H100 80GB HBM3")
    assert not gpu_speed.has_known_peak("NVIDIA H100 PCIe") and not gpu_speed.has_known_peak("NVIDIA A100")


def test_a_table_has_a_row_for_every_measurement():
    text = gpu.table([
        {"section": "s", "name": "a", "ms": 1.23456, "ok": True, "seconds": 3.0},
        {"section": "s", "name": "b", "error": "of | no use"},
        {"section": "s", "name": "c", "ok": False, "note": "late"},
    ])  # fmt: skip
    assert text.splitlines()[0] == "|  | ms | ok | note |"
    assert text.splitlines()[2:] == [
        "| a | 1.235 | yes |  |", "| b |  |  | error: of / no use |", "| c |  | NO | late |"
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done():
    with pytest.raises(UserError, match="--device cpu"):
        gpu.main([])
