"""What of τ²-bench needs no tau2: options, tables, and what becomes of dialogues that did not happen. The rest: test_dialogue.py."""

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation
from nano_atlas.benches import tau2
from nano_atlas.benches.results import STUDENT, TaskLog, start_or_continue
from nano_atlas.benches.tau2 import Config, in_parallel
from nano_atlas.benches.tau2_report import intent, persona, student_tokens, task_result, termination
from nano_atlas.config import run_script
from nano_atlas.errors import UserError

MMS = "[mms_issue]bad_wifi_calling|airplane_mode_on[PERSONA:Hard]"
OPTIONS = {"student": "http://s", "user": "http://u", "teacher": ("grpo=http://t",)}


def result(reason="user_stop", reward=1.0, arm=STUDENT, name=MMS, trial=0, failure=""):
    messages = [{"role": "assistant", "content": "Hi", "usage": None}, {"role": "user", "content": "help"},
                {"role": "assistant", "content": "ok", "usage": {"prompt_tokens": 100, "completion_tokens": 7}},
                {"role": "user", "content": "###STOP###", "usage": {"prompt_tokens": 50, "completion_tokens": 3}}]  # fmt: skip
    simulation = {
        "trial": trial,
        "termination_reason": reason,
        "reward_info": {"reward": reward},
        "messages": messages,
        "duration": 2.0,
    }
    simulation |= {"info": {"failure": failure}} if failure else {}
    told = {} if arm == STUDENT else {"teacher_text": "t", "teacher_tokens": 9, "teaching": "Look."}
    told = {"approach": "", "approach_tokens": 0} | told
    return task_result(arm, tau2.Problem(name, "", None, intent(name, "telecom")), simulation, told, 4)


@pytest.mark.parametrize(
    "found", [None, SimpleNamespace(origin="/nowhere/tau2/__init__.py")], ids=["none", "the other tau2"]
)
def test_a_missing_package_ends_with_the_commands_that_install_it(found, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found if name == "tau2" else real(name, *rest)
    )
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


@pytest.mark.parametrize("origin, expected", [
    ({"vcs_info": {"commit_id": "abc"}}, "abc"),
    ({"url": "file://{clone}", "dir_info": {}}, "{head}"),
    ({"url": "file:///nowhere", "dir_info": {}}, "unknown"),
    (None, "unknown"),
])  # fmt: skip
def test_the_packages_commit_is_that_of_the_address_or_clone_it_was_installed_from(
    origin, expected, tmp_path, monkeypatch
):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    text = origin and json.dumps(origin).replace("{clone}", str(tmp_path))
    monkeypatch.setattr(
        tau2.importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text)
    )
    assert tau2.installed_commit("tau2") == expected.replace("{head}", head)


def test_the_turn_that_breaks_a_dialogue_off_is_paid_for():
    """The students' tokens are 7 in its messages; only a turn of the agent's own is added to them."""
    broken = {"failure": "no text", "usage": {"prompt_tokens": 300, "completion_tokens": 40}}
    for reason, expected in (("agent_error", (47, 400)), ("user_error", (7, 100))):
        simulation = result(reason, 0.0).record["simulation"] | {"info": broken}
        assert (
            tuple(student_tokens(simulation, f"{kind}_tokens") for kind in ("completion", "prompt"))
            == expected
        )


