"""What a model, an endpoint or an agent may say: a reply or a fault of that question alone, soon, and never anything else."""

import json
import sys
import time

import pytest
from conftest import STUDENT_WORDS, grpo_flags, lively_checkpoint, records
from test_agents import calls, python_agent
from test_seats import server  # noqa: F401

import eval as evaluation
import train_grpo
from nano_atlas import episode
from nano_atlas.benches.arms import STUDENT, read_results
from nano_atlas.client import Client
from nano_atlas.config import parse, run_script
from nano_atlas.data import Problem, problems_of_step, training_data
from nano_atlas.errors import UserError
from nano_atlas.presets import presets
from nano_atlas.runtime.agents import open_agent
from nano_atlas.schedule import Fault, caught, drive, play, play_most
from nano_atlas.seats import EndpointSeat, Generation, Question, Reply, TokenSeat, read_reply

MESSAGES = [{"role": "user", "content": "6 times 7?"}]
PROBLEM = Problem("p", "6 times 7?", "42")
PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "no"}]},
    {"type": "text", "text": "4"},
    "2",
    {"type": "image_url"},
]


def said(content="<solution>42</solution>", finish="stop", usage=None, **message) -> dict:
    return {
        "choices": [{"message": {"content": content, **message}, "finish_reason": finish}],
        "usage": usage,
    }


# body -> the reply (text, tokens, cut off), or what the fault says
BODIES = {
    "parts": (said(PARTS), ("42", 1, False)),
    "only thoughts, cut off": (said(PARTS[:1], "length"), ("", 0, True)),
    "no content, cut off": (said(None, "length", {"completion_tokens": 9}, reasoning_content="hm"), ("", 9, True)),
    "half a pair": (said("a\ud83d b"), ("a\ufffd b", 1, False)),
    "a whole pair": (said("\U0001f642"), ("\U0001f642", 1, False)),
    "odd finish": (said("ok", {"x": [1]}), ("ok", 1, False)),
    "odd usage": (said("ok", usage=[1]), ("ok", 1, False)),
    **{f"{count!r:.9} tokens": (said("word" * 3, usage={"completion_tokens": count, "prompt_tokens": count}), ("word" * 3, 3, False))
       for count in (None, "12", True, -1, 0, 1.5, [], {}, 10**400)},
    "1e999 tokens": (json.dumps(said("word" * 3, usage={"completion_tokens": 8})).replace("8", "1e999"), ("word" * 3, 3, False)),
    "NaN tokens": (json.dumps(said("word" * 3, usage={"completion_tokens": 8})).replace("8", "NaN"), ("word" * 3, 3, False)),
    "byte order mark": ("\ufeff" + json.dumps(said("ok")), ("ok", 1, False)),
    "number": (said(5), "returned int instead of a text"),
    "object": (said({"a": 1, "type": "text"}), "returned NoneType instead of a text"),
    "parts of numbers": (said([1]), "returned int instead of a text"),
    "message null": ({"choices": [{"message": None}]}, "the reply has no message"),
    "message a text": ({"choices": [{"message": "hi"}]}, "the reply has no message"),
    "no message": ({"choices": [{}]}, "the reply has no message"),
    "choice a text": ({"choices": ["hi"]}, "the reply has no message"),
    "choice null": ({"choices": [None]}, "the reply has no message"),
    "choices an object": ({"choices": {"0": 1}}, "0 choices, not 1"),
    "two choices": ({"choices": [{}, {}]}, "2 choices, not 1"),
    "error": ({"error": {"message": "overloaded"}}, "overloaded"),
    "html": ("<html>\n<b>502</b></html>", "not JSON, or no object: '<html> <b>502</b></html>'"),
    "list": ([], "not JSON, or no object"),
    "deep": ("[" * 20_000, "not JSON, or no object"),
    "digits": ('{"choices": ' + "9" * 5000 + "}", "not JSON, or no object"),
    "nothing": ("", "0 choices, not 1"),
}  # fmt: skip


@pytest.fixture(params=BODIES)
def body(request, server):  # noqa: F811
    """A server that always answers the same; what should come of it."""
    content, expected = BODIES[request.param]
    server.script = [(200, content)] * 999
    yield server.url, expected


def matches(answer: list[Reply] | Fault, expected) -> bool:
    if isinstance(answer, Fault):
        return isinstance(expected, str) and expected in str(answer) and "\n" not in str(answer)
    (reply,) = answer
    json.dumps(reply.text, ensure_ascii=False).encode()
    return (reply.text, reply.tokens, reply.is_truncated) == expected and type(reply.prompt_tokens) is int


def test_an_endpoint_gives_a_reply_or_a_fault(body):
    url, expected = body
    began = time.monotonic()
    assert matches(EndpointSeat(url, "m").ask([Question(MESSAGES, Generation(9), 5)])[0], expected)
    assert time.monotonic() - began < 5


def test_the_runtime_goes_on_with_any_endpoint(body):
    url, expected = body
    began, found = time.monotonic(), calls([open_agent(f"{url}#m"), python_agent(lambda **_: "ok")])
    assert found[1] == "ok" and time.monotonic() - began < 5
    assert expected in found[0] if isinstance(expected, str) else found[0] == expected[0]


