"""SVAMP as lessons: problems with their plans, the same stories with other numbers, and a split that keeps the student's stories apart.

student's lessons    answers alone, answers that follow guidance, approaches, sums; from the student's own stories
demonstrations       question + the student's sampled approach -> diagnosis + teaching that names the operations
"""

import ast
import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

from nano_atlas import protocol
from nano_atlas.data import Problem

SYMBOLS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
NOUNS = {"+": "an addition", "-": "a subtraction", "*": "a multiplication", "/": "a division"}
VERBS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
CLAUSES = {
    "+": "add {a} and {b}",
    "-": "subtract {b} from {a}",
    "*": "multiply {a} by {b}",
    "/": "divide {a} by {b}",
}
NUMBER = re.compile(r"\d+(?:\.\d+)?")
SAME_STORY = 0.6  # share of words that two variants of one story have in common (Jaccard)
RESULT = "the result"  # what the second step calls that of the first


@dataclass(frozen=True)
class Step:
    """One operation; an operand is a number, or None where it is the result of the step before."""

    operation: str
    a: float | None
    b: float | None

    def operands(self, before: str) -> list[str]:
        """Both as texts; `before` says the result of the step before."""
        return [before if x is None else show(x) for x in (self.a, self.b)]


@dataclass(frozen=True)
class WordProblem:
    id: str
    question: str
    equation: str

    @property
    def steps(self) -> list[Step]:
        return _steps(ast.parse(self.equation.strip(), mode="eval").body)

    @property
    def values(self) -> list[float]:
        """The result of every step; the last one is the answer."""
        results: list[float] = []
        for step in self.steps:
            a, b = (results[-1] if x is None else x for x in (step.a, step.b))
            results.append(
                {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else float("inf")}[step.operation]
            )
        return results

    @property
    def answer(self) -> str:
        return show(self.values[-1])

    @property
    def problem(self) -> Problem:
        return Problem(self.id, self.question, self.answer)


def _steps(node: ast.expr) -> list[Step]:
    if not isinstance(node, ast.BinOp):
        return []
    operands = [
        None if isinstance(side, ast.BinOp) else float(ast.literal_eval(side))
        for side in (node.left, node.right)
    ]
    return [*_steps(node.left), *_steps(node.right), Step(SYMBOLS[type(node.op)], *operands)]


def show(value: float) -> str:
    return f"{value:.10g}"


def load_svamp(path: Path) -> list[WordProblem]:
    """Every problem whose equation is at most two steps over numbers of its text."""
    problems = []
    for record in json.loads(path.read_text(encoding="utf-8")):
        body, asked = record["Body"].strip(), record["Question"].strip()
        joined = f"{body} {asked}" if body.endswith((".", "?", "!")) else f"{body}, {uncapitalized(asked)}"
        problem = WordProblem(record["ID"], joined, record["Equation"])
        numbers = {float(found) for found in NUMBER.findall(joined)}
        operands = {x for step in problem.steps for x in (step.a, step.b) if x is not None}
        if problem.steps and len(problem.steps) <= 2 and operands <= numbers:
            problems.append(problem)
    return problems


def families(problems: list[WordProblem]) -> list[list[WordProblem]]:
    """Variants of one story together: connected by sharing most of their words, whatever the numbers."""
    words = [frozenset(re.findall(r"[a-z]{3,}", problem.question.lower())) for problem in problems]
    family = list(range(len(problems)))
    for i in range(len(problems)):
        for j in range(i):
            if family[i] != family[j] and len(words[i] & words[j]) >= SAME_STORY * len(words[i] | words[j]):
                family = [family[j] if f == family[i] else f for f in family]
    return [[p for p, f in zip(problems, family) if f == kind] for kind in dict.fromkeys(family)]


