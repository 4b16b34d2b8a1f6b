"""The arms of an evaluation and its log, on students and teachers whose every answer is known beforehand."""

import dataclasses
import random
import re
import shutil
import weakref

import pytest
from test_checkpoint import tiny_model

import eval as evaluation
from eval import Arms, Config
from nano_atlas import functions, protocol
from nano_atlas.benches import arms
from nano_atlas.benches.arms import SAME_BUDGET, SHUFFLED, STUDENT, TWO_VOTES, UNTRAINED, TaskLog
from nano_atlas.checkpoint import save_model
from nano_atlas.data import Problem
from nano_atlas.errors import UserError
from nano_atlas.reward import MALFORMED_PENALTY
from nano_atlas.seats import Reply

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
    """Replies by a rule, and remembers what it was asked. After `stop_after` replies it dies, as a killed process does."""

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
    if protocol.ANSWER_FORMATS["solution"] not in text:
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
    teaching = "confuse" if i % 6 == 0 else f"plan {domain}-{i}." if i % 2 else "think"
    return Reply(f"<teaching>{teaching}</teaching>", 10, False)


TEACHERS = {"sft": weak_teacher, "grpo": good_teacher}


def expected(domain):
    """What each arm gets right, from the rules above, task by task."""
    count = len(TASKS[domain])
    alone = [i % 3 == 0 for i in range(count)]
    good = [alone[i] if i == 4 else i % 5 != 0 for i in range(count)]
    weak = [False if i % 6 == 0 else i % 5 != 0 if i % 2 else alone[i] for i in range(count)]
    return {STUDENT: alone, "sft": weak, "grpo": good, UNTRAINED: alone}


SAMPLED = {"samples": 3, "temperature": 0.8}


def config_for(path, **changes) -> Config:
    options = {"bench": "gsm8k", "student": "http://student", "control": (SHUFFLED, UNTRAINED), "out": path}
    return Config(**options | {"teacher": ("sft=http://sft", "grpo=http://grpo")} | changes)


def fill(config, tasks, log, open_seat):
    """open_seat(name of a seat), as in config_for's URLs"""
    problems = [problem for of_domain in tasks.values() for problem in of_domain]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "open", lambda _, spec: open_seat(spec.rpartition("/")[2]))
        arms.fill(log, config, problems, Arms(config, tasks, log).answer)


def run(config, tasks=TASKS, student=None, teachers=None, chunk=8):
    """The middle of `eval.main`, with seats of our own and a few tasks per chunk: its results, and the seats."""
    seats = {STUDENT: student or Seat(student_rule)}
    seats |= {name: Seat(rule) for name, rule in TEACHERS.items()} if teachers is None else teachers
    tasks_now = {f"tasks {name}": repr(problems) for name, problems in tasks.items()}
    arms.start_or_continue(config, tasks_now)
    with TaskLog(config.out / "tasks.jsonl") as log, pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "CHUNK", chunk * config.samples)
        fill(config, tasks, log, seats.__getitem__)
    return log.results, seats


# ---------------------------------------------------------------------------------------------------------------- the arms


def test_no_prompt_holds_a_gold_answer(tmp_path):
    """Every gold answer is a canary; a teacher that never says it leaves it out of every prompt, of both seats."""
    teachers = {"sft": Seat(weak_teacher), "grpo": Seat(weak_teacher)}
    _, seats = run(config_for(tmp_path), teachers=teachers)
    prompts = [prompt for seat in seats.values() for prompt in seat.asked]
    assert len(prompts) == 42 * (2 + 2 + 2 + 1 + 1)
    assert not [prompt for prompt in prompts if "canary" in prompt]


def test_the_student_alone_is_asked_once_for_all_arms(tmp_path):
    """Without a teaching it is not asked again either: everywhere the untrained one writes none, and grpo on task 4."""
    _, seats = run(config_for(tmp_path))
    asked = seats[STUDENT].asked
    alone = [protocol.baseline_messages(p.question)[0]["content"] for tasks in TASKS.values() for p in tasks]
    assert sum(protocol.PROBE_REQUEST in prompt for prompt in asked) == 42
    assert [asked.count(prompt) for prompt in alone] == [1] * 42
    teaching = [prompt for prompt in asked if "Diagnose" in prompt]
    guided = [prompt for prompt in asked if "Teacher's guidance" in prompt]
    assert len(teaching) == 42 and len(guided) == 42 + 2 * (42 - 2) and len(asked) == 42 * 3 + len(guided)
    assert all(
        prompt.endswith(protocol.ANSWER_FORMATS["solution"]) for prompt in alone + guided
    )  # the same format
    assert not any("<thinking>" in prompt for prompt in guided)  # the teacher's private text


