"""eval.py as a command: its benchmarks, options and mistakes, and a run from checkpoints to tables."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
from conftest import STUDENT_WORDS, TEACHER_WORDS, lively_checkpoint
from test_eval import TASKS, Seat, number_of, run

import eval as evaluation
from eval import Config
from nano_atlas.benches.arms import SAME_BUDGET, SHUFFLED, STUDENT, TWO_VOTES, UNTRAINED
from nano_atlas.config import parse, run_script
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt, EpisodeConfig, attempts, verify
from nano_atlas.functions import verifier_seat
from nano_atlas.presets import NANO, presets
from nano_atlas.protocol import ANSWER_FORMATS
from nano_atlas.schedule import play
from nano_atlas.seats import Reply


@pytest.mark.parametrize("reply, answer, gold, expected", [
    ("so \\boxed{016}", "016", "16", True), ("\\boxed{1,000}", "1,000", "1000", True), ("\\boxed{18.}", "18.", "18", True),
    ("\\boxed{1} no, \\boxed{2.50}", "2.50", "2.5", True), ("<think>\\boxed{5}</think> \\boxed{6}", "6", "5", False),
    ("<think>\\boxed{5}</think> five", None, "5", False), ("it is 5", None, "5", False), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "0.5", True),
])  # fmt: skip
def test_the_last_box_after_the_thoughts_is_the_answer(reply, answer, gold, expected):
    (tried,) = play([attempts([Reply(reply, 1, False)], Problem("1", "", gold), EpisodeConfig())], {})[0]
    assert (tried.answer, tried.is_correct) == (answer, expected)


def test_math_verify_compares_by_algebra_where_a_data_set_needs_it():
    pytest.importorskip("math_verify")
    spec = "benchmarks.math_verifier:verify"
    config, seats = EpisodeConfig(verifier=spec), verifier_seat(spec)

    def is_right(answer, gold):  # many answers at once: in threads
        tried = [Attempt(f"so {answer}", answer, 0.0, 1, False)] * 3
        (scores,) = play([verify(Problem("1", "", gold), tried, config)], seats)
        return set(scores) == {1.0}

    assert is_right("\\frac{1}{2}", "0.5") and is_right("x+1", "1+x") and is_right("016", "16")
    assert not is_right("2", "3") and not is_right(None, "3")


def test_aime_answers_are_compared_as_integers_from_the_last_box(tmp_path):
    """016 is 16; boxes inside the reasoning do not count; no box is no answer."""
    data = tmp_path / "aime25.jsonl"
    lines = [{"problem": f"Question aime-{i}?", "answer": gold} for i, gold in enumerate([16, 16, 16, 70])]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replies = ["<think>\\boxed{99}</think> so \\boxed{1} or \\boxed{016}", "<think>\\boxed{16}</think> \\boxed{17}", "it is 16",
               "<solution>70</solution>"]  # fmt: skip
    config = Config(
        bench="aime25", data=data, student="http://student", control=("none",), out=tmp_path / "out"
    )
    config.check()
    tasks = evaluation.load_tasks(config)
    assert [p.domain for p in tasks["aime25"]] == ["aime25"] * 4
    student = Seat(lambda messages, _: Reply(replies[number_of(messages)[1]], 9, False))
    results, _ = run(config, tasks=tasks, student=student)
    assert [result.attempt.is_correct for result in results.values()] == [True, False, False, True]
    assert [result.attempt.answer for result in results.values()] == ["016", "17", None, "70"]


def test_nano_asks_the_world_for_held_out_tasks_of_each_domain(monkeypatch):
    monkeypatch.setattr(evaluation.world, "DOMAINS", {"math": None, "crm": None})
    monkeypatch.setattr(evaluation.world, "held_out", lambda *asked: [asked] * 500)
    config = parse(Config, ["--seed", "3"], presets("eval"), "")
    assert evaluation.load_tasks(config) == {"math": [("math", 500, 3)] * 500, "crm": [("crm", 500, 3)] * 500}
    assert config.arms == [STUDENT, "sft", "grpo", SHUFFLED] and config.temperature == 0
    assert parse(Config, ["--teacher"], presets("eval"), "").arms == [STUDENT]  # nothing to shuffle
    config = parse(Config, ["--full"], presets("eval"), "")
    assert config.arms == [STUDENT, "sft", "grpo", SHUFFLED, UNTRAINED, TWO_VOTES, SAME_BUDGET]


@pytest.mark.parametrize("argv, message", [
    (["--bench", "gsm8k"], "every other --bench needs --data FILE"),
    (["--data", "x.jsonl"], "makes its own tasks"),
    (["--samples", "4"], "with --temperature 0 they are equal"),
    (["--samples", "0"], "--samples must be at least 1"),
    (["--temperature", "-1"], "--temperature must be at least 0"),
    (["--control", "magic"], "invalid choice"),
    (["--teacher", "a=x", "a=y"], "give each a different name"),
    (["--teacher", "student=x"], "give each a different name"),
    (["--preset", "own"], "needs --student"),
    (["--student", "nowhere"], "hf download nowhere"),
    (["--student", "http://x"], f"{NANO}/teacher-sft/model, because it has no config.json; train one with"),
    (["--tables", "--out", "nowhere"], "no results yet"),
])  # fmt: skip
def test_mistakes_end_with_one_line_and_status_2(argv, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation.world, "held_out", lambda *_: TASKS["math"])
    monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
    with pytest.raises(SystemExit) as exit_:
        run_script(evaluation.main)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_help_begins_with_what_everyone_needs(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"], presets("eval"), "")
    flags = re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE)
    assert flags[:6] == ["--preset", "--bench", "--data", "--student", "--teacher", "--out"]
    assert len(flags) <= 25


def test_a_student_is_evaluated_alone_without_a_probe_in_the_format_it_can_write(
    tmp_path, monkeypatch, capsys
):
    """No teacher, so no control; the same format is asked for and read."""
    data, asked = tmp_path / "test.jsonl", []
    data.write_text("".join(f'{{"question": "Question t-{i}?", "answer": "{i}"}}\n' for i in range(4)))

    def answer(messages, _):
        asked.append(messages[-1]["content"])
        return Reply("It is 1, or 2.", 9, False)

    monkeypatch.setattr(Config, "open", lambda *_: Seat(answer))
    for answer_format, right in (("solution", 0), ("last-number", 1)):
        argv = ["--preset", "own", "--bench", "gsm8k", "--data", str(data), "--student", "http://student", "--probe-tokens", "0",
                "--answer-format", answer_format, "--out", str(tmp_path / answer_format)]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
        evaluation.main()
        (score,) = json.loads((tmp_path / answer_format / "results.json").read_text())["scores"]
        assert (score["arm"], score["tasks"], score["accuracy"]) == ("student", 4, right / 4)
        assert asked == [f"Question t-{i}?\n\n{ANSWER_FORMATS[answer_format]}" for i in range(4)]
        assert ("| gsm8k  |   100.0 |" in capsys.readouterr().out) == (right == 0)  # unread
        asked.clear()


def test_teachers_are_named_by_option_or_path():
    config = Config(teacher=("base=runs/x=1/sft", "runs/y/grpo/", "http://host:8000/v1?a=b"))
    urls = {"base": "runs/x=1/sft", "grpo": "runs/y/grpo/", "v1?a=b": "http://host:8000/v1?a=b"}
    assert config.teachers == urls


def test_the_script_from_checkpoints_to_tables(tmp_path, monkeypatch, capsys):
    """GSM8K's layout, real checkpoints with random weights: all files are written, and a second call only prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "CHUNK", 4)
    lively_checkpoint(tmp_path / "student", 0, STUDENT_WORDS)
    lively_checkpoint(tmp_path / "teacher", 1, TEACHER_WORDS)
    lines = [{"question": f"What is {i} + {i}?", "answer": f"We add.\n#### {2 * i}"} for i in range(6)]
    Path("test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["eval.py", "--bench", "gsm8k", "--data", "test.jsonl", "--limit", "5", "--student", "student", "--teacher", "teacher",
            "--out", "out", "--probe-tokens", "8", "--teaching-tokens", "8", "--answer-tokens", "8"]  # fmt: skip

    def printed(*flags):
        monkeypatch.setattr(sys, "argv", [*argv, *flags])
        evaluation.main()
        return capsys.readouterr().out

    weights = hashlib.sha256(Path("student/model.safetensors").read_bytes()).hexdigest()
    first = printed("--full")
    assert "### gsm8k: 5 tasks" in first and first.strip() == Path("out/tables.md").read_text().strip()
    written = json.loads(Path("out/results.json").read_text())
    arms = ["student", "teacher", "shuffled", "untrained", "two-votes", "same-budget"]
    assert [score["arm"] for score in written["scores"]] == arms
    assert written["run"]["config"]["limit"] == 5
    assert len(Path("out/tasks.jsonl").read_bytes().splitlines()) == 30

    monkeypatch.setattr(Config, "open", lambda *_: pytest.fail("a finished run opened a model"))
    assert printed("--full") == printed("--full", "--tables") == first
    short = printed()  # shows less, and loses nothing
    cells = [f"{100 * score['accuracy']:.1f}" for score in written["scores"][:3]]
    assert re.search(r"gsm8k \(5\) +\| +" + r" +\| +".join(cells) + r" +\|", short)
    assert "| shuffled | teacher − student |" in re.sub(" +", " ", short)
    assert "untrained" not in short and Path("out/tables.md").read_text().strip() == first.strip()
    assert hashlib.sha256(Path("student/model.safetensors").read_bytes()).hexdigest() == weights
