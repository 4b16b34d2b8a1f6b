"""The report, made of what the real writers write, and read in a real browser: headless Chromium.

python tests/test_report.py runs/nano/report.html '#nano/eval/grpo/math/held-out-math-10' docs/report.png    # makes the picture
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eval import Config
from nano_atlas import report
from nano_atlas.benches.arms import CONTROLS, TaskResult
from nano_atlas.benches.scores import make_report
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt, Episode, Sketch, episode_record, teaching_metrics
from nano_atlas.errors import UserError
from nano_atlas.runs import RunLog, write_json, write_jsonl
from nano_atlas.runtime.traces import Session, Trial, Verdict, session_record
from nano_atlas.seats import Reply

EVIL = "</script><img src=x onerror='hacked=1'><script>hacked=1</script><!-- \u2028 %data% <script>"
OPTIONS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def attempt(is_correct: bool, text="") -> Attempt:
    answer = "12" if is_correct else "13"
    return Attempt(f"{text}<solution>{answer}</solution>", answer, is_correct, 9, False)


def taught(name, alone, guided, teaching="Add first.", text="", is_leak=False, reward=1.5) -> Episode:
    """alone: whether each answer without teaching is right."""
    reply = Reply(
        f"<thinking>It guesses.{text}</thinking><teaching>{teaching}</teaching>" if teaching else "hm",
        30,
        False,
    )
    sketch = Sketch(
        Problem(name, f"What is 7 + 5?{text}", "12", "math"), f"I guess.{text}", 3, [*map(attempt, alone)]
    )
    return Episode(sketch, "adaptive", reply, teaching, 5, attempt(guided, text), is_leak, reward, 0.25)


EPISODES = [
    taught("helped", [False, True], True),
    taught("harmed", [True, True], False, reward=-2.0),
    taught("leaking", [True, True], True, "It is 12.", is_leak=True),
    taught("malformed", [False, False], False, None, reward=-0.5),
    taught(EVIL, [False, False], True, f"Add.{EVIL}", EVIL),
]


def write_run(out: Path, parts="training sessions evaluation", shift=0.0) -> Path:
    if "training" in parts:
        with (
            RunLog(out / "teacher-grpo/episodes.jsonl") as log,
            RunLog(out / "teacher-grpo/metrics.jsonl") as metrics,
        ):
            for step, episode in enumerate(EPISODES, start=1):
                log.log(step, **episode_record(episode))
                values = teaching_metrics([episode]) | {"kl": 0.01 * step + shift, "entropy": 0.5}
                metrics.log(step, **values, **({"eval/reward": 1.0} if step % 2 else {}))
    if "sessions" in parts:
        trials = [
            Trial(kind, "12", "12", 3, False, Verdict(s, "judges"))
            for kind, s in (("alone", 0.25), ("guided", 0.75))
        ]
        event = {"event": "teaching", "actor": "teacher", "tokens": 4, "text": "<teaching>Think.</teaching>"}
        about = dict(
            task=Problem("t", "Why?", None), seed=0, learning_key="why", teachings=["Think."], approach="Hm."
        )
        done = Session(session_id="s1", trials=trials, events=[event], chosen=1, reward=0.5, **about)
        unknown = Trial("alone", "12", "12", 3, False, Verdict(None, "nobody"))
        failed = Session(
            session_id="s2",
            trials=[unknown],
            events=[],
            fault="the teacher is away",
            **about | {"teachings": []},
        )
        write_jsonl(out / "runtime/traces.jsonl", [session_record(session)[1] for session in (done, failed)])
    if "evaluation" in parts:
        results = [TaskResult(arm, "math", str(task), 0, "12", attempt(arm == "grpo" or task < 1), "I guess.",
                              teacher_text=f"<teaching>{arm}</teaching>", teaching=arm)
                   for arm in ("student", "sft", "grpo", "shuffled") for task in range(4)]  # fmt: skip
        write_jsonl(out / "eval/tasks.jsonl", [vars(r) | {"attempt": vars(r.attempt)} for r in results])
        scores = make_report(results, Config(teacher=("sft=a", "grpo=b")))
        write_json(out / "eval/results.json", {"run": {}, **scores})
        write_jsonl(
            out / "problems.jsonl",
            [{"id": str(i), "question": f"Task {i}?", "answer": "12"} for i in range(4)],
        )
        write_json(out / "eval/run.json", {"config": {"bench": "gsm8k", "data": str(out / "problems.jsonl")}})
    return out


def make(*runs: Path) -> str:
    """The URL of the page."""
    path = runs[0] / "report.html"
    path.write_text(report.page(report.collect(runs)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return make(write_run(tmp_path_factory.mktemp("runs") / "nano <i>&"))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium, such as Debian's package `chromium` (tests/run.sh installs it)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS.split())
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page; at the end no script has failed, nothing was refused by its policy, and nothing asked of the network."""
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


