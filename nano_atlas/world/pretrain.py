"""How the nano world's student was made: from random weights, in three lessons.

    python -m nano_atlas.world.pretrain --out runs/pretrain --seed 4     # 4 to 7 minutes on one core
    python -m nano_atlas.world.pretrain --measure runs/pretrain/shipped  # alone, by half a plan, by the whole, by another's plan

The result for seed 4 is shipped in nano_atlas/world/student (half precision). It is shipped, and not made on each machine, because
pre-training amplifies the last bits of a matrix product: the same command gave a student of 39 % on one processor and of 57 % on another.

    reader     looking up alone, until it can: held-out loss at most 0.1    (about 200 steps of 1,024 tokens)
    follower   all kinds of texts, until it follows plans: the same bound   (about 1,100 steps)
    student    a little more at a falling rate                              (about 800 steps)

An interrupted run goes on after its last whole lesson.
"""

import argparse
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from nano_atlas import protocol
from nano_atlas.checkpoint import is_checkpoint, load_model, save_model
from nano_atlas.data import (
    Batch,
    Example,
    collate,
    count_targets,
    make_examples,
    pack,
    shuffle_epoch,
    steps_per_epoch,
)
from nano_atlas.errors import UserError
from nano_atlas.loss import batch_loss
from nano_atlas.model import ModelConfig, Transformer, rope_inverse_frequencies
from nano_atlas.optim import learning_rate
from nano_atlas.runs import read_json, write_json
from nano_atlas.seats import Generation, Question, Seat, open_seat
from nano_atlas.tokenizer import Tokenizer
from nano_atlas.world import CHAIN, DOMAINS, FACTS, Task, demonstration, make_task, opening, plan, tasks


class Lesson(NamedTuple):
    texts: int
    epochs: int = 1
    schedule: str = "constant"
    eval_every: int = 100  # steps
    success: float | None = 0.1  # held-out loss (nats per learned token) at which the lesson ends


LESSONS = {
    "reader": Lesson(8_000, epochs=4, eval_every=25),
    "follower": Lesson(60_000),
    "student": Lesson(10_000, schedule="cosine", success=None),
}
TOKENS_PER_STEP = 1024
HINTS = 0.07  # share of the texts that are guided by the beginning of a plan; a student that is taught more of them needs less help

# -------------------------------------------------------------------------------------------------------------- corpora


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


def base_corpus(count: int, seed: object, hints: float = HINTS) -> Iterator[dict]:
    """The student's pre-training texts as chats, all domains alike: 8 % looking up, 10 % turning a given path around (half of them
    with tags, which a language model has seen everywhere), 20 % solving alone, 5 % planning, 57 % guided. Problems have 2 to 8 lines
    and any path length that fits.

    Of the guided ones `hints` (a share of all texts) get the beginning of the plan, 20 % the plan of an unrelated problem, with the
    right solution all the same (guidance is to be read, not obeyed), and the others the whole plan.
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
                messages, reply = (
                    protocol.user_turn(f"{walk}\n\nThink, then teach."),
                    protocol.teacher_target(walk, reply),
                )
        elif kind < 0.38:
            messages, reply = protocol.baseline_messages(task.question), task.solution
        elif kind < 0.43:
            messages, reply = protocol.probe_messages(task.question), plan(task.chain)
        else:
            teaching = plan(task.chain)
            if kind > 0.80:
                teaching = plan(make_task(DOMAINS[task.domain], rng, rng.randint(1, CHAIN[1])).chain)
            elif kind > 0.80 - hints:
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


# ------------------------------------------------------------------------------------------------ tokenizer, first weights


def make_tokenizer(vocab_size: int = 1200) -> Tokenizer:
    """A byte-level BPE trained on the corpus and on the protocol's own prompts; the tags are single tokens, as in Qwen3."""
    texts = [message["content"] for chat in base_corpus(6000, "tokenizer") for message in chat["messages"]]
    sample = tasks("math", 300, "tokenizer")
    demonstrations = [
        demonstration(task, plan(task.chain), style, is_thorough=True)
        for task in sample
        for style in protocol.TEACHING_STYLES
    ]
    for d in demonstrations:
        texts += [
            m["content"]
            for m in protocol.teacher_messages(d["problem_text"], d["student_approach"], d["strategy"])
        ]
        texts.append(d["teacher_diagnosis"] + "\n" + d["teacher_teaching"])
    backend = tokenizers.Tokenizer(models.BPE())
    words = tokenizers.Regex(
        r"\w+:| [+-]\d+| ?\w+| ?[^\s\w]+|\s"
    )  # a line's label and a rule's step are words of their own
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
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
    pairs, half = (
        2,
        model.config.head_dim // 2,
    )  # the fastest pairs, whose products fall off within a few positions
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


