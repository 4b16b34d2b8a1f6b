"""The nano world against an interpreter that knows nothing of its generator: only how a question is meant to be read."""

import json
import re
import shutil

import pytest
import torch
from conftest import ScriptedSeat
from torch import nn

from nano_atlas import protocol, world
from nano_atlas.checkpoint import load_model
from nano_atlas.errors import UserError
from nano_atlas.runs import checkpoint_digest
from nano_atlas.seats import EmbeddedSeat
from nano_atlas.tokenizer import Tokenizer
from nano_atlas.world import pretrain

COUNT = 200


def scale_and_names(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
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
    assert protocol.extract_answer(text) == solve(question)[0]


@pytest.mark.parametrize("domain", world.DOMAINS)
def test_the_stated_answer_is_what_the_question_means(domain):
    generated = world.tasks(domain, COUNT, "test")
    for task in generated:
        answer, path = solve(task.question)
        assert protocol.is_correct(task.answer, answer) and list(task.chain) == path
        check_working(task.solution, task.question)
    answers = [task.answer for task in generated]
    most_common = max(answers.count(answer) for answer in set(answers))
    assert most_common / COUNT < 0.25  # guessing the commonest answer does not pay
    assert {len(task.chain) for task in generated} == set(range(world.CHAIN[0], world.CHAIN[1] + 1))


def test_problems_are_those_of_their_seed():
    assert world.training_problems(20, 1) == world.training_problems(20, 1)
    assert (
        world.training_problems(20, 1) == world.training_problems(40, 1)[:20]
    )  # a longer run begins as the shorter one
    assert world.training_problems(20, 1) != world.training_problems(20, 2)
    assert world.held_out("crm", 20, "test") == world.held_out("crm", 20, "test")
    assert (
        list(pretrain.base_corpus(20, 1))
        == list(pretrain.base_corpus(20, 1))
        != list(pretrain.base_corpus(20, 2))
    )


def teaching_demonstrations(count: int) -> list[dict]:
    """From a student whose stated approach is sometimes the right one."""
    rules = [lambda question: "No idea.", lambda question: world.plan(solve(question)[1])]
    student = ScriptedSeat(lambda prompt, seed, index: rules[seed % 2](prompt.split("\n\n")[0]))
    return world.demonstrations(count, "test", student)


def test_no_question_is_in_two_of_the_sets():
    sets = {
        "training": [problem.question for problem in world.training_problems(500, 42)],
        "validation": [problem.question for problem in world.held_out("math", 200, "validation")],
        "test": [problem.question for problem in world.held_out("math", 500, "test")],
        "demonstrations": [record["problem_text"] for record in teaching_demonstrations(300)],
        "telecom": [problem.question for problem in world.held_out("telecom", 200, "test")],
        "crm": [problem.question for problem in world.held_out("crm", 200, "test")],
        "corpus": [
            chat["messages"][0]["content"].split("\n\n")[0]
            for chat in (*pretrain.base_corpus(1000, 0), *pretrain.reading_corpus(1000, 0))
        ],
    }
    for name, questions in sets.items():
        others = {question for other, listed in sets.items() if other != name for question in listed}
        assert not others & set(questions), name
        assert name == "corpus" or len(set(questions)) == len(questions), name


def test_the_teacher_is_trained_on_mathematics_only():
    assert {problem.domain for problem in world.training_problems(50, 0)} == {"math"}
    things = set(world.DOMAINS["math"].things)
    assert all(
        things & set(re.findall(r"\w+", record["problem_text"])) for record in teaching_demonstrations(50)
    )


def test_demonstrations_teach_the_order_and_never_a_value():
    records = teaching_demonstrations(300)
    lengths = {}
    for record in records:
        answer, path = solve(record["problem_text"])
        teaching = record["teacher_teaching"]
        assert not protocol.reveals_answer(teaching, answer) and not re.search(r"\d", teaching)
        assert teaching.startswith(f"To find {path[-1]},")
        named = told_by(teaching)
        assert named == path[: len(named)]  # the beginning of the path, or all of it
        lengths.setdefault((record["strategy"], record["student_approach"] == "No idea."), []).append(
            len(teaching)
        )
    mean = {key: sum(values) / len(values) for key, values in lengths.items()}
    assert mean["adaptive", False] < mean["adaptive", True]  # brief if right, detailed if wrong
    assert mean["concise", True] < mean["detailed", True]
    assert len(records) == 300 and {record["strategy"] for record in records} == set(protocol.TEACHING_STYLES)


def test_demonstrations_are_in_the_schema_of_the_published_data(tmp_path):
    from nano_atlas.data import load_examples

    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in teaching_demonstrations(5)))
    examples, left_out = load_examples([path], Tokenizer.from_directory(world.STUDENT), 512)
    assert len(examples) == 5 and not left_out


# -------------------------------------------------------------------------------------------------------- the shipped student


def test_the_shipped_student_is_the_one_that_all_numbers_are_about():
    assert checkpoint_digest(world.STUDENT) == world.STUDENT_DIGEST
    assert sum(file.stat().st_size for file in world.STUDENT.iterdir()) < 1.6e6
    assert 0.5e6 < sum(parameter.numel() for parameter in load_model(world.STUDENT).parameters()) < 5e6


