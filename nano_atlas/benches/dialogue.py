"""Runs and scores dialogues with the official package of τ²-bench (v1.0.1). No other file imports it.

`generate` replaces the package's LLM call and sends the same messages and tools to a seat. The teacher is added: it is
asked once per dialogue, after the user's first message (in solo mode: the ticket):

    probe     student   system prompt + opening                          ->  its approach
    teaching  TEACHER   policy + names of the tools + opening + approach ->  guidance for the student's system prompt

Neither sees how a task is scored: an agent is built only from tools and policy. `config` is always tau2.Config.
"""

import importlib.metadata
import json
import re
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean

import tau2.agent.llm_agent
import tau2.user.user_simulator as user_simulator
from tau2.data_model.message import AssistantMessage, ToolCall
from tau2.data_model.simulation import RewardInfo, SimulationRun, TerminationReason
from tau2.data_model.tasks import InitialState, RewardType, Task
from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation
from tau2.orchestrator.orchestrator import Orchestrator
from tau2.runner import build_agent, build_environment, build_user, get_tasks, run_simulation
from tau2.utils import DATA_DIR
from tau2.utils.llm_utils import to_litellm_messages, validate_message_history

from nano_atlas import protocol
from nano_atlas.answers import visible
from nano_atlas.config import derive_seed
from nano_atlas.errors import UserError
from nano_atlas.runs import digest, files_digest
from nano_atlas.schedule import Call, ask, play
from nano_atlas.seats import Generation, Reply, Seat
from nano_atlas.text import parse_json

LOCK = threading.Lock()


class DialogueEnd(Exception):
    """A seat ended the dialogue: TerminationReason, error, and usage of the failed turn."""


def generate(model, messages, generation, tools=None, tool_choice="auto", call_name=None, seed=0, guide=None):
    """Replaces tau2.utils.llm_utils.generate; `generation` and `guide` come from tau2's `llm_args`."""
    validate_message_history(messages)
    wire = [{k: v for k, v in message.items() if v is not None} for message in to_litellm_messages(messages)]
    offered = {"tools": [tool.openai_schema for tool in tools], "tool_choice": tool_choice} if tools else {}
    if guide:
        wire[0]["content"] = guide(messages, tools, seed)
    try:
        choice, reply = model.complete(wire, generation, derive_seed(seed, len(messages)), **offered)
    except UserError as error:
        if not re.search("context.(length|window)|max_position_embeddings|too long", str(error)):
            raise
        raise DialogueEnd("context_window_exceeded", str(error), None) from error
    text, calls = visible(reply.text).strip() or None, []
    usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
    try:
        for index, call in enumerate(choice["message"].get("tool_calls") or []):
            name, said = call["function"]["name"], call["function"].get("arguments")
            read = parse_json(said.strip() or "null" if isinstance(said, str) else json.dumps(said))
            arguments = {} if read is None else read
            calls.append(ToolCall(id=f"call_{len(messages)}_{index}", name=name, arguments=arguments))
        if not calls and (not text or tool_choice == "required"):
            raise ValueError("no text and no tool call")
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # the reply may have any form
        fault = "user_error" if call_name == "user_simulator_response" else "agent_error"
        raise DialogueEnd(fault, f"{error} in {str(choice['message'])[:300]}", usage) from error
    return AssistantMessage(role="assistant", content=text, tool_calls=calls or None, cost=0.0, usage=usage)


tau2.agent.llm_agent.generate = user_simulator.generate = generate


def consult(config, student: Seat, teacher: Seat, system_prompt: str, case: str, opening: str, seed: int):
    """The student's approach and the teacher's reply. A seat with a sampler serves one thread at a time."""

    def said(seat, messages, kind, max_tokens) -> Reply:
        generation = Generation(max_tokens, config.temperature, config.top_p)
        own = derive_seed(seed, kind, opening)
        with LOCK if getattr(seat, "is_batched", False) else nullcontext():
            return play([ask(Call(kind, kind, messages, generation, own))], {kind: seat})[0][0][0]

    probe = [{"role": "system", "content": system_prompt}, *protocol.probe_messages(opening)]
    approach = said(student, probe, "probe", config.probe_tokens)
    request = protocol.teacher_messages(case, visible(approach.text).strip())
    return approach, said(teacher, request, "teach", config.teaching_tokens)


def only_ticket(task: Task) -> Task:
    """The task without anything an agent must not see: even its id and initial state name the faults to find."""
    hidden = ("description", "user_scenario", "evaluation_criteria")
    return task.model_copy(update=dict.fromkeys(hidden) | {"id": "", "initial_state": InitialState()})


