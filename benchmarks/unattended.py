"""A long unattended run with faults: two OpenAI-compatible endpoints behind a proxy that fails at random, and kill -9 now and then.

    python -m benchmarks.unattended                                   # the nano world's pair, on two vLLM servers started here
    python -m benchmarks.unattended --student http://localhost:8001 --teacher http://localhost:8002

The proxy answers a share of the requests with 429, 500, garbage, an empty reply, or not at all. The runtime is killed --kills times and
started again until every task has a session that succeeded. Then: none has two, all records are whole, and the export makes training
problems, on which --train DIR trains this teacher.
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
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from nano_atlas import world
from nano_atlas.config import option, parse, run_script
from nano_atlas.data import load_problems
from nano_atlas.errors import UserError
from nano_atlas.runs import Journal, write_jsonl
from nano_atlas.runtime.review import Selection, export_traces
from nano_atlas.runtime.traces import past_outcomes
from nano_atlas.seats import is_url
from nano_atlas.vllm.server import VllmServer

TIMEOUT = 60  # seconds after which a call has failed
EMPTY = {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}
FAULTS = {"429": (429, b"{}"), "500": (500, b"{}"), "garbage": (200, b"<html>{"), "empty": (200, json.dumps(EMPTY).encode()),
          "hang up": None}  # fmt: skip  # status and body


@dataclass(frozen=True)
class Config:
    student: str = option(
        str(world.STUDENT), "OpenAI-compatible server, or a checkpoint that vLLM serves", group="run"
    )
    teacher: str = option("runs/nano/teacher-grpo/model", "the same of the teacher")
    tasks: int = option(500, "tasks", above=0)
    fault_rate: float = option(0.1, "share of the requests that fail", at_least=0, below=1)
    kills: int = option(3, "times the runtime is killed", at_least=0)
    answer_tokens: int = option(96, "longest answer, approach and teaching (tokens)", above=0)
    train: Path | None = option(None, "checkpoint of a teacher that is then trained on the export, 4 steps")
    out: Path = option(Path("runs/unattended"), "directory of tasks and traces; must not exist")


def start_proxy(target: str, rate: float, injected: Counter) -> str:
    """A server that forwards requests to `target`, or fails; returns its URL."""
    rng = random.Random(target)
    client = httpx.Client(timeout=600, headers={"Content-Type": "application/json"})

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, client.get(target + self.path).content)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fault = rng.choice(list(FAULTS)) if rng.random() < rate else None
            injected[fault] += 1
            if fault is None:
                response = client.post(target + self.path, content=body)
                self.answer(response.status_code, response.content)
            elif FAULTS[fault]:
                self.answer(*FAULTS[fault])
            else:
                self.connection.close()

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
    write_jsonl(config.out / "tasks.jsonl", map(asdict, world.held_out("math", config.tasks, "unattended")))
    injected: Counter = Counter()
    with ExitStack() as servers:
        urls = []
        for name, spec in (("student", config.student), ("teacher", config.teacher)):
            if not is_url(spec):
                log, options = config.out / f"vllm-{name}.log", ["--enforce-eager", "--max-num-seqs", "16"]
                server = VllmServer(Path(spec).resolve(), log, dtype="float32", options=options)
                spec = servers.enter_context(server).url
            urls.append(start_proxy(spec.rstrip("/"), config.fault_rate, injected))
        run(config, urls, injected)


def run(config: Config, urls: list[str], injected: Counter) -> None:
    options = {"preset": "own", "tasks": config.out / "tasks.jsonl", "student": urls[0], "teacher": urls[1], "lane": "paired",
               "timeout": TIMEOUT, "out": config.out / "run"}  # fmt: skip
    options |= {f"{name}-tokens": config.answer_tokens for name in ("probe", "teaching", "answer")}
    path, began, starts, kills, succeeded = config.out / "run/traces.jsonl", time.monotonic(), 0, 0, Counter()
    while kills < config.kills or len(succeeded) < config.tasks:
        starts += 1
        process = subprocess.Popen(command("runtime_loop.py", options))
        if kills < config.kills:
            goal = (kills + 1) * config.tasks // (config.kills + 1)
            while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < goal):
                time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        elif process.wait() != 0:
            raise UserError("the runtime ended with an error; its message is above")
        with Journal(path) as journal:  # also cuts off a torn line, and checks every record
            outcomes = list(past_outcomes(journal))
        succeeded = Counter(o.session_id for o in outcomes if o.status == "succeeded")
        print(f"start {starts}: {len(outcomes)} records, {len(succeeded)} tasks done", flush=True)
    export_traces(path, config.out / "export.jsonl", Selection())
    print(
        f"{config.tasks} tasks, {kills} kills, {starts} starts, {time.monotonic() - began:.0f} s; requests {dict(injected)}; "
        f"{len(outcomes) - sum(succeeded.values())} failed sessions, all done again; "
        f"{len(load_problems(config.out / 'export.jsonl'))} training problems"
    )
    if set(succeeded.values()) != {1}:
        raise UserError("a task was done twice")
    if config.train:
        options = {"problems": config.out / "export.jsonl", "teacher": config.train, "steps": 4}
        options |= {"out": config.out / "next"}
        subprocess.run(command("train_grpo.py", options), check=True)


def command(script: str, options: dict[str, object]) -> list[str]:
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, str(Path(__file__).parents[1] / script), *flags]


if __name__ == "__main__":
    run_script(main)
