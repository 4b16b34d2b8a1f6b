"""The endpoint, spoken to by the official openai client."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from nano_atlas.runtime.serve import (
    KEY_VARIABLE,
    Answer,
    RequestError,
    ServeConfig,
    events,
    read_request,
    serve,
)
from nano_atlas.runtime.traces import read_traces

AGENTS = """
import time

def student(prompt, metadata):
    if "CRASH" in prompt:
        raise RuntimeError("lost")
    if "SLEEP" in prompt:
        time.sleep(1.5)
    if "describe your approach" in prompt:
        return "I would add."
    return f"<solution>{'42 {} ' if 'HELP' in prompt else 41}</solution> t={metadata['temperature']} n={metadata['max_tokens']}"

def teacher(prompt, metadata):
    return "<thinking>private</thinking><teaching>HELP</teaching>"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`python runtime_loop.py --serve 0` with agents that are Python functions, in a process of its own."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "agents.py").write_text(AGENTS)
    script = Path(__file__).parents[1] / "runtime_loop.py"
    command = [
        sys.executable,
        "-u",
        str(script),
        "--preset",
        "own",
        "--student",
        "agents:student",
        "--teacher",
        "agents:teacher",
        "--serve",
        "0",
        "--lane",
        "paired",
        "--most-requests",
        "3",
        "--most-bytes",
        "20000",
        "--out",
        "out",
    ]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {KEY_VARIABLE: "s3cret", "PYTHONPATH": str(script.parent)},
    )
    process.url = process.stdout.readline().split()[1]
    process.folder = folder
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="s3cret", max_retries=0)


def ask(client, text="6 times 7?", **options):
    return client.chat.completions.create(
        model="nano-atlas", messages=[{"role": "user", "content": text}], **options
    )


def test_the_guided_answer_comes_back_and_a_trace_is_left(client, server):
    reply = ask(client, temperature=0.25, max_tokens=77)
    assert (
        reply.choices[0].message.content == "<solution>42 {} </solution> t=0.25 n=77"
        and reply.choices[0].finish_reason == "stop"
    )
    assert (
        reply.usage.completion_tokens > 0
        and reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    )
    last = list(read_traces(server.folder / "out/traces.jsonl"))[-1]
    assert last["task"] == "6 times 7?" and last["outcome"]["returned_attempt"] == "guided"
    assert client.models.list().data[0].id == "nano-atlas"


def test_a_stream_is_the_same_text_in_pieces(client):
    chunks = list(ask(client, stream=True))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        == ask(client).choices[0].message.content
    )
    assert (
        len(chunks) > 2
        and chunks[-1].choices[0].finish_reason == "stop"
        and chunks[-1].usage.completion_tokens > 0
    )


def test_errors_are_those_of_the_protocol_and_the_server_goes_on(client, server):
    for status, text, options in (
        (502, "CRASH", {}),
        (413, "x" * 30_000, {}),
        (400, "x", {"n": 2}),
        (400, "x", {"max_tokens": -1}),
        (400, "x", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, text, **options)
        assert caught.value.status_code == status
    with pytest.raises(openai.APIError, match="lost"):
        list(ask(client, "CRASH", stream=True))
    assert ask(client).choices
    assert (
        httpx.post(
            f"{server.url}/chat/completions", content=b"{bad", headers={"Authorization": "Bearer s3cret"}
        ).json()["error"]["code"]
        == 400
    )
    assert httpx.get(f"{server.url}/nothing", headers={"Authorization": "Bearer s3cret"}).status_code == 404


def test_the_key_is_needed_but_for_health(server):
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0))
    assert httpx.get(server.url.replace("/v1", "/health")).json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/models").status_code == 401


def test_more_requests_than_allowed_are_told_to_wait(client):
    results = []

    def one():
        try:
            results.append(ask(client, "SLEEP").choices[0].finish_reason)
        except openai.RateLimitError:
            results.append("429")

    threads = [threading.Thread(target=one) for _ in range(5)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert sorted(results) == ["429", "429", "stop", "stop", "stop"]


def test_it_stops_gracefully_and_answers_what_is_under_way(client, server):
    replies = []
    thread = threading.Thread(target=lambda: replies.append(ask(client, "SLEEP")))
    thread.start()
    time.sleep(0.7)
    server.send_signal(signal.SIGTERM)
    thread.join()
    assert replies[0].choices and server.wait(20) == 0
    with pytest.raises(openai.APIConnectionError):
        ask(client)


def test_conversations_become_one_question():
    body = {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hi {}"}]},
        ],
        "stream": True,
    }
    assert read_request(json.dumps(body).encode()) == ("system: Be kind.\n\nuser: Hi {}", {}, True)
    for messages in ([], [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user"}], "x"):
        with pytest.raises(RequestError):
            read_request(json.dumps({"messages": messages}).encode())


def test_a_stream_is_kept_alive_while_the_pair_works(monkeypatch):
    monkeypatch.setattr("nano_atlas.runtime.serve.KEEP_ALIVE", 0.01)
    lines = list(events({}, lambda question, options: time.sleep(0.1) or Answer("ok", True, 1, 2), "q", {}))
    assert ": working" in lines and lines[-1] == "data: [DONE]" and '"finish_reason": "length"' in lines[-2]


def test_on_this_machine_no_key_is_needed(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    ready = threading.Event()
    place = []

    def note(text):
        place.append(text.split()[1])
        ready.set()

    threading.Thread(
        target=serve,
        args=(ServeConfig(serve=0), lambda question, options: Answer("hi", False, 1, 1), note),
        daemon=True,
    ).start()
    assert ready.wait(10)
    assert ask(openai.OpenAI(base_url=place[0], api_key="any")).choices[0].message.content == "hi"
