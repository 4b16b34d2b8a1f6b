"""What of τ²-bench needs no tau2: options, tables, and what becomes of dialogues that did not happen. The rest: test_dialogue.py."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import eval as evaluation
from nano_atlas import benches
from nano_atlas.benches import tau2
from nano_atlas.benches.arms import STUDENT, TaskLog, start_or_continue
from nano_atlas.benches.tau2 import Config, in_parallel, intent, task_result
from nano_atlas.config import run_script
from nano_atlas.errors import UserError
from nano_atlas.seats import Reply

MMS = "[mms_issue]bad_wifi_calling|airplane_mode_on[PERSONA:Hard]"
OPTIONS = {"student": "http://s", "user": "http://u", "teacher": ("grpo=http://t",)}


def result(reason="user_stop", reward=1.0, arm=STUDENT, name=MMS, trial=0, info=None):
    messages = [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "help"},
                {"role": "assistant", "content": "ok", "usage": {"prompt_tokens": 100, "completion_tokens": 7}},
                {"role": "user", "content": "###STOP###", "usage": {"prompt_tokens": 50, "completion_tokens": 3}}]  # fmt: skip
    simulation = {"trial": trial, "termination_reason": reason, "reward_info": {"reward": reward}, "messages": messages,
                  "duration": 2.0} | ({"info": info} if info else {})  # fmt: skip
    told = () if arm == STUDENT else (Reply("", 0, False), Reply("<teaching>Look.</teaching>", 9, False))
    return task_result((arm, intent(name, "telecom"), name, trial), simulation, *told)


@pytest.mark.parametrize("found", [None, ModuleType("tau2")], ids=["none", "the other tau2"])
def test_a_missing_package_ends_with_the_commands_that_install_it(found, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("tau2.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tau2", found)
    monkeypatch.delitem(sys.modules, "nano_atlas.benches.dialogue", raising=False)
    monkeypatch.delattr(benches, "dialogue", raising=False)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--bench", "tau2", "--dry-run"])
    with pytest.raises(SystemExit) as exit_:
        run_script(evaluation.main)
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    for part in (
        "git clone --branch v1.0.1 https://github.com/sierra-research/tau2-bench",
        "pip install ./tau2-bench",
        "TAU2_DATA_DIR=",
    ):
        assert part in message


def test_what_needs_tau2_imports_only_what_is_there():
    """Both files are skipped where tau2 is not installed, and a name that has moved would not be missed."""
    for file in (Path(tau2.__file__).with_name("dialogue.py"), Path(__file__).with_name("test_dialogue.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module.split(".")[0] == "nano_atlas"
                and not node.module.endswith("dialogue")
            ):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.util.find_spec(
                        f"{node.module}.{alias.name}"
                    ), alias.name


def test_the_turn_that_breaks_a_dialogue_off_is_paid_for():
    """The students' tokens are 7 in its messages; only a turn of the agent's own is added to them."""
    broken = {"failure": "no text", "usage": {"prompt_tokens": 300, "completion_tokens": 40}}
    for reason, tokens in (("agent_error", 47), ("user_error", 7)):
        assert result(reason, 0.0, info=broken).attempt.tokens == tokens


def test_restart_leaves_nothing_of_the_earlier_run(tmp_path):
    for name in ("tasks.jsonl", "run.json", "tau2-student.json", "tau2-grpo.json", "mine.txt"):
        (tmp_path / name).write_text("old")
    start_or_continue(Config(**OPTIONS, out=tmp_path, restart=True), {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.txt", "run.json"]


@pytest.mark.parametrize("changes, message", [
    ({"user": None}, "--student and --user must be URLs"),
    ({"student": None}, "or --user solo"),
    ({"student": "runs/student"}, "must be URLs of servers"),
    ({"user": "runs/user"}, "must be URLs of servers"),
])  # fmt: skip
def test_student_and_user_are_urls(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**OPTIONS | changes).check()
    Config(**OPTIONS | changes, dry_run=True).check()


@pytest.mark.parametrize("changes, arms", [
    ({}, [STUDENT, "grpo", "shuffled", "untrained"]), ({"teacher": ()}, [STUDENT]), ({"teacher": (), "control": ("untrained",)}, [STUDENT, "untrained"]), ({"control": ("none",)}, [STUDENT, "grpo"]),
    ({"user": "solo", "control": ("untrained",)}, [STUDENT, "grpo", "untrained"]),
])  # fmt: skip
def test_teachers_and_controls_are_arms(changes, arms):
    config = Config(**OPTIONS | changes)
    config.check()
    assert config.arms == arms


def test_the_intent_is_read_from_the_id():
    assert (intent(MMS, "telecom"), intent("17", "airline")) == ("mms_issue", "airline")


def test_a_seat_that_is_gone_ends_the_run_and_its_dialogues_can_be_run_again():
    reasons = iter(["user_stop", "infrastructure_error", "agent_error", *["infrastructure_error"] * 20])
    yielded = []

    def run(trial):
        return result(next(reasons), 0.0, trial=trial, info={"failure": "refused"})

    with pytest.raises(UserError, match="4 dialogues in a row .* refused"):
        for done in in_parallel(run, range(9), 1):
            yielded += [result.record["termination_reason"] for result in done]
    assert yielded == ["user_stop", "infrastructure_error", "agent_error"]


def test_an_unreached_dialogue_counts_as_a_failure_and_coverage_is_shown(tmp_path, monkeypatch, capsys):
    config = Config(**OPTIONS | {"out": tmp_path, "samples": 2, "control": ("none",)})
    start_or_continue(config, {"tau2 version": "1.0.1", "floor: always transfer": "25.00 %"})
    other, unfinished = "[service_issue]lock_sim[PERSONA:None]", "[service_issue]lock[PERSONA:None]"
    with TaskLog(tmp_path / "tasks.jsonl") as log:
        log.append([
            result(trial=0),
            result("infrastructure_error", 0.0, trial=1, info={"failure": "refused"}),
            result("max_steps", 0.0, name=other),
            result("user_error", 0.0, name=other, trial=1),
            result(name=unfinished),
        ])  # fmt: skip
        log.append(result(arm="grpo", name=name, trial=trial) for name in (MMS, other) for trial in (0, 1))
    monkeypatch.setattr(sys, "argv", ["eval.py", "--bench", "tau2", "--tables", "--out", str(tmp_path)])
    evaluation.main()
    text = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    table = {row[0]: row[1:] for row in rows}
    assert table["all: student"] == ["2", "25.0", "0.0"] and table["all: grpo"] == ["2", "100.0", "100.0"]
    assert table["mms_issue: student"] == ["1", "50.0", "0.0"]
    assert table["PERSONA:None: student"] == ["1", "0.0", "0.0"]
    costs = [row for row in rows if row[:2] in (["", "dialogues"], ["student", "5"])]
    ends = ["infrastructure_error", "max_steps", "user_error", "user_stop"]
    assert costs == [["", "dialogues", "covered", *ends], ["student", "5", "80.0", "1", "1", "1", "2"]]
    assert "always transfer 25.00 %" in text and "tau2 version 1.0.1" in text
