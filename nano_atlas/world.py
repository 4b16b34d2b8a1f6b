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

The *base corpus* pre-trains the student on all three: looking up, plans, worked solutions, and solutions that follow a
given plan. Every text in it is right; nothing teaches failure. The *demonstrations*, for the teacher alone, are mathematics only.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from nano_atlas import protocol
from nano_atlas.data import Problem, derive_seed
from nano_atlas.model import ModelConfig, Transformer, rope_inverse_frequencies
from nano_atlas.seats import Generation, Question, Seat
from nano_atlas.tokenizer import Tokenizer

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
            things=tuple((
                "Abe Ada Amy Ann Ben Bob Cal Dan Dee Eli Eva Eve Fay Gus Guy Hal Ian Ida Ira Ivy Jan Jim Joe Kay Ken "
                "Kim Leo Liz Lou Mac Mia Ned Pam Pat Ray Roy Sal Sue Tom Zoe"
            ).split()),
            scale=tuple(str(value) for value in range(1, 31)),
            longest_shift=4,
            question="What number is {thing}?",
        ),
        Domain(
            name="telecom",
            things=tuple((
                "Adapter Antenna Beacon Bridge Cable Camera Charger Console Data Dial Dns Dongle Fiber Filter Fuse "
                "Gateway Handset Hotspot Hub Intercom Mast Mms Modem Pager Phone Port Printer Proxy Relay Repeater "
                "Roaming Router Sensor Server Sim Splitter Switch Tower Voice Wifi"
            ).split()),
            scale=tuple("off dead faint weak fair good strong great perfect".split()),
            longest_shift=2,
            question="In what state is {thing}?",
        ),
        Domain(
            name="crm",
            things=tuple((
                "Addon Appeal Audit Bid Bonus Bundle Claim Contract Credit Deal Demo Discount Exchange Export Fee "
                "Grant Import Invoice Lease License Loan Merge Offer Order Patch Permit Pilot Pledge Quote Rebate "
                "Refund Renewal Return Reward Sample Tender Transfer Trial Upgrade Waiver"
            ).split()),
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
        sources[thing] = rng.choice(list(sources)) if index >= GIVEN - 1 else None  # the first ones are other places to start
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
    listed = [thing for thing in order if thing != chain[-1]] + [chain[-1]]  # what is asked for last, where it is easy to read
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


def held_out(domain: str, count: int, seed: object) -> list[Problem]:
    return as_problems(tasks(domain, count, f"held-out/{seed}"), f"held-out-{domain}")


def plan(chain: Sequence[str], told: Sequence[str] | None = None) -> str:
    """In which order to work (`told`: as much of it as is said). It names what is asked, so one can see whether it is to the point."""
    return f"To find {chain[-1]}, work out {', '.join(chain if told is None else told)}."


def opening(chain: Sequence[str]) -> Sequence[str]:
    """The first half of a path, rounded up."""
    return chain[: (len(chain) + 1) // 2]


def reading_corpus(count: int, seed: object) -> Iterator[dict]:
    """Texts of looking up alone, of all domains: where everything begins, because a model that cannot yet find a line learns nothing
    else about these problems."""
    rng = random.Random(f"reading/{seed}")
    for _ in range(count):
        yield _chat(*_looking_up(_any_task(rng), rng))


def following_corpus(count: int, seed: object) -> Iterator[dict]:
    """Full-size problems of all domains, each solved by its plan."""
    for domain in DOMAINS:
        for task in tasks(domain, count // len(DOMAINS), f"following/{seed}"):
            yield _chat(protocol.guided_messages(task.question, plan(task.chain)), task.solution)


def base_corpus(count: int, seed: object) -> Iterator[dict]:
    """The student's pre-training texts as chats, all domains alike: 8 % looking up, 10 % turning a given path around (half of them
    with tags, which a language model has seen everywhere), 20 % solving alone, 5 % planning, 57 % guided. Problems have 2 to 8 lines
    and any path length that fits.

    Of the guided ones half get the plan, an eighth its beginning, and the others the plan of an unrelated problem, with the right
    solution all the same: guidance is to be read, not obeyed.
    """
    rng = random.Random(f"corpus/{seed}")
    for _ in range(count):
        task, kind = _any_task(rng), rng.random()
        if kind < 0.08:
            messages, reply = _looking_up(task, rng)
        elif kind < 0.18:
            walk = "\n".join(task.facts[thing] for thing in reversed(task.chain))
            messages, reply = protocol.user_turn(f"{walk}\n\nIn which order?"), plan(task.chain)
            if kind < 0.13:
                messages, reply = protocol.user_turn(f"{walk}\n\nThink, then teach."), protocol.teacher_target(walk, reply)
        elif kind < 0.38:
            messages, reply = protocol.baseline_messages(task.question), task.solution
        elif kind < 0.43:
            messages, reply = protocol.probe_messages(task.question), plan(task.chain)
        else:
            teaching = plan(task.chain)
            if kind > 0.80:
                teaching = plan(make_task(DOMAINS[task.domain], rng, rng.randint(1, CHAIN[1])).chain)
            elif kind > 0.73:
                teaching = plan(task.chain, rng.choice((task.chain[:1], opening(task.chain))))
            messages, reply = protocol.guided_messages(task.question, teaching), task.solution
        yield _chat(messages, reply)


def _any_task(rng: random.Random) -> Task:
    facts = rng.randint(2, FACTS)
    return make_task(rng.choice(list(DOMAINS.values())), rng, rng.randint(1, min(facts, CHAIN[1])), facts)


def _looking_up(task: Task, rng: random.Random) -> tuple[protocol.Messages, str]:
    asked = rng.sample(list(task.facts), len(task.facts))
    content = "\n".join(task.facts.values()) + f"\n\nWhat is said of {', '.join(asked)}?"
    return protocol.user_turn(content), "\n".join(task.facts[thing] for thing in asked)


def _chat(messages: protocol.Messages, reply: str) -> dict:
    return {"messages": [*messages, {"role": "assistant", "content": reply}]}


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


def make_tokenizer(vocab_size: int = 1200) -> Tokenizer:
    """A byte-level BPE trained on the corpus and on the protocol's own prompts; the tags are single tokens, as in Qwen3."""
    texts = [message["content"] for chat in base_corpus(6000, "tokenizer") for message in chat["messages"]]
    sample = tasks("math", 300, "tokenizer")
    demonstrations = [
        demonstration(task, plan(task.chain), style, is_thorough=True) for task in sample for style in protocol.TEACHING_STYLES
    ]
    for d in demonstrations:
        texts += [m["content"] for m in protocol.teacher_messages(d["problem_text"], d["student_approach"], d["strategy"])]
        texts.append(d["teacher_diagnosis"] + "\n" + d["teacher_teaching"])
    backend = tokenizers.Tokenizer(models.BPE())
    words = tokenizers.Regex(r"\w+:| [+-]\d+| ?\w+| ?[^\s\w]+|\s")  # a line's label and a rule's step are words of their own
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tags = [f"<{slash}{name}>" for name in ("thinking", "teaching", "solution") for slash in ("", "/")]
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return Tokenizer(backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


@torch.no_grad()
def newborn_student(vocab_size: int, seed: int) -> Transformer:
    """Random weights, but for one head that looks at the token before.

    To find a line one must know, at the value, which label stood before it, and from random weights it takes luck to get there: 300
    to more than 4,000 steps of looking up. With this head it is found within 200. Every trained language model has such heads.
    Channel 0 is the same in all embeddings; from it the head makes a query u and a key that is u turned by one position, so that
    after the rotary embedding their product, the sum over pairs of channels of cos(frequency * (distance - 1)), is largest at 1.
    """
    model = Transformer(student_config(vocab_size)).initialize(seed)
    attention, embedding = model.model.layers[0].self_attn, model.model.embed_tokens.weight
    embedding[:, 0] = embedding.std() * model.config.hidden_size**0.5
    pairs, half = 2, model.config.head_dim // 2  # the fastest pairs, whose products fall off within a few positions
    turn = rope_inverse_frequencies(model.config)[:pairs]
    for weight, angle in ((attention.q_proj.weight, torch.zeros(pairs)), (attention.k_proj.weight, turn)):
        weight[: model.config.head_dim] *= 0.1
        weight[:pairs, 0], weight[half : half + pairs, 0] = angle.cos(), angle.sin()
    return model


def student_config(vocab_size: int) -> ModelConfig:
    """A 0.74M-parameter model of the Qwen3 layout."""
    return ModelConfig(
        model_type="qwen3",
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_theta=1000.0,
        qk_norm=True,
        tie_word_embeddings=True,
    )
