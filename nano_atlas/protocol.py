"""The teaching protocol: every prompt, every tag, and how texts are read back. Training, runtime and evaluation all use this file.

    probe     student   question                        -> how it would approach the problem
    baseline  student   question                        -> its answer alone, in <solution></solution>
    teaching  teacher   question + approach             -> <thinking>diagnosis</thinking> <teaching>guidance</teaching>
    guided    student   question + guidance             -> its answer again, in the same format

Only the question, the approach and the guidance ever enter a prompt; no function here takes the gold answer except the two
that judge finished text (`is_correct`, `reveals_answer`). Texts are inserted as values, so braces and tags in them are inert.
"""

import re
from decimal import Decimal

Messages = list[dict[str, str]]

ANSWER_FORMAT = "Solve step by step. Give the final answer in <solution></solution>."
PROBE_REQUEST = "Before solving, describe your approach in brief."
TEACHER_REQUEST = (
    "Diagnose the approach in <thinking></thinking>, then guide the student in <teaching></teaching>. {style} Never state the answer."
)
TEACHING_STYLES = {
    "adaptive": "Be brief if the approach is right, detailed if it is wrong.",
    "concise": "Be brief.",
    "detailed": "Be detailed.",
}


def _user(*paragraphs: str) -> Messages:
    return [{"role": "user", "content": "\n\n".join(paragraphs)}]


def probe_messages(question: str) -> Messages:
    return _user(question, PROBE_REQUEST)


def baseline_messages(question: str) -> Messages:
    return _user(question, ANSWER_FORMAT)


def teacher_messages(question: str, approach: str, style: str = "adaptive") -> Messages:
    """The policy's prompt. `style` is a key of TEACHING_STYLES, or a sentence of your own."""
    request = TEACHER_REQUEST.replace("{style}", TEACHING_STYLES.get(style, style))
    return _user(question, f"Student's approach: {approach}", request)


def guided_messages(question: str, teaching: str | None) -> Messages:
    """Without a teaching (None) the student gets exactly its baseline prompt."""
    if teaching is None:
        return baseline_messages(question)
    return _user(question, f"Teacher's guidance: {teaching}", ANSWER_FORMAT)


def guided_system_prompt(system_prompt: str, teaching: str | None) -> str:
    """The same for a student in a dialogue, whose turns are not the teacher's to write in."""
    return system_prompt if teaching is None else f"{system_prompt}\n\nTeacher's guidance: {teaching}"


def teacher_target(diagnosis: str, teaching: str) -> str:
    """What the teacher should write; the completion of a demonstration."""
    return f"<thinking>{diagnosis.strip()}</thinking>\n<teaching>{teaching.strip()}</teaching>"


def visible(completion: str) -> str:
    """The completion without a reasoning model's leading <think>…</think> block, and without one that never closes."""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def parse_teaching(completion: str) -> str | None:
    """The guidance for the student, or None if the completion has no closed, non-empty <teaching> tag.

    Tags inside <thinking>, closed or not, do not count, and nothing else of the completion is ever passed on: handing the
    student the whole text when the tag is missing, as the published code does, rewards the teacher for leaking its reasoning.
    """
    text = visible(completion).rpartition("</thinking>")[2].partition("<thinking>")[0]
    match = re.search(r"<teaching>(.*?)</teaching>", text, re.DOTALL)
    return (match[1].strip() or None) if match else None


def extract_answer(completion: str) -> str | None:
    """The last <solution> of the visible text, else its last \\boxed{}, else None (no guessing from loose numbers)."""
    text = visible(completion)
    # from the nearest opening tag, because a text may speak of the tag before it uses it
    solutions = re.findall(r"<solution>((?:(?!<solution>).)*?)</solution>", text, re.DOTALL)
    answer = solutions[-1] if solutions else text
    boxed = _last_boxed(answer)
    if boxed is None and not solutions:
        return None
    return (answer if boxed is None else boxed).strip() or None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for index in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : index]
    return None


DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # with thousands separators or without; "3,18" is two numbers


def _number(text: str) -> Decimal | None:
    plain = text.strip().strip("$").removesuffix(".").removesuffix("%").strip()
    return Decimal(plain.replace(",", "")) if re.fullmatch(rf"[+-]?({DIGITS}(\.\d*)?|\.\d+)", plain) else None


def answer_key(answer: str) -> Decimal | tuple[str, ...]:
    """What two equal answers have in common: the number ("016" = 16, "1,000" = 1000), else the case-folded words."""
    value = _number(answer)
    return tuple(answer.casefold().strip(" .").split()) if value is None else value


def is_correct(answer: str | None, gold: str) -> bool:
    return answer is not None and answer_key(answer) == answer_key(gold)


def reveals_answer(teaching: str, gold: str) -> bool:
    """Whether the gold answer stands anywhere in the teaching: as a number of equal value, or as whole words.

    Deliberately strict: a number of the question that happens to equal the answer counts too.
    """
    value = _number(gold)
    if value is not None:
        # a sign right behind a word is a minus between two numbers, or a hyphen
        numbers = re.findall(rf"(?:(?<![\w)\]])[+-])?(?:{DIGITS}(?:\.\d+)?|\.\d+)", teaching)
        return any(_number(found) == value for found in numbers)
    words = re.escape(" ".join(gold.casefold().strip(" .").split()))
    return re.search(rf"(?<!\w){words}(?!\w)", " ".join(teaching.casefold().split())) is not None
