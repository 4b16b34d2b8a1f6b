"""The pair behind an OpenAI-compatible endpoint, so that any client uses it by changing its base URL.

    POST /v1/chat/completions    the answer that the runtime would return; with "stream": true as server-sent events
    GET  /v1/models, /health

The best of several attempts is known only when all are made, so a stream sends comments to keep the connection alive, then the whole
text. Clients send the key in NANO_ATLAS_API_KEY, if there is one, as bearer token. SIGINT and SIGTERM let requests under way finish.
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
from dataclasses import replace
from typing import Any

from nano_atlas import runs, schedule
from nano_atlas.data import Problem
from nano_atlas.errors import UserError
from nano_atlas.runtime import learning, traces
from nano_atlas.runtime.lanes import new_session, run_session
from nano_atlas.runtime.options import KEY_VARIABLE, Config
from nano_atlas.seats import Seat

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse, StreamingResponse
except ImportError:
    raise UserError("--serve needs a web server: pip install 'nano-atlas[serve]'") from None

MODEL = "nano-atlas"
MOST_REQUESTS = 16  # answered at a time; more get HTTP 429
MOST_BYTES = 1_000_000  # of a request body; longer ones get HTTP 413
KEEP_ALIVE = 5.0  # seconds between two comments in a stream


def serve_pair(config: Config, seats: Mapping[str, Seat]) -> None:
    """Answers requests as sessions, one trace each, and learns from those that can be scored, until SIGINT or SIGTERM."""
    books = threading.Lock()  # of experience and journal
    has_sampler = any(getattr(seat, "is_batched", False) for seat in seats.values())
    turn = threading.Lock() if has_sampler else contextlib.nullcontext()  # one caller at a time
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
            if not session.trials:
                raise UserError(session.fault)
            return session.trials[session.chosen], outcome

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # uvicorn stops on them, and then raises them once more
        host, port = config.address
        uvicorn.run(make_app(answer), host=host.strip("[]"), port=int(port), lifespan="off", access_log=False)


def make_app(answer: Callable) -> Starlette:
    """answer(question, temperature or None, max_tokens or None) -> (Trial, Outcome) runs in a thread, and may raise UserError."""
    app, places = Starlette(), threading.Semaphore(MOST_REQUESTS)

    async def complete(request):
        check_key(request)
        is_streamed, *asked = read_request(await request.body())
        if not places.acquire(blocking=False):
            raise HTTPException(429, f"{MOST_REQUESTS} requests are being answered; try again later")
        task = asyncio.create_task(run_in_threadpool(answer, *asked))
        task.add_done_callback(lambda _: places.release())
        if is_streamed:
            return StreamingResponse(events(task), media_type="text/event-stream")
        return JSONResponse(completion(*await task, "message"))

    listed = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
    app.add_route("/health", lambda request: JSONResponse({"status": "ok"}))
    app.add_route("/v1/models", lambda request: check_key(request) or JSONResponse(listed))
    app.add_route("/v1/chat/completions", complete, methods=["POST"])
    for kind in (HTTPException, UserError):
        app.add_exception_handler(kind, lambda _, error: JSONResponse(*failure(error)))
    return app


def check_key(request) -> None:
    key, given = os.environ.get(KEY_VARIABLE), request.headers.get("authorization", "")
    if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise HTTPException(401, "the bearer key is missing or wrong")


def read_request(content: bytes) -> tuple[bool, str, float | None, int | None]:
    """Whether to stream, the question, temperature and max_tokens where they are given. Raises HTTPException."""
    if len(content) > MOST_BYTES:
        raise HTTPException(413, f"the body must have at most {MOST_BYTES} bytes")
    try:
        body, texts = json.loads(content), []
        for message in body["messages"]:
            said = message["content"]  # a text, or parts of which none may be an image or a sound
            said = said if isinstance(said, str) else "".join(part["text"] for part in said)
            texts.append(f"{message['role']}: {said}" if len(body["messages"]) > 1 else said)
        limits = [body.get("temperature"), body.get("max_completion_tokens") or body.get("max_tokens")]
        if not texts or any(limit is not None and limit < 0 for limit in limits):
            raise ValueError("it needs messages, and no limit may be below 0")
        if body.get("n") not in (None, 1) or body.get("tools") or body.get("functions"):
            raise ValueError("there is one answer, and tools are the student's (--student MODULE:FUNCTION)")
    except (ValueError, KeyError, TypeError) as error:
        raise HTTPException(400, f"not a chat completion request: {type(error).__name__}: {error}") from None
    return bool(body.get("stream")), "\n\n".join(texts), *limits


async def events(task: asyncio.Task) -> AsyncIterator[str]:
    """A stream's events: comments until the answer is there, the answer, [DONE]."""
    while not (await asyncio.wait([task], timeout=KEEP_ALIVE))[0]:
        yield ": working\n\n"
    fault = task.exception()
    content = failure(fault)[0] if fault else completion(*task.result(), "delta")
    yield f"data: {json.dumps(content)}\n\ndata: [DONE]\n\n"


def completion(trial: traces.Trial, outcome: traces.Outcome, part: str) -> dict[str, Any]:
    """part: "message", or "delta" in a stream."""
    choice = {"index": 0, part: {"role": "assistant", "content": trial.text}}
    choice["finish_reason"] = "length" if trial.is_truncated else "stop"
    kind = "chat.completion.chunk" if part == "delta" else "chat.completion"
    about = {"id": f"chatcmpl-{outcome.session_id}", "object": kind, "created": int(time.time())}
    return about | {"model": MODEL, "choices": [choice], "usage": outcome.usage}


def failure(error: BaseException) -> tuple[dict[str, Any], int]:
    """In OpenAI's form, and the HTTP status; what is no HTTPException is a fault of the pair."""
    status = getattr(error, "status_code", 502)
    message = getattr(error, "detail", f"{type(error).__name__}: {error}")
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}, status
