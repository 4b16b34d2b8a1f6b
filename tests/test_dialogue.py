"""τ²-bench against the official package, with seats that follow a script. Needs tau2 and its telecom data (TAU2_DATA_DIR)."""

import json
import os
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import mean

import pytest

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
pytest.importorskip("loguru").logger.disable("tau2")
pytest.importorskip("tau2.orchestrator")

from tau2.agent.llm_agent import LLMAgent, LLMSoloAgent  # noqa: E402
from tau2.data_model.message import AssistantMessage, UserMessage  # noqa: E402
from tau2.data_model.simulation import Results, SimulationRun  # noqa: E402
from tau2.metrics.agent_metrics import compute_metrics  # noqa: E402
from tau2.runner import build_environment, get_tasks  # noqa: E402
from tau2.utils import DATA_DIR, llm_utils  # noqa: E402

import eval as evaluation  # noqa: E402
from benchmarks import tau2_official  # noqa: E402
from nano_atlas.benches import dialogue, tau2  # noqa: E402
from nano_atlas.benches.arms import STUDENT, read_results  # noqa: E402
from nano_atlas.benches.dialogue import simulate  # noqa: E402
from nano_atlas.errors import UserError  # noqa: E402
from nano_atlas.seats import EndpointSeat, Generation, Reply  # noqa: E402

if not (DATA_DIR / "tau2/domains/telecom/tasks.json").exists():
    pytest.skip("TAU2_DATA_DIR holds no telecom data", allow_module_level=True)

TASKS = get_tasks("telecom", task_split_name="base")
IS_WHOLE = bool(
    os.environ.get("TAU2_ALL")
)  # all 114 on demand; else some of each kind, two of which want a transfer
SOME = TASKS if IS_WHOLE else TASKS[::12]


class Script:
    """A seat that says `messages` one after the other, the last one for ever, and remembers what it was shown."""

    def __init__(self, *messages: dict):
        self.messages, self.shown = list(messages), []

    def complete(self, messages, generation, seed, **tools):
        self.shown.append(json.dumps([messages, tools]))
        said = self.messages.pop(0) if len(self.messages) > 1 else self.messages[0]
        return {"message": said}, Reply(said.get("content") or "", 5, False, prompt_tokens=3)


def text(words: str) -> dict:
    return {"content": words}


def call(name: str, arguments: dict | str) -> dict:
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def gold_scripts(task, is_solo: bool) -> tuple[Script, Script | None]:
    """Who does the task's gold actions in their order, handing over by a word where it is the other's turn."""
    turns = {"assistant": [], "user": [] if is_solo else [text("Hello")]}
    speaker = "assistant"
    for action in task.evaluation_criteria.actions:
        who = "assistant" if is_solo else action.requestor
        if who != speaker:
            turns[speaker].append(text("your turn"))
            speaker = who
        turns[who].append(call(action.name, action.arguments))
    if is_solo:
        return Script(*turns["assistant"], call("done", {})), None
    if speaker == "assistant":
        turns["assistant"].append(text("done"))
    return Script(*turns["assistant"], text("?")), Script(*turns["user"], text("###STOP###"))


def config_of(is_solo: bool, max_steps: int = 200) -> tau2.Config:
    return tau2.Config(user="solo" if is_solo else "http://u", answer_tokens=50, max_steps=max_steps)


def play(task, student, user=None, teacher=None, max_steps=200):
    return simulate(config_of(user is None, max_steps), task, 1, student, user, teacher)


def reward(task, student: Script, user: Script | None, teacher=None) -> float:
    return play(task, student, user, teacher)[0]["reward_info"]["reward"]


@pytest.mark.parametrize("is_solo", [False, True], ids=["user", "solo"])
def test_gold_actions_score_everything_and_trivial_policies_the_floors(is_solo):
    """On all 114 tasks: 114, 0 and 20 (TAU2_ALL=1 runs these)."""
    gold = [reward(task, *gold_scripts(task, is_solo)) for task in SOME]
    assert gold == [1.0] * len(SOME)
    end = call("done", {}) if is_solo else text("bye")

    def user():
        return None if is_solo else Script(text("help"), text("###STOP###"))

    transfer = call("transfer_to_human_agents", {"summary": "?"})
    nothing = [reward(task, Script(end), user()) for task in SOME]
    transferred = [reward(task, Script(transfer, end), user()) for task in SOME]
    assert sum(nothing) == 0 and sum(transferred) == (20 if IS_WHOLE else 2)
    assert all(tau2.intent(task.id, "") == "service_issue" for task, r in zip(SOME, transferred) if r)
    floors = {"do nothing": nothing, "always transfer": transferred}
    expected = {f"floor: {name}": f"{100 * mean(rewards):.2f} %" for name, rewards in floors.items()}
    assert dialogue.floors(config_of(is_solo), SOME) == expected