def title_of(page) -> str:
    return page.get_by_role("article", name="Episode").get_by_role("heading", level=3).inner_text()


@pytest.mark.processes
def test_it_shows_results_curves_and_episodes_under_their_roles(visit, url):
    page = visit(url)
    assert page.title() == "nano <i>&: nano_atlas report"
    assert page.get_by_role("heading", level=1).inner_text() == "nano <i>&"
    for name in ("Results", "Training", "Episodes"):
        assert page.get_by_role("region", name=name, exact=True).is_visible()
        assert page.get_by_role("heading", level=2, name=name).is_visible()
    table = page.get_by_role("table", name="nano <i>&/eval")
    assert [head.inner_text() for head in table.get_by_role("columnheader").all()] == ["Arm", "math\n4 tasks"]
    rows = {row.get_by_role("rowheader").inner_text().split("\n")[0]: row.get_by_role("cell").inner_text()
            for row in table.get_by_role("row").all()[1:]}  # fmt: skip
    assert list(rows) == ["student", "sft", "grpo", "grpo − sft", "shuffled"]
    assert rows["student"].split("\n") == ["25.0", "[4.6, 69.9]"]  # Wilson, of 1 of 4
    assert rows["grpo − sft"].startswith("+75.0\n[+")
    kl = page.get_by_role("img", name="KL to the reference, nats per token: training 0.01 first, 0.05 last")
    kl.hover(position={"x": 41, "y": 50})
    assert page.locator("figure", has=kl).get_by_role("listitem").inner_text() == "training\n0.01"
    page.get_by_label("Values at step").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("figure", has=kl).get_by_role("listitem").inner_text() == "training\n0.02"
    assert page.get_by_role("navigation").get_by_role("link").count() == 13  # of 15: the list is a window


@pytest.mark.processes
def test_filters_choose_episodes_and_say_how_many_there_are(visit, url):
    page = visit(url)
    page.get_by_label("Source").select_option("nano <i>&/teacher-grpo")
    outcomes = page.get_by_label("Outcome")
    counts = "all (5) helped (2) harmed (1) same (2) not scored (0) leak (1) malformed (1)"
    assert " ".join(outcomes.get_by_role("option").all_inner_texts()) == counts
    for kind, says in (("helped", "+50.0 points"), ("harmed", "−100.0 points"), ("leak", "It is 12."),
                       ("malformed", "it wrote no <teaching>")):  # fmt: skip
        outcomes.select_option(kind)
        assert f" {kind}" in title_of(page) and says in page.get_by_role("article").inner_text()
    outcomes.select_option("harmed")
    shown = page.get_by_role("article").inner_text()
    assert shown.count("✓ right") == 1 and shown.count("✗ wrong") == 1
    page.get_by_label("Source").select_option("nano <i>&/runtime")
    assert page.get_by_role("status").last.inner_text() == "No episode is like this."
    outcomes.select_option("not scored")
    assert "the teacher is away" in page.get_by_role("article").inner_text()
    outcomes.select_option("helped")
    assert page.get_by_text("score 0.75").is_visible()
    page.get_by_label("Source").select_option("nano <i>&/eval/grpo")
    assert "Task 1?" in page.get_by_role("article").inner_text()  # of the file of problems


@pytest.mark.processes
def test_the_keyboard_alone_goes_on_and_reaches_the_filters(visit, url):
    page = visit(url)
    first = title_of(page)
    page.keyboard.press("j")
    second = title_of(page)
    page.keyboard.press("ArrowRight")
    assert len({first, second, title_of(page)}) == 3
    page.keyboard.press("ArrowLeft")
    assert title_of(page) == second and page.get_by_role("status").last.inner_text().startswith("2 of 15: ")
    page.keyboard.press("k")
    page.keyboard.press("k")
    assert title_of(page) == first
    reached = []
    for _ in range(9):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert [name for name in reached if name] == ["step", "source", "outcome", "previous", "next"]


