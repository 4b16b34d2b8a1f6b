"""The command line of runtime_loop.py: runs, reviews, exports, refused options."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from runtime_fakes import TASKS, Student, StyledTeacher, Teacher, run, traces_at

import runtime_loop
from nano_atlas import world
from nano_atlas.errors import UserError
from nano_atlas.runtime.traces import export_traces
from runtime_loop import Config


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(
        out=tmp_path / "out", batch=5, student="fake-student", teacher="fake-teacher", lane="paired"
    )


# ------------------------------------------------------------------------------------------------------------- review


def test_people_approve_and_quarantine_sessions_by_the_beginnings_of_their_ids(config, monkeypatch, capsys):
    first, second, *_ = run(replace(config, require_approval=True), TASKS[:4], Student(), Teacher())
    source, target = config.out / "traces.jsonl", config.out / "export.jsonl"

    def command(*options):
        monkeypatch.setattr("sys.argv", ["runtime_loop.py", "--out", str(config.out), *options])
        runtime_loop.main()
        return capsys.readouterr().out

    assert first.session_id in command("--show", "pending") and "reward +" in command("--show", "pending")
    command("--approve", first.session_id[:10], second.session_id, "--note", "looked at")
    assert first.session_id not in command("--show", "pending")
    assert "looked at" in command("--show", "approved")
    command("--quarantine", second.session_id)
    with pytest.raises(UserError, match="session nobody: no sessions"):
        command("--approve", first.session_id, "nobody")
    assert export_traces(source, target, config) == (1, 4)
    (exported,) = traces_at(target)
    assert exported["session_metadata"]["session_id"] == first.session_id
    assert exported["review_notes"] == "looked at"


def test_with_require_approval_nothing_is_exported_before_it(config):
    run(replace(config, require_approval=True), TASKS[:3], Student(), Teacher())
    with pytest.raises(UserError, match="select none of its 3 traces"):
        export_traces(config.out / "traces.jsonl", config.out / "export.jsonl", config)
    assert export_traces(
        config.out / "traces.jsonl", config.out / "e.jsonl", replace(config, review_status=("pending",))
    ) == (3, 3)


# ------------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`python runtime_loop.py ...` with the fakes in the seats."""
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(
        "".join(json.dumps({"id": t.id, "question": t.question, "answer": t.answer}) + "\n" for t in TASKS)
    )
    seats = {"student": Student, "teacher": StyledTeacher}
    monkeypatch.setattr(runtime_loop.agents, "open_agent", lambda spec, *where: seats[spec]())
    monkeypatch.chdir(tmp_path)

    def call(*options):
        monkeypatch.setattr("sys.argv", ["runtime_loop.py", *options])
        runtime_loop.main()

    fakes = ["--tasks", str(tasks), "--student", "student", "--teacher", "teacher", "--out", "out"]
    return lambda *options: call(*fakes, *options)


def test_run_continue_and_export_from_the_command_line(command, capsys):
    command("--batch", "8")
    command("--batch", "8")
    assert len(traces_at("out/traces.jsonl")) == 23
    command("--export", "hard.jsonl", "--min-gain", "1")
    assert "problems for\n    python train_grpo.py --preset=nano" in capsys.readouterr().out
    selected = traces_at("hard.jsonl")
    assert selected and all(trace["reward_summary"]["gain"] == 1 for trace in selected)
    assert selected == [
        trace for trace in traces_at("out/traces.jsonl") if trace["reward_summary"]["gain"] == 1
    ]


def test_an_export_that_selects_nothing_or_overwrites_its_source_is_refused(command):
    command()
    with pytest.raises(UserError, match="select none of its 23 traces"):
        command("--export", "none.jsonl", "--min-reward", "99")
    with pytest.raises(UserError, match="its 23 traces .left out: 23 not in --only: paired general"):
        command("--export", "none.jsonl", "--only", "piared")
    assert not Path("none.jsonl").exists()
    with pytest.raises(UserError, match="is the trace file itself"):
        command("--export", "out/traces.jsonl")
    with pytest.raises(UserError, match="elsewhere.*no such file"):
        command("--out", "elsewhere", "--export", "x.jsonl")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "tasks.jsonl:24: not JSON"),
        ('{"answer": "1"}', "tasks.jsonl:24: no question"),
        ("[]", "tasks.jsonl:24: "),
    ],
)
def test_a_broken_line_of_the_tasks_file_is_named_before_any_task_is_run(command, line, complaint):
    with Path("tasks.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=complaint):
        command()
    assert not Path("out").exists()


def test_skip_bad_leaves_out_malformed_lines_and_shows_them(command, capsys):
    with Path("tasks.jsonl").open("a") as file:
        file.write('{broken\n{"answer": "1"}\n{"id": "t3", "question": "again"}\n{"question": "fine"}\n')
    command("--skip-bad")
    said = capsys.readouterr().err
    assert "left out 3 malformed lines" in said and "tasks.jsonl:26: " in said and "'t3'" in said
    assert len(traces_at("out/traces.jsonl")) == 24


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--export", "x.jsonl", "--since", "yesterday"], "--since yesterday must be"),
        (["--export", "x.jsonl", "--approve", "abc"], "--export and --approve cannot be combined"),
        (["--export", "x.jsonl", "--restart"], "--restart and --export cannot be combined"),
        (["--min-reward", "0.5"], "options that select traces need --export or --rounds; add one"),
        (["--large-judge", "http://localhost:1"], "needs --judge"),
        (["--strategies"], "--strategies needs at least one"),
        (["--audit", "2"], "--audit must be at most 1"),
        (["--batch", "0"], "--batch must be above 0"),
        (["--rounds", "99", "--held-out", "tasks.jsonl"], "each round needs tasks with a known answer"),
        (["--rounds", "2"], "--rounds with --tasks needs --held-out"),
        (["--rounds", "2", "--held-out", "x", "--require-approval"], "add --review-status pending"),
        (["--serve", "70000"], "--serve 70000: the port must be a number from 0"),
        (["--serve", "0.0.0.0:0"], "NANO_ATLAS_API_KEY"),
        (["--batchsize", "3"], "unrecognized arguments: --batchsize 3"),
        (["--only-lane", "coach"], "unrecognized arguments: --only-lane coach"),
        (["--review", "pending"], "unrecognized arguments: --review pending"),
        (["--preset", "own", "--student", "none"], "--preset own needs --student"),
    ],
)
def test_options_that_make_no_sense_are_refused(command, options, complaint):
    with pytest.raises(UserError, match=complaint):
        command(*options)


