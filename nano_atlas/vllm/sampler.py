"""`VllmSampler`: the interface of `Sampler` for vLLM servers, and the seats that use it.

Every sync tags the servers' weights, and `generate` compares the tag before and after sampling. So the weight version of
a rollout is right even if a server was restarted in between.
"""

import os
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor

from nano_atlas import distributed
from nano_atlas.client import Client, ServerLost
from nano_atlas.errors import UserError, say
from nano_atlas.layout import Layout, gpus_of
from nano_atlas.model import Transformer
from nano_atlas.runs import find_checkpoint
from nano_atlas.sampler import Request, Rollout
from nano_atlas.seats import TokenSeat
from nano_atlas.terminal import Bar
from nano_atlas.tokenizer import Tokenizer
from nano_atlas.vllm.server import VllmServer
from nano_atlas.vllm.sync import FileTransfer, NcclTransfer, Parity

SHARED_MEMORY = Path("/dev/shm")
CONNECTIONS = 64  # parallel requests per server
# On a CPU vLLM computes either prompts or next tokens in a step, so each late request delays all others by a step: with
# MANY or more requests, a server is paused for GATHERING seconds until most of them have arrived.
MANY, GATHERING = 16, 0.15
TIMEOUT = 600.0  # seconds for one request
TRIES = 3  # of one call, each with a restarted server


