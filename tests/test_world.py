"""The nano world against an interpreter that knows nothing of its generator: only how a question is meant to be read."""

import json
import re

import pytest
import tokenizers
import torch
from conftest import ScriptedSeat
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from torch import nn

from benchmarks import pretrain
from benchmarks.robustness import measure
from nano_atlas import protocol, world
from nano_atlas.answers import extract_answer, is_correct, reveals_answer
from nano_atlas.checkpoint import load_model
from nano_atlas.data import load_examples
from nano_atlas.runs import checkpoint_digest, digest
from nano_atlas.sampler import Sampler
from nano_atlas.seats import TokenSeat
from nano_atlas.tokenizer import Tokenizer

COUNT = 200
DIGESTS = {
    "tasks": "2bf49881e19f", "training": "abd4e1c0efa8", "held-out": "59e8dab449e5", "demonstrations": "2d4157a38b1f",
    "reading": "2891e7acbb6a", "following": "1c41860e0e53", "base": "55d68aba5c4e",
}  # fmt: skip


def scale_and_names(text: str) -> tuple[list[str], list[str]]:
    """Of the domain whose things the text names."""
    words = set(re.findall(r"\w+", text))
    (domain,) = [domain for domain in world.DOMAINS.values() if words & set(domain.things)]
    return domain.scale, domain.things


def solve(question: str) -> tuple[str, list[str]]:
    """(answer, things from the given value to the one asked for); a thing is its value, or the one that it names, shifted."""
    scale, things = scale_and_names(question)
    stated = dict(re.findall(r"^(\w+): (\w+)$", question, re.MULTILINE))
    (shift,) = map(int, re.findall(r"[+-]\d+", question))
    asked = re.findall(r"\w+", question)[-1]
    assert asked in things
    path = [asked]
    while stated[path[-1]] not in scale:
        path.append(stated[path[-1]])
    level = scale.index(stated[path[-1]]) + shift * (len(path) - 1)
    assert 0 <= level < len(scale)
    return scale[level], path[::-1]


def told_by(plan: str) -> list[str]:
    """The things that a plan says to work out, in its order."""
    (listed,) = re.fullmatch(r"To find \w+, work out (.+)\.", plan).groups()
    return listed.split(", ")


def check_working(text: str, question: str) -> None:
    """Every `<value> <shift> = <value>` of a worked solution is right, and its last value is the answer."""
    scale, _ = scale_and_names(question)
    for before, shift, after in re.findall(r"(\w+) ([+-]\d+) = (\w+)", text):
        assert scale.index(before) + int(shift) == scale.index(after)
    for line in re.findall(r"^\w+: \w+", text, re.MULTILINE):
        assert line in question.splitlines()  # what it quotes stands there
    assert extract_answer(text) == solve(question)[0]


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_the_stated_answer_is_what_the_question_means(domain):
    generated = world.tasks(domain, COUNT, "test")
    for task in generated:
        answer, path = solve(task.question)
        assert is_correct(task.answer, answer) and list(task.chain) == path
        check_working(task.solution, task.question)
    answers = [task.answer for task in generated]
    most_common = max(answers.count(answer) for answer in set(answers))
    assert most_common / COUNT < 0.25  # guessing the commonest answer does not pay
    assert {len(task.chain) for task in generated} == set(range(world.CHAIN[0], world.CHAIN[1] + 1))


def demonstrations(count: int) -> list[dict]:
    """From a student whose stated approach is sometimes the right one."""
    rules = [lambda question: "No idea.", lambda question: world.plan(solve(question)[1])]
    student = ScriptedSeat(lambda prompt, seed, index: rules[seed % 2](prompt.split("\n\n")[0]))
    return world.demonstrations(count, "test", student)