def test_the_nano_tasks_are_not_the_ones_that_evaluation_holds_out(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(runtime_loop.agents, "open_agent", lambda spec, *where: None)
    monkeypatch.setattr(runtime_loop, "run", lambda config, tasks, seats: given.extend(tasks))
    monkeypatch.setattr(runtime_loop.traces, "summary", lambda outcomes, out: "")
    monkeypatch.setattr(
        "sys.argv", ["runtime_loop.py", "--count", "50", "--teacher", "t", "--out", str(tmp_path)]
    )
    runtime_loop.main()
    kept_out = {problem.question for seed in range(3) for problem in world.held_out("math", 500, seed)}
    assert len(given) == 50 and not kept_out & {task.question for task in given}


def test_selection_is_a_copy_of_whole_records(config):
    run(config, TASKS, Student(), Teacher())
    source = config.out / "traces.jsonl"
    assert export_traces(source, config.out / "all.jsonl", config) == (23, 23)
    assert (config.out / "all.jsonl").read_bytes() == source.read_bytes()


def test_every_seat_is_opened_and_one_model_once(config, monkeypatch):
    opened = []
    monkeypatch.setattr(
        runtime_loop.agents, "open_agent", lambda spec, *where: opened.append(spec) or object()
    )
    config = replace(config, student="s", teacher="t", judge="t", large_judge="l", skill_writer="w")
    seats = runtime_loop.open_seats(config)
    assert opened == ["s", "t", "l", "w"] and seats["judge"] is seats["teacher"]
    assert set(seats) == {"student", "teacher", "judge", "large judge", "skill writer"}


def test_a_missing_nano_teacher_names_the_commands_that_make_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["runtime_loop.py"])
    with pytest.raises(UserError, match="python train_sft.py && python train_grpo.py"):
        runtime_loop.main()


@pytest.mark.parametrize(
    ("name", "content", "options", "complaint"),
    [
        ("run.json", "[]", [], "run.json should hold a JSON object"),
        ("run.json", '{"config": 5}', [], "run.json does not hold a run's options"),
        ("run.json", '{"x": 5}', [], "run.json does not hold a run's options"),
        ("reviews.jsonl", "x\n", ["--show", "approved"], "reviews.jsonl:1: not JSON"),
        ("traces.jsonl", '{"x": 1}\n', ["--show", "approved"], "traces.jsonl:1: not a session trace"),
        (None, "", ["--show", "approved"], "traces.jsonl: no such file"),
        (None, "", ["--approve", "x"], "traces.jsonl: no such file"),
        (None, "", ["--export", "x"], "traces.jsonl: no such file"),
        (None, "", ["--approve"], "need the ids of sessions"),
    ],
)
def test_a_directory_without_our_files_or_with_others_is_named(command, name, content, options, complaint):
    Path("odd").mkdir()
    if name:
        export_traces_to(Path("odd/traces.jsonl"))
        Path("odd", name).write_text(content)
    with pytest.raises(UserError, match=complaint):
        command("--out", "odd", *options)


def export_traces_to(path):
    run(Config(out=path.parent, student="s", teacher="t"), TASKS[:2], Student(), Teacher())


def test_a_review_that_says_nothing_decides_nothing_in_favour(config):
    run(config, TASKS[:2], Student(), Teacher())
    first, second = (
        trace["session_metadata"]["session_id"] for trace in traces_at(config.out / "traces.jsonl")
    )
    (config.out / "reviews.jsonl").write_text(
        f'{{"x": 1}}\n{{"session_id": ["{second}"]}}\n{{"session_id": "{first}"}}\n'
    )
    assert export_traces(config.out / "traces.jsonl", config.out / "export.jsonl", config) == (1, 2)
