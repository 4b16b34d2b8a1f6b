"""One page about a run: results with intervals, curves of the training, and every episode, before and after.

    python -m nano_atlas.report runs/nano                              # writes runs/nano/report.html
    python -m nano_atlas.report runs/nano runs/nano-43 --out all.html  # more seeds: thin lines behind their mean

Any part of a run will do, such as runs/nano/eval, also of one that still goes on. The page asks nothing of the network.
"""

import argparse
import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path

from nano_atlas.config import run_script
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json, read_jsonl, replace_text

MOST_BYTES = 20_000_000  # of all episodes in a page; of more, every second, third, ... is shown


def records(path: Path) -> list[dict]:
    return [record for _, record in read_jsonl(path, is_journal=True)]


def tables(path: Path, where: str) -> Iterator[dict]:
    results = read_json(path)
    if "scores" in results:
        yield {"name": where, "scores": results["scores"], "differences": results["differences"]}


def curves(path: Path, where: str) -> Iterator[dict]:
    found = records(path)
    if any("teaching_length_mean" in record for record in found):  # those of SFT and of the runtime have none
        yield {"name": where, "records": found}


def training(path: Path, where: str) -> Iterator[dict]:
    for entry in records(path):
        entry |= {"source": where, "gold": entry["answer"], "id": f"{where}/{entry['step']}/{entry['id']}"}
        yield entry | {"before": entry.pop("baselines"), "after": [entry.pop("guided")]}


def sessions(path: Path, where: str) -> Iterator[dict]:
    """Of the runtime. A failed session is done again: its latest record counts."""
    for name, trace in {trace["outcome"]["session_id"]: trace for trace in records(path)}.items():
        step, about, domain = trace["steps"][0], trace["session_metadata"], trace["learning_key"]
        trials, events = step["metadata"]["attempt_history"], trace["trajectory_events"]
        told = "\n\n".join(event.get("text", "") for event in events if event["event"] == "teaching")
        entry = {"id": f"{where}/{name}", "source": where, "domain": domain, "question": trace["task"]}
        entry |= {"approach": step["description"], "teaching": "\n\n".join(step["guidance"]) or None}
        entry |= {"completion": told, "gold": trace["ground_truth"], "fault": about["error"]}
        yield trace["outcome"] | entry | {"before": trials[:1], "after": trials[1:]}


def evaluation(path: Path, where: str) -> Iterator[dict]:
    """The results of each teacher, beside the student's own on the same task."""
    from nano_atlas.benches.arms import CONTROLS, STUDENT

    found = [record for record in records(path) if "arm" in record]  # others are problems, not results
    key = lambda record: (record["domain"], record["id"], record["sample"])
    alone = {key(record): record["attempt"] for record in found if record["arm"] == STUDENT}
    asked = questions(path.with_name("run.json")) if found else {}
    for record in found:
        arm, own = record["arm"], alone.get(key(record))
        if own and arm not in (STUDENT, *CONTROLS):
            source, sample = f"{where}/{arm}", f"/{record['sample']}" if record["sample"] else ""
            entry = {"id": f"{source}/{record['domain']}/{record['id']}{sample}", "source": source}
            entry |= {name: record[name] for name in ("domain", "gold", "approach", "teaching", "is_leak")}
            entry |= {"completion": record["teacher_text"], "before": [own], "after": [record["attempt"]]}
            yield entry | {"question": asked.get((record["id"], record["gold"]))}


def questions(path: Path) -> dict[tuple[str, str | None], str]:
    """By id and gold answer, from where the run's options say: results hold none. Nothing where no file can be read."""
    from nano_atlas import data, world

    options, problems = read_json(path).get("config", {}), []
    with suppress(UserError):
        problems = data.load_problems(options.get("data") or "")
    for domain in world.DOMAINS if options.get("bench") == "nano" else ():
        problems += world.held_out(domain, options["limit"] or 500, options["seed"])
    return {(problem.id, problem.answer): problem.question for problem in problems}


READERS = {  # by file: the part of the page, and what makes its items
    "results.json": ("tables", tables),
    "metrics.jsonl": ("curves", curves),
    "tasks.jsonl": ("episodes", evaluation),
    "episodes.jsonl": ("episodes", training),
    "traces.jsonl": ("episodes", sessions),
}


def collect(directories: Sequence[Path]) -> dict:
    """What is in the directories and one level below. Raises UserError where one has nothing, and for damaged files."""
    names = [directory.resolve().name for directory in directories]
    report = {"title": ", ".join(names), "tables": [], "curves": [], "episodes": []}
    for directory, name in zip(directories, names):
        name, count = str(directory) if names.count(name) > 1 else name, 0
        for file, (part, read) in READERS.items():
            for path in sorted([*directory.glob(file), *directory.glob(f"*/{file}")]):
                try:
                    new = list(read(path, "/".join((name, *path.parent.relative_to(directory).parts))))
                except (AttributeError, LookupError, TypeError) as error:
                    raise UserError(f"{path}: not of this version ({error!r}); move it elsewhere") from error
                report[part], count = report[part] + new, count + len(new)
        if not count:
            what = f"{directory} holds no run: no records in any {', '.join(READERS)}"
            raise UserError(f"{what}; `python train_grpo.py` writes some, eval.py and runtime_loop.py others")
    every = ceil(sum(len(json.dumps(entry)) for entry in report["episodes"]) / MOST_BYTES) or 1
    return report | {"episodes": report["episodes"][::every], "count": len(report["episodes"])}


def page(report: dict) -> str:
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    for part in "style", "script":  # the page's policy allows these two, by their digests, and nothing else
        inner = re.search(f"<{part}>(.*?)</{part}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        text = text.replace(f"{part}-digest", f"sha256-{digest}")
    safe = json.dumps(report, allow_nan=False).replace("<", "\\u003c")  # no text of a model ends the element
    return text.replace("%title%", html.escape(report["title"])).replace("%data%", safe)


def main() -> None:
    parser = argparse.ArgumentParser("python -m nano_atlas.report", description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="+", type=Path, help="directory of a run, or of a part of one")
    parser.add_argument(
        "--out", type=Path, help="the page to write or its directory (default: the first run)"
    )
    options = parser.parse_args()
    report, out = collect(options.run), options.out or options.run[0]
    out = out / "report.html" if out.is_dir() else out
    replace_text(out, page(report))
    print(f"{out}: {len(report['episodes'])} episodes, {len(report['curves'])} training runs")


if __name__ == "__main__":
    run_script(main)
