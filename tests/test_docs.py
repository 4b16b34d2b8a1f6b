"""README and docs stay true: their commands exist and run, their links lead somewhere, their names are those of the code."""

import contextlib
import importlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from nano_atlas.benches import tau2
from nano_atlas.config import parse
from nano_atlas.presets import presets
from nano_atlas.runtime import deploy
from tests.test_house import READING_PATH, lines_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("train_sft", "train_grpo", "eval", "runtime_loop")
RUN = (
    "README.md",
    "docs/evaluation.md",
    "docs/traces.md",
    "docs/runtime.md",
)  # in this order, in one directory
SMALL = {  # put behind the options of a command that is run
    "train_sft.py": "--steps 40",
    "train_grpo.py": "--steps 2 --problems-per-step 4 --eval-problems 8 --eval-every 1",
    "eval.py": "--limit 10",
    "runtime_loop.py": "--count 40 --train-options=--steps=1",
}
NOT_RUN = r"\b(URL|DIR|DIRECTORY|FILE|NAME)\b|--preset|--rollout|--serve|--bench|benchmarks\.|torchrun|pip |hf |VLLM_"


def commands(page: Path) -> list[str]:
    """Each command of a page's indented blocks and code spans that starts one of our programs."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^ {4}(.*)$", text, re.MULTILINE)
    spans = re.findall(r"`(python [^`]+|torchrun [^`]+)`", text)
    found = []
    for line in [*blocks, *spans]:
        for command in re.split(r"\s&&\s", line.split("  #")[0]):
            words = command.strip().removeprefix(".venv/bin/")
            if re.match(r"(\w+=\S+ )?(python|torchrun) .*(\.py|-m (nano_atlas|benchmarks))", words):
                found.append(re.sub(r"\s\.\.\.", "", words))
    return found


CASES = [pytest.param(page, line, id=f"{page.stem}: {line}") for page in PAGES for line in commands(page)]


def help_of(module: str, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        importlib.import_module(module).main()
    return shown.getvalue()


@pytest.mark.parametrize(("page", "line"), CASES)
def test_a_command_has_options_that_exist(page, line, monkeypatch):
    if "benchmarks/" in line or "tests/" in line:
        assert (ROOT / re.search(r"\S+\.py", line)[0]).exists()
        return
    script = re.search(r"(\w+)\.py", line)
    if script is None:
        module, options = re.search(r"-m (\S+)(.*)", line).groups()
        flags = re.findall(r"--[a-z][\w-]*", options)
        shown = help_of(module, monkeypatch) if flags else importlib.import_module(module).__doc__
        assert not [flag for flag in flags if flag not in shown]
        return
    assert script[1] in SCRIPTS
    argv = shlex.split(re.sub(r"\bURL\b", "http://localhost:8000", line[script.end() :]))
    if "--help" in argv:
        return
    module = importlib.import_module(script[1])
    if argv[:2] == ["--bench", "tau2"]:
        parse(tau2.Config, argv, {}, "")
        return
    if "--deploy" in argv:  # the file is not there
        argv[argv.index("--deploy") : argv.index("--deploy") + 2] = []
    parse(module.Config, argv, presets(script[1]), "")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty directory in which `python train_sft.py` means ours, as in a checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deploy, "HELD_OUT", 10)
    return tmp_path


def run(line: str, monkeypatch) -> str:
    words = shlex.split(line)[1:]
    monkeypatch.setattr(sys, "argv", words)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        if words[0] == "-m":
            sys.argv = words[1:]
            importlib.import_module(words[1]).main()
        else:
            sys.argv += shlex.split(SMALL[words[0]])
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return shown.getvalue()


@pytest.mark.processes
def test_the_commands_run_in_their_order_and_log_what_the_page_of_metrics_explains(place, monkeypatch):
    ran = 0
    for name in RUN:
        page = ROOT / name
        for block in re.findall(r"```json\n(.*?)```", page.read_text(), re.DOTALL):
            Path("tasks.jsonl").write_text(block)
        for line in commands(page):
            if not re.search(NOT_RUN, line):
                shown, ran = run(line, monkeypatch), ran + 1
                if "--show pending" in line:
                    assert len(shown.splitlines()) == 3
                if "--rounds" in line:
                    assert "promoted: new - old = " in shown
    assert ran > 12
    assert Path("runs/nano/report.html").exists()

    explained = (ROOT / "docs/metrics.md").read_text()
    for path in sorted(place.rglob("metrics.jsonl")):
        names = {name for line in path.read_text().splitlines() for name in json.loads(line)} - {"step"}
        for metric in (name.removeprefix("eval/") for name in names):
            assert f"`{metric}`" in explained, f"{path}: {metric} is not explained in docs/metrics.md"


def test_readme_is_short_and_its_tables_fit_a_terminal():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if line.startswith("|") and len(line) > 80] == []


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text().replace("\n", " ")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_every_page_is_a_question_and_is_linked_from_readme():
    shown = README.read_text()
    for page in PAGES[1:]:
        assert page.read_text().splitlines()[0].endswith("?"), page
        assert f"(docs/{page.name}" in shown, page


def test_readme_names_the_reading_path_with_its_length():
    rows = re.findall(r"^\| (\w+\.py)\s+\|\s+(\d+) \|", README.read_text(), re.MULTILINE)
    lengths = {Path(name).name: lines_of(ROOT / name) for name in READING_PATH}
    assert {name for name, _ in rows} == set(lengths)
    assert not [row for row in rows if abs(int(row[1]) - lengths[row[0]] / 16) > 2]


def test_readme_says_what_the_page_of_results_says():
    results = (ROOT / "docs/results.md").read_text()
    rows = re.findall(r"^\| nano: (\w+) +\|(.*)\|$", README.read_text(), re.MULTILINE)
    assert [domain for domain, _ in rows] == ["math", "telecom", "crm"]
    for domain, cells in rows:
        alone, sft, grpo, _ = (cell.strip() for cell in cells.split("|"))
        assert f"| shipped | {domain} | 10 | {alone} | {sft} | {grpo} |" in results


def test_each_difference_has_a_test():
    rows = re.findall(
        r"^\|.*\| `(\w+\.py)::(\w+)` \|$", (ROOT / "docs/differences.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 12
    for file, name in rows:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), name
