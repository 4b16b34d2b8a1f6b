"""Answers as models write them, gold answers as data sets do, texts made to take long, and JSON in prose."""

import time

import pytest
from conftest import STUDENT_WORDS, byte_tokenizer, lively_model

from nano_atlas import answers, protocol
from nano_atlas.data import load_problems
from nano_atlas.errors import UserError
from nano_atlas.sampler import Rollout, Sampler
from nano_atlas.seats import TokenSeat

# ---------------------------------------------------------------------------------------------------------- equal answers


@pytest.mark.parametrize(("answer", "gold"), [
    # LaTeX, Markdown, typography
    (r"\$18", "18"), (r"25\%", "25"), ("1{,}234", "1234"), (r"1,\!234", "1234"), (r"1\,234", "1234"), (r"\(18\)", "18"), (r"\[18\]", "18"),
    ("$18$.", "18"), ("**18**", "18"), ("**18.**", "18"), ("`18`", "18"), ("−5", "-5"), ("–5", "-5"), ("- 5", "-5"), ("$-5$", "-5"),
    ("-$5", "-5"), (r"\text{18}", "18"), (r"\textbf{18}", "18"), (r"\mathrm{18}", "18"), (r"18^\circ", "18"), (r"18^{\circ}", "18"), ("18°", "18"),
    (r"18\,", "18"), (r"\ 18", "18"), ("18\xa0", "18"), ("\u200918", "18"), (r"\left( 18 \right)", "18"), ("(18)", "18"), ("{18}", "18"),
    ("１８", "18"), ("１，２３４．５", "1234.5"), ("€18", "18"), ("£1,000.50", "1000.5"), ("1\u202f234", "1234"), ("18\u200b", "18"),
    (r"\$1{,}234.50", "1234.5"), ("１８％", "18"), (r"\displaystyle 18", "18"),
    # fractions, signs, powers of ten
    (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\tfrac{1}{2}", r"\frac{1}{2}"), (r"\frac12", "0.5"), ("1/2", r"\frac{1}{2}"), ("0.5", "1/2"),
    ("2/4", "1/2"), (r"2\frac{1}{2}", "2.5"), ("2 1/2", "5/2"), (r"-\frac{1}{2}", "-0.5"), (r"\frac{-1}{2}", "-0.5"), ("1⁄2", "0.5"),
    ("+5", "5"), ("5.0", "5"), ("1e-5", "0.00001"), ("1e3", "1000"), ("1E+3", "1,000"), ("7/1", "7"), ("6/3", "2"), (r"\frac{2,125}{1}", "2125"),
    # a unit beside it, an equation before it
    ("18 dollars", "18"), ("$18 per hour", "18"), (r"18\text{ apples}", "18"), ("18 cm^2", "18"), ("18km/h", "18"), (r"18\ \text{cm}^2", "18"),
    ("18 cm²", "18"), ("x = 5", "5"), ("x=5", "5"), ("6 * 3 = 18", "18"), ("$x = \\frac{1}{2}$", "0.5"), ("5", "x = 5"), ("The answer is $18.", "18"), ("Answer: 18 feet", "18"), ("**Answer:** 18", "18"), ("18 m", "18"), (r"18\,\text{m}^{2}", "18"), ("18,", "18"), ("__18__", "18"), ("18", "18 feet"),
    # words
    ("(A)", "A"), ("A.", "A"), ("A)", "A"), (r"\text{A}", "A"), (r"\textbf{(A)}", "A"), ("**Paris**", "paris"), ('"Paris"', "Paris"), ("(3, 4)", "(3,4)"),
    ("x + 1", "x+1"), (r"\{1, 2\}", r"\{1,2\}"), (r"\dfrac{a}{b}", r"\frac{a}{b}"),
])  # fmt: skip
def test_what_is_written_in_another_way_is_the_same_answer(answer, gold):
    assert answers.is_correct(answer, gold)
    boxed = f"So <solution>it is \\boxed{{{answer}}}</solution>"
    assert answers.is_correct(answers.extract_answer(boxed), gold)


@pytest.mark.parametrize(("answer", "gold"), [
    ("3,18", "18"), ("3, 180", "3180"), ("3,18", "318"), ("1.234", "1234"), ("5²", "52"), ("5^2", "52"), ("2**3", "23"), ("5!", "5"), (r"\sqrt{4}", "4"),
    ("1/3", "0.333"), ("1/0", "0"), ("1/2", "12"), ("5:30", "5"), ("2 hours 30 minutes", "2"), ("18 thousand", "18"), ("18 or 19", "18"), ("5π", "5"), (r"5\pi", "5"),
    ("x = 5 or x = 6", "6"), ("a = 3, b = 6", "6"), ("x != 5", "5"), ("it is not 5", "5"), ("5 is wrong", "5"), ("at 5:30", "30"), ("x > 5", "5"), ("negative 18", "18"), ("-18 dollars", "18"), ("5 apples", "5 pears"),
    ("5x", "5"), ("10-3", "7"), ("(3,4)", "[3,4]"), ("(3,4]", "(3,4)"), (r"\frac{a}{bc}", r"\frac{ab}{c}"), (r"\frac{x+1}{2}", r"x+\frac{1}{2}"),
    ("", "A"), ("True", "False"), ("1e-5", "1"), ("half", "0.5"), ("AB", "A"),
])  # fmt: skip
def test_another_answer_is_wrong_however_near_it_is(answer, gold):
    assert not answers.is_correct(answer, gold)


@pytest.mark.parametrize(("completion", "answer"), [
    ("<solution>18</solution> as I was to give it in <solution></solution>.", "18"), ("<solution>18</solution> <solution> \n</solution>", "18"),
    (r"\boxed{18}, as I was to put it in \boxed{}.", "18"), (r"<solution></solution> \boxed{18}", "18"), (r"\boxed{18} \boxed{ } \boxed{}", "18"),
    (r"\boxed{18} and \boxed{19", None), ("<solution>18</solution> and <solution>19", "18"), ("<solution></solution>", None), (r"\boxed{}", None),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), ("<solution>a <solution>b</solution>", "b"),
])  # fmt: skip
def test_the_last_answer_that_is_not_empty_counts(completion, answer):
    assert answers.extract_answer(completion) == answer


