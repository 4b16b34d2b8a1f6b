"""One simulation of τ²-bench by its official package: tasks, tools, orchestrator, user simulator and scores are tau2's own.

What is replaced is the function through which tau2 asks a language model: `generate` sends the same messages and tools to one
of our seats. What is added is the teacher, once per dialogue, when the student has read the first message of the user (in solo
mode: the ticket):

    probe     student   its system prompt + the opening                       ->  how it would approach the case
    teaching  TEACHER   policy + names of the tools + opening + approach      ->  guidance, appended to the student's system prompt

Neither can see what a task is scored by: an agent is built from tools and policy alone, and in solo mode from a task in which
nothing but the ticket is left. This file imports tau2 (v1.0.1) and is imported only where that is installed.
"""

import json
import re
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import tau2.agent.llm_agent
import tau2.user.user_simulator
from tau2.agent.llm_agent import LLMAgent, LLMSoloAgent
from tau2.data_model.message import AssistantMessage, SystemMessage, ToolCall, ToolMessage, UserMessage
from tau2.data_model.simulation import RewardInfo, SimulationRun, TerminationReason
from tau2.data_model.tasks import InitialState, Task
from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation
from tau2.orchestrator.orchestrator import Orchestrator
from tau2.runner import build_environment, build_user, run_simulation
from tau2.user.user_simulator import DummyUser
from tau2.utils.llm_utils import to_litellm_messages, validate_message_history
from tau2.utils.utils import get_now

from nano_atlas import protocol
from nano_atlas.data import derive_seed
from nano_atlas.episode import EpisodeConfig
from nano_atlas.errors import UserError
from nano_atlas.seats import EndpointSeat, Generation, Question, Reply, Seat

# ----------------------------------------------------------------------------------------------- from tau2 to a seat and back


