"""The teaching protocol: every prompt and every tag. Training, runtime and evaluation all use this file.

    probe     student   question                        -> how it would approach the problem
    baseline  student   question                        -> its answer alone, in the format of --answer-format
    teaching  teacher   question + approach             -> <thinking>diagnosis</thinking> <teaching>guidance</teaching>
    guided    student   question + guidance             -> its answer again, in the same format

No prompt that is sampled from holds the gold answer (answers.py compares finished texts with it). Only the reference
of `--kl privileged`, which is never sampled, reads the solution. Braces in inserted texts are safe.
"""

import json
from typing import Any

from nano_atlas.answers import tagged, visible

Messages = list[dict[str, str]]

ANSWER_FORMATS = {
    "solution": "Solve step by step. Give the final answer in <solution></solution>.",
    "boxed": "Solve step by step. Give the final answer in \\boxed{}.",
    "last-number": "Solve step by step. End with the final answer, a number.",
}
PROBE_REQUEST = "Before solving, describe your approach in brief."
TEACHER_REQUEST = "Diagnose the approach in <thinking></thinking>, then guide the student in <teaching></teaching>. {style} Never state the answer."
TEACHING_STYLES = {
    "adaptive": "Be brief if the approach is right, detailed if it is wrong.",
    "concise": "Be brief.",
    "detailed": "Be detailed.",
}


def user_turn(*paragraphs: str) -> Messages:
    return [{"role": "user", "content": "\n\n".join(paragraphs)}]


def probe_messages(question: str) -> Messages:
    return user_turn(question, PROBE_REQUEST)


def baseline_messages(question: str, answer_format: str = "solution") -> Messages:
    return user_turn(question, ANSWER_FORMATS[answer_format])


def teacher_messages(question: str, approach: str, style: str = "adaptive") -> Messages:
    """The policy's prompt. style: a key of TEACHING_STYLES, or any other sentence."""
    request = TEACHER_REQUEST.replace("{style}", TEACHING_STYLES.get(style, style))
    return user_turn(question, f"Student's approach: {approach}", request)


def privileged_messages(messages: Messages, solution: str) -> Messages:
    """A prompt with the solution in it, for a reference that only scores what the policy wrote without it."""
    (turn,) = messages
    return user_turn(f"Solution, for you only: {solution}", turn["content"])


def guided_messages(question: str, teaching: str | None, answer_format: str = "solution") -> Messages:
    """Without a teaching (None) the student gets exactly its baseline prompt."""
    if teaching is None:
        return baseline_messages(question, answer_format)
    return user_turn(question, f"Teacher's guidance: {teaching}", ANSWER_FORMATS[answer_format])


def guided_system_prompt(system_prompt: str, teaching: str | None) -> str:
    """For a student in a dialogue: the teaching is added to its system prompt, not to the user's turns."""
    return system_prompt if teaching is None else f"{system_prompt}\n\nTeacher's guidance: {teaching}"


def teacher_target(diagnosis: str | None, teaching: str) -> str:
    """The teacher's completion in a demonstration; without <thinking> where its diagnosis is not known (None)."""
    thinking = "" if diagnosis is None else f"<thinking>{diagnosis.strip()}</thinking>\n"
    return f"{thinking}<teaching>{teaching.strip()}</teaching>"


def parse_teaching(completion: str) -> str | None:
    """The guidance for the student: the first closed, non-empty <teaching> outside <thinking>, or None.

    The published code falls back to the whole text; that would reward the teacher for leaking its reasoning.
    """
    text = visible(completion).rpartition("</thinking>")[2].partition("<thinking>")[0]
    return next(iter(tagged(text, "teaching")), None)


def request_json(instruction: str, **fields: Any) -> Messages:
    """Untrusted texts are JSON values, so that quotes, braces and tags in them cannot end their field."""
    return user_turn(instruction, json.dumps(fields, indent=1, ensure_ascii=False))
