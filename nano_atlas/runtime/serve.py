"""The pair behind an OpenAI-compatible endpoint, so that any client uses it by changing its base URL.

    POST /v1/chat/completions    the answer that the runtime would return; with "stream": true as server-sent events
    GET  /v1/models, /health

The answer is the best of several attempts, so it is known only when all are made: a stream sends comments to keep the connection
alive, then the whole text. Clients send the key in NANO_ATLAS_API_KEY, if there is one, as bearer token. SIGINT and SIGTERM stop the
server gracefully: no new connections, requests under way are answered.
"""

import asyncio
import contextlib
import hmac
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from nano_atlas.config import derive_seed
from nano_atlas.data import Problem
from nano_atlas.errors import UserError
from nano_atlas.runs import Journal
from nano_atlas.runtime.deploy import KEY_VARIABLE
from nano_atlas.runtime.guard import Trial
from nano_atlas.runtime.lanes import Session, new_session, run_session
from nano_atlas.runtime.learning import Experience
from nano_atlas.runtime.traces import Outcome, Trace, past_outcomes
from nano_atlas.schedule import drive
from nano_atlas.seats import Seat

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise UserError("--serve needs a web server: pip install 'nano-atlas[serve]'") from None

MODEL = "nano-atlas"
MOST_REQUESTS = 16  # answered at a time; more get HTTP 429
MOST_BYTES = 1_000_000  # of a request body; longer ones get HTTP 413
KEEP_ALIVE = 5.0  # seconds between two comments in a stream


Answer = Callable[[str, dict[str, Any]], tuple[Trial, Outcome]]  # (question, options) -> what is returned
Record = Callable[[Session, Experience, Any], tuple[Outcome, Trace]]


def serve_pair(config: Any, seats: Mapping[str, Seat], record: Record) -> None:
    """Answers requests as sessions, one trace each; strategies and skills learn from those that can be scored.

    config, record: of runtime_loop.py. Ends on SIGINT or SIGTERM.
    """
    lock = threading.Lock()  # of experience, journal, and a sampler, which takes one caller at a time
    has_sampler = any(getattr(seat, "is_batched", False) for seat in seats.values())
    with Journal(config.out / "traces.jsonl") as journal:
        experience = Experience(config.strategies)
        for past in past_outcomes(journal):
            experience.learn([past])

        def answer(question: str, options: dict[str, Any]) -> tuple[Trial, Outcome]:
            student, teacher = config.temperature
            this = replace(
                config,
                seed=options.get("seed", derive_seed(config.seed, uuid.uuid4().hex)),
                temperature=(options.get("temperature", student), teacher),
                answer_tokens=min(options.get("max_tokens", config.answer_tokens), config.answer_tokens),
            )
            with lock:
                session = new_session(uuid.uuid4().hex[:24], Problem("", question, None), experience, this)
            script = run_session(session, this, seats["teacher"].count_tokens)
            with lock if has_sampler else contextlib.nullcontext():
                list(drive({0: script}, seats, workers=config.workers, timeout=config.timeout))
            with lock:
                outcome, trace = record(session, experience, this)
                journal.append([trace])
                experience.learn([outcome])
            if not session.trials:
                raise UserError(session.fault)
            return session.trials[session.chosen], outcome

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # uvicorn stops on them, and then raises them once more
        with ThreadPoolExecutor(MOST_REQUESTS) as pool:
            app = make_app(answer, pool)
            uvicorn.run(app, host=config.host, port=config.serve, lifespan="off", access_log=False)


