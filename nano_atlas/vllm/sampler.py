"""`VllmSampler`: the interface of `Sampler` in front of one or more vLLM servers. Token ids in, token ids and log-probs out.

Each request is one HTTP request (its `n` samples share the prefill), many are under way at once, and each goes to the server
with the fewest. Every sync puts a tag on the servers; it is compared before and after each `generate`, so no rollout carries a
version of weights that it was not drawn with, even where somebody has restarted a server in between.
"""

import math
import threading
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress

import torch
from torch import Tensor
from tqdm import tqdm

from nano_atlas.errors import UserError
from nano_atlas.model import Transformer
from nano_atlas.sampler import Request, Rollout
from nano_atlas.seats import Client, ServerLost
from nano_atlas.vllm.server import VllmServer
from nano_atlas.vllm.sync import FileTransfer, NcclTransfer, Parity, sequence_logprobs

RECOVERIES = 2  # restarts or reloads within one call, before giving up
RESUME_PATIENCE = 10.0  # seconds for a server to resume after a load of weights that failed


class VllmSampler:
    """Samples from vLLM servers that hold the policy's weights (`transfer` and `parity` given) or a frozen model's (neither).

    Under torchrun rank 0 has the servers; the other ranks' samplers have none, and only take part in gathering the weights.
    urls: the servers; `server` is the one among them that was started here and may be restarted. connections: requests under
    way per server. timeout: seconds for one request. shares_gpu: the server sleeps between `rest` and its next use.
    Raises UserError where a server is not there, is not started as this needs it, or holds a different model.
    """

    def __init__(
        self, urls: Sequence[str], *, server: VllmServer | None = None, transfer: FileTransfer | NcclTransfer | None = None,
        parity: Parity | None = None, connections: int = 64, timeout: float = 600.0, shares_gpu: bool = False,
    ):  # fmt: skip
        self.server, self.transfer, self.parity, self.shares_gpu = server, transfer, parity, shares_gpu
        self.clients = [Client(url, connections=connections, timeout=timeout) for url in urls]
        self.weight_version, self._run = (
            0,
            uuid.uuid4().hex[:8],
        )  # two trainers at one server notice each other
        self.is_asleep, self.trainer_logprobs = False, None
        self._under_way, self._lock = [0] * len(self.clients), threading.Lock()
        self.models, self.max_model_len = {}, math.inf
        for client in self.clients:
            self._inspect(client)

    def _inspect(self, client: Client) -> None:
        (model, *_) = client.request("GET", "/v1/models").get("data") or [{}]
        self.models[client.url] = model.get("id")
        self.max_model_len = min(self.max_model_len, model.get("max_model_len") or math.inf)
        remedy = "start it with VLLM_SERVER_DEV_MODE=1 and --logprobs-mode processed_logprobs (see nano_atlas/vllm/server.py)"
        try:
            config = client.request("GET", "/server_info?config_format=json")["vllm_config"]
            mode, is_chunked = (
                config["model_config"]["logprobs_mode"],
                config["scheduler_config"]["enable_chunked_prefill"],
            )
        except (UserError, KeyError) as error:
            raise UserError(
                f"{client.url} does not offer the endpoints that exchange weights ({error}); {remedy}"
            ) from None
        if mode != "processed_logprobs":  # raw ones are those of temperature 1
            raise UserError(
                f"{client.url} reports {mode}, not log-probs at the sampling temperature; {remedy}"
            )
        if is_chunked and config["device_config"]["device"] == "cpu":  # see VllmServer
            raise UserError(
                f"{client.url} splits long prompts, which kills vLLM on a CPU; start it with --no-enable-chunked-prefill"
            )

    # ---- generation

    def generate(self, requests: Sequence[Request], progress: str | None = None) -> list[list[Rollout]]:
        """`request.n` rollouts per request, in order; `progress` labels a progress bar. Raises UserError for a bad request.

        Where a server is lost and can be replaced, the requests without an answer are sent again: none is lost or doubled. Where
        it turns out to have had other weights in between, all are.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        unanswered: list[list[Rollout] | None] = [None if request.n else [] for request in requests]
        results = list(unanswered)
        with tqdm(
            total=sum(request.n for request in requests),
            desc=progress,
            unit="sample",
            disable=progress is None,
            leave=False,
        ) as bar:
            for recovery in range(RECOVERIES + 1):
                try:
                    self._wake()
                    self._confirm_version()
                    self._fill(requests, results, bar)
                    try:
                        self._confirm_version()
                    except ServerLost:
                        results = list(unanswered)
                        raise
                    return results
                except ServerLost as lost:
                    if recovery == RECOVERIES:
                        raise
                    self._recover(lost)

    def _fill(self, requests: Sequence[Request], results: list, bar: tqdm) -> None:
        missing = [index for index, group in enumerate(results) if group is None]
        pool = ThreadPoolExecutor(
            max(1, min(len(missing), sum(client.connections for client in self.clients)))
        )
        try:
            places = {pool.submit(self._ask, requests[index]): index for index in missing}
            for future in as_completed(places):
                results[places[future]] = future.result()
                bar.update(requests[places[future]].n)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C or a loss nobody waits for the rest

    def _ask(self, request: Request) -> list[Rollout]:
        params = request.params
        with self._lock:
            place = min(range(len(self.clients)), key=self._under_way.__getitem__)
            self._under_way[place] += 1
        client, count = (
            self.clients[place],
            request.n if params.temperature else 1,
        )  # vLLM refuses groups of greedy samples
        body = {
            "model": self.models[client.url], "prompt": list(request.prompt_ids), "n": count, "seed": request.seed % 2**62,
            "max_tokens": params.max_tokens, "temperature": params.temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "repetition_penalty": 1.0, "logprobs": 0, "return_token_ids": True,
            "stop_token_ids": list(params.stop_token_ids), "ignore_eos": True,  # those given stop it, and no others
        }  # fmt: skip
        try:
            choices = client.request("POST", "/v1/completions", body, choices=count)["choices"]
        finally:
            with self._lock:
                self._under_way[place] -= 1
        choices = sorted(choices, key=lambda choice: choice["index"]) * (request.n // count)
        return [self._rollout(request, choice, client) for choice in choices]

    def _rollout(self, request: Request, choice: dict, client: Client) -> Rollout:
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if (
            not ids
            or not logprobs
            or len(ids) != len(logprobs)
            or choice["finish_reason"] not in ("stop", "length")
        ):
            raise ServerLost(f"{client.url} gave {len(ids or [])} token ids, {len(logprobs or [])} log-probs, finish_reason "
                             f"{choice['finish_reason']!r}; its log says why")  # fmt: skip
        return Rollout(request.prompt_ids, ids, logprobs, choice["finish_reason"], self.weight_version)

    def _check(self, index: int, request: Request) -> None:
        needed = len(request.prompt_ids) + request.params.max_tokens
        if needed > self.max_model_len:
            raise UserError(f"request {index} has {len(request.prompt_ids)} prompt tokens and max_tokens = "
                            f"{request.params.max_tokens}, more than the server's context of {self.max_model_len}: start it with "
                            f"--max-model-len {needed} or more")  # fmt: skip
        if request.params.top_p < 1 and request.params.temperature > 0:
            raise UserError(
                "vLLM has log-probs before temperature and top_p, or after both; training needs those between: --top-p 1"
            )

    # ---- weights

    def sync(self, model: Transformer, version: int) -> float:
        """The servers get the weights of `model`, which are from now on `version`; returns the parity difference (nats).

        Raises UserError where the weights did not arrive (see `Parity`), or could not be sent.
        """
        self.trainer_logprobs = sequence_logprobs(model, self.parity.token_ids)
        self.transfer.stage(model)
        self.weight_version = version
        for recovery in range(RECOVERIES + 1):
            try:
                self._wake()
                for client in self.clients:
                    self._load(client)
                return max((self._check_parity(client) for client in self.clients), default=0.0)
            except ServerLost as lost:
                if recovery == RECOVERIES:
                    raise
                self._recover(lost)

    def _load(self, client: Client) -> None:
        client.request("POST", "/pause?mode=wait")
        try:
            self.transfer.load(client)
            client.request("POST", "/reset_prefix_cache")  # keys and values of the old weights
            client.request("POST", "/update_weight_version", {"new_version": self.tag})
        except BaseException:
            with suppress(UserError):  # the reason counts, not that the server may hang because of it
                client.request("POST", "/resume", tries=1, timeout=RESUME_PATIENCE)
            raise
        client.request("POST", "/resume")

    @property
    def tag(self) -> str:
        return f"{self._run}-{self.weight_version}"

    def _confirm_version(self) -> None:
        for client in self.clients if self.transfer else ():
            if (found := client.request("GET", "/weight_info").get("weight_version")) != self.tag:
                raise ServerLost(
                    f"{client.url} has weights {found!r}, not {self.tag!r}: it was restarted or another run uses it"
                )

    def _check_parity(self, client: Client) -> float:
        return self.parity.check(
            client.url, self.trainer_logprobs, self.prompt_logprobs(client, self.parity.token_ids)
        )

    def prompt_logprobs(self, client: Client, token_ids: list[int]) -> Tensor:
        """The server's log-probs `[T - 1]` of each token but the first given those before it, at temperature 1; nats."""
        body = {
            "model": self.models[client.url],
            "prompt": token_ids,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        scored = client.request("POST", "/v1/completions", body, choices=1)["choices"][0]["prompt_logprobs"]
        return torch.tensor(
            [entry[str(token)]["logprob"] for entry, token in zip(scored[1:], token_ids[1:], strict=True)]
        )

    # ---- losses and sleep

    def _recover(self, lost: ServerLost) -> None:
        """Brings lost servers back to the present weights. Raises `lost` where that cannot be done from here."""
        if self.server is None and self.trainer_logprobs is None:
            raise lost
        tqdm.write(f"recovering: {lost}")
        if self.server is not None:
            self.server.restart()  # reads the checkpoint of the last sync, or the frozen model
            self.is_asleep = False
        if isinstance(self.transfer, NcclTransfer):  # the trainer's weights may have moved on
            raise UserError(
                f"{lost}. Weights that went by NCCL are not kept; the run continues from its last state"
            ) from lost
        for client in self.clients if self.transfer else ():
            self._load(client)
            self._check_parity(client)

    def rest(self) -> None:
        """Frees the GPU that is shared with the trainer until the next call (vLLM's sleep mode; not run: that takes a GPU)."""
        if self.shares_gpu and not self.is_asleep:
            self.clients[0].request("POST", "/sleep?level=1")
            self.is_asleep = True

    def _wake(self) -> None:
        if self.is_asleep:
            self.clients[0].request("POST", "/wake_up")
            self.is_asleep = False

    def close(self) -> None:
        """Ends what is under way, in whichever thread; not the servers."""
        for client in self.clients:
            client.close()
