"""Whole runs of the runtime with small fake models.

The fake student knows the right answers by heart (no prompt holds them): it is right alone where the question says `easy`, and
with guidance it does what the guidance says: HELP makes it right, HARM makes it wrong.
"""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import runtime_loop
from nano_atlas.data import Problem
from nano_atlas.protocol import PROBE_REQUEST, TEACHING_STYLES
from nano_atlas.runtime.traces import read_traces
from nano_atlas.seats import Reply
from runtime_loop import Config

TASKS = [
    Problem(f"t{i}", f"Task {i} is {'easy' if i % 3 == 0 else 'hard'}.", f"gold{i}", "math")
    for i in range(23)
]


class Fake:
    """A seat that keeps every prompt it was shown."""

    is_batched = True

    def __init__(self):
        self.prompts = []

    def ask(self, questions, progress=None):
        self.prompts += [json.dumps(question.messages) for question in questions]
        replies = [self.reply(question.messages[-1]["content"], question.seed) for question in questions]
        return [[Reply(text, len(text.split()), False)] for text in replies]

    def count_tokens(self, text):
        return len(text.split())


class Student(Fake):
    def __init__(self, tasks=TASKS):
        super().__init__()
        self.answers = {task.question: task.answer for task in tasks}

    def reply(self, prompt, seed):
        question, _, rest = prompt.partition("\n\n")
        if rest == PROBE_REQUEST:
            return "I would guess."
        is_right = "HELP" in rest or ("easy" in question and "HARM" not in rest)
        return f"Thus <solution>{self.answers[question] if is_right else 'nonsense'}</solution>"


class Teacher(Fake):
    def __init__(self, text="<thinking>private</thinking><teaching>HELP yourself</teaching>"):
        super().__init__()
        self.text = text

    def reply(self, prompt, seed):
        return self.text


class StyledTeacher(Teacher):
    """Helps when it is asked to be brief, harms when it is asked for details, else says nothing of use."""

    def reply(self, prompt, seed):
        kind = {
            TEACHING_STYLES["concise"]: "HELP",
            TEACHING_STYLES["detailed"]: "HARM",
            TEACHING_STYLES["adaptive"]: "Well.",
        }
        word = next(word for sentence, word in kind.items() if f"</teaching>. {sentence} Never" in prompt)
        return f"<teaching>{word}</teaching>"


def run(config, tasks, student, teacher, **others):
    return runtime_loop.run(config, tasks, {"student": student, "teacher": teacher, **others})


def traces_at(path) -> list[dict]:
    return [trace for _, trace in read_traces(Path(path))]


def traces_of(config: Config) -> list[dict]:
    return traces_at(config.out / "traces.jsonl")


def timeless(records: list) -> list:
    """Traces, or outcomes, without the times."""
    for trace in records:
        if isinstance(trace, dict):
            del trace["session_metadata"]["created_at"], trace["session_metadata"]["completed_at"]
            del trace["outcome"]["created_at"]
    return [record if isinstance(record, dict) else replace(record, created_at="") for record in records]


def in_a_process_that_dies(function) -> int:
    """Run it in a process of its own; its exit code is -9 after kill -9."""
    child = multiprocessing.get_context("fork").Process(target=function)
    child.start()
    child.join(30)
    return child.exitcode
