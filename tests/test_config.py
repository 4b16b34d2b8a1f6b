"""The command line that a Config dataclass makes, and the log of a run."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nano_atlas.config import Preset, option, parse, refuse_changes, run_script, to_json
from nano_atlas.errors import UserError
from nano_atlas.runs import RunLog


@dataclass(frozen=True)
class Config:
    preset: str = option("small", "", group="run")
    out: Path = option(Path("runs/x"), "directory of the run")
    steps: int | None = option(None, "optimizer steps", above=0, group="optimization", resumable=True)
    lr: float = option(1e-3, "peak learning rate, 100% of it")
    betas: tuple[float, float] = option((0.9, 0.95), "decay of the running means", at_least=0, below=1)
    schedule: str = option("cosine", "shape of the decay", ["cosine", "constant"])
    compile: bool = option(False, "compile the layers")
    data: tuple[Path, ...] = option((), "files")
    eps: float = 1e-8  # no option

    def check(self) -> None:
        if self.schedule == "constant" and self.steps == 1:
            raise UserError("--schedule constant contradicts --steps 1")


PRESETS = {
    "small": Preset("CPU, 1 GB", {}),
    "large": Preset("one GPU, 20 GB", {"lr": 1e-5, "compile": True, "steps": 7}),
}


def read(*argv: str) -> Config:
    return parse(Config, argv, PRESETS, "what the script does")


def test_every_field_type_is_read_from_the_command_line():
    flags = ("--steps", "3", "--lr", "2e-4", "--betas", "0.8", "0.9", "--compile", "--data", "x", "y")
    expected = Config("small", Path("a b"), 3, 2e-4, (0.8, 0.9), "cosine", True, (Path("x"), Path("y")))
    assert read("--out", "a b", *flags) == expected


def test_explicit_flags_override_the_preset_and_the_preset_overrides_the_defaults():
    assert read() == Config()
    assert (read("--preset", "large").lr, read("--preset", "large").compile) == (1e-5, True)
    config = read("--lr", "0.5", "--preset", "large", "--no-compile", "--steps", "none")
    assert (config.lr, config.compile, config.steps) == (0.5, False, None)


@pytest.mark.parametrize(("argv", "values"), [
    ((), ("100% of it (default: 0.001)", "steps (default: none)")),
    (("--preset", "large"), ("100% of it (default: 1e-05)", "steps (default: 7)")),
])  # fmt: skip
def test_help_gives_meaning_group_and_value_of_each_option_in_the_chosen_preset(argv, values, capsys):
    with pytest.raises(SystemExit) as stop:
        read(*argv, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for piece in (*values, "what the script does", "optimization:", "{cosine,constant}", "(default: 0.9 0.95)", "--no-compile",
                  "small CPU, 1 GB", "large one GPU, 20 GB"):  # fmt: skip
        assert piece in text
    assert "--eps" not in text


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate 1 (see --help)"),
        (["--schedul", "cosine"], "unrecognized arguments: --schedul cosine"),
        (["--beta=1"], "unrecognized arguments: --beta=1"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--lr", "nan"], "invalid float value: 'nan'"),
        (["--steps", "1.5"], "invalid int value: '1.5'"),
        (["--betas", "0.9"], "expected 2 arguments"),
        (["--schedule", "linear"], "invalid choice: 'linear'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--schedule", "constant", "--steps", "1"], "contradicts"),
        (["--steps", "-1"], "--steps must be above 0, not -1"),
        (["--betas", "0.9", "1"], "--betas must be below 1, not 1.0"),
        (["--betas", "-0.5", "0.9"], "--betas must be at least 0, not -0.5"),
        (["--eps", "1"], "unrecognized arguments: --eps 1"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(argv, said):
    with pytest.raises(UserError) as error:
        read(*argv)
    assert said in str(error.value)


def test_a_config_survives_json_and_a_changed_option_is_refused_by_name_unless_it_is_resumable():
    config = read("--data", "x")
    saved = json.loads(json.dumps(to_json(config)))
    refuse_changes(config, saved, "runs/x")
    refuse_changes(read("--data", "x", "--steps", "9"), saved, "runs/x")
    older = {
        name: value for name, value in saved.items() if name != "lr"
    }  # from before there was such an option
    refuse_changes(config, older, "runs/x")
    with pytest.raises(UserError, match=r"--lr 0.001 -> 0.5"):
        refuse_changes(read("--data", "x", "--lr", "0.5"), older, "runs/x")
    with pytest.raises(
        UserError, match=r"--lr 0.001 -> 0.5, --compile False -> True\. Use the earlier .*, or delete it"
    ):
        refuse_changes(read("--data", "x", "--lr", "0.5", "--compile"), saved, "runs/x")


def test_a_user_error_is_one_line_and_exit_code_2(capsys):
    def main():
        raise UserError("train.jsonl:3: broken")

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert (stop.value.code, capsys.readouterr().err) == (2, "error: train.jsonl:3: broken\n")


def test_an_interrupt_ends_without_a_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.processes
def test_a_reader_that_has_seen_enough_is_no_error():
    script = "from nano_atlas.config import run_script; run_script(lambda: [print('line') for _ in range(100_000)])"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


# ------------------------------------------------------------------------------------------------------------- metrics


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_log_has_each_step_once(tmp_path):
    with RunLog(tmp_path / "metrics.jsonl") as log:
        for step in (1, 2, 3, 4):
            log.log(step, loss=step / 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # what a killed process leaves
    with RunLog(tmp_path / "metrics.jsonl", resumed_step=2) as log:
        log.log(3, loss=9.0)
    assert records(tmp_path) == [
        {"step": 1, "loss": 0.333333},
        {"step": 2, "loss": 0.666667},
        {"step": 3, "loss": 9.0},
    ]


def test_a_new_run_in_an_old_directory_starts_an_empty_log(tmp_path):
    for _ in range(2):
        with RunLog(tmp_path / "metrics.jsonl") as log:
            log.log(1, loss=float("nan"))
    assert records(tmp_path) == [{"step": 1, "loss": None}]


def test_damage_in_the_log_names_the_line(tmp_path):
    for damage, said in (("rubbish", "not JSON"), ('{"loss": 1}', "not a metrics record")):
        (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{damage}\n{{"step": 2}}\n')
        with pytest.raises(UserError, match=f"metrics.jsonl:2: {said}"):
            RunLog(tmp_path / "metrics.jsonl", resumed_step=2)


def test_wandb_is_asked_for_only_with_a_project_and_its_absence_is_explained(tmp_path, monkeypatch):
    """A log without the run's config, such as that of the episodes, is no log of metrics."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    for project, config in (("", {"lr": 1}), ("atlas", None)):
        monkeypatch.setenv("WANDB_PROJECT", project)
        with RunLog(tmp_path / "metrics.jsonl", config=config):
            pass
    with pytest.raises(UserError, match="pip install wandb.*, or unset it"):
        RunLog(tmp_path / "metrics.jsonl", config={"lr": 1})


def test_wandb_gets_the_same_records_and_a_continued_run_the_same_id(tmp_path, monkeypatch):
    class Wandb:
        calls = []

        def init(self, **options):
            self.calls.append(options)
            return self

        def log(self, record, step):
            self.calls.append((step, record))

        def finish(self):
            pass

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    monkeypatch.setenv("WANDB_PROJECT", "atlas")
    for resumed_step in (0, 1):
        with RunLog(tmp_path / "metrics.jsonl", resumed_step, config={"lr": 1}) as log:
            log.log(resumed_step + 1, loss=0.5)
    first, record, second, _ = Wandb.calls
    assert record == (1, {"loss": 0.5})
    assert first["id"] == second["id"] and first["project"] == "atlas" and first["config"] == {"lr": 1}
