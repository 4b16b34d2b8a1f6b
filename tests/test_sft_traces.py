"""Session traces as demonstrations: what is learned is what the teacher sampled, and what is left out is counted."""

import json
from dataclasses import replace

import pytest
from conftest import TEACHER_WORDS, byte_tokenizer
from runtime_fakes import TASKS, Student, Teacher, run, traces_at
from scripted import run as run_session
from scripted import student, teacher

import train_sft
from nano_atlas import protocol
from nano_atlas.data import load_examples, load_problems
from nano_atlas.errors import UserError
from nano_atlas.runtime.options import Config
from nano_atlas.runtime.traces import record_reviews, session_record, teachings
from nano_atlas.seats import open_seat

ANY = Config(min_reward=None)
HELP = "<thinking>private</thinking><teaching>HELP yourself</teaching>"


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chats(path, config=ANY) -> list[tuple[str, str]]:
    """(prompt, completion) of each teaching."""
    found = [chat["messages"] for _, chat in teachings(path, config)]
    assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in found)
    return [(asked["content"], told["content"]) for asked, told in found]


def sessions(out, tasks=TASKS[:6], taught=HELP, **options) -> list[dict]:
    """Traces of fake sessions: the tasks 0 and 3 are right alone, and HELP makes the others right."""
    run(
        Config(out=out, student="s", teacher="t", lane="paired", **options), tasks, Student(), Teacher(taught)
    )
    return traces_at(out / "traces.jsonl")


def train(place, data, out, *more):
    argv = (
        f"--preset own --model {place / 'teacher'} --data {data} --out {out} --device cpu --steps 2".split()
    )
    train_sft.main([*argv, "--held-out", "0", *more])


class Spy:
    """A seat that keeps its rollouts."""

    def __init__(self, path):
        self.seat, self.rollouts, self.is_batched = open_seat(str(path)), [], True
        self.count_tokens = self.seat.count_tokens

    def ask(self, questions, progress=None):
        answers = self.seat.ask(questions)
        self.rollouts += [reply.rollout for (reply,) in answers]
        return answers


# ------------------------------------------------------------------------------------------------------------- what is learned


def test_the_learned_ids_are_those_that_the_teacher_sampled(place, tmp_path):
    """Oracle: the sampler's own rollouts, whose first teaching is "Go.", which does not leak the answer 1."""
    guide, tasks = Spy(place / "teacher"), load_problems(place / "problems.jsonl")
    lengths = {"probe_tokens": 4, "teaching_tokens": 6, "answer_tokens": 6}
    config = Config(out=tmp_path, student=str(place / "student"), teacher="t", **lengths)
    run(config, tasks, Spy(place / "student"), guide)
    tokenizer, expected = byte_tokenizer(), []
    for rollout in guide.rollouts:
        text = tokenizer.decode(rollout.completion_ids)
        first = min((text.find(word) % 10_000, word) for word in TEACHER_WORDS[:2])
        if first[0] < 9_999 and "Go." in first[1] and rollout.finish_reason == "stop":
            expected.append((list(rollout.prompt_ids), list(rollout.completion_ids)))
    assert 3 < len(expected) < len(guide.rollouts) - 3
    learned = []
    for example in load_examples([tmp_path / "traces.jsonl"], tokenizer, 10_000, selection=ANY):
        start = example.is_target.index(True)
        assert all(example.is_target[start:])
        learned.append((example.input_ids[:start], example.input_ids[start:]))
    assert sorted(learned) == sorted(expected)


@pytest.mark.parametrize(
    ("scores", "best"), [((0.1, 0.6, 0.3), "b"), ((0.6, 0.6, 0.0), "a"), ((0, 0.1, 0.2), "c")]
)
def test_of_several_attempts_the_reply_before_the_best_one_is_learned(tmp_path, scores, best):
    texts = [f"<thinking>{name}!</thinking><teaching>{name}</teaching>" for name in "abc"]
    guide = teacher(texts[0], "no tag", *texts[1:])
    session = run_session("paired", config=Config(retries=3), student=student(), teacher=guide)
    for trial, score in zip(session.trials[1:], scores, strict=True):
        trial.verdict.score = score
    path = write(tmp_path / "traces.jsonl", session_record(session)[1])
    asked = dict(zip("abc", (guide.prompts[0], *guide.prompts[2:])))
    assert chats(path) == [(asked[best], texts["abc".index(best)])]