def test_the_shipped_student_leaves_a_teacher_something_to_do():
    """Alone a third to a half, not much more by the first half of a plan, nearly all by the whole one; another's does little harm.
    150 tasks have a standard error of 4 points."""
    for domain, row in pretrain.measure(
        EmbeddedSeat(load_model(world.STUDENT), Tokenizer.from_directory(world.STUDENT)), 150
    ).items():
        assert 0.28 < row["alone"] < 0.57, domain
        assert row["alone"] - 0.05 < row["half a plan"] < row["whole plan"] - 0.2, domain
        assert row["whole plan"] > 0.87 and row["another's plan"] > row["alone"] - 0.12, domain


def test_the_tokenizer_of_the_student_keeps_every_text_and_makes_each_tag_one_token():
    tokenizer = Tokenizer.from_directory(world.STUDENT)
    texts = [message["content"] for chat in pretrain.base_corpus(100, "test") for message in chat["messages"]]
    texts += ["Grüße, 你好 🙂\n\t{}", "<|im_end|> typed by somebody"]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)
    for tag in ("<thinking>", "</thinking>", "<teaching>", "</teaching>", "<solution>", "</solution>"):
        assert len(tokenizer.encode(tag)) == 1
    longest = max(len(tokenizer.chat_ids(protocol.teacher_messages(task.question, world.plan(task.chain))))
                  for domain in world.DOMAINS for task in world.tasks(domain, 50, "test"))  # fmt: skip
    assert (
        longest + 100 < load_model(world.STUDENT).config.max_position_embeddings
    )  # room for thoughts and a teaching


# ------------------------------------------------------------------------------------------------------- how it was pre-trained


def test_every_text_of_the_base_corpus_is_right():
    """The student is not trained to fail: solutions, plans and look-ups are all true of the question before them."""
    kinds = set()
    for chat in (*pretrain.base_corpus(1000, "test"), *pretrain.reading_corpus(100, "test")):
        prompt, reply = (message["content"] for message in chat["messages"])
        assert [message["role"] for message in chat["messages"]] == ["user", "assistant"]
        question = prompt.split("\n\n")[0]
        if protocol.ANSWER_FORMAT in prompt:
            check_working(reply, question)
            is_guided = "Teacher's guidance: " in prompt
            assert is_guided or [{"role": "user", "content": prompt}] == protocol.baseline_messages(question)
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
        for chat in pretrain.base_corpus(1500, "test", hints):
            prompt = chat["messages"][0]["content"]
            if "Teacher's guidance: " in prompt:
                path, told = (
                    solve(prompt.split("\n\n")[0])[1],
                    told_by(re.search("Teacher's guidance: (.+)", prompt)[1]),
                )
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


@pytest.mark.parametrize("shape", [(24, 24), (24, 8), (8, 24)])
def test_muon_takes_the_steps_of_torchs_muon(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    muon = pretrain.Muon([ours], lr=0.02, weight_decay=0.1)
    oracle = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        oracle.step()
    moved = (theirs - start).abs().max()
    assert (ours - theirs).abs().max() < 0.05 * moved  # torch's orthogonalizes in bfloat16


def test_orthogonalize_flattens_the_singular_values_and_keeps_the_directions():
    matrices = torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    s = u.mT @ pretrain.orthogonalize(matrices) @ v.mT  # diagonal, if the directions are kept
    torch.testing.assert_close(s, torch.diag_embed(s.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)
    assert 0.6 < s.diagonal(dim1=-2, dim2=-1).min() and s.max() < 1.3


def test_pre_training_from_nothing_to_a_measured_student(tmp_path, capsys):
    """In small: each lesson lowers the loss on what it teaches, a second call makes only what is missing, and gives the same bits."""
    few = [
        "--reader-texts",
        "200",
        "--follower-texts",
        "150",
        "--student-texts",
        "100",
        "--tasks",
        "5",
        "--seed",
        "1",
    ]
    pretrain.main(["--out", str(tmp_path / "a"), *few])
    said = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", said)]
    assert len(losses) == 3 and losses[2] < losses[1]
    assert re.search(r"math +alone +[\d.]+ +half a plan +[\d.]+ +whole plan +[\d.]+ +another's plan", said)
    weights = (tmp_path / "a/shipped/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "a/shipped")
    shutil.rmtree(tmp_path / "a/student")  # as if killed during the last lesson
    pretrain.main(["--out", str(tmp_path / "a"), *few])
    assert capsys.readouterr().out.count("held-out loss") == 1
    assert (tmp_path / "a/shipped/model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match="holds lessons of other options"):
        pretrain.main(["--out", str(tmp_path / "a"), *few[:-1], "2"])


def test_a_lesson_ends_once_it_has_succeeded():
    tokenizer = pretrain.make_tokenizer()
    examples = pretrain.examples_of(pretrain.reading_corpus(20, 0), tokenizer)
    model = pretrain.newborn_student(tokenizer.vocab_size, 0)
    options = {"name": "test", "epochs": 50, "seed": 0, "schedule": "constant", "eval_every": 5}
    loss = pretrain.learn(model, examples, examples[:4], success=4.0, **options)
    assert 2.0 < loss <= 4.0  # the evaluation after which it stopped; 50 epochs reach far below
