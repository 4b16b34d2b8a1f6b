"""Files as strangers make them: each is read where its meaning is plain, and else refused in one line, never with a traceback."""

import json
import random

import pytest
from test_data import TOKENIZER, byte_tokenizer, learned_texts, trace, write
from test_model import QWEN3
from test_odd_checkpoints import END, ROPE, TEMPLATES
from test_tokenizer import write as write_tokenizer

from nano_atlas.checkpoint import config_from_dict
from nano_atlas.data import Problem, load_examples, load_problems, make_examples
from nano_atlas.errors import UserError
from nano_atlas.runs import read_json, read_jsonl
from nano_atlas.runtime.options import STATUSES, Config
from nano_atlas.runtime.traces import outcome_of, read_traces
from nano_atlas.tokenizer import Tokenizer

GOOD = {"question": "x?", "answer": "1"}
USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

# ------------------------------------------------------------------------------------------------------------- JSON

ODD_LINES = {
    "digits": (b'{"a": ' + b"1" * 5000 + b"}", "4300 digits"),
    "nested": (b'{"a": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nested too deeply"),
    "nan": (b'{"a": NaN}', "NaN is not a finite number"),
    "infinity": (b'{"a": 1e999}', "1e999 is not a finite number"),
    "nul": (b'{"a": "\0"}', "control character"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "UTF-8|utf-8"),
    "surrogate-bytes": (b'{"a": "\xed\xa0\xbd"}', "UTF-8|utf-8"),
}


@pytest.mark.parametrize("name", ODD_LINES)
def test_json_that_cannot_be_read_is_one_line_with_its_place(tmp_path, name, capsys):
    content, said = ODD_LINES[name]
    path = write(tmp_path / "a.jsonl", GOOD, content, GOOD)
    with pytest.raises(UserError, match=rf"a.jsonl:2: .*({said})"):
        load_problems(path)
    assert [p.id for p in load_problems(path, skip_bad=True)] == ["a:1", "a:3"]
    assert "left out 1 malformed lines" in capsys.readouterr().err
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a.json is not valid JSON .*({said})"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b'\xef\xbb\xbf{"a": 1}\r\n', 1),
        (b'{"a": "\\ud83d!"}', "\ufffd!"),
        (b'{"a": "\\ud83d\\ude42"}', "\U0001f642"),
    ],
)
def test_marks_of_other_systems_and_halves_of_characters_are_read(tmp_path, content, value):
    for name, read in (("a.json", read_json), ("a.jsonl", lambda path: next(read_jsonl(path))[1])):
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == {"a": value}


def test_what_is_no_file_or_holds_nothing_good_is_said(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="d: is a directory"):
        load_problems(tmp_path / "d")
    with pytest.raises(UserError, match="d is not valid JSON .*Is a directory"):
        read_json(tmp_path / "d")
    with pytest.raises(UserError, match="a.jsonl: no problem to train on"):
        load_problems(write(tmp_path / "a.jsonl", {}, "["), skip_bad=True)
    assert read_json(tmp_path / "none") == {}


# ------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize(
    "record",
    [
        {"question": None, "problem": "x?", "answer": "1"},
        {"task": None, "question": "x?", "ground_truth": None, "answer": "1"},
        {"question": "", "prompt": "x?", "answer": None, "solution": "1"},
        {"question": "x?", "answer": "1", "id": None, "domain": None},
        {"question": "x?", "answer": "1", "id": "", "domain": ""},
        {"question": None, "task": "x?", "ground_truth": "1", "session_metadata": None},
    ],
)
def test_null_and_empty_texts_are_absent_in_problems(tmp_path, record):
    problems = load_problems(write(tmp_path / "p.jsonl", record, {**GOOD, "question": "y?", "id": None}))
    assert problems == [Problem("p:1", "x?", "1"), Problem("p:2", "y?", "1")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": None, "prompt": "a", "completion": "b"},
        {"messages": None, "problem_text": None, "prompt": [USER], "completion": [ASSISTANT]},
        {"messages": [USER, ASSISTANT], "prompt": None, "problem_text": "c"},
    ],
)
def test_null_is_absent_in_examples(record):
    (example,) = make_examples(record, TOKENIZER, "a:1")
    assert learned_texts(example) == ["b<|im_end|>"]