def test_restart_leaves_nothing_of_the_earlier_run(tmp_path):
    for name in ("tasks.jsonl", "run.json", "floors.json", "tau2-student.json", "tau2-grpo.json", "mine.txt"):
        (tmp_path / name).write_text("old")
    start_or_continue(Config(**OPTIONS, out=tmp_path, restart=True), {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.txt", "run.json"]


def test_no_resume_continues_nothing(tmp_path):
    start_or_continue(Config(**OPTIONS, out=tmp_path, resume=False), {})
    start_or_continue(Config(**OPTIONS, out=tmp_path), {})
    with pytest.raises(UserError, match="--no-resume"):
        start_or_continue(Config(**OPTIONS, out=tmp_path, resume=False), {})


@pytest.mark.parametrize("changes, message", [
    ({"user": None}, "needs --student and, unless --mode solo, --user"),
    ({"student": None}, "needs --student"),
    ({"student": "runs/student"}, "must be URLs; serve a checkpoint"),
    ({"user": "runs/user"}, "must be URLs; serve a checkpoint"),
    ({"teacher": ()}, "--guidance both needs a --teacher"),
    ({"trials": 0}, "must be at least 1"),
    ({"teacher": ("shuffled=x",)}, "name of its own"),
    ({"tables": True, "restart": True}, "use one of them"),
])  # fmt: skip
def test_options_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Config(**OPTIONS | changes).check()


@pytest.mark.parametrize("changes, arms", [
    ({}, [STUDENT, "grpo", "shuffled", "untrained"]), ({"guidance": "none"}, [STUDENT]),
    ({"guidance": "teacher", "control": ("none",)}, ["grpo"]), ({"mode": "solo", "user": None, "control": ("untrained",)}, [STUDENT, "grpo", "untrained"]),
])  # fmt: skip
def test_guidance_and_controls_are_arms(changes, arms):
    config = Config(**OPTIONS | changes)
    config.check()
    assert config.arms == arms


def test_intent_and_persona_are_read_from_the_id():
    assert (intent(MMS, "telecom"), persona(MMS), intent("17", "airline"), persona("17")) == (
        "mms_issue",
        "Hard",
        "airline",
        None,
    )


def test_a_seat_that_is_gone_ends_the_run_and_its_dialogues_can_be_run_again():
    reasons = iter(["user_stop", "infrastructure_error", "agent_error", *["infrastructure_error"] * 20])
    yielded = []
    with pytest.raises(UserError, match="4 dialogues in a row .* refused"):
        for done in in_parallel(
            lambda trial: result(next(reasons), 0.0, trial=trial, failure="refused"),
            [(i,) for i in range(9)],
            1,
        ):
            yielded.append(termination(done))
    assert yielded == ["user_stop", "infrastructure_error", "agent_error"]


def test_an_unreached_dialogue_counts_as_a_failure_and_coverage_is_shown(tmp_path, monkeypatch, capsys):
    config = Config(**OPTIONS | {"out": tmp_path, "trials": 2, "control": ("none",)})
    start_or_continue(config, {"tau2 version": "1.0.1"})
    log = TaskLog(tmp_path / "tasks.jsonl")
    other = "[service_issue]lock_sim[PERSONA:None]"
    log.append(
        [
            result(trial=0),
            result("infrastructure_error", 0.0, trial=1, failure="refused"),
            result("max_steps", 0.0, name=other),
            result("user_error", 0.0, name=other, trial=1),
        ]
    )
    log.append([result(arm="grpo", name=name, trial=trial) for name in (MMS, other) for trial in (0, 1)])
    log.close()
    (tmp_path / "floors.json").write_text(json.dumps({"do nothing": 0.0, "always transfer": 0.25}))
    monkeypatch.setattr(sys, "argv", ["eval.py", "--bench", "tau2", "--tables", "--out", str(tmp_path)])
    evaluation.main()
    text = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    table = {row[0]: row[1:] for row in rows}
    assert table["student alone: all"] == ["2", "25.0", "0.0"] and table["grpo: all"] == [
        "2",
        "100.0",
        "100.0",
    ]
    assert table["student alone: mms_issue"] == ["1", "50.0", "0.0"] and table[
        "student alone: persona None"
    ] == ["1", "0.0", "0.0"]
    costs = next(row for row in rows if row[0] == "student alone" and row[1] == "4")
    assert costs[2:] == [
        "75.0",
        "4",
        "7",
        "100",
        "2.0",
    ]  # covered, tokens of guidance, of the student, of its prompts, seconds
    ends = [row for row in rows if row[0] in ("", "student alone") and len(row) == 5][-2:]
    assert ends == [
        ["", "infrastructure_error", "max_steps", "user_error", "user_stop"],
        ["student alone", "1", "1", "1", "1"],
    ]
    assert "always transfer 25.00 %" in text and "tau2 version 1.0.1" in text
    monkeypatch.setattr(
        sys, "argv", ["eval.py", "--bench", "tau2", "--view", "bad_wifi", "--out", str(tmp_path)]
    )
    evaluation.main()
    shown = capsys.readouterr().out
    assert (
        shown.count("===") == 4
        and "infrastructure_error refused" in shown
        and "[teaching] Look." in shown
        and "lock_sim" not in shown
    )