def test_without_a_teaching_the_students_own_answer_of_the_same_sample_stands(tmp_path, monkeypatch):
    """The rule of training and runtime, by the same script and with the same reward."""
    made, teach = [], evaluation.teach

    def spied(*arguments):
        made.extend((episodes := (yield from teach(*arguments))))
        return episodes

    monkeypatch.setattr(evaluation, "teach", spied)
    results, _ = run(config_for(tmp_path, **SAMPLED))
    malformed = [result for result in results.values() if result.teacher_text and result.teaching is None]
    assert {result.arm for result in malformed} == {"grpo", SHUFFLED, UNTRAINED}
    assert all(result.attempt == results[STUDENT, *result.key[1:]].attempt for result in malformed)
    assert {episode.reward for episode in made if episode.teaching is None} == {-MALFORMED_PENALTY}


def test_all_that_can_be_asked_at_once_is_one_call(tmp_path):
    """However many arms: alone and votes; each teacher and its student; three controls together."""
    controls = (SHUFFLED, UNTRAINED, TWO_VOTES, SAME_BUDGET)
    _, seats = run(config_for(tmp_path, control=controls), chunk=1000)
    student, sft, grpo = (seats[name].calls for name in (STUDENT, "sft", "grpo"))
    assert student[0] == 42 * 3 and len(student) == 1 + 2 + 1 and sft == grpo == [42]


def test_shuffled_teachings_go_each_to_one_other_task(tmp_path):
    results, _ = run(config_for(tmp_path))
    for domain, problems in TASKS.items():
        given = {p.id: results[SHUFFLED, domain, p.id, 0].teaching for p in problems}
        own = {p.id: results["grpo", domain, p.id, 0].teaching for p in problems}
        assert sorted(map(str, given.values())) == sorted(map(str, own.values()))
        assert all(given[name] != own[name] for name in own)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_derangement_leaves_nothing_in_place(count):
    problems = [Problem(str(i), "?", "1") for i in range(count)]
    donors = arms.derange(problems, seed=5)
    assert sorted(p.id for p in donors.values()) == sorted(donors)
    assert all(name != p.id for name, p in donors.items())
    assert arms.derange(problems, seed=5) == donors and (
        count < 50 or arms.derange(problems, seed=6) != donors
    )


def test_one_task_cannot_be_shuffled(tmp_path):
    with pytest.raises(UserError, match="at least 2 tasks"):
        run(config_for(tmp_path), tasks={"math": TASKS["math"][:1]})


def test_votes_are_fresh_answers(tmp_path):
    """The student of these rules is right by a coin toss alone; the pair's tokens (20 + 7 + 40) buy four answers of 20."""
    config = config_for(
        tmp_path, control=(TWO_VOTES, SAME_BUDGET), teacher=("grpo=http://grpo",), temperature=0.8
    )
    results, seats = run(config, teachers={"grpo": Seat(good_teacher)})
    questions = [protocol.baseline_messages(problem.question)[0]["content"] for problem in TASKS["math"]]
    assert [seats[STUDENT].asked.count(question) for question in questions] == [1 + 2 + 4] * 30
    for arm, votes in ((TWO_VOTES, 2), (SAME_BUDGET, 4)):
        of_arm = [result for result in results.values() if result.arm == arm]
        assert {(result.attempt.tokens, result.all_tokens) for result in of_arm} == {(20 * votes, 20 * votes)}
        assert 0.1 < sum(result.attempt.is_correct for result in of_arm) / 42 < 0.9


def test_a_verifier_judges_every_arm(tmp_path, monkeypatch):
    controls, given = (UNTRAINED, TWO_VOTES), {problem.question: problem.answer for problem in TASKS["math"]}

    def by_the_user(question, answer, text, gold):
        assert given.get(question, gold) == gold and answer in text
        return answer == "wrong"

    monkeypatch.setattr(functions, "load_object", {"mine:verify": by_the_user}.__getitem__)
    results, _ = run(config_for(tmp_path, control=controls, verifier="mine:verify"))
    assert all(r.attempt.is_correct == (r.attempt.answer == "wrong") for r in results.values())
    found = {result.arm for result in results.values() if result.attempt.is_correct}
    assert found == {STUDENT, "sft", "grpo", *controls}


def test_a_teacher_is_let_go_before_the_next_is_opened(tmp_path):
    opened = []

    def open_seat(name):
        assert not any(teacher() for teacher in opened)
        seat = Seat({STUDENT: student_rule, **TEACHERS}[name])
        if name != STUDENT:
            opened.append(weakref.ref(seat))
        return seat

    with TaskLog(tmp_path / "tasks.jsonl") as log:
        fill(config_for(tmp_path), TASKS, log, open_seat)
    assert len(opened) == 2