@pytest.mark.parametrize("lane", ["paired", "coach"])
def test_without_a_stored_prompt_it_is_made_again_from_the_plan(tmp_path, lane):
    """Oracle: the prompt that the teacher was shown."""
    guide = teacher(HELP)
    session = run_session(lane, student=student(["HELP"]), teacher=guide)
    record = session_record(session)[1]
    for event in record["trajectory_events"]:
        event.pop("messages", None)
    path = write(tmp_path / "traces.jsonl", record)
    assert chats(path) == [(guide.prompts[0], "<teaching>HELP yourself</teaching>")]


def sdk(guidance, name="7", steps=("Add.",), **more) -> dict:
    """A session of atlas-sdk's exporter: no outcome, no ground truth, no prompt of the teacher."""
    described = [
        {"id": n, "description": text, "tool": None, "depends_on": []} for n, text in enumerate(steps)
    ]
    traced = [
        {"step_id": n, "description": text, "output": "", "attempts": 2} for n, text in enumerate(steps)
    ]
    for step, given in zip(traced, guidance):
        step |= {"guidance": given, "validation": {"valid": True}, "metadata": {"attempt_history": []}}
    record = {"task": "6 times 7?", "final_answer": "42", "steps": traced, "session_reward": {"score": 0.9}}
    record |= {
        "plan": {"steps": described, "execution_mode": "stepwise"},
        "trajectory_events": [{"event": {}}],
    }
    metadata = {"session_id": name, "status": "succeeded", "created_at": "2026-01-02T00:00:00Z"}
    return record | {"session_metadata": metadata, "review_status": "approved"} | more


def as_text(record: dict) -> dict:
    """As a database exports it: objects and lists are JSON in a text."""
    record = record | {"steps": [{k: in_text(v) for k, v in step.items()} for step in record["steps"]]}
    return {name: in_text(value) for name, value in record.items()}


def in_text(value):
    return json.dumps(value) if isinstance(value, dict | list) else value


@pytest.mark.parametrize("form", [dict, as_text])
def test_sessions_of_atlas_sdk_teach_their_last_guidance(tmp_path, form):
    one, two = sdk([["No.", "Multiply."]]), sdk([["a", "b"], ["c"]], "8", ("Add.", "Check."))
    empty, bare = sdk([[]], "9"), sdk([], "10", steps=(), plan=None)
    path = write(tmp_path / "traces.jsonl", *map(form, (one, two, empty, bare)))
    asked = [protocol.teacher_messages("6 times 7?", shown) for shown in ("Add.", "1. Add.\n2. Check.")]
    told = ["<teaching>Multiply.</teaching>", "<teaching>b\nc</teaching>"]
    assert chats(path) == [(prompt["content"], text) for (prompt,), text in zip(asked, told)]


# ------------------------------------------------------------------------------------------------------------- what is left out


def test_what_is_left_out_is_counted_by_its_reason(tmp_path, capsys):
    records = sessions(tmp_path / "out")
    good, right_alone = records[1], records[0]

    def changed(name, **outcome):
        return good | {"outcome": good["outcome"] | {"session_id": name} | outcome}

    cut = changed("cut")
    cut["trajectory_events"] = [event | {"is_truncated": True} for event in good["trajectory_events"]]
    odd = [
        changed("f", status="failed"), changed("q", review="quarantined"), changed("p", review="pending"),
        changed("n", reward=None), changed("l", is_leak=True), changed("g", guided=0.5), right_alone, cut,
    ]  # fmt: skip
    path = write(tmp_path / "traces.jsonl", good, *odd)
    assert len(chats(path, Config(min_reward=0.1, min_gain=1))) == 1
    said = capsys.readouterr().err
    assert f"{path}: 1 teachings of 9 sessions; left out: 2 gain below 1" in said
    for reason in ("1 session failed", "1 review quarantined", "1 review pending", "1 no reward", "1 leak",
                   "1 no complete teaching"):  # fmt: skip
        assert reason in said
    assert len(chats(path, Config(review_status=("pending",)))) == 1
    with pytest.raises(
        UserError, match="0 teachings of 9 sessions; left out: 5 reward below 9, .* --approve"
    ):
        chats(path, Config(min_reward=9.0))


