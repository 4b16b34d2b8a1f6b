"""Lanes: how much help one task gets. Each is a script for `sessions.drive` that reads from top to bottom.

    auto       the student alone
    paired     the teacher reads the student's approach and guides it; the student answers again
    coach      the student writes a plan; the teacher reviews it; the student answers with plan and review
    escalate   plan, review and revision as in coach; then every step is carried out by itself, after those it depends on, and
               judged by itself; the results are put together

All begin with the student's own answer, validate *every* answer (`judges`), try again up to --retries times with all guidance so
far while none is valid, and return the best one (`guard`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nano_atlas import protocol
from nano_atlas.config import option
from nano_atlas.data import Problem, derive_seed
from nano_atlas.episode import EpisodeConfig
from nano_atlas.reward import RewardConfig, teaching_reward
from nano_atlas.runtime.capability import LANES, choose_lane
from nano_atlas.runtime.guard import GuardConfig, Trial, choose_trial
from nano_atlas.runtime.judges import Calls, Exhibit, JudgeConfig, Verdict, ensemble, judge
from nano_atlas.runtime.playbook import Playbook, SkillConfig, read_entries
from nano_atlas.runtime.sessions import Call, Fault
from nano_atlas.seats import Generation

UNJUDGED = Verdict(None, "nobody")


@dataclass(frozen=True)
class LaneConfig(RewardConfig, EpisodeConfig, JudgeConfig, GuardConfig, SkillConfig):
    lane: str = option(
        "adaptive",
        "how much help a task gets; adaptive: by the student's record",
        ("adaptive", *LANES),
        group="lanes",
    )
    retries: int = option(
        0, "further teachings and answers while none is valid (per step in the lane escalate)"
    )
    probe: str | None = option(
        None, "checkpoint, URL or agent that chooses the lane; none: by the thresholds on the record"
    )
    probe_model: str | None = option(None, "model name at its URL (none: the first it serves)")

    def check(self) -> None:
        JudgeConfig.check(self)
        GuardConfig.check(self)


@dataclass
class Session:
    """One task on its way through a lane."""

    id: str
    task: Problem
    seed: int
    style: str = "adaptive"  # how the teacher is asked to teach: a key of protocol.TEACHING_STYLES
    learning_key: str = "general"  # the kind of task; experience is kept by kind
    created_at: str = ""
    playbook: Playbook | None = None
    matched: list[str] = field(default_factory=list)  # ids of the skills whose cue applies
    skills: list[str] = field(default_factory=list)  # and of those that were used
    advice: list[str] = field(default_factory=list)  # their sentences
    learned: list[dict] = field(default_factory=list)  # skills that this session taught
    lane: str = ""
    choice: dict[str, Any] = field(default_factory=dict)  # {mode, confidence, by} of the lane
    approach: str = ""
    plan: list[dict] = field(default_factory=list)
    steps: list[dict] = field(
        default_factory=list
    )  # executed ones: plan step, output, verdict, attempts, guidance
    teachings: list[str] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # who spoke, in which order, tokens each
    chosen: int = 0
    audited_gain: float | None = None  # returned minus alone, judged anew
    is_malformed: bool = False  # a teacher's completion without <teaching>
    is_leak: bool = False
    reward: float | None = None  # None: unscored
    fault: str | None = None

    @property
    def helped(self) -> Trial | None:
        """The trial that stands for the teaching: the best with help, by score; None where there was none."""
        return max(self.trials[1:], key=lambda trial: trial.verdict.score or 0.0, default=None)


# ------------------------------------------------------------------------------------------------------- one task, whole


def run_session(
    session: Session, config: LaneConfig, record: Sequence[float], count_tokens: Callable[[str], int]
) -> Calls:
    """Brings the session to its end; every call of it leaves an event. record: see `capability`; count_tokens: of teachings.

    A fault ends its lane; what was reached until then counts all the same.
    """
    script, replies = whole_session(session, config, record, count_tokens), None
    while True:
        try:
            calls = script.send(replies)
        except StopIteration:
            return session
        replies = yield calls
        for call, reply in zip(calls, replies):
            event = {"event": call.kind, "actor": call.seat, "tokens": 0}
            if isinstance(reply, Fault):
                event["fault"] = str(reply)
            else:
                event |= {
                    "tokens": reply.tokens,
                    "prompt_tokens": reply.prompt_tokens,
                    "is_truncated": reply.is_truncated,
                }
                event |= {"text": reply.text} if call.seat == "teacher" else {}
            session.events.append(event)


def whole_session(
    session: Session, config: LaneConfig, record: Sequence[float], count_tokens: Callable[[str], int]
) -> Calls:
    try:
        seed = derive_seed(session.seed, session.id, "capability")
        session.choice = yield from choose_lane(
            session.task.question, record, config.lane, config.probe is not None, seed
        )
        session.lane = session.choice["mode"]
        yield from {"auto": auto, "paired": paired, "coach": coach, "escalate": escalate}[session.lane](
            session, config
        )
    except Fault as fault:
        session.fault = str(fault)
    if session.trials:
        session.chosen = choose_trial(session.trials, config.confidence)
        session.reward = reward_of(session, config, count_tokens)
        yield from audit(session, config)
        yield from learn_skills(session, config)


def ask(*calls: Call) -> Calls:
    """The replies to all calls; raises the first Fault among them."""
    replies = yield list(calls)
    for reply in replies:
        if isinstance(reply, Fault):
            raise reply
    return replies


def student(
    session: Session, config: LaneConfig, kind: str, messages: protocol.Messages, tokens: int | None = None
) -> Call:
    generation = Generation(tokens or config.answer_tokens, config.student_temperature, config.top_p)
    return Call(
        "student",
        kind,
        messages,
        generation,
        derive_seed(session.seed, session.id, kind, len(session.events)),
    )


# ---------------------------------------------------------------------------------------------------------- the lanes


def auto(session: Session, config: LaneConfig) -> Calls:
    (alone,) = yield from ask(
        student(session, config, "alone", protocol.baseline_messages(session.task.question))
    )
    yield from validate(session, config, "alone", alone)


def paired(session: Session, config: LaneConfig) -> Calls:
    question = session.task.question
    probe, alone = yield from ask(
        student(session, config, "probe", protocol.probe_messages(question), config.probe_tokens),
        student(session, config, "alone", protocol.baseline_messages(question)),
    )
    session.approach = probe.text
    yield from validate(session, config, "alone", alone)
    yield from with_help(
        session, config, "guided", lambda guidance: protocol.guided_messages(question, guidance)
    )


def coach(session: Session, config: LaneConfig) -> Calls:
    yield from plan_and_answer(session, config)
    yield from with_help(
        session,
        config,
        "coached",
        lambda guidance: protocol.coached_messages(session.task.question, session.plan, guidance),
    )


def escalate(session: Session, config: LaneConfig) -> Calls:
    question = session.task.question
    yield from plan_and_answer(session, config)
    review = yield from teach(session, config, session.approach)
    if review is not None:
        revision = protocol.plan_messages(question, session.plan, review)
        (revised,) = yield from ask(student(session, config, "revision", revision))
        session.plan = protocol.parse_plan(revised.text)
    results: dict[int, str] = {}
    while len(results) < len(
        session.plan
    ):  # dependencies point backwards, so at least one step is ready each time
        ready = [s for s in session.plan if s["id"] not in results and set(s["depends_on"]) <= set(results)]
        done = yield from carry_out(session, config, ready, results)
        session.steps += done
        results |= {step["id"]: step["output"] for step in done}
    synthesis = protocol.synthesis_messages(question, session.plan, results)
    (final,) = yield from ask(student(session, config, "synthesis", synthesis))
    yield from validate(session, config, "stepwise", final)


# ------------------------------------------------------------------------------------------------------- their parts


def plan_and_answer(session: Session, config: LaneConfig) -> Calls:
    question = session.task.question
    plan, alone = yield from ask(
        student(session, config, "plan", protocol.plan_messages(question)),
        student(session, config, "alone", protocol.baseline_messages(question)),
    )
    session.plan = protocol.parse_plan(plan.text)
    session.approach = protocol.show_plan(session.plan)
    yield from validate(session, config, "alone", alone)


def validate(session: Session, config: LaneConfig, kind: str, reply: Any) -> Calls:
    """Adds the trial to the session, with its verdict."""
    trial = Trial(
        kind, reply.text, protocol.extract_answer(reply.text), reply.tokens, reply.is_truncated, UNJUDGED
    )
    trial.verdict = yield from judge(
        exhibit_of(session, trial), config, (session.seed, session.id, len(session.trials))
    )
    session.trials.append(trial)


def exhibit_of(session: Session, trial: Trial) -> Exhibit:
    guidance = "" if trial.kind == "alone" else "\n".join(session.teachings)
    return Exhibit(session.task, trial.text, trial.answer, session.approach, guidance)


def teach(session: Session, config: LaneConfig, shown: str) -> Calls:
    """The teacher's guidance on what the student has `shown`, or None where its completion holds none."""
    if session.playbook is not None and not session.teachings:
        used, session.matched = session.playbook.retrieve(
            f"{session.task.question}\n{shown}", derive_seed(session.seed, session.id)
        )
        session.skills = [entry.id for entry in used]
        session.advice = [entry.action["imperative"] for entry in used if entry.action["imperative"]]
        session.style = next(
            (entry.action["strategy"] for entry in used if entry.action["strategy"]), session.style
        )
    style = " ".join((protocol.TEACHING_STYLES[session.style], *session.advice))
    messages = protocol.teacher_messages(session.task.question, shown, style)
    generation = Generation(config.teaching_tokens, config.teacher_temperature, config.top_p)
    seed = derive_seed(session.seed, session.id, "teaching", len(session.events))
    (reply,) = yield from ask(Call("teacher", "teaching", messages, generation, seed))
    teaching = protocol.parse_teaching(reply.text)
    if teaching is None:
        session.is_malformed = True
    else:
        session.teachings.append(teaching)
    return teaching