# ---------------------------------------------------------------------------------------------------- what is in the prompts


@contextmanager
def recorded_server(reply: str = "Fine.", status: int = 200):
    """An OpenAI-compatible server that gives one reply and records the bodies of requests."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.answer({"data": [{"id": "m"}]})

        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": reply}
            self.answer(
                {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 1,
                    "model": "m",
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
                }
            )

        def answer(self, body):
            payload = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()


def test_without_guidance_requests_are_those_of_the_official_agent(monkeypatch):
    """Messages and tools are byte-equal on the wire, through calls of tools and their results; litellm sent the others."""
    environment = build_environment("telecom")
    tools, policy = environment.get_tools(), environment.get_policy()
    messages = [
        UserMessage(role="user", content="My phone {is} broken <b>"),
        None,
        UserMessage(role="user", content="Grüße"),
    ]
    asked = AssistantMessage(
        role="assistant",
        tool_calls=[
            llm_utils.ToolCall(id="c", name="get_customer_by_phone", arguments={"phone_number": "1"})
        ],
    )
    messages[1] = environment.get_response(asked.tool_calls[0])

    def talk(agent):
        state = agent.get_init_state(
            [AssistantMessage(role="assistant", content="Hi! How can I help you today?")]
        )
        for message in messages:
            if message.role == "tool":
                state.messages[-1] = asked
            _, state = agent.generate_next_message(message, state)

    with recorded_server() as (url, ours):
        talk(LLMAgent(tools, policy, llm=EndpointSeat(url), llm_args={"generation": Generation(50)}))
    with recorded_server() as (url, official):
        monkeypatch.setattr("tau2.agent.llm_agent.generate", llm_utils.generate)
        talk(LLMAgent(tools, policy, llm="openai/m", llm_args={"api_base": url, "api_key": "EMPTY"}))
    assert len(ours) == len(official) == 3
    for mine, theirs in zip(ours, official):
        for name in ("messages", "tools", "tool_choice"):
            assert json.dumps(mine[name]) == json.dumps(theirs[name])


def with_canaries(task):
    """The task with a word of its own in every place that neither student nor teacher may see."""
    hidden = json.loads(task.model_dump_json())
    hidden["id"] = f"CANARY {task.id}"
    hidden["description"] = {"purpose": "CANARY", "relevant_policies": "CANARY", "notes": "CANARY"}
    hidden["user_scenario"]["persona"] = "CANARY"
    hidden["user_scenario"]["instructions"] = {
        k: f"CANARY {v}" for k, v in hidden["user_scenario"]["instructions"].items()
    }
    for action in hidden["evaluation_criteria"]["actions"]:
        action["info"] = "CANARY"
        action["action_id"] = "CANARY"
    for assertion in hidden["evaluation_criteria"]["env_assertions"]:
        assertion["message"] = "CANARY"
    hidden["evaluation_criteria"]["nl_assertions"] = ["CANARY"]
    return type(task).model_validate(hidden)


class Recorder:
    """A Seat that remembers all it was asked."""

    def __init__(self, reply: str):
        self.reply, self.asked = reply, []

    def ask(self, questions, progress=None):
        self.asked += [question.messages for question in questions]
        return [[Reply(self.reply, 11, False)] for _ in questions]

    def count_tokens(self, words):
        return len(words.split())


@pytest.mark.parametrize("is_solo", [False, True], ids=["user", "solo"])
def test_neither_student_nor_teacher_sees_what_a_task_is_scored_by(is_solo):
    for task in SOME[:4]:
        hidden = with_canaries(task)
        student, user = gold_scripts(hidden, is_solo)
        prober, teacher = (
            Recorder("I would look."),
            Recorder("<thinking>secret</thinking><teaching>Check the SIM.</teaching>"),
        )
        student.ask = prober.ask
        # (the scorer looks up actions and assertions by name, so the canaries change nothing for it)
        assert reward(hidden, student, user, teacher) == 1.0
        prompts = json.dumps([student.shown, prober.asked, teacher.asked])
        assert "CANARY" not in prompts and student.shown and len(prober.asked) == len(teacher.asked) == 1
        gold = [f"{a.name}({json.dumps(a.arguments)})" for a in task.evaluation_criteria.actions]
        assert not any(action in json.dumps(teacher.asked) for action in gold)
        if not is_solo:
            assert any("CANARY" in shown for shown in user.shown)  # the canaries would be found
        # What the teacher is shown is policy, tools, opening and approach; what the student is shown of it is the teaching.
        (question,) = teacher.asked[0]
        opening = task.ticket if is_solo else "Hello"
        policy = build_environment("telecom", solo_mode=is_solo).get_policy()
        for part in (policy, opening, "I would look.", "get_customer_by_phone"):
            assert part in question["content"]
        assert all(
            "Teacher's guidance: Check the SIM." in shown for shown in student.shown
        ) and "secret" not in str(student.shown)


def test_the_solo_agent_knows_only_the_ticket():
    task = dialogue.only_ticket(TASKS[0])
    agent = LLMSoloAgent(build_environment("telecom", solo_mode=True).get_tools(), "policy", task, llm="x")
    assert task.ticket and task.ticket in agent.system_prompt
    known = {
        name: value
        for name, value in task.model_dump().items()
        if value and name not in ("ticket", "initial_state")
    }
    assert (
        not known
        and not any(task.initial_state.model_dump().values())
        and TASKS[0].evaluation_criteria is not None
    )


def test_without_a_tag_nothing_is_injected():
    student, user = gold_scripts(TASKS[0], False)
    plain, other = gold_scripts(TASKS[0], False)
    student.ask = Recorder("plan").ask
    _, told = play(TASKS[0], student, user, Recorder("no tag"))
    reward(TASKS[0], plain, other)
    assert [reply.text for reply in told] == ["plan", "no tag"] and student.shown == plain.shown


# ------------------------------------------------------------------------------------------------- what goes wrong in dialogues

BROKEN = {
    "empty": (text("  "), "agent_error"),
    "only thoughts": (text("<think>what now"), "agent_error"),
    "no JSON": (call("get_customer_by_phone", '{"phone'), "agent_error"),
    "no object": (call("get_customer_by_phone", "[1]"), "agent_error"),
    "a number": (call("get_customer_by_phone", "5"), "agent_error"),
    "not finite": (call("get_customer_by_phone", '{"x": 1e999}'), "agent_error"),
    "no function": ({"tool_calls": [{}]}, "agent_error"),
    "no name": ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "agent_error"),
    "function null": ({"tool_calls": [{"function": None}]}, "agent_error"),
    "name a number": ({"tool_calls": [{"function": {"name": 5, "arguments": "{}"}}]}, "agent_error"),
    "call a text": ({"tool_calls": ["get_customer_by_phone"]}, "agent_error"),
    "calls a number": ({"tool_calls": 5}, "agent_error"),
    "list as it is": ({"tool_calls": [{"function": {"name": "f", "arguments": []}}]}, "agent_error"),
    "zero as it is": ({"tool_calls": [{"function": {"name": "f", "arguments": 0}}]}, "agent_error"),
    "wrong arguments": (call("get_customer_by_phone", {"x": 1}), "too_many_errors"),
    "no such tool": (call("rm", {}), "too_many_errors"),
}


@pytest.mark.parametrize("is_solo", [False, True], ids=["user", "solo"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_messages_are_failed_simulations(name, is_solo):
    message, reason = BROKEN[name]
    simulation, _ = play(TASKS[0], Script(message), None if is_solo else Script(text("help")), max_steps=30)
    assert (simulation["termination_reason"], simulation["reward_info"]["reward"]) == (reason, 0.0)
    assert SimulationRun.model_validate(simulation)
    if reason == "agent_error":
        assert simulation["info"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 5}


@pytest.mark.parametrize("given, understood", [
    ("", {}), ("  ", {}), (None, {}), ("null", {}), ("absent", {}), ({}, {}), ("{}", {}), ({"x": "\ud83d"}, {"x": "\ufffd"}), ('{"x": 1}', {"x": 1}),
])  # fmt: skip
def test_arguments_of_a_call_may_be_an_object_or_absent(given, understood):
    function = {"name": "f"} | ({} if given == "absent" else {"arguments": given})
    student = Script({"tool_calls": [{"function": function}]})
    message = dialogue.generate(student, [UserMessage(role="user", content="?")], Generation(5))
    assert message.tool_calls[0].arguments == understood


def test_a_broken_user_is_a_failed_simulation_and_says_whose_fault():
    simulation, _ = play(TASKS[0], Script(text("hi")), Script(text("")), max_steps=9)
    assert simulation["termination_reason"] == "user_error"


def test_thoughts_reach_neither_user_nor_history():
    student = Script(text("<think>SECRET</think> Restart it."))
    user = Script(text("<think>PRIVATE</think>help"), text("ok"), text("###STOP###"))
    simulation, _ = play(TASKS[0], student, user, max_steps=30)
    assert "Restart it." in user.shown[-1]
    shown = json.dumps([student.shown, user.shown, simulation])
    assert "SECRET" not in shown and "PRIVATE" not in shown


TOO_LONG = UserError("HTTP 400: maximum context length is 10")


@pytest.mark.parametrize("error, reason, is_guided", [
    (UserError("HTTP 500: boom"), "infrastructure_error", False),
    (TOO_LONG, "context_window_exceeded", False),
    (TOO_LONG, "infrastructure_error", True),  # the teacher's context says nothing about the student
    (ZeroDivisionError("what tau2 makes of it"), "unexpected_error", False),
])  # fmt: skip
def test_a_seat_that_fails_ends_the_dialogue_with_its_reason(error, reason, is_guided):
    class Gone:
        def complete(self, *_, **__):
            raise error

        ask = complete

    simulation, _ = play(TASKS[0], Gone(), Script(text("hi")), Gone() if is_guided else None)
    assert simulation["termination_reason"] == reason and simulation["reward_info"]["reward"] == 0
    assert str(error) in simulation["info"]["failure"]


# --------------------------------------------------------------------------------------------------------- the command as a whole


def test_the_command_from_seats_to_tables_and_tau2s_own_metrics(tmp_path, monkeypatch, capsys):
    """Gold replay with a teacher, nothing alone: every number of the report follows, and tau2 scores the files alike."""
    tasks = [TASKS[0], next(t for t in TASKS if "mms_issue" in t.id and t.ticket != TASKS[0].ticket)]
    monkeypatch.setattr(dialogue, "load_tasks", lambda config: tasks)
    lives = [True] * 3

    class ByTask(Recorder):
        """Does nothing unless told to; then replays the gold actions of the task whose ticket is at hand."""

        def complete(self, messages, generation, seed, **tools):
            prompt = messages[0]["content"]
            task = next(task for task in tasks if task.ticket in prompt)
            said = call("done", {})
            if "Do it." in prompt:
                said = gold_scripts(task, True)[0].messages[sum(m["role"] == "assistant" for m in messages)]
            return {"message": said}, Reply("", 5, False)

    seats = {"http://s": ByTask("I look"), "http://t": Recorder("<teaching>Do it.</teaching>")}
    monkeypatch.setattr(tau2.Config, "open", lambda self, spec: seats[spec])
    argv = ["eval.py", "--bench", "tau2", "--user", "solo", "--student", "http://s", "--teacher", "grpo=http://t", "--samples", "2",
            "--out", str(tmp_path), "--workers", "2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    with monkeypatch.context() as patch, pytest.raises(IndexError):  # dies while the student is alone
        patch.setattr(dialogue, "simulate", lambda *given: lives.pop() and simulate(*given))
        evaluation.main()
    before = len(read_results(tmp_path / "tasks.jsonl"))
    evaluation.main()  # continues
    results = read_results(tmp_path / "tasks.jsonl")
    assert 0 < before < len(results) == 4 * 2 * 2
    assert Counter((arm, r.attempt.is_correct) for (arm, *_), r in results.items()) == {
        (STUDENT, False): 4,
        ("grpo", True): 4,
        ("shuffled", True): 4,  # of these teachings, one is as good as another
        ("untrained", False): 4,
    }
    assert len(seats["http://t"].asked) == 4  # once per dialogue of its own, and never for the shuffled
    printed = capsys.readouterr().out
    assert "### mms_issue: 1 tasks" in printed and "PERSONA" in printed and "do nothing 0.00 %" in printed
    tau2_official.main(["--out", str(tmp_path)])
    for arm, expected in ((STUDENT, 0.0), ("grpo", 1.0)):
        official = Results.load(tmp_path / f"tau2-{arm}.json")
        metrics = compute_metrics(official)
        assert metrics.avg_reward == expected and metrics.pass_hat_ks == {1: expected, 2: expected}
    with pytest.raises(UserError, match="--samples 2 -> 3"):
        monkeypatch.setattr(sys, "argv", [*argv, "--samples", "3"])
        evaluation.main()
