"""The lessons and demonstrations of benchmarks/smollm2.py: right by arithmetic, and no result is ever told."""

import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks import word_problems as words
from benchmarks.word_problems import WordProblem
from nano_atlas.answers import extract_answer, is_correct
from nano_atlas.data import DEMONSTRATION_FIELDS

PROBLEMS = words.load_svamp(Path(__file__).parent / "data/svamp_excerpt.json")
TWO_STEPS = WordProblem("two", "3 and 5 are put together, 2 are lost.", "( ( 3.0 + 5.0 ) - 2.0 )")
LATE = WordProblem("late", "Of 20 there are 5 and 7 gone.", "( 20.0 - ( 5.0 + 7.0 ) )")


def exact(equation: str) -> Fraction:
    return eval(
        re.sub(r"[\d.]+", lambda number: f"Fraction('{number[0]}')", equation), {"Fraction": Fraction}
    )


def test_problems_are_read_with_the_plan_that_their_equation_means():
    assert len(PROBLEMS) == 15
    assert PROBLEMS[0].question == (
        "Each pack of dvds costs 76 dollars. If there is a discount of 25 dollars on each pack, how much do you have to pay to buy each pack?"
    )
    for problem in [*PROBLEMS, TWO_STEPS, LATE]:
        assert Fraction(problem.answer) == exact(problem.equation)
    assert words.detailed(TWO_STEPS.steps) == "First add 3 and 5. Then subtract 2 from the result."
    assert words.detailed(LATE.steps) == "First add 5 and 7. Then subtract the result from 20."
    assert words.brief(LATE.steps) == "First add, then subtract."
    assert words.worked(LATE) == "5 + 7 = 12\n20 - 12 = 8\n<solution>8</solution>"


@pytest.mark.parametrize("seed", range(20))
def test_other_numbers_leave_the_story_and_keep_every_result_a_positive_whole_number(seed):
    rng = random.Random(seed)
    for problem in PROBLEMS:
        other = words.renumbered(problem, rng)
        without = [words.NUMBER.sub("#", p.question) for p in (problem, other)]
        assert without[0] == without[1] and [s.operation for s in other.steps] == [
            s.operation for s in problem.steps
        ]
        assert Fraction(other.answer) == exact(other.equation) > 0 and all(v == int(v) for v in other.values)
        numbers = {float(found) for found in words.NUMBER.findall(other.question)}
        assert {x for step in other.steps for x in (step.a, step.b) if x is not None} <= numbers


def test_the_student_shares_no_story_with_teacher_or_test():
    parts = words.split(PROBLEMS, student=4, test=5, demonstrations=3, seed=1)
    assert sorted(p.id for part in parts.values() for p in part) == sorted(p.id for p in PROBLEMS)
    assert [len(parts[name]) for name in ("test", "demonstrations")] == [5, 3] and len(parts["student"]) >= 4
    homework = {
        name == "student" for name, part in parts.items() for p in part if "math homework" in p.question
    }
    assert len(homework) == 1


def test_lessons_say_what_is_right():
    lessons = words.student_lessons(PROBLEMS, 200, 3, seed=0)
    assert len(lessons) == 203
    for lesson in lessons:
        asked, answer = lesson["prompt"][0]["content"], lesson["completion"][0]["content"]
        for left, right in re.findall(r"(.*) = (.*)", answer):
            assert Fraction(right) == exact(left)
        if "<solution>" in asked:  # the last line is the result of the one before
            assert is_correct(extract_answer(answer), answer.splitlines()[-2].rpartition("= ")[2])
    pages = [lesson["completion"][0]["content"].count(" = ") for lesson in lessons[200:]]
    assert pages == [20] * 3


def test_a_plan_is_recognised_whatever_the_order_of_a_sum():
    assert words.is_plan_of("I would add 5 and 3. Then subtract 2 from the result.", TWO_STEPS.steps)
    for other in ("Add 3 and 5.", "First add 3 and 5. Then subtract the result from 2.", "First add 3 and 6. Then subtract 2 from the result.",
                  "First add 3 and 5. Then subtract 2 from the result. Then add 1 and 2.", "", "Subtract."):  # fmt: skip
        assert not words.is_plan_of(other, TWO_STEPS.steps)


def test_demonstrations_diagnose_what_the_approach_says_and_name_no_result():
    approaches = {
        "I would subtract 25 from 76.": "right.",
        "I would add 25 and 76.": "operation.",
        "I would subtract 76 from 25.": "numbers.",
    }
    for approach, verdict in approaches.items():
        for number, teaching in enumerate(("Subtract.", "Subtract 25 from 76.")):
            made = words.demonstration(PROBLEMS[0], approach, number)
            assert set(made) == set(DEMONSTRATION_FIELDS) and made["teacher_teaching"] == teaching
            assert made["teacher_diagnosis"].endswith(verdict)
    for number, problem in enumerate(words.variants(PROBLEMS, 60, seed=0)):
        made = words.demonstration(problem, "I would add.", number)
        told = {
            float(found)
            for found in words.NUMBER.findall(f"{made['teacher_diagnosis']} {made['teacher_teaching']}")
        }
        assert told <= {float(found) for found in words.NUMBER.findall(problem.question)}
