"""What the scripts say while they work: first and last lines, bars, and what goes to stdout and to stderr."""

import importlib
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nano_atlas import errors, terminal
from nano_atlas.benches import tau2
from nano_atlas.config import parse
from nano_atlas.presets import announce, look_at, presets
from nano_atlas.runtime import traces
from nano_atlas.terminal import LOG_EVERY, Bar

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_sft", "train_grpo", "runtime_loop", "eval")


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.isatty = lambda: is_terminal


class Clock:
    """A bar on a screen, whose time is `now`."""

    def __init__(self, monkeypatch, is_terminal, options):
        self.now, self.screen = 1000.0, Screen(is_terminal)
        monkeypatch.setattr(sys, "stderr", self.screen)
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)
        self.bar = Bar(**{"total": 10, "unit": "step", "ncols": 90, "mininterval": 0} | options)

    def step(self, seconds: float, **options) -> str:
        self.now += seconds
        self.bar.step(**options)
        return str(self.bar)


@pytest.fixture
def start(monkeypatch):
    """Starts a Clock; at the end all are stopped."""
    clocks = []
    yield (
        lambda is_terminal=True, **options: (
            clocks.append(Clock(monkeypatch, is_terminal, options)) or clocks[-1]
        )
    )
    for clock in clocks:
        clock.bar.close()


def test_the_first_step_is_no_part_of_the_time_that_is_left(start):
    clock = start()
    assert re.search(r"0/10 \[00:00<\?, \?step/s\]", str(clock.bar))
    assert re.search(r"1/10 \[00:00<\?, \?step/s\]", clock.step(300))  # compiled for five minutes
    assert re.search(r"2/10 \[00:05<00:40,  5.00s/step\]", clock.step(5))
    assert re.search(r"3/10 \[00:12<00:42,  6.00s/step\]", clock.step(7))  # a mean over steps


def test_steps_that_an_earlier_run_has_done_count_for_nothing(start):
    """A run that continues: those that are passed over, or `initial`, tell nothing about the speed."""
    clock = start()
    for _ in range(4):
        assert "<?" in clock.step(0.01, is_new=False)
    assert "5/10 [00:00<?" in clock.step(60)
    assert "6/10 [00:10<00:40, 10.00s/step]" in clock.step(10)
    clock = start(initial=7)
    assert "8/10 [00:00<?" in clock.step(60) and "9/10 [00:03<00:03" in clock.step(3)


def test_a_log_gets_a_plain_line_now_and_then(start):
    clock = start(is_terminal=False, desc="grpo")
    for _ in range(10):
        clock.step(LOG_EVERY / 3)
    errors.say("a message")
    clock.bar.close()
    text = clock.screen.getvalue()
    assert not re.search(r"[\r\x1b]", text) and text.endswith("a message\n")
    lines = text.splitlines()
    assert len(lines) == 4 and re.match(r"grpo:  40%\|.* 4/10 \[01:00<02:00, 20.00s/step\]", lines[0])


def test_a_message_is_above_the_bar_of_a_terminal(start):
    clock = start()
    clock.step(1)
    errors.say("a message")
    cleared, _, after = clock.screen.getvalue().rpartition("a message\n")
    assert cleared.endswith("\r") and "1/10" in after


def test_of_several_processes_the_first_speaks(monkeypatch, capsys):
    for module in (errors, terminal):
        monkeypatch.setattr(module, "IS_SILENT", True)
    errors.say("a message")
    with Bar(total=2) as bar:
        bar.step()
    assert capsys.readouterr() == ("", "")


def options(script: str, *argv: str):
    """The options of a script, as its preset has them."""
    module = importlib.import_module("nano_atlas.runtime.options" if script == "runtime_loop" else script)
    return parse(module.Config, argv, presets(script), "")


@pytest.mark.parametrize(("script", "argv", "said"), [
    ("train_grpo", (), "train_grpo: preset nano, WORK, about 1.5 minutes on a CPU; out runs/nano/teacher-grpo\n"),
    ("train_grpo", ("--seed", "3", "--out", "x", "--restart"), "preset nano, WORK, about 1.5 minutes on a CPU; out x\n"),
    ("train_grpo", ("--steps", "41"), "preset nano, WORK, the bar shows the time left after two steps; out"),
    ("runtime_loop", (), "runtime_loop: preset nano, WORK, about 10 seconds on a CPU; out runs/nano/runtime\n"),
    ("eval", (), "eval: preset nano, WORK, about 1 minute on a CPU; out runs/nano/eval\n"),
    ("train_sft", ("--preset", "own", "--data", "f"), "train_sft: preset own, WORK, the bar shows the time left"),
])  # fmt: skip
def test_the_first_line_says_what_how_long_and_where(script, argv, said, capsys):
    announce(script, options(script, *argv), "WORK")
    out, err = capsys.readouterr()
    assert said in err and not out and len(err.splitlines()) == 1


def test_a_benchmark_without_presets_has_a_first_line_too(capsys):
    announce("eval", tau2.Config(), "WORK")
    assert capsys.readouterr().err.startswith("eval: WORK, the bar shows")


