"""The report of runs that the real writers wrote, in a real browser: headless Chromium.

docs/report.png is a part of README's run, made by

    PYTHONPATH=. python tests/test_report.py runs/nano runs/nano/eval/grpo/math/held-out-math-21/0 docs/report.png
"""

import contextlib
import io
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest

from eval import Config
from nano_atlas import report
from nano_atlas.benches import arms, scores
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt, Episode, Sketch, episode_record, teaching_metrics
from nano_atlas.errors import UserError
from nano_atlas.runs import write_json, write_jsonl
from nano_atlas.runtime.traces import Session, Trial, Verdict, session_record
from nano_atlas.seats import Reply

pytestmark = pytest.mark.processes
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
EVIL = "</script><img src=x onerror='hacked=1'><script>hacked=1</script><!-- \u2028 %data%" + 99 * "W"


def attempt(is_correct: bool, text="") -> Attempt:
    answer = "12" if is_correct else "13"
    return Attempt(f"{text}<solution>{answer}</solution>", answer, is_correct, 9, False)


def taught(name, alone, guided, teaching: str | None = "Add.", text="") -> Episode:
    """alone: whether each answer without teaching is right; text: stands everywhere."""
    told = f"<thinking>{text}</thinking><teaching>{teaching}</teaching>" if teaching else "Hm."
    alone = Sketch(Problem(name, f"7 + 5?{text}", "12", "math"), f"I guess.{text}", 3, [*map(attempt, alone)])
    is_leak, guided = "12" in (teaching or ""), attempt(guided, text)
    return Episode(alone, "adaptive", Reply(told, 30, False), teaching, 5, guided, is_leak, 1.5, 0.25)


EPISODES = [
    taught("helped", [False, True], True),
    taught("harmed", [True, True], False),
    taught("leaking", [True, True], True, "It is 12."),
    taught("malformed", [False, False], False, None),
    taught(EVIL, [False, False], True, f"Add.{EVIL}", EVIL),
]


def write_training(out: Path, shift=0.0) -> Path:
    steps = [*enumerate(EPISODES, start=1)]
    write_jsonl(out / "grpo/episodes.jsonl", [{"step": step} | episode_record(one) for step, one in steps])
    metrics = [{"step": step, "kl": 0.01 * step + shift} | teaching_metrics([one]) for step, one in steps]
    write_jsonl(out / "grpo/metrics.jsonl", [{"eval/reward": 1.0} | record for record in metrics])
    return out


def write_runtime(out: Path) -> None:
    trial = lambda kind, score: Trial(kind, "12", "12", 3, False, Verdict(score, "judges"))
    told = {"event": "teaching", "actor": "teacher", "tokens": 4, "text": "<teaching>Think.</teaching>"}
    session = partial(Session, task=Problem("t", "Why?", None), seed=0, learning_key="why")
    help = {"trials": [trial("alone", 0.25), trial("guided", 0.75)], "chosen": 1, "reward": 0.5}
    done = session(session_id="s1", teachings=["Think."], events=[told], **help)
    failed = session(session_id="s2", trials=[trial("alone", None)], fault="the teacher is away")
    write_jsonl(out / "runtime/traces.jsonl", [session_record(one)[1] for one in (done, failed)])


def write_evaluation(out: Path) -> None:
    names = [(arm, str(task)) for arm in ("student", "sft", "grpo", "shuffled") for task in range(4)]
    results = [
        arms.TaskResult(
            arm,
            "math",
            task,
            0,
            "12",
            attempt(arm == "grpo" or task == "0"),
            teaching=arm,
            question=f"Task {task}?",
        )
        for arm, task in names
    ]
    write_jsonl(out / "eval/tasks.jsonl", [vars(r) | {"attempt": vars(r.attempt)} for r in results])
    found = scores.make_report(results, Config(teacher=("sft=a", "grpo=b")))
    write_json(out / "eval/results.json", {"run": {}} | found)


def write_run(out: Path) -> Path:
    write_runtime(out)
    write_evaluation(out)
    return write_training(out)


