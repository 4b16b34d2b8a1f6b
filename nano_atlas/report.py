"""One page about a run: results with intervals, curves of the training, and every episode, before and after.

python -m nano_atlas.report runs/nano                              # or a part of it, such as runs/nano/eval
python -m nano_atlas.report runs/nano runs/nano-43 --out all.html  # more seeds: thin lines behind their mean
"""

import argparse
import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from nano_atlas.config import run_script
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json, read_jsonl, replace_text

SHOWN = "id source facts question approach completion teaching is_leak before after".split()
FILES = "results.json", "metrics.jsonl", "tasks.jsonl", "episodes.jsonl", "traces.jsonl"


def records(path: Path) -> list[dict]:
    return [record for _, record in read_jsonl(path, is_journal=True)]


def training(path: Path, where: str) -> Iterator[dict]:
    for one in records(path):
        facts = {name: one[name] for name in ("step", "answer", "reward", "advantage")}
        about = {"id": f"{where}/{one['step']}/{one['id']}", "source": where, "facts": facts}
        after = [one["guided"]] if one["guided"] else []
        yield one | about | {"before": one["baselines"], "after": after}


def sessions(path: Path, where: str) -> Iterator[dict]:
    """Of the runtime. A failed session is done again: its latest record counts."""
    for name, trace in {trace["outcome"]["session_id"]: trace for trace in records(path)}.items():
        step, numbers, events = trace["steps"][0], trace["outcome"], trace["trajectory_events"]
        trials = step["metadata"]["attempt_history"]
        facts = {fact: numbers[fact] for fact in ("lane", "strategy", "reward", "review")}
        facts |= {"answer": trace["ground_truth"], "fault": trace["session_metadata"]["error"]}
        about = {"id": f"{where}/{name}", "source": where, "facts": facts, "is_leak": numbers["is_leak"]}
        about |= {"question": trace["task"], "approach": step["description"]}
        about["completion"] = "\n\n".join(e.get("text", "") for e in events if e["event"] == "teaching")
        about["teaching"] = "\n\n".join(step["guidance"]) or None
        yield about | {"before": trials[:1], "after": trials[1:]}


def evaluation(path: Path, where: str) -> Iterator[dict]:
    """The results of each teacher, beside the student's own on the same task."""
    from nano_atlas.benches.arms import ALONE, STUDENT

    found = [record for record in records(path) if "arm" in record]  # others are tasks, not results
    key = lambda record: (record["domain"], record["id"], record["sample"])
    alone = {key(record): record["attempt"] for record in found if record["arm"] == STUDENT}
    for one in found:
        if one["arm"] not in ALONE and key(one) in alone:
            source = f"{where}/{one['arm']}"
            about = {"id": "/".join(map(str, (source, *key(one)))), "source": source}
            about |= {"facts": {"answer": one["gold"]}, "completion": one["teacher_text"]}
            yield one | about | {"before": [alone[key(one)]], "after": [one["attempt"]]}


def collect(directories: Sequence[Path]) -> dict:
    """What lies in the directories, at any depth. Raises UserError where one has nothing, and for damaged files."""
    report = {"tables": [], "curves": [], "episodes": []}
    readers = {"tasks.jsonl": evaluation, "episodes.jsonl": training, "traces.jsonl": sessions}
    for directory in directories:
        found = [path for name in FILES for path in sorted(directory.rglob(name))]
        for path in found:
            try:
                if path.name in readers:
                    read = readers[path.name](path, str(path.parent))
                    report["episodes"] += [{field: one.get(field) for field in SHOWN} for one in read]
                elif path.name == "metrics.jsonl":  # only GRPO has teachings: not SFT's, nor the runtime's
                    rows = [row for row in records(path) if "teaching_length_mean" in row]
                    report["curves"] += [{"name": str(path.parent), "records": rows}] * bool(rows)
                elif "scores" in (results := read_json(path)):
                    report["tables"].append({"name": str(path.parent)} | results)
            except (AttributeError, LookupError, TypeError) as error:
                raise UserError(f"{path}: not of this version ({error!r}); move it elsewhere") from error
        if not found:
            raise UserError(f"{directory} has none of {', '.join(FILES)}; `python train_grpo.py` makes some")
    return report


def main() -> None:
    parser = argparse.ArgumentParser("python -m nano_atlas.report", description=__doc__.partition("\n")[0])
    parser.add_argument("run", nargs="+", type=Path, help="directory of a run, or of a part of one")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first run)")
    options = parser.parse_args()
    report, out = collect(options.run), options.out or options.run[0] / "report.html"
    data = json.dumps(report, allow_nan=False).replace("<", "\\u003c")  # no text of a model ends the element
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    title = html.escape(", ".join(map(str, options.run)))
    replace_text(out, page.replace("%title%", title).replace("%data%", data))
    print(f"{out}: {len(report['episodes'])} episodes, {len(report['curves'])} training runs")


if __name__ == "__main__":
    run_script(main)