# ------------------------------------------------------------------------------------------------------------- training


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Roughly U V^T of each matrix's singular value decomposition; matrices `[n, rows, columns]` float32.

    The quintic Newton-Schulz iteration with the coefficients of Jordan et al. 2024: singular values end in about [0.7, 1.2].
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon): from random weights it needs a third of the
    tokens that AdamW does. Like torch.optim.Muon, but in float32 and all matrices of one shape at once, which is 3 times as fast."""

    def __init__(
        self, params: list[Tensor], lr: float = 0.0, momentum: float = 0.95, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in group["params"]:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                average = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                updates.append(parameter.grad.lerp(average, group["momentum"]))  # Nesterov's look ahead
            step_size = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(parameters, orthogonalize(torch.stack(updates))):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=step_size)


def micro_batches(examples: Sequence[Example]) -> list[Batch]:
    lengths = [len(example.input_ids) - 1 for example in examples]
    return [collate([examples[i] for i in group]) for group in pack(lengths, TOKENS_PER_STEP)]


def learn(
    model: Transformer,
    learned: list[Example],
    held_out: list[Example],
    *,
    name: str,
    epochs: int,
    seed: int,
    schedule: str,
    eval_every: int,
    success: float | None,
) -> float:
    """Train in place for `epochs`, or until the loss on `held_out` is at most `success`; returns that loss (nats per token)."""
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    muon = Muon(matrices, weight_decay=0.05)
    adamw = torch.optim.AdamW([{"params": [model.model.embed_tokens.weight], "weight_decay": 0.05},
                               {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True)  # fmt: skip
    lengths = [len(example.input_ids) - 1 for example in learned]
    epoch_steps = steps_per_epoch(lengths, TOKENS_PER_STEP)
    loss_held_out = float("inf")
    with tqdm(total=epochs * epoch_steps, unit="step", desc=name) as progress:
        for step in range(epochs * epoch_steps):
            epoch, index = divmod(step, epoch_steps)
            if index == 0:
                steps = shuffle_epoch(lengths, TOKENS_PER_STEP, seed, epoch)
            examples = [learned[i] for i in steps[index]]
            total = count_targets(examples)
            for batch in micro_batches(examples):
                batch_loss(model, batch, total).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = learning_rate(step, epochs * epoch_steps, 3e-3, 0.02, schedule)
            for optimizer, scale in ((adamw, 1.0), (muon, 2.0)):
                for group in optimizer.param_groups:
                    group["lr"] = scale * rate
                optimizer.step()
            model.zero_grad()
            progress.update()
            if (step + 1) % eval_every == 0 or step + 1 == epochs * epoch_steps:
                total = count_targets(held_out)
                with torch.no_grad():
                    loss_held_out = sum(
                        batch_loss(model, batch, total).item() for batch in micro_batches(held_out)
                    )
                progress.set_postfix_str(f"held-out loss {loss_held_out:.3f}")
                if success is not None and loss_held_out <= success:
                    break
    return loss_held_out


def pretrain(out: Path, seed: int, texts: dict[str, int], hints: float = HINTS) -> Path:
    """All lessons, on `texts` texts each; each ends with a checkpoint `out/LESSON`. Returns `out/shipped`, the last one in half precision.

    Raises UserError where `out` holds lessons of another seed or other texts.
    """
    options = {"seed": seed, "texts": texts, "hints": hints}
    if read_json(out / "options.json") not in ({}, options):
        raise UserError(
            f"{out} holds lessons of other options ({out / 'options.json'}); choose another --out, or delete it"
        )
    write_json(out / "options.json", options)
    if is_checkpoint(out / "reader"):
        tokenizer = Tokenizer.from_directory(out / "reader")
    else:
        tokenizer = make_tokenizer()
    model = newborn_student(tokenizer.vocab_size, seed)
    following = examples_of(following_corpus(150, seed), tokenizer)
    for name, count in texts.items():
        if is_checkpoint(out / name):
            model = load_model(out / name)
            continue
        corpus = {"reader": reading_corpus(count, seed), "follower": base_corpus(count, seed, hints),
                  "student": base_corpus(count, f"settling/{seed}", hints)}[name]  # fmt: skip
        learned, held_out = examples_of(corpus, tokenizer), following
        if name == "reader":
            learned, held_out = learned[len(learned) // 100 :], learned[: len(learned) // 100]
        lesson = LESSONS[name]
        loss = learn(
            model,
            learned,
            held_out,
            name=name,
            seed=seed,
            epochs=lesson.epochs,
            schedule=lesson.schedule,
            eval_every=lesson.eval_every,
            success=lesson.success,
        )
        save_model(out / name, model, tokenizer)
        print(f"{out / name}: held-out loss {loss:.3f}", flush=True)
    save_model(out / "shipped", model, tokenizer, dtype=torch.float16)
    return out / "shipped"


def examples_of(records: Iterable[dict], tokenizer: Tokenizer) -> list[Example]:
    return [example for record in records for example in make_examples(record, tokenizer, "corpus")]


# ------------------------------------------------------------------------------------------------------------- measures


def measure(student: Seat, count: int, seed: object = "measure") -> dict[str, dict[str, float]]:
    """Per domain the accuracy (0 to 1) on `count` full-size problems: alone, by the first half of a plan, by the whole plan, and by
    the plan of another problem. Greedy."""
    table = {}
    for domain in DOMAINS:
        generated = tasks(domain, count, seed)
        kinds = {
            "alone": lambda i: None,
            "half a plan": lambda i: plan(generated[i].chain, opening(generated[i].chain)),
            "whole plan": lambda i: plan(generated[i].chain),
            "another's plan": lambda i: plan(generated[i - 1].chain),
        }
        right = is_right(
            student, [(task, told(i)) for told in kinds.values() for i, task in enumerate(generated)]
        )
        table[domain] = {
            kind: sum(right[k * count : (k + 1) * count]) / count for k, kind in enumerate(kinds)
        }
    return table


def is_right(student: Seat, taught: Sequence[tuple[Task, str | None]]) -> list[bool]:
    """Whether it solves each task with what it is told (None: nothing). Greedy."""
    replies = student.ask(
        [
            Question(protocol.guided_messages(task.question, told), Generation(120, 0.0), 0)
            for task, told in taught
        ]
    )
    return [
        protocol.is_correct(protocol.extract_answer(reply.text), task.answer)
        for (reply,), (task, _) in zip(replies, taught)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/pretrain"),
        help="where the lessons' checkpoints go (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=4, help="of the first weights and of all texts (default: %(default)s)"
    )
    for name, lesson in LESSONS.items():
        parser.add_argument(
            f"--{name}-texts",
            type=int,
            default=lesson.texts,
            metavar="N",
            help="texts of this lesson (default: %(default)s)",
        )
    parser.add_argument(
        "--hints",
        type=float,
        default=HINTS,
        help="share of the texts with the beginning of a plan (default: %(default)s)",
    )
    parser.add_argument(
        "--measure", type=Path, nargs="+", metavar="DIR", help="train nothing, measure these checkpoints"
    )
    parser.add_argument(
        "--tasks", type=int, default=500, help="problems per domain and measure (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    texts = {name: getattr(options, f"{name}_texts") for name in LESSONS}
    students = options.measure or [pretrain(options.out, options.seed, texts, options.hints)]
    for path in students:
        print(path)
        for domain, row in measure(open_seat(str(path)), options.tasks).items():
            print(
                f"  {domain:8}" + "".join(f"   {kind} {100 * share:5.1f}" for kind, share in row.items()),
                flush=True,
            )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
