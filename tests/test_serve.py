"""The endpoint, spoken to by the official openai client."""

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from nano_atlas.runtime.options import KEY_VARIABLE
from nano_atlas.runtime.traces import read_traces

pytestmark = pytest.mark.processes

AGENTS = """
import time

def student(prompt, metadata):
    if "CRASH" in prompt:
        raise RuntimeError("lost at http://inner:8000/v1")
    if "LONG" in prompt:
        raise ValueError("prompt 0 has 300 tokens and the model's max_position_embeddings = 256, see /models/x")
    if "FILTER" in prompt:
        raise ValueError("http://inner:8000/v1 failed (HTTP 400: content filter)")
    if "SLEEP" in prompt:
        time.sleep(1.5)
    if "describe your approach" in prompt:
        return "I would add."
    return f"<solution>{'42 {} ' if 'HELP' in prompt else 41}</solution> t={metadata['temperature']} n={metadata['max_tokens']}"

def teacher(prompt, metadata):
    return "<thinking>private</thinking><teaching>HELP</teaching>"
"""


RUNNER = """
import runtime_loop
from nano_atlas.runtime import serve

serve.MOST_REQUESTS, serve.MOST_BYTES, serve.KEEP_ALIVE, serve.PATIENCE = 3, 20_000, 0.3, 2
runtime_loop.run_script(runtime_loop.main)
"""


