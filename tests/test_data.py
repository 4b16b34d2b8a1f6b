"""Reading people's files, the loss mask, and packing."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
import torch

from nano_atlas import protocol
from nano_atlas.config import derive_seed
from nano_atlas.data import (
    Example,
    Problem,
    collate,
    load_examples,
    load_problems,
    make_examples,
    pack,
    shuffle_epoch,
    steps_per_epoch,
)
from nano_atlas.errors import UserError
from nano_atlas.runs import read_jsonl, write_jsonl
from nano_atlas.tokenizer import Tokenizer

# Rewrites earlier turns, as Qwen3's template does: only the last message keeps its (here empty) reasoning block.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def byte_tokenizer(**options) -> Tokenizer:
    """Every byte a token, and ChatML's two control tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({character: i for i, character in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, eos_token="<|im_end|>", **options)


TOKENIZER = byte_tokenizer()


def write(path: Path, *lines: str | dict | bytes) -> Path:
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(b"\n".join(text.encode() if isinstance(text, str) else text for text in texts))
    return path


def learned_texts(example: Example) -> list[str]:
    """The runs of learned tokens, as text."""
    runs, previous = [], False
    for token, is_target in zip(example.input_ids, example.is_target, strict=True):
        if is_target and not previous:
            runs.append([])
        if is_target:
            runs[-1].append(token)
        previous = is_target
    return [TOKENIZER.decode(run, skip_special=False) for run in runs]


# ------------------------------------------------------------------------------------------------------------- reading


def test_lines_are_numbered_as_in_an_editor_and_blank_ones_and_a_byte_order_mark_do_not_matter(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}', "", '{"a": "\u2028"}', "")
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": "\u2028"})]