def make(*runs: Path) -> str:
    """The URL of the page."""
    out = runs[0] / "report.html"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["report", *map(str, runs), "--out", str(out)])
        report.main()
    return out.resolve().as_uri()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "nano <i>&")


@pytest.fixture(scope="module")
def url(run):
    return make(run)


def address(url: str, episode: str) -> str:
    return f"{url}#id={quote(episode)}"


@contextmanager
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        options = [f"--{option}" for option in OPTIONS.split()]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("playwright", reason="needs the package playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium, such as Debian's package `chromium` (tests/run.sh installs it)")
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser):
    """Opens a page; in the end no script has failed, its policy refused nothing, and it asked nothing of the network."""
    faults, contexts = [], []

    def visit(url: str, width=1400, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file:") or faults.append(request.url))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert faults == []


def shown(page) -> str:
    """The text of the episode."""
    return page.get_by_role("article", name="Episode").inner_text()


def said(page) -> str:
    return page.get_by_role("status").inner_text()


def test_it_shows_results_curves_and_episodes_under_their_roles(visit, run, url):
    page = visit(url)
    assert page.title() == f"{run}: nano_atlas report"
    for name in ("Results", "Training", "Episodes"):
        region = page.get_by_role("region", name=name, exact=True)
        assert region.get_by_role("heading", level=2, name=name).is_visible()
    table = page.get_by_role("table", name=f"{run}/eval")
    assert table.get_by_role("columnheader").all_inner_texts() == ["", "math"]
    heads, cells = (table.get_by_role(role).all_inner_texts() for role in ("rowheader", "cell"))
    rows = dict(zip(heads, cells, strict=True))
    gains = "grpo − sft", "sft − student", "grpo − student", "shuffled − student"
    assert list(rows) == ["student", "sft", "grpo", "shuffled", *gains]
    assert rows["student"] == "25.0 [4.6, 69.9]"  # Wilson, of 1 of 4
    assert rows["grpo − sft"].startswith("+75.0 [+")
    named = "KL to the reference, nats per token, first and last: kl 0.01 → 0.05"
    assert page.get_by_role("img", name=named).is_visible()


def test_filters_choose_episodes_and_say_how_many_there_are(visit, run, url):
    page = visit(url)
    source, outcome = page.get_by_label("Source"), page.get_by_label("Outcome")
    counts = "all (19) helped (6) harmed (1) same (11) not scored (1) leak (1) malformed (1)"
    assert " ".join(outcome.get_by_role("option").all_inner_texts()) == counts
    source.select_option(f"{run}/grpo")
    assert said(page).startswith("1 of 5: ")
    expected = {"helped": "+50.0 points", "leak": "It is 12.", "malformed": "Nothing: the student's own"}
    for kind, text in (expected | {"harmed": "−100.0 points"}).items():
        outcome.select_option(kind)
        assert kind in said(page) and text in shown(page)
    assert shown(page).count("✓ right") == 2 and shown(page).count("✗ wrong") == 1
    source.select_option(f"{run}/runtime")
    assert said(page) == "No episode is like this."
    outcome.select_option("not scored")
    assert "the teacher is away" in shown(page)
    outcome.select_option("helped")
    assert "score 0.75" in shown(page)
    source.select_option(f"{run}/eval/grpo")
    assert "Task 1?" in shown(page)


def test_the_keyboard_alone_goes_on_and_reaches_the_filters(visit, url):
    page = visit(url)
    for key, place in (("j", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("k", 1), ("k", 1)):
        page.keyboard.press(key)
        assert said(page).startswith(f"{place} of 19: ")
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert [name for name in reached if name] == ["source", "outcome", "previous", "next"]


def test_an_address_opens_its_episode(visit, run, url):
    page = visit(address(url, f"{run}/grpo/2/harmed"))
    assert "grpo/2/harmed" in shown(page)
    page.keyboard.press("j")
    assert "grpo/3/leaking" in shown(page) and shown(visit(page.url)) == shown(page)
    page.evaluate("location.hash = location.hash.replace('3%2Fleaking', '2%2Fharmed')")
    page.wait_for_function("document.querySelector('article').innerText.includes('grpo/2/harmed')")
    for unknown in ("gone/1", "%E0%A4%A"):
        page = visit(f"{url}#id={unknown}")
        assert said(page).startswith("This page has no episode ") and "1 of 19" in said(page)


def test_what_a_model_wrote_stays_text(visit, run, url):
    page = visit(url)
    page.get_by_label("Source").select_option(f"{run}/grpo")
    for _ in range(4):
        page.get_by_role("button", name="Next").click()
    assert page.locator("article").text_content().count(EVIL) == 6  # id, question, approach, thinking, ...
    assert page.evaluate("typeof hacked") == "undefined" and page.locator("main img, i").count() == 0
    assert shown(visit(page.url)) == shown(page)


CONTRASTS = """() => {
  const linear = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const light = c => linear(c).reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], .05);
  const paper = e => [getComputedStyle(e).backgroundColor].map(c => c === "rgba(0, 0, 0, 0)" ? paper(e.parentElement) : c)[0];
  const hasText = e => e.checkVisibility() && [...e.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  const pair = e => [getComputedStyle(e)[e instanceof SVGElement ? "fill" : "color"], paper(e)].map(light).sort((a, b) => a - b);
  return [...document.querySelectorAll("body *")].filter(hasText).map(pair).map(([dark, light]) => light / dark);
}"""


@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits_the_window_and_can_be_read_in_light_and_dark(visit, run, url, width):
    papers = set()
    for scheme in ("light", "dark"):
        page = visit(address(url, f"{run}/grpo/5/{EVIL}"), width, scheme)
        assert EVIL in page.locator("article").text_content()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        contrasts = page.evaluate(CONTRASTS)  # WCAG 2, of every text
        assert len(contrasts) > 50 and min(contrasts) >= 4.5
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2


def test_other_seeds_are_thin_lines_behind_the_mean(visit, tmp_path):
    page = visit(make(write_training(tmp_path / "a"), write_training(tmp_path / "b", shift=0.02)))
    kl = page.get_by_role("img", name="KL to the reference, nats per token, first and last: kl 0.02 → 0.06")
    assert kl.locator("path.thin").count() == 2 and kl.locator("path").count() == 3


PARTS = {"grpo/metrics.jsonl": "Training", "eval/results.json": "Results"}
PARTS |= dict.fromkeys(["grpo/episodes.jsonl", "runtime/traces.jsonl", "eval/tasks.jsonl"], "Episodes")


@pytest.mark.parametrize("file", PARTS)
def test_one_file_is_enough_and_other_sections_are_left_out(visit, tmp_path, file):
    (tmp_path / "only").mkdir()
    shutil.copy(write_run(tmp_path / "whole") / file, tmp_path / "only")
    page = visit(make(tmp_path / "only"))
    assert page.get_by_role("heading", level=2).all_inner_texts() == [PARTS[file]]


def test_a_torn_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path):
    path = write_training(tmp_path) / "grpo/episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert len(report.collect([tmp_path])["episodes"]) == len(EPISODES) - 1
    path.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="episodes.jsonl: not of this version"):
        report.collect([tmp_path])


@pytest.mark.parametrize("name", ["empty", "gone"])
def test_a_directory_without_a_run_is_one_line_that_says_what_makes_one(tmp_path, name):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "nano_atlas.report", tmp_path / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert all(part in done.stderr for part in (name, "episodes.jsonl", "`python train_grpo.py`"))
    assert list((tmp_path / "empty").iterdir()) == []


if __name__ == "__main__":
    run, episode, picture = sys.argv[1:]
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 4000})
        page.goto(address(make(Path(run)), episode))
        first, last = (page.locator(part).bounding_box() for part in ("#training", "#episodes"))
        height = last["y"] + last["height"] - first["y"] + 60
        page.screenshot(path=picture, clip={"x": 0, "y": first["y"] - 30, "width": 1400, "height": height})
