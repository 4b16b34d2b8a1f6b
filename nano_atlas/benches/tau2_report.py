"""What became of the dialogues of τ²-bench: a line of the log for each, and the tables that they add up to. Needs no tau2."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from nano_atlas import stats
from nano_atlas.benches.results import TaskResult, read_results
from nano_atlas.benches.scores import table
from nano_atlas.data import Problem
from nano_atlas.episode import Attempt

UNREACHED = ("infrastructure_error", "unexpected_error")  # terminations that say nothing about the student


def intent(name: str, domain: str) -> str:
    """The kind of a telecom task, [mms_issue]...[PERSONA:Easy]; of the others, the domain."""
    match = re.match(r"\[(\w+)\]", name)
    return match[1] if match else domain


def persona(name: str) -> str | None:
    match = re.search(r"\[PERSONA:(\w+)\]", name)
    return match and match[1]


def task_result(
    arm: str, problem: Problem, simulation: dict[str, Any], told: dict[str, Any], teaching_tokens: int
) -> TaskResult:
    """One line of the log, in the terms of the other benchmarks: right is a reward of 1, and an answer is a proper end."""
    reward, reason = simulation["reward_info"]["reward"], simulation["termination_reason"]
    tokens = student_tokens(simulation, "completion_tokens")
    answer = str(reward) if reason in ("user_stop", "agent_stop") else None
    attempt = Attempt("", answer, reward > 1 - 1e-6, tokens, reason == "max_steps")
    record = {"simulation": simulation, "teaching_tokens": teaching_tokens}
    return TaskResult(
        arm, problem.domain, problem.id, simulation["trial"], "", attempt, **told, record=record
    )


def student_tokens(simulation: dict[str, Any], kind: str) -> int:
    """prompt_tokens or completion_tokens of all of the student's turns, of the one too that broke the dialogue off."""
    turns = [message.get("usage") for message in simulation["messages"] if message["role"] == "assistant"]
    if simulation["termination_reason"] == "agent_error":
        turns.append((simulation.get("info") or {}).get("usage"))
    return sum(usage[kind] for usage in turns if usage)


def termination(result: TaskResult) -> str:
    return result.record["simulation"]["termination_reason"]


def dialogue_tables(
    results: Sequence[TaskResult], arms: Sequence[str], names: dict[str, str], trials: int
) -> list[str]:
    """Lines of markdown: pass^k by intent and persona, then the cost and the end of each arm's dialogues."""
    ks = range(1, trials + 1)
    passed = [["", "tasks", *(f"pass^{k}" for k in ks)]]
    costs = [["", "dialogues", "covered", "guidance tokens", "student tokens", "prompt tokens", "seconds"]]
    ends = sorted({termination(result) for result in results})
    ended = [["", *ends]]
    for arm in arms:
        of_arm = [result for result in results if result.arm == arm]
        if not of_arm:
            continue
        name = names.get(arm, arm)
        groups: dict[str, dict[str, list[bool]]] = {}  # by group and task
        for result in of_arm:
            for group in filter(
                None, ("all", result.domain, persona(result.id) and f"persona {persona(result.id)}")
            ):
                groups.setdefault(group, {}).setdefault(result.id, []).append(result.attempt.is_correct)
        for group, tasks in sorted(
            groups.items(), key=lambda item: (item[0] != "all", item[0].startswith("persona"), item[0])
        ):
            whole = [right for right in tasks.values() if len(right) == trials]
            rates = [mean(stats.pass_hat_k(trials, sum(right), k) for right in whole) for k in ks if whole]
            shown = [f"{100 * rate:.1f}" for rate in rates] or ["–"] * len(ks)
            passed.append([f"{name}: {group}", str(len(whole)), *shown])
        prompts = [student_tokens(result.record["simulation"], "prompt_tokens") for result in of_arm]
        covered = mean(termination(result) not in UNREACHED for result in of_arm)
        costs.append(
            [
                name,
                str(len(of_arm)),
                f"{100 * covered:.1f}",
                f"{mean(r.record['teaching_tokens'] for r in of_arm):.0f}",
                f"{mean(r.attempt.tokens for r in of_arm):.0f}",
                f"{mean(prompts):.0f}",
                f"{mean(r.record['simulation']['duration'] for r in of_arm):.1f}",
            ]
        )
        counts = Counter(map(termination, of_arm))
        ended.append([name, *(str(counts[end]) for end in ends)])
    return [
        "",
        "### pass^k",
        "",
        *table(passed),
        "",
        "### dialogues",
        "",
        *table(costs),
        "",
        *table(ended),
        "",
    ]


def print_dialogues(file: Path, wanted: str) -> None:
    """Those of tasks whose id contains `wanted`."""
    for result in read_results(file)[0].values():
        if wanted in result.id:
            simulation = result.record["simulation"]
            print(
                f"\n=== {result.id}, {result.arm}, trial {result.sample}: {'right' if result.attempt.is_correct else 'wrong'}, "
                f"{termination(result)} {(simulation.get('info') or {}).get('failure', '')}"
            )
            for name in ("approach", "teacher_text", "teaching"):
                if getattr(result, name):
                    print(f"[{name}] {getattr(result, name)}")
            for message in simulation["messages"]:
                calls = [
                    f"{call['name']}({json.dumps(call['arguments'])})"
                    for call in message.get("tool_calls") or []
                ]
                print(f"[{message['role']}] " + " ".join([message.get("content") or "", *calls]).strip())