@pytest.mark.parametrize(("completion", "answer"), [
    ("It costs $1{,}234$.", "1,234"), ("The change is −5.", "-5"), (r"So \frac{1}{2} is left.", "1/2"), ("It is 3/4.", "3/4"), (r"\textbf{18}", "18"),
    ("about 1.5e3 m", "1.5e3"), ("<solution></solution> 18", "18"),
])  # fmt: skip
def test_the_last_number_is_read_in_any_writing(completion, answer):
    assert answers.extract_answer(completion, "last-number") == answer


def test_the_first_teaching_that_is_not_empty_counts():
    assert protocol.parse_teaching("I use <teaching></teaching>: <teaching>Add.</teaching>") == "Add."
    assert protocol.parse_teaching("I use <teaching> tags: <teaching>Add.</teaching>") == "Add."


# ------------------------------------------------------------------------------------------------------------------ leaks


@pytest.mark.parametrize(("teaching", "gold"), [
    ("It is (A).", "A"), ("the answer A", "A"), ("The answer is A because of it.", "A"), ("A.", "A"), ("Choose A", "A"), ("(a)", "A"), ("Option A fits", "(A)"),
    ("so no.", "no"), ("The answer is no because", "no"), ("None.", "none"), ("Say yes first", "yes"), ("side B", "B"), ("It is True", "true"),
    (r"so \dfrac{1}{2}", "0.5"), ("one 1/2 of it", "1/2"), ("0.5 of it", r"\frac{1}{2}"), ("take 2 1/2 cups", "2.5"), ("1{,}234 of them", "1234"),
    ("it is −5", "-5"), ("use 1e-5", "0.00001"), ("there are 18", "18 apples"), ("18/2", "18"), ("*18*", "18"), ("say **New York**", "New York"),
])  # fmt: skip
def test_an_answer_is_given_away_in_any_writing(teaching, gold):
    assert answers.reveals_answer(teaching, gold)