def evaluate(monkeypatch, path, url, count=3, *more) -> dict:
    """eval.py on `count` tasks with an endpoint as student; what tasks.jsonl holds."""
    (path / "data.jsonl").write_text(
        "".join(json.dumps({"question": f"Task {i}?", "answer": "42"}) + "\n" for i in range(count))
    )
    argv = ["eval.py", "--preset", "own", "--bench", "gsm8k", "--data", str(path / "data.jsonl"), "--probe-tokens", "0",
            "--student", f"{url}#m", "--out", str(path / "out"), *more]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    run_script(evaluation.main)
    return read_results(path / "out/tasks.jsonl")


def test_an_evaluation_goes_on_with_any_endpoint(body, tmp_path, monkeypatch, capsys):
    url, expected = body
    if isinstance(expected, str):
        with pytest.raises(SystemExit) as end:
            evaluate(monkeypatch, tmp_path, url)
        assert end.value.code == 2 and not (tmp_path / "out/results.json").exists()
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: all 3 answers failed; the first error: ") and expected in line
    else:
        results = evaluate(monkeypatch, tmp_path, url, 3, "--control", "two-votes")
        assert [result.attempt.text for result in results.values()] == [expected[0]] * 6
        assert {result.attempt.is_truncated for result in results.values()} == {expected[2]}


# ------------------------------------------------------------------------------------------------------------- one refusal


class Picky(TokenSeat):
    """Its server refuses what the words are in, by status 400."""

    def __init__(self, monkeypatch, *words):
        def request(client, method, path, body, choices):
            asked.append(body)
            if any(word in body["messages"][-1]["content"] for word in words):
                raise UserError("HTTP 400: content filter")
            return said(usage={"completion_tokens": 2})

        self.asked = asked = []
        monkeypatch.setattr(Client, "request", request)


def test_a_task_that_is_refused_is_counted_apart_and_tried_again(tmp_path, monkeypatch, capsys):
    """In every arm: those that build on the missing answer or teaching have none either, and the others all have theirs."""
    teacher = ["--teacher", "grpo=http://t#m", "--full"]
    seat = Picky(monkeypatch, "Task 1?")
    results = evaluate(monkeypatch, tmp_path, "http://s", 6, *teacher)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Infrastructure errors" in printed and "student 1, two-votes 1, grpo 1, shuffled 2" in printed
    assert "content filter" in printed and "infrastructure errors" not in str(results)
    assert {arm: sum(key[0] == arm for key in results) for arm, *_ in results}[STUDENT] == 5
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["tasks"] for row in report["scores"]][:2] == [5, 5] and len(report["errors"][STUDENT]) == 1
    seat = Picky(monkeypatch)
    whole = evaluate(monkeypatch, tmp_path, "http://s", 6, *teacher)
    asked = [body["messages"][-1]["content"] for body in seat.asked]
    assert (
        len(whole) == 6 * 6
        and set(results) < set(whole)
        and all("Task 1?" in text or "Guid" in text or "guid" in text for text in asked)
    )
    assert "Infrastructure" not in capsys.readouterr().out
    Picky(monkeypatch, "")  # nobody is asked any more
    assert evaluate(monkeypatch, tmp_path, "http://s", 6, *teacher) == whole


