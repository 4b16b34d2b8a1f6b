"""How good is an answer? A verifier where the truth is known, a function of the user's, or an ensemble of judges.

    python    --evaluator module:function(task=, answer=, text=, ground_truth=) -> a number from 0 to 1
    exact     the task has a ground truth: 1 or 0
    judges    --judge: each judge is asked at three temperatures; where its samples disagree (standard deviation above
              --judge-deviation) or it is unsure (uncertainty above --judge-uncertainty), a larger model sees all of them and decides
    nobody    none of these: the answer has no score. That is not a score of zero; neither is an outage of the judges

The first of them that there is decides.

Four judges, as published (ATLAS, RIM): *accuracy* and *process* judge any answer, and their mean is its score, so that answers with
and without guidance are compared on the same scale. *helpfulness* judges the guidance and *diagnostic* the student's approach; a
teaching is paid for a gain only as far as it caused it, so helpfulness scales positive rewards, and it cannot be more than 0.1
above diagnostic, as process cannot be above accuracy, nor above 0.5 where process is below 0.5 (`hold_consistent`).
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

from nano_atlas import protocol
from nano_atlas.config import option
from nano_atlas.data import Problem, derive_seed
from nano_atlas.errors import UserError
from nano_atlas.runtime.agents import load_object, resolve
from nano_atlas.runtime.sessions import Call, Fault
from nano_atlas.seats import Generation

ANSWER_JUDGES, TEACHING_JUDGES = ("accuracy", "process"), ("helpfulness", "diagnostic")


@dataclass(frozen=True)
class JudgeConfig:
    evaluator: str | None = option(
        None, "Python function MODULE:NAME that scores answers from 0 to 1", group="judges"
    )
    judge: str | None = option(None, "checkpoint, URL or agent that judges answers without ground truth")
    judge_model: str | None = option(None, "model name at the judge's URL (none: the first it serves)")
    large_judge: str | None = option(None, "the same of a larger model that decides where judges disagree")
    large_judge_model: str | None = option(None, "model name at its URL (none: the first it serves)")
    judges: tuple[str, ...] = option(
        ANSWER_JUDGES + TEACHING_JUDGES, "which judges are asked", ANSWER_JUDGES + TEACHING_JUDGES
    )
    judge_temperatures: tuple[float, ...] = option(
        (0.2, 0.5, 0.8), "one sample of each judge at each of these"
    )
    judge_deviation: float = option(
        0.15, "standard deviation of a judge's samples from which the large judge decides"
    )
    judge_uncertainty: float = option(0.3, "uncertainty of a sample from which the large judge decides")
    judge_tokens: int = option(1024, "longest verdict (tokens)")
    accept: float = option(
        0.8, "score from which an answer counts as valid, where it is not verified exactly"
    )

    def check(self) -> None:
        if self.judge and not set(self.judges) & set(ANSWER_JUDGES):
            raise UserError("--judges needs accuracy or process: the others do not judge an answer")
        if self.judge and not self.judge_temperatures:
            raise UserError("--judge-temperatures needs at least one temperature")
        if self.judge is None and (self.large_judge, self.judge_model) != (None, None):
            raise UserError("--large-judge and --judge-model need --judge")


@dataclass
class Verdict:
    """Of one answer (or one step). `score` is 0 to 1, or None: nobody could say."""

    score: float | None
    by: str  # "exact" | "python" | "judges" | "nobody"
    is_valid: bool | None = None  # None: not known
    deviation: float = 0.0  # standard error of the score, from the spread of the samples
    helpfulness: float | None = None
    guidance: str = ""  # what the judge would have the student do better
    rationale: str = ""
    judges: list[dict[str, Any]] = field(default_factory=list)  # as AtlasJudgeBreakdown


@dataclass(frozen=True)
class Exhibit:
    """What a verdict is about. `approach` and `guidance` are empty where there were none."""

    task: Problem
    text: str  # the whole reply
    answer: str | None  # what stands in <solution>
    approach: str = ""
    guidance: str = ""


Calls = Generator[list[Call], list, Any]


def judge(exhibit: Exhibit, config: JudgeConfig, seed: object) -> Calls:
    """The Verdict on an answer by the best means there are; a script for `sessions.drive`, so it yields calls to judges."""
    task = exhibit.task
    if config.evaluator is not None:
        return _evaluate(exhibit, load_object(config.evaluator))
    if task.answer is not None:
        is_right = exhibit.answer is not None and protocol.is_correct(exhibit.answer, task.answer)
        return Verdict(float(is_right), "exact", is_right, rationale="compared with the ground truth")
    if config.judge is None:
        return Verdict(None, "nobody", rationale="no ground truth, no evaluator, no judge")
    asked = [
        name
        for name in config.judges
        if name in ANSWER_JUDGES or (exhibit.guidance if name == "helpfulness" else exhibit.approach)
    ]
    return (
        yield from ensemble(
            asked,
            config,
            seed,
            task=task.question,
            approach=exhibit.approach,
            guidance=exhibit.guidance,
            reply=exhibit.text,
            answer=exhibit.answer,
        )
    )


def _evaluate(exhibit: Exhibit, function: Any) -> Verdict:
    value = None
    try:
        value = resolve(
            function(
                task=exhibit.task.question,
                answer=exhibit.answer,
                text=exhibit.text,
                ground_truth=exhibit.task.answer,
            )
        )
        if value is None:
            return Verdict(None, "python", rationale="the evaluator gives no score")
        score = float(value)
        if not 0 <= score <= 1:
            raise ValueError(f"the score must be between 0 and 1, not {score}")
    except Exception as error:  # of a user's function: a fault of this session, not the end of the run
        raise Fault(f"evaluator: {type(error).__name__}: {error}") from error
    return Verdict(score, "python", score >= 1.0, rationale="by the evaluator")


def ensemble(
    asked: Sequence[str], config: JudgeConfig, seed: object, seat: str = "judge", **fields: Any
) -> Calls:
    """The Verdict of several judges, each sampled at every temperature; `fields` is what they see."""
    places = [(name, temperature) for name in asked for temperature in config.judge_temperatures]
    replies = yield [
        Call(
            seat,
            f"judge: {name}",
            protocol.judge_messages(name, **fields),
            Generation(config.judge_tokens, temperature),
            derive_seed(seed, "judge", name, temperature),
        )
        for name, temperature in places
    ]
    samples: dict[str, list[dict]] = {name: [] for name in asked}
    problems = []
    for (name, temperature), reply in zip(places, replies):
        sample = str(reply) if isinstance(reply, Fault) else read_sample(reply.text, temperature)
        samples[name].append(sample) if isinstance(sample, dict) else problems.append(f"{name}: {sample}")
    breakdowns = []
    for name in asked:
        breakdowns.append((yield from _decide(name, samples[name], config, seed, fields)))
    scores = hold_consistent(
        {entry["identifier"]: entry["score"] for entry in breakdowns if entry["score"] is not None}
    )
    for entry in breakdowns:
        entry["raw_score"], entry["score"] = entry["score"], scores.get(entry["identifier"])
    deciding = [
        entry
        for entry in breakdowns
        if entry["identifier"] not in TEACHING_JUDGES and entry["score"] is not None
    ]
    if not deciding:
        return Verdict(
            None,
            "judges",
            rationale="; ".join(["unscored: no judge gave a verdict", *problems])[:1000],
            judges=breakdowns,
        )
    score = fmean(entry["score"] for entry in deciding)
    errors = [
        pstdev(values) / math.sqrt(len(values))
        for entry in deciding
        if (values := [s["score"] for s in entry["samples"]])
    ]
    advice = next((s["guidance"] for entry in deciding for s in entry["samples"] if s["guidance"]), "")
    return Verdict(
        score,
        "judges",
        score >= config.accept,
        math.hypot(*errors) / len(deciding),
        scores.get("helpfulness"),
        advice,
        "; ".join(f"{e['identifier']} {e['score']:.2f}: {e['rationale']}" for e in deciding)[:1000],
        breakdowns,
    )


def _decide(
    name: str, samples: list[dict], config: JudgeConfig, seed: object, fields: dict[str, Any]
) -> Calls:
    """One judge's breakdown from its samples: their mean, or the large judge's verdict where they cannot be trusted."""
    scores = [sample["score"] for sample in samples]
    reason = None
    if not samples:
        reason = "no valid sample"
    elif pstdev(scores) > config.judge_deviation:
        reason = f"standard deviation {pstdev(scores):.2f}"
    elif (unsure := max(sample["uncertainty"] for sample in samples)) > config.judge_uncertainty:
        reason = f"uncertainty {unsure:.2f}"
    score, rationale, principles = (
        (fmean(scores), samples[0]["rationale"], samples[0]["principles"]) if samples else (None, "", [])
    )
    is_escalated = reason is not None and config.large_judge is not None
    if is_escalated:
        messages = protocol.judge_messages(name, samples=samples, **fields)
        (reply,) = yield [
            Call(
                "large judge",
                f"arbiter: {name}",
                messages,
                Generation(config.judge_tokens, 0.3),
                derive_seed(seed, "arbiter", name),
            )
        ]
        final = str(reply) if isinstance(reply, Fault) else read_sample(reply.text, 0.3)
        if isinstance(final, dict):
            score, rationale, principles = final["score"], final["rationale"], final["principles"]
        else:
            reason += f"; the large judge gave no verdict: {final}"
    return {
        "identifier": name,
        "score": score,
        "rationale": rationale,
        "principles": principles,
        "samples": samples,
        "escalated": is_escalated,
        "escalation_reason": reason,
    }


def read_sample(text: str, temperature: float) -> dict[str, Any] | str:
    """A judge's reply as AtlasJudgeSample, or why it is none."""
    found = protocol.last_json(text, "score")
    if found is None:
        return f"not the JSON that was asked for: {text[:80]!r}"
    try:
        score, uncertainty = float(found["score"]), float(found.get("uncertainty") or 0.0)
    except (TypeError, ValueError):
        return f"score or uncertainty is not a number: {text[:80]!r}"
    if not (0 <= score <= 1 and 0 <= uncertainty <= 1):
        return f"score {score} or uncertainty {uncertainty} is not between 0 and 1"
    principles = found.get("principles") if isinstance(found.get("principles"), list) else []
    return {
        "score": score,
        "rationale": str(found.get("rationale") or ""),
        "principles": principles,
        "uncertainty": uncertainty,
        "temperature": temperature,
        "guidance": str(found.get("guidance") or ""),
    }


def hold_consistent(scores: dict[str, float]) -> dict[str, float]:
    """The published guardrails between judges, for those that gave a score."""
    scores = dict(scores)
    if "process" in scores and "accuracy" in scores:
        scores["process"] = min(scores["process"], scores["accuracy"] + 0.1)
    if scores.get("process", 1.0) < 0.5 and "helpfulness" in scores:
        scores["helpfulness"] = min(scores["helpfulness"], 0.5)
    if "helpfulness" in scores and "diagnostic" in scores:
        scores["helpfulness"] = min(scores["helpfulness"], scores["diagnostic"] + 0.1)
    return {name: min(1.0, max(0.0, score)) for name, score in scores.items()}