def with_help(
    session: Session, config: LaneConfig, kind: str, messages_for: Callable[[str], protocol.Messages]
) -> Calls:
    """Teaching and answer; again while no answer with help is valid, now on the failed answer and with all guidance so far.

    The first teaching is given also to a student that was right alone: what it does then is part of its worth.
    """
    shown = session.approach
    for _ in range(1 + config.retries):
        teaching = yield from teach(session, config, shown)
        if teaching is None:  # the student would get its own prompt again
            continue
        guidance = "\n".join(session.teachings)
        (reply,) = yield from ask(student(session, config, kind, messages_for(guidance)))
        yield from validate(session, config, kind, reply)
        if session.trials[-1].verdict.is_valid is not False:
            return
        shown = protocol.visible(reply.text).strip()


def carry_out(session: Session, config: LaneConfig, steps: Sequence[dict], results: dict[int, str]) -> Calls:
    """Executes steps that are ready, together; each is judged, and tried again with the judge's guidance while it is not valid."""
    done = [{**step, "output": "", "verdict": None, "attempts": 0, "guidance": []} for step in steps]
    question, seat = session.task.question, "judge" if config.judge else "teacher"
    best: dict[int, tuple[str, Verdict]] = {}
    for _ in range(1 + config.retries):
        open_steps = [s for s in done if s["id"] not in best or best[s["id"]][1].is_valid is False]
        if not open_steps:
            break
        prior = {s["id"]: {i: results[i] for i in s["depends_on"]} for s in open_steps}
        calls = [
            student(
                session,
                config,
                f"step {s['id']}",
                protocol.step_messages(question, s, prior[s["id"]], s["guidance"]),
            )
            for s in open_steps
        ]
        replies = yield from ask(*calls)
        for step, reply in zip(open_steps, replies):
            step["attempts"] += 1
            output = protocol.extract_answer(reply.text) or protocol.visible(reply.text).strip()
            verdict = yield from ensemble(
                ["step"],
                config,
                (session.seed, session.id, step["id"], step["attempts"]),
                seat,
                task=question,
                step=step["description"],
                results_so_far={str(i): text for i, text in prior[step["id"]].items()},
                result=output,
            )
            if step["id"] not in best or (verdict.score or 0.0) > (best[step["id"]][1].score or 0.0):
                best[step["id"]] = (output, verdict)
            if verdict.guidance:
                step["guidance"].append(verdict.guidance)
    for step in done:
        step["output"], step["verdict"] = best[step["id"]]
    return done


