"""What runs where: policy, student and reference on devices; sampling in this process or on vLLM servers.

Options that are "auto" are chosen for the machine, and the choice is printed.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from nano_atlas import distributed, functions, lora
from nano_atlas.checkpoint import load_model, read_config
from nano_atlas.config import option
from nano_atlas.errors import UserError, say
from nano_atlas.model import Transformer
from nano_atlas.sampler import Sampler
from nano_atlas.seats import Seat, TokenSeat, is_url, open_seat
from nano_atlas.tokenizer import Tokenizer

ROLLOUT = re.compile(r"embedded|vllm(?::(cpu|cuda:\d+(?:,\d+)*))?")
ROLLOUT_HELP = """who samples the policy. embedded: this process; vllm: a server started on the last GPU (NANO_ATLAS_VLLM_ARGS: more options for it);
vllm:cuda:6,7 or vllm:cpu: a server started there; URLs: running servers; auto: vllm if installed and with two GPUs, else embedded"""


@dataclass(frozen=True)
class LayoutConfig:
    device: str = option("auto", "device of the policy: cpu, cuda:1, ...", group="layout", resumable=True)
    optimizer_device: str = option("auto", "device of AdamW's state (12 bytes a parameter)", resumable=True)
    dtype: str = option("float32", "compute precision; AdamW's state is float32", ["float32", "bfloat16"])
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, 4/3 of the time")
    lora_rank: int = option(0, "train adapters of this rank (LoRA, ten times --lr); 0: all", at_least=0)
    thinking: bool = option(False, "use Qwen3's thinking mode, and record it in the checkpoint")
    cache_rows: int = option(256, "most sequences decoded at once, in this process", above=0, resumable=True)
    rollout: tuple[str, ...] = option(("auto",), ROLLOUT_HELP, group="vLLM", resumable=True)
    overlap: bool = option(False, "sample the next step while this one trains (vLLM only)")


@dataclass(frozen=True)
class Layout:
    policy: str
    student: str  # "": an endpoint, or no student
    student_server: bool  # whether a vLLM server is started for the student
    reference: str
    server: str = ""  # devices of the policy's vLLM server, if one is started here
    urls: tuple[str, ...] = ()  # the policy's vLLM servers, if they are already running


def gpus_of(devices: str) -> list[str]:
    """cuda:1,2 -> cuda:1 and cuda:2; cpu -> none."""
    kind, _, indices = devices.partition(":")
    return [f"cuda:{index}" for index in indices.split(",")] if kind == "cuda" else []


def choose_layout(config: LayoutConfig, student: str, kl: str, gpus: int | None = None) -> Layout:
    """Resolves "auto" options and prints the choice; student: checkpoint directory, URL or "". Raises UserError."""
    gpus = torch.cuda.device_count() if gpus is None else gpus
    is_alone, has_vllm = distributed.size() == 1, find_spec("vllm") is not None
    policy = distributed.device(config.device, gpus)
    others = [f"cuda:{index}" for index in range(gpus) if f"cuda:{index}" != policy]
    spare = others[-1] if others and is_alone else policy

    rollout = config.rollout
    if rollout == ("auto",):
        rollout = ("vllm",) if gpus > 1 and is_alone and has_vllm else ("embedded",)
    urls, asked = rollout if all(map(is_url, rollout)) else (), ROLLOUT.fullmatch(" ".join(rollout))
    if not urls and not asked:
        raise UserError(f"--rollout must be auto, embedded, vllm, vllm:DEVICE or URLs, not {rollout}")
    if rollout == ("vllm",) and gpus and not is_alone:
        raise UserError("under torchrun, name GPUs that do not train: --rollout vllm:cuda:6,7")
    server = "" if urls or rollout == ("embedded",) else asked[1] or spare
    for device in gpus_of(server):
        distributed.check_gpu(device, gpus)
    if config.overlap and not (server or urls):
        raise UserError("--overlap needs --rollout vllm; the embedded sampler shares the policy's weights")

    has_full_gpu = bool(server or urls) and gpus > 1 and is_alone  # vLLM preallocates its GPU's memory
    is_near = kl != "k3" or has_full_gpu or config.lora_rank  # an adapted policy is its own reference
    reference = policy if is_near else spare
    place = (spare, has_full_gpu and has_vllm) if student and not is_url(student) else ("", False)
    layout = Layout(policy, *place, reference, server, urls)
    sampling = f"vLLM on {server}" if server else "running vLLM servers" if urls else "this process"
    places = f"policy on {policy}, student on {place[0] or 'no device'}, reference on {reference}"
    say(f"{gpus} GPUs, vLLM {'is' if has_vllm else 'is not'} installed: {places}; {sampling} samples")
    return layout


def open_policy(config, layout, policy: Transformer, tokenizer, version: int, stack) -> TokenSeat:
    """The policy's seat, with the weights of `policy` as `version`. stack: ExitStack that stops started servers."""
    if layout.server or layout.urls:
        from nano_atlas.vllm import sampler

        return sampler.open_policy(config, layout, policy, tokenizer, version, stack)
    sampler = Sampler(distributed.whole_copy(policy), max_rows=config.cache_rows)
    sampler.sync(policy, version)
    return distributed.divide(TokenSeat(sampler, tokenizer))


