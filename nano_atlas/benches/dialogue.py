"""One dialogue of τ²-bench by its official package: tasks, tools, orchestrator, user simulator and scorer are tau2's own.

Replaced is the function through which tau2 asks a language model: `generate` sends the same messages and tools to an endpoint.
Added is the teacher. It is asked once per dialogue, when the student has read the user's first message (in solo mode: the ticket):

    probe     student   its system prompt + the opening                       ->  how it would approach the case
    teaching  TEACHER   policy + names of the tools + opening + approach      ->  guidance, appended to the student's system prompt

Neither can see what a task is scored by: an agent is built from tools and policy alone, in solo mode also from a task of which
nothing but the ticket is left. This file imports tau2 (v1.0.1), so it is imported only where tau2 is installed.
"""

import json
import re
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from statistics import mean
from typing import Any

import tau2.agent.llm_agent
import tau2.user.user_simulator
from tau2.agent.llm_agent import LLMAgent, LLMSoloAgent
from tau2.data_model.message import AssistantMessage, Message, SystemMessage, ToolCall, UserMessage
from tau2.data_model.simulation import RewardInfo, SimulationRun, TerminationReason
from tau2.data_model.tasks import InitialState, Task
from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation
from tau2.orchestrator.orchestrator import Orchestrator
from tau2.runner import build_environment, build_user, run_simulation
from tau2.user.user_simulator import DummyUser
from tau2.utils.llm_utils import to_litellm_messages, validate_message_history
from tau2.utils.utils import get_now

from nano_atlas import protocol
from nano_atlas.answers import visible
from nano_atlas.benches.arms import TaskResult
from nano_atlas.config import derive_seed
from nano_atlas.episode import EpisodeConfig
from nano_atlas.errors import UserError
from nano_atlas.seats import EndpointSeat, Generation, Question, Seat


class DialogueEnd(Exception):
    """A seat broke the dialogue off: a failed simulation, never a crash. usage: tokens of the turn that did it."""

    def __init__(self, reason: TerminationReason, message: str, usage: dict[str, int] | None = None):
        super().__init__(message)
        self.reason, self.usage = reason, usage


def generate(
    model: EndpointSeat, messages, generation, tools=None, tool_choice="auto", call_name=None, seed=0
) -> AssistantMessage:
    """Stands in for tau2.utils.llm_utils.generate; `generation` comes with the `llm_args` that tau2 passes on.

    Reasoning blocks are dropped: they reach neither the other side nor the history. Raises DialogueEnd for a turn without text
    and tool call, for a call whose arguments are not a JSON object, and for a prompt that is longer than the model's context;
    UserError for a seat that does not answer.
    """
    validate_message_history(messages)
    wire = [{k: v for k, v in message.items() if v is not None} for message in to_litellm_messages(messages)]
    offered = {"tools": [tool.openai_schema for tool in tools], "tool_choice": tool_choice} if tools else {}
    try:
        choice, reply = model.complete(wire, generation, derive_seed(seed, len(messages)), **offered)
    except UserError as error:
        if re.search("context length|max_position_embeddings", str(error)):
            raise DialogueEnd(TerminationReason.CONTEXT_WINDOW_EXCEEDED, str(error)) from error
        raise
    is_user = call_name == "user_simulator_response"
    fault = TerminationReason.USER_ERROR if is_user else TerminationReason.AGENT_ERROR
    usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
    text, calls = visible(reply.text).strip() or None, []
    for index, call in enumerate(choice["message"].get("tool_calls") or []):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        try:
            id = f"call_{len(messages)}_{index}"
            calls.append(ToolCall(id=id, name=name, arguments=json.loads(arguments)))
        except ValueError as error:
            raise DialogueEnd(fault, f"malformed call of {name}: {arguments[:200]}", usage) from error
    if not calls and (not text or tool_choice == "required"):
        raise DialogueEnd(fault, f"no text and no tool call in {reply.text[:200]!r}", usage)
    return AssistantMessage(role="assistant", content=text, tool_calls=calls or None, cost=0.0, usage=usage)


tau2.agent.llm_agent.generate = tau2.user.user_simulator.generate = generate


# ---------------------------------------------------------------------------------------------------------------- the teacher


@dataclass(frozen=True)
class Guidance:
    """What a teacher made of a dialogue's opening, as in TaskResult; lengths in generated tokens."""

    approach: str = ""
    approach_tokens: int = 0
    teacher_text: str = ""
    teacher_tokens: int = 0
    is_teacher_truncated: bool = False
    teaching: str | None = None  # None: malformed, and the student's prompt stays the official one


Guide = Callable[["Guided", str], Guidance]  # agent, opening


