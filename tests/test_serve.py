"""The endpoint, spoken to by the official openai client."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from nano_atlas.runtime.options import KEY_VARIABLE
from nano_atlas.runtime.serve import make_app
from nano_atlas.runtime.traces import Outcome, Trial, Verdict, read_traces

pytestmark = pytest.mark.processes

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


RUNNER = """
import runtime_loop
from nano_atlas.runtime import serve

serve.MOST_REQUESTS, serve.MOST_BYTES, serve.KEEP_ALIVE = 3, 20_000, 0.3
runtime_loop.main()
"""


KEY = {"Authorization": "Bearer s3cret"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`python runtime_loop.py --serve 0` with agents that are Python functions and low limits, in a process of its own."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "agents.py").write_text(AGENTS)
    (folder / "runner.py").write_text(RUNNER)
    options = (
        "--preset own --student agents:student --teacher agents:teacher --serve 0 --lane paired --out out"
    )
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "runner.py", *options.split()],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {KEY_VARIABLE: "s3cret", "PYTHONPATH": root},
    )
    line = next(line for line in process.stderr if "running on" in line)
    process.url = re.search(r"http://[\w.:]+", line)[0] + "/v1"
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
        (400, "x", {"tools": tools}),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, text, **options)
        assert caught.value.status_code == caught.value.body["code"] == status
    with pytest.raises(openai.APIError, match="lost"):
        list(ask(client, "CRASH", stream=True))
    image = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    for body in ({"messages": []}, {"messages": "x"}, {"messages": [{"role": "user"}]}, image, [], None):
        response = httpx.post(f"{server.url}/chat/completions", json=body, headers=KEY)
        assert response.json()["error"]["code"] == 400
    assert httpx.post(f"{server.url}/chat/completions", content=b"{bad", headers=KEY).status_code == 400
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


def test_without_a_key_everybody_is_answered(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    answer = (
        Trial("alone", "hi", None, 1, True, Verdict(None, "nobody")),
        Outcome("s1", tokens={"student": 1}),
    )
    app = TestClient(make_app(lambda *asked: answer))
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="any", http_client=app)
    (choice,) = ask(client).choices
    assert (choice.message.content, choice.finish_reason) == ("hi", "length")