def test_all_texts_are_those_that_the_published_numbers_are_about():
    """The same draws in the same order: these digests are older than this form of the generator."""
    held_out = [problem for domain in world.DOMAINS for problem in world.held_out(domain, 50, 0)]
    solved = [task for domain in world.DOMAINS for task in world.tasks(domain, 50, "x")]
    assert {name: digest([text.encode() for text in texts])[:12] for name, texts in {
        "tasks": [task.question + task.solution for task in solved],
        "training": [problem.question for problem in world.training_problems(50, 42)],
        "held-out": [problem.id + problem.question for problem in held_out],
        "demonstrations": [json.dumps(record) for record in demonstrations(50)],
        "reading": [turn["content"] + reply for (turn,), reply in pretrain.reading_corpus(50, 4)],
        "following": [turn["content"] + reply for (turn,), reply in pretrain.following_corpus(50, 4)],
        "base": [turn["content"] + reply for (turn,), reply in pretrain.base_corpus(200, 4)],
    }.items()} == DIGESTS  # fmt: skip
    assert (
        world.training_problems(20, 1)
        == world.training_problems(40, 1)[:20]
        != world.training_problems(20, 2)
    )


def test_no_question_is_in_two_of_the_sets():
    texts = (*pretrain.base_corpus(1000, 0), *pretrain.reading_corpus(1000, 0))
    sets = {
        "training": [problem.question for problem in world.training_problems(500, 42)],
        "validation": [problem.question for problem in world.held_out("math", 200, "validation")],
        "test": [problem.question for problem in world.held_out("math", 500, "test")],
        "demonstrations": [record["problem_text"] for record in demonstrations(300)],
        "telecom": [problem.question for problem in world.held_out("telecom", 200, "test")],
        "crm": [problem.question for problem in world.held_out("crm", 200, "test")],
        "corpus": [turn["content"].split("\n\n")[0] for (turn,), _ in texts],
    }
    for name, questions in sets.items():
        others = {question for other, listed in sets.items() if other != name for question in listed}
        assert not others & set(questions), name
        assert name == "corpus" or len(set(questions)) == len(questions), name


def test_the_teacher_is_trained_on_mathematics_only():
    assert {problem.domain for problem in world.training_problems(50, 0)} == {"math"}
    things = set(world.DOMAINS["math"].things)
    assert all(things & set(re.findall(r"\w+", record["problem_text"])) for record in demonstrations(50))


def test_demonstrations_teach_the_order_and_never_a_value(tmp_path):
    records, lengths = demonstrations(300), {}
    for record in records:
        answer, path = solve(record["problem_text"])
        teaching = record["teacher_teaching"]
        assert not reveals_answer(teaching, answer) and not re.search(r"\d", teaching)
        assert teaching.startswith(f"To find {path[-1]},")
        named = told_by(teaching)
        assert named == path[: len(named)]  # the beginning of the path, or all of it
        key = record["strategy"], record["student_approach"] == "No idea."
        lengths.setdefault(key, []).append(len(teaching))
    mean = {key: sum(values) / len(values) for key, values in lengths.items()}
    assert mean["adaptive", False] < mean["adaptive", True]  # brief if right, detailed if wrong
    assert mean["concise", True] < mean["detailed", True]
    assert {record["strategy"] for record in records} == set(protocol.TEACHING_STYLES)
    path = tmp_path / "demonstrations.jsonl"  # in the schema of the published data
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:5]))
    examples = load_examples([path], Tokenizer.from_directory(world.STUDENT), 512)
    assert len(examples) == 5


# -------------------------------------------------------------------------------------------------------- the shipped student


@pytest.fixture(scope="module")
def student() -> TokenSeat:
    return TokenSeat(Sampler(load_model(world.STUDENT)), Tokenizer.from_directory(world.STUDENT))