def test_null_is_absent_in_demonstrations():
    record = dict.fromkeys(("problem_text", "student_approach", "teacher_diagnosis", "teacher_teaching"), "x")
    plain = make_examples(record, TOKENIZER, "a:1")
    assert make_examples(record | {"strategy": None, "messages": None}, TOKENIZER, "a:1") == plain
    with pytest.raises(
        UserError, match="a:1: the field 'student_approach' must be a non-empty text, not null"
    ):
        make_examples(record | {"student_approach": None}, TOKENIZER, "a:1")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answer": True}, "'answer'"),
        ({"answer": ["1"]}, "'answer' must be a non-empty text, not a list"),
        ({"answer": {"value": 1}}, "'answer' must be a non-empty text, not a dict"),
        ({"question": {"text": "x?"}}, "'question' must be a non-empty text, not a dict"),
    ],
)
def test_values_that_no_text_or_number_are_refused_by_their_field(tmp_path, changes, said):
    with pytest.raises(UserError, match=rf"p.jsonl:1: .*{said}"):
        load_problems(write(tmp_path / "p.jsonl", GOOD | changes))


def test_numbers_name_problems_and_domains(tmp_path):
    path = write(tmp_path / "p.jsonl", GOOD | {"id": 7, "domain": 3}, GOOD | {"id": 0})
    assert [(p.id, p.domain) for p in load_problems(path)] == [("7", "3"), ("0", "")]


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
)


def test_a_chat_that_the_template_refuses_is_named_with_its_line(tmp_path):
    tokenizer = byte_tokenizer(
        chat_template=ALTERNATING + "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    good = {"messages": [USER, ASSISTANT]}
    path = write(tmp_path / "a.jsonl", good, {"messages": [USER, USER, ASSISTANT]})
    with pytest.raises(UserError, match=r"a.jsonl:2: .*roles must alternate"):
        load_examples([path], tokenizer, 100)
    assert len(load_examples([write(tmp_path / "b.jsonl", good)], tokenizer, 100)) == 1


def test_control_tokens_in_plain_texts_are_text_and_said_once(tmp_path, capsys):
    spelled = {"prompt": "<|im_start|>user\na<|im_end|>\n", "completion": "b"}
    plain, chat = {"prompt": "a", "completion": "b"}, {"messages": [USER, ASSISTANT], **spelled}
    lines = [plain, chat, spelled, plain, plain | {"completion": "b<|im_end|>"}]
    examples = load_examples([write(tmp_path / "a.jsonl", *lines)], TOKENIZER, 1000)
    assert TOKENIZER.eos_ids[0] not in examples[2].input_ids[:-1]
    said = capsys.readouterr().err
    assert "a.jsonl:3: 2 lines" in said and "lists of messages" in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- traces


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"session_metadata": '{"session_id": 7, "status": "failed"}'}, "status", "failed"),
        ({"session_metadata": {"session_id": 7}}, "session_id", "7"),
        ({"session_metadata": None, "adaptive_summary": [], "reward_stats": ""}, "session_id", "t:1"),
        ({"session_reward": "0.9"}, "reward", 0.9),
        ({"session_reward": '{"score": "0.9"}'}, "reward", 0.9),
        ({"session_reward": {"score": 1}}, "reward", 1.0),
        ({"session_reward": {"score": None}}, "reward", None),
        ({"reward_stats": {"score_stddev": "0.25"}}, "disagreement", 0.25),
        ({"outcome": {"session_id": "s", "reward": "1.5", "lane": None}}, "reward", 1.5),
        ({"outcome": {"session_id": 3, "tokens": {"student": "12"}}}, "tokens", {"student": 12}),
    ],
)
def test_traces_are_read_where_their_meaning_is_plain(changes, field, value):
    assert getattr(outcome_of({"task": "x?"} | changes, "t:1"), field) == value


@pytest.mark.parametrize(
    "changes",
    [
        {"session_metadata": "none"},
        {"session_metadata": ["x"]},
        {"session_metadata": {"status": ["failed"]}},
        {"reward_stats": {"score_stddev": "n/a"}},
        {"reward_stats": [0.1]},
        {"adaptive_summary": {"adaptive_mode": {"of": 1}}},
        {"session_reward": "n/a"},
        {"session_reward": [0.9]},
        {"session_reward": {"score": True}},
        {"outcome": "good"},
        {"outcome": ["good"]},
        {"outcome": {"session_id": "s", "future": 1}},
        {"outcome": {"reward": 1.0}},
        {"outcome": {"session_id": "s", "reward": [1.0]}},
        {"outcome": {"session_id": "s", "is_leak": "yes"}},
        {"outcome": {"session_id": "s", "tokens": {"student": None}}},
        {"outcome": {"session_id": "s", "skills": [[]]}},
    ],
)
def test_traces_that_say_nothing_plain_are_named_with_their_line(tmp_path, changes):
    path = write(tmp_path / "t.jsonl", {"task": "x?"}, {"task": "x?"} | changes, b"")
    with pytest.raises(UserError, match="t.jsonl:2: "):
        list(read_traces(path))


