"""The evaluation, on students and teachers whose every answer is known beforehand."""

import dataclasses
import hashlib
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import tokenizers

import eval as evaluation
from eval import Config, evaluate
from nano_atlas import protocol
from nano_atlas.benches.arms import SAME_BUDGET, SHUFFLED, TWO_VOTES, UNTRAINED, derange, stored_report
from nano_atlas.benches.results import STUDENT, TaskLog, read_results, start_or_continue
from nano_atlas.benches.scores import make_report, summary, tables
from nano_atlas.checkpoint import config_from_dict, save_model
from nano_atlas.config import parse, run_script
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt, attempt, majority
from nano_atlas.errors import UserError
from nano_atlas.model import Transformer
from nano_atlas.seats import Reply
from nano_atlas.tokenizer import Tokenizer

TASKS = {
    domain: [
        Problem(f"{domain}-{i}", f"Question {domain}-{i}?", f"canary-{domain}-{i}", domain)
        for i in range(count)
    ]
    for domain, count in (("math", 30), ("crm", 12))
}


def number_of(conversation) -> tuple[str, int]:
    """The domain and index of the task that a prompt is about."""
    domain, index = re.match(r"Question (\w+)-(\d+)\?", conversation[0]["content"]).groups()
    return domain, int(index)


class Seat:
    """Replies by a rule, and remembers what it was asked. `stop_after` replies it dies, as a killed process does."""

    def __init__(self, rule, stop_after: int = 10**9):
        self.rule, self.asked, self.calls, self.stop_after = rule, [], [], stop_after

    def ask(self, questions, progress=None):
        self.calls.append(len(questions))
        replies = []
        for conversation, generation, seed, n in questions:
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked += [conversation[0]["content"]] * n
            draws = random.Random(seed)
            replies.append(
                [self.rule(conversation, draws if generation.temperature else None) for _ in range(n)]
            )
        return replies

    def count_tokens(self, text):
        return len(text.split())


def student_rule(conversation, draws):
    """Right alone on every third task; with its own plan on all but multiples of 5; a plan named "confuse" makes it fail."""
    text, (domain, i) = conversation[0]["content"], number_of(conversation)
    if protocol.PROBE_REQUEST in text:
        return Reply("I would guess.", 7, False)
    if protocol.ANSWER_FORMAT not in text:
        return Reply("no idea how to teach", 5, True)  # in the teacher's seat
    is_right = draws.random() < 0.5 if draws else i % 3 == 0
    if f"plan {domain}-{i}." in text:
        is_right = draws.random() < 0.9 if draws else i % 5 != 0
    if "confuse" in text:
        is_right = False
    if i == 1 and "Teacher's guidance" not in text:
        return Reply("I give up", 20, True)
    return Reply(f"<solution>{f'canary-{domain}-{i}' if is_right else 'wrong'}</solution>", 20, False)


def good_teacher(conversation, draws):
    domain, i = number_of(conversation)
    if i == 4:
        return Reply("<thinking>plan math-4.</thinking> no tag", 30, True)
    leak = f" It is canary-{domain}-{i}." if i == 6 else ""
    return Reply(f"<thinking>hm</thinking><teaching>plan {domain}-{i}.{leak}</teaching>", 40, False)


def weak_teacher(conversation, draws):
    domain, i = number_of(conversation)
    return Reply(
        f"<teaching>{'confuse' if i % 6 == 0 else f'plan {domain}-{i}.' if i % 2 else 'think'}</teaching>",
        10,
        False,
    )


TEACHERS = {"sft": weak_teacher, "grpo": good_teacher}


def config_for(path, **changes) -> Config:
    options = {
        "bench": "gsm8k",
        "student": "http://student",
        "teacher": ("sft=http://sft", "grpo=http://grpo"),
    }
    options |= {"control": (SHUFFLED, UNTRAINED), "chunk": 8, "out": path}
    return Config(**options | changes)


def run(config, tasks=TASKS, student=None, teachers=None, is_right=protocol.is_correct):
    """The middle of `eval.main`, with seats of our own."""
    student = student or Seat(student_rule)
    teachers = teachers if teachers is not None else {name: Seat(rule) for name, rule in TEACHERS.items()}
    start_or_continue(
        config, config.contents() | {f"tasks {name}": repr(problems) for name, problems in tasks.items()}
    )
    log = TaskLog(config.out / "tasks.jsonl")
    try:
        evaluate(config, tasks, log, is_right, lambda: student, teachers.__getitem__)
    finally:
        log.close()
    return log.results, student, teachers


