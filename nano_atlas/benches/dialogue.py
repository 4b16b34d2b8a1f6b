"""The official package of τ²-bench (v1.0.1), which runs and scores each dialogue. No other file imports it.

Replaced is the function through which tau2 asks a language model: `generate` sends the same messages and tools to an endpoint.
Added is the teacher. It is asked once per dialogue, when the student has read the user's first message (in solo mode: the ticket):

    probe     student   its system prompt + the opening                       ->  how it would approach the case
    teaching  TEACHER   policy + names of the tools + opening + approach      ->  guidance, appended to the student's system prompt

Neither can see what a task is scored by: an agent is built from tools and policy alone, in solo mode also from a task of which
nothing but the ticket is left. `config` is always tau2.Config.
"""

import importlib.metadata
import json
import re
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import tau2.agent.llm_agent
import tau2.user.user_simulator
from tau2.data_model.message import AssistantMessage, ToolCall
from tau2.data_model.simulation import Results, RewardInfo, SimulationRun, TerminationReason, TextRunConfig
from tau2.data_model.tasks import InitialState, RewardType, Task
from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation
from tau2.orchestrator.orchestrator import Orchestrator
from tau2.runner import build_agent, build_environment, build_user, get_info, get_tasks, run_simulation
from tau2.user.user_simulator import DummyUser
from tau2.utils import DATA_DIR
from tau2.utils.llm_utils import to_litellm_messages, validate_message_history

from nano_atlas import protocol
from nano_atlas.answers import visible
from nano_atlas.config import derive_seed
from nano_atlas.errors import UserError
from nano_atlas.runs import digest, files_digest
from nano_atlas.seats import Generation, Question, Seat

# What a teacher made of an opening: the fields of a TaskResult that are its own
TOLD = "approach", "approach_tokens", "teacher_text", "teacher_tokens", "is_teacher_truncated", "teaching"
Guide = Callable[[str, str, str, int], dict[str, Any]]  # (system prompt, case, opening, seed) -> TOLD


class DialogueEnd(Exception):
    """A seat broke the dialogue off: its TerminationReason, what happened, and the usage of a turn that failed."""


def generate(model, messages, generation, tools=None, tool_choice="auto", call_name=None, seed=0, guide=None):
    """Stands in for tau2.utils.llm_utils.generate; `generation` and `guide` come with the `llm_args` that tau2 passes on.

    Reasoning is dropped: it reaches neither the other side nor the history. Raises DialogueEnd for a turn without text and tool
    call, for arguments that are no JSON object, and for an outgrown context; UserError for a seat that does not answer.
    """
    validate_message_history(messages)
    wire = [{k: v for k, v in message.items() if v is not None} for message in to_litellm_messages(messages)]
    offered = {"tools": [tool.openai_schema for tool in tools], "tool_choice": tool_choice} if tools else {}
    if guide:
        wire[0]["content"] = guide(messages, tools, seed)
    try:
        choice, reply = model.complete(wire, generation, derive_seed(seed, len(messages)), **offered)
    except UserError as error:
        if not re.search("context length|max_position_embeddings", str(error)):
            raise
        raise DialogueEnd("context_window_exceeded", str(error)) from error
    text, calls = visible(reply.text).strip() or None, []
    usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.tokens}
    try:
        for index, call in enumerate(choice["message"].get("tool_calls") or []):
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            calls.append(ToolCall(id=f"call_{len(messages)}_{index}", name=name, arguments=arguments))
        if not calls and (not text or tool_choice == "required"):
            raise ValueError("no text and no tool call")
    except ValueError as error:
        fault = "user_error" if call_name == "user_simulator_response" else "agent_error"
        raise DialogueEnd(fault, f"{error} in {str(choice['message'])[:300]}", usage) from error
    return AssistantMessage(role="assistant", content=text, tool_calls=calls or None, cost=0.0, usage=usage)


tau2.agent.llm_agent.generate = tau2.user.user_simulator.generate = generate


def teacher_guide(config, student: Seat, teacher: Seat) -> Guide:
    """A guide that threads may share. A teacher in this process serves them one at a time."""
    lock = threading.Lock() if getattr(teacher, "is_batched", False) else nullcontext()
    probing = Generation(config.probe_tokens, config.temperature, config.top_p)
    teaching = Generation(config.teaching_tokens, config.temperature, config.top_p)

    def guide(system_prompt: str, case: str, opening: str, seed: int) -> dict[str, Any]:
        probe = [{"role": "system", "content": system_prompt}, *protocol.probe_messages(opening)]
        ((approach,),) = student.ask([Question(probe, probing, derive_seed(seed, "probe", opening))])
        request = protocol.teacher_messages(case, visible(approach.text).strip())
        with lock:
            ((reply,),) = teacher.ask([Question(request, teaching, derive_seed(seed, "teach", opening))])
        told = reply.text, reply.tokens, reply.is_truncated, protocol.parse_teaching(reply.text)
        return dict(zip(TOLD, (approach.text, approach.tokens, *told)))

    return guide


def only_ticket(task: Task) -> Task:
    """The task as an agent may know it. Even its id and initial state name the faults that are to be found."""
    hidden = ("description", "user_scenario", "evaluation_criteria")
    return task.model_copy(update=dict.fromkeys(hidden) | {"id": "", "initial_state": InitialState()})


