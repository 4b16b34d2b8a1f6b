"""Seats on vLLM servers: the policy's and the frozen student's, with the servers that are started for them."""

import shlex
from contextlib import ExitStack
from pathlib import Path

from nano_atlas import distributed
from nano_atlas.config import derive_seed
from nano_atlas.layout import Layout, gpus_of
from nano_atlas.model import Transformer
from nano_atlas.seats import TokenSeat
from nano_atlas.tokenizer import Tokenizer
from nano_atlas.vllm.sampler import VllmSampler
from nano_atlas.vllm.server import VllmServer
from nano_atlas.vllm.sync import FileTransfer, NcclTransfer, Parity

SHARED_MEMORY = Path("/dev/shm")


def open_served_policy(
    config, layout: Layout, policy: Transformer, tokenizer: Tokenizer, version: int, stack: ExitStack
) -> TokenSeat:
    """The policy's seat on `layout.urls`, or on a server of its own; it has the weights of `policy` as `version`.

    Weights go by NCCL to an own server on GPUs that nothing trains on. Otherwise as a checkpoint: through shared memory to an own
    server, through OUT/served to others. Under torchrun rank 0 has the servers.
    """
    is_shared = layout.serves_on(layout.policy)  # then the server sleeps while the policy trains
    is_nccl = layout.server.startswith("cuda") and not is_shared and distributed.size() == 1
    folder, remove = config.out / "served", None
    if layout.server and SHARED_MEMORY.is_dir():
        remove = SHARED_MEMORY / f"nano-atlas-{derive_seed(str(config.out.resolve()))}"
        folder = remove / "model"
    files = FileTransfer(folder, tokenizer)
    if layout.server:
        files.stage(policy)  # what the server starts from, and starts from again if it must
    server, urls = None, layout.urls if distributed.rank() == 0 else ()
    if layout.server and distributed.rank() == 0:
        options = ["--weight-transfer-config", '{"backend": "nccl"}'] if is_nccl else []
        options += ["--enable-sleep-mode"] if is_shared else []
        server = make_server(config, layout, layout.server, folder, "vllm.log", options, remove)
        urls = (stack.enter_context(server).url,)
    parity = Parity(policy.config.vocab_size, config.max_logp_diff)
    sampler = VllmSampler(urls, server, NcclTransfer() if is_nccl else files, parity, is_shared)
    stack.callback(sampler.close)
    difference = sampler.sync(policy, version)
    print(f"weights by {'NCCL' if is_nccl else 'file'}; the server differs by {difference:.1e} nats a token")
    return distributed.divide(TokenSeat(sampler, tokenizer, thinking=config.thinking), is_first_only=True)


def open_served_student(config, layout: Layout, stack: ExitStack) -> TokenSeat:
    """The student's seat on a server of its own."""
    directory = Path(config.student)
    server = make_server(config, layout, layout.student, directory, "vllm_student.log")
    sampler = VllmSampler([stack.enter_context(server).url], server)
    stack.callback(sampler.close)
    return TokenSeat(sampler, Tokenizer.from_directory(directory), thinking=config.thinking)


def make_server(config, layout: Layout, device, model: Path, log: str, options=(), remove=None) -> VllmServer:
    """A server that is not started yet. The user's --vllm-args come last and override the others."""
    memory = ["--gpu-memory-utilization", str(memory_share(layout, device))] if device != "cpu" else []
    options = [*memory, *options, *shlex.split(config.vllm_args)]
    return VllmServer(model, config.out / log, device, config.dtype, options, remove)


def memory_share(layout: Layout, device: str) -> float:
    """The part of a GPU's memory that a server takes for weights and KV cache, beside the trainer, the student or nobody."""
    if layout.policy in gpus_of(device):
        return 0.35
    return 0.45 if layout.serves_on(layout.student) else 0.9