def split(
    problems: list[WordProblem], student: int, test: int, demonstrations: int, seed: int
) -> dict[str, list[WordProblem]]:
    """Whole stories with about `student` problems for the student; the others one by one, what is left for GRPO."""
    rng, groups = random.Random(seed), families(problems)
    rng.shuffle(groups)
    own: list[WordProblem] = []
    while len(own) < student:
        own += groups.pop()
    rest = [problem for group in groups for problem in group]
    rng.shuffle(rest)
    cut = test + demonstrations
    return {"student": own, "test": rest[:test], "demonstrations": rest[test:cut], "grpo": rest[cut:]}


def renumbered(problem: WordProblem, rng: random.Random) -> WordProblem:
    """The same story with other numbers of the same length, all results of which are positive whole numbers."""
    for _ in range(200):
        fresh = {}
        for found in NUMBER.findall(problem.question):
            digits = len(found.partition(".")[0])
            fresh.setdefault(float(found), float(rng.randrange(max(2, 10 ** (digits - 1)), 10**digits)))
        if problem.steps[-1].operation == "/" and None not in (problem.steps[-1].a, problem.steps[-1].b):
            step = problem.steps[-1]
            fresh[step.a] = fresh[step.b] * rng.randrange(2, 40)
        swap = lambda match: show(fresh.get(float(match[0]), float(match[0])))
        question, equation = (NUMBER.sub(swap, text) for text in (problem.question, problem.equation))
        made = WordProblem(f"{problem.id}~", question, equation)
        if all(0 < value < 10_000 and value == int(value) for value in made.values):
            return made
    return problem


# ------------------------------------------------------------------------------------------------------------ what is said


def clause(operation: str, a: str, b: str) -> str:
    return CLAUSES[operation].format(a=a, b=b)


def detailed(steps: list[Step]) -> str:
    """ "Subtract 25 from 76." or "First add 3 and 5. Then subtract 2 from the result.": operations with numbers, never a result."""
    clauses = [clause(step.operation, *step.operands(RESULT)) for step in steps]
    return f"{clauses[0].capitalize()}." if len(clauses) == 1 else f"First {clauses[0]}. Then {clauses[1]}."


def brief(steps: list[Step]) -> str:
    """ "Subtract." or "First add, then subtract.": operations only."""
    verbs = [VERBS[step.operation] for step in steps]
    return f"{verbs[0].capitalize()}." if len(verbs) == 1 else f"First {verbs[0]}, then {verbs[1]}."


def worked(problem: WordProblem) -> str:
    """The student's answer: each operation with its result, and the last result as the solution."""
    lines, results = [], problem.values
    for index, step in enumerate(problem.steps):
        a, b = step.operands(show(results[index - 1]))
        lines.append(f"{a} {step.operation} {b} = {show(results[index])}")
    return "\n".join([*lines, f"<solution>{problem.answer}</solution>"])


def other_plan(problem: WordProblem, rng: random.Random) -> WordProblem:
    """The same text with another operation, or the numbers in another place: what wrong guidance would ask for."""
    numbers = [float(found) for found in NUMBER.findall(problem.question)]
    for _ in range(200):
        a, b, c = (show(rng.choice(numbers)) for _ in range(3))
        equation = f"{a} {rng.choice('+-*/')} {b}"
        if rng.random() < 0.3:
            equation = f"( {equation} ) {rng.choice('+-*')} {c}"
        made = replace(problem, equation=equation)
        if all(0 < value < 10_000 and value == int(value) for value in made.values):
            return made
    return problem


def sums(count: int, rng: random.Random) -> str:
    """A page of sums with their results."""
    lines = []
    for _ in range(count):
        a, b = (rng.randrange(1, 10 ** rng.choice((1, 2, 2, 3))) for _ in range(2))
        kind = rng.choice("+--*/")
        if kind in "*/":
            a, b = rng.randrange(2, 100), rng.randrange(2, rng.choice((10, 30)))
        a, b = (a * b, b) if kind == "/" else (max(a, b), min(a, b)) if kind == "-" else (a, b)
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[kind]
        lines.append(f"{a} {kind} {b} = {result}")
    return "\n".join(lines)


