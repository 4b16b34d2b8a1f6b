"""The trainer's weights on their way to a vLLM server, and the proof that they have arrived.

Two ways with the same steps, `stage` on the trainer's side and `load` per server: `FileTransfer` writes a checkpoint that the server
reads again, `NcclTransfer` broadcasts from GPU to GPU. After each, `Parity` compares the log-probs of one sequence.
"""

import random
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import l1_loss

from nano_atlas.checkpoint import save_model
from nano_atlas.errors import UserError
from nano_atlas.loss import token_stats
from nano_atlas.model import PackedAttention, Transformer
from nano_atlas.seats import Client
from nano_atlas.tokenizer import Tokenizer

PROBE_TOKENS = 64


class FileTransfer:
    """A checkpoint in `folder`, best on shared memory, which servers of the same machine (or file system) read again.

    A tied head is in it twice. Otherwise vLLM on a CPU silently keeps the old head: it packs a tied head when it starts, and
    `reload_weights` packs it anew only where it meets `lm_head.weight`.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder, self.tokenizer = Path(folder).resolve(), tokenizer

    def stage(self, model: Transformer) -> None:
        """Replaces the checkpoint as a whole. Raises UserError where there is no room; the one before is then still there."""
        try:  # a file per tensor: never two of them in host memory
            save_model(self.folder, model, self.tokenizer, max_shard_bytes=0, repeat_tied_head=True)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write the server's weights to {self.folder}: {error}") from error

    def load(self, client: Client) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        client.request("POST", "/collective_rpc", body, tries=1)


class NcclTransfer:
    """vLLM's own weight transfer: a broadcast from the policy's GPU to the workers of one server, no file in between.

    Written against the trainer-side classes of vLLM 0.32 (`vllm/distributed/weight_transfer/nccl_engine.py`). **Not run with NCCL
    itself**, which takes two GPUs; the tests run the rest with a real server, and broadcast through a TCP store. The server must be
    started with `--weight-transfer-config '{"backend": "nccl"}'`.
    """

    def __init__(self):
        self.engine: Any = None
        self.staged: Transformer | None = None

    def stage(self, model: Transformer) -> None:
        self.staged = model  # the same each time

    @torch.no_grad()
    def load(self, client: Client) -> None:
        """Once per `stage`, because the trainer's weights move on. Raises UserError where they do not get there."""
        import requests  # through which vLLM's own client talks to the server

        if self.staged is None:
            raise UserError(f"{client.url} lost weights that went by NCCL; continue from the last state")
        try:
            self.engine = self.engine or self._connect(client, self.staged)
            self.staged = None
            self.engine.send_weights()
        except requests.RequestException as error:
            raise UserError(f"{client.url} did not take the weights: {error}; its log says more") from error

    def _connect(self, client: Client, model: Transformer) -> Any:
        from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource
        from vllm.distributed.weight_transfer import nccl_engine as nccl
        from vllm.utils.network_utils import get_ip, get_open_port

        ranks = 1 + client.request("GET", "/get_world_size")["world_size"]
        place = {"master_address": get_ip(), "master_port": get_open_port()}
        info = nccl.NCCLTrainerInitInfo(rank=0, world_size=ranks, **place)
        torch.cuda.set_device(model.head_weight.device)  # on which the communicator is opened
        ends = {"client": HTTPVLLMWeightSyncClient(client.url), "source": ModuleSource(model)}
        return nccl.NCCLTrainerWeightTransferEngine.trainer_init(info, **ends)


@torch.no_grad()
def sequence_logprobs(model: Transformer, token_ids: list[int]) -> Tensor:
    """Log-probs `[T - 1]`, float32, on the CPU, of each token but the first given those before it; nats."""
    device = model.head_weight.device
    attention = PackedAttention([len(token_ids)], device)
    hidden = model(torch.tensor(token_ids, device=device), attention.positions, attention)[:-1]
    return token_stats(hidden, model.head_weight, torch.tensor(token_ids[1:], device=device)).logprobs.cpu()


class Parity:
    """Compares trainer and server on a fixed sequence after each sync, and says which of the two is stale.

    The first comparison measures what their kernels differ by (float32: 1e-6 nats; bfloat16: some 1e-2). Later ones may come to
    `FACTOR` times that, at least to `FLOOR`. A server that gives bit for bit what it gave before is stale as soon as the trainer
    has moved by a hundredth of that since.
    """

    FACTOR, FLOOR = 5.0, 1e-4

    def __init__(self, vocab_size: int, largest_start: float):
        """largest_start: what the first comparison may come to (mean over tokens, nats)."""
        self.token_ids = random.Random(0).choices(range(vocab_size), k=PROBE_TOKENS)
        self.limit = largest_start
        # per server: the trainer's and the server's log-probs when the latter last changed
        self.before: dict[str, tuple[Tensor, Tensor]] = {}

    def check(self, url: str, trainer: Tensor, server: Tensor) -> float:
        """The mean absolute difference in nats. Raises UserError where it is too large."""
        difference = l1_loss(server, trainer).item()
        old_trainer, old_server = self.before.get(url, (trainer, server))
        is_same = torch.equal(server, old_server)
        is_unmoved = is_same and l1_loss(trainer, old_trainer).item() > self.limit / 100
        if is_unmoved or not difference <= self.limit:
            is_stale = is_unmoved or l1_loss(server, old_trainer).item() < difference
            found = "the weights from before" if is_stale else "other weights (on a CPU: an old tied head?)"
            said = f"{difference:.2g} nats a token on the same sequence ({self.limit:.2g} are allowed)"
            raise UserError(f"{url} and the trainer differ by {said}: the server has {found}")
        if not self.before:
            self.limit = min(self.limit, max(self.FLOOR, self.FACTOR * difference))
        if url not in self.before or not is_same:
            self.before[url] = trainer, server
        return difference
