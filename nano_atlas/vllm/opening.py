"""Seats on vLLM servers: the policy's and the frozen student's, with the servers that are started for them."""

import hashlib
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from nano_atlas import distributed
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

    Weights go by NCCL to an own server on GPUs that nothing trains on, else as a checkpoint, which is in shared memory for an own
    server and in OUT/served for others. Under torchrun rank 0 has the servers.
    """
    is_shared = layout.serves_on(layout.policy)  # the server sleeps while the policy trains
    is_nccl = layout.server.startswith("cuda") and not is_shared and distributed.size() == 1
    folder, remove = config.out / "served", None
    if layout.server and SHARED_MEMORY.is_dir():
        digest = hashlib.sha256(str(config.out.resolve()).encode()).hexdigest()
        remove = SHARED_MEMORY / f"nano-atlas-{digest[:12]}"
        folder = remove / "model"
    files = FileTransfer(folder, tokenizer)
    server, urls = None, layout.urls if distributed.rank() == 0 else ()
    if layout.server:
        files.stage(policy)  # what the server starts from, and starts from again if it must
    if layout.server and distributed.rank() == 0:
        options = ["--weight-transfer-config", '{"backend": "nccl"}'] if is_nccl else []
        options += ["--enable-sleep-mode"] if is_shared else []
        memory = 0.35 if is_shared else server_memory(layout)
        server = start_server(config, layout.server, folder, "vllm.log", memory, options, remove)
        stack.enter_context(server)
        urls = (server.url,)
    sampler = VllmSampler(
        urls, server=server, transfer=NcclTransfer() if is_nccl else files, shares_gpu=is_shared,
        parity=Parity(policy.config.vocab_size, config.max_logp_diff),
    )  # fmt: skip
    stack.callback(sampler.close)
    difference = sampler.sync(policy, version)
    print(f"weights by {'nccl' if is_nccl else 'file'}; trainer and server differ by {difference:.1e} nats a token (allowed: "
          f"{sampler.parity.limit:.1e})")  # fmt: skip
    return distributed.divide(TokenSeat(sampler, tokenizer, thinking=config.thinking), is_first_only=True)


def open_served_student(config, layout: Layout, stack: ExitStack) -> TokenSeat:
    """The student's seat on a server of its own."""
    server = start_server(
        config, layout.student, Path(config.student), "vllm_student.log", server_memory(layout)
    )
    stack.enter_context(server)
    sampler = VllmSampler((server.url,), server=server)
    stack.callback(sampler.close)
    return TokenSeat(sampler, Tokenizer.from_directory(config.student), thinking=config.thinking)


def server_memory(layout: Layout) -> float:
    """Share of a GPU's memory that a server takes for weights and KV cache: half where both models share the GPU."""
    is_beside = layout.student_rollout in ("vllm", "embedded") and layout.serves_on(layout.student)
    return 0.45 if is_beside else 0.9


def start_server(config, device: str, model: Path, log: str, memory: float, options: Sequence[str] = (),
                 remove: Path | None = None) -> VllmServer:  # fmt: skip
    """A server to enter: it starts then. The user's options come last and override ours."""
    options = [*(["--gpu-memory-utilization", str(memory)] if device.startswith("cuda") else []), *options]
    options += shlex.split(config.vllm_args)
    return VllmServer(
        model, config.out / log, device=device, dtype=config.dtype, options=options, remove=remove
    )
