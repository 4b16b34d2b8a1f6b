"""The protocol's texts: prompts that hold only what they may, and answers, teachings and leaks read back exactly."""

import pytest

from nano_atlas import answers, protocol

QUESTION = "What is 6 times 3?"


def prompt(messages) -> str:
    (message,) = messages
    assert message["role"] == "user"
    return message["content"]


# ----------------------------------------------------------------------------------------------------------- the prompts


def test_without_a_teaching_the_student_gets_exactly_its_baseline_prompt():
    assert protocol.guided_messages(QUESTION, None) == protocol.baseline_messages(QUESTION)


@pytest.mark.parametrize(
    ("answer_format", "words"),
    [("solution", "<solution>"), ("boxed", "\\boxed{}"), ("last-number", "a number.")],
)
def test_both_arms_ask_for_the_answer_in_the_same_format(answer_format, words):
    """Otherwise the arms would differ in more than the teaching."""
    alone, guided = (
        prompt(protocol.baseline_messages(QUESTION, answer_format)),
        prompt(protocol.guided_messages(QUESTION, "Multiply.", answer_format)),
    )
    asked = protocol.ANSWER_FORMATS[answer_format]
    assert words in asked and alone.endswith(asked) and guided.endswith(asked)
    assert alone.startswith(QUESTION) and guided.startswith(QUESTION)
    assert "Multiply." in guided
    others = [text for name, text in protocol.ANSWER_FORMATS.items() if name != answer_format]
    assert not any(text in alone + guided for text in others)


def test_the_probe_does_not_ask_for_an_answer():
    assert "<solution>" not in prompt(protocol.probe_messages(QUESTION))


def test_each_style_asks_the_teacher_in_its_own_words_and_a_sentence_of_ones_own_is_taken_as_it_is():
    prompts = {
        style: prompt(protocol.teacher_messages(QUESTION, "I add.", style))
        for style in protocol.TEACHING_STYLES
    }
    assert len(set(prompts.values())) == len(prompts)
    assert prompts["adaptive"] == prompt(protocol.teacher_messages(QUESTION, "I add."))
    for style, sentence in protocol.TEACHING_STYLES.items():
        assert sentence in prompts[style]
    assert "Ask {one} question." in prompt(
        protocol.teacher_messages(QUESTION, "I add.", "Ask {one} question.")
    )


@pytest.mark.parametrize("text", [
    '{"principles": 1}', "{style} {question} {0} {{", "<teaching>x</teaching>", "<solution>7</solution>", "\\1 \\g<0> %s $x",
])  # fmt: skip
def test_braces_and_tags_in_texts_are_inert(text):
    """Texts are values, never templates; what a question or an approach says is not read as a teaching or an answer."""
    prompts = [protocol.probe_messages(text), protocol.baseline_messages(text), protocol.teacher_messages(text, text),
               protocol.guided_messages(text, text)]  # fmt: skip
    assert [prompt(messages).count(text) for messages in prompts] == [1, 1, 2, 2]
    strange = prompt(protocol.teacher_messages(text, text)).replace(text, "x")
    assert strange == prompt(protocol.teacher_messages("x", "x"))  # inserted, and nothing else changed


# ------------------------------------------------------------------------------------------------------ reading teachings


@pytest.mark.parametrize(("completion", "teaching"), [
    ("<thinking>It adds.</thinking>\n<teaching> Multiply. </teaching>", "Multiply."),
    ("<teaching>One\nTwo</teaching>", "One\nTwo"),
    ("<think>hm <teaching>secret</teaching></think><teaching>Multiply.</teaching>", "Multiply."),
    ("<thinking>say <teaching>secret</teaching>?</thinking><teaching>Multiply.</teaching>", "Multiply."),
    ("<teaching>first</teaching> <teaching>second</teaching>", "first"),
    ("<teaching>use {x} and \\1</teaching>", "use {x} and \\1"),
])  # fmt: skip
def test_the_teaching_is_what_stands_in_the_tag(completion, teaching):
    assert protocol.parse_teaching(completion) == teaching


@pytest.mark.parametrize("completion", [
    "", "Multiply.", "<teaching>Multiply.", "Multiply.</teaching>", "<teaching>  \n </teaching>", "<teaching></teaching>",
    "<thinking>It should multiply: <teaching>secret</teaching></thinking>",
    "<thinking>It should multiply: <teaching>secret</teaching>",  # cut off while thinking
    "<think><teaching>secret</teaching></think>",
    "<think>maybe <teaching>secret</teaching>",
    "<Teaching>Multiply.</Teaching>",
])  # fmt: skip
def test_without_a_closed_tag_outside_the_thoughts_there_is_no_teaching(completion):
    assert protocol.parse_teaching(completion) is None


