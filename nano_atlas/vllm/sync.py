"""Sends the trainer's weights to vLLM servers, by file or NCCL, and checks that they have arrived.

A transfer has two steps: `stage` in the trainer, and `load` per server. Then `Parity` compares log-probs of a sequence.
"""

import random
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import l1_loss

from nano_atlas.checkpoint import save_model
from nano_atlas.client import Client
from nano_atlas.errors import UserError
from nano_atlas.loss import token_stats
from nano_atlas.model import PackedAttention, Transformer
from nano_atlas.tokenizer import Tokenizer


class FileTransfer:
    """A checkpoint in `folder`, which servers on the same machine (or file system) reload. A tied head is stored twice:
    without `lm_head.weight`, vLLM on a CPU silently keeps its first head."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder, self.tokenizer = Path(folder).resolve(), tokenizer

    def stage(self, model: Transformer) -> None:
        """Replaces the checkpoint atomically. Raises UserError if it cannot be written."""
        try:  # a file per tensor: never two of them in host memory
            kept = {"max_shard_bytes": 0, "repeat_tied_head": True, "has_digests": False}
            save_model(self.folder, model, self.tokenizer, **kept)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the server's weights to {self.folder}: {error}") from error

    def load(self, client: Client) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        client.request("POST", "/collective_rpc", body, tries=1)


class NcclTransfer:
    """vLLM's own weight transfer: a broadcast from the policy's GPU to the workers of one server. Written for vLLM 0.32
    (`vllm/distributed/weight_transfer/nccl_engine.py`). **Not yet run with NCCL**, which needs two GPUs; the tests use a
    real server, and broadcast through a TCP store."""

    engine, staged = None, None  # vLLM's sending side; the model, until it is sent

    def stage(self, model: Transformer) -> None:
        self.staged = model

    @torch.no_grad()
    def load(self, client: Client) -> None:
        """Only once per `stage`, because the trainer's weights change. Raises UserError."""
        model, self.staged = self.staged, None
        if model is None:
            raise UserError(f"{client.url} lost weights that went by NCCL; continue from the last state")
        try:
            self.engine = self.engine or connect(client, model)
            self.engine.send_weights()
        except OSError as error:  # also of vLLM's own client
            raise UserError(f"{client.url} did not take the weights: {error}; its log says more") from error


def connect(client: Client, model: Transformer):
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource, nccl_engine
    from vllm.utils.network_utils import get_ip, get_open_port

    ranks = 1 + client.request("GET", "/get_world_size")["world_size"]
    info = nccl_engine.NCCLTrainerInitInfo(get_ip(), get_open_port(), ranks, rank=0)
    torch.cuda.set_device(model.head_weight.device)  # the GPU of the communicator
    ends = {"client": HTTPVLLMWeightSyncClient(client.url), "source": ModuleSource(model)}
    return nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(info, **ends)


class Parity:
    """Compares trainer and server on a fixed sequence after each sync. limit: largest difference (mean over tokens,
    nats). The first one measures the difference of the kernels (float32: 1e-6; bfloat16: about 1e-2); later ones may be
    five times as large. A server whose log-probs stay the same is stale if the trainer's change by over limit / 100."""

    TOKENS, FACTOR, FLOOR = 64, 5.0, 1e-4

    def __init__(self, vocab_size: int, limit: float):
        self.token_ids, self.limit = random.Random(0).choices(range(vocab_size), k=self.TOKENS), limit
        self.trainer = torch.zeros(0)  # its log-probs of the sequence, `[TOKENS - 1]` float32 on the CPU
        self.before = {}  # by URL: (trainer's, server's) log-probs when the server's last changed

    @torch.no_grad()
    def expect(self, model: Transformer) -> None:
        """Sets the weights that the servers should have from now on."""
        device = model.head_weight.device
        attention, ids = PackedAttention([self.TOKENS], device), torch.tensor(self.token_ids, device=device)
        hidden = model(ids, attention.positions, attention)[:-1]
        self.trainer = token_stats(hidden, model.head_weight, ids[1:]).logprobs.cpu()

    def check(self, url: str, server: Tensor) -> float:
        """The difference to the server's log-probs `[TOKENS - 1]` (nats). Raises UserError if it is too large."""
        difference, is_first = l1_loss(server, self.trainer).item(), not self.before
        old_trainer, old_server = self.before.setdefault(url, (self.trainer, server))
        is_same = torch.equal(server, old_server)
        is_unmoved = is_same and l1_loss(self.trainer, old_trainer).item() > self.limit / 100
        if is_unmoved or not difference <= self.limit:
            is_stale = is_unmoved or l1_loss(server, old_trainer).item() < difference
            found = "the weights from before" if is_stale else "other weights (on a CPU: an old tied head?)"
            said = f"{difference:.2g} nats a token on the same sequence ({self.limit:.2g} are allowed)"
            raise UserError(f"{url} and the trainer differ by {said}: the server has {found}")
        if is_first:
            self.limit = min(self.limit, max(self.FLOOR, self.FACTOR * difference))
        if not is_same:
            self.before[url] = self.trainer, server
        return difference
