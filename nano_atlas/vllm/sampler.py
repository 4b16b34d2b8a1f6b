"""`VllmSampler`: the interface of `Sampler` in front of vLLM servers. Token ids in, token ids and log-probs out.

Each request is one HTTP request (its `n` samples share the prefill), and many are under way at once. Every sync puts a tag on the
servers' weights; it is compared before and after each `generate`. So no rollout carries the version of weights that it was not
drawn with, even where somebody has restarted a server in between.
"""

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nano_atlas.errors import UserError
from nano_atlas.model import Transformer
from nano_atlas.sampler import Request, Rollout
from nano_atlas.seats import Client, ServerLost
from nano_atlas.vllm.server import VllmServer
from nano_atlas.vllm.sync import FileTransfer, NcclTransfer, Parity, sequence_logprobs

CONNECTIONS = 64  # requests under way per server
TIMEOUT = 600.0  # seconds within which a server must answer one request
RECOVERIES = 2  # within one call, before giving up


class VllmSampler:
    """Samples from vLLM servers that hold the policy's weights (`transfer` and `parity` given) or a frozen model's (neither).

    urls: the servers, which take turns; none on ranks of torchrun that only take part in gathering the weights. server: the one
    that was started here and may be restarted. shares_gpu: the servers sleep between `rest` and their next use. Raises UserError
    where a server is not as this needs it.
    """

    def __init__(
        self,
        urls: Sequence[str],
        server: VllmServer | None = None,
        transfer: FileTransfer | NcclTransfer | None = None,
        parity: Parity | None = None,
        shares_gpu: bool = False,
    ):
        self.server, self.transfer, self.parity, self.shares_gpu = server, transfer, parity, shares_gpu
        self.clients = [Client(url, connections=CONNECTIONS, timeout=TIMEOUT) for url in urls]
        self.context = min(map(context_of, self.clients), default=0)  # tokens
        self.weight_version, self.tag, self.is_asleep = 0, "", False
        self._trainer_logprobs: Tensor | None = None

    def generate(self, requests: Sequence[Request], progress: str | None = None) -> list[list[Rollout]]:
        """`request.n` rollouts per request, in order; `progress` labels a progress bar. Raises UserError for a bad request.

        Where a server is lost and can be replaced, or turns out to have had other weights, all requests are sent again.
        """
        needed = max((len(r.prompt_ids) + r.params.max_tokens for r in requests), default=0)
        if needed > self.context:  # vLLM would shorten the answers
            raise UserError(f"{needed} tokens exceed the server's --max-model-len of {self.context}")

        def sample() -> list[list[Rollout]]:
            for client in self._changed():
                self._load(client)
            pool = ThreadPoolExecutor(max(1, CONNECTIONS * len(self.clients)))
            try:
                answers = pool.map(self._ask, requests, cycle(self.clients))
                bar = tqdm(answers, progress, len(requests), unit="prompt", disable=not progress, leave=False)
                groups = list(bar)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after a loss nobody waits for the rest
            if changed := self._changed():
                raise ServerLost(f"{changed[0].url} was restarted, or another run uses it")
            return groups

        return self._with_recovery(sample)

    def _ask(self, request: Request, client: Client) -> list[Rollout]:
        params = request.params
        count = request.n if params.temperature else 1  # vLLM refuses groups of greedy samples
        body = {
            "prompt": list(request.prompt_ids), "n": count, "seed": request.seed % 2**62, "max_tokens": params.max_tokens,
            "temperature": params.temperature, "top_p": params.top_p, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
            "logprobs": 0, "return_token_ids": True,
            "stop_token_ids": list(params.stop_token_ids), "ignore_eos": True,  # those given stop it, and no others
        }  # fmt: skip
        choices = client.request("POST", "/v1/completions", body, choices=count)["choices"]
        rollouts = []
        for choice in sorted(choices, key=lambda choice: choice["index"]) * (request.n // count):
            ids, logprobs, reason = choice["token_ids"], choice["logprobs"], choice["finish_reason"]
            if not ids or not logprobs or reason not in ("stop", "length"):
                raise ServerLost(f"{client.url} ended a completion after {len(ids)} tokens: {reason}")
            logprobs = logprobs["token_logprobs"]
            rollouts.append(Rollout(request.prompt_ids, ids, logprobs, reason, self.weight_version))
        return rollouts

    def sync(self, model: Transformer, version: int) -> float:
        """The servers get the weights of `model`, which are from now on `version`; returns the parity difference (nats).

        Raises UserError where the weights did not arrive (see `Parity`), or could not be sent.
        """
        self._trainer_logprobs = sequence_logprobs(model, self.parity.token_ids)
        self.transfer.stage(model)
        self.weight_version, self.tag = version, uuid.uuid4().hex
        return self._with_recovery(lambda: max(map(self._load, self.clients), default=0.0))

    def _load(self, client: Client) -> float:
        client.request("POST", "/pause?mode=wait")
        try:
            self.transfer.load(client)
            client.request("POST", "/reset_prefix_cache")  # keys and values of the old weights
            client.request("POST", "/update_weight_version", {"new_version": self.tag})
        finally:  # others may use the server too
            client.request("POST", "/resume", tries=1, timeout=10.0)
        scored = self.prompt_logprobs(client, self.parity.token_ids)
        return self.parity.check(client.url, self._trainer_logprobs, scored)

    def _changed(self) -> list[Client]:
        """The servers that have not our present weights."""
        tags = {c: c.request("GET", "/weight_info")["weight_version"] for c in self.clients if self.transfer}
        return [client for client, tag in tags.items() if tag != self.tag]

    def prompt_logprobs(self, client: Client, token_ids: list[int]) -> Tensor:
        """The server's log-probs `[T - 1]` of each token but the first given those before it, at temperature 1; nats."""
        body = {"prompt": token_ids, "max_tokens": 1, "prompt_logprobs": 0}
        answer = client.request("POST", "/v1/completions", body, choices=1)
        scored = zip(answer["choices"][0]["prompt_logprobs"][1:], token_ids[1:], strict=True)
        return torch.tensor([entry[str(token)]["logprob"] for entry, token in scored])

    def _with_recovery(self, action: Callable[[], Any], recoveries: int = RECOVERIES) -> Any:
        """Runs `action`, which sees to the weights, and runs it anew where a server is lost meanwhile."""
        try:
            for client in self.clients if self.is_asleep else ():
                client.request("POST", "/wake_up")
            self.is_asleep = False
            return action()
        except ServerLost as lost:
            if not recoveries or not (self.server or self.transfer):
                raise
            tqdm.write(f"recovering: {lost}")
        if self.server:
            self.server.restart()  # reads the checkpoint of the last sync, or the frozen model
            self.is_asleep = False
        return self._with_recovery(action, recoveries - 1)

    def rest(self) -> None:
        """Frees the GPU that is shared with the trainer until the next call, by vLLM's sleep mode."""
        for client in self.clients if self.shares_gpu and not self.is_asleep else ():
            client.request("POST", "/sleep?level=1")
        self.is_asleep = self.shares_gpu

    def close(self) -> None:
        """Ends what is under way, in whichever thread; not the servers."""
        for client in self.clients:
            client.close()


def context_of(client: Client) -> int:
    """The server's longest prompt and completion together (tokens). Raises UserError where it is not as `VllmServer` starts it."""
    with suppress(UserError, KeyError):
        config = client.request("GET", "/server_info?config_format=json")["vllm_config"]["model_config"]
        if config["logprobs_mode"] == "processed_logprobs":  # raw ones are of temperature 1
            return config["max_model_len"]
    flags = "VLLM_SERVER_DEV_MODE=1 and --logprobs-mode processed_logprobs (on a CPU, --no-enable-chunked-prefill)"
    raise UserError(f"{client.url} must be a running vLLM server, started with {flags}")
