"""What runs where: policy, student and reference on devices, sampling in this process or on vLLM servers.

Everything may be left on "auto"; the choice follows from what is there, and is printed with its reason.
"""

import hashlib
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from nano_atlas import distributed
from nano_atlas.checkpoint import is_checkpoint, load_model
from nano_atlas.config import option
from nano_atlas.errors import UserError
from nano_atlas.model import Transformer
from nano_atlas.seats import EmbeddedSeat, EndpointSeat, Seat, TokenSeat, is_url
from nano_atlas.tokenizer import Tokenizer
from nano_atlas.vllm.sampler import VllmSampler
from nano_atlas.vllm.server import VllmServer
from nano_atlas.vllm.sync import FileTransfer, NcclTransfer, Parity

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class LayoutConfig:
    device: str = option(
        "auto", "where the policy is trained: cpu, cuda, cuda:1, ...", group="layout", resumable=True
    )
    student_device: str = option(
        "auto",
        "where the student is sampled; auto: a second GPU if there is one, else --device",
        resumable=True,
    )
    reference_device: str = option(
        "auto", "where the reference is; auto: beside the student (the policy for --kl exact)", resumable=True
    )
    optimizer_device: str = option(
        "auto",
        "where masters and moments are (12 bytes per parameter); auto: beside the policy",
        resumable=True,
    )
    dtype: str = option(
        "float32", "compute precision; masters and moments are float32 always", ["float32", "bfloat16"]
    )
    gradient_checkpointing: bool = option(
        False,
        "keep one activation per layer and recompute the rest: less memory, 4/3 the time",
        resumable=True,
    )
    thinking: bool = option(
        False, "render prompts with Qwen3's thinking mode on; other chat templates ignore it"
    )
    cache_rows: int = option(
        256,
        "most sequences decoded at once by each sampler in this process (KV cache memory)",
        resumable=True,
    )

    rollout: str = option("auto", "who samples the policy: this process (embedded) or vLLM; auto: vLLM with a --vllm-url, or with 2 "
                          "GPUs where it is installed", ["auto", "embedded", "vllm"], group="vLLM", resumable=True)  # fmt: skip
    student_rollout: str = option(
        "auto",
        "who samples a --student directory; auto: as the policy on a GPU, else embedded",
        ["auto", "embedded", "vllm"],
        resumable=True,
    )
    vllm_url: tuple[str, ...] = option(
        (), "running servers to sample the policy on, instead of one started here", resumable=True
    )
    vllm_device: str = option(
        "auto", "where the policy's server runs: cpu, cuda:1, cuda:1,2; auto: the last GPU", resumable=True
    )
    vllm_args: str = option(
        "", "options for servers started here: --vllm-args='--tensor-parallel-size 2'", resumable=True
    )
    vllm_timeout: float = option(
        600.0, "seconds within which a server must answer one request", resumable=True
    )
    weight_sync: str = option("auto", "how a server gets new weights: nccl (GPU to GPU) or file; auto: nccl to one that is started here "
                              "on a GPU of its own", ["auto", "nccl", "file"], resumable=True)  # fmt: skip
    sync_dir: Path | None = option(None, "where --weight-sync file writes; default: shared memory for a server started here, else in "
                                   "--out", resumable=True)  # fmt: skip
    overlap: bool = option(
        False, "sample the next step while this one trains: its weights are one update old (vLLM only)"
    )


@dataclass(frozen=True)
class Layout:
    policy: str
    student: str
    reference: str
    rollout: str  # "embedded" | "vllm"
    server: str  # device of the policy's server, if one is started here
    student_rollout: str  # "embedded" | "vllm" | "endpoint" | "none"

    @property
    def shares_gpu(self) -> bool:
        return self.server == self.policy and self.server.startswith("cuda")

    @property
    def server_memory(
        self,
    ) -> float:  # share of a GPU, for weights and KV cache; the student may need as much
        return 0.45 if self.student_rollout in ("vllm", "embedded") and self.student == self.server else 0.9


def choose_layout(
    config: LayoutConfig, student: str, needs_student: bool, kl: str, gpus: int | None = None
) -> Layout:
    """Fills in what is "auto" and prints the choice. Raises UserError for what is not there or does not go together."""
    gpus, is_alone = torch.cuda.device_count() if gpus is None else gpus, distributed.size() == 1
    policy = distributed.device(config.device, gpus)
    last = f"cuda:{gpus - 1}" if gpus and is_alone else policy
    has_vllm = find_spec("vllm") is not None
    rollout, reason = config.rollout, "as asked"
    if rollout == "auto":
        reasons = {
            "a --vllm-url is given": bool(config.vllm_url),
            f"there are {gpus} GPUs, one to train and one to sample": gpus > 1 and has_vllm and is_alone,
        }
        reason = next((text for text, holds in reasons.items() if holds), None)
        rollout, reason = (
            ("vllm", reason)
            if reason
            else ("embedded", f"{gpus} GPUs, vLLM {'is' if has_vllm else 'not'} installed")
        )
    server = ""
    if rollout == "vllm" and not config.vllm_url:
        server = config.vllm_device if config.vllm_device != "auto" else last
        if gpus and not is_alone and config.vllm_device == "auto":
            raise UserError(
                "under torchrun name the server's GPUs, which no process trains on: --vllm-device cuda:6,7"
            )
    student_device = (
        last if config.student_device == "auto" else distributed.device(config.student_device, gpus)
    )
    student_rollout = config.student_rollout
    if not needs_student or is_url(student):
        student_rollout = "endpoint" if needs_student else "none"
    elif student_rollout == "auto":
        student_rollout = "vllm" if rollout == "vllm" and gpus > 1 and is_alone else "embedded"
    if not is_alone and (student_rollout == "vllm" or config.weight_sync == "nccl"):
        raise UserError(
            "under torchrun the student is embedded or a URL, and weights go to vLLM with --weight-sync file"
        )
    is_crowded = rollout == "vllm" and gpus > 1 and is_alone  # a server takes what memory its GPU has
    beside = policy if kl == "exact" or is_crowded else student_device
    reference = (
        beside if config.reference_device == "auto" else distributed.device(config.reference_device, gpus)
    )
    if kl == "exact" and reference != policy:
        raise UserError(
            f"--kl exact compares whole distributions: the reference must be on {policy}, the policy's device"
        )
    for index in filter(None, server.partition(":")[2].split(",")):
        distributed.check_gpu(f"cuda:{index}", gpus)
    if config.overlap and rollout == "embedded":
        raise UserError(
            "--overlap needs --rollout vllm: the embedded sampler's weights are the trainer's, which change as it trains"
        )
    if config.vllm_url and rollout == "embedded":
        raise UserError("--vllm-url has no effect with --rollout embedded")
    place = (
        f"vLLM at {', '.join(config.vllm_url)}"
        if config.vllm_url
        else f"vLLM on {server}"
        if server
        else "this process"
    )
    print(f"policy trained on {policy} and sampled by {place} ({reason}); student: {student_rollout} on "
          f"{student if student_rollout == 'endpoint' else student_device}; reference on {reference}")  # fmt: skip
    return Layout(policy, student_device, reference, rollout, server, student_rollout)


