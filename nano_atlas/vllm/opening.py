"""Seats on vLLM servers: the policy's and the frozen student's, with the servers that are started for them."""

import shlex
from contextlib import ExitStack
from pathlib import Path

from nano_atlas import distributed
from nano_atlas.config import derive_seed
from nano_atlas.layout import Layout
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
    server, urls = None, layout.urls if distributed.rank() == 0 else ()
    if layout.server:
        files.stage(policy)  # what the server starts from, and starts from again if it must
    if layout.server and distributed.rank() == 0:
        memory = 0.35 if is_shared else server_memory(layout)
        options = server_options(config, layout.server, memory)
        options += ["--weight-transfer-config", '{"backend": "nccl"}'] if is_nccl else []
        options += ["--enable-sleep-mode"] if is_shared else []
        log = config.out / "vllm.log"
        server = VllmServer(
            folder, log, device=layout.server, dtype=config.dtype, options=options, remove=remove
        )
        urls = (stack.enter_context(server).url,)
    transfer, parity = (
        NcclTransfer() if is_nccl else files,
        Parity(policy.config.vocab_size, config.max_logp_diff),
    )
    sampler = VllmSampler(urls, server=server, transfer=transfer, parity=parity, shares_gpu=is_shared)
    stack.callback(sampler.close)
    difference = sampler.sync(policy, version)
    print(
        f"weights by {'NCCL' if is_nccl else 'file'}; trainer and server differ by {difference:.1e} nats a token"
    )
    return distributed.divide(TokenSeat(sampler, tokenizer, thinking=config.thinking), is_first_only=True)


def open_served_student(config, layout: Layout, stack: ExitStack) -> TokenSeat:
    """The student's seat on a server of its own."""
    options = server_options(config, layout.student, server_memory(layout))
    log, device = config.out / "vllm_student.log", layout.student
    server = VllmServer(Path(config.student), log, device=device, dtype=config.dtype, options=options)
    sampler = VllmSampler([stack.enter_context(server).url], server=server)
    stack.callback(sampler.close)
    return TokenSeat(sampler, Tokenizer.from_directory(config.student), thinking=config.thinking)


def server_memory(layout: Layout) -> float:
    """Share of a GPU's memory that a server takes for weights and KV cache: half where both models share the GPU."""
    is_beside = layout.student_rollout in ("vllm", "embedded") and layout.serves_on(layout.student)
    return 0.45 if is_beside else 0.9


def server_options(config, device: str, memory: float) -> list[str]:
    limit = ["--gpu-memory-utilization", str(memory)] if device.startswith("cuda") else []
    return limit + shlex.split(config.vllm_args)
