"""The nano world: three small domains in which a plan is what separates failure from success, generated from seeds.

A problem lists in shuffled order what each thing is stated in terms of, the one that is asked for last, and gives one rule for going
from one to the next. To answer it, one must go *backwards* from the question to a thing whose value is given, then compute *forwards*.
Computing is easy; finding where to start is not, because nothing in a forward pass walks a long chain. That is the gap a teacher
can close: its <thinking> walks back one line at a time, and its <teaching> names the order, which holds no value and so no answer.

    math                              telecom                           crm
    Ann: 3                            Modem: fair                       Refund: lead
    Tom: Ann                          Router: Modem                     Waiver: Refund
    Each is the one it names +4.      Each is the one it names -1.      Each is the one it names +2.
    What number is Tom?               In what state is Router?          Who signs Waiver?

The *student*, 0.7M parameters in the layout of Qwen3, is given: it comes with the package (STUDENT), and pretrain.py beside this file is
how it was made. It can look up, compute and follow a plan; it cannot walk a long chain in its head. The *demonstrations*, for the
teacher alone, are mathematics only.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nano_atlas import protocol
from nano_atlas.data import Problem, derive_seed
from nano_atlas.seats import Generation, Question, Seat

STUDENT = Path(__file__).parent / "student"  # its checkpoint
STUDENT_DIGEST = (
    "5540937fe265d7febad244670d293afc651e31069c94e9c740f30b1b54257ddf"  # files.checkpoint_digest of it
)

FACTS = 8  # lines per problem; those off the path from the given value to the question are distractors
GIVEN = 3  # lines with a value, of which one is where the path starts
CHAIN = (1, 5)  # shortest and longest path, both ends counted; 1: the value is given


@dataclass(frozen=True)
class Domain:
    name: str
    things: tuple[str, ...]
    scale: tuple[str, ...]  # the values, ordered
    longest_shift: int  # how far up or down the scale a rule can move
    question: str


DOMAINS = {
    domain.name: domain
    for domain in (
        Domain(
            name="math",
            things=tuple(
                (
                    "Abe Ada Amy Ann Ben Bob Cal Dan Dee Eli Eva Eve Fay Gus Guy Hal Ian Ida Ira Ivy Jan Jim Joe Kay Ken "
                    "Kim Leo Liz Lou Mac Mia Ned Pam Pat Ray Roy Sal Sue Tom Zoe"
                ).split()
            ),
            scale=tuple(str(value) for value in range(1, 31)),
            longest_shift=4,
            question="What number is {thing}?",
        ),
        Domain(
            name="telecom",
            things=tuple(
                (
                    "Adapter Antenna Beacon Bridge Cable Camera Charger Console Data Dial Dns Dongle Fiber Filter Fuse "
                    "Gateway Handset Hotspot Hub Intercom Mast Mms Modem Pager Phone Port Printer Proxy Relay Repeater "
                    "Roaming Router Sensor Server Sim Splitter Switch Tower Voice Wifi"
                ).split()
            ),
            scale=tuple("off dead faint weak fair good strong great perfect".split()),
            longest_shift=2,
            question="In what state is {thing}?",
        ),
        Domain(
            name="crm",
            things=tuple(
                (
                    "Addon Appeal Audit Bid Bonus Bundle Claim Contract Credit Deal Demo Discount Exchange Export Fee "
                    "Grant Import Invoice Lease License Loan Merge Offer Order Patch Permit Pilot Pledge Quote Rebate "
                    "Refund Renewal Return Reward Sample Tender Transfer Trial Upgrade Waiver"
                ).split()
            ),
            scale=tuple("trainee clerk agent senior lead manager director officer board".split()),
            longest_shift=2,
            question="Who signs {thing}?",
        ),
    )
}


@dataclass(frozen=True)
class Task:
    """One generated problem and everything its generator knows about it."""

    domain: str
    question: str
    answer: str
    chain: tuple[str, ...]  # the things to work out, in order; the last is the one asked for
    facts: dict[str, str]  # thing -> its line, in random order
    solution: str


def make_task(domain: Domain, rng: random.Random, chain_length: int, facts_count: int = FACTS) -> Task:
    things = rng.sample(domain.things, facts_count)
    chain, others = things[:chain_length], things[chain_length:]
    sources: dict[str, str | None] = {chain[0]: None, **dict(zip(chain[1:], chain))}
    for index, thing in enumerate(others):
        sources[thing] = (
            rng.choice(list(sources)) if index >= GIVEN - 1 else None
        )  # the first ones are other places to start
    top = len(domain.scale) - 1
    shift = rng.randint(1, max(1, min(domain.longest_shift, top // max(1, chain_length - 1))))
    shift *= rng.choice((-1, 1))
    span = shift * (chain_length - 1)
    level = rng.randint(max(0, -span), min(top, top - span))
    facts = {thing: f"{thing}: {source}" for thing, source in sources.items() if source is not None}
    facts[chain[0]] = f"{chain[0]}: {domain.scale[level]}"
    for thing in others[: GIVEN - 1]:
        facts[thing] = f"{thing}: {rng.choice(domain.scale)}"
    worked = [facts[chain[0]]]
    for thing in chain[1:]:
        worked.append(f"{facts[thing]} {domain.scale[level]} {shift:+d} = {domain.scale[level + shift]}")
        level += shift
    order = rng.sample(things, len(things))
    listed = [thing for thing in order if thing != chain[-1]] + [
        chain[-1]
    ]  # what is asked for last, where it is easy to read
    rule = f"Each is the one it names {shift:+d}. {domain.question.format(thing=chain[-1])}"
    return Task(
        domain=domain.name,
        question="\n".join([facts[thing] for thing in listed] + [rule]),
        answer=domain.scale[level],
        chain=tuple(chain),
        facts={thing: facts[thing] for thing in order},
        solution="\n".join([*worked, f"<solution>{domain.scale[level]}</solution>"]),
    )


def tasks(domain: str, count: int, seed: object) -> list[Task]:
    """Full-size problems, path lengths uniform over CHAIN; a different `seed` gives different problems."""
    rng = random.Random(f"{domain}/{seed}")
    return [make_task(DOMAINS[domain], rng, rng.randint(*CHAIN)) for _ in range(count)]


def as_problems(generated: Iterable[Task], prefix: str) -> list[Problem]:
    return [Problem(f"{prefix}-{index}", t.question, t.answer, t.domain) for index, t in enumerate(generated)]


def training_problems(count: int, seed: object) -> list[Problem]:
    """Mathematics, the only domain the teacher is ever trained on."""
    return as_problems(tasks("math", count, f"train/{seed}"), "train-math")


def held_out_tasks(domain: str, count: int, seed: object) -> list[Task]:
    return tasks(domain, count, f"held-out/{seed}")


def held_out(domain: str, count: int, seed: object) -> list[Problem]:
    return as_problems(held_out_tasks(domain, count, seed), f"held-out-{domain}")


def plan(chain: Sequence[str], told: Sequence[str] | None = None) -> str:
    """In which order to work (`told`: as much of it as is said). It names what is asked, so one can see whether it is to the point."""
    return f"To find {chain[-1]}, work out {', '.join(chain if told is None else told)}."


def opening(chain: Sequence[str]) -> Sequence[str]:
    """The first half of a path, rounded up."""
    return chain[: (len(chain) + 1) // 2]


def demonstration(task: Task, approach: str, style: str, is_thorough: bool) -> dict:
    """What a tutor would write, by one rule, in the schema of Arc-ATLAS-Teach-v0.

    Diagnosis: walk back from the question to the given value. Teaching: only where to start if the student's approach was right ("be
    brief if right"); if it was wrong, the whole order from a thorough tutor, the first half of it from one who trusts the student
    with the rest. Style "concise" asks for the start alone, "detailed" for the whole order.
    """
    walk = [task.facts[thing] for thing in reversed(task.chain)]
    is_right = approach.strip() == plan(task.chain)
    told = task.chain if is_thorough else opening(task.chain)
    if style == "concise" or (style == "adaptive" and is_right):
        told = task.chain[:1]
    elif style == "detailed":
        told = task.chain
    return {
        "problem_text": task.question,
        "student_approach": approach,
        "teacher_diagnosis": "\n".join(walk),
        "teacher_teaching": plan(task.chain, told),
        "strategy": style,
    }


def demonstrations(count: int, seed: object, student: Seat) -> list[dict]:
    """`count` demonstrations on mathematics: the student states its approach, the rule above answers; three tutors in ten are
    thorough. Which amount of help serves this student best is not in the demonstrations; finding out is left to GRPO. A sixth
    each is written in the concise and in the detailed style, so that the runtime's styles mean something to the teacher."""
    generated = tasks("math", count, f"demonstrations/{seed}")
    probe = Generation(max_tokens=40, temperature=0.7)
    questions = [
        Question(protocol.probe_messages(task.question), probe, derive_seed(seed, "demonstration", index))
        for index, task in enumerate(generated)
    ]
    replies = student.ask(questions, progress="approaches")
    rng = random.Random(f"styles/{seed}")
    styles = rng.choices(list(protocol.TEACHING_STYLES), weights=(4, 1, 1), k=count)
    return [
        demonstration(task, reply[0].text or "None.", style, is_thorough=rng.random() < 0.3)
        for task, reply, style in zip(generated, replies, styles)
    ]