KEY = {"Authorization": "Bearer s3cret"}
JSON = {"Content-Type": "application/json"}
HI = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `python runtime_loop.py --serve ...` with agents that are Python functions and low limits, in a process of its own."""
    started = []

    def start(serve):
        folder = tmp_path_factory.mktemp("serve")
        (folder / "agents.py").write_text(AGENTS)
        (folder / "runner.py").write_text(RUNNER)
        options = "--preset own --student agents:student --teacher agents:teacher --lane paired --out out "
        process = subprocess.Popen(
            [sys.executable, "runner.py", *(options + serve).split()],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {KEY_VARIABLE: "s3cret", "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        started.append(process)
        process.head = [next(process.stderr)]
        while not re.search("running on http|error", process.head[-1]):
            process.head.append(next(process.stderr))
        if found := re.search(r"http://[\w.:]+", process.head[-1]):
            process.url = found[0] + "/v1"
        process.folder = folder
        process.sessions = lambda: len(list(read_traces(folder / "out/traces.jsonl")))
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(start):
    return start("--serve 0")


@pytest.fixture(scope="module")
def fresh(start):
    return start("--serve 127.0.0.1:0")


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
    outcome, trace = list(read_traces(server.folder / "out/traces.jsonl"))[-1]
    assert trace["task"] == "6 times 7?" and outcome.returned_attempt == "guided"
    assert client.models.list().data[0].id == "nano-atlas"


def test_a_stream_holds_the_same_text(client):
    chunks = list(ask(client, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ask(client).choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 0


def test_a_stream_is_kept_alive_while_the_pair_works(server):
    body = {"messages": [{"role": "user", "content": "SLEEP"}], "stream": True}
    response = httpx.post(f"{server.url}/chat/completions", json=body, headers=KEY, timeout=30)
    events = response.text.split("\n\n")
    assert events[:3] == [": working"] * 3 and events[-2:] == ["data: [DONE]", ""]
    assert response.headers["content-type"].startswith("text/event-stream")


def test_conversations_become_one_question(client, server):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi {}"}]},
    ]
    client.chat.completions.create(model="nano-atlas", messages=messages)
    _, trace = list(read_traces(server.folder / "out/traces.jsonl"))[-1]
    assert trace["task"] == "system: Be kind.\n\nuser: Hi {}"


def test_errors_are_those_of_the_protocol_and_the_server_goes_on(client, server):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for status, text, options in (
        (502, "CRASH", {}),
        (413, "x" * 300_000, {}),
        (400, "x", {"n": 2}),
        (400, "x", {"max_tokens": -1}),
        (400, "x", {"temperature": "hot"}),
        (400, "LONG", {}),
        (400, "FILTER", {}),
        (400, "x", {"tools": tools}),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, text, **options)
        assert caught.value.status_code == caught.value.body["code"] == status
        assert "inner" not in caught.value.message and "/models" not in caught.value.message
        assert text != "LONG" or "may be too long" in caught.value.message
    with pytest.raises(openai.APIError, match="the student failed"):
        list(ask(client, "CRASH", stream=True))
    image = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    for body in ({"messages": []}, {"messages": "x"}, {"messages": [{"role": "user"}]}, image, [], None):
        response = httpx.post(f"{server.url}/chat/completions", json=body, headers=KEY)
        assert response.json()["error"]["code"] == 400
    assert (
        httpx.post(f"{server.url}/chat/completions", content=b"{bad", headers=KEY | JSON).status_code == 400
    )
    assert httpx.get(f"{server.url}/nothing", headers=KEY).json()["error"]["code"] == 404
    assert ask(client).choices


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


# --------------------------------------------------------------------------------------- connections, on a real server


def connect(server) -> socket.socket:
    host, port = re.search(r"//([\w.]+):(\d+)", server.url).groups()
    return socket.create_connection((host, int(port)), timeout=10)


def head(length: object, **more) -> bytes:
    fields = {"Host": "localhost", "Content-Length": length, **KEY, **JSON, **more}
    lines = ["POST /v1/chat/completions HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def drip(peer: socket.socket, text: bytes, seconds=0.2) -> tuple[float, bytes]:
    """Sends a byte now and then until the server answers or closes: after how many seconds, and what it says."""
    start = time.monotonic()
    for index in range(len(text)):
        if select.select([peer], [], [], seconds)[0]:
            break
        peer.send(text[index : index + 1])
    try:
        return time.monotonic() - start, peer.recv(1000)
    except ConnectionError:
        return time.monotonic() - start, b""


def test_a_body_that_trickles_is_given_up_and_idle_connections_do_not_harm(fresh):
    idle = [connect(fresh) for _ in range(100)]
    peer = connect(fresh)
    peer.sendall(head(500))
    took, said = drip(peer, b"x" * 500)
    assert 1 < took < 4 and b" 408 " in said
    assert httpx.post(f"{fresh.url}/chat/completions", json=HI, headers=KEY).status_code == 200 and idle


def test_a_body_is_refused_as_soon_as_it_is_too_long(fresh):
    peer = connect(fresh)
    peer.sendall(head(10**12) + b"x" * 30_000)
    assert b" 413 " in peer.recv(1000)


@pytest.mark.parametrize("length", ["\u00b2".encode().decode("latin-1"), "-1", "1_0", "+5", "x", "1, 2"])
def test_a_length_that_is_no_number_is_a_bad_request(fresh, length):
    peer = connect(fresh)
    peer.sendall(head(length).decode().encode("latin-1") + b"{}")
    assert b" 400 " in peer.recv(1000)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_leaves_keeps_its_place_until_the_work_is_done(fresh, is_streamed):
    url, past = f"{fresh.url}/chat/completions", fresh.sessions()
    body = {"messages": [{"role": "user", "content": "SLEEP"}], "stream": is_streamed}
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, headers=KEY, timeout=0.2)
    assert httpx.post(url, json=HI, headers=KEY).status_code == 429
    deadline = time.monotonic() + 10
    while fresh.sessions() < past + 3 and time.monotonic() < deadline:  # they go on, and leave their traces
        time.sleep(0.1)
    assert fresh.sessions() == past + 3
    assert [httpx.post(url, json=HI, headers=KEY).status_code for _ in range(4)] == [200] * 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_connections_that_send_nothing_or_half_a_request_do_not_keep_it_from_ending(start, number):
    server = start("--serve [::1]:0")
    assert "[::1]" in server.head[-1]
    port = int(re.search(r":(\d+)/v1", server.head[-1])[1])
    peers = [socket.create_connection(("::1", port)) for _ in range(4)]
    peers[1].sendall(head(5)[:50])
    peers[2].sendall(head(500) + b"{")
    assert httpx.post(f"http://[::1]:{port}/v1/chat/completions", json=HI, headers=KEY).status_code == 200
    begun = time.monotonic()
    server.send_signal(number)
    assert server.wait(10) == 0 and time.monotonic() - begun < 3.5
    assert "Traceback" not in server.stderr.read()


def test_work_that_takes_longer_than_the_timeout_does_not_keep_it_from_ending(start):
    server = start("--serve 0 --timeout 1.6")
    bodies = [
        {"messages": [{"role": "user", "content": "SLEEP"}], "stream": stream} for stream in (False, True)
    ]

    def post(body):
        with contextlib.suppress(httpx.HTTPError):  # a stream breaks off
            httpx.post(f"{server.url}/chat/completions", json=body, headers=KEY, timeout=30)

    threads = [threading.Thread(target=post, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    server.send_signal(signal.SIGTERM)
    assert server.wait(6) == 0 and "Traceback" not in server.stderr.read()
    for thread in threads:
        thread.join()


def test_a_port_in_use_is_one_line(start, fresh):
    port = re.search(r":(\d+)", fresh.url.removeprefix("http:"))[1]
    server = start(f"--serve {port}")
    assert server.wait(30) == 2
    assert f"error: --serve {port}: Address already in use" in server.head[-1] and "running" not in str(
        server.head
    )