@pytest.mark.parametrize(("out", "shown"), [
    ("runs/nano/teacher-grpo", "runs/nano"), ("runs/qwen3-8b/eval", "runs/qwen3-8b"), ("runs/grpo", "runs/grpo"),
    ("runs/eval", "runs/eval"), ("/data/my run/eval", "'/data/my run/eval'"),
])  # fmt: skip
def test_the_last_line_names_the_directory_with_all_runs_of_a_preset(out, shown, capsys):
    look_at(Path(out))
    assert capsys.readouterr() == ("", f"look at it: python -m nano_atlas.report {shown}\n")


def test_the_runtimes_summary_and_lists_are_as_narrow_as_a_terminal(tmp_path):
    tokens = dict.fromkeys(("student", "teacher", "judge", "large judge", "skill writer"), 12_345_678)
    outcome = traces.Outcome(
        "f" * 24, "math", "paired", "adaptive", baseline=1.0, guided=0.0, returned=1.0, reward=-2.0
    )
    outcome = replace(outcome, tokens=tokens, audited_gain=-1.0, review="pending")
    fault = (
        "student: http://gpu-node-17.example.org:8000/v1/chat/completions failed (HTTP 503: " + "busy " * 50
    )
    failed = replace(outcome, session_id="e" * 24, status="failed", fault=fault, tokens={})
    out = "runs/qwen3-1.7b-80gb/runtime"
    said = traces.summary([*[outcome] * 12_345, *[failed] * 12_345], out)
    assert max(map(len, said.splitlines())) <= 100
    assert f"--out {out} --show failed\n" in said and "skill writer 152,407,394,910" in " ".join(said.split())


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    words = [sys.executable, *command]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_errors_have_no_colour_in_a_pipe(script):
    """Also where a newer Python would colour them, which FORCE_COLOR asks for and NO_COLOR forbids."""
    shown = run(f"{script}.py", "--help")
    wrong = run(f"{script}.py", "--nonsense", NO_COLOR="1", FORCE_COLOR="1")
    assert shown.returncode == 0 and wrong.returncode == 2 and shown.stderr == wrong.stdout == ""
    assert wrong.stderr == "error: unrecognized arguments: --nonsense (see --help)\n"
    assert "\x1b" not in shown.stdout + wrong.stderr


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_begins_with_commands_that_fit_and_that_can_be_parsed(script):
    title, commands, *_ = run(f"{script}.py", "--help").stdout.split("\n\n")[1:]
    assert "\n" not in title and len(title) <= 130
    lines = commands.splitlines()
    assert max(map(len, lines)) <= 100 and len([line for line in lines if f"{script}.py" in line]) >= 4
    assert {re.search("python |torchrun ", line).start() for line in lines if f"{script}.py" in line} == {23}


@pytest.mark.processes
def test_stdout_gets_the_result_alone(tmp_path):
    """The nano world in small, each script in a pipe of its own."""
    sft, grpo, live, bench = (str(tmp_path / name) for name in ("sft", "grpo", "live", "bench"))
    done = run("train_sft.py", "--steps", "2", "--out", sft)
    assert done.stdout == f"{sft}: model, metrics.jsonl, state\n"
    first, *rest = done.stderr.splitlines()
    assert first == f"train_sft: preset nano, 2 steps, the bar shows the time left after two steps; out {sft}"
    assert "855 examples, 110,352 tokens, 2 steps; 45 held out" in rest
    small = "--steps 1 --problems-per-step 2 --group-size 2 --eval-problems 2".split()
    done = run("train_grpo.py", *small, "--teacher", f"{sft}/model", "--out", grpo)
    assert done.stdout == f"{grpo}: model, best, metrics.jsonl, episodes.jsonl, state\n"
    first, *_, last = done.stderr.splitlines()
    assert first.startswith("train_grpo: preset nano, 1 steps of 2 problems x 2 teachings, the bar shows")
    assert last == f"look at it: python -m nano_atlas.report {grpo}" and "\r" not in done.stderr
    assert run("train_grpo.py", *small, "--teacher", f"{sft}/model", "--out", grpo).stdout.startswith(
        f"{grpo}/model is already trained"
    )
    done = run("runtime_loop.py", "--count", "3", "--teacher", f"{grpo}/model", "--out", live)
    assert done.stdout.startswith("3 tasks, 3 scored\n  student alone")
    assert done.stdout.endswith(f"traces             {live}/traces.jsonl\n")
    assert done.stderr.startswith("runtime_loop: preset nano, 3 tasks, the bar")
    done = run("eval.py", "--limit", "3", "--teacher", f"grpo={grpo}/model", "--out", bench)
    assert done.stdout.startswith("| tasks       | student | grpo ")
    assert f"All columns: {bench}/tables.md (--full)\n" in done.stdout
    first, *_, last = done.stderr.splitlines()
    assert first.startswith(
        "eval: preset nano, benchmark nano, 3 tasks of each domain, arms student, grpo, shuffled, the bar"
    )
    assert last == f"look at it: python -m nano_atlas.report {bench}"
    assert max(map(len, done.stdout.splitlines())) <= 100