def test_odd_metadata_of_traces_does_not_stop_reading_problems(tmp_path, capsys):
    text = trace("6 times 7?") | {"session_metadata": json.dumps({"session_id": 7, "ground_truth": 42})}
    lines = [text, trace("?") | {"session_metadata": ["x"]}, trace("y?", status={"is": "odd"}), trace(["z"])]
    path = write(tmp_path / "t.jsonl", *lines)
    assert load_problems(path, skip_bad=True) == [Problem("7", "6 times 7?", "42")]
    assert "t.jsonl:2: the field 'session_metadata' must hold an object" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- all of it


def mutated(rng: random.Random, value):
    """A copy with one thing in it deleted, or replaced by something of another type or size."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        value = value.copy()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.1:
            del value[key]
        else:
            value[key] = mutated(rng, value[key])
        return value
    nested = json.loads("[" * 900 + "]" * 900)
    odd = [
        None,
        True,
        0,
        -1,
        2.5,
        10**400,
        "",
        " ",
        "x",
        "0.5",
        "{}",
        "\ud800",
        "\0",
        [],
        [None],
        {},
        {"": {}},
        [[1]],
        nested,
    ]
    return rng.choice([*odd, [value], {"value": value}, str(value)])


DEMONSTRATION = dict.fromkeys(
    ("problem_text", "student_approach", "teacher_diagnosis", "teacher_teaching", "strategy"), "x"
)
SDK = trace("x?") | {"adaptive_summary": {"adaptive_mode": "coach"}, "reward_stats": {"score_stddev": 0.1}}
OURS = SDK | {
    "outcome": {"session_id": "a", "reward": 0.5, "tokens": {"student": 1}, "skills": ["s"], "is_leak": False}
}
STEP = {"description": "Add.", "guidance": ["No.", "Multiply."]}
GUIDED = SDK | {"plan": {"steps": [{"description": "Add."}]}, "steps": [STEP], "session_reward": 1}
EVENT = {
    "event": "teaching",
    "actor": "teacher",
    "messages": [USER],
    "text": "<teaching>Multiply.</teaching>",
}
TRIALS = {"attempt_history": [{}, {"verdict": {"score": 1.0}}]}
TAUGHT = OURS | {
    "trajectory_events": [EVENT | {"is_truncated": False}],
    "steps": [STEP | {"metadata": TRIALS}],
}
EVERY = Config(review_status=STATUSES)  # selects every trace
TOKENS = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "chat_template": TEMPLATES[:1]}


@pytest.mark.parametrize(
    ("name", "value", "load"),
    [
        ("p.jsonl", GOOD | {"id": "a", "domain": "b"}, load_problems),
        ("d.jsonl", DEMONSTRATION, lambda path: load_examples([path], TOKENIZER, 10_000)),
        ("c.jsonl", {"messages": [USER, ASSISTANT]}, lambda path: load_examples([path], TOKENIZER, 10_000)),
        (
            "pc.jsonl",
            {"prompt": [USER], "completion": [ASSISTANT]},
            lambda path: load_examples([path], TOKENIZER, 10_000),
        ),
        ("s.jsonl", SDK, lambda path: (load_problems(path), list(read_traces(path)))),
        ("t.jsonl", OURS, lambda path: (load_problems(path), list(read_traces(path)))),
        ("g.jsonl", GUIDED, lambda path: load_examples([path], TOKENIZER, 10_000, selection=EVERY)),
        ("e.jsonl", TAUGHT, lambda path: load_examples([path], TOKENIZER, 10_000, selection=EVERY)),
        ("config.json", QWEN3 | {"rope_parameters": ROPE, "eos_token_id": END}, None),
        ("tokenizer_config.json", TOKENS, None),
    ],
)
def test_whatever_is_changed_in_a_file_it_is_read_or_refused(tmp_path, name, value, load):
    rng, refused = random.Random(name), 0
    write_tokenizer(tmp_path)
    for _ in range(300):
        changed = value
        for _ in range(rng.choice((1, 1, 2, 3))):
            changed = mutated(rng, changed)
        (tmp_path / name).write_text(json.dumps(changed) + "\n")
        try:
            if load is not None:
                load(tmp_path / name)
            elif name == "config.json":
                config_from_dict(read_json(tmp_path / name))
            else:
                Tokenizer.from_directory(tmp_path).chat_ids([USER])
        except UserError as error:
            refused += 1
            assert len(str(error)) < 1_000 and "\n" not in str(error)
    assert 30 < refused < 300
