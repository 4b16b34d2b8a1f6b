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
    serve: int | None = option(None, "serve the pair as an OpenAI-compatible endpoint on this port (0: any free one)",
                               group="serving", resumable=True)
    host: str = option("127.0.0.1", f"address to listen on; one beyond this machine needs a key in {KEY_VARIABLE}", resumable=True)
    most_requests: int = option(16, "requests answered at a time; more get HTTP 429", resumable=True)
    most_bytes: int = option(1_000_000, "longest request body (bytes); longer ones get HTTP 413", resumable=True)

    def check(self) -> None:
        if self.serve is not None and not 0 <= self.serve < 2**16 or self.most_requests < 1 or self.most_bytes < 1:
            raise UserError("--serve must be a port from 0 to 65535, --most-requests and --most-bytes at least 1")
        if self.serve is not None and self.host not in LOCAL and not os.environ.get(KEY_VARIABLE):
            raise UserError(f"--host {self.host} can be reached by others: set a key in {KEY_VARIABLE} that clients must send")


@dataclass
class Answer:
    text: str
    is_truncated: bool
    prompt_tokens: int
    completion_tokens: int


class RequestError(Exception):
    """Becomes an HTTP error in OpenAI's form."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def read_request(body: bytes) -> tuple[str, dict[str, Any]]:
    """The question and the options {temperature, max_tokens, seed} that are given. Raises RequestError."""
    try:
        request = json.loads(body)
        messages = [(str(message["role"]), _text(message["content"])) for message in request["messages"]]
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(400, f"not a chat completion request: {type(error).__name__}: {error}") from None
    if not messages:
        raise RequestError(400, "messages is empty")
    for name in ("tools", "functions"):
        if request.get(name):
            raise RequestError(400, f"{name} are not supported here; give them to the student (--student-tools)")
    if request.get("n", 1) != 1:
        raise RequestError(400, "n must be 1")
    options = {"max_tokens": request.get("max_completion_tokens") or request.get("max_tokens"),
               "temperature": request.get("temperature"), "seed": request.get("seed")}
    for name, kinds in (("max_tokens", int), ("temperature", (int, float)), ("seed", int)):
        if options[name] is not None and (not isinstance(options[name], kinds) or isinstance(options[name], bool) or options[name] < 0):
            raise RequestError(400, f"{name} must be a number of at least 0")
    question = messages[0][1] if len(messages) == 1 else "\n\n".join(f"{role}: {text}" for role, text in messages)
    return question, {"stream": bool(request.get("stream")), **{k: v for k, v in options.items() if v is not None}}


def _text(content: Any) -> str:
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)  # KeyError: an image or a sound
    if not isinstance(content, str):
        raise TypeError("the content of a message must be a text")
    return content


def serve(config: ServeConfig, answer: Callable[[str, dict[str, Any]], Answer], ready: Callable[[str], None] = print) -> None:
    """Serves until SIGINT or SIGTERM. answer(question, options) is called in a thread per request, and may raise anything."""
    key, slots = os.environ.get(KEY_VARIABLE), threading.Semaphore(config.most_requests)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30  # seconds a client may be silent

        def do_GET(self) -> None:
            if self.path == "/health":
                self.reply(200, {"status": "ok"})
            elif self.is_allowed():
                known = self.path == "/v1/models"
                self.reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]}) if known else self.fail(404, "no such path")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > config.most_bytes:
                self.fail(411 if not length.isdigit() else 413, f"the body must have a length of at most {config.most_bytes} bytes")
                return
            body = self.rfile.read(int(length))
            if not self.is_allowed():
                return
            if self.path != "/v1/chat/completions":
                self.fail(404, "no such path")
            elif not slots.acquire(blocking=False):
                self.fail(429, f"{config.most_requests} requests are being answered; try again later")
            else:
                try:
                    self.complete(body)
                finally:
                    slots.release()

        def complete(self, body: bytes) -> None:
            head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": MODEL}
            try:
                question, options = read_request(body)
                if options.pop("stream"):
                    self.stream(head, events(head, answer, question, options))
                    return
                found = answer(question, options)
            except RequestError as error:
                self.fail(error.status, str(error))
            except Exception as error:  # whatever an agent did: the client learns of it, and the server goes on
                self.fail(502, f"{type(error).__name__}: {error}")
            else:
                message = {"role": "assistant", "content": found.text}
                choice = {"index": 0, "message": message, "finish_reason": "length" if found.is_truncated else "stop"}
                self.reply(200, {**head, "object": "chat.completion", "choices": [choice], "usage": usage(found)})

        def stream(self, head: dict, pieces: Iterator[str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            for piece in pieces:
                self.wfile.write(f"{piece}\n\n".encode())
                self.wfile.flush()

        def is_allowed(self) -> bool:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if key and not hmac.compare_digest(given.encode(), key.encode()):
                self.fail(401, "the bearer key is missing or wrong")
                return False
            return True

        def fail(self, status: int, message: str) -> None:
            self.reply(status, {"error": {"message": message, "type": "invalid_request_error" if status < 500 else "server_error", "code": status}})

        def reply(self, status: int, value: dict) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")  # one request each: an idle connection would hold up the end of the server
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
            yield "data: " + json.dumps({"error": {"message": f"{type(error).__name__}: {error}", "type": "server_error", "code": 502}})
            return
    for start in range(0, len(found.text), PIECE):
        yield event({"content": found.text[start : start + PIECE]})
    yield event({}, "length" if found.is_truncated else "stop", usage=usage(found))
    yield "data: [DONE]"


def usage(found: Answer) -> dict[str, int]:
    return {"prompt_tokens": found.prompt_tokens, "completion_tokens": found.completion_tokens,
            "total_tokens": found.prompt_tokens + found.completion_tokens}
