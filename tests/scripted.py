"""Students, teachers and judges that follow a rule, and single sessions with them."""

import json

from nano_atlas.data import Problem
from nano_atlas.errors import UserError
from nano_atlas.protocol import PROBE_REQUEST
from nano_atlas.runtime.lanes import PLAN_REQUEST, run_session
from nano_atlas.runtime.options import Config
from nano_atlas.runtime.traces import Session
from nano_atlas.schedule import drive
from nano_atlas.seats import Reply

TASK = Problem("t", "What is {6} times 7?", "42", "math")


class Seat:
    """Replies `rule(prompt, seed)`; None is an outage. Remembers prompts, and temperatures."""

    is_batched = False

    def __init__(self, rule):
        self.rule, self.prompts, self.temperatures = rule, [], []

    def ask(self, questions, progress=None):
        return [[self.reply(*question)] for question in questions]

    def reply(self, messages, generation, seed, n):
        self.prompts.append(messages[-1]["content"])
        self.temperatures.append(generation.temperature)
        text = self.rule(messages[-1]["content"], seed)
        if text is None:
            raise UserError("HTTP 503")
        return Reply(text, len(text.split()), False, None, 3)


def finish(script, **seats):
    ((result,),) = [list(group.values()) for group in drive({0: script}, seats, workers=1)]
    return result


def words(text) -> int:
    return len(text.split())


def run(lane, task=TASK, config=Config(), **seats) -> Session:
    return finish(run_session(Session(session_id="s", task=task, seed=1, lane=lane), config, words), **seats)


def answer(text) -> str:
    return f"<solution>{text}</solution>"


def student(right_if=()):
    """Right where the prompt holds one of the words; its plan has three steps."""

    def rule(prompt, seed):
        if PROBE_REQUEST in prompt:
            return "I would add."
        if PLAN_REQUEST in prompt:
            return 'Here: {"steps": ["do a", {"description": "do b"}, "do c"]}'
        return answer("42" if any(word in prompt for word in right_if) else "41")

    return Seat(rule)


def teacher(*texts):
    replies = iter(texts)
    return Seat(lambda prompt, seed: next(replies))


def verdict_json(score, uncertainty=0.0, **more):
    return json.dumps(
        {"principles": [], "rationale": "because {}", "score": score, "uncertainty": uncertainty, **more}
    )