@pytest.mark.parametrize(
    "lines, said",
    [
        ([{}, '{"a": '], r"a.jsonl:2: not JSON .* each line must be one JSON object"),
        ([{}, "[1]"], r"a.jsonl:2: a JSON list; each line must be one JSON object"),
        ([{}, {}, b'{"a": "\xff"}'], r"a.jsonl:3: not JSON in UTF-8 .* can't decode byte 0xff"),
        (["", ""], r"a.jsonl: empty; it should have one JSON object per line"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_a_remedy(tmp_path, lines, said):
    with pytest.raises(UserError, match=said):
        list(read_jsonl(write(tmp_path / "a.jsonl", *lines)))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing.jsonl: no such file"):
        list(read_jsonl(tmp_path / "nothing.jsonl"))


def test_written_lines_are_read_back(tmp_path):
    records = [{"text": "é\n\u2028"}, {"n": [1]}]
    write_jsonl(tmp_path / "new" / "a.jsonl", iter(records))
    assert [record for _, record in read_jsonl(tmp_path / "new" / "a.jsonl")] == records


# ------------------------------------------------------------------------------------------------------------ problems


@pytest.mark.parametrize(
    "record, problem",
    [
        ({"question": "2+3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}, Problem("p:1", "2+3?", "5")),  # GSM8K
        ({"problem": "x?", "answer": 70, "id": "0"}, Problem("0", "x?", "70")),  # AIME
        (
            {"prompt": "x?", "ground_truth": "7"},
            Problem("p:1", "x?", "7"),
        ),  # Arc-ATLAS-Teach-v0, training/rl.jsonl
        (
            {"problem_text": "x?", "solution": "so \\boxed{\\frac12}.", "domain": "math"},
            Problem("p:1", "x?", "\\frac12", "math"),
        ),
        ({"input": "x?", "answer": "yes", "id": 3}, Problem("3", "x?", "yes")),
    ],
)
def test_the_usual_layouts_of_problems_are_read(tmp_path, record, problem):
    assert load_problems(write(tmp_path / "p.jsonl", record)) == [problem]


@pytest.mark.parametrize(
    "records, said",
    [
        ([{"answer": "1"}], r"p.jsonl:1: no question; one of the fields problem_text, question"),
        ([{"question": "x?"}], r"p.jsonl:1: no gold answer; one of the fields ground_truth, answer"),
        ([{"question": ["x"], "answer": "1"}], r"p.jsonl:1: the field 'question' must be a non-empty text"),
        (
            [{"question": "x?", "answer": "so\n#### "}],
            r"p.jsonl:1: the field 'answer' has no answer after its last ####",
        ),
        (
            [{"question": "x?", "answer": "1", "id": 1}, {"question": "y?", "answer": "1", "id": "1"}],
            r"p.jsonl:2: an earlier line also has the id '1'",
        ),
    ],
)
def test_a_bad_problem_is_named_with_its_line(tmp_path, records, said):
    with pytest.raises(UserError, match=said):
        load_problems(write(tmp_path / "p.jsonl", *records))


def test_tasks_of_the_runtime_need_no_answer(tmp_path):
    assert load_problems(write(tmp_path / "p.jsonl", {"question": "x?"}), needs_answer=False) == [
        Problem("p:1", "x?", None)
    ]


def trace(task: str, **changes) -> dict:
    """With the keys that atlas-sdk's jsonl_writer gives a session; it keeps a ground truth in the metadata only."""
    metadata = {"session_id": 7, "status": "succeeded", "ground_truth": 42, "learning_key": "k"} | changes
    steps = {"plan": {"steps": []}, "steps": [], "session_reward": {"score": 0.9}, "final_answer": "42"}
    return {"task": task, "session_metadata": metadata, "review_status": "approved", **steps}


def test_traces_become_problems_and_what_does_not_is_counted(tmp_path, capsys):
    path = write(
        tmp_path / "t.jsonl",
        trace("6 times 7?"),
        trace("6 times 7?", session_id=8),
        trace("?", status="failed"),
        trace("?", ground_truth=None),
        trace("?") | {"review_status": "quarantined"},
        trace("half of 84?", session_id=None, ground_truth=None)
        | {"ground_truth": "42", "learning_key": "math"},
    )
    assert load_problems(path) == [
        Problem("7", "6 times 7?", "42", "k"),
        Problem("t:6", "half of 84?", "42", "math"),
    ]
    said = "t.jsonl: 2 problems; traces left out: 1 the same task again, 1 session failed, 1 no ground truth, 1 review quarantined"
    assert said in capsys.readouterr().err
    sample = {
        "session_id": 1,
        "task": "One",
        "steps": [{"reward": {"process": 1.0}}],
    }  # as in their sample file
    with pytest.raises(UserError, match=r"no problem to train on; traces left out: 1 no ground truth"):
        load_problems(write(tmp_path / "sample.jsonl", sample))
    assert load_problems(tmp_path / "sample.jsonl", needs_answer=False) == [Problem("1", "One", None)]


# ----------------------------------------------------------------------------------------------------------- loss mask


def test_of_a_chat_exactly_the_assistants_words_and_its_end_of_turn_are_learned():
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "2+2? <|im_end|>"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes, 4"},
    ]
    (example,) = make_examples({"messages": messages}, TOKENIZER, "a:1")
    assert learned_texts(example) == ["4<|im_end|>", "yes, 4<|im_end|>"]
    # Everything before the last end of turn is the chat as the template renders it: nothing is lost, doubled or reordered.
    rendered = TOKENIZER.chat_ids(messages, add_generation_prompt=False)
    assert rendered == example.input_ids + TOKENIZER.encode("\n")


def test_a_demonstration_is_learned_on_exactly_the_prompt_that_is_sampled_later():
    record = {
        "problem_text": "2+2?",
        "student_approach": "add",
        "teacher_diagnosis": "right",
        "teacher_teaching": "Go on.",
    }
    (example,) = make_examples(record, TOKENIZER, "a:1")
    prompt = TOKENIZER.chat_ids(protocol.teacher_messages("2+2?", "add"), add_generation_prompt=True)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.is_target.index(True) == len(prompt)
    assert learned_texts(example) == ["<thinking>right</thinking>\n<teaching>Go on.</teaching><|im_end|>"]
    completion = TOKENIZER.decode(example.input_ids[len(prompt) :])
    assert protocol.parse_teaching(completion) == "Go on."
    (styled,) = make_examples({**record, "strategy": "concise"}, TOKENIZER, "a:1")
    assert "Be brief." in TOKENIZER.decode(styled.input_ids)


def test_a_template_that_rewrites_earlier_turns_gives_one_example_per_turn_as_it_would_be_generated():
    tokenizer = byte_tokenizer(chat_template=FORGETFUL)
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd")]
    examples = make_examples({"messages": messages}, tokenizer, "a:1")
    assert [learned_texts(example) for example in examples] == [["b<|im_end|>"], ["d<|im_end|>"]]
    for example, count in zip(
        examples, (1, 3)
    ):  # the prompt is that of sampling at this turn, reasoning block included
        prompt = tokenizer.chat_ids(messages[:count], add_generation_prompt=True, enable_thinking=False)
        assert example.input_ids[: len(prompt)] == prompt and example.is_target.index(True) == len(prompt)
    (first, _) = make_examples({"messages": messages}, tokenizer, "a:1", thinking=True)
    assert learned_texts(first) == ["<think>\n\n</think>\n\nb<|im_end|>"]


def test_a_template_whose_prompt_is_no_prefix_is_refused():
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = byte_tokenizer(chat_template=template)
    with pytest.raises(
        UserError, match=r"a:1: message 1: the chat template does not continue its own generation prompt"
    ):
        make_examples(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            tokenizer,
            "a:1",
        )


def test_prompt_and_completion_are_taken_as_they_are_or_as_messages():
    (plain,) = make_examples({"prompt": "2+2=", "completion": "4"}, TOKENIZER, "a:1")
    assert plain == Example(
        TOKENIZER.encode("2+2=") + TOKENIZER.encode("4") + [TOKENIZER.eos_ids[0]], [False] * 4 + [True] * 2
    )
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    (chat,) = make_examples(
        {"prompt": turns, "completion": [{"role": "assistant", "content": "d"}]}, TOKENIZER, "a:1"
    )
    assert learned_texts(chat) == ["d<|im_end|>"]  # an assistant turn of the prompt is not learned


@pytest.mark.parametrize(
    "record, said",
    [
        (
            {"text": "a"},
            r"a:7: text make no training example; expected problem_text, .* or prompt and completion",
        ),
        (
            {"problem_text": "a", "student_approach": "b", "teacher_teaching": "c"},
            r"a:7: the field 'teacher_diagnosis' must be a non-empty text, not null",
        ),
        (
            {"problem_text": "a", "student_approach": "", "teacher_diagnosis": "c", "teacher_teaching": "c"},
            r"a:7: the field 'student_approach'",
        ),
        ({"messages": []}, r"a:7: 'messages' must be a non-empty list"),
        (
            {"messages": [{"role": "user", "content": None}]},
            r"a:7: 'messages' must be a non-empty list of .* with texts as values",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, r"a:7: no assistant message to learn from"),
        ({"prompt": "a", "completion": 4}, r"a:7: the field 'completion' must be a non-empty text, not 4"),
    ],
)
def test_a_bad_example_is_named_with_its_line_and_what_was_expected(record, said):
    with pytest.raises(UserError, match=said):
        make_examples(record, TOKENIZER, "a:7")


def test_long_examples_are_left_out_and_counted_never_cut(tmp_path, capsys):
    lines = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in (("ab", "c"), ("ab", "cd"), ("a" * 9, "c"))
    ]
    path = write(tmp_path / "a.jsonl", *lines)
    examples = load_examples([path], TOKENIZER, max_length=4)
    assert [len(example.input_ids) for example in examples] == [4]
    assert capsys.readouterr().err == f"left out: 2 examples of {path}: longer than 4 tokens\n"
    with pytest.raises(UserError, match="no example has at most .* raise --max-length"):
        load_examples([path], TOKENIZER, max_length=3)


# ------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_predicts_each_learned_token_from_the_one_before_it_and_never_across_documents():
    batch = collate([Example([1, 2, 3, 4], [False, False, True, True]), Example([5, 6], [False, True])])
    assert (batch.input_ids.tolist(), batch.lengths) == ([1, 2, 3, 5], [3, 1])
    pairs = list(zip(batch.input_ids[batch.target_positions].tolist(), batch.targets.tolist()))
    assert pairs == [(2, 3), (3, 4), (5, 6)]
    assert batch.targets.dtype == torch.int64


def test_packing_keeps_every_document_once_within_the_budget_and_with_little_padding():
    rng = random.Random(0)
    lengths = [rng.randint(40, 160) for _ in range(500)]
    batches = pack(lengths, 4096)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 4096 for batch in batches)
    slots = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert 1 - sum(lengths) / slots < 0.06  # of the padded view


def test_one_long_document_does_not_blow_up_the_padded_view_of_short_ones():
    assert pack([10, 5000, 10, 3000], 4096) == [[1], [3], [0, 2]]


def test_an_epoch_is_a_permutation_cut_into_steps_of_the_asked_size_and_depends_on_seed_and_epoch_only():
    lengths = [random.Random(1).randint(40, 160) for _ in range(1000)]
    first = shuffle_epoch(lengths, 8192, seed=1, epoch=0)
    assert first == shuffle_epoch(lengths, 8192, seed=1, epoch=0)
    assert (
        first
        != shuffle_epoch(lengths, 8192, seed=1, epoch=1)
        != shuffle_epoch(lengths, 8192, seed=2, epoch=1)
    )
    assert sorted(index for step in first for index in step) == list(range(1000))
    assert len(first) == steps_per_epoch(lengths, 8192) == -(-sum(lengths) // 8192)
    assert max(map(len, first)) - min(map(len, first)) <= 1
    assert [len(step) for step in shuffle_epoch([9000, 9000], 100, 0, 0)] == [1, 1]  # never an empty step


def test_a_derived_seed_is_the_same_everywhere_and_differs_with_every_part():
    assert derive_seed(1, "rollouts", 2) == 7975693295772203131
    seeds = [derive_seed(*parts) for parts in ((1, "a", 2), (1, "b", 2), (1, "a", 3), (2, "a", 2))]
    assert len(set(seeds)) == 4
