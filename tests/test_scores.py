"""The report of an evaluation: every number follows from answers that are known beforehand."""

import dataclasses
import math

import pytest
from test_eval import SAMPLED, TASKS, config_for, expected, run

from nano_atlas.benches import arms
from nano_atlas.benches.arms import SAME_BUDGET, SHUFFLED, STUDENT, TWO_VOTES, UNTRAINED
from nano_atlas.benches.scores import make_report, summary, tables
from nano_atlas.episode import Attempt


def report_of(config):
    """The scores by domain and arm, and the whole report."""
    report = make_report(arms.read_results(config.out / "tasks.jsonl").values(), config)
    return {(score["domain"], score["arm"]): score for score in report["scores"]}, report


def cells_of(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]


def test_every_number_of_the_tables_follows_from_the_rules(tmp_path):
    config = config_for(tmp_path)
    results, _ = run(config)
    assert len(results) == 5 * 42
    rows, report = report_of(config)
    arms = [STUDENT, "sft", "grpo", SHUFFLED, UNTRAINED]
    assert list(rows) == [(domain, arm) for domain in TASKS for arm in arms]
    for domain in TASKS:
        right, count = expected(domain), len(TASKS[domain])
        for arm, is_right in right.items():
            score = rows[domain, arm]
            assert (score["tasks"], score["accuracy"]) == (count, pytest.approx(sum(is_right) / count))
            assert (
                score["interval"][0] < score["accuracy"] < score["interval"][1]
                and score["student_tokens"] == 20
            )
            if arm == STUDENT:
                assert score["versus_student"] is score["leak"] is score["malformed"] is None
                assert score["all_tokens"] == 20
                assert score["completion"] == pytest.approx(1 - 1 / count)  # task 1 gives up
                continue
            versus, pairs = score["versus_student"], list(zip(is_right, right[STUDENT]))
            improved, degraded = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
            assert (versus["improved"], versus["degraded"]) == (improved, degraded)
            assert versus["delta"] == pytest.approx((improved - degraded) / count)
            assert versus["interval"][0] <= versus["delta"] <= versus["interval"][1]
            assert versus["non_degradation"] == pytest.approx(1 - degraded / count)
            assert versus["non_degradation_correct"] == pytest.approx(1 - degraded / sum(right[STUDENT]))
        grpo, difference = (
            rows[domain, "grpo"],
            next(d for d in report["differences"] if d["domain"] == domain),
        )
        assert grpo["leak"] == grpo["malformed"] == pytest.approx(1 / count)  # tasks 6 and 4
        assert grpo["all_tokens"] == pytest.approx(
            20 + 7 + (40 * (count - 1) + 30) / count
        )  # answer, probe, teacher
        thousands = (40 * (count - 1) + 30) / count / 1000  # TES = gain * completion / thousands of tokens
        efficiency = grpo["versus_student"]["delta"] * grpo["completion"] / thousands
        assert grpo["versus_student"]["teaching_efficiency"] == pytest.approx(efficiency)
        without_leak = (sum(right["grpo"]) - right["grpo"][6]) / (count - 1)
        assert grpo["leak_free_accuracy"] == pytest.approx(without_leak)
        assert (difference["arm"], difference["other"]) == ("grpo", "sft")
        assert difference["delta"] == pytest.approx((sum(right["grpo"]) - sum(right["sft"])) / count)
        assert (
            rows[domain, UNTRAINED]["malformed"] == 1
            and rows[domain, UNTRAINED]["versus_student"]["delta"] == 0
        )
        assert (
            abs(rows[domain, SHUFFLED]["versus_student"]["delta"]) < 1e-9
        )  # a plan for another task does nothing
    versus = rows["math", "grpo"]["versus_student"]
    n, k = versus["improved"] + versus["degraded"], versus["improved"]
    extreme = [i for i in range(n + 1) if abs(2 * i - n) >= abs(2 * k - n)]
    assert versus["p_value"] == pytest.approx(sum(math.comb(n, i) for i in extreme) / 2**n)

    text = tables(report)
    table = cells_of(text)
    assert {len(row) for row in table} == {16} and len(table) == 2 * (2 + 5)
    controls = ["shuffled", "untrained"]
    assert [row[0] for row in table[2:7]] == ["student", "sft", "grpo", *controls]
    grpo = dict(zip(table[0], table[4]))
    assert grpo["accuracy"] == f"{100 * rows['math', 'grpo']['accuracy']:.1f}"
    assert grpo["without"] == f"{100 * rows['math', 'grpo']['leak_free_accuracy']:.1f}"
    assert grpo["Δ to alone"].startswith(f"{100 * versus['delta']:+.1f} [")
    assert text.count("grpo − sft: **") == 2
    accuracy, _, unread, _ = summary(report, config).split("\n\n")
    short = cells_of(accuracy)
    assert short[0] == ["tasks", "student", "sft", "grpo", "shuffled", "grpo − sft"]
    assert [row[0] for row in short[2:]] == [f"{domain} ({len(tasks)})" for domain, tasks in TASKS.items()]
    assert short[2][1:4] == [f"{100 * rows['math', arm]['accuracy']:.1f}" for arm in (STUDENT, "sft", "grpo")]
    given_up = f"{100 / len(TASKS['math']):.1f}"  # by the student alone: task 1
    assert cells_of(unread)[0] == ["unread", "student", "sft", "grpo", "shuffled"]
    assert cells_of(unread)[2][:2] == ["math", given_up]
    difference = next(d for d in report["differences"] if d["domain"] == "math")
    assert short[2][5].startswith(f"**{100 * difference['delta']:+.1f} [")


