"""Seats: an embedded model's replies, and an endpoint that misbehaves in every way a server can."""

import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import STUDENT_WORDS, byte_tokenizer, lively_checkpoint, lively_model

from nano_atlas import client
from nano_atlas.checkpoint import save_model
from nano_atlas.errors import UserError
from nano_atlas.runtime.agents import open_agent
from nano_atlas.sampler import Sampler
from nano_atlas.seats import EndpointSeat, Fault, Generation, Question, TokenSeat, is_url, open_seat

KEY = "sk-very-secret-key"
HELLO = [[{"role": "user", "content": "Hello"}]]


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-compatible endpoint that plays `server.script`, a list of (status, body), and then answers properly."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    # a pause takes no time, but the clock says that it did
    clock = SimpleNamespace(sleep=lambda seconds: instance.pauses.append(seconds), time=time.time)
    clock.monotonic = lambda: time.monotonic() + sum(instance.pauses)
    monkeypatch.setattr(client, "time", clock)

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
            with instance.lock:
                instance.requests.append((self.path, self.headers["Authorization"], body))
                status, reply, *headers = instance.script.pop(0) if instance.script else (200, None)
            if reply is None and self.path.endswith("/models"):
                reply = {"data": [{"id": "first"}, {"id": "second"}]}
            elif reply is None:
                content = body["messages"][-1]["content"]
                place = body.get("seed", 5) % 10
                choice = {
                    "message": {"content": f"{content} {place}"},
                    "finish_reason": "length" if place == 1 else "stop",
                }
                reply = {"choices": [choice], "usage": {"completion_tokens": 7 + place}}
            payload = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            self.send_response(status)
            for header in ({"Content-Length": str(len(payload))}, *headers):
                for name, value in header.items():
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = answer

        def log_message(self, *arguments):
            pass

    instance = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    instance.script, instance.requests, instance.pauses, instance.lock = [], [], [], threading.Lock()
    instance.url = f"http://127.0.0.1:{instance.server_port}"
    thread = threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield instance
    instance.shutdown()
    thread.join()
    instance.server_close()


def say(seat, conversations=HELLO, n=1, seeds=None):
    seeds = seeds or [5] * len(conversations)
    return seat.ask(
        [
            Question(messages, Generation(20, 0.6, 0.9), seed, n)
            for messages, seed in zip(conversations, seeds, strict=True)
        ]
    )


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_any_usual_form_of_the_url_is_taken_and_the_first_listed_model_is_used(server, ending):
    seat = EndpointSeat(server.url + ending)
    say(seat)
    (models, _, _), (chat, _, body) = server.requests
    assert (models, chat, body["model"]) == ("/v1/models", "/v1/chat/completions", "first")


def test_a_request_says_all_that_matters_and_replies_come_in_order(server):
    conversations = [[{"role": "user", "content": f"Hello {i}"}] for i in range(9)]
    replies = say(
        EndpointSeat(server.url, "named"), conversations, n=2, seeds=[2**31 + 10 * i for i in range(9)]
    )
    assert [[reply.text for reply in group] for group in replies] == [
        [f"Hello {i} 0", f"Hello {i} 1"] for i in range(9)
    ]
    assert [(reply.tokens, reply.is_truncated, reply.rollout) for reply in replies[0]] == [
        (7, False, None),
        (8, True, None),
    ]
    asked = [(key, body) for _, key, body in server.requests if body["messages"] == conversations[3]]
    assert [key for key, _ in asked] == [f"Bearer {KEY}"] * 2
    assert sorted((body for _, body in asked), key=lambda body: body["seed"]) == [
        {
            "model": "named",
            "messages": conversations[3],
            "max_tokens": 20,
            "temperature": 0.6,
            "top_p": 0.9,
            "seed": 30 + place,
        }
        for place in range(2)
    ]


@pytest.mark.parametrize("trouble", [(500, "oh"), (503, "busy"), (429, "slow down"), (200, "<html>"), (200, "[]"),
                                     (200, {"error": "overloaded"}), (200, {"choices": []})])  # fmt: skip
def test_passing_trouble_is_waited_out_longer_each_time(server, trouble):
    seat = EndpointSeat(server.url, "m")
    server.script = [trouble] * 3
    assert say(seat)[0][0].text == "Hello 5"
    assert len(server.requests) == 4 and server.pauses == sorted(server.pauses) and len(server.pauses) == 3


def test_lasting_trouble_ends_with_the_servers_own_words(server):
    seat = EndpointSeat(server.url, "m")
    server.script = [(500, "the GPU is on fire")] * 4
    (fault,) = say(seat)
    assert "/v1/chat/completions failed (HTTP 500: the GPU is on fire); check that the server" in str(fault)


def test_a_refusal_is_not_repeated_and_never_shows_the_key(server):
    seat = EndpointSeat(server.url, "m")
    server.script = [(400, f"Incorrect API key provided: {KEY}, maximum context length")]
    (fault,) = say(seat)
    assert "HTTP 400: Incorrect API key provided: ***, maximum context length" in str(fault)
    assert isinstance(fault, Fault) and KEY not in str(fault) and len(server.requests) == 1