# ----------------------------------------------------------------------------------------------------------------- the log


@pytest.fixture(scope="module", params=[{}, SAMPLED], ids=["greedy", "sampled"])
def unbroken(request, tmp_path_factory):
    """Options, directory and results of a run that nobody killed."""
    path = tmp_path_factory.mktemp("unbroken")
    results, _ = run(config_for(path, **request.param))
    return request.param, path, results


@pytest.mark.parametrize("cut", [0, 1, 1500, 9_000, 40_000, -1])
def test_a_killed_run_continues_to_the_same_results(tmp_path, unbroken, cut):
    """Whatever byte the file ends at, the finished run holds each result once, and each is that of an unbroken run."""
    options, whole, results = unbroken
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tasks.jsonl"
    content = file.read_bytes()[:cut]
    file.write_bytes(content)
    resumed, seats = run(config_for(tmp_path, **options))
    assert resumed == results
    assert file.read_bytes().startswith(content[: content.rfind(b"\n") + 1])  # what was whole is kept
    lines = (whole / "tasks.jsonl").read_bytes().splitlines()
    assert sorted(file.read_bytes().splitlines()) == sorted(lines)
    samples, kept = options.get("samples", 1), content.count(b"\n")
    asked = sum(len(seat.asked) for seat in seats.values())
    assert asked <= (2 * samples + 2) * (5 * 42 - kept // samples + 8)  # and one chunk at most once more


@pytest.mark.parametrize("deaths", [[5], [40, 60, 31, 20], [1] * 5])
def test_a_run_that_dies_while_asking_loses_one_chunk(tmp_path, deaths):
    for stop_after in deaths:
        before = len(arms.read_results(tmp_path / "tasks.jsonl"))
        with pytest.raises(KeyboardInterrupt):
            run(config_for(tmp_path), student=Seat(student_rule, stop_after))
        after = len(arms.read_results(tmp_path / "tasks.jsonl"))
        assert after >= before + (stop_after - 16) // 3
    results, _ = run(config_for(tmp_path))
    assert results == run(config_for(tmp_path / "whole"))[0]


def test_results_of_another_version_are_named_instead_of_read_wrongly(tmp_path, unbroken):
    text = (unbroken[1] / "tasks.jsonl").read_text().replace('"score":', '"is_correct":')
    (tmp_path / "tasks.jsonl").write_text(text)
    with pytest.raises(
        UserError, match="tasks.jsonl: not of this version .*; use --restart, or another --out"
    ):
        arms.read_results(tmp_path / "tasks.jsonl")


def test_a_finished_run_asks_nobody(tmp_path):
    first, _ = run(config_for(tmp_path))
    again, seats = run(config_for(tmp_path), teachers={})
    assert again == first and not seats[STUDENT].asked


@pytest.mark.parametrize("changes, named", [
    ({"seed": 1}, "--seed 0 -> 1"), ({"temperature": 0.5}, "--temperature"), ({"answer_tokens": 9}, "--answer-tokens"),
    ({"teacher": ("sft=http://sft",)}, "--teacher"), ({"control": ("none",)}, "--control"),
    ({"student": "http://other"}, "--student"),
])  # fmt: skip
def test_a_changed_option_is_refused_by_name(tmp_path, changes, named):
    arms.start_or_continue(config_for(tmp_path), {})
    with pytest.raises(UserError, match=named):
        arms.start_or_continue(config_for(tmp_path, **changes), {})
    (tmp_path / "tasks.jsonl").write_text("{}\n")
    arms.start_or_continue(config_for(tmp_path, restart=True, **changes), {})
    assert not (tmp_path / "tasks.jsonl").exists()


def test_changed_tasks_and_weights_are_refused_under_unchanged_paths(tmp_path):
    """Training again into the same directory must not bring up the old teacher's results as the new one's."""
    teacher = tmp_path / "grpo"
    save_model(teacher, tiny_model(), None, has_digests=False)
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
    file.write_bytes(b"".join(lines[:5] + [b"\0\0\0\n"] + lines[6:]))
    with pytest.raises(UserError, match=":6: not JSON"):
        run(config)


def test_two_writers_exclude_each_other(tmp_path):
    with TaskLog(tmp_path / "tasks.jsonl"), pytest.raises(UserError, match="another process"):
        TaskLog(tmp_path / "tasks.jsonl")
    with TaskLog(tmp_path / "tasks.jsonl"):
        pass