@dataclass
class Turn:
    """What a model says in a dialogue: text, calls of tools (name, arguments as JSON), or both."""

    text: str
    calls: list[tuple[str, str]]
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class Model:
    """What tau2 is given as an agent's or user's `llm`: a URL, whose server parses calls of tools."""

    seat: EndpointSeat
    generation: Generation

    def say(self, messages: list[dict], tools: list[dict] | None, tool_choice: str | None, seed: int) -> Turn:
        """messages, tools and tool_choice as in OpenAI's chat completions. Raises UserError."""
        body = {
            "model": self.seat.model,
            "messages": messages,
            "max_tokens": self.generation.max_tokens,
            "seed": seed % 2**31,
            "temperature": self.generation.temperature,
            "top_p": self.generation.top_p,
        }
        body |= {"tools": tools, "tool_choice": tool_choice} if tools else {}
        answer = self.seat.client.request("POST", "/v1/chat/completions", body)
        message, usage = answer["choices"][0]["message"], answer.get("usage") or {}
        calls = [
            (call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls") or []
        ]
        return Turn(
            message.get("content") or "",
            calls,
            usage.get("prompt_tokens", 0),
            usage.get("completion_tokens", 0),
        )


class DialogueEnd(Exception):
    """A seat ended the dialogue by what it did, or could not be reached: a failed simulation, never a crash. usage: tokens of
    the turn that did."""

    def __init__(self, reason: TerminationReason, message: str, usage: dict[str, int] | None = None):
        super().__init__(message)
        self.reason, self.usage = reason, usage


def generate(
    model: Model, messages, tools=None, tool_choice=None, call_name=None, seed=0, **_
) -> AssistantMessage:
    """Stands in for tau2.utils.llm_utils.generate. Text of a reasoning block is dropped: it reaches neither user nor history.

    Raises DialogueEnd for a turn with neither text nor call, for a call whose arguments are no JSON object, for a dialogue that
    has outgrown the model's context, and for a seat that does not answer.
    """
    validate_message_history(messages)
    fault = (
        TerminationReason.USER_ERROR
        if call_name == "user_simulator_response"
        else TerminationReason.AGENT_ERROR
    )
    wire = [
        {key: value for key, value in message.items() if value is not None}
        for message in to_litellm_messages(messages)
    ]
    schemas = [tool.openai_schema for tool in tools] if tools else None
    choice = (tool_choice or "auto") if schemas else None
    try:
        turn = model.say(wire, schemas, choice, derive_seed(seed, len(messages)))
    except UserError as error:
        is_too_long = re.search("context length|max_position_embeddings", str(error)) is not None
        reason = (
            TerminationReason.CONTEXT_WINDOW_EXCEEDED
            if is_too_long
            else TerminationReason.INFRASTRUCTURE_ERROR
        )
        raise DialogueEnd(reason, str(error)) from error
    text, calls = protocol.visible(turn.text).strip(), []
    usage = {"prompt_tokens": turn.prompt_tokens, "completion_tokens": turn.tokens}
    for index, (name, arguments) in enumerate(turn.calls):
        try:
            calls.append(
                ToolCall(id=f"call_{len(messages)}_{index}", name=name, arguments=json.loads(arguments))
            )
        except ValueError as error:
            raise DialogueEnd(fault, f"malformed call of {name}: {arguments[:200]}", usage) from error
    if not text and not calls or tool_choice == "required" and not calls:
        raise DialogueEnd(fault, f"no text and no call of a tool in {turn.text[:200]!r}", usage)
    return AssistantMessage(
        role="assistant", content=text or None, tool_calls=calls or None, cost=0.0, usage=usage
    )


tau2.agent.llm_agent.generate = tau2.user.user_simulator.generate = generate


# ---------------------------------------------------------------------------------------------------------------- the teacher


@dataclass(frozen=True)
class Guidance:
    """What a teacher made of a dialogue's opening; lengths in generated tokens."""

    approach: str = ""
    approach_tokens: int = 0
    teacher_text: str = ""
    teacher_tokens: int = 0
    is_teacher_truncated: bool = False
    teaching: str | None = (
        None  # None: no well-formed teaching, and the student's prompt stays the official one
    )


Guide = Callable[
    [str, str, list[str], str, int], Guidance
]  # system prompt, policy, names of tools, opening, seed


def teacher_guide(student: Seat, teacher: Seat, config: EpisodeConfig) -> Guide:
    """A guide that many threads may ask; a teacher in this process serves them one at a time."""
    lock = nullcontext() if isinstance(teacher, EndpointSeat) else threading.Lock()

    def ask(seat: Seat, messages: protocol.Messages, tokens: int, temperature: float, seed: int) -> Reply:
        with lock if seat is teacher else nullcontext():
            return seat.ask([Question(messages, Generation(tokens, temperature, config.top_p), seed)])[0][0]

    def guide(system_prompt: str, policy: str, tools: list[str], opening: str, seed: int) -> Guidance:
        probe = [{"role": "system", "content": system_prompt}, *protocol.probe_messages(opening)]
        approach = ask(
            student, probe, config.probe_tokens, config.student_temperature, derive_seed(seed, "probe")
        )
        question = f"{policy}\n\nTools: {', '.join(tools)}\n\nUser: {opening}"
        prompt = protocol.teacher_messages(question, protocol.visible(approach.text).strip())
        reply = ask(
            teacher, prompt, config.teaching_tokens, config.teacher_temperature, derive_seed(seed, "teach")
        )
        teaching = protocol.parse_teaching(reply.text)
        return Guidance(
            approach.text, approach.tokens, reply.text, reply.tokens, reply.is_truncated, teaching
        )

    return guide


class Guided:
    """An official agent, and a guide (None: just that agent) which it asks once, before its first own turn."""

    guide: Guide | None = None
    guidance = Guidance()
    seed = 0

    def generate_next_message(self, message, state):
        opening = (
            self.task.ticket
            if message is None
            else message.content
            if isinstance(message, UserMessage)
            else None
        )
        if self.guide and opening:
            ask, self.guide = self.guide, None
            try:
                self.guidance = ask(
                    self.system_prompt,
                    self.domain_policy,
                    [tool.name for tool in self.tools],
                    opening,
                    self.seed,
                )
            except UserError as error:
                raise DialogueEnd(TerminationReason.INFRASTRUCTURE_ERROR, str(error)) from error
            prompt = protocol.guided_system_prompt(self.system_prompt, self.guidance.teaching)
            state.system_messages = [SystemMessage(role="system", content=prompt)]
        return super().generate_next_message(message, state)


class GuidedAgent(Guided, LLMAgent):
    pass


class GuidedSoloAgent(Guided, LLMSoloAgent):
    pass


def only_ticket(task: Task) -> Task:
    """The task as a solo agent may know it. Even its id and initial state name the faults that are to be found."""
    nothing = dict(
        id="", description=None, user_scenario=None, evaluation_criteria=None, initial_state=InitialState()
    )
    return task.model_copy(update=nothing)


# ------------------------------------------------------------------------------------------------------------- one simulation


class Dialogue(Orchestrator):
    """The official orchestrator; a DialogueEnd ends the dialogue where it stands."""

    failure, broken_turn = "", None

    def initialize(self) -> None:
        self.trajectory, self.message = [], None
        self._until_end(super().initialize)

    def step(self) -> None:
        self._until_end(super().step)

    def _until_end(self, work: Callable[[], None]) -> None:
        try:
            work()
        except DialogueEnd as end:
            self.done, self.termination_reason, self.failure, self.broken_turn = (
                True,
                end.reason,
                str(end),
                end.usage,
            )


def simulate(
    task: Task,
    domain: str,
    student: Model,
    user: Model | None,
    guide: Guide | None,
    *,
    trial: int,
    seed: int,
    max_steps: int,
) -> tuple[SimulationRun, Guidance]:
    """One scored dialogue; in solo mode, without a user (None), the student works from the ticket with the user's tools too."""
    environment = build_environment(domain, solo_mode=user is None)
    if user is None:
        tools = environment.get_tools() + (environment.get_user_tools() or [])
        agent = GuidedSoloAgent(tools, environment.get_policy(), only_ticket(task), llm=student)
    else:
        agent = GuidedAgent(environment.get_tools(), environment.get_policy(), llm=student)
    agent.guide, agent.seed = guide, derive_seed(seed, task.id)
    # v1.0.1's build_user hands its dummy user arguments that it does not take
    partner = DummyUser() if user is None else build_user("user_simulator", environment, task, llm=user)
    dialogue = Dialogue(
        domain, agent, partner, environment, task, max_steps=max_steps, seed=seed, solo_mode=user is None
    )
    start = get_now()
    try:
        simulation = run_simulation(dialogue)
    except (
        Exception
    ) as error:  # of tau2's own, on what a seat said: this one dialogue failed, and the tables count it
        dialogue.failure = "".join(traceback.format_exception(error))
        simulation = SimulationRun(
            id=dialogue.simulation_id,
            task_id=task.id,
            start_time=start,
            end_time=get_now(),
            duration=0.0,
            seed=seed,
            messages=dialogue.trajectory,
            termination_reason=TerminationReason.UNEXPECTED_ERROR,
            reward_info=RewardInfo(reward=0.0),
        )
    simulation.trial, simulation.policy = trial, None  # the policy is in the results' header once
    simulation.info = (
        {"failure": dialogue.failure, "usage": dialogue.broken_turn} if dialogue.failure else None
    )
    return simulation, agent.guidance


def floor_reward(task: Task, domain: str, tool: str | None, is_solo: bool) -> float:
    """What the task gives to an agent that calls one tool without looking and leaves; None: that leaves at once."""
    environment = build_environment(domain, solo_mode=is_solo)
    state = task.initial_state or InitialState()
    environment.set_state(
        state.initialization_data, state.initialization_actions, state.message_history or []
    )
    messages: list[AssistantMessage | ToolMessage] = [
        AssistantMessage(role="assistant", content="Goodbye.", cost=0.0)
    ]
    if tool is not None:
        call = ToolCall(id="floor", name=tool, arguments={"summary": ""})
        messages = [
            AssistantMessage(role="assistant", tool_calls=[call], cost=0.0),
            environment.get_response(call),
            *messages,
        ]
    simulation = SimulationRun(
        id="floor",
        task_id=task.id,
        start_time=get_now(),
        end_time=get_now(),
        duration=0.0,
        termination_reason=TerminationReason.USER_STOP,
        messages=messages,
    )
    return evaluate_simulation(simulation, task, EvaluationType.ALL, is_solo, domain).reward