def make_app(answer: Answer, pool: ThreadPoolExecutor) -> Starlette:
    """The ASGI application. `answer` is called in a thread per request, and may raise anything."""
    key = os.environ.get(KEY_VARIABLE, "")
    running: set[asyncio.Future] = set()

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(request: Request) -> Response:
        check_key(request, key)
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def complete(request: Request) -> Response:
        check_key(request, key)
        question, options, is_streamed = await read_request(request)
        if len(running) >= MOST_REQUESTS:
            raise HTTPException(429, f"{MOST_REQUESTS} requests are being answered; try again later")
        future = asyncio.get_running_loop().run_in_executor(pool, answer, question, options)
        running.add(future)
        future.add_done_callback(running.discard)
        if is_streamed:
            return StreamingResponse(events(future), media_type="text/event-stream")
        await asyncio.wait([future])
        status, content = result(future, "message")
        return JSONResponse(content, status)

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/chat/completions", complete, methods=["POST"]),
    ]
    handlers = {HTTPException: lambda _, error: JSONResponse(failure(error), error.status_code)}
    return Starlette(routes=routes, exception_handlers=handlers)


def check_key(request: Request, key: str) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if key and not hmac.compare_digest(given.encode(), key.encode()):
        raise HTTPException(401, "the bearer key is missing or wrong")


async def read_request(request: Request) -> tuple[str, dict[str, Any], bool]:
    """The question, the options {temperature, max_tokens, seed} that are given, whether to stream. Raises HTTPException."""
    content = b""
    async for chunk in request.stream():  # all of it: a client that is still sending reads no answer
        content = (content + chunk)[: MOST_BYTES + 1]
    if len(content) > MOST_BYTES:
        raise HTTPException(413, f"the body must have at most {MOST_BYTES} bytes")
    try:
        body = json.loads(content)
        messages = [(str(message["role"]), _text(message["content"])) for message in body["messages"]]
    except (ValueError, KeyError, TypeError) as error:
        raise HTTPException(400, f"not a chat completion request: {type(error).__name__}: {error}") from None
    options = {name: body.get(name) for name in ("temperature", "max_tokens", "seed")}
    options["max_tokens"] = body.get("max_completion_tokens") or options["max_tokens"]
    options = {name: value for name, value in options.items() if value is not None}
    if not messages:
        raise HTTPException(400, "messages is empty")
    if body.get("tools") or body.get("functions"):
        raise HTTPException(400, "tools are not supported here; give them to the student (--student-tools)")
    if body.get("n") not in (None, 1):
        raise HTTPException(400, "n must be 1")
    if not all(type(value) in (int, float) and value >= 0 for value in options.values()):
        raise HTTPException(400, "temperature, max_tokens and seed must be numbers of at least 0")
    if len(messages) == 1:
        return messages[0][1], options, bool(body.get("stream"))
    return "\n\n".join(f"{role}: {text}" for role, text in messages), options, bool(body.get("stream"))


def _text(content: Any) -> str:
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)  # KeyError: an image or a sound
    if not isinstance(content, str):
        raise TypeError("the content of a message must be a text")
    return content


async def events(future: asyncio.Future) -> AsyncIterator[str]:
    """A stream's events: comments until the answer is there, the answer, [DONE]."""
    yield ": working\n\n"
    while not (await asyncio.wait([future], timeout=KEEP_ALIVE))[0]:
        yield ": working\n\n"
    yield f"data: {json.dumps(result(future, 'delta')[1])}\n\ndata: [DONE]\n\n"


def result(future: asyncio.Future, part: str) -> tuple[int, dict[str, Any]]:
    """HTTP status and content: the completion, or the fault that its session ended in. part: "message", or "delta" in a stream."""
    if (error := future.exception()) is not None:
        return 502, failure(HTTPException(502, f"{type(error).__name__}: {error}"))
    trial, outcome = future.result()
    read, generated = sum(outcome.prompt_tokens.values()), sum(outcome.tokens.values())
    choice = {
        "index": 0,
        part: {"role": "assistant", "content": trial.text},
        "finish_reason": "length" if trial.is_truncated else "stop",
    }
    return 200, {
        "id": f"chatcmpl-{outcome.session_id}",
        "object": "chat.completion.chunk" if part == "delta" else "chat.completion",
        "created": int(time.time()),
        "model": MODEL,
        "choices": [choice],
        "usage": {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated},
    }


def failure(error: HTTPException) -> dict[str, Any]:
    """In OpenAI's form."""
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return {"error": {"message": error.detail, "type": kind, "code": error.status_code}}