def test_the_shipped_student_is_the_one_that_all_numbers_are_about(student):
    assert checkpoint_digest(world.STUDENT) == world.STUDENT_DIGEST
    assert sum(file.stat().st_size for file in world.STUDENT.iterdir()) < 1.6e6
    assert 0.5e6 < sum(parameter.numel() for parameter in student.sampler.model.parameters()) < 5e6


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_the_shipped_student_leaves_a_teacher_something_to_do(student, domain):
    """Alone a third to a half, not much more by the first half of a plan, nearly all by the whole one; another's does little harm.
    50 tasks have a standard error of 7 points."""
    row = measure(student, domain, 50)
    assert 0.28 < row["alone"] < 0.6
    assert row["alone"] - 0.1 < row["half a plan"] < row["whole plan"] - 0.2
    assert row["whole plan"] > 0.85 and row["another's plan"] > row["alone"] - 0.15


def test_the_students_tokenizer_keeps_every_text_and_makes_each_tag_one_token(student):
    tokenizer = student.tokenizer
    texts = [
        text for (turn,), reply in pretrain.base_corpus(100, "test") for text in (turn["content"], reply)
    ]
    texts += ["Grüße, 你好 🙂\n\t{}", "<|im_end|> typed by somebody"]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
    for tag in ("<thinking>", "</thinking>", "<teaching>", "</teaching>", "<solution>", "</solution>"):
        assert len(tokenizer.encode(tag)) == 1
    longest = max(len(tokenizer.chat_ids(protocol.teacher_messages(task.question, world.plan(task.chain))))
                  for domain in world.DOMAINS for task in world.tasks(domain, 50, "test"))  # fmt: skip
    room = student.sampler.model.config.max_position_embeddings - longest
    assert room > 100  # for thoughts and a teaching


# ------------------------------------------------------------------------------------------------------- how it was pre-trained


def test_every_text_of_the_base_corpus_is_right():
    """The student is not trained to fail: solutions, plans and look-ups are all true of the question before them."""
    kinds = set()
    for (turn,), reply in (*pretrain.base_corpus(1000, "test"), *pretrain.reading_corpus(100, "test")):
        prompt, question = turn["content"], turn["content"].split("\n\n")[0]
        if protocol.ANSWER_FORMATS["solution"] in prompt:
            check_working(reply, question)
            is_guided = "Teacher's guidance: " in prompt
            assert is_guided or [turn] == protocol.baseline_messages(question)
            kinds.add("guided" if is_guided else "alone")
        elif protocol.PROBE_REQUEST in prompt:
            assert told_by(reply) == solve(question)[1]
            kinds.add("plan")
        elif "In which order?" in prompt or "Think, then teach." in prompt:
            walk = [line.split(": ")[0] for line in question.splitlines()]
            told = reply
            if "Think" in prompt:
                told = protocol.parse_teaching(reply)
                assert reply == protocol.teacher_target(question, told)
            assert told_by(told) == walk[::-1]
            kinds.add("turn around, with tags" if "Think" in prompt else "turn around")
        else:
            assert set(reply.splitlines()) <= set(question.splitlines())
            kinds.add("look up")
    assert kinds == {"alone", "guided", "plan", "turn around", "turn around, with tags", "look up"}


def test_hints_are_texts_guided_by_the_beginning_of_their_plan():
    def beginnings(hints: float) -> int:
        found = 0
        for (turn,), _ in pretrain.base_corpus(1500, "test", hints):
            if guidance := re.search("Teacher's guidance: (.+)", turn["content"]):
                path, told = solve(turn["content"].split("\n\n")[0])[1], told_by(guidance[1])
                found += told == path[: len(told)] and len(told) < len(path)
        return found

    assert beginnings(0.0) < 5 and 50 < 2 * beginnings(0.07) < beginnings(0.3)


def test_one_head_of_the_newborn_student_looks_at_the_token_before():
    """In the first layer the highest score of each query is that of the token before it; other heads have no such preference."""
    model = pretrain.newborn_student(300, 1)
    scores = {}

    def attention(layer, q, k, v):
        if layer == 0:
            scores.update({head: q[:, head] @ k[:, 0].T for head in (0, 1)})
        return torch.zeros_like(q)

    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0))
    model(ids, torch.arange(40), attention)
    is_seen = torch.ones(40, 40).tril().bool()
    looked_at = {head: s.masked_fill(~is_seen, -torch.inf).argmax(1)[1:] for head, s in scores.items()}
    assert (looked_at[0] == torch.arange(39)).all()
    assert (looked_at[1] == torch.arange(39)).float().mean() < 0.3