def student_lessons(problems: list[WordProblem], count: int, pages: int, seed: int) -> list[dict]:
    """`count` conversations about the problems and the same stories with other numbers, and `pages` of sums."""
    rng, lessons = random.Random(seed), []
    for number in range(count):
        problem = rng.choice(problems)
        problem = renumbered(problem, rng) if rng.random() < 0.8 else problem
        kind = number % 10
        plan = problem
        if kind < 3:  # alone
            messages = protocol.baseline_messages(problem.question)
        elif kind < 5:  # right guidance, in full
            messages = protocol.guided_messages(problem.question, detailed(problem.steps))
        elif kind == 5:  # right guidance, in brief
            messages = protocol.guided_messages(problem.question, brief(problem.steps))
        elif kind < 8:  # whatever operation the guidance asks for with these numbers
            plan = other_plan(problem, rng)
            messages = protocol.guided_messages(problem.question, detailed(plan.steps))
        elif kind == 8:  # guidance about another problem is of no use
            messages = protocol.guided_messages(
                problem.question, detailed(renumbered(rng.choice(problems), rng).steps)
            )
        else:
            lessons.append(chat(protocol.probe_messages(problem.question), approach_to(problem.steps)))
            continue
        lessons.append(chat(messages, worked(plan)))
    lessons += [chat(protocol.user_turn("Practise arithmetic."), sums(20, rng)) for _ in range(pages)]
    return lessons


def variants(problems: list[WordProblem], count: int, seed: int) -> list[WordProblem]:
    """`count` problems: each as it is, then with other numbers, again and again."""
    rng, made = random.Random(seed), list(problems)
    while len(made) < count:
        made.append(renumbered(problems[len(made) % len(problems)], rng))
    return [replace(problem, id=f"{problem.id}/{number}") for number, problem in enumerate(made[:count])]


def demonstration(problem: WordProblem, approach: str, number: int) -> dict:
    """What a teacher would say about the student's approach, in the fields of Arc-ATLAS-Teach-v0.

    The diagnosis reads the problem for itself, then compares. Of two teachings one names the operations with their numbers, the
    other only the operations: people differ in how much they say. Results are never named.
    """
    steps = problem.steps
    kind = " and then ".join(NOUNS[step.operation] for step in steps)
    used = ", ".join(show(x) for step in steps for x in (step.a, step.b) if x is not None)
    if is_plan_of(approach, steps):
        verdict = "The approach is right."
    elif has_operations_of(approach, steps):
        verdict = "The approach takes the wrong numbers."
    else:
        verdict = "The approach takes the wrong operation."
    diagnosis = f"This is {kind}, with {used}. {verdict}"
    teaching = detailed(steps) if number % 2 else brief(steps)
    return {
        "problem_text": problem.question,
        "student_approach": approach,
        "teacher_diagnosis": diagnosis,
        "teacher_teaching": teaching,
    }


def approach_to(steps: list[Step]) -> str:
    return f"I would {uncapitalized(detailed(steps))}"


def has_operations_of(text: str, steps: list[Step]) -> bool:
    """Whether the text names these operations in this order, with whatever numbers."""
    return re.findall("|".join(VERBS.values()), text.lower()) == [VERBS[step.operation] for step in steps]


def is_plan_of(text: str, steps: list[Step]) -> bool:
    """Whether the text names these operations with these numbers; the order of a sum or product does not matter."""
    said = " ".join(text.lower().replace(".", " ").split())
    for step in steps:
        a, b = step.operands(RESULT)
        orders = [(a, b), (b, a)] if step.operation in "+*" else [(a, b)]
        found = next((text for x, y in orders if (text := clause(step.operation, x, y)) in said), None)
        if found is None:
            return False
        said = said.partition(found)[2]
    return not any(f"{verb} " in said for verb in VERBS.values())


def uncapitalized(text: str) -> str:
    return text[:1].lower() + text[1:]


def chat(messages: protocol.Messages, answer: str) -> dict:
    return {"prompt": messages, "completion": [{"role": "assistant", "content": answer}]}
