"""CRMArena-Pro on a synthetic fixture: five records and a table of three accounts. The live organisation is not reached."""

import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest

import eval as evaluation
from nano_atlas import protocol
from nano_atlas.answers import extract_answer
from nano_atlas.benches import crmarena
from nano_atlas.benches.arms import SAME_BUDGET, SHUFFLED, STUDENT, TWO_VOTES, UNTRAINED, read_results
from nano_atlas.errors import UserError
from nano_atlas.seats import Fault, Generation, Question, Reply

VIOLATION = "policy_violation_identification"  # its gold answer is the violated article, or "None"
ARTICLES = {0: "ka0001", 1: None, 2: None, 3: None}
RECORDS = [
    {"idx": i, "task": VIOLATION, "query": f"Which article does agent {i} violate?", "answer": [gold],
     "metadata": {"required": "Today is 2024-05-01.", "optional": "never shown"}, "reward_metric": "exact_match"}
    for i, gold in ARTICLES.items()
] + [{"idx": 9, "task": "knowledge_qa", "query": "?", "answer": ["text"], "metadata": {}, "reward_metric": "fuzzy_match"}]  # fmt: skip


@pytest.fixture
def tasks_file(tmp_path):
    path = tmp_path / "b2b.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


class Agent:
    """Looks its agent up before it answers, and believes what it finds; a teaching makes it find a violation everywhere."""

    def __init__(self):
        self.asked, self.calls = [], 0

    def ask(self, questions, progress=None):
        self.asked += [question.messages for question in questions]
        self.calls += 1
        return [[self.reply(question.messages)] * question.n for question in questions]

    def reply(self, messages):
        last, first = messages[-1]["content"], messages[0]["content"]
        if protocol.ANSWER_FORMATS["solution"] not in first:
            return Reply("<teaching>Be strict.</teaching>" if "Diagnose" in last else "look it up", 10, False)
        agent = first.split("agent ")[1][0]
        if len(messages) == 1:
            made_up = "Rows: [] <solution>ka0009</solution>"
            return Reply(
                f"<think>x</think><execute> SELECT a FROM b WHERE c = {agent} </execute>{made_up}", 10, False
            )
        if last.startswith("Error"):
            return Reply("<solution>None</solution>", 1, False)
        found = json.loads(last.removeprefix("Rows: "))
        strict = "Be strict" in first
        return Reply(
            f"<solution>{found[0] if found else 'KA0001' if strict else 'none'}</solution>", 5, False
        )

    def count_tokens(self, text):
        return len(text.split())


def query(text):
    agent = int(text[-1])
    return (
        "Error: no such field"
        if agent == 3
        else "Rows: " + json.dumps([ARTICLES[agent]] * bool(ARTICLES[agent]))
    )


def test_the_student_queries_until_it_answers():
    agent = Agent()
    seat = crmarena.QueryingSeat(agent, query)
    replies = seat.ask(
        [Question(protocol.baseline_messages(f"agent {i}"), Generation(9), i, n=2) for i in (0, 1, 3)]
    )
    assert [[reply.text for reply in group] for group in replies] == [
        ["<solution>ka0001</solution>"] * 2,
        ["<solution>none</solution>"] * 2,
        ["<solution>None</solution>"] * 2,
    ]
    assert [group[0].tokens for group in replies] == [
        15,
        15,
        11,
    ] and agent.calls == 2  # all conversations advance together
    assert agent.asked[-1][1:] == [
        {"role": "assistant", "content": "<execute> SELECT a FROM b WHERE c = 3 </execute>"},
        {"role": "user", "content": "Error: no such field"},
    ]


def test_a_student_that_only_queries_is_stopped():
    class Endless(Agent):
        def reply(self, messages):
            return Reply("<execute>again 0</execute>", 1, False)

    agent = Endless()
    ((reply,),) = crmarena.QueryingSeat(agent, lambda text: "Rows: " + "x" * 9999).ask(
        [Question(protocol.baseline_messages("agent 0"), Generation(9), 0)]
    )
    assert agent.calls == crmarena.TURNS == reply.tokens and extract_answer(reply.text) is None
    assert len(agent.asked[-1][-1]["content"]) < crmarena.SHOWN_CHARACTERS + 50


def test_a_query_that_never_ends_is_none_however_often_it_begins():
    agent = Agent()
    agent.reply = lambda messages: Reply("<execute>" * 100_000, 1, False)
    began = time.monotonic()
    ((reply,),) = crmarena.QueryingSeat(agent, query).ask(
        [Question(protocol.baseline_messages("agent 0"), Generation(9), 0)]
    )
    assert agent.calls == 1 and reply.tokens == 1 and time.monotonic() - began < 2


def test_a_conversation_that_fails_is_a_fault_of_its_question_alone():
    class Shy(Agent):
        def ask(self, questions, progress=None):
            return [
                Fault("HTTP 400") if "agent 1" in str(q.messages) else [self.reply(q.messages)]
                for q in questions
            ]

    def lost(text):
        if text[-1] == "2":
            raise Fault("Salesforce does not answer")
        return query(text)

    questions = [Question(protocol.baseline_messages(f"agent {i}"), Generation(9), i, n=2) for i in range(3)]
    (first, *_), refused, failed = crmarena.QueryingSeat(Shy(), lost).ask(questions)
    assert (
        first.text == "<solution>ka0001</solution>"
        and "HTTP 400" in str(refused)
        and "Salesforce" in str(failed)
    )