def expected(domain):
    """What each arm gets right, from the rules above, task by task."""
    count = len(TASKS[domain])
    alone = [i % 3 == 0 for i in range(count)]
    good = [alone[i] if i == 4 else i % 5 != 0 for i in range(count)]
    weak = [False if i % 6 == 0 else i % 5 != 0 if i % 2 else alone[i] for i in range(count)]
    return {STUDENT: alone, "sft": weak, "grpo": good, UNTRAINED: alone}


def test_every_number_of_the_tables_follows_from_the_rules(tmp_path):
    config = config_for(tmp_path)
    results, _, _ = run(config)
    report, stored = stored_report(tmp_path, Config)
    rows = {(score.domain, score.arm): score for score in report.scores}
    assert list(rows) == [
        (domain, arm) for domain in TASKS for arm in (STUDENT, "sft", "grpo", SHUFFLED, UNTRAINED)
    ]
    for domain in TASKS:
        right, count = expected(domain), len(TASKS[domain])
        for arm, is_right in right.items():
            score = rows[domain, arm]
            assert (score.tasks, score.accuracy) == (count, pytest.approx(sum(is_right) / count)), (
                domain,
                arm,
            )
            assert score.interval[0] < score.accuracy < score.interval[1] and score.student_tokens == 20
            if arm == STUDENT:
                assert (
                    score.versus_student is score.leak is score.malformed is None and score.all_tokens == 20
                )
                assert score.completion == pytest.approx(1 - 1 / count)  # task 1 gives up
                continue
            versus, pairs = score.versus_student, list(zip(is_right, right[STUDENT]))
            improved, degraded = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
            assert (versus.improved, versus.degraded) == (improved, degraded)
            assert versus.delta == pytest.approx((improved - degraded) / count)
            assert versus.interval[0] <= versus.delta <= versus.interval[1]
            assert versus.non_degradation == pytest.approx(1 - degraded / count)
            assert versus.non_degradation_correct == pytest.approx(1 - degraded / sum(right[STUDENT]))
        grpo, difference = rows[domain, "grpo"], next(d for d in report.differences if d.domain == domain)
        assert grpo.leak == grpo.malformed == pytest.approx(1 / count)  # tasks 6 and 4
        assert grpo.all_tokens == pytest.approx(
            20 + 7 + (40 * (count - 1) + 30) / count
        )  # answer + probe + teacher
        assert (difference.arm, difference.other) == ("grpo", "sft")
        assert difference.delta == pytest.approx((sum(right["grpo"]) - sum(right["sft"])) / count)
        assert rows[domain, UNTRAINED].malformed == 1 and rows[domain, UNTRAINED].versus_student.delta == 0
        assert abs(rows[domain, SHUFFLED].versus_student.delta) < 1e-9  # a plan for another task does nothing
    versus = rows["math", "grpo"].versus_student
    n, k = versus.improved + versus.degraded, versus.improved
    assert versus.p_value == pytest.approx(
        sum(math.comb(n, i) for i in range(n + 1) if abs(2 * i - n) >= abs(2 * k - n)) / 2**n
    )

    text = tables(report, stored.names)
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    assert {len(row) for row in table} == {15} and len(table) == 2 * (2 + 5)
    assert [row[0] for row in table[2:7]] == [
        "student alone",
        "sft",
        "grpo",
        "control: shuffled grpo",
        "control: untrained",
    ]
    assert table[4][1] == f"{100 * rows['math', 'grpo'].accuracy:.1f}"
    assert table[4][2].startswith(f"{100 * versus.delta:+.1f} [")
    assert text.count("grpo − sft: **") == 2
    short = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in summary(report, ["sft", "grpo"]).splitlines()
    ]
    assert short[0] == ["tasks", "student", "sft", "grpo", "grpo − sft"] and [
        row[0] for row in short[2:]
    ] == [f"{domain} ({len(tasks)})" for domain, tasks in TASKS.items()]
    assert short[2][1:4] == [f"{100 * rows['math', arm].accuracy:.1f}" for arm in (STUDENT, "sft", "grpo")]
    assert len(results) == 5 * 42