@pytest.mark.processes
def test_an_address_opens_its_episode(visit, url):
    page = visit(f"{url}#nano%20%3Ci%3E&/teacher-grpo/2/harmed")
    assert "harmed" in title_of(page) and page.get_by_role("article").is_visible()
    page.keyboard.press("j")
    assert title_of(visit(page.url)) == title_of(page) != title_of(visit(url))
    page.get_by_role("navigation").get_by_role("link", name="2/harmed").click()
    assert "harmed" in title_of(page)
    assert page.evaluate("document.activeElement.tagName") == "ARTICLE"
    for unknown in ("gone/1", "%E0%A4%A"):
        said = visit(f"{url}#{unknown}").get_by_role("status").last.inner_text()
        assert said.startswith(f"This page has no episode {unknown}.")


@pytest.mark.processes
def test_what_a_model_wrote_stays_text(visit, url):
    page = visit(url)
    page.get_by_label("Source").select_option("nano <i>&/teacher-grpo")
    for _ in range(4):
        page.get_by_role("button", name="Next").click()
    shown = page.get_by_role("article").text_content()
    assert shown.count(EVIL) >= 6  # id, question, approach, thinking, teaching, answer
    assert page.evaluate("typeof hacked") == "undefined" and page.locator("main img, i").count() == 0
    assert title_of(visit(page.url)) == title_of(page)


CONTRASTS = """() => {
  const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => !e ? "rgb(255, 255, 255)" : getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)"
    ? behind(e.parentElement) : getComputedStyle(e).backgroundColor;
  return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
      const style = getComputedStyle(e), front = e instanceof SVGElement ? style.fill : style.color;
      const [a, b] = [light(front), light(behind(e))].sort((a, b) => b - a);
      return (a + .05) / (b + .05);
    });
}"""


@pytest.mark.processes
@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits_the_window_and_can_be_read_in_light_and_dark(visit, url, width):
    papers = set()
    for scheme in ("light", "dark"):
        page = visit(f"{url}#nano%20%3Ci%3E&/teacher-grpo/5/{EVIL.replace('%', '%25')}", width, scheme)
        assert EVIL in page.get_by_role("article").text_content()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 50 and min(contrasts) >= 4.5
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2


@pytest.mark.processes
def test_other_seeds_are_thin_lines_behind_the_mean(visit, tmp_path):
    page = visit(make(write_run(tmp_path / "a"), write_run(tmp_path / "b", "training", shift=0.02)))
    kl = page.get_by_role("img", name="KL to the reference, nats per token: training 0.02 first, 0.06 last")
    assert kl.locator("path.thin").count() == 2 and kl.locator("path").count() == 3


@pytest.mark.processes
@pytest.mark.parametrize(("file", "shown"), [
    ("teacher-grpo/metrics.jsonl", ["Training"]), ("teacher-grpo/episodes.jsonl", ["Episodes"]),
    ("runtime/traces.jsonl", ["Episodes"]), ("eval/results.json", ["Results"]), ("eval/tasks.jsonl", ["Episodes"])])  # fmt: skip
def test_one_file_is_enough_and_other_sections_are_left_out(visit, tmp_path, file, shown):
    source, only = write_run(tmp_path / "whole") / file, tmp_path / "only"
    only.mkdir()
    shutil.copy(source, only)
    page = visit(make(only))
    assert page.get_by_role("heading", level=2).all_inner_texts() == shown


def test_a_torn_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path):
    run = write_run(tmp_path / "run", "training")
    path = run / "teacher-grpo/episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert report.collect([run])["count"] == len(EPISODES) - 1
    path.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="episodes.jsonl: not of this version"):
        report.collect([run])


def test_a_page_that_would_be_too_large_has_episodes_at_even_distances(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    whole = report.collect([run])["episodes"]
    monkeypatch.setattr(report, "MOST_BYTES", len(json.dumps(whole)) // 2)
    found = report.collect([run])
    assert found["count"] == len(whole) and 1 < len(found["episodes"]) < len(whole)
    assert found["episodes"] in (whole[::2], whole[::3])


def test_the_page_knows_every_control():
    text = Path(report.__file__).with_suffix(".html").read_text()
    names = text.partition("const CONTROLS = {")[2].partition("};")[0]
    assert all(f"{name}:" in names or f'"{name}":' in names for name in CONTROLS)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["empty", "gone"])
def test_a_directory_without_a_run_is_one_line_that_says_what_makes_one(tmp_path, name):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "nano_atlas.report", tmp_path / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert all(part in done.stderr for part in (name, "episodes.jsonl", "`python train_grpo.py`"))
    assert list((tmp_path / "empty").iterdir()) == []