class VllmSampler:
    """Samples from vLLM servers with the policy's weights, or a frozen model's (no `transfer`, no `parity`).

    urls: the servers, used in turn; empty on ranks of torchrun that only help to gather the weights. server: a
    `VllmServer` started here, which may be restarted. sleeps: `rest` frees the servers' GPU until their next use."""

    def __init__(self, urls: Sequence[str], server=None, transfer=None, parity=None, sleeps=False):
        self.server, self.transfer, self.parity, self.sleeps = server, transfer, parity, sleeps
        roots = (url.rstrip("/").removesuffix("/v1") for url in urls)
        self.clients = [Client(url, connections=CONNECTIONS + 1, timeout=TIMEOUT) for url in roots]
        self.context = min(map(context_of, self.clients), default=0)  # tokens
        self.weight_version, self.tag = 0, ""
        self._pool = ThreadPoolExecutor(max(1, CONNECTIONS * len(self.clients)))

    def generate(self, requests: Sequence[Request], progress: str | None = None) -> list[list[Rollout]]:
        """As `Sampler.generate`. Sends all requests again if a server was lost or had other weights."""
        needed = max((len(r.prompt_ids) + r.generation.max_tokens for r in requests), default=0)
        if needed > self.context:  # vLLM would truncate the answers
            raise UserError(f"{needed} tokens exceed the server's --max-model-len of {self.context}")

        def sample():
            for client in self._changed():
                self._load(client)
            is_held = self.server is not None and self.server.is_cpu and len(requests) >= MANY
            for client in self.clients if is_held else ():
                client.request("POST", "/pause?mode=keep&clear_cache=false")
            answers = self._pool.map(self._ask, requests, cycle(self.clients))
            if is_held:
                time.sleep(GATHERING)
                for client in self.clients:
                    client.request("POST", "/resume")
            groups = list(Bar(answers, progress, len(requests), disable=not progress, leave=False))
            if changed := self._changed():
                raise ServerLost(f"{changed[0].url} was restarted, or another run uses it")
            return groups

        return self._try(sample)

    def _ask(self, request: Request, client: Client) -> list[Rollout]:
        params = request.generation
        count = request.n if params.temperature else 1  # vLLM refuses several greedy samples
        drawing = {
            "n": count, "seed": request.seed % 2**62, "max_tokens": params.max_tokens, "temperature": params.temperature,
            "top_p": params.top_p, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0, "detokenize": False,
            "stop_token_ids": list(request.stop_token_ids), "ignore_eos": True,  # only these ids stop it
        }  # fmt: skip
        # token ids in and out: a third faster than /v1/completions, whose frontend decodes every token to text
        body = {"token_ids": list(request.prompt_ids), "sampling_params": drawing}
        choices = client.request("POST", "/inference/v1/generate", body, choices=count)["choices"]
        rollouts = []
        for choice in sorted(choices, key=lambda choice: choice["index"]) * (request.n // count):
            ids, scored, reason = choice["token_ids"], choice["logprobs"], choice["finish_reason"]
            if not ids or not scored or reason not in ("stop", "length"):
                raise ServerLost(f"{client.url} ended a completion after {len(ids)} tokens: {reason}")
            logprobs = [token["logprob"] for token in scored["content"]]
            rollouts.append(Rollout(request.prompt_ids, ids, logprobs, reason, self.weight_version))
        return rollouts

    def sync(self, model: Transformer, version: int) -> float:
        """Sends weights `version` to the servers; returns the parity difference (nats). Raises UserError."""
        self.parity.expect(model)
        self.transfer.stage(model)
        self.weight_version, self.tag = version, uuid.uuid4().hex
        return self._try(lambda: max(map(self._load, self.clients), default=0.0))

    def _load(self, client: Client) -> float:
        client.request("POST", "/pause?mode=wait")
        try:
            self.transfer.load(client)
            client.request("POST", "/reset_prefix_cache")  # keys and values of the old weights
            client.request("POST", "/update_weight_version", {"new_version": self.tag})
        finally:  # never leave a server paused
            with suppress(ServerLost):  # it would hide the first error
                client.request("POST", "/resume", tries=1, timeout=10.0)
        return self.parity.check(client.url, prompt_logprobs(client, self.parity.token_ids))

    def _changed(self) -> list[Client]:
        """The servers without the current weights."""
        tags = {c: c.request("GET", "/weight_info")["weight_version"] for c in self.clients if self.transfer}
        return [client for client, tag in tags.items() if tag != self.tag]

    def _try(self, action):
        """Runs `action`, and repeats it if a server is lost."""
        for tries_left in reversed(range(TRIES)):
            try:
                if self.sleeps:
                    torch.cuda.empty_cache()  # gives the trainer's unused memory to the server
                for client in self.clients if self.sleeps else ():
                    client.request("POST", "/wake_up")
                return action()
            except ServerLost as lost:
                if not tries_left or not (self.server or self.transfer):
                    raise
                say(f"recovering: {lost}")
            if self.server:
                self.server.restart()  # reads the checkpoint of the last sync, or the frozen model

    def rest(self) -> None:
        """Frees a GPU that is shared with the trainer until the next call, by vLLM's sleep mode."""
        for client in self.clients if self.sleeps else ():
            client.request("POST", "/sleep?level=1")

    def close(self) -> None:
        """Ends running requests of all threads, but not the servers."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for client in self.clients:
            client.close()


def prompt_logprobs(client: Client, token_ids: list[int]) -> Tensor:
    """The server's log-probs `[T - 1]` of all tokens after the first, at temperature 1; nats."""
    body = {"prompt": token_ids, "max_tokens": 1, "prompt_logprobs": 0}
    (choice,) = client.request("POST", "/v1/completions", body, choices=1)["choices"]
    scored = zip(choice["prompt_logprobs"][1:], token_ids[1:], strict=True)
    return torch.tensor([entry[str(token)]["logprob"] for entry, token in scored])


def context_of(client: Client) -> int:
    """The server's context length (tokens). Raises UserError if it was started without the needed flags."""
    with suppress(UserError, KeyError):
        config = client.request("GET", "/server_info?config_format=json")["vllm_config"]["model_config"]
        if config["logprobs_mode"] == "processed_logprobs":  # raw ones ignore the temperature
            return config["max_model_len"]
    flags = "VLLM_SERVER_DEV_MODE=1, --enable-scale-out, --logprobs-mode processed_logprobs (CPU: --no-enable-chunked-prefill)"
    raise UserError(f"{client.url} must be a running vLLM server, started with {flags}")


def open_policy(config, layout, policy: Transformer, tokenizer, version: int, stack: ExitStack) -> TokenSeat:
    """The policy's seat on `layout.urls` or on a new server; under torchrun only rank 0 has servers. Weights go by
    NCCL to a new server on GPUs of its own, unless adapted; else by file, in shared memory or OUT/served."""
    is_first, sleeps = distributed.rank() == 0, layout.policy in gpus_of(layout.server)
    is_nccl = layout.server.startswith("cuda") and not sleeps and distributed.size() == 1
    is_nccl = is_nccl and not config.lora_rank  # whose parameters would go as they are, not merged
    folder, server, urls = config.out / "served", None, layout.urls if is_first else ()
    if layout.server and is_first:  # a new private directory
        place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else config.out
        folder = Path(tempfile.mkdtemp(prefix="nano-atlas-", dir=place))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
    files = FileTransfer(folder / "model", tokenizer)
    if layout.server:
        files.stage(policy)  # the checkpoint that the server starts and restarts from
    if layout.server and is_first:
        options = ["--weight-transfer-config", '{"backend": "nccl"}'] if is_nccl else []
        options += ["--enable-sleep-mode"] if sleeps else []
        server = make_server(config, layout, layout.server, files.folder, "vllm.log", options, folder)
        urls = (stack.enter_context(server).url,)
    parity = Parity(policy.config.vocab_size, config.max_logp_diff)
    sampler = VllmSampler(urls, server, NcclTransfer() if is_nccl else files, parity, sleeps)
    stack.callback(sampler.close)
    difference = sampler.sync(policy, version)
    say(f"weights by {'NCCL' if is_nccl else 'file'}; the server differs by {difference:.1e} nats a token")
    return distributed.divide(TokenSeat(sampler, tokenizer), is_first_only=True)


def open_student(config, layout: Layout, stack: ExitStack) -> TokenSeat:
    server = make_server(config, layout, layout.student, find_checkpoint(config.student), "vllm_student.log")
    sampler = VllmSampler([stack.enter_context(server).url], server)
    stack.callback(sampler.close)
    return TokenSeat(sampler, Tokenizer.from_directory(config.student))


def make_server(config, layout: Layout, device, model, log: str, options=(), orphan="") -> VllmServer:
    """A server, not yet started. NANO_ATLAS_VLLM_ARGS come last and override the other options."""
    memory = ["--gpu-memory-utilization", str(memory_share(layout, device))] if device != "cpu" else []
    options = *memory, *options, *shlex.split(os.environ.get("NANO_ATLAS_VLLM_ARGS", ""))
    return VllmServer(model, config.out / log, device, config.dtype, options, orphan)


def memory_share(layout: Layout, device: str) -> float:
    """The share of the GPU's memory that vLLM may use: less if the trainer or the student is on the same GPU."""
    if layout.policy in gpus_of(device):
        return 0.35
    return 0.45 if layout.student in gpus_of(layout.server) else 0.9