def test_no_prompt_holds_a_gold_answer(tmp_path):
    """Every gold answer is a canary; a teacher that never says it leaves it out of every prompt, of both seats."""
    _, student, teachers = run(
        config_for(tmp_path), teachers={"sft": Seat(weak_teacher), "grpo": Seat(weak_teacher)}
    )
    prompts = [*student.asked, *teachers["sft"].asked, *teachers["grpo"].asked]
    assert len(prompts) == 42 * (2 + 2 + 2 + 1 + 2)
    assert not [prompt for prompt in prompts if "canary" in prompt]


def test_the_student_alone_is_asked_once_for_all_arms(tmp_path):
    _, student, _ = run(config_for(tmp_path))
    assert sum(protocol.PROBE_REQUEST in prompt for prompt in student.asked) == 42
    # The baseline prompt itself comes a second time where a teacher wrote no teaching: everywhere from the untrained one, on
    # task 4 from grpo, and once more when that nothing is handed on by the shuffling.
    prompts = [protocol.baseline_messages(problem.question)[0]["content"] for problem in TASKS["math"]]
    assert sum(map(student.asked.count, prompts)) == 30 + 30 + 1 + 1
    assert student.asked.count(prompts[4]) == 3


def test_all_that_can_be_asked_at_once_is_one_call(tmp_path):
    """However many arms: alone and votes; each teacher and its student; three controls together, and one of them once more."""
    controls = (SHUFFLED, UNTRAINED, TWO_VOTES, SAME_BUDGET)
    _, student, teachers = run(config_for(tmp_path, control=controls, chunk=1000))
    count = sum(map(len, TASKS.values()))
    assert student.calls[0] == count * 3 and len(student.calls) == 1 + 2 + 2
    assert [seat.calls for seat in teachers.values()] == [[count], [count]]


def test_both_arms_ask_in_the_same_answer_format(tmp_path):
    _, student, _ = run(config_for(tmp_path))
    answering = [prompt for prompt in student.asked if prompt.endswith(protocol.ANSWER_FORMAT)]
    teaching = [prompt for prompt in student.asked if "Diagnose" in prompt]
    assert len(answering) == 42 * 5 and len(teaching) == 42  # the rest: probes
    assert len(student.asked) == 42 * 7
    assert not any(
        "<thinking>" in prompt for prompt in answering
    )  # a teacher's private text never reaches the student


def test_shuffled_teachings_go_each_to_one_other_task(tmp_path):
    results, _, _ = run(config_for(tmp_path))
    for domain, problems in TASKS.items():
        given = {p.id: results[SHUFFLED, domain, p.id, 0].teaching for p in problems}
        own = {p.id: results["grpo", domain, p.id, 0].teaching for p in problems}
        assert sorted(map(str, given.values())) == sorted(map(str, own.values()))
        assert all(given[name] != own[name] for name in own)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_derangement_leaves_nothing_in_place(count):
    problems = [Problem(str(i), "?", "1") for i in range(count)]
    donors = derange(problems, seed=5)
    assert sorted(p.id for p in donors.values()) == sorted(donors) and all(
        name != p.id for name, p in donors.items()
    )
    assert derange(problems, seed=5) == donors and (count < 50 or derange(problems, seed=6) != donors)


def test_one_task_cannot_be_shuffled(tmp_path):
    with pytest.raises(UserError, match="at least 2 tasks"):
        run(config_for(tmp_path), tasks={"math": TASKS["math"][:1]})


SAMPLED = {"samples": 3, "temperature": 0.8, "chunk": 12}  # 4 tasks per chunk


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("cut", [0, 1, 1500, 9_000, 40_000, -1])
def test_a_killed_run_continues_to_the_same_results(tmp_path, options, cut):
    """Whatever byte the file ends at, the finished run holds each result once, and each is that of an unbroken run."""
    whole, _, _ = run(config_for(tmp_path / "whole", **options))
    run(config_for(tmp_path / "cut", **options))
    file = tmp_path / "cut/tasks.jsonl"
    content = file.read_bytes()[:cut]
    kept = content.count(b"\n")
    file.write_bytes(content)
    resumed, student, teachers = run(config_for(tmp_path / "cut", **options))
    assert resumed == whole
    assert file.read_bytes().startswith(
        content[: content.rfind(b"\n") + 1]
    )  # append-only: what was whole is kept
    assert sorted(file.read_bytes().splitlines()) == sorted(
        (tmp_path / "whole/tasks.jsonl").read_bytes().splitlines()
    )
    samples = options.get("samples", 1)
    asked = len(student.asked) + sum(len(seat.asked) for seat in teachers.values())
    assert asked <= (2 * samples + 2) * (
        5 * 42 - kept // samples + 8
    )  # the open tasks, and one chunk at most once more