def reward_of(session: Session, config: LaneConfig, count_tokens: Callable[[str], int]) -> float | None:
    """The published reward of the session's teaching (`reward`), or None where a score is missing or nothing was taught."""
    alone, helped, gold = session.trials[0].verdict, session.helped, session.task.answer
    session.is_leak = gold is not None and any(
        protocol.reveals_answer(told, gold) for told in session.teachings
    )
    if session.fault is not None or alone.score is None or session.lane == "auto":
        return None
    if (
        helped is None or not session.teachings
    ):  # no <teaching>: the student's own success is not the teacher's merit
        return -config.malformed_penalty
    if helped.verdict.score is None:
        return None
    length = sum(count_tokens(told) for told in session.teachings)
    reward = teaching_reward(alone.score, helped.verdict.score, length, session.is_leak, config)
    credit = helped.verdict.helpfulness
    return reward * credit if credit is not None and reward > 0 else reward


def audit(session: Session, config: LaneConfig) -> Calls:
    """Judges a returned answer with help and the student's own once more, for a share of the judged sessions."""
    returned, alone = session.trials[session.chosen], session.trials[0]
    is_drawn = derive_seed(session.seed, session.id, "audit") < config.audit * 2**63
    if session.chosen == 0 or returned.verdict.by != "judges" or not is_drawn:
        return
    scores = []
    for trial in (alone, returned):
        scores.append(
            (
                yield from judge(
                    exhibit_of(session, trial), config, (session.seed, session.id, "audit", trial.kind)
                )
            ).score
        )
    if None not in scores:
        session.audited_gain = scores[1] - scores[0]


def learn_skills(session: Session, config: LaneConfig) -> Calls:
    """What the skill writer makes of a session that went well."""
    if config.skill_writer is None or session.reward is None or session.reward < config.skill_reward:
        return
    guidance = "\n".join(session.teachings)
    messages = protocol.skill_messages(session.task.question, session.approach, guidance, session.reward)
    seed = derive_seed(session.seed, session.id, "skills")
    try:
        (reply,) = yield from ask(Call("skill writer", "skills", messages, Generation(500, 0.2), seed))
    except Fault:
        return  # recorded among the events; the session itself went well
    session.learned = read_entries(reply.text, session.learning_key, session.id, session.task.answer)
