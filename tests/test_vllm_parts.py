"""The parts of the vLLM wing that need no vLLM: the supervisor, a failing start, a full disk, who is stale."""

import random
import resource
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer
from safetensors.torch import load_file

from benchmarks.pretrain import initialize
from nano_atlas.checkpoint import with_tied_head
from nano_atlas.errors import UserError
from nano_atlas.layout import Layout
from nano_atlas.model import ModelConfig, Transformer
from nano_atlas.sampler import Generation, Request
from nano_atlas.vllm import sampler as sampler_room
from nano_atlas.vllm import server as server_room
from nano_atlas.vllm.sampler import make_server
from nano_atlas.vllm.server import VllmServer
from nano_atlas.vllm.sync import FileTransfer, Parity

SUPERVISOR = Path(server_room.__file__).with_name("supervisor.py")


def random_model(seed: int, width: int = 48) -> Transformer:
    vocabulary = byte_tokenizer().vocab_size
    model = initialize(Transformer(ModelConfig("qwen3", vocabulary, width, 64, 2, 4, 2, 32, max_position_embeddings=512, qk_norm=True,
                                    tie_word_embeddings=True)), seed)  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 10 if parameter.ndim == 2 else 1  # away from uniform distributions
    return model


def gone(pid: int) -> bool:
    """Ended; a zombie that nobody has waited for counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


@pytest.mark.processes
def test_nothing_is_left_behind_when_the_parent_is_killed(tmp_path):
    """The parent dies by kill -9; its server's child, which ignores SIGTERM, and the directory in shared memory go too."""
    pids, folder = tmp_path / "pids", tmp_path / "shared"
    folder.mkdir()
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    server = (f"import os, subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {stubborn!r}]); "
              f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}\\n'); child.wait()")  # fmt: skip
    command = [sys.executable, "-I", str(SUPERVISOR), str(folder), sys.executable, "-c", server]
    popen = f"import subprocess; subprocess.Popen({command!r}, stdin=-1).wait()"
    parent = subprocess.Popen([sys.executable, "-c", popen])
    assert wait_for(lambda: pids.exists() and pids.read_text().endswith("\n"))
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    assert wait_for(lambda: all(gone(int(pid)) for pid in pids.read_text().split()) and not folder.exists())


@pytest.mark.processes
def test_a_server_that_does_not_start_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(server_room, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="no vLLM here: pip install"):
        VllmServer(tmp_path, tmp_path / "log")
    monkeypatch.setattr(server_room, "find_spec", lambda name: "found")
    server = VllmServer(tmp_path, tmp_path / "log")
    failing = "print('loading'); raise MemoryError('no room for the KV cache')"
    server._command = [sys.executable, "-c", failing]
    with pytest.raises(UserError, match=r"the vLLM server ended.*\n  MemoryError: no room for the KV cache"):
        server.start()
    assert "loading" in (tmp_path / "log").read_text()
    server._command = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(server_room, "PATIENCE", 1.0)
    with pytest.raises(UserError, match="did not come up in time"):
        server.start()


def option_of(server: VllmServer, flag: str) -> str:
    """The last value that the server is given, which is the one it takes."""
    command = list(map(str, server._command))
    return command[len(command) - command[::-1].index(flag)]