@pytest.mark.parametrize("deaths", [[5], [40, 60, 31, 20], [1] * 5])
def test_a_run_that_dies_while_asking_loses_one_chunk(tmp_path, deaths):
    for stop_after in deaths:
        before = len(read_results(tmp_path / "tasks.jsonl")[0])
        with pytest.raises(KeyboardInterrupt):
            run(config_for(tmp_path), student=Seat(student_rule, stop_after))
        after, intact = read_results(tmp_path / "tasks.jsonl")
        assert (
            len(after) >= before + (stop_after - 16) // 3
            and intact == (tmp_path / "tasks.jsonl").stat().st_size
        )
    results, _, _ = run(config_for(tmp_path))
    assert results == run(config_for(tmp_path / "whole"))[0]


def test_a_finished_run_asks_nobody(tmp_path):
    first, _, _ = run(config_for(tmp_path))
    again, student, _ = run(config_for(tmp_path), teachers={})
    assert again == first and not student.asked


@pytest.mark.parametrize("changes, named", [
    ({"seed": 1}, "--seed 0 -> 1"), ({"temperature": 0.5}, "--temperature"), ({"answer_tokens": 9}, "--answer-tokens"),
    ({"teacher": ("sft=http://sft",)}, "--teacher"), ({"control": ("none",)}, "--control"),
    ({"student": "http://other"}, "--student"),
])  # fmt: skip
def test_a_changed_option_is_refused_by_name(tmp_path, changes, named):
    run(config_for(tmp_path))
    with pytest.raises(UserError, match=named):
        run(config_for(tmp_path, **changes))
    results, _, _ = run(config_for(tmp_path, restart=True, **changes))
    assert results


def test_changed_tasks_and_weights_are_refused_under_unchanged_paths(tmp_path):
    """Training again into the same directory must not bring up the old teacher's results as the new one's."""
    teacher = tmp_path / "grpo"
    teacher.mkdir()
    (teacher / "model.safetensors").write_bytes(b"old")
    config = config_for(tmp_path / "out", teacher=(f"grpo={teacher}",))
    run(config)
    other_tasks = TASKS | {"crm": [dataclasses.replace(problem, answer="other") for problem in TASKS["crm"]]}
    with pytest.raises(UserError, match="tasks crm"):
        run(config, tasks=other_tasks)
    (teacher / "model.safetensors").write_bytes(b"new")
    with pytest.raises(UserError, match="checkpoint grpo"):
        run(config)
    (teacher / "model.safetensors").write_bytes(b"old")
    (teacher / "metrics.jsonl").write_text("{}")  # no part of the checkpoint
    run(config)


def test_damaged_results_are_named_by_line(tmp_path):
    config = config_for(tmp_path)
    run(config)
    file = tmp_path / "tasks.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for damage, message in ((lines[:3] + [b'{"arm": "x"}\n'] + lines[3:], ":4: not a task result"),
                            (lines[:5] + [b"\0\0\0\n"] + lines[6:], ":6: not a task result"),
                            (lines[:9] + lines[2:3] + lines[9:], ":10: student math math-2 0 is there twice")):  # fmt: skip
        file.write_bytes(b"".join(damage))
        with pytest.raises(UserError, match=message):
            run(config)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match="without its run.json"):
        run(config)


def test_two_writers_exclude_each_other(tmp_path):
    log = TaskLog(tmp_path / "tasks.jsonl")
    with pytest.raises(UserError, match="another process"):
        TaskLog(tmp_path / "tasks.jsonl")
    log.close()
    TaskLog(tmp_path / "tasks.jsonl").close()