def simulate(config, task: Task, seed: int, student, user, teacher=None, told=()) -> tuple[dict, list[Reply]]:
    """One scored dialogue: its SimulationRun as JSON values, and the replies of `consult` (given as `told`, or new)."""
    told = list(told)

    def guided(messages, tools, seed) -> str:
        """The student's system prompt with the teaching, which is requested in its first turn."""
        if not told:
            opening = task.ticket if config.is_solo else next(m.content for m in messages if m.role == "user")
            names = ", ".join(tool.name for tool in tools)
            case = f"{environment.get_policy()}\n\nTools: {names}\n\nUser: {opening}"
            told.extend(consult(config, student, teacher, messages[0].content, case, opening, seed))
        _, reply = told
        return protocol.guided_system_prompt(messages[0].content, protocol.parse_teaching(reply.text))

    mode, kind, partner = {"solo_mode": config.is_solo}, "llm_agent_solo", user_simulator.DummyUser()
    environment = build_environment(config.domain, **mode)
    options = {"generation": config.episode.answering, "guide": guided if teacher or told else None}
    if not config.is_solo:
        greedy = {"generation": config.episode.greedy().answering}
        kind = "llm_agent"
        partner = build_user("user_simulator", environment, task, llm=user, llm_args=greedy)
    agent = build_agent(kind, environment, task=only_ticket(task), llm=student, llm_args=options, **mode)
    dialogue = Orchestrator(config.domain, agent, partner, environment, task, config.max_steps, seed, **mode)
    try:
        simulation = run_simulation(dialogue)
    except Exception as error:  # also of tau2, on a seat's reply: only this dialogue fails
        kind = "infrastructure_error" if isinstance(error, UserError) else "unexpected_error"
        other = DialogueEnd(kind, f"{type(error).__name__}: {error}", None)
        reason, failure, usage = (error if isinstance(error, DialogueEnd) else other).args
        dialogue.termination_reason, dialogue.to_role = TerminationReason(reason), None
        simulation = dialogue._finalize()
        simulation.reward_info = RewardInfo(reward=0.0)
        simulation.info = {"failure": failure, "usage": usage}
    simulation.policy = None  # it is in the header of the results
    return simulation.model_dump(mode="json", exclude_none=True), told


def load_tasks(config) -> list[Task]:
    """Raises UserError if there are no such tasks, or if they cannot be run or scored."""
    where = f"--domain {config.domain}, --split {config.split}, --tasks {config.tasks}"
    try:
        tasks = get_tasks(config.domain, config.split)
    except (LookupError, OSError, ValueError) as error:
        raise UserError(f"{where}: {error}; set TAU2_DATA_DIR to the data directory of tau2-bench") from None
    tasks = [task for task in tasks if (config.tasks or "") in task.id][: config.limit]
    if not tasks or config.is_solo and any(task.ticket is None for task in tasks):
        raise UserError(f"{where}: no task found, or one without the ticket that --user solo needs")
    if any(RewardType.NL_ASSERTION in (task.evaluation_criteria.reward_basis or ()) for task in tasks):
        raise UserError(f"{where}: tau2 would score them with gpt-4.1; choose other tasks, such as telecom's")
    return tasks


def contents(config, tasks: Sequence[Task]) -> dict[str, str]:
    """Version and digests of package, data and tasks, and the floors of these tasks."""
    folders = DATA_DIR / "tau2/domains" / config.domain, DATA_DIR / "tau2/user_simulator"
    data = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    found = {"tau2 version": importlib.metadata.version("tau2"), "tau2 data": files_digest(sorted(data))}
    found["tau2 code"] = files_digest(sorted(Path(tau2.__file__).parent.rglob("*.py")))
    found["tasks"] = digest(task.model_dump_json().encode() for task in tasks)
    return found | floors(config, tasks)


def floors(config, tasks: Sequence[Task]) -> dict[str, str]:
    """Scores of two trivial policies on these tasks: leave at once, and transfer the user first."""
    leave = AssistantMessage(role="assistant", content="Goodbye.", cost=0.0)
    call = ToolCall(id="floor", name="transfer_to_human_agents", arguments={"summary": ""})
    result = build_environment(config.domain, solo_mode=config.is_solo).get_response(call)
    transfer = AssistantMessage(role="assistant", tool_calls=[call], cost=0.0)
    how, found = (EvaluationType.ALL, config.is_solo, config.domain), {}
    for name, messages in ("do nothing", [leave]), ("always transfer", [transfer, result, leave]):
        simulation = SimulationRun.model_construct(messages=messages, termination_reason="user_stop")
        score = mean(evaluate_simulation(simulation, task, *how).reward for task in tasks)
        found[f"floor: {name}"] = f"{100 * score:.2f} %"
    return found
