"""A long unattended run with faults: two OpenAI-compatible endpoints behind a proxy that fails at random, and kill -9 now and then.

    python -m benchmarks.unattended                                   # the nano world's pair, on two vLLM servers started here
    python -m benchmarks.unattended --student http://localhost:8001 --teacher http://localhost:8002

The proxy answers a share of the requests with 429, 500, garbage, an empty reply, or not at all. The runtime is killed --kills times and
started again until no session is left failed. Then: every task has exactly one session that succeeded, all records are whole, and the
export makes training problems, on which `--train DIR` goes on with this teacher for --train-steps. Prints what happened; exits with 1
where something was lost.
"""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from nano_atlas import world
from nano_atlas.config import option, parse, run_script
from nano_atlas.data import Problem, write_jsonl
from nano_atlas.errors import UserError
from nano_atlas.runtime.export import export_traces
from nano_atlas.runtime.traces import Selection, TraceWriter, problems_from_traces
from nano_atlas.seats import is_url
from nano_atlas.vllm.server import VllmServer


@dataclass(frozen=True)
class Config:
    student: str = option(
        str(world.STUDENT),
        "OpenAI-compatible server, or a checkpoint that vLLM serves meanwhile",
        group="run",
    )
    teacher: str = option("runs/nano/teacher-grpo/model", "the same of the teacher")
    tasks: int = option(500, "tasks")
    fault_rate: float = option(0.1, "share of the requests that fail")
    kills: int = option(3, "times the runtime is killed")
    answer_tokens: int = option(96, "longest answer, approach and teaching (tokens)")
    train: Path | None = option(None, "checkpoint of a teacher that is then trained on the export")
    train_steps: int = option(4, "GRPO steps of that")
    timeout: float = option(60.0, "seconds after which a call has failed")
    workers: int = option(16, "calls at a time")
    out: Path = option(Path("runs/unattended"), "directory of tasks and traces; must not exist")


def start_proxy(target: str, rate: float, injected: Counter) -> str:
    """A server that forwards requests to `target`, or fails; returns its URL."""
    rng, client = random.Random(target), httpx.Client(timeout=600)
    faults = ("429", "500", "garbage", "empty", "hang up")

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, client.get(target + self.path).content)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fault = rng.choice(faults) if rng.random() < rate else None
            injected[fault] += 1
            if fault == "hang up":
                self.connection.close()
            elif fault is not None:
                empty = json.dumps(
                    {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}
                ).encode()
                self.answer(
                    int(fault) if fault.isdigit() else 200,
                    {"garbage": b"<html>{", "empty": empty}.get(fault, b"{}"),
                )
            else:
                response = client.post(
                    target + self.path, content=body, headers={"Content-Type": "application/json"}
                )
                self.answer(response.status_code, response.content)

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    if config.out.exists():
        raise UserError(f"{config.out} exists; choose another --out")
    problems = world.held_out("math", config.tasks, "unattended")
    write_jsonl(
        config.out / "tasks.jsonl",
        [{"id": p.id, "question": p.question, "answer": p.answer, "domain": p.domain} for p in problems],
    )
    injected: Counter = Counter()
    with ExitStack() as servers:
        urls = [
            start_proxy(serve(spec, config.out / f"vllm-{name}.log", servers), config.fault_rate, injected)
            for name, spec in (("student", config.student), ("teacher", config.teacher))
        ]
        run(config, problems, urls, injected)


def serve(spec: str, log: Path, servers: ExitStack) -> str:
    """The URL, that of a server started here where `spec` is a checkpoint."""
    if is_url(spec):
        return spec.rstrip("/")
    server = VllmServer(
        Path(spec).resolve(), log, dtype="float32", options=["--enforce-eager", "--max-num-seqs", "16"]
    )
    return servers.enter_context(server).url


def run(config: Config, problems: list[Problem], urls: list[str], injected: Counter) -> None:
    script = str(Path(__file__).parents[1] / "runtime_loop.py")
    tokens = [
        part
        for name in ("probe", "teaching", "answer")
        for part in (f"--{name}-tokens", str(config.answer_tokens))
    ]
    command = [
        sys.executable,
        script,
        "--preset",
        "own",
        "--tasks",
        str(config.out / "tasks.jsonl"),
        "--student",
        urls[0],
        "--teacher",
        urls[1],
        "--lane",
        "paired",
        "--timeout",
        str(config.timeout),
        "--workers",
        str(config.workers),
        "--out",
        str(config.out / "run"),
        *tokens,
    ]
    path, began, starts, kills = config.out / "run/traces.jsonl", time.monotonic(), 0, 0
    while True:
        starts += 1
        process = subprocess.Popen(command)
        if kills < config.kills:
            goal = (kills + 1) * config.tasks // (config.kills + 1)
            while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < goal):
                time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        elif process.wait() != 0:
            raise UserError("the runtime ended with an error; its message is above")
        with TraceWriter(path) as writer:  # also mends, and checks every record
            outcomes = list(writer.outcomes())
        succeeded = Counter(o.session_id for o in outcomes if o.status == "succeeded")
        print(
            f"start {starts}: {len(outcomes)} records, {len(succeeded)} of {config.tasks} tasks succeeded",
            flush=True,
        )
        if kills == config.kills and len(succeeded) == config.tasks:
            break
    selected, _ = export_traces(
        path, config.out / "export.jsonl", Selection(review_status=("approved", "pending"))
    )
    trainable = len(
        problems_from_traces(config.out / "export.jsonl", Selection(review_status=("approved", "pending")))[0]
    )
    failed = sum(o.status == "failed" for o in outcomes)
    print(
        f"{config.tasks} tasks, {kills} kills, {starts} starts, {time.monotonic() - began:.0f} s; requests {dict(injected)}; "
        f"{failed} failed sessions, all done again; {selected} exported, {trainable} training problems"
    )
    if set(succeeded.values()) != {1} or len(succeeded) != config.tasks:
        raise UserError("a task was lost or done twice")
    if config.train:
        grpo = [sys.executable, script.replace("runtime_loop", "train_grpo"), "--traces", str(config.out / "export.jsonl"), "--teacher",
                str(config.train), "--steps", str(config.train_steps), "--eval-every", "0", "--out", str(config.out / "next")]  # fmt: skip
        subprocess.run(grpo, check=True)


if __name__ == "__main__":
    run_script(main)
