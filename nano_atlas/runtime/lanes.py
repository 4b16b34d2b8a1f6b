"""Lanes: how much help one task gets.

    auto       the student alone
    paired     as in training: the teacher reads the student's approach and guides it; the student answers again
    coach      the teacher reviews the student's plan; the student answers with both

Every answer is judged, and the best is returned (`judges`). With --retries the teacher tries again until an answer is valid.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nano_atlas import data, episode, protocol
from nano_atlas.answers import last_json, reveals_answer, visible
from nano_atlas.config import derive_seed
from nano_atlas.reward import teaching_reward
from nano_atlas.runtime import judges, learning
from nano_atlas.runtime.options import Config
from nano_atlas.runtime.traces import Session, Trial, now
from nano_atlas.schedule import Call, Fault, Script, ask, caught
from nano_atlas.seats import Generation, Reply
from nano_atlas.text import masked

THRESHOLDS = {"auto": 0.85, "paired": 0.65}  # atlas-sdk's, least capability of the student; below both: coach
PLAN_REQUEST = 'Do not solve this yet. Plan it as JSON: {"steps": ["...", "..."]}, one step or several.'
MOST_STEPS = 16


def new_session(name: str, task: data.Problem, experience: learning.Experience, config: Config) -> Session:
    """Chooses lane and strategy by experience with this kind of task."""
    key = task.domain or "general"
    choice = choose_lane(experience.records[key], config.lane)
    session = Session(session_id=name, learning_key=key, created_at=now(), task=task, seed=config.seed)
    session.lane, session.choice, session.history = choice["mode"], choice, experience.history(key)
    session.strategy = experience.choose_strategy(key, derive_seed(config.seed, "strategy", name))
    session.experience = experience
    session.metadata = {name: masked(getattr(config, name) or "") for name in ("student", "teacher")}
    session.review = "pending" if config.require_approval else "approved"
    return session


def choose_lane(record: Sequence[float], forced: str = "adaptive") -> dict[str, Any]:
    """{mode, confidence, by} for the trace. record: latest scores of the student alone on such tasks."""
    if forced != "adaptive":
        return {"mode": forced, "confidence": None, "by": "--lane"}
    if not record:
        return {"mode": "paired", "confidence": None, "by": "no record"}
    # the mean, with a prior worth two thirds of an answer that scores 0.5
    capability = (sum(record) + 1 / 3) / (len(record) + 2 / 3)
    lane = next((lane for lane, least in THRESHOLDS.items() if capability >= least), "coach")
    return {"mode": lane, "confidence": capability, "by": "record"}


def run_session(session: Session, config: Config, count_tokens: Callable[[str], int]) -> Script:
    """Runs and returns the session; every call is recorded as an event. An internal error ends only this session."""
    script, answers = whole_session(session, config, count_tokens), None
    while True:
        try:
            calls = script.send(answers)
        except Exception as end:
            if not isinstance(end, StopIteration):
                session.fault = f"internal: {type(end).__name__}: {str(end)[:500]}"
            session.metadata["completed_at"] = now()
            return session
        answers = yield calls
        session.events += map(event_of, calls, answers)


def event_of(call: Call, answer: list[Reply] | Fault) -> dict[str, Any]:
    event = {"event": call.kind, "actor": call.seat}
    if isinstance(answer, Fault):
        return event | {"tokens": 0, "fault": str(answer)}
    event |= {name: getattr(answer[0], name) for name in ("tokens", "prompt_tokens", "is_truncated")}
    return event | {"messages": call.messages, "text": answer[0].text} if call.seat == "teacher" else event


def whole_session(session: Session, config: Config, count_tokens: Callable[[str], int]) -> Script:
    """A fault ends the lane; the trials before it still count."""
    fault = yield from caught(attempts(session, config))
    session.fault = None if fault is None else str(fault)
    if session.trials:
        session.chosen = judges.choose_trial(session.trials)
        session.reward = reward_of(session, count_tokens)
        yield from audit(session, config)
        yield from learn_skills(session, config)


def attempts(session: Session, config: Config) -> Script:
    """The student's answer alone and, unless the lane is `auto`, with help, even if it was right alone."""
    task, is_coached = session.task, session.lane == "coach"
    if is_coached:
        turn = protocol.user_turn(task.question, PLAN_REQUEST)
        ((reply,),) = yield from ask(Call("student", "plan", turn, config.answering, session.draw("plan")))
        session.plan = parse_plan(reply.text)
        session.approach = "\n".join(f"{number}. {step}" for number, step in enumerate(session.plan, start=1))
    asking = replace(config, verifier="exact")  # no verifier is asked: `add_trial` has the answers judged
    probing = asking if session.lane == "paired" else replace(asking, probe_tokens=0)
    alone = yield from episode.sketch(task, probing, session.draw)
    shown = session.approach = session.approach or alone.approach
    yield from add_trial(session, config, "alone", alone.baselines[0])
    if is_coached:
        alone.problem = replace(task, question=f"{task.question}\n\nYour plan: {session.approach}")
    for _ in range(0 if session.lane == "auto" else 1 + config.retries):
        if (yield from teaching(session, config, shown)) is None:
            continue  # the prompt would be the same as without help
        (given,) = yield from episode.guide(alone, [session.guidance], asking, session.draw)
        yield from add_trial(session, config, "coached" if is_coached else "guided", given)
        if session.trials[-1].verdict.is_valid is not False:
            return
        shown = visible(given.text).strip()


