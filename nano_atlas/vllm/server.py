"""A vLLM server of our own: started, waited for, restarted, and gone when this process is, whatever ends it."""

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

# the endpoints that exchange weights; no reports to the internet, and nothing from there
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
CPU_ENVIRONMENT = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; the user's own go first
ALLOCATOR = "expandable_segments:True"  # the trainer's PYTORCH_CUDA_ALLOC_CONF; no good for vLLM's sleep mode
PATIENCE = 900.0  # seconds until a server must be up


def free_port() -> int:
    """Not of those, from 32,768 on, that the system hands out: until vLLM takes it in a minute, another program would get it."""
    for port in random.SystemRandom().sample(range(20_000, 32_768), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise UserError("no free port between 20,000 and 32,767 for a vLLM server")


class VllmServer:
    """`python -m vllm.entrypoints.openai.api_server` over a checkpoint directory, under a supervisor (supervisor.py).

    log: file that its output is appended to. device: cpu, cuda:1, or cuda:1,2 for several. options: more of the server's own, which
    override those set here. orphan: a directory to delete if this process is killed. Entering the context starts it.
    """

    def __init__(self, model: Path, log: Path, device="cpu", dtype="bfloat16", options=(), orphan=""):
        if find_spec("vllm") is None:
            raise UserError("no vLLM here: pip install 'nano-atlas[vllm]' (CPU: tests/install_vllm_cpu.py)")
        port, self.is_cpu = free_port(), device == "cpu"
        self.url, self.log, self._process = f"http://127.0.0.1:{port}", log, None
        self._supervisor = [sys.executable, "-I", Path(__file__).with_name("supervisor.py"), str(orphan)]
        # log-probs at the sampling temperature; no sampling parameters from generation_config.json (Qwen3's has top_k 20);
        # the endpoint that takes and gives tokens
        settings = "--logprobs-mode processed_logprobs --generation-config vllm --enable-scale-out".split()
        if device == "cpu":
            # a core is left to the frontend: where it has to wait, so do all threads, which spin meanwhile
            own = {
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) - 1)),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            }
            environment = CPU_ENVIRONMENT | own | os.environ
            # vLLM 0.32 on a CPU dies of "CPU Generator does not use offset" when it splits the prompt of a request with a seed
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
        """Raises UserError with the end of the log where it does not come up."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        say(f"starting a vLLM server at {self.url}, log in {self.log} (a minute or more)")
        with open(self.log, "ab") as log:
            pipes, start = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}, log.tell()
            command, deadline = [*self._supervisor, *self._command], time.monotonic() + PATIENCE
            self._process = subprocess.Popen(command, env=self._environment, start_new_session=True, **pipes)
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(httpx.TransportError):  # it does not listen yet
                if httpx.get(self.url + "/health", timeout=5, trust_env=False).status_code == 200:
                    return self
            time.sleep(0.5)
        state = "did not come up in time" if self._process.poll() is None else "ended"
        self.stop()
        output = self.log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        cause = [line for line in output if re.search(r"\w(Error|Exception): ", line)][:1]
        ending = "\n  ".join([*cause, "...", *output[-12:]])
        raise UserError(f"the vLLM server {state}; what it said is in {self.log}:\n  {ending}")

    def stop(self, *_) -> None:
        """Ends the server with all its processes."""
        if self._process is not None:
            self._process.communicate(b"e")  # to the supervisor, if that is still there
            self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    __enter__, __exit__ = start, stop