def test_malformed_replies_are_never_learned(tmp_path):
    for name, text in (("none", "HELP"), ("inside", "<thinking><teaching>HELP</teaching></thinking>")):
        sessions(tmp_path / name, taught=text)
        with pytest.raises(UserError, match="left out: 6 no complete teaching"):
            chats(tmp_path / name / "traces.jsonl")


def test_of_a_repeated_session_the_latest_record_counts(tmp_path, capsys):
    good = sessions(tmp_path / "out", TASKS[1:2])[0]
    failed = good | {"outcome": good["outcome"] | {"status": "failed"}}
    assert len(chats(write(tmp_path / "traces.jsonl", failed, good))) == 1
    assert "1 teachings of 1 sessions; left out: none" in capsys.readouterr().err
    with pytest.raises(UserError, match="0 teachings of 1 sessions; left out: 1 session failed"):
        chats(write(tmp_path / "traces.jsonl", good, failed))


def test_the_latest_review_decides(tmp_path):
    out = tmp_path / "out"
    names = [record["outcome"]["session_id"] for record in sessions(out, require_approval=True)]
    with pytest.raises(UserError, match="left out: 6 review pending"):
        chats(out / "traces.jsonl")
    record_reviews(out, tuple(names[:3]), "approved", "")
    record_reviews(out, (names[0],), "quarantined", "")
    assert len(chats(out / "traces.jsonl")) == 2


# ------------------------------------------------------------------------------------------------------------- train_sft.py


def test_a_teacher_is_trained_on_traces_and_resumes_only_with_the_same_reviews(place, tmp_path, capsys):
    out, names = tmp_path / "out", []
    names = [record["outcome"]["session_id"] for record in sessions(out, require_approval=True)]
    record_reviews(out, tuple(names[:4]), "approved", "")
    data, model = out / "traces.jsonl", tmp_path / "sft"
    train(place, data, model, "--eval-data", str(data))
    said = capsys.readouterr().err
    assert said.count("4 teachings of 6 sessions; left out: 2 review pending") == 2
    assert "4 examples" in said and "4 held out" in said
    metrics = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and "eval_loss" in metrics[-1] and (model / "model").exists()
    train(place, data, model, "--eval-data", str(data))
    assert "already trained" in capsys.readouterr().out

    record_reviews(out, (names[0],), "quarantined", "on second thoughts")
    with pytest.raises(UserError, match="was trained on other data"):
        train(place, data, model, "--eval-data", str(data), "--steps", "3")
    with pytest.raises(UserError, match="was started with other options: --min-reward 0.1 -> 0.5"):
        train(place, data, model, "--eval-data", str(data), "--min-reward", "0.5")
    record_reviews(out, (names[0],), "approved", "after all")
    train(place, data, model, "--eval-data", str(data), "--steps", "3")


def test_traces_may_stand_beside_demonstrations_in_a_file_of_their_own(place, tmp_path, capsys):
    sessions(tmp_path / "out", [replace(task, answer=None) for task in TASKS[:2]] + TASKS[2:4])
    traced = tmp_path / "out/traces.jsonl"
    plain = write(tmp_path / "plain.jsonl", {"prompt": "a", "completion": "b"})
    train(place, f"{plain} {traced}", tmp_path / "sft")
    said = capsys.readouterr().err
    assert "2 teachings of 4 sessions; left out: 2 no reward" in said and "3 examples" in said
    mixed = write(tmp_path / "mixed.jsonl", {"prompt": "a", "completion": "b"}, traces_at(traced)[0])
    with pytest.raises(UserError, match="mixed.jsonl:2: .*make no training example"):
        train(place, mixed, tmp_path / "none")


def test_a_null_question_does_not_hide_a_trace(tmp_path):
    """`load_problems` and `load_examples` agree on what a session trace is."""
    path = tmp_path / "traces.jsonl"
    path.write_text(json.dumps({"question": None, "task": "6 times 7?", "status": "failed"}) + "\n")
    with pytest.raises(UserError, match="0 teachings of 1 sessions"):
        load_examples([path], byte_tokenizer(), 1000, selection=ANY)
    with pytest.raises(UserError, match="traces left out: 1 session failed"):
        load_problems(path)