def test_several_samples_give_averages_with_errors_and_pass_at_k(tmp_path):
    results, _, _ = run(config_for(tmp_path, **SAMPLED))
    report, stored = stored_report(tmp_path, Config)
    right = [[results["grpo", "math", p.id, s].attempt.is_correct for s in range(3)] for p in TASKS["math"]]
    means = [sum(task) / 3 for task in right]
    score = next(s for s in report.scores if (s.domain, s.arm) == ("math", "grpo"))
    average = sum(means) / 30
    assert score.accuracy == pytest.approx(average) and score.interval is None
    assert score.error == pytest.approx((sum((m - average) ** 2 for m in means) / 29 / 30) ** 0.5)
    assert list(score.pass_at_k) == [1, 2, 3]
    assert score.pass_at_k[1] == pytest.approx(average) and score.pass_at_k[3] == pytest.approx(
        sum(map(any, right)) / 30
    )
    alone = [
        sum(results[STUDENT, "math", p.id, s].attempt.is_correct for s in range(3)) / 3 for p in TASKS["math"]
    ]
    versus = score.versus_student
    assert versus.delta == pytest.approx(average - sum(alone) / 30) and versus.p_value is None
    assert versus.degraded == sum(a < b for a, b in zip(means, alone))
    assert versus.non_degradation_correct == pytest.approx(1 - versus.degraded / sum(b > 0 for b in alone))
    assert "avg@3" in tables(report, stored.names) and f"± {100 * score.error:.1f}" in tables(
        report, stored.names
    )


def test_votes_are_the_majority_of_fresh_answers_at_their_price(tmp_path):
    """The student of these rules is right by a coin toss alone; the pair's tokens (20 + 7 + 40) buy four answers of 20."""
    config = config_for(
        tmp_path, control=(TWO_VOTES, SAME_BUDGET), teacher=("grpo=http://grpo",), samples=1, temperature=0.8
    )
    results, student, _ = run(config, teachers={"grpo": Seat(good_teacher)})
    report, stored = stored_report(tmp_path, Config)
    rows = {(score.domain, score.arm): score for score in report.scores}
    assert rows["math", TWO_VOTES].student_tokens == rows["math", TWO_VOTES].all_tokens == 40
    assert (
        rows["math", SAME_BUDGET].all_tokens == 80
        and rows["math", SAME_BUDGET].leak is rows["math", SAME_BUDGET].malformed is None
    )
    assert (
        0.1 < rows["math", TWO_VOTES].accuracy < 0.9 and rows["math", TWO_VOTES].versus_student.improved > 0
    )
    questions = [protocol.baseline_messages(problem.question)[0]["content"] for problem in TASKS["math"]]
    assert student.asked.count(questions[0]) == 1 + 2 + 4
    text = tables(report, stored.names)
    assert "control: vote of 2" in text and "control: vote, tokens of grpo" in text


def vote(*answers) -> Attempt:
    return majority(
        [Attempt(f"text {i}", answer, answer == "7", 10, i == 2) for i, answer in enumerate(answers)]
    )


def test_a_majority_counts_equal_answers_and_the_first_wins_a_tie():
    assert vote("3", "7", "07").text == "text 1" and vote("3", "7", "007.").is_truncated
    assert vote("3", "7").answer == "3" and vote("3", "7").tokens == 20
    assert vote(None, "7", None).answer == "7" and vote(None, None).answer is None
    assert vote("A b", "7", "a B.", "7", "x", "a  b").answer == "A b"


def test_majority_and_pass_hat_k_of_several_samples(tmp_path):
    results, _, _ = run(config_for(tmp_path, **SAMPLED))
    score = next(
        s for s in stored_report(tmp_path, Config)[0].scores if (s.domain, s.arm) == ("math", "grpo")
    )
    right = [
        sum(results["grpo", "math", p.id, s].attempt.is_correct for s in range(3)) for p in TASKS["math"]
    ]
    assert score.pass_hat_k[3] == pytest.approx(sum(count == 3 for count in right) / 30)
    assert score.majority == pytest.approx(
        sum(count >= 2 for count in right) / 30
    )  # all wrong answers are the same word


def test_accuracy_with_and_without_leaks_stand_side_by_side(tmp_path):
    run(config_for(tmp_path))
    report, stored = stored_report(tmp_path, Config)
    score = next(s for s in report.scores if (s.domain, s.arm) == ("math", "grpo"))
    right = expected("math")["grpo"]
    assert score.leak_free_accuracy == pytest.approx((sum(right) - right[6]) / 29)  # task 6 leaks
    assert f"{100 * score.leak_free_accuracy:.1f}" in tables(report, stored.names)