def teacher_guide(student: Seat, teacher: Seat, config: EpisodeConfig) -> Guide:
    """A guide that threads may share. A teacher in this process serves them one at a time."""
    lock = nullcontext() if isinstance(teacher, EndpointSeat) else threading.Lock()

    def guide(agent: "Guided", opening: str) -> Guidance:
        def question(kind: str, messages: protocol.Messages, length: int, temperature: float) -> Question:
            seed = derive_seed(agent.llm_args.get("seed"), kind, opening)
            return Question(messages, Generation(length, temperature, config.top_p), seed)

        probe = [{"role": "system", "content": agent.system_prompt}, *protocol.probe_messages(opening)]
        asked = question("probe", probe, config.probe_tokens, config.student_temperature)
        ((approach,),) = student.ask([asked])
        tools = ", ".join(tool.name for tool in agent.tools)
        case = f"{agent.domain_policy}\n\nTools: {tools}\n\nUser: {opening}"
        request = protocol.teacher_messages(case, visible(approach.text).strip())
        asked = question("teach", request, config.teaching_tokens, config.teacher_temperature)
        with lock:
            ((reply,),) = teacher.ask([asked])
        told = protocol.parse_teaching(reply.text)
        return Guidance(approach.text, approach.tokens, reply.text, reply.tokens, reply.is_truncated, told)

    return guide


def repeat(result: TaskResult) -> Guide:
    """A guide that says what a teacher said in another dialogue."""
    guidance = Guidance(*(getattr(result, field.name) for field in fields(Guidance)))
    return lambda agent, opening: guidance


class Guided:
    """Makes an official agent ask its guide once, before its first own turn (None: just that agent)."""

    guide: Guide | None = None
    guidance = Guidance()

    def generate_next_message(self, message, state):
        opening = message.content if isinstance(message, UserMessage) else None
        if message is None:  # solo
            opening = self.task.ticket
        if self.guide and opening:
            self.guidance, self.guide = self.guide(self, opening), None
            prompt = protocol.guided_system_prompt(self.system_prompt, self.guidance.teaching)
            state.system_messages = [SystemMessage(role="system", content=prompt)]
        return super().generate_next_message(message, state)


class GuidedAgent(Guided, LLMAgent):
    pass


class GuidedSoloAgent(Guided, LLMSoloAgent):
    pass


def only_ticket(task: Task) -> Task:
    """The task as a solo agent may know it. Even its id and initial state name the faults that are to be found."""
    hidden = ("description", "user_scenario", "evaluation_criteria")
    return task.model_copy(update=dict.fromkeys(hidden) | {"id": "", "initial_state": InitialState()})


# ---------------------------------------------------------------------------------------------------------------- one dialogue


def simulate(
    task: Task,
    domain: str,
    student: EndpointSeat,
    user: EndpointSeat | None,
    generation: Generation,
    guide: Guide | None = None,
    seed: int = 0,
    max_steps: int = 200,
) -> tuple[dict[str, Any], Guidance]:
    """One scored dialogue, as a SimulationRun in JSON, and what a teacher said to it.

    Without a user (solo mode) the student works from the ticket and has the user's tools too. generation: of the student's turns;
    the user is greedy.
    """
    is_solo = user is None
    environment = build_environment(domain, solo_mode=is_solo)
    tools, policy, model = environment.get_tools(), environment.get_policy(), {"generation": generation}
    if is_solo:
        tools += environment.get_user_tools() or []
        agent = GuidedSoloAgent(tools, policy, only_ticket(task), llm=student, llm_args=model)
        partner = DummyUser()
    else:
        agent = GuidedAgent(tools, policy, llm=student, llm_args=model)
        greedy = {"generation": Generation(generation.max_tokens, temperature=0.0)}
        partner = build_user("user_simulator", environment, task, llm=user, llm_args=greedy)
    agent.guide, parts = guide, (domain, agent, partner, environment, task)
    dialogue = Orchestrator(*parts, max_steps=max_steps, seed=seed, solo_mode=is_solo)
    try:
        simulation = run_simulation(dialogue)
    except Exception as error:  # any: this one dialogue failed, and the tables count it
        failure, dialogue.to_role = str(error), None
        if isinstance(error, DialogueEnd):
            dialogue.termination_reason = error.reason
        elif isinstance(error, UserError):
            dialogue.termination_reason = TerminationReason.INFRASTRUCTURE_ERROR
        else:  # tau2's own, on what a seat said
            dialogue.termination_reason = TerminationReason.UNEXPECTED_ERROR
            failure = "".join(traceback.format_exception(error))
        simulation = dialogue._finalize()
        simulation.reward_info = RewardInfo(reward=0.0)
        simulation.info = {"failure": failure, "usage": getattr(error, "usage", None)}
    simulation.policy = None  # it stands once in the results' header
    return simulation.model_dump(mode="json", exclude_none=True), agent.guidance


def floors(tasks: Sequence[Task], domain: str, is_solo: bool) -> dict[str, str]:
    """What two policies that look at nothing score on these tasks: to leave at once, and to transfer the user first."""
    leave = AssistantMessage(role="assistant", content="Goodbye.", cost=0.0)
    call = ToolCall(id="floor", name="transfer_to_human_agents", arguments={"summary": ""})
    transfer = AssistantMessage(role="assistant", tool_calls=[call], cost=0.0)
    result = build_environment(domain, solo_mode=is_solo).get_response(call)

    def score(*messages: Message) -> str:
        parts = {"id": "floor", "task_id": "", "start_time": get_now(), "end_time": get_now(), "duration": 0}
        end = TerminationReason.USER_STOP
        run = SimulationRun(messages=list(messages), termination_reason=end, **parts)
        scored = (evaluate_simulation(run, task, EvaluationType.ALL, is_solo, domain) for task in tasks)
        return f"{100 * mean(score.reward for score in scored):.2f} %"

    return {"floor: do nothing": score(leave), "floor: always transfer": score(transfer, result, leave)}