def parse_plan(text: str) -> list[str]:
    """The steps, each a text or {"description": text}. A reply without a JSON plan is one step."""
    steps = (last_json(text, "steps") or {}).get("steps")
    steps = steps if isinstance(steps, list) else []
    steps = [step.get("description") if isinstance(step, dict) else step for step in steps[:MOST_STEPS]]
    steps = [step.strip() for step in steps if isinstance(step, str) and step.strip()]
    return steps or [visible(text).strip()]


def teaching(session: Session, config: Config, shown: str) -> Script:
    """The teacher's guidance on the student's text `shown`, or None if the completion is malformed."""
    question = session.task.question
    if config.skill_writer and not session.teachings:
        seed = derive_seed(session.seed, session.session_id)
        used, session.matched = session.experience.retrieve(f"{question}\n{shown}", seed)
        session.skills = [entry.id for entry in used]
        session.advice = [entry.imperative for entry in used if entry.imperative]
        session.strategy = next((entry.strategy for entry in used if entry.strategy), session.strategy)
    style = " ".join((protocol.TEACHING_STYLES[session.strategy], *session.advice))
    messages = protocol.teacher_messages(question, shown, style)
    generation = Generation(config.teaching_tokens, config.teacher_temperature, config.top_p)
    ((reply,),) = yield from ask(Call("teacher", "teaching", messages, generation, session.draw("teaching")))
    told = protocol.parse_teaching(reply.text)
    session.is_malformed |= told is None
    session.teachings += [told] if told else []
    return told


def add_trial(session: Session, config: Config, kind: str, given: episode.Attempt) -> Script:
    trial = Trial(kind, given.text, given.answer, given.tokens, given.is_truncated)
    session.trials.append(trial)
    trial.verdict = yield from judges.judge(session, trial, config, len(session.trials) - 1)


def reward_of(session: Session, count_tokens: Callable[[str], int]) -> float | None:
    """The published reward of the session's teaching; None if a score is missing or the lane has no teacher."""
    alone, helped, gold = session.trials[0].score, session.helped, session.task.answer
    session.is_leak = gold is not None and any(reveals_answer(told, gold) for told in session.teachings)
    is_unscored = alone is None or (helped is not None and helped.score is None)
    if session.fault is not None or session.lane == "auto" or is_unscored:
        return None
    length = sum(count_tokens(told) for told in session.teachings)
    reward = teaching_reward(alone, helped and helped.score, length, session.is_leak)
    credit = helped and helped.verdict.helpfulness
    return reward * credit if credit is not None and reward > 0 else reward


def audit(session: Session, config: Config) -> Script:
    """For a share of the judged sessions: judges the returned answer and the student's own once more."""
    alone, returned = session.trials[0], session.trials[session.chosen]
    is_drawn = derive_seed(session.seed, session.session_id, "audit") < config.audit * 2**63
    if returned is not alone and returned.verdict.by == "judges" and is_drawn:
        try:
            own = yield from judges.judge(session, alone, config, "audit", alone.kind)
            new = yield from judges.judge(session, returned, config, "audit", returned.kind)
        except Fault:  # no reply from the judges
            return
        if None not in (own.score, new.score):
            session.audited_gain = new.score - own.score


def learn_skills(session: Session, config: Config) -> Script:
    """Asks the skill writer about a session with a high reward. Its faults do not fail the session."""
    if config.skill_writer is None or (session.reward or 0.0) < learning.SKILL_REWARD:
        return
    told = {"task": session.task.question, "approach": session.approach, "guidance": session.guidance}
    messages = protocol.request_json(learning.SKILL_REQUEST, **told, reward=session.reward)
    seed = derive_seed(session.seed, session.session_id, "skills")
    (answer,) = yield [Call("skill writer", "skills", messages, Generation(500, 0.2), seed)]
    if not isinstance(answer, Fault):
        session.learned = learning.read_entries(answer[0].text, session.task.answer)