def load(path: str | Path, device: str, dtype: str, made_by: str) -> Transformer:
    if not is_checkpoint(path):
        raise UserError(f"no model at {path}; {made_by}")
    return load_model(path, dtype=getattr(torch, dtype), device=device)


def open_policy(
    config, layout: Layout, policy: Transformer, tokenizer: Tokenizer, version: int, stack: ExitStack
) -> TokenSeat:
    """The policy's seat; its sampler has the weights of `policy` as `version`. What was started ends with `stack`."""
    if layout.rollout == "embedded":
        whole = distributed.whole_copy(policy)
        seat = EmbeddedSeat(whole, tokenizer, thinking=config.thinking, max_rows=config.cache_rows)
        seat.sampler.sync(policy, version)
        return distributed.divide(seat)
    is_own = bool(layout.server)
    method = config.weight_sync
    if method == "auto":
        is_apart = is_own and not layout.shares_gpu and layout.server.startswith("cuda")
        method = "nccl" if is_apart and distributed.size() == 1 else "file"
    folder, remove = config.sync_dir or config.out / "served", None
    if is_own and config.sync_dir is None and SHARED_MEMORY.is_dir():
        remove = (
            SHARED_MEMORY
            / f"nano-atlas-{hashlib.sha256(str(config.out.resolve()).encode()).hexdigest()[:12]}"
        )
        folder = remove / "model"
    files = FileTransfer(folder, tokenizer)
    server, urls = None, config.vllm_url if distributed.rank() == 0 else ()
    if is_own:
        files.stage(policy)  # what the server starts from, and starts from again if it must
    if is_own and distributed.rank() == 0:
        memory = 0.35 if layout.shares_gpu else layout.server_memory
        options = ["--weight-transfer-config", '{"backend": "nccl"}'] if method == "nccl" else []
        options += ["--enable-sleep-mode"] if layout.shares_gpu else []
        server = stack.enter_context(
            start_server(config, layout.server, folder, "vllm.log", memory, options, remove)
        )
        urls = (server.url,)
    sampler = VllmSampler(
        urls, server=server, transfer=files if method == "file" else NcclTransfer(), timeout=config.vllm_timeout,
        parity=Parity(policy.config.vocab_size, config.max_logp_diff), shares_gpu=layout.shares_gpu,
    )  # fmt: skip
    stack.callback(sampler.close)
    difference = sampler.sync(policy, version)
    print(
        f"weights by {method}; trainer and server differ by {difference:.1e} nats a token (allowed: {sampler.parity.limit:.1e})"
    )
    return distributed.divide(TokenSeat(sampler, tokenizer, thinking=config.thinking), is_first_only=True)


def open_student(config, layout: Layout, stack: ExitStack) -> Seat:
    if layout.student_rollout == "endpoint":
        return distributed.divide(
            EndpointSeat(config.student, config.student_model or None, timeout=config.vllm_timeout)
        )
    if layout.student_rollout == "embedded":
        frozen = load(
            config.student,
            layout.student,
            config.dtype,
            "name the student's checkpoint directory with --student",
        )
        tokenizer = Tokenizer.from_directory(config.student)
        return distributed.divide(
            EmbeddedSeat(frozen, tokenizer, thinking=config.thinking, max_rows=config.cache_rows)
        )
    model = Path(config.student)
    server = stack.enter_context(
        start_server(config, layout.student, model, "vllm_student.log", layout.server_memory)
    )
    sampler = VllmSampler((server.url,), server=server, timeout=config.vllm_timeout)
    stack.callback(sampler.close)
    return TokenSeat(sampler, Tokenizer.from_directory(config.student), thinking=config.thinking)


def start_server(config, device: str, model: Path, log: str, memory: float, options: Sequence[str] = (),
                 remove: Path | None = None) -> VllmServer:  # fmt: skip
    """memory: share of the GPU's memory that the server takes for weights and KV cache."""
    options = [*(["--gpu-memory-utilization", str(memory)] if device.startswith("cuda") else []), *options]
    options += shlex.split(config.vllm_args)
    return VllmServer(
        model, config.out / log, device=device, dtype=config.dtype, options=options, remove=remove
    )