@pytest.mark.parametrize("reply, answer, gold, expected", [
    ("so \\boxed{016}", "016", "16", True), ("\\boxed{1,000}", "1,000", "1000", True), ("\\boxed{18.}", "18.", "18", True),
    ("\\boxed{1} no, \\boxed{2.50}", "2.50", "2.5", True), ("<think>\\boxed{5}</think> \\boxed{6}", "6", "5", False),
    ("<think>\\boxed{5}</think> five", None, "5", False), ("it is 5", None, "5", False), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "0.5", False),
])  # fmt: skip
def test_the_last_box_after_the_thoughts_is_the_answer(reply, answer, gold, expected):
    tried = attempt(Reply(reply, 1, False), gold)
    assert (tried.answer, tried.is_correct) == (answer, expected)


def test_math_verify_compares_by_algebra_where_a_data_set_needs_it(tmp_path, monkeypatch):
    config = config_for(tmp_path, verifier="math-verify")
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install 'math-verify"):
        evaluation.verifier(config)
    monkeypatch.undo()
    pytest.importorskip("math_verify")
    is_right = evaluation.verifier(config)
    assert (
        is_right("\\frac{1}{2}", "0.5")
        and is_right("x+1", "1+x")
        and not is_right("2", "3")
        and is_right("016", "16")
    )


def test_a_verifier_judges_every_arm(tmp_path):
    results, _, _ = run(
        config_for(tmp_path, control=(UNTRAINED, TWO_VOTES)), is_right=lambda answer, gold: answer == "wrong"
    )
    assert all(r.attempt.is_correct == (r.attempt.answer == "wrong") for r in results.values())
    assert {arm for (arm, *_), r in results.items() if r.attempt.is_correct} == {
        STUDENT,
        "sft",
        "grpo",
        UNTRAINED,
        TWO_VOTES,
    }


def test_an_unfinished_run_can_be_shown(tmp_path):
    """Arms are scored on the tasks they have, and compared on those that both have."""
    results, _, _ = run(config_for(tmp_path))
    part = [
        result
        for result in results.values()
        if result.arm == STUDENT or (result.arm == "sft" and result.id[-1] < "5")
    ]
    report = make_report(part, [STUDENT, "sft", "grpo"], ["sft", "grpo"], samples=1)
    score = next(s for s in report.scores if (s.domain, s.arm) == ("math", "sft"))
    assert score.tasks == score.versus_student.tasks == 15 and not report.differences
    assert "sft (so far 15 tasks)" in tables(report)


def test_aime_answers_are_compared_as_integers_from_the_last_box(tmp_path, monkeypatch):
    """016 is 16; boxes inside the reasoning do not count; no box is no answer."""
    data = tmp_path / "aime25.jsonl"
    lines = [{"problem": f"Question aime-{i}?", "answer": gold} for i, gold in enumerate([16, 16, 16, 70])]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replies = ["<think>\\boxed{99}</think> so \\boxed{1} or \\boxed{016}", "<think>\\boxed{16}</think> \\boxed{17}", "it is 16",
               "<solution>70</solution>"]  # fmt: skip
    config = Config(bench="aime25", data=data, student="http://s", control=("none",), out=tmp_path / "out")
    config.check()
    tasks = evaluation.load_tasks(config)
    assert [p.domain for p in tasks["aime25"]] == ["aime25"] * 4
    results, _, _ = run(
        config,
        tasks=tasks,
        student=Seat(lambda messages, _: Reply(replies[number_of(messages)[1]], 9, False)),
    )
    assert [result.attempt.is_correct for result in results.values()] == [True, False, False, True]
    assert [result.attempt.answer for result in results.values()] == ["016", "17", None, "70"]


def test_nano_asks_the_world_for_held_out_tasks_of_each_domain(monkeypatch):
    monkeypatch.setattr(evaluation.world, "DOMAINS", {"math": None, "crm": None})
    monkeypatch.setattr(evaluation.world, "held_out", lambda *asked: [asked] * 500)
    config = parse(Config, ["--seed", "3"], evaluation.PRESETS, "")
    assert evaluation.load_tasks(config) == {"math": [("math", 500, 3)] * 500, "crm": [("crm", 500, 3)] * 500}
    assert config.arms == [STUDENT, "sft", "grpo", SHUFFLED] and config.temperature == 0
    config = parse(Config, ["--full"], evaluation.PRESETS, "")
    assert config.arms == [STUDENT, "sft", "grpo", SHUFFLED, UNTRAINED, TWO_VOTES, SAME_BUDGET]