@pytest.mark.parametrize(("teaching", "gold"), [
    ("Draw a diagram first.", "A"), ("A diagram helps.", "A"), ("Take a 5-digit number and a $5 bill", "A"), ("I'd add. I think of it", "I"),
    ("There is no need to", "no"), ("None of them fits", "None"), ("It is true that it grows", "True"), ("The answer is a number.", "A"),
    ("Divide 16/2", "8"), ("Take 3/4", "0.5"), ("2 1/2", "1/2"), ("AB", "A"), ("5 or 2", "2.5"),
])  # fmt: skip
def test_an_ordinary_word_or_an_open_sum_gives_nothing_away(teaching, gold):
    assert not answers.reveals_answer(teaching, gold)


# ----------------------------------------------------------------------------------------------------------- gold answers


@pytest.mark.parametrize(("answer", "gold"), [
    ("0.00001", "0.00001"), ("1e-05", "0.00001"), ("18.0", "18.0"), ("12345678901234567890123", "12345678901234567890123"), ("1e22", "1" + "0" * 22), ("-3", "-3"),
    (r'"#### Step 1\nadd\n#### Step 2\nso \\boxed{5} done"', "5"), (r'"#### Step 1 … #### Step 2 … \\boxed{5} done"', "5"),
    (r'"4 * 2 = 8\n#### 8"', "8"), (r'"8\n#### 1,000\n"', "1,000"), ('"so #### 8"', "8"), (r'"so\n#### \\boxed{5}"', "5"), (r'"so\n#### two words"', "two words"),
    (r'"\\boxed{4} so far\n#### 5"', "5"), (r'"#### Note\ntext"', "#### Note\ntext"), ('"see issue ####"', "see issue ####"), ('"<solution>A</solution>"', "A"),
    ("true", None), (r'"\n#### "', None),
])  # fmt: skip
def test_the_gold_answer_is_a_plain_number_or_what_the_text_ends_with(tmp_path, answer, gold):
    (tmp_path / "p.jsonl").write_text(f'{{"question": "x?", "answer": {answer}}}')
    if gold is None:
        with pytest.raises(UserError, match="p.jsonl:1"):
            load_problems(tmp_path / "p.jsonl")
    else:
        (problem,) = load_problems(tmp_path / "p.jsonl")
        assert problem.answer == gold
        assert answers.is_correct(gold, problem.answer)


# ------------------------------------------------------------------------------------------------------- opened thoughts


@pytest.mark.parametrize(("prompt", "completion", "text"), [
    ("Q<think>\n", "Draft: <teaching>It is 5.</teaching> <solution>5</solution> Hmm", "<think>Draft: <teaching>It is 5.</teaching> <solution>5</solution> Hmm"),
    ("Q<think>", "Hmm</think><teaching>Add.</teaching><solution>5</solution>", "<think>Hmm</think><teaching>Add.</teaching><solution>5</solution>"),
    ("Q<think>\n\n</think>\n\n", "<teaching>Add.</teaching><solution>5</solution>", "<teaching>Add.</teaching><solution>5</solution>"),
    ("What is <think>?", "<teaching>Add.</teaching><solution>5</solution>", "<teaching>Add.</teaching><solution>5</solution>"),
])  # fmt: skip
def test_a_thought_that_the_template_opened_is_no_teaching_and_no_answer(prompt, completion, text):
    tokenizer = byte_tokenizer()
    seat = TokenSeat(Sampler(lively_model(0, STUDENT_WORDS, tokenizer)), tokenizer)
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(completion)
    reply = seat._reply(Rollout(prompt_ids, ids, [0.0] * len(ids), "length", 0))
    assert reply.text == text and reply.tokens == len(ids)
    is_open = text.count("<think>") > text.count("</think>")
    assert protocol.parse_teaching(reply.text) == (None if is_open else "Add.")
    assert answers.extract_answer(reply.text) == (None if is_open else "5")


