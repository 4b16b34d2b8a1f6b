"""A real vLLM server for tests: started in a process group of its own, gone when the block ends, whatever happened in it."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that exchange weights
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class VllmServer:
    url: str  # without a trailing slash, such as http://127.0.0.1:8123
    model: str  # the name to give in requests
    log: Path  # what the server wrote

    def post(self, path: str, body: dict, timeout: float = 120) -> dict:
        """JSON in, JSON out; `timeout` in seconds. Raises RuntimeError with the server's answer when it refuses."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code} {error.read().decode()[:2000]}") from error

    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        """Log-probability, in nats, of each token but the first given those before it."""
        body = {"model": self.model, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        scored = self.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [entry[str(token)]["logprob"] for entry, token in zip(scored[1:], token_ids[1:], strict=True)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def vllm_server(directory: Path | str, *options: str, dtype: str = "float32", max_model_len: int = 256,
                timeout: float = 300) -> Iterator[VllmServer]:
    """Serves a checkpoint directory; `options` go to the server's command line (`--enforce-eager` saves it the compilation).

    Raises RuntimeError with the end of the log when it is not up after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        log, port = Path(folder, "server.log"), free_port()
        server = VllmServer(f"http://127.0.0.1:{port}", str(directory), log)
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), "--port", str(port)]
        command += ["--host", "127.0.0.1", "--dtype", dtype, "--max-model-len", str(max_model_len), *options]
        with open(log, "w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT,
                                       start_new_session=True)  # its engine is a child of its own
        try:
            _wait_until_healthy(server, process, time.monotonic() + timeout)
            yield server
        finally:
            _end(process)


def _wait_until_healthy(server: VllmServer, process: subprocess.Popen, deadline: float) -> None:
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5):
                return
        except OSError:  # not listening yet
            time.sleep(0.5)
    state = "is not healthy in time" if process.poll() is None else f"ended with status {process.returncode}"
    raise RuntimeError(f"the vLLM server {state}; its log ends:\n{server.log.read_text()[-4000:]}")


def _end(process: subprocess.Popen) -> None:
    """Ends the whole group: first politely, then for certain, because an orphaned engine keeps a core busy."""
    for sign, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            pass  # all of the group has ended already
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
