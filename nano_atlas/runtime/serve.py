"""Serves student and teacher as an OpenAI-compatible endpoint (docs/runtime.md).

    POST /v1/chat/completions    the answer that the runtime would return; with "stream": true as server-sent events
    GET  /v1/models, /v1/models/nano-atlas, /health

`temperature` is the student's; `max_tokens` limits each of its answers. `model`, `user`, `seed` are ignored.
A stream sends comments, then the text. On SIGINT and SIGTERM, running requests get --timeout seconds to end.
"""

import asyncio
import contextlib
import hmac
import json
import math
import os
import re
import signal
import socket
import threading
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from nano_atlas import runs, schedule
from nano_atlas.data import Problem
from nano_atlas.errors import UserError, say
from nano_atlas.runtime import learning, traces
from nano_atlas.runtime.lanes import new_session, run_session
from nano_atlas.runtime.options import KEY_VARIABLE, Config
from nano_atlas.seats import Seat
from nano_atlas.text import clean, parse_json

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, StreamingResponse
except ImportError:
    raise UserError("--serve needs a web server: pip install 'nano-atlas[serve]'") from None

MODEL = "nano-atlas"
MOST_REQUESTS = 16  # running at a time; more get HTTP 429
MOST_BYTES = 1_000_000  # of a request body; longer ones get HTTP 413
PATIENCE = 5  # seconds for a body to arrive (HTTP 408)
KEEP_ALIVE = 5.0  # seconds between two comments in a stream
HERE = r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"  # a Host header that means this machine
REFUSED = r"max_position_embeddings|context length|too long|HTTP (400|413|422)"  # caused by the request
ROLES = ("system", "developer", "user", "assistant")
FREE = "messages model user seed metadata store service_tier stream_options parallel_tool_calls".split()
FIELDS = {  # other supported fields: types, least and largest value
    "stream": ((bool,), 0, 1), "temperature": ((int, float), 0, 2),
    "max_tokens": ((int,), 1, math.inf), "max_completion_tokens": ((int,), 1, math.inf),
}  # fmt: skip
NEUTRAL = {  # values of unsupported fields that change nothing
    "n": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "logprobs": False, "stop": [], "tools": [],
    "tool_choice": "none", "response_format": {"type": "text"},
}  # fmt: skip


def serve_pair(config: Config, seats: Mapping[str, Seat]) -> None:
    """Answers each request by a session with a trace, until SIGINT or SIGTERM. Raises UserError if it cannot listen."""
    host, port = config.address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host.strip("[]"), int(port)), family=family)
    except OSError as error:
        raise UserError(f"--serve {config.serve}: {error.strerror}; choose another port or host") from None
    books = threading.Lock()  # for experience and journal
    has_sampler = any(getattr(seat, "is_batched", False) for seat in seats.values())
    turn = threading.Lock() if has_sampler else contextlib.nullcontext()  # one sampler call at a time
    with runs.Journal(config.out / "traces.jsonl") as journal:
        experience = learning.Experience(config.strategies)
        for past, _ in traces.read_traces(journal.path):
            experience.learn(past)

        def answer(question: str, temperature: float | None, max_tokens: int | None) -> tuple:
            longest = min(max_tokens or config.answer_tokens, config.answer_tokens)
            own = config.student_temperature if temperature is None else temperature
            asked = replace(config, temperature=(own, config.teacher_temperature), answer_tokens=longest)
            with books:
                session = new_session(uuid.uuid4().hex[:24], Problem("", question, None), experience, asked)
            script = run_session(session, asked, seats["teacher"].count_tokens)
            with turn:
                list(schedule.drive({0: script}, seats, workers=config.workers, timeout=config.timeout))
            outcome, trace = traces.session_record(session)
            with books:
                journal.append([trace])
                experience.learn(outcome)
            if not session.trials:  # the fault may name addresses and paths: only for the log
                say(f"session {session.session_id}: {session.fault}")
                is_refused = re.search(REFUSED, session.fault)
                why = "refused the request, which may be too long" if is_refused else "failed"
                raise HTTPException(400 if is_refused else 502, f"the student {why} ({session.session_id})")
            return session.trials[session.chosen], outcome

        app = make_app(answer)

        async def whole_app(scope, receive, send):
            with contextlib.suppress(asyncio.CancelledError):  # --timeout seconds after the signal
                await app(scope, receive, send)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # uvicorn handles them, then raises them again
        options = {"http": "h11", "ws": "none", "lifespan": "off", "access_log": False}
        options["timeout_graceful_shutdown"] = config.timeout
        say(f"running on http://{host}:{listener.getsockname()[1]}/v1")
        uvicorn.Server(uvicorn.Config(whole_app, **options)).run(sockets=[listener])