# ------------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(("text", "found"), [
    ('{{"score": 1}}', 1), ('```json\n{"score": 1}\n``` {x}', 1), ('{see {"score": 1} there}', 1), ('like {"} or {"score": 1}', 1), ('{"score": ..., } {"score": 1}', 1),
    ('{"a": "text {"score": 1}', 1), ('{"x": [{"score": 1}, oops', 1), ('{"score": 1} {"score": NaN}', 1), ('{"score": 2, "x": {"score": 1e999}}', None),
    ('{"score": Infinity}', None), (f'{{"score": {"9" * 5000}}}', None), ('{"score": "\\ud83d"}', "\ufffd"), ('{"score": 1', None),
    ('\\boxed{\\{"score": 1}}', 1), ("{" * 1000 + '{"score": 1}' + "}" * 1000, 1), ('{"a":' * 5000 + '{"score": 1}', 1), ('{"a":[' * 900 + '{"score": 1}', 1),
    ('{"score": 1, "a": ' + "[" * 800 + "]" * 800 + "}", 1), ('{"score": 1} {"score": 2, "a":' + "[" * 15_000, 1), ("[]{}", None),
    ('"quoted" {"score": 1} 5" tall', 1), ('{"a": {"b": {"score": 2}}, "score": 1}', 1), ('{"steps": 5}', None),
])  # fmt: skip
def test_the_last_object_is_found_wherever_it_stands(text, found):
    assert (answers.last_json(text, "score") or {}).get("score") == found


# ------------------------------------------------------------------------------------------------------------------ floods

FLOODS = [
    "{", "}", '{"', '{"a":', '{"a":[', '{"a":{},', '{"{', "[{", '{"score":1}', '{"score":{"score":NaN,"x":', '{"x":"{\\"', "<teaching>", "</teaching>", "<solution>",
    "</solution>", "<solution></solution>", "\\boxed{", "\\boxed{}", "<think>", "</think>", "<thinking>", "1", "1,", "1,111,", "1,111", "1.", "1/", "1 1/1 ", "-", "1e9",
    "$", "\\", "\\frac", "\\frac{", "\\frac{1", "\\text{", "\\mathrm{a}", "1\\,111", "**", "((", "()", "a=", " ", "\n", "no ", "A ", "1 a ", "\ud83d", '"', "é",
]  # fmt: skip


def read_everything(text: str) -> None:
    for answer_format in ("solution", "last-number"):
        answers.extract_answer(text, answer_format)
    protocol.parse_teaching(text)
    answers.last_json(text, "score")
    answers.is_correct(text, "18")
    for gold in ("0.5", "A", "no such words"):
        answers.reveals_answer(text, gold)


@pytest.mark.parametrize("unit", FLOODS)
def test_reading_takes_time_in_proportion_to_the_text(unit):
    """Quadratic, each of them took a minute and more."""
    flood = unit * (100_000 // len(unit))
    start = time.perf_counter()
    for text in (flood, f"<solution>({flood}.5x</solution>"):
        read_everything(text)
    assert time.perf_counter() - start < 8


@pytest.mark.parametrize(
    "flood", ["{" * 1_000_000, "<teaching>" * 100_000, "<solution>" * 100_000, "1" * 1_000_000], ids=len
)
def test_a_megabyte_is_read_in_seconds(flood):
    start = time.perf_counter()
    read_everything(flood)
    assert answers.is_correct(flood, flood)
    assert time.perf_counter() - start < 30
