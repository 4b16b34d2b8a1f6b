"""The nano world: three small domains of generated problems that need a plan.

A problem is a shuffled list of facts, each of which names another thing or a value, and one rule for the step from the
named thing to the next. To solve it, walk *backwards* from the thing asked for to one with a value, then compute
*forwards*. Computing is easy; finding the start is hard, because one forward pass does not follow a long chain. The
teacher's <thinking> can walk back line by line, and its <teaching> can name the order, which has no value and no answer.

    math                              telecom                           crm
    Ann: 3                            Modem: fair                       Refund: lead
    Tom: Ann                          Router: Modem                     Waiver: Refund
    Each is the one it names +4.      Each is the one it names -1.      Each is the one it names +2.
    What number is Tom?               In what state is Router?          Who signs Waiver?

The student (0.7M parameters, Qwen3's layout) is shipped; benchmarks/pretrain.py made it. It can look up, compute and follow a plan.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nano_atlas import protocol
from nano_atlas.config import derive_seed
from nano_atlas.data import Problem
from nano_atlas.seats import Generation, Question, Seat

STUDENT = Path(__file__).parent / "student"  # a checkpoint
STUDENT_DIGEST = "5540937fe265d7febad244670d293afc651e31069c94e9c740f30b1b54257ddf"  # its checkpoint_digest

FACTS = 8  # lines per problem; those not on the path are distractors
GIVEN = 3  # lines with a value; the path starts at one of them
CHAIN = (1, 5)  # shortest and longest path, in things; 1: the value asked for is given


@dataclass(frozen=True)
class Domain:
    name: str
    longest_shift: int  # how far up or down the scale a rule can move
    question: str
    scale: list[str]  # the values, ordered
    things: list[str]


DOMAINS = {domain.name: domain for domain in (
    Domain("math", 4, "What number is {thing}?", [str(value) for value in range(1, 31)], (
        "Abe Ada Amy Ann Ben Bob Cal Dan Dee Eli Eva Eve Fay Gus Guy Hal Ian Ida Ira Ivy Jan Jim Joe Kay Ken Kim Leo Liz Lou Mac Mia "
        "Ned Pam Pat Ray Roy Sal Sue Tom Zoe").split()),
    Domain("telecom", 2, "In what state is {thing}?", "off dead faint weak fair good strong great perfect".split(), (
        "Adapter Antenna Beacon Bridge Cable Camera Charger Console Data Dial Dns Dongle Fiber Filter Fuse Gateway Handset Hotspot Hub "
        "Intercom Mast Mms Modem Pager Phone Port Printer Proxy Relay Repeater Roaming Router Sensor Server Sim Splitter Switch Tower "
        "Voice Wifi").split()),
    Domain("crm", 2, "Who signs {thing}?", "trainee clerk agent senior lead manager director officer board".split(), (
        "Addon Appeal Audit Bid Bonus Bundle Claim Contract Credit Deal Demo Discount Exchange Export Fee Grant Import Invoice Lease "
        "License Loan Merge Offer Order Patch Permit Pilot Pledge Quote Rebate Refund Renewal Return Reward Sample Tender Transfer "
        "Trial Upgrade Waiver").split()),
)}  # fmt: skip


@dataclass(frozen=True)
class Task:
    domain: str
    question: str
    answer: str
    chain: tuple[str, ...]  # the things to work out, in order; the last is the one asked for
    facts: dict[str, str]  # thing -> its line, in random order
    solution: str


def make_task(domain: Domain, rng: random.Random, chain_length: int, facts_count: int = FACTS) -> Task:
    things = rng.sample(domain.things, facts_count)
    chain, other_starts = things[:chain_length], things[chain_length : chain_length + GIVEN - 1]
    named = dict(zip(chain[1:], chain))  # thing -> what its line says: another thing, or a value
    for place in range(chain_length + GIVEN - 1, facts_count):
        named[things[place]] = rng.choice(things[:place])
    steps, top = chain_length - 1, len(domain.scale) - 1
    shift = rng.randint(1, min(domain.longest_shift, top // max(1, steps))) * rng.choice((-1, 1))
    start = rng.randint(max(0, -shift * steps), min(top, top - shift * steps))
    values = [domain.scale[start + shift * step] for step in range(chain_length)]
    named |= {chain[0]: values[0]} | {thing: rng.choice(domain.scale) for thing in other_starts}
    facts = {thing: f"{thing}: {named[thing]}" for thing in rng.sample(things, facts_count)}
    listed = [facts[thing] for thing in facts if thing != chain[-1]] + [facts[chain[-1]]]
    rule = f"Each is the one it names {shift:+d}. {domain.question.format(thing=chain[-1])}"
    work = [f"{facts[t]} {old} {shift:+d} = {new}" for t, old, new in zip(chain[1:], values, values[1:])]
    question = "\n".join([*listed, rule])
    solution = "\n".join([facts[chain[0]], *work, f"<solution>{values[-1]}</solution>"])
    return Task(domain.name, question, values[-1], tuple(chain), facts, solution)


def tasks(domain: str, count: int, seed: object) -> list[Task]:
    """Full-size problems, path lengths uniform over CHAIN; a different `seed` gives different problems."""
    rng = random.Random(f"{domain}/{seed}")
    return [make_task(DOMAINS[domain], rng, rng.randint(*CHAIN)) for _ in range(count)]


def training_problems(count: int, seed: object) -> list[Problem]:
    """Mathematics, the only domain that the teacher is trained on."""
    return _as_problems(tasks("math", count, f"train/{seed}"), "train-math")


def held_out_tasks(domain: str, count: int, seed: object) -> list[Task]:
    return tasks(domain, count, f"held-out/{seed}")


def held_out(domain: str, count: int, seed: object) -> list[Problem]:
    return _as_problems(held_out_tasks(domain, count, seed), f"held-out-{domain}")


def _as_problems(generated: Sequence[Task], prefix: str) -> list[Problem]:
    fields = ((t.question, t.answer, t.domain, t.solution) for t in generated)
    return [Problem(f"{prefix}-{index}", *of) for index, of in enumerate(fields)]


def plan(chain: Sequence[str], told: Sequence[str] | None = None) -> str:
    """The order of work as a sentence; `told`: the part of `chain` to name (None: all of it)."""
    return f"To find {chain[-1]}, work out {', '.join(chain if told is None else told)}."


def opening(chain: Sequence[str]) -> Sequence[str]:
    """The first half of a path, rounded up."""
    return chain[: (len(chain) + 1) // 2]


def demonstration(task: Task, approach: str, style: str, is_thorough: bool) -> dict:
    """A rule-based demonstration in the schema of Arc-ATLAS-Teach-v0. The diagnosis walks back from the question. The
    teaching names only the start if the approach is right, else the whole order (a thorough tutor) or its first half.
    Style "concise" names only the start, "detailed" the whole order."""
    told = task.chain if is_thorough or style == "detailed" else opening(task.chain)
    if style == "concise" or (style == "adaptive" and approach.strip() == plan(task.chain)):
        told = task.chain[:1]
    return {
        "problem_text": task.question,
        "student_approach": approach,
        "teacher_diagnosis": "\n".join(task.facts[thing] for thing in reversed(task.chain)),
        "teacher_teaching": plan(task.chain, told),
        "strategy": style,
    }


def demonstrations(count: int, seed: object, student: Seat) -> list[dict]:
    """`count` demonstrations on mathematics, each for an approach of the student. 30 % of the tutors are thorough: GRPO
    must find the best amount of help. A sixth each has the concise and the detailed style, for the runtime."""
    generated, probe = tasks("math", count, f"demonstrations/{seed}"), Generation(40, temperature=0.7)
    seeds = [derive_seed(seed, "demonstration", index) for index in range(count)]
    questions = [Question(protocol.probe_messages(t.question), probe, s) for t, s in zip(generated, seeds)]
    approaches = [reply.text or "None." for (reply,) in student.ask(questions, progress="approaches")]
    rng = random.Random(f"styles/{seed}")
    styles = rng.choices(list(protocol.TEACHING_STYLES), weights=(4, 1, 1), k=count)
    return [
        demonstration(task, approach, style, is_thorough=rng.random() < 0.3)
        for task, approach, style in zip(generated, approaches, styles)
    ]
