"""The wheel, installed away from the repository: its commands work in an empty folder, and nothing of the checkout is used."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parent.parent
SCRIPTS = {"eval.py", "runtime_loop.py", "train_grpo.py", "train_sft.py"}
NANO = ("--preset", "nano", "--device", "cpu")
# Every process of the test ends at once where it opens or makes a file in the repository; an environment may lie there.
GUARD = f"""
import os, sys
def guard(event, arguments):
    if event in ("open", "os.mkdir", "os.rename") and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if path.startswith({str(ROOT) + os.sep!r}) and not path.startswith(sys.prefix + os.sep):
            os.write(2, f"touched {{path}}".encode())
            os._exit(99)
sys.addaudithook(guard)
"""


def run(*command: object, **settings) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tracked files, because a build leaves folders behind."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--wheel-dir", out, copy)
    return next(out.glob("*.whl"))


@pytest.fixture
def installed(wheel, tmp_path):
    """Runs one of the installed commands, or python, in an empty folder, beside the packages of this environment."""
    site, cwd = tmp_path / "site", tmp_path / "empty"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    (site / "sitecustomize.py").write_text(GUARD)
    cwd.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return lambda name, *options: run(site / "bin" / name, *options, cwd=cwd, env=environment)


def test_a_wheel_has_the_package_and_the_scripts_within_it_alone(wheel):
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    assert {path.parts[0].split("-")[0] for path in names} == {"nano_atlas"}
    assert {path.name for path in names if path.parent == Path("nano_atlas/scripts")} == SCRIPTS
    assert Path("nano_atlas/world/student/model.safetensors") in names


def test_the_commands_of_a_wheel_work_where_there_is_no_checkout(installed, tmp_path):
    with pytest.raises(AssertionError, match="touched .*README.md"):  # the guard works
        installed(sys.executable, "-c", f"open({str(ROOT / 'README.md')!r})")
    installed("nano-atlas-train-sft", *NANO, "--steps", 2)
    small = ("--steps", 1, "--problems-per-step", 2, "--group-size", 2, "--eval-every", 0)
    installed("nano-atlas-train-grpo", *NANO, *small)
    assert "**peak**" in installed("nano-atlas-train-grpo", *NANO, "--show-layout")
    called = "from nano_atlas.runtime import deploy; deploy.call('train_grpo.py', '--show-layout')"  # as --rounds do
    assert "**peak**" in installed(sys.executable, "-c", called)
    assert "| math " in installed("nano-atlas-eval", *NANO, "--limit", 2)
    installed("nano-atlas-runtime-loop", *NANO, "--count", 2)
    installed(sys.executable, "-m", "nano_atlas.report", "runs/nano")
    made = (
        "teacher-sft/model",
        "teacher-grpo/model",
        "eval/results.json",
        "runtime/traces.jsonl",
        "report.html",
    )
    assert all((tmp_path / "empty/runs/nano" / name).exists() for name in made)
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["runs"]
