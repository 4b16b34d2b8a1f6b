"""Which lane a task takes: --lane, or by what is known about the student on this kind of task.

Its capability is the mean score of its own last 50 answers there, with two thirds of an answer that is worth 0.5 counted in. A --probe
model is given the same record and may decide otherwise. From .85 on the lane is auto, from .65 paired, from .35 coach, else escalate
(atlas-sdk's thresholds); with no record, paired.
"""

from collections.abc import Generator, Sequence
from typing import Any

from nano_atlas import protocol
from nano_atlas.runtime.sessions import Call, Fault
from nano_atlas.seats import Generation

LANES = ("auto", "paired", "coach", "escalate")
THRESHOLDS = (0.85, 0.65, 0.35)  # least capability for auto, paired, coach


def choose_lane(
    question: str, record: Sequence[float], forced: str, has_probe: bool, seed: int
) -> Generator[list[Call], list, dict[str, Any]]:
    """{mode, confidence, by}, as it goes into the trace. forced: a lane, or "adaptive". record: scores of the student alone."""
    if forced != "adaptive":
        return {"mode": forced, "confidence": None, "by": "--lane"}
    if not record:
        return {"mode": "paired", "confidence": None, "by": "no record"}
    confidence = (sum(record) + 1 / 3) / (len(record) + 2 / 3)
    choice = {"mode": lane_of(confidence), "confidence": confidence, "by": "record"}
    if has_probe:
        history = {
            "sessions": len(record),
            "latest_scores_of_the_student_alone": [round(score, 3) for score in record[-10:]],
            "average_score": confidence,
        }
        (reply,) = yield [
            Call(
                "probe",
                "capability",
                protocol.capability_messages(question, history),
                Generation(200, 0.2),
                seed,
            )
        ]
        if not isinstance(reply, Fault):  # it is among the session's events, and the record decides
            choice |= read_choice(reply.text)
    return choice


def lane_of(confidence: float) -> str:
    return next((lane for lane, least in zip(LANES, THRESHOLDS) if confidence >= least), LANES[-1])


def read_choice(text: str) -> dict[str, Any]:
    """The probe's decision: its mode, else its confidence by the thresholds, else nothing."""
    found = protocol.last_json(text, "confidence") or protocol.last_json(text, "mode") or {}
    try:
        confidence = min(1.0, max(0.0, float(found["confidence"])))
    except (KeyError, TypeError, ValueError):
        confidence = None
    if found.get("mode") in LANES:
        return {"mode": found["mode"], "confidence": confidence, "by": "probe"}
    return (
        {} if confidence is None else {"mode": lane_of(confidence), "confidence": confidence, "by": "probe"}
    )