def test_a_server_that_is_not_there_is_named_and_the_key_is_not(monkeypatch):
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    for key in (KEY, KEY + "\n"):  # a line break, as from a file, would be an illegal header
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match="http://127.0.0.1:9/v1/models failed .ConnectError") as caught:
            EndpointSeat("http://127.0.0.1:9")
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:port", "http://127.0.0.1:99999", "http:///nowhere"])
def test_a_url_that_is_none_is_refused(url, monkeypatch):
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="/models failed"):
        EndpointSeat(url)


@pytest.mark.parametrize("listed", [[], [{}], "x", [{"id": 5}], [5, None], None, {"id": "x"}])
def test_a_server_that_lists_no_model_is_answered_with_how_to_name_one(server, listed):
    server.script = [(200, {"data": listed})]
    with pytest.raises(UserError, match="lists no model; name one: URL#MODEL"):
        EndpointSeat(server.url)


@pytest.mark.parametrize("given, asked", [
    ("/v1beta/openai", "/v1beta/openai/chat/completions"), ("/api/paas/v4/", "/api/paas/v4/chat/completions"),
    ("/v9/chat/completions", "/v9/chat/completions"), ("/chat/completions", "/chat/completions"),
    ("/v1?api-version=3", "/v1/chat/completions?api-version=3"), ("", "/v1/chat/completions"),
])  # fmt: skip
def test_a_base_url_is_used_as_given(server, given, asked):
    seat = open_seat(f"{server.url}{given}#org/model/x")
    assert say(seat)[0][0].text == "Hello 5"
    assert [path for path, *_ in server.requests] == [asked] and seat.model == "org/model/x"


def test_a_user_and_password_in_the_url_reach_the_server_and_no_message(server):
    secret = server.url.replace("//", "//me:p%40ss@")
    server.script = [(200, None), (400, f"no {secret}/v1?api_key=sk-9&x=1")]
    (reply,), (fault,) = say(EndpointSeat(secret, "m")), say(EndpointSeat(secret, "m"))
    assert reply[0].text == "Hello 5" and server.requests[0][1].startswith("Basic ")
    assert "p%40ss" not in str(fault) and "sk-9" not in str(fault) and "api_key=***&x=1" in str(fault)


def test_a_key_that_is_cut_off_within_a_message_is_not_shown_in_part(server):
    server.script = [(400, "x" * (300 - len(KEY) + 1) + KEY)]
    assert KEY[:4] not in str(say(EndpointSeat(server.url, "m"))[0])


@pytest.mark.parametrize("key", ["schlüssel", "sk 1", "a\nb"])
def test_a_key_that_cannot_be_sent_is_refused(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY has spaces or non-ASCII"):
        EndpointSeat("http://localhost:9", "m")


@pytest.mark.parametrize("told, waits", [
    ("30", [30.0]), ("0.5", [1.0]), ("99999", [120.0]), ("0", [1.0]), ("soon", [1.0]), ("-5", [1.0]), ("", [1.0]),
    ("Wed, 21 Oct 2015 07:28:00 GMT", [1.0]),
])  # fmt: skip
def test_a_server_is_waited_for_as_long_as_it_says(server, told, waits):
    server.script = [(429, "slow down", {"Retry-After": told})]
    assert say(EndpointSeat(server.url, "m"))[0][0].text == "Hello 5" and server.pauses == waits


def test_waits_that_are_asked_for_are_no_tries_but_end_with_the_timeout(server):
    server.script = [(429, "slow down", {"Retry-After": "30"})] * 99
    assert "HTTP 429" in str(say(EndpointSeat(server.url, "m", timeout=200))[0])
    assert server.pauses == [30.0] * 6


def test_one_timeout_holds_for_all_tries():
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        seat = EndpointSeat(f"http://127.0.0.1:{silent.getsockname()[1]}", "m", timeout=0.5)
        assert "ReadTimeout" in str(say(seat)[0]) and time.monotonic() - began < 2


REFUSALS = [
    ("max_tokens", "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."),
    ("seed", {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "input": 5}]}),
    ("seed", "Invalid JSON payload received. Unknown name \"seed\": Cannot find field."),
    ("temperature", "Unsupported value: 'temperature' does not support 0.6 with this model."),
    ("top_p", "`temperature` and `top_p` cannot both be specified for this model."),
]  # fmt: skip


@pytest.mark.parametrize("name, said", REFUSALS)
def test_a_field_that_a_server_refuses_is_left_out_or_renamed_from_then_on(server, name, said):
    seat = EndpointSeat(server.url, "m")
    server.script = [(400, said), (200, None)]
    conversations = [*HELLO, *HELLO]
    for conversation in conversations:
        assert say(seat, [conversation])[0][0].text.startswith("Hello")
    fields = [set(body) for _, _, body in server.requests]
    assert (
        len(fields) == 3 and name in fields[0] and fields[0] - fields[1] == {name} and fields[1] == fields[2]
    )
    assert fields[1] - fields[0] == ({"max_completion_tokens"} if name == "max_tokens" else set())


