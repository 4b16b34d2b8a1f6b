"""The pair behind an OpenAI-compatible endpoint, so that any client uses it by changing its base URL.

    POST /v1/chat/completions    the answer that the runtime would return; with "stream": true as server-sent events
    GET  /v1/models, /health

The answer is the best of several attempts, so it is known only when all are made: a stream sends comments to keep the connection
alive, then the text in pieces. Bound to this machine unless --host says otherwise, and then only with a key (NANO_ATLAS_API_KEY) that
clients send as bearer token. SIGINT and SIGTERM stop it gracefully: no new connections, requests under way are answered.
"""

import hmac
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nano_atlas.config import option
from nano_atlas.errors import UserError

MODEL = "nano-atlas"
KEY_VARIABLE = "NANO_ATLAS_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")
KEEP_ALIVE = 5.0  # seconds between two comments in a stream
PIECE = 40  # characters per event of a stream


@dataclass(frozen=True)
class ServeConfig:
    serve: int | None = option(
        None,
        "serve the pair as an OpenAI-compatible endpoint on this port (0: any free one)",
        group="serving",
        resumable=True,
    )
    host: str = option(
        "127.0.0.1",
        f"address to listen on; one beyond this machine needs a key in {KEY_VARIABLE}",
        resumable=True,
    )
    most_requests: int = option(16, "requests answered at a time; more get HTTP 429", resumable=True)
    most_bytes: int = option(
        1_000_000, "longest request body (bytes); longer ones get HTTP 413", resumable=True
    )

    def check(self) -> None:
        if (
            self.serve is not None
            and not 0 <= self.serve < 2**16
            or self.most_requests < 1
            or self.most_bytes < 1
        ):
            raise UserError(
                "--serve must be a port from 0 to 65535, --most-requests and --most-bytes at least 1"
            )
        if self.serve is not None and self.host not in LOCAL and not os.environ.get(KEY_VARIABLE):
            raise UserError(
                f"--host {self.host} can be reached by others: set a key in {KEY_VARIABLE} that clients must send"
            )


@dataclass
class Answer:
    text: str
    is_truncated: bool
    prompt_tokens: int
    completion_tokens: int

    @property
    def finish_reason(self) -> str:
        return "length" if self.is_truncated else "stop"

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def failure(status: int, message: str) -> dict:
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error" if status < 500 else "server_error",
            "code": status,
        }
    }


class RequestError(Exception):
    """Becomes an HTTP error in OpenAI's form."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def read_request(body: bytes) -> tuple[str, dict[str, Any], bool]:
    """The question, the options {temperature, max_tokens, seed} that are given, whether to stream. Raises RequestError."""
    try:
        request = json.loads(body)
        messages = [(str(message["role"]), _text(message["content"])) for message in request["messages"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(400, f"not a chat completion request: {type(error).__name__}: {error}") from None
    if not messages:
        raise RequestError(400, "messages is empty")
    for name in ("tools", "functions"):
        if request.get(name):
            raise RequestError(
                400, f"{name} are not supported here; give them to the student (--student-tools)"
            )
    if request.get("n") not in (None, 1):
        raise RequestError(400, "n must be 1")
    options = {
        "max_tokens": request.get("max_completion_tokens") or request.get("max_tokens"),
        "temperature": request.get("temperature"),
        "seed": request.get("seed"),
    }
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in options.items():
        if (
            not isinstance(value, (int, float) if name == "temperature" else int)
            or isinstance(value, bool)
            or value < 0
        ):
            raise RequestError(400, f"{name} must be a number of at least 0")
    question = (
        messages[0][1] if len(messages) == 1 else "\n\n".join(f"{role}: {text}" for role, text in messages)
    )
    return question, options, bool(request.get("stream"))


def _text(content: Any) -> str:
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)  # KeyError: an image or a sound
    if not isinstance(content, str):
        raise TypeError("the content of a message must be a text")
    return content


def serve(
    config: ServeConfig, answer: Callable[[str, dict[str, Any]], Answer], ready: Callable[[str], None] = print
) -> None:
    """Serves until SIGINT or SIGTERM. answer(question, options) is called in a thread per request, and may raise anything."""
    key, slots = os.environ.get(KEY_VARIABLE), threading.Semaphore(config.most_requests)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30  # seconds a client may be silent

        def do_GET(self) -> None:
            self.guarded(self.look)

        def do_POST(self) -> None:
            self.guarded(self.complete)

        def guarded(self, work: Callable[[], None]) -> None:
            """Whatever goes wrong, an agent's faults too: the client learns of it, and the server goes on."""
            try:
                work()
            except RequestError as error:
                self.reply(error.status, failure(error.status, str(error)))
            except OSError:
                raise  # the client went away
            except Exception as error:
                self.reply(502, failure(502, f"{type(error).__name__}: {error}"))

        def look(self) -> None:
            if self.path == "/health":
                return self.reply(200, {"status": "ok"})
            self.check_key()
            if self.path != "/v1/models":
                raise RequestError(404, "no such path")
            self.reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

        def complete(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > config.most_bytes:
                raise RequestError(
                    413 if length.isdigit() else 411,
                    f"the body must have a length of at most {config.most_bytes} bytes",
                )
            body = self.rfile.read(int(length))
            self.check_key()
            if self.path != "/v1/chat/completions":
                raise RequestError(404, "no such path")
            question, options, is_streamed = read_request(body)
            if not slots.acquire(blocking=False):
                raise RequestError(
                    429, f"{config.most_requests} requests are being answered; try again later"
                )
            try:
                head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": MODEL}
                if is_streamed:
                    return self.stream(events(head, answer, question, options))
                found = answer(question, options)
            finally:
                slots.release()
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": found.text},
                "finish_reason": found.finish_reason,
            }
            self.reply(200, {**head, "object": "chat.completion", "choices": [choice], "usage": found.usage})

        def stream(self, pieces: Iterator[str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for piece in pieces:
                self.wfile.write(f"{piece}\n\n".encode())
                self.wfile.flush()

        def check_key(self) -> None:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if key and not hmac.compare_digest(given.encode(), key.encode()):
                raise RequestError(401, "the bearer key is missing or wrong")

        def reply(self, status: int, value: dict) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header(
                "Connection", "close"
            )  # one request each: an idle connection would hold up the end of the server
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Silent; sessions are in the traces."""

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # requests under way are answered before the program ends
        block_on_close = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that went away is no news."""

    with Server((config.host, config.serve), Handler) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        ready(f"serving http://{config.host}:{server.server_address[1]}/v1 (model {MODEL}); Ctrl-C stops")
        server.serve_forever(poll_interval=0.1)


def events(head: dict, answer: Callable[[str, dict], Answer], question: str, options: dict) -> Iterator[str]:
    """A stream's events: comments until the answer is there, then its pieces, the reason of its end with usage, [DONE]."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(answer(question, options))
        except Exception as error:  # raised again below, in the thread of the connection
            future.set_exception(error)

    threading.Thread(target=work).start()

    def event(delta: dict, finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return "data: " + json.dumps({**head, "object": "chat.completion.chunk", "choices": [choice], **more})

    yield event({"role": "assistant", "content": ""})
    while True:
        try:
            found = future.result(KEEP_ALIVE)
            break
        except TimeoutError:
            yield ": working"
        except Exception as error:  # the status line is sent already, so the error is an event
            yield "data: " + json.dumps(failure(502, f"{type(error).__name__}: {error}"))
            return
    for start in range(0, len(found.text), PIECE):
        yield event({"content": found.text[start : start + PIECE]})
    yield event({}, found.finish_reason, usage=found.usage)
    yield "data: [DONE]"