def open_others(config, layout: Layout, stack) -> dict[str, Seat]:
    """The seats that are not trained: the frozen student and the verifier, if there are any. Raises UserError."""
    seats = functions.verifier_seat(config.verifier)
    if layout.student_server:
        from nano_atlas.vllm import sampler

        return seats | {"student": sampler.open_student(config, layout, stack)}
    if config.reward != "exact":
        where = layout.student, getattr(torch, config.dtype)
        seats["student"] = open_seat(config.student, *where, max_rows=config.cache_rows)
    return {name: distributed.divide(seat) for name, seat in seats.items()}


def open_reference(config, layout: Layout, start, policy: Transformer, tokenizer: Tokenizer):
    """The frozen model of the KL; None if its weight is 0. Raises UserError for one with other token ids."""
    if not config.beta:
        return None
    if config.lora_rank and not config.reference:
        return lora.WithoutAdapters(policy)
    if path := config.reference:
        own, other = tokenizer.backend.get_vocab(), Tokenizer.from_directory(path).backend.get_vocab()
        differ, rows = own.items() ^ other.items(), read_config(path).vocab_size
        needed = policy.config.vocab_size
        if differ or rows < needed:
            what = f"{len(differ)} tokens differ, {rows:,} logits for the policy's {needed:,}"
            fault = f"--reference {path} needs the policy's tokenizer ({what})"
            raise UserError(f"{fault}: choose one of its family")
    return load_model(path or start, getattr(torch, config.dtype), layout.reference)


class Pipeline:
    """The batch of each step; is_ahead: it is sampled while the one before trains, from weights one update old."""

    def __init__(self, produce, sampler, last_step: int, is_ahead: bool):
        self.produce, self.sampler, self.last_step, self.is_ahead = produce, sampler, last_step, is_ahead
        self.thread, self.upcoming = ThreadPoolExecutor(1), None

    def take(self, step: int) -> tuple:
        """-> the batch, and whether the current weights drew it."""
        is_fresh = self.upcoming is None
        batch = self.produce(step) if is_fresh else self.upcoming.result()
        self.upcoming = None
        if self.is_ahead and step < self.last_step:
            self.upcoming = self.thread.submit(self.produce, step + 1)
        else:
            self.sampler.rest()
        return batch, is_fresh

    def sync(self, policy: Transformer, version: int) -> float:
        """Gives the sampler the weights, after any running sampling; returns the parity difference (nats)."""
        if self.upcoming is not None:
            self.upcoming.result()
        return self.sampler.sync(policy, version)