def test_answers_that_cannot_be_read_stand_beside_accuracy(tmp_path):
    config = config_for(tmp_path, teacher=(), control=("none",))
    results, _ = run(config)
    blank = Attempt("It is 7.", None, False, 5, False)

    def shown(unread):
        tasks = [dataclasses.replace(r, attempt=blank) if i < unread else r for i, r in enumerate(readable)]
        return summary(make_report(tasks, config), config)

    readable = [r for r in results.values() if r.domain == "math" and r.attempt.answer is not None][:25]
    assert "unread" not in shown(0)
    assert "| unread | student |\n" in shown(5) and "| math   |    20.0 |\n" in shown(5)
    assert "which count as wrong.\nAnother --answer-format" in shown(5)


def test_a_summary_is_as_narrow_as_a_terminal(tmp_path):
    """With all that it shows by default, rates of 100 %; long names of teachers turn it on its side."""
    short, long = ("sft", "grpo"), ("teacher-sft-epoch-3", "teacher-grpo-step-250", "teacher-grpo-2-step-250")
    three, middle = ("math", "telecom", "crm"), ("grpo-1-step-250", "grpo-2-step-250")
    for names, domains in ((short, three), (middle, three), (long, ("gsm8k",))):
        config = config_for(tmp_path, teacher=tuple(f"{name}=x" for name in names))
        report = {"scores": [], "differences": []}
        for domain in domains:
            for arm in (STUDENT, *names, SHUFFLED):
                row = {"domain": domain, "arm": arm, "tasks": 1319, "accuracy": 1.0, "completion": 0.0}
                report["scores"].append(row | {"versus_student": None})
            gain = {"domain": domain, "arm": names[-1], "other": names[-2], "delta": -0.354}
            report["differences"].append(gain | {"interval": (-0.396, -0.312)})
        lines = summary(report, config).splitlines()
        assert max(map(len, lines)) <= 100
        assert all(any(name in line for line in lines) for name in names)
        assert sum("100.0" in line for line in lines) >= 2 and "**-35.4 [-39.6, -31.2]**" in "".join(lines)