def simulate(config, task: Task, seed: int, student, user, guide: Guide | None = None) -> tuple[dict, dict]:
    """One scored dialogue: a SimulationRun as JSON values, and what a teacher said (TOLD; without one nothing).

    student, user: EndpointSeats; the user is greedy. In solo mode there is none, and the student has the user's tools too.
    """
    told: dict[str, Any] = {}

    def guided(messages, tools, seed) -> str:
        """The student's system prompt with the teaching, which is asked for in its first own turn."""
        if not told:
            opening = task.ticket if config.is_solo else next(m.content for m in messages if m.role == "user")
            names = ", ".join(tool.name for tool in tools)
            case = f"{environment.get_policy()}\n\nTools: {names}\n\nUser: {opening}"
            told.update(guide(messages[0].content, case, opening, seed))
        return protocol.guided_system_prompt(messages[0].content, told["teaching"])

    mode = {"solo_mode": config.is_solo}
    environment = build_environment(config.domain, **mode)
    seat = {"llm": student, "llm_args": {"generation": config.episode.answering, "guide": guide and guided}}
    kind, partner = "llm_agent_solo", DummyUser()
    if not config.is_solo:
        greedy = {"llm": user, "llm_args": {"generation": Generation(config.answer_tokens, temperature=0.0)}}
        kind, partner = "llm_agent", build_user("user_simulator", environment, task, **greedy)
    agent = build_agent(kind, environment, task=only_ticket(task), **seat, **mode)
    parts = config.domain, agent, partner, environment, task, config.max_steps
    dialogue = Orchestrator(*parts, seed=seed, **mode)
    try:
        simulation = run_simulation(dialogue)
    except DialogueEnd as end:
        simulation = broken_off(dialogue, *end.args)
    except UserError as error:
        simulation = broken_off(dialogue, "infrastructure_error", str(error))
    except Exception:  # tau2's own, on what a seat said: this one dialogue failed, and the tables count it
        simulation = broken_off(dialogue, "unexpected_error", traceback.format_exc())
    simulation.policy = None  # it stands once in the results' header
    return simulation.model_dump(mode="json", exclude_none=True), told


def broken_off(dialogue: Orchestrator, reason: str, failure: str, usage=None) -> SimulationRun:
    dialogue.termination_reason, dialogue.to_role = TerminationReason(reason), None
    simulation = dialogue._finalize()
    simulation.reward_info = RewardInfo(reward=0.0)
    simulation.info = {"failure": failure, "usage": usage}
    return simulation


def load_tasks(config) -> list[Task]:
    """Raises UserError where there are no such tasks, and where they cannot be played or scored."""
    where = f"--domain {config.domain}, --split {config.split}, --tasks {config.tasks}"
    try:
        tasks = get_tasks(config.domain, config.split)
    except (LookupError, OSError, ValueError) as error:
        raise UserError(f"{where}: {error}; TAU2_DATA_DIR must name the data of tau2-bench") from None
    tasks = [task for task in tasks if (config.tasks or "") in task.id][: config.limit]
    if not tasks or config.is_solo and any(task.ticket is None for task in tasks):
        raise UserError(f"{where}: no such task, or not each has the ticket that --user solo needs")
    if any(RewardType.NL_ASSERTION in (task.evaluation_criteria.reward_basis or ()) for task in tasks):
        raise UserError(f"{where}: tau2 would ask gpt-4.1 for scores; choose tasks of telecom, say")
    return tasks


def contents(config, tasks: Sequence[Task]) -> dict[str, str]:
    """What results are results of: version and digests of package, data and tasks. And the floors of these tasks."""
    folders = DATA_DIR / "tau2/domains" / config.domain, DATA_DIR / "tau2/user_simulator"
    data = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return {
        "tau2 version": importlib.metadata.version("tau2"),
        "tau2 code": files_digest(sorted(Path(tau2.__file__).parent.rglob("*.py"))),
        "tau2 data": files_digest(sorted(data)),
        **floors(config, tasks),
        "tasks": digest(task.model_dump_json().encode() for task in tasks),
    }


def floors(config, tasks: Sequence[Task]) -> dict[str, str]:
    """What two policies that look at nothing score on these tasks: to leave at once, and to transfer the user first."""
    leave = AssistantMessage(role="assistant", content="Goodbye.", cost=0.0)
    call = ToolCall(id="floor", name="transfer_to_human_agents", arguments={"summary": ""})
    result = build_environment(config.domain, solo_mode=config.is_solo).get_response(call)
    transfer = AssistantMessage(role="assistant", tool_calls=[call], cost=0.0)
    run = {"id": "floor", "task_id": "", "start_time": "", "end_time": "", "duration": 0}
    run["termination_reason"], how = "user_stop", (EvaluationType.ALL, config.is_solo, config.domain)
    found = {}
    for name, messages in ("do nothing", [leave]), ("always transfer", [transfer, result, leave]):
        simulation = SimulationRun(messages=messages, **run)
        rewards = [evaluate_simulation(simulation, task, *how).reward for task in tasks]
        found[f"floor: {name}"] = f"{100 * mean(rewards):.2f} %"
    return found


def official(config, tasks: Sequence[Task], arm: str, simulations: Sequence[dict]) -> str:
    """An arm in tau2's own format. Its metrics leave out infrastructure errors; without any, the means are equal."""
    run = {"domain": config.domain, "num_trials": config.trials, "max_steps": config.max_steps}
    run |= {"llm_agent": f"{config.student} ({arm})", "llm_args_agent": {"temperature": config.temperature}}
    run |= {"llm_user": config.user, "llm_args_user": {"temperature": 0.0}, "seed": config.seed}
    run |= {"agent": "llm_agent_solo", "user": "dummy_user"} if config.is_solo else {}
    info = get_info(TextRunConfig(**run))
    return Results(info=info, tasks=tasks, simulations=simulations).model_dump_json(indent=1)