@pytest.mark.parametrize("argv, message", [
    (["--bench", "gsm8k"], "needs --data"),
    (["--data", "x.jsonl"], "takes no --data"),
    (["--limit", "none"], "needs a number"),
    (["--samples", "4"], "same answer"),
    (["--control", "none", "shuffled"], "excludes"),
    (["--control", "magic"], "invalid choice"),
    (["--teacher", "--control", "shuffled"], "needs a --teacher"),
    (["--teacher", "a=x", "a=y"], "name of its own"),
    (["--teacher", "student=x"], "name of its own"),
    (["--preset", "own"], "needs --student"),
    (["--tables", "--restart"], "use one"),
    (["--chunk", "0"], "at least 1"),
    (["--student", "nowhere"], "nowhere: there is no checkpoint"),
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


@pytest.mark.parametrize("missing, script", [
    ("teacher-sft", "train_sft"), ("teacher-grpo", "train_grpo")
])  # fmt: skip
def test_a_missing_checkpoint_names_the_command_that_makes_it(missing, script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in {"teacher-sft", "teacher-grpo"} - {missing}:
        Path("runs/nano", name, "model").mkdir(parents=True)
        Path("runs/nano", name, "model/config.json").write_text("{}")
    monkeypatch.setattr(evaluation.world, "held_out", lambda *_: TASKS["math"])
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(UserError, match=f"runs/nano/{missing}/model: .*`python {script}.py`"):
        evaluation.main()


def test_teachers_are_named_by_option_or_path():
    config = Config(teacher=("base=runs/x=1/sft", "runs/y/grpo/", "http://host:8000/v1?a=b"))
    assert config.teachers == {
        "base": "runs/x=1/sft",
        "grpo": "runs/y/grpo/",
        "v1?a=b": "http://host:8000/v1?a=b",
    }


def save_random_checkpoint(path, seed):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        [], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    sizes = {"vocab_size": backend.get_vocab_size(), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 1024}  # fmt: skip
    config = config_from_dict({"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e4, **sizes})
    save_model(path, Transformer(config).initialize(seed), Tokenizer(backend, eos_token="<|im_end|>"))


def test_the_script_from_checkpoints_to_tables(tmp_path, monkeypatch, capsys):
    """GSM8K's layout, real checkpoints with random weights: all files are written, and a second call only prints."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("student", "teacher")):
        save_random_checkpoint(tmp_path / name, seed)
    lines = [{"question": f"What is {i} + {i}?", "answer": f"We add.\n#### {2 * i}"} for i in range(6)]
    Path("test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--bench", "gsm8k", "--data", "test.jsonl", "--limit", "5", "--student", "student", "--teacher", "teacher", "--full",
            "--out", "out", "--chunk", "4", "--probe-tokens", "8", "--teaching-tokens", "8", "--answer-tokens", "8"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
    evaluation.main()
    first = capsys.readouterr().out
    assert "### gsm8k: 5 tasks" in first and first.strip() == Path("out/tables.md").read_text().strip()
    written = json.loads(Path("out/results.json").read_text())
    assert [score["arm"] for score in written["scores"]] == [
        "student",
        "teacher",
        "shuffled",
        "untrained",
        "two-votes",
        "same-budget",
    ]
    assert (
        written["run"]["config"]["limit"] == 5
        and len(Path("out/tasks.jsonl").read_bytes().splitlines()) == 30
    )
    weights = hashlib.sha256(Path("student/model.safetensors").read_bytes()).hexdigest()

    monkeypatch.setattr(Config, "open", lambda *_: pytest.fail("a finished run opened a model"))
    evaluation.main()
    monkeypatch.setattr(sys, "argv", ["eval.py", "--tables", "--full", "--out", "out"])
    evaluation.main()
    assert capsys.readouterr().out == 2 * first
    monkeypatch.setattr(
        sys, "argv", ["eval.py", *(flag for flag in argv if flag != "--full")]
    )  # shows less, and loses nothing
    evaluation.main()
    short = capsys.readouterr().out
    accuracy = [f"{100 * score['accuracy']:.1f}" for score in written["scores"][:3]]
    assert (
        re.search(r"gsm8k \(5\) +\| +" + r" +\| +".join(accuracy) + r" +\|", short)
        and "untrained" not in short
    )
    assert "| control: shuffled teacher | teacher − student alone |" in re.sub(" +", " ", short)
    assert Path("out/tables.md").read_text().strip() == first.strip()
    assert hashlib.sha256(Path("student/model.safetensors").read_bytes()).hexdigest() == weights