def test_the_target_of_a_demonstration_is_read_back_as_its_teaching():
    target = protocol.teacher_target(" It adds. ", " Multiply. ")
    assert protocol.parse_teaching(target) == "Multiply."
    assert "It adds." in target


# ------------------------------------------------------------------------------------------------------- reading answers


@pytest.mark.parametrize(("completion", "answer"), [
    ("<solution>18</solution>", "18"),
    ("<solution> 18.\n</solution> done", "18."),
    ("<solution>1</solution> no, <solution>2</solution>", "2"),
    ("I put it in <solution> tags: <solution>18</solution>", "18"),
    (r"\boxed{1} and \boxed{2}", "2"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"<solution>\boxed{\text{a}}</solution>", r"\text{a}"),
    (r"<solution>so $x = \boxed{5}$</solution>", "5"),
    (r"<solution>7</solution> but \boxed{8}", "7"),  # the asked format goes first
    (r"<think>\boxed{9} <solution>8</solution></think> \boxed{10}", "10"),
    (r"<think>\boxed{9}</think> no idea", None),
    (r"<think>\boxed{9} <solution>8</solution>", None),  # cut off while thinking
    (r"\boxed{1", None), ("<solution>18", None), ("18</solution>", None), ("<solution> </solution>", None),
    ("The answer is 18", None), ("", None),
])  # fmt: skip
def test_the_answer_is_the_last_tagged_or_boxed_one_and_is_never_guessed(completion, answer):
    for answer_format in ("solution", "boxed"):
        assert answers.extract_answer(completion, answer_format) == answer


@pytest.mark.parametrize(("completion", "answer"), [
    ("To add 7 and 5, you simply add them together: 7 + 5 = 12.", "12"),
    ("First 3, then -4.", "-4"), ("It costs $1,250.50!", "1,250.50"), ("10-3 is seven", "3"), ("No idea.", None),
    ("12 <solution>7</solution> and 8", "7"), (r"\boxed{5} as 3 + 2", "5"), ("<think>5</think> none", None),
    ("<think>so 5", None),
])  # fmt: skip
def test_the_last_number_is_an_answer_only_where_it_is_asked_for(completion, answer):
    assert answers.extract_answer(completion, "last-number") == answer


@pytest.mark.parametrize(("answer", "gold"), [
    ("18", "18"), ("016", "16"), ("1,000", "1000"), ("1000", "1,000"), ("18.", "18"), ("18.0", "18"), ("$18", "18"),
    ("18%", "18"), ("-3", "-3"), ("+3", "3"), (".5", "0.50"), ("Paris", "paris"),
    ("New  York.", "new york"), (r"\frac{1}{2}", r"\frac{1}{2}"),
])  # fmt: skip
def test_answers_are_equal_by_value_or_by_word(answer, gold):
    assert answers.is_correct(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), [
    (None, "18"), ("", "18"), ("18 thousand", "18"), ("-18", "18"), ("1", "10"), ("1,8", "18"), ("18.5", "18"),
    ("New York City", "New York"), ("0.30000000000000001", "0.3"), ("10000000000000001", "10000000000000000"),
    ("nan", "18"), ("1e3", "100"), ("five", "5"),
])  # fmt: skip
def test_everything_else_is_wrong(answer, gold):
    assert not answers.is_correct(answer, gold)


# ------------------------------------------------------------------------------------------------------------------ leaks


@pytest.mark.parametrize(("teaching", "gold"), [
    ("It is 18.", "18"), ("18", "18"), ("6*3=18, see", "18"), ("Take 018 or 18.0", "18"), ("$1,000!", "1000"),
    ("1000", "1,000"), ("one of 3,18,40", "18"), ("between 16-18", "18"), ("f(6)-18", "18"), ("minus three is -3", "-3"),
    ("half is .5", "0.5"), ("(18)", "18"), ("The capital is PARIS", "Paris"), ("say New\nYork now", "New York"),
    ("It is Paris", "Paris."), (r"so \frac{1}{2}.", r"\frac{1}{2}"),
])  # fmt: skip
def test_the_gold_answer_anywhere_in_a_teaching_is_a_leak(teaching, gold):
    assert answers.reveals_answer(teaching, gold)


@pytest.mark.parametrize(("teaching", "gold"), [
    ("Multiply the two.", "18"), ("118 or 180 or 1.8 or 18.5 or 3.18", "18"), ("1,018", "18"), ("18,000", "18"),
    ("the answer is -3", "3"), ("3", "-3"), ("Comparisons", "Paris"), ("fairly", "fair"),
    ("New Jersey, York", "New York"), ("", "18"),
])  # fmt: skip
def test_numbers_inside_numbers_and_words_inside_words_are_not_leaks(teaching, gold):
    assert not answers.reveals_answer(teaching, gold)