def test_a_server_gets_its_gpus_and_not_the_trainers_allocator(tmp_path, monkeypatch):
    """vLLM's sleep mode cannot give memory back from expandable segments; a setting of the user's own is left as it is."""
    monkeypatch.setattr(server_room, "find_spec", lambda name: "found")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    for device, visible in (("cuda:1,2", "5,6"), ("cuda:0", "4"), ("cpu", "4,5,6")):
        server = VllmServer(tmp_path, tmp_path / "log", device)
        assert server._environment["CUDA_VISIBLE_DEVICES"] == visible
        assert "PYTORCH_CUDA_ALLOC_CONF" not in server._environment
        assert server._environment["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:128"
        if device != "cpu":
            assert option_of(server, "--tensor-parallel-size") == str(len(visible.split(",")))


def test_a_servers_port_is_none_that_another_program_is_given_meanwhile(monkeypatch):
    first = server_room.free_port()
    assert 20_000 <= first < 32_768
    with socket.create_server(("127.0.0.1", first)):
        second = iter([[first, first + 1], [first]])
        monkeypatch.setattr(random.SystemRandom, "sample", lambda *_: next(second))
        assert server_room.free_port() == first + 1
        with pytest.raises(UserError, match="no free port"):
            server_room.free_port()


def test_the_users_options_for_vllm_come_last(tmp_path, monkeypatch):
    monkeypatch.setattr(server_room, "find_spec", lambda name: "found")
    monkeypatch.setenv("NANO_ATLAS_VLLM_ARGS", "--gpu-memory-utilization 0.6 --served-model-name 'my model'")
    config = SimpleNamespace(out=tmp_path, dtype="bfloat16")
    server = make_server(
        config, Layout("cuda:0", "", False, "cuda:0", "cuda:1"), "cuda:1", "model", "vllm.log"
    )
    assert option_of(server, "--gpu-memory-utilization") == "0.6"
    assert option_of(server, "--served-model-name") == "my model"


def test_a_full_disk_at_sync_leaves_the_checkpoint_before(tmp_path):
    """A limit on file sizes stands in for the full disk: to the writer it is the same failing write."""
    transfer, old = FileTransfer(tmp_path / "served", byte_tokenizer()), random_model(1)
    transfer.stage(old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write the server's weights to .*served: "):
            transfer.stage(random_model(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
    served = {}
    for file in (tmp_path / "served").glob("*.safetensors"):
        served |= load_file(file)
    expected = dict(with_tied_head(old.named_parameters(), old.config))
    assert served.keys() == expected.keys()
    assert all(torch.equal(served[name], weight) for name, weight in expected.items())


def test_parity_tells_which_side_is_stale():
    (old, new), parity = torch.randn(2, 63).double(), Parity(100, 0.1)

    def check(trainer, server, parity=parity):
        parity.trainer = trainer
        return parity.check("a", server)

    check(old, old + 0.001)
    assert parity.limit == pytest.approx(0.005)  # five times what the kernels differ by
    server = old + 0.004
    check(old, server)
    with pytest.raises(UserError, match="the server has the weights from before"):
        check(new, old + 0.003)
    with pytest.raises(UserError, match="the server has the weights from before"):
        for _ in range(5):  # the trainer moves by less than the noise each time, the server not at all
            old = old + 2e-5
            check(old, server)
    assert check(old, old + 0.003) == pytest.approx(0.003)  # it moves with the trainer: fine again
    for trainer, server, judge, said in (
        (new, new + 2 * (new - old), parity, "the server has other weights"),
        (old, new, Parity(100, 0.1), "the server has other weights"),
        (old, new * torch.nan, Parity(100, 0.1), "differ by nan"),
    ):
        with pytest.raises(UserError, match=said):
            check(trainer, server, judge)


def test_weights_in_shared_memory_are_for_one_user_and_no_link_of_another_is_followed(tmp_path, monkeypatch):
    """The name is new each time, so nobody can put a link there first; and it is gone even where the server does not start."""
    model, seen = random_model(0), []
    config = SimpleNamespace(out=tmp_path / "out", max_logp_diff=0.1)
    layout = Layout("cpu", "cpu", False, "cpu", server="cpu")

    def server_that_fails(config, layout, device, weights, log, options, folder):
        seen.append(
            (folder, oct(folder.stat().st_mode & 0o777), sorted(path.name for path in weights.iterdir()))
        )
        raise UserError("no server")

    monkeypatch.setattr(sampler_room, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setattr(sampler_room, "make_server", server_that_fails)
    (tmp_path / "shm").mkdir()
    for _ in range(2):
        with pytest.raises(UserError, match="no server"), ExitStack() as stack:
            sampler_room.open_policy(config, layout, model, byte_tokenizer(), 0, stack)
    (first, mode, weights), (second, *_) = seen
    assert (
        mode == "0o700" and "config.json" in weights and first != second and first.parent == tmp_path / "shm"
    )
    assert list((tmp_path / "shm").iterdir()) == []


@pytest.mark.parametrize(
    ("count", "is_cpu", "is_held"), [(16, True, True), (15, True, False), (64, False, False)]
)
def test_a_server_on_a_cpu_begins_when_most_of_many_requests_are_there(monkeypatch, count, is_cpu, is_held):
    calls = []
    sampler = sampler_room.VllmSampler([], server=SimpleNamespace(is_cpu=is_cpu))
    sampler.context, sampler.clients = 100, [SimpleNamespace(request=lambda method, path: calls.append(path))]
    monkeypatch.setattr(sampler, "_ask", lambda request, client: calls.append("asked") or [])
    assert sampler.generate([Request((1,), Generation(2))] * count) == [[]] * count
    around = ["/pause?mode=keep&clear_cache=false", "/resume"] if is_held else []
    assert [path for path in calls if path != "asked"] == around and calls.count("asked") == count
    assert not is_held or (calls[0], calls[-1]) == tuple(around)