def test_a_length_that_is_too_large_is_no_refusal_of_the_field(server):
    seat = EndpointSeat(server.url, "m")
    server.script = [(400, "max_tokens is too large: 20. This model supports at most 10 completion tokens")]
    assert "too large" in str(say(seat)[0]) and len(server.requests) == 1


def test_a_server_that_is_gone_is_not_asked_a_thousand_times(server):
    seat = EndpointSeat(server.url, "m", connections=2)
    server.script = [(200, None), *[(503, "gone")] * 4000]
    replies = say(seat, HELLO * 1000)
    assert sum(isinstance(reply, Fault) for reply in replies) == 999
    assert len(server.requests) <= 1 + 4 * (2 + 2) and "503" in str(replies[-1])


@pytest.mark.parametrize(
    "address", ["localhost:8000", "127.0.0.1:8000/v1#m", "[::1]:8000", "host.example:80?x=1"]
)
def test_an_address_without_http_is_answered_with_the_url(address):
    for open_ in (open_seat, open_agent):
        with pytest.raises(UserError, match="write http://" + re.escape(address)):
            open_(address)
    with pytest.raises(UserError, match=r"write post\+http://" + re.escape(address)):
        open_agent("post+" + address)


def test_a_completion_may_carry_other_fields_and_gives_the_servers_own_choice_too(server):
    seat = EndpointSeat(server.url, "m")
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    message, usage = {"content": None, "tool_calls": [call]}, {"prompt_tokens": 3, "completion_tokens": 2}
    server.script = [
        (200, {"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": usage})
    ]
    choice, reply = seat.complete(HELLO[0], Generation(20), 2**31 + 5, tools=["t"])
    assert choice["message"]["tool_calls"] == [call]
    assert (reply.text, reply.prompt_tokens, reply.tokens, reply.is_truncated) == ("", 3, 2, False)
    assert server.requests[-1][2]["tools"] == ["t"] and server.requests[-1][2]["seed"] == 5


def test_without_a_key_the_one_that_vllm_ignores_is_sent(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    say(EndpointSeat(server.url, "m"))
    assert server.requests[0][1] == "Bearer EMPTY"


def test_an_embedded_reply_ends_at_the_end_of_turn_which_counts_as_a_token_but_is_no_text():
    tokenizer = byte_tokenizer()
    seat = TokenSeat(Sampler(lively_model(0, STUDENT_WORDS, tokenizer)), tokenizer)
    (replies,) = seat.ask([Question(HELLO[0], Generation(12, 1.0), 3, n=40)])
    (end,) = tokenizer.eos_ids
    assert {reply.is_truncated for reply in replies} == {True, False}
    for reply in replies:
        ids = reply.rollout.completion_ids
        assert reply.tokens == len(ids) == len(reply.rollout.logprobs) and "<|im_end|>" not in reply.text
        assert reply.is_truncated == (end not in ids) and (not reply.is_truncated or len(ids) == 12)
        assert end not in ids[:-1]
        assert reply.text == tokenizer.decode(ids[:-1] if ids[-1] == end else ids)
        assert list(reply.rollout.prompt_ids) == tokenizer.chat_ids(HELLO[0], add_generation_prompt=True)


def test_an_embedded_seat_follows_the_weights_of_its_model():
    tokenizer = byte_tokenizer()
    model = lively_model(0, STUDENT_WORDS, tokenizer)
    seat = TokenSeat(Sampler(model), tokenizer)
    before = seat.ask([Question(HELLO[0], Generation(12, 0.0), 0)])[0][0].text
    model.load_state_dict(lively_model(0, ("x", "y", "<|im_end|>"), tokenizer).state_dict())
    after = seat.ask([Question(HELLO[0], Generation(12, 0.0), 0)])[0][0].text
    assert "x" not in before + "y" and set(after) <= {"x", "y"}


def test_the_thinking_switch_of_a_checkpoint_is_kept_with_it_and_reaches_the_template(tmp_path):
    tokenizer, prompts = byte_tokenizer(), []
    switched = type(tokenizer)(
        tokenizer.backend, "{{ 'on' if enable_thinking else 'off' }}", eos_token="<|im_end|>"
    )
    for choice in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        switched.config |= choice
        save_model(tmp_path / "model", lively_model(0, STUDENT_WORDS, tokenizer), switched)
        prompts.append(open_seat(str(tmp_path / "model")).prompt_ids(HELLO[0]))
    assert [switched.decode(ids) for ids in prompts] == ["off", "on", "off"]


def test_a_seat_opens_from_a_directory_or_a_url(server, tmp_path):
    assert is_url("http://host") and is_url("https://host") and not is_url("runs/http")
    assert (open_seat(server.url).model, open_seat(f"{server.url}#other/one").model) == ("first", "other/one")
    seat = open_seat(str(lively_checkpoint(tmp_path / "model", 0, STUDENT_WORDS)))
    assert isinstance(seat, TokenSeat) and seat.count_tokens("héllo") == 6
    with pytest.raises(UserError, match="nowhere"):
        open_seat(str(tmp_path / "nowhere"))