def make_app(answer: Callable) -> Starlette:
    """answer(question, temperature, max_tokens) -> (Trial, Outcome) runs in a thread; it may raise HTTPException."""
    app, places = Starlette(), threading.Semaphore(MOST_REQUESTS)

    def work(future: Future, part: str, *asked: Any) -> None:
        try:
            content = completion(*answer(*asked), part), 200
        except HTTPException as error:
            content = failure(error)
        except Exception:  # an error in this program
            traceback.print_exc()
            content = failure(HTTPException(500, "internal error"))
        places.release()
        future.set_result(content)

    async def complete(request):
        check_client(request)
        is_streamed, *asked = read_request(await receive(request))
        if not places.acquire(blocking=False):
            raise HTTPException(429, f"{MOST_REQUESTS} requests are being answered; try again later")
        future = Future()
        future.set_running_or_notify_cancel()  # not cancelled when its client disconnects
        arguments = future, "delta" if is_streamed else "message", *asked
        threading.Thread(target=work, args=arguments, daemon=True).start()
        task = asyncio.wrap_future(future)
        if is_streamed:
            return StreamingResponse(events(task), media_type="text/event-stream")
        return JSONResponse(*await task)

    model = {"id": MODEL, "object": "model"}
    for path, content in (("", {"object": "list", "data": [model]}), (f"/{MODEL}", model)):
        app.add_route(f"/v1/models{path}", lambda r, c=content: check_client(r) or JSONResponse(c))
    app.add_route("/health", lambda request: JSONResponse({"status": "ok"}))
    app.add_route("/v1/chat/completions", complete, methods=["POST"])
    app.add_exception_handler(HTTPException, lambda _, error: JSONResponse(*failure(error)))
    return app


def check_client(request) -> None:
    """Raises HTTPException for a wrong key; without a key, for a foreign Host header (DNS rebinding)."""
    key, host = os.environ.get(KEY_VARIABLE), request.headers.get("host", "")
    given = request.headers.get("authorization", "").encode("latin-1")
    if key and not hmac.compare_digest(given, os.fsencode(f"Bearer {key}")):
        raise HTTPException(401, "the bearer key is missing or wrong")
    if not key and not re.fullmatch(HERE, host, re.IGNORECASE):
        raise HTTPException(403, f"without {KEY_VARIABLE} only requests to localhost are answered")
    if request.headers.get("origin", f"//{host}").partition("//")[2] != host:
        raise HTTPException(403, "pages of another origin are refused")


async def receive(request) -> bytes:
    """The body. Raises HTTPException if it is not JSON, too long or too slow."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(400, "the content-type must be application/json")
    content = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for chunk in request.stream():
                content += chunk
                if len(content) > MOST_BYTES:
                    raise HTTPException(413, f"the body must have at most {MOST_BYTES} bytes")
    except (TimeoutError, ClientDisconnect):
        raise HTTPException(408, f"the body did not arrive within {PATIENCE} seconds") from None
    return bytes(content)


def read_request(content: bytes) -> tuple[bool, str, float | None, int | None]:
    """Whether to stream, the question, temperature and max_tokens (None if not given). Raises HTTPException."""
    try:
        body = {name: value for name, value in parse_json(content).items() if value is not None}
        for name, value in body.items():
            types, least, most = FIELDS.get(name, ((), 0, 0))
            is_right = type(value) in types and least <= value <= most
            if not is_right and name not in FREE and (name in FIELDS or value != NEUTRAL.get(name)):
                raise ValueError(f"{name[:80]} is not supported, or not with this value")
        texts = [(message["role"], read_text(message)) for message in body["messages"]]
        if not any(text.strip() for _, text in texts):
            raise ValueError("messages: no text")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = error if isinstance(error, ValueError) else "its messages need a role and a text as content"
        raise HTTPException(400, f"not a chat completion request: {why}") from None
    question = "\n\n".join(f"{role}: {text}" if len(texts) > 1 else text for role, text in texts)
    longest = body.get("max_completion_tokens", body.get("max_tokens"))
    return body.get("stream", False), question, body.get("temperature"), longest


def read_text(message: dict[str, Any]) -> str:
    """The content of a message, parts joined. Raises TypeError, KeyError, ValueError."""
    said = message["content"]
    parts = said if isinstance(said, list) else [{"type": "text", "text": said}]
    kinds = {part["type"] for part in parts} - {"text"}
    if kinds or message["role"] not in ROLES or message.get("tool_calls"):
        raise ValueError(f"messages: only texts by {', '.join(ROLES)} are supported")
    return "".join(part["text"] for part in parts)


async def events(task: asyncio.Task) -> AsyncIterator[str]:
    while not (await asyncio.wait([task], timeout=KEEP_ALIVE))[0]:
        yield ": working\n\n"
    yield f"data: {json.dumps(task.result()[0])}\n\ndata: [DONE]\n\n"


def completion(trial: traces.Trial, outcome: traces.Outcome, part: str) -> dict[str, Any]:
    """A response in OpenAI's form. part: "message", or "delta" in a stream."""
    choice = {"index": 0, part: {"role": "assistant", "content": clean(trial.text)}}
    choice["finish_reason"] = "length" if trial.is_truncated else "stop"
    kind = "chat.completion.chunk" if part == "delta" else "chat.completion"
    about = {"id": f"chatcmpl-{outcome.session_id}", "object": kind, "created": int(time.time())}
    return about | {"model": MODEL, "choices": [choice], "usage": outcome.usage}


def failure(error: HTTPException) -> tuple[dict[str, Any], int]:
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return {"error": {"message": error.detail, "type": kind, "code": error.status_code}}, error.status_code
