"""What clients may ask of the endpoint, and who may ask: `make_app` in this process, without a server."""

import json

import openai
import pytest
from starlette.testclient import TestClient

from nano_atlas.runtime.options import KEY_VARIABLE
from nano_atlas.runtime.serve import make_app
from nano_atlas.runtime.traces import Outcome, Trial, Verdict

JSON = {"Content-Type": "application/json"}
HI = {"messages": [{"role": "user", "content": "hi"}]}
ANSWER = Trial("alone", "hi", None, 1, True, Verdict(None, "nobody")), Outcome("s1", tokens={"student": 1})


@pytest.fixture
def app(monkeypatch):
    """Without a key. It answers `ANSWER`, and keeps what it was asked."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    asked = []
    app = TestClient(make_app(lambda *arguments: asked.append(arguments) or ANSWER), "http://localhost:8080")
    app.asked = asked
    return app


def test_without_a_key_this_machine_is_answered(app):
    client = openai.OpenAI(base_url="http://localhost:8080/v1", api_key="any", http_client=app)
    (choice,) = client.chat.completions.create(model="any", **HI).choices
    assert (choice.message.content, choice.finish_reason) == ("hi", "length")
    assert client.models.retrieve("nano-atlas").id == client.models.list().data[0].id == "nano-atlas"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "evil.example:8080"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "LocalHost:8080", "Origin": "http://LocalHost:8080"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 400),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 400),
        ({"Content-Type": "Application/JSON; charset=utf-8"}, 200),
    ],
)
def test_web_pages_cannot_ask_a_server_without_a_key(app, headers, status):
    response = app.post("/v1/chat/completions", content=json.dumps(HI), headers=JSON | headers)
    assert response.status_code == response.json().get("error", {"code": 200})["code"] == status
    if "Content-Type" not in headers:
        assert app.get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    "field",
    [
        *[{"temperature": value} for value in ("hot", True, -1, 2.1, [], "1")],
        *[{"max_tokens": value} for value in (0, -1, 1.5, "5", True, 10**30 * -1)],
        {"max_completion_tokens": 0, "max_tokens": 5},
        {"stream": "yes"},
        {"stream": 1},
        {"n": 2},
        {"top_p": 0.5},
        {"stop": "x"},
        {"stop": ["x"]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"top_logprobs": 2},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"presence_penalty": 1},
        {"logit_bias": {"5": 100}},
        {"reasoning_effort": "high"},
        {"messages": None},
        {"messages": []},
        {"messages": "x"},
        {"messages": {"role": "user", "content": "x"}},
        *[
            {"messages": [message]}
            for message in (
                5,
                "x",
                ["x"],
                None,
                {},
                {"role": "user"},
                {"role": "user", "content": None},
                {"role": "user", "content": 5},
                {"role": "user", "content": " "},
                {"role": "user", "content": ["x"]},
                {"role": "user", "content": []},
                {"role": "user", "content": [{"type": "text"}]},
                {"role": "user", "content": [{"type": "text", "text": 5}]},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                {"role": "user", "content": [{"type": ["text"], "text": "x"}]},
                {"role": "robot", "content": "x"},
                {"role": ["user"], "content": "x"},
                {"content": "x"},
                {"role": "tool", "tool_call_id": "1", "content": "x"},
                {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
            )
        ],
    ],
)
def test_what_is_not_honoured_is_a_mistake_of_the_client_and_the_field_is_named(app, field):
    response = app.post("/v1/chat/completions", json=HI | field)
    error = response.json()["error"]
    assert response.status_code == error["code"] == 400 and error["type"] == "invalid_request_error"
    assert next(iter(field)) in error["message"] and not app.asked


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"5",
        b'"x"',
        b"\xff",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"1" * 5000 + b"}",
        b'{"messages": ' + b"[" * 20000 + b"]" * 20000 + b"}",
        b'{"x": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        b"{" * 10**5,
    ],
)
def test_what_is_no_json_object_of_finite_numbers_is_a_mistake_of_the_client(app, content):
    response = app.post("/v1/chat/completions", content=content, headers=JSON)
    assert response.status_code == response.json()["error"]["code"] == 400 and not app.asked


def test_what_asks_for_nothing_is_accepted_and_the_newer_limit_counts(app):
    nothing = {
        "n": 1,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "stop": None,
        "response_format": {"type": "text"},
    }
    free = {
        "model": "gpt-4o",
        "user": "me",
        "seed": 1,
        "stream_options": {"include_usage": True},
        "tools": [],
    }
    more = {"temperature": 0, "max_tokens": 9, "max_completion_tokens": 7, "stream": False}
    said = {"role": "assistant", "content": "half \ud83d", "tool_calls": None, "refusal": None}
    content = json.dumps({"messages": [*HI["messages"], said], **nothing, **free, **more})
    assert app.post("/v1/chat/completions", content=content, headers=JSON).status_code == 200
    assert app.asked == [("user: hi\n\nassistant: half \ufffd", 0, 7)]


def test_a_fault_of_ours_is_an_internal_error_and_frees_its_place(monkeypatch, capfd):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)

    def broken(*asked):
        raise OSError("No space left on /disk")

    app = TestClient(make_app(broken), "http://localhost", raise_server_exceptions=False)
    for stream in [False, True] * 10:
        response = app.post("/v1/chat/completions", json=HI | {"stream": stream})
        assert "internal error" in response.text and "disk" not in response.text
        assert response.status_code == (200 if stream else 500)
    assert "No space left on /disk" in capfd.readouterr().err
