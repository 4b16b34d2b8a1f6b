"""Agents of every kind behind one interface, and what happens when they raise, hang, return nothing, too much or garbage."""

import asyncio
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import STUDENT_WORDS, byte_tokenizer, lively_model

from nano_atlas.errors import UserError
from nano_atlas.runtime.agents import Agent, call_function, open_agent
from nano_atlas.sampler import Sampler
from nano_atlas.schedule import Call, Fault, drive
from nano_atlas.seats import Generation, Question, Reply, TokenSeat

MESSAGES = [{"role": "user", "content": "6 times 7?"}]
GENERATION = Generation(20, 0.3)


@pytest.fixture
def server():
    """An HTTP server that answers POSTs by `rule(path, body) -> (status, object or text)`, and remembers the bodies."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, {"data": [{"id": "tiny"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            running.bodies.append(body)
            self.answer(*running.rule(self.path, body))

        def answer(self, status, value):
            data = (value if isinstance(value, str) else json.dumps(value)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.bodies, running.rule = [], None
    running.url = f"http://127.0.0.1:{running.server_address[1]}"
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def python_agent(function) -> Agent:
    return Agent(partial(call_function, function))


def ask(agent) -> Reply:
    ((reply,),) = agent.ask([Question(MESSAGES, GENERATION, 5)])
    return reply


# ------------------------------------------------------------------------------------------------------------- kinds


def plain(prompt, metadata):
    return f"{prompt} {metadata['seed']} {metadata['temperature']}"


async def slow(prompt, metadata):
    await asyncio.sleep(0)
    return prompt


def pieces(prompt, metadata):
    yield from ("4", "2")


async def slow_pieces(prompt, metadata):
    for piece in ("4", "2"):
        yield piece


def counted(prompt, metadata):
    return {"content": "42", "usage": {"prompt_tokens": 11, "completion_tokens": 7}}


@pytest.mark.parametrize(
    ("function", "text"),
    [(plain, "6 times 7? 5 0.3"), (slow, "6 times 7?"), (pieces, "42"), (slow_pieces, "42"), (counted, "42")],
)
def test_python_functions_of_every_kind_also_under_a_running_event_loop(function, text):
    async def main():
        return await asyncio.get_running_loop().run_in_executor(None, ask, python_agent(function))

    assert ask(python_agent(function)).text == asyncio.run(main()).text == text


def test_usage_counts_where_it_is_told_and_is_estimated_where_not():
    assert (ask(python_agent(counted)).prompt_tokens, ask(python_agent(counted)).tokens) == (11, 7)
    assert (ask(python_agent(slow)).prompt_tokens, ask(python_agent(slow)).tokens) == (3, 3)
    unknown = python_agent(lambda prompt, metadata: {"content": "42", "usage": {"completion_tokens": None}})
    assert ask(unknown).tokens == 1


def test_a_python_agent_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_agent.py").write_text(
        "class Bot:\n    @staticmethod\n    def reply(prompt, metadata):\n        return 'hi'\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert ask(open_agent("my_agent:Bot.reply")).text == "hi"
    for spec, complaint in (
        ("my_agent:nobody", "nobody"),
        ("no_such_module:f", "No module"),
        ("my_agent:number", "not a function"),
    ):
        with pytest.raises(UserError, match=complaint):
            open_agent(spec)


def test_an_http_service_gets_prompt_and_metadata_and_its_reply_is_found_by_its_path(server):
    server.rule = lambda path, body: (
        200,
        {"result": [{"text": body["prompt"].upper()}], "usage": {"prompt_tokens": 1, "completion_tokens": 2}},
    )
    reply = ask(open_agent(f"post+{server.url}/run#result.0.text"))
    assert (reply.text, reply.prompt_tokens, reply.tokens) == ("6 TIMES 7?", 1, 2)
    assert server.bodies[0]["metadata"] == {
        "messages": MESSAGES,
        "seed": 5,
        "max_tokens": 20,
        "temperature": 0.3,
        "top_p": 1.0,
    }


def test_a_plain_endpoint_counts_the_tokens_read_too(server):
    usage = {"prompt_tokens": 9, "completion_tokens": 4}
    server.rule = lambda path, body: (
        200,
        {"choices": [{"message": {"content": "42"}, "finish_reason": "length"}], "usage": usage},
    )
    reply = ask(open_agent(server.url))
    assert (reply.text, reply.tokens, reply.is_truncated, reply.prompt_tokens) == ("42", 4, True, 9)


# ------------------------------------------------------------------------------------------------- many at a time, and faults


def calls(agents, workers=8, timeout=30.0):
    """One call to each agent, all in one session."""

    def script():
        return (yield [Call(str(i), "ask", MESSAGES, GENERATION, 0) for i in range(len(agents))])

    ((replies,),) = [
        group.values()
        for group in drive(
            {0: script()}, {str(i): a for i, a in enumerate(agents)}, workers=workers, timeout=timeout
        )
    ]
    return [str(reply) if isinstance(reply, Fault) else reply[0].text for reply in replies]


def test_faults_stay_with_the_call_that_had_them(server):
    statuses = {
        "/429": (429, "slow down"),
        "/500": (500, "oops"),
        "/garbage": (200, "<html>"),
        "/other": (200, {"x": 1}),
    }
    server.rule = lambda path, body: statuses[path]
    hang = threading.Event()

    def raises(prompt, metadata):
        raise KeyError("lost")

    agents = [python_agent(f) for f in (raises, lambda **_: hang.wait(60), lambda **_: "", lambda **_: None)]
    agents += [open_agent(f"post+{server.url}{path}") for path in statuses] + [python_agent(plain)]
    began = time.monotonic()
    replies = calls(agents, timeout=1.5)
    hang.set()
    assert time.monotonic() - began < 30
    for reply, complaint in zip(
        replies,
        (
            "KeyError: 'lost'",
            "no reply within 1.5 seconds",
            "returned nothing",
            "NoneType instead of a text",
            "HTTP 429",
            "HTTP 500",
            "not JSON",
            "KeyError: 'response'",
            "6 times 7?",
        ),
    ):
        assert complaint in reply


def test_workers_bound_how_many_calls_run_at_a_time_and_sessions_do_not_wait_for_each_other():
    running, most, lock, gate = 0, 0, threading.Lock(), threading.Event()
    three = threading.Barrier(3, timeout=60)  # on a busy machine a call could be over before the next begins

    def count(prompt, metadata):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        three.wait()
        time.sleep(0.01)
        with lock:
            running -= 1
        return "ok"

    assert calls([python_agent(count)] * 12, workers=3) == ["ok"] * 12 and most == 3

    def two_steps(seat):
        yield [Call(seat, "first", MESSAGES, GENERATION, 0)]
        yield [Call(seat, "second", MESSAGES, GENERATION, 0)]
        gate.set()
        return seat

    def waits(prompt, metadata):
        return "released" if gate.wait(60) else "stuck"

    seats = {"quick": python_agent(plain), "slow": python_agent(waits)}
    order = [
        key
        for group in drive({key: two_steps(key) for key in ("slow", "quick")}, seats, workers=4, timeout=60)
        for key in group
    ]
    assert order == ["quick", "slow"]  # quick did both of its steps while slow waited for it in its first


def test_calls_to_a_checkpoint_go_together_and_a_prompt_it_cannot_take_fails_alone():
    class Counted(TokenSeat):
        batches = []

        def ask(self, questions, progress=None):
            self.batches.append(len(questions))
            return super().ask(questions, progress)

    def script(text, seed):
        (replies,) = yield [Call("s", "ask", [{"role": "user", "content": text}], GENERATION, seed)]
        return str(replies) if isinstance(replies, Fault) else replies[0].text

    tokenizer = byte_tokenizer()
    seat = Counted(Sampler(lively_model(0, STUDENT_WORDS, tokenizer)), tokenizer)
    scripts = {i: script("too long" * 200 if i == 1 else f"fine {i}", i) for i in range(4)}
    results = {key: value for group in drive(scripts, {"s": seat}) for key, value in group.items()}
    assert seat.batches == [4, 2, 1, 1, 2]
    assert "max_position_embeddings = 1024: shorten the prompt" in results[1]
    single = {
        key: value
        for i in (0, 2, 3)
        for group in drive({i: script(f"fine {i}", i)}, {"s": seat})
        for key, value in group.items()
    }
    assert {key: results[key] for key in single} == single


def test_a_script_can_be_driven_in_a_thread_of_an_event_loop():
    async def main():
        with ThreadPoolExecutor(1) as pool:
            return await asyncio.get_running_loop().run_in_executor(pool, calls, [python_agent(slow)])

    assert asyncio.run(main()) == ["6 times 7?"]