def test_muon_takes_the_steps_of_torchs_muon():
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in ((24, 24), (24, 8), (8, 24), (24, 8))]
    ours, theirs = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    groups = [
        ([ours[i] for i in group], torch.zeros(len(group), *starts[group[0]].shape))
        for group in ([0], [1, 3], [2])
    ]
    oracle = torch.optim.Muon(theirs, lr=0.02, momentum=pretrain.MOMENTUM, weight_decay=pretrain.WEIGHT_DECAY)
    for _ in range(4):
        for mine, other in zip(ours, theirs):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        pretrain.muon_step(groups, 0.02)
        oracle.step()
    for mine, other, start in zip(ours, theirs, starts):
        moved = (other - start).abs().max()
        assert (mine - other).abs().max() < 0.05 * moved  # torch's orthogonalizes in bfloat16


def test_orthogonalize_flattens_the_singular_values_and_keeps_the_directions():
    matrices = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    s = u.mT @ pretrain.orthogonalize(matrices) @ v.mT  # diagonal, if the directions are kept
    torch.testing.assert_close(s, torch.diag_embed(s.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)
    assert 0.6 < s.diagonal(dim1=-2, dim2=-1).min() and s.max() < 1.3


def test_learning_stops_once_it_has_succeeded(student):
    examples = pretrain.examples_of(pretrain.reading_corpus(20, 0), student.tokenizer)
    model = pretrain.newborn_student(student.tokenizer.vocab_size, 0)
    loss = pretrain.learn(model, examples, examples[:4], 0, epochs=50, eval_every=5, success=4.0)
    assert 2.0 < loss <= 4.0  # the evaluation after which it stopped; 50 epochs reach far below


def test_pre_training_in_small_ends_with_a_checkpoint(tmp_path, monkeypatch):
    losses, learn, following = [], pretrain.learn, pretrain.following_corpus
    monkeypatch.setattr(pretrain, "following_corpus", lambda count, seed: following(15, seed))
    monkeypatch.setattr(pretrain, "learn", lambda *a, **o: losses.append(learn(*a, **o)))
    pretrain.main(["--out", str(tmp_path / "student"), "--texts", "100", "16", "16"])
    assert losses[2] < losses[1]
    assert all(parameter.isfinite().all() for parameter in load_model(tmp_path / "student").parameters())


def test_the_students_tokenizer_is_a_bpe_of_its_corpus_and_of_the_protocols_prompts(tmp_path):
    """How the shipped one was made, to the byte."""
    texts = [
        text
        for (turn,), reply in pretrain.base_corpus(6000, "tokenizer")
        for text in (turn["content"], reply)
    ]
    for task in world.tasks("math", 300, "tokenizer"):
        for style in protocol.TEACHING_STYLES:
            d = world.demonstration(task, world.plan(task.chain), style, is_thorough=True)
            (prompt,) = protocol.teacher_messages(task.question, d["student_approach"], style)
            texts += [prompt["content"], d["teacher_diagnosis"] + "\n" + d["teacher_teaching"]]
    # a line's label ("Ann:") and a rule's step (" +4") are words of their own
    words = pre_tokenizers.Split(tokenizers.Regex(r"\w+:| [+-]\d+| ?\w+| ?[^\s\w]+|\s"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    backend.decoder = decoders.ByteLevel()
    options = {"vocab_size": 1200, "initial_alphabet": as_bytes.alphabet(), "show_progress": False}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=special, **options))
    tags = [f"<{slash}{name}>" for name in ("thinking", "teaching", "solution") for slash in ("", "/")]
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    Tokenizer(backend, eos_token="<|im_end|>", pad_token="<|endoftext|>").save(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (world.STUDENT / file.name).read_bytes()