def test_several_samples_give_averages_with_errors_and_pass_at_k(tmp_path):
    config = config_for(tmp_path, **SAMPLED)
    results, _ = run(config)
    rows, report = report_of(config)
    right, alone = (
        [[results[arm, "math", p.id, s].attempt.is_correct for s in range(3)] for p in TASKS["math"]]
        for arm in ("grpo", STUDENT)
    )
    means, before = ([sum(task) / 3 for task in tasks] for tasks in (right, alone))
    score, average = rows["math", "grpo"], sum(means) / 30
    assert score["accuracy"] == pytest.approx(average) and score["interval"] is None
    assert score["error"] == pytest.approx((sum((m - average) ** 2 for m in means) / 29 / 30) ** 0.5)
    assert list(score["pass_at_k"]) == list(score["pass_hat_k"]) == [1, 2, 3]
    assert score["pass_at_k"][1] == pytest.approx(average)
    assert score["pass_at_k"][3] == pytest.approx(sum(map(any, right)) / 30)
    assert score["pass_hat_k"][3] == pytest.approx(sum(map(all, right)) / 30)
    assert score["majority"] == pytest.approx(
        sum(sum(task) >= 2 for task in right) / 30
    )  # wrong: always "wrong"
    versus = score["versus_student"]
    assert versus["delta"] == pytest.approx(average - sum(before) / 30) and versus["p_value"] is None
    assert versus["degraded"] == sum(a < b for a, b in zip(means, before))
    assert versus["non_degradation_correct"] == pytest.approx(
        1 - versus["degraded"] / sum(b > 0 for b in before)
    )
    head, _, _, _, grpo, *_ = cells_of(tables(report))
    assert head[1:5] == ["avg@3", "pass@3", "pass^3", "maj@3"]
    rates = [score["accuracy"], score["pass_at_k"][3], score["pass_hat_k"][3], score["majority"]]
    shown = [f"{100 * rate:.1f}" for rate in rates]
    assert grpo[1:5] == [f"{shown[0]} ± {100 * score['error']:.1f}", *shown[1:]]


def test_votes_have_no_teacher_and_their_own_names(tmp_path):
    config = config_for(tmp_path, control=(TWO_VOTES, SAME_BUDGET), temperature=0.8)
    run(config)
    rows, report = report_of(config)
    assert rows["math", TWO_VOTES]["all_tokens"] == 40 and rows["math", SAME_BUDGET]["all_tokens"] == 80
    assert rows["math", SAME_BUDGET]["leak"] is rows["math", SAME_BUDGET]["malformed"] is None
    assert rows["math", TWO_VOTES]["versus_student"]["improved"] > 0
    assert {TWO_VOTES, SAME_BUDGET} <= {row[0] for row in cells_of(tables(report))}


def test_one_teacher_is_compared_with_the_student_alone(tmp_path):
    config = config_for(tmp_path, teacher=("sft=http://sft",))
    run(config)
    rows, report = report_of(config)
    head, _, math_row, *_ = cells_of(summary(report, config))
    assert head[-1] == "sft − student"
    assert math_row[-1].startswith(f"**{100 * rows['math', 'sft']['versus_student']['delta']:+.1f} [")
    head, *_ = cells_of(summary(report, dataclasses.replace(config, teacher=())))
    assert head == ["tasks", "student", "shuffled"]


def test_an_unfinished_run_can_be_shown(tmp_path):
    """Arms are scored on the tasks they have, and compared on those that both have."""
    config = config_for(tmp_path)
    results, _ = run(config)
    part = [r for r in results.values() if r.arm == STUDENT or (r.arm == "sft" and r.id[-1] < "5")]
    report = make_report(part, config)
    score = next(s for s in report["scores"] if (s["domain"], s["arm"]) == ("math", "sft"))
    assert score["tasks"] == score["versus_student"]["tasks"] == 15 and not report["differences"]
    assert "sft (so far 15 tasks)" in tables(report)


def vote(*answers) -> Attempt:
    return arms.majority(
        [Attempt(f"text {i}", text, text == "7", 10, i == 2) for i, text in enumerate(answers)]
    )


def test_a_majority_counts_equal_answers_and_the_first_wins_a_tie():
    assert vote("3", "7", "07").text == "text 1" and vote("3", "7", "007.").is_truncated
    assert vote("3", "7").answer == "3" and vote("3", "7").tokens == 20
    assert vote(None, "7", None).answer == "7" and vote(None, None).answer is None
    assert vote("A b", "7", "a B.", "7", "x", "a  b").answer == "A b"