def test_a_prompt_that_is_too_long_for_a_checkpoint_is_one_tasks_error(tmp_path, monkeypatch, capsys):
    place = lively_checkpoint(tmp_path / "model", 0, STUDENT_WORDS)
    lines = [{"question": "Long? " * (400 if i == 2 else 1) + str(i), "answer": "1"} for i in range(5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["eval.py", "--preset", "own", "--bench", "gsm8k", "--data", str(tmp_path / "data.jsonl"), "--student", str(place),
            "--probe-tokens", "4", "--answer-tokens", "4", "--out", str(tmp_path / "out")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    evaluation.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "student 1; the first: gsm8k" in printed and "max_position_embeddings = 1024: shorten the" in printed
    )
    assert len(read_results(tmp_path / "out/tasks.jsonl")) == 4


def test_a_script_that_a_fault_ends_is_among_the_results_or_left_out(monkeypatch):
    Picky(monkeypatch, "bad")
    seats = {"student": EndpointSeat("http://s", "m")}

    def scripts(*words):
        config = episode.EpisodeConfig(probe_tokens=0)
        return [episode.sketch(Problem(w, w, "42"), config, episode.seeds(0)) for w in words]

    first, fault, last = play([caught(script) for script in scripts("good", "bad", "fine")], seats)
    assert isinstance(fault, Fault) and (first.problem.id, last.problem.id) == ("good", "fine")
    assert [one.problem.id for one in play_most(scripts("good", "bad", "fine"), seats)] == ["good", "fine"]
    assert play_most([], seats) == []
    for play_ in (play, play_most):
        with pytest.raises(Fault, match="content filter"):
            play_(scripts("bad"), seats)


def test_training_leaves_out_a_problem_that_the_students_server_refuses(place, tmp_path, monkeypatch):
    """One of two groups is left; where none is, the run ends with the server's words. Held-out problems, too."""
    options = {"student": "http://s#m", "steps": 3}
    config = parse(train_grpo.Config, grpo_flags(place, tmp_path, **options), presets("train_grpo"), "")
    training, held_out = training_data(config)
    refused = held_out[0], problems_of_step(training, 1, config.problems_per_step, config.seed)[0]
    Picky(monkeypatch, *(problem.question for problem in refused))
    train_grpo.main(grpo_flags(place, tmp_path / "some", **options))
    assert [step["unanswered"] for step in records(tmp_path / "some/metrics.jsonl")] == [0, 1, 0]
    Picky(monkeypatch, "")
    with pytest.raises(UserError, match="content filter"):
        train_grpo.main(grpo_flags(place, tmp_path / "none", **options))


# ------------------------------------------------------------------------------------------------------- agents, functions


def raising(error):
    def function(prompt, metadata):
        raise error

    return function


@pytest.mark.parametrize("function, complaint", [
    (raising(SystemExit(3)), "SystemExit: 3"), (raising(KeyboardInterrupt()), "KeyboardInterrupt"), (raising(GeneratorExit()), "GeneratorExit"),
    (raising(RecursionError("deep")), "RecursionError: deep"),
    (raising(ValueError("http://me:pw@host?api_key=sk")), "ValueError: http://***@host?api_key=***"),
    (raising(ValueError("\ud83d" * 9999)), "ValueError: \ufffd"), (lambda **_: b"4", "bytes instead of a text"),
    (lambda **_: {"content": None}, "NoneType instead of a text"), (lambda **_: {}, "NoneType"), (lambda **_: [{"type": "thinking"}], "nothing"),
    (lambda **_: iter("42"), "str_ascii_iterator"), (lambda **_: {"content": {"a": 1}, "usage": 5}, "NoneType"), (lambda: "4", "TypeError"),
])  # fmt: skip
def test_what_a_function_raises_or_returns_is_a_fault_at_once(function, complaint):
    began, (fault,) = time.monotonic(), calls([python_agent(function)])
    assert complaint in fault and len(fault) < 600 and time.monotonic() - began < 2
    fault.encode()


@pytest.mark.parametrize("value, text, tokens", [
    (PARTS, "42", 1), ("a\ud83d", "a\ufffd", 1), ({"content": PARTS, "usage": {"completion_tokens": "12"}}, "42", 1),
    ({"content": "42", "usage": "none"}, "42", 1), ({"content": "42", "usage": {"completion_tokens": 7}}, "42", 7),
])  # fmt: skip
def test_what_a_function_returns_enters_as_any_reply_does(value, text, tokens):
    (((reply,),),) = [python_agent(lambda **_: value).ask([Question(MESSAGES, Generation(9), 5)])]
    assert (reply.text, reply.tokens, reply.prompt_tokens) == (text, tokens, 3)


def test_an_http_service_is_asked_at_the_very_address_that_was_given(server):  # noqa: F811
    server.script = [(200, {"a": [{"b": PARTS}], "usage": {"completion_tokens": None}})] * 3
    for path in ("/x/v1", "/chat/completions", "/run/?key=1&n=2"):
        assert calls([open_agent(f"post+{server.url}{path}#a.0.b")]) == ["42"]
    assert [path for path, *_ in server.requests] == ["/x/v1", "/chat/completions", "/run/?key=1&n=2"]


def test_a_module_that_fails_when_it_is_imported_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    for name, code in (("exits", "raise SystemExit(1)"), ("breaks", "1 / 0"), ("typo", "def f(:")):
        (tmp_path / f"{name}_agent.py").write_text(code)
        with pytest.raises(UserError, match=f"{name}_agent:f: .*it should be MODULE:NAME"):
            open_agent(f"{name}_agent:f")


def test_the_runtimes_timeout_is_the_clients():
    """An agent that needs longer than the client's own default is waited for."""
    client = open_agent("http://localhost:9#m", "cpu", None, 777.0, 5).client
    assert (client.timeout, client.connections) == (777.0, 5)


def test_a_reply_that_was_cut_off_before_the_answer_is_no_answer_and_no_fault(server):  # noqa: F811
    server.script = [(200, BODIES["no content, cut off"][0])]
    script = episode.sketch(PROBLEM, episode.EpisodeConfig(probe_tokens=0), episode.seeds(0))
    ((sketch,),) = [
        group.values() for group in drive({0: script}, {"student": EndpointSeat(server.url, "m")})
    ]
    (attempt,) = sketch.baselines
    assert (attempt.answer, attempt.is_truncated, attempt.is_correct) == (None, True, False)


def test_many_parts_and_long_texts_take_no_time():
    began = time.monotonic()
    assert len(read_reply([{"type": "text", "text": "{"}] * 100_000, None, "").text) == 100_000
    assert read_reply("\ud83d" * 1_000_000, None, "").text == "\ufffd" * 1_000_000
    assert time.monotonic() - began < 2