class Wrong(Exception):
    content = [{"message": "malformed query"}]


@pytest.mark.parametrize("at_login, error, message", [
    (True, Wrong("INVALID_LOGIN: pass-9"), "no Salesforce login .Wrong: INVALID_LOGIN: \\*\\*\\*.; check SALESFORCE_USERNAME"),
    (True, OSError("no route to host"), "no Salesforce login .OSError: no route to host"),
    (False, OSError("connection reset"), "Salesforce does not answer .connection reset.; check SALESFORCE_USERNAME"),
    (False, Wrong(), None),
])  # fmt: skip
def test_a_wrong_login_and_a_lost_network_are_one_line(at_login, error, message, monkeypatch):
    class Salesforce:
        def __init__(self, **account):
            self.query_all("") if at_login else None

        def query_all(self, text):
            raise error

    package = ModuleType("simple_salesforce")
    package.Salesforce, package.exceptions = Salesforce, SimpleNamespace(SalesforceError=Wrong)
    monkeypatch.setitem(sys.modules, "simple_salesforce", package)
    for name in crmarena.ACCOUNT.values():
        monkeypatch.setenv(name, "pass-9")
    if message is None:  # the student may correct it
        assert crmarena.salesforce()("SELECT") == "Error: [{'message': 'malformed query'}]"
        return
    with pytest.raises(UserError, match=message):
        crmarena.salesforce()("SELECT")


@pytest.mark.parametrize("changes, message", [
    ({"idx": 0}, ":2: line 1 also has task and idx .*:0"), ({"query": None}, ":2: needs the fields idx"), ({"task": 5}, ":2: needs the fields idx"),
    ({"answer": "ka01"}, ":2: needs the fields idx"),
])  # fmt: skip
def test_a_line_that_is_no_task_or_one_twice_is_named(changes, message, tmp_path):
    path = tmp_path / "b2b.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (RECORDS[0], RECORDS[1] | changes)))
    with pytest.raises(UserError, match=message):
        crmarena.load_tasks(path, None)
    path.write_text(json.dumps(RECORDS[-1]) + "\n")
    with pytest.raises(UserError, match="no task with reward_metric exact_match"):
        crmarena.load_tasks(path, None)


def test_a_dry_run_needs_no_account_and_prints_the_floor(tasks_file, tmp_path, monkeypatch, capsys):
    argv = [
        "eval.py",
        "--preset",
        "own",
        "--bench",
        "crmarena",
        "--data",
        str(tasks_file),
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as end:
        evaluation.main()
    assert not end.value.code and not (tmp_path / "out").exists()
    assert f"{VIOLATION}: 4 tasks; None as the answer to each scores 75.0%" in capsys.readouterr().out


@pytest.mark.parametrize("answer, gold, expected", [
    ("ka01, KA02", "ka02, ka01", True), ("['a', 'b']", "a, b", True), ("a", "a, b", False), ("None", "None", True),
    ("none.", "None", True), ("", "None", False), ("a; b", "b, a", True),
])  # fmt: skip
def test_answers_are_compared_as_sets(answer, gold, expected):
    assert crmarena.verify("", answer, "", gold) == expected


def test_tasks_are_read_by_kind_and_what_cannot_be_scored_is_counted(tasks_file, tmp_path, capsys):
    tasks = crmarena.load_tasks(tasks_file, 3)
    assert list(tasks) == [VIOLATION] and [p.answer for p in tasks[VIOLATION]] == ["ka0001", "None", "None"]
    question = tasks[VIOLATION][0].question
    assert question.startswith("Today is 2024-05-01.") and "never shown" not in question
    assert "left out 1 tasks" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"idx": 1, "task": "x"}\n')
    with pytest.raises(
        UserError, match="bad.jsonl:1: needs the fields idx, task, query, reward_metric, answer"
    ):
        crmarena.load_tasks(bad, None)


def test_the_command_from_tasks_and_queries_to_accuracies(tasks_file, tmp_path, monkeypatch, capsys):
    agent = Agent()
    monkeypatch.setattr(evaluation.Config, "open", lambda *_: agent)
    argv = ["eval.py", "--preset", "own", "--bench", "crmarena", "--data", str(tasks_file), "--student", "http://s", "--teacher",
            "grpo=http://t", "--out", str(tmp_path / "out")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    for name in crmarena.ACCOUNT.values():
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=", ".join(crmarena.ACCOUNT.values())):
        evaluation.main()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(crmarena, "salesforce", lambda: query)
    evaluation.main()
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    # strict: accuses two of three innocents; the error saves the third
    assert [row[2:4] for row in rows if row[1:2] == [f"{VIOLATION} (4)"]] == [["100.0", "50.0"]]
    results = read_results(tmp_path / "out/tasks.jsonl")
    assert {arm for arm, *_ in results} == {STUDENT, "grpo", SHUFFLED, UNTRAINED, TWO_VOTES, SAME_BUDGET}
    assert not any("ka0001" in json.dumps(messages[0]) for messages in agent.asked)
