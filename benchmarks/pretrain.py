"""How the nano world's student was made from random weights.

    python -m benchmarks.pretrain --out runs/student --seed 4      # 4 to 7 minutes on one core

First it learns to look up (about 200 steps of 1,024 tokens); then from all kinds of texts, until it follows plans (1,100 steps); then a
little more at a falling rate (800 steps). Seed 4 is shipped in nano_atlas/world/student. It is not made on each machine, because
pre-training amplifies the last bits of a matrix product: one command gave a student of 39 % on one processor and of 57 % on another.
All students share a tokenizer, a byte-level BPE trained on the corpus (tests/test_world.py trains it again).
"""

import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nano_atlas import protocol
from nano_atlas.checkpoint import save_model
from nano_atlas.config import option, parse, run_script
from nano_atlas.data import Example, collate, count_targets, make_examples, pack, shuffle_epoch
from nano_atlas.loss import batch_loss
from nano_atlas.model import ModelConfig, Transformer, rope_inverse_frequencies
from nano_atlas.optim import learning_rate
from nano_atlas.tokenizer import Tokenizer
from nano_atlas.world import CHAIN, DOMAINS, FACTS, STUDENT, Task, make_task, opening, plan, tasks

TOKENS_PER_STEP = 1024
MOMENTUM, WEIGHT_DECAY = 0.95, 0.05
Text = tuple[protocol.Messages, str]  # a conversation, and the reply to learn


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> Transformer:
    """Random weights: normal(0, 0.02), output projections scaled down by sqrt(2 L) (GPT-2); reproducible from the seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * model.config.num_hidden_layers) if is_output else 0.02
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


@dataclass(frozen=True)
class Config:
    out: Path = option(Path("runs/student"), "directory of the checkpoint (half precision)")
    seed: int = option(4, "of the first weights and of all texts")
    texts: tuple[int, int, int] = option((8_000, 60_000, 10_000), "texts of each of the three parts")
    hints: float = option(0.07, "share of the texts with half a plan; with more, a student needs less help")


def reading_corpus(count: int, seed: object) -> Iterator[Text]:
    """Looking up alone. It comes first, because a model that cannot find a line learns nothing else about these problems."""
    rng = random.Random(f"reading/{seed}")
    for _ in range(count):
        yield _looking_up(_any_task(rng), rng)


def following_corpus(count: int, seed: object) -> Iterator[Text]:
    """Full-size problems of all domains, each solved by its plan."""
    for domain in DOMAINS:
        for task in tasks(domain, count // len(DOMAINS), f"following/{seed}"):
            yield protocol.guided_messages(task.question, plan(task.chain)), task.solution


def base_corpus(count: int, seed: object, hints: float = Config.hints) -> Iterator[Text]:
    """All kinds of texts, problems of 2 to 8 lines: 8 % look up, 10 % turn a given path around (half with the teacher's tags), 20 % solve
    alone, 5 % plan, 57 % are guided: `hints` (a share of all texts) by the beginning of the plan, 20 % by the plan of an unrelated
    problem with the right solution all the same (guidance is to be read, not obeyed), the others by the whole plan."""
    rng = random.Random(f"corpus/{seed}")
    for _ in range(count):
        task, kind = _any_task(rng), rng.random()
        if kind < 0.08:
            yield _looking_up(task, rng)
        elif kind < 0.18:
            walk = "\n".join(task.facts[thing] for thing in reversed(task.chain))
            request, reply = "In which order?", plan(task.chain)
            if kind < 0.13:
                request, reply = "Think, then teach.", protocol.teacher_target(walk, reply)
            yield protocol.user_turn(walk, request), reply
        elif kind < 0.38:
            yield protocol.baseline_messages(task.question), task.solution
        elif kind < 0.43:
            yield protocol.probe_messages(task.question), plan(task.chain)
        else:
            teaching = plan(task.chain)
            if kind > 0.80:
                teaching = plan(make_task(DOMAINS[task.domain], rng, rng.randint(1, CHAIN[1])).chain)
            elif kind > 0.80 - hints:
                teaching = plan(task.chain, rng.choice((task.chain[:1], opening(task.chain))))
            yield protocol.guided_messages(task.question, teaching), task.solution


def _any_task(rng: random.Random) -> Task:
    facts = rng.randint(2, FACTS)
    return make_task(rng.choice(list(DOMAINS.values())), rng, rng.randint(1, min(facts, CHAIN[1])), facts)


def _looking_up(task: Task, rng: random.Random) -> Text:
    asked = rng.sample(list(task.facts), len(task.facts))
    messages = protocol.user_turn("\n".join(task.facts.values()), f"What is said of {', '.join(asked)}?")
    return messages, "\n".join(task.facts[thing] for thing in asked)


def examples_of(texts: Iterable[Text], tokenizer: Tokenizer) -> list[Example]:
    chats = [[*messages, {"role": "assistant", "content": reply}] for messages, reply in texts]
    return [example for chat in chats for example in make_examples({"messages": chat}, tokenizer, "corpus")]


@torch.no_grad()
def newborn_student(vocab_size: int, seed: int) -> Transformer:
    """Random weights (0.74M, Qwen3's layout) except one head initialised to attend to the previous token.

    Without it, learning which label stands before a value takes 300 to more than 4,000 steps; with it 200. Channel 0 is the same in all
    embeddings; from it the head makes a query u and a key that is u turned by one position, so that their product after the rotary
    embedding, a sum of cos(frequency * (distance - 1)), is largest at distance 1.
    """
    config = ModelConfig(
        "qwen3", vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=512, rope_theta=1000.0, qk_norm=True, tie_word_embeddings=True,
    )  # fmt: skip
    model = initialize(Transformer(config), seed)
    attention, embedding = model.model.layers[0].self_attn, model.model.embed_tokens.weight
    embedding[:, 0] = embedding.std() * config.hidden_size**0.5
    pairs, half = 2, config.head_dim // 2  # the fastest pairs: their products fall off within a few positions
    turn = rope_inverse_frequencies(config)[:pairs]
    for weight, angle in ((attention.q_proj.weight, torch.zeros(pairs)), (attention.k_proj.weight, turn)):
        weight[: config.head_dim] *= 0.1
        weight[:pairs, 0], weight[half : half + pairs, 0] = angle.cos(), angle.sin()
    return model


def orthogonalize(matrices: Tensor) -> Tensor:
    """Roughly U V^T of each matrix's SVD, singular values in [0.7, 1.2]; `[n, rows, columns]` float32. Quintic Newton-Schulz iteration
    with the coefficients of Jordan et al. 2024."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if is_tall else x


@torch.no_grad()
def muon_step(groups: Iterable[tuple[Sequence[Tensor], Tensor]], rate: float) -> None:
    """One step of orthogonalized momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon), which needs a third of AdamW's tokens
    here. Like torch.optim.Muon, but float32 and 3 times as fast: a group is n matrices of one shape, and their average gradients."""
    for matrices, averages in groups:
        gradients = torch.stack([matrix.grad for matrix in matrices])
        averages.lerp_(gradients, 1 - MOMENTUM)
        updates = orthogonalize(gradients.lerp(averages, MOMENTUM))  # Nesterov's look ahead
        scale = max(1.0, updates.shape[-2] / updates.shape[-1]) ** 0.5
        for matrix, update in zip(matrices, updates):
            matrix.mul_(1 - rate * WEIGHT_DECAY).sub_(update, alpha=rate * scale)


def step_losses(model: Transformer, examples: Sequence[Example]) -> Iterator[Tensor]:
    """The loss of each micro-batch of a step; their sum is in nats per learned token."""
    total = count_targets(examples)
    for group in pack([len(example.input_ids) - 1 for example in examples], TOKENS_PER_STEP):
        yield batch_loss(model, collate([examples[i] for i in group]), total)


def learn(
    model: Transformer, learned: Sequence[Example], held_out: Sequence[Example], seed: int, epochs: int = 1,
    schedule: str = "constant", eval_every: int = 100, success: float = 0.1,
) -> float:  # fmt: skip
    """Train in place until the loss on `held_out` is at most `success` (nats per token) or the epochs end; returns that loss."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for name, matrix in model.named_parameters():
        if ".layers." in name and matrix.ndim == 2:
            by_shape.setdefault(matrix.shape, []).append(matrix)
    groups = [(matrices, torch.zeros(len(matrices), *shape)) for shape, matrices in by_shape.items()]
    norms = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    embedding = {"params": [model.model.embed_tokens.weight], "weight_decay": WEIGHT_DECAY}
    adamw = torch.optim.AdamW([embedding, norms], betas=(0.9, 0.98), fused=True)
    lengths = [len(example.input_ids) - 1 for example in learned]
    steps = [step for epoch in range(epochs) for step in shuffle_epoch(lengths, TOKENS_PER_STEP, seed, epoch)]
    for number, step in enumerate(progress := tqdm(steps, unit="step")):
        for loss in step_losses(model, [learned[i] for i in step]):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate(number, len(steps), 3e-3, 0.02, schedule)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        muon_step(groups, 2 * rate)
        model.zero_grad()
        if (number + 1) % eval_every == 0 or number + 1 == len(steps):
            with torch.no_grad():
                held_out_loss = sum(loss.item() for loss in step_losses(model, held_out))
            progress.set_description(f"held-out loss {held_out_loss:.3f}")
            if held_out_loss <= success:
                break
    return held_out_loss


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(Config, sys.argv[1:] if argv is None else argv, {}, __doc__)
    seed, tokenizer = config.seed, Tokenizer.from_directory(STUDENT)
    model = newborn_student(tokenizer.vocab_size, seed)
    looking_up = examples_of(reading_corpus(config.texts[0], seed), tokenizer)
    cut = len(looking_up) // 100
    learn(model, looking_up[cut:], looking_up[:cut], seed, epochs=4, eval_every=25)
    following = examples_of(following_corpus(150, seed), tokenizer)
    everything = examples_of(base_corpus(config.texts[1], seed, config.hints), tokenizer)
    learn(model, everything, following, seed)
    more = examples_of(base_corpus(config.texts[2], f"settling/{seed}", config.hints), tokenizer)
    learn(model, more, following, seed, schedule="cosine", success=0.0)
    save_model(config.out, model.to(torch.float16), tokenizer)


if __name__ == "__main__":
    run_script(main)
