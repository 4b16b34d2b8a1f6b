"""What runtime_loop.py tells the person who runs it: at the start, at the end, and as the next command, which works as printed."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from runtime_fakes import TASKS, Student, Teacher, run, traces_of

import runtime_loop
import train_grpo
from nano_atlas import world
from nano_atlas.config import parse
from nano_atlas.data import load_problems
from nano_atlas.errors import UserError
from nano_atlas.presets import presets
from nano_atlas.runtime import deploy
from nano_atlas.runtime.traces import export_traces, show_sessions, summary
from runtime_loop import Config


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(out=tmp_path / "out", student="fake", teacher="fake-teacher", lane="paired", batch=5)


class Broken(Student):
    """Fails on the tasks of which `is_ill(number)`, with one of two messages."""

    is_batched = False

    def __init__(self, is_ill):
        super().__init__()
        self.is_ill = is_ill

    def reply(self, prompt, seed):
        number = next(i for i in range(23) if f"Task {i} is" in prompt)
        if self.is_ill(number):
            raise RuntimeError("no\nkey" if number % 4 else "quota")
        return super().reply(prompt, seed)


def main(monkeypatch, capsys, *argv) -> str:
    monkeypatch.setattr("sys.argv", ["runtime_loop.py", *map(str, argv)])
    runtime_loop.main()
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- failures


def test_failures_are_counted_by_reason_and_listed(config):
    outcomes = run(config, TASKS, Broken(lambda number: number < 8), Teacher())
    said = summary(outcomes, config.out)
    assert (
        f"8 FAILED (the same command tries them again)\n  to list them       --out {config.out} --show failed\n"
        in said
    )
    assert "failed                   6   student: RuntimeError: no key\n" in said
    assert "failed                   2   student: RuntimeError: quota\n" in said
    listed = list(show_sessions(config.out, "failed"))
    assert len(listed) == 16 and listed[2].endswith("unscored  paired  Task 1 is hard.")
    assert listed[3] == "  student: RuntimeError: no key"
    run(config, TASKS, Student(), Teacher())
    assert list(show_sessions(config.out, "failed")) == []  # what succeeded since is not among them
    assert len(list(show_sessions(config.out, "approved"))) == 23


@pytest.mark.parametrize(("healthy", "code"), [(0, 1), (1, None)])
def test_a_run_of_which_every_session_failed_ends_with_status_1(healthy, code, tmp_path, monkeypatch, capsys):
    seats = {"student": Broken(lambda number: number >= healthy), "teacher": Teacher()}
    monkeypatch.setattr(runtime_loop, "load_tasks", lambda config: TASKS)
    monkeypatch.setattr(runtime_loop, "open_seats", lambda config: seats)
    argv = "--preset", "own", "--tasks", "t", "--student", "s", "--teacher", "t", "--out", tmp_path / "out"
    if code is None:
        assert "22 FAILED" in main(monkeypatch, capsys, *argv)
        return
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, capsys, *argv)
    assert end.value.code == code and "student: RuntimeError: quota" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ at the start and at the end


@pytest.mark.parametrize(
    ("changes", "unanswered", "said"),
    [
        ({}, 0, ""),
        ({}, 7, "7 of 23 tasks cannot be scored (no known answer, --verifier or --judge)"),
        ({"judge": "http://j"}, 7, ""),
        ({"verifier": "m:f"}, 23, ""),
        ({"batch": 23}, 0, "23 tasks are one batch, and within it nothing adapts: lower --batch 23"),
        ({"batch": 32, "strategies": ("concise",), "lane": "adaptive"}, 0, "nothing adapts"),
        ({"batch": 32, "strategies": ("concise",)}, 0, ""),
    ],
)
def test_what_one_might_not_expect_is_said_at_the_start(config, changes, unanswered, said, capsys):
    tasks = [replace(task, answer=None) for task in TASKS[:unanswered]] + TASKS[unanswered:]
    runtime_loop.forecast(replace(config, **changes), tasks)
    text = capsys.readouterr().err
    assert said in text and bool(text) == bool(said)


def test_a_service_without_a_judge_says_so(capsys):
    config = Config(student="s", teacher="t", serve="0")
    runtime_loop.forecast(replace(config, judge="j"), None)
    assert not capsys.readouterr().err
    runtime_loop.forecast(config, None)
    assert "the answers cannot be scored" in capsys.readouterr().err


def test_unscored_sessions_are_counted_in_the_summary(config):
    tasks = [replace(task, answer=None) for task in TASKS[:4]] + TASKS[4:6]
    assert "without a score          4   (nobody knows" in summary(run(config, tasks, Student(), Teacher()))
    assert "without a score" not in summary(run(config, TASKS[:6], Student(), Teacher()))


def test_the_hint_to_review_names_the_directory(config):
    outcomes = run(replace(config, require_approval=True), TASKS[:2], Student(), Teacher())
    assert f"  to list them       --out {config.out} --show pending\n" in summary(outcomes, config.out)


@pytest.mark.parametrize("preset", ["nano", "qwen3-0.6b-24gb"])
def test_a_missing_teacher_of_a_preset_names_the_commands_that_make_it(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--preset", preset, "--tasks", "t"]
    config = parse(Config, argv, presets("runtime_loop"), "")
    more = "" if preset == "nano" else f" --preset {preset} --problems FILE"
    with pytest.raises(UserError, match=f"train_sft.py.* && python train_grpo.py{more}$"):
        runtime_loop.open_seat(config, config.teacher)


# ------------------------------------------------------------------------------------------------------------- the next step


def exported(monkeypatch, capsys, *argv) -> tuple[dict, list[str]]:
    """What the options in the line printed after an export mean to train_grpo.py, and the line."""
    said = main(monkeypatch, capsys, "--export", "hard.jsonl", *argv)
    *python, script = shlex.split(said.splitlines()[-1])[:2]
    assert (python, script) == (["python"], "train_grpo.py")
    line = shlex.split(said.splitlines()[-1])[2:]
    return vars(parse(train_grpo.Config, line, presets("train_grpo"), "")), line


def test_the_line_after_an_export_trains_this_pair_as_it_was_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--preset", "own", "--tasks", "t", "--student", "my student", "--teacher", "teachers/1", "--out", "live/run",
            "--teaching-tokens", "77", "--temperature", "0", "0.9", "--answer-format", "boxed"]  # fmt: skip
    run(parse(Config, argv, presets("runtime_loop"), ""), TASKS, Student(), Teacher())
    Path("live/teacher-grpo-2").mkdir()
    told, line = exported(monkeypatch, capsys, "--out", "live/run")  # --export needs no other option
    assert (told["preset"], told["student"], told["teacher"]) == ("own", "my student", Path("teachers/1"))
    assert (told["problems"], told["out"]) == (Path("hard.jsonl"), Path("live/teacher-grpo-3"))
    assert (told["teaching_tokens"], told["temperature"], told["answer_format"]) == (77, (0.0, 0.9), "boxed")
    assert not any("answer-tokens" in flag or "device" in flag for flag in line)  # as the preset has it
    assert len(load_problems("hard.jsonl")) == 23


@pytest.mark.parametrize(("student", "teacher", "told_student"), [
    ("mine:run", "http://t", "DIRECTORY"),
    ("http://s#m", "post+http://t", "http://s#m"),
])  # fmt: skip
def test_the_line_after_an_export_leaves_open_what_cannot_be_trained(
    tmp_path, monkeypatch, capsys, student, teacher, told_student
):
    monkeypatch.chdir(tmp_path)
    config = Config(out=Path("o"), student=student, teacher=teacher, preset="own")
    run(config, TASKS[:2], Student(), Teacher())
    told, line = exported(monkeypatch, capsys, "--out", "o")
    assert (told["student"], told["teacher"]) == (told_student, Path("DIRECTORY"))


def test_the_nano_line_is_that_of_the_nano_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = parse(Config, [], presets("runtime_loop"), "")
    run(config, TASKS, Student(), Teacher())
    told, line = exported(monkeypatch, capsys)
    assert (told["out"], told["student"]) == (Path("runs/nano/teacher-grpo-2"), str(world.STUDENT))
    assert len(line) == 5


def test_an_export_that_cannot_train_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = Config(out=Path("o"), student="s", teacher="t")
    run(config, [replace(task, answer=None) for task in TASKS[:2]], Student(), Teacher())
    said = main(monkeypatch, capsys, "--export", "x.jsonl", "--out", "o")
    assert (
        "2 of 2 traces, not for training: x.jsonl: no problem to train on; traces left out: 2 no ground truth"
        in said
    )
    assert "no session is pending" in main(monkeypatch, capsys, "--show", "pending", "--out", "o")


def test_what_was_exported_on_purpose_trains_and_what_was_not_says_why(config):
    run(replace(config, require_approval=True), TASKS[:4], Student(), Teacher())
    source, target = config.out / "traces.jsonl", config.out / "export.jsonl"
    with pytest.raises(UserError, match="select none of its 4 traces .left out: 4 review pending"):
        export_traces(source, target, config)
    with pytest.raises(
        UserError, match="4 review pending: --export it, after --approve or with --review-status"
    ):
        load_problems(source)
    assert export_traces(source, target, replace(config, review_status=("pending",))) == (4, 4)
    assert len(load_problems(target)) == 4


# ------------------------------------------------------------------------------------------------------- experience carries over


def test_another_teacher_in_the_same_directory_goes_on_from_what_was_learned(config):
    run(config, TASKS[:10], Student(), Teacher())
    run(replace(config, teacher="another"), TASKS, Student(), Teacher())
    had = [(t["session_metadata"]["teacher"], t["learning_history"]["count"]) for t in traces_of(config)]
    assert had[9] == ("fake-teacher", 5) and had[10] == ("another", 10) and len(had) == 23


def test_a_round_begins_with_what_those_before_it_have_taught_also_when_it_is_repeated(config, monkeypatch):
    def two_rounds(out):
        experience = runtime_loop.learning.Experience(config.strategies)
        for number, part in enumerate((TASKS[:12], TASKS[12:])):
            seats = {"student": Student(), "teacher": Teacher()}
            runtime_loop.run(replace(config, out=out / str(number)), part, seats, experience)
        return experience

    first = two_rounds(config.out)
    known = [t["learning_history"]["count"] for t in traces_of(replace(config, out=config.out / "1"))]
    assert known == [12] * 5 + [17] * 5 + [22]
    assert two_rounds(config.out).rewards == first.rewards  # nothing is counted twice


# ------------------------------------------------------------------------------------------------------------- rounds


@pytest.mark.parametrize(
    ("changes", "answers", "complaint"),
    [
        ({"teacher": "http://h:1#m"}, True, "--teacher http://h:1#m: .* checkpoint directory$"),
        ({"teacher": "mine:teach"}, True, "--teacher mine:teach: .* checkpoint directory$"),
        ({"student": "mine:run"}, True, "--student mine:run: .* directory or URL"),
        ({"student": "post+http://h/x"}, True, "--student post"),
        ({}, False, "each round needs tasks with a known answer"),
        ({"out": "foreign"}, True, "foreign/deploy.yaml: not a deployment file"),
        (
            {"train_options": "--stepz 1"},
            True,
            "train_grpo.py .*--stepz 1 --show-layout failed with exit code 2",
        ),
    ],
)
def test_what_keeps_rounds_from_training_is_said_before_any_task(
    config, tmp_path, monkeypatch, changes, answers, complaint
):
    monkeypatch.chdir(tmp_path)
    Path("foreign").mkdir()
    Path("foreign/deploy.yaml").write_text("")
    tasks = TASKS[:12] + [replace(task, answer=task.answer if answers else None) for task in TASKS[12:]]
    changes = {name: Path(value) if name == "out" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=complaint):
        deploy.run_rounds(replace(config, rounds=2, **changes), tasks, None, None)


@pytest.mark.parametrize("preset", ["nano", "own", "smollm2"])
def test_rounds_train_with_the_preset_and_options_of_the_run(preset, tmp_path, monkeypatch):
    """What train_grpo.py is called with, read by its own parser."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(deploy.subprocess, "run", lambda command: asked.append(command[2:]) or _Done)
    Path("tasks.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n")
    argv = ["--preset", preset, "--student", "s", "--teacher", "t", "--rounds", "1", "--tasks", "tasks.jsonl", "--held-out",
            "tasks.jsonl", "--temperature", "0.5", "0.6", "--train-options", "--lr 0.003"]  # fmt: skip
    config = parse(Config, argv, presets("runtime_loop"), "")

    def fake_run(config, tasks, experience):
        return runtime_loop.run(config, TASKS, {"student": Student(), "teacher": Teacher()}, experience)

    monkeypatch.setattr(
        deploy, "compare", lambda *_: {"is_promoted": False, "reason": "", "alone": 0, "old": 0, "new": 0}
    )
    deploy.run_rounds(config, TASKS, fake_run, lambda *_: None)
    told = parse(train_grpo.Config, asked[-1], presets("train_grpo"), "")
    assert (told.preset, told.student, told.teacher, told.lr) == (preset, "s", Path("t"), 0.003)
    names = (
        "probe_tokens",
        "teaching_tokens",
        "answer_tokens",
        "temperature",
        "answer_format",
        "device",
        "dtype",
    )
    assert [getattr(told, name) for name in names] == [getattr(config, name) for name in names]
    own = presets("train_grpo")[preset].overrides
    assert told.steps == own.get("steps", 250) and told.problems == config.out / "round-1/export.jsonl"


class _Done:
    returncode = 0
