"""One regression test for each fault of the published ATLAS code (as of November 2025) that this code could have had.

Two more are elsewhere: the listing of `grpo_loss` on the overview page, which is NaN for every input, in test_loss.py; and a
configuration that is accepted but changes nothing, for each coefficient of the reward in test_reward.py.
"""

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ScriptedSeat, run_grpo

import train_grpo
from nano_atlas import answers, layout, protocol
from nano_atlas.checkpoint import load_model
from nano_atlas.data import Problem
from nano_atlas.episode import EpisodeConfig, seeds, sketch, teach
from nano_atlas.errors import UserError
from nano_atlas.reward import RewardConfig, teaching_reward
from nano_atlas.sampler import Sampler
from nano_atlas.schedule import play
from nano_atlas.seats import TokenSeat

PROBLEM = Problem("p", "What is 6 times 3?", "18")


def episodes_of(teacher_says: str, student_says: dict[str, str], **options):
    """One episode; the student's replies by what its prompt contains. Returns it and what both were asked."""

    def student_rule(prompt: str, seed: int, index: int) -> str:
        return next(reply for part, reply in student_says.items() if part in prompt)

    student, teacher = ScriptedSeat(student_rule), ScriptedSeat(lambda *_: teacher_says)
    (episode,) = group_of(student, teacher, rewards=RewardConfig(**options))
    return episode, student.asked, teacher.asked


def group_of(student, teacher, baselines=1, group_size=1, rewards=RewardConfig()):
    config, seed, seats = EpisodeConfig(), seeds("seed"), {"student": student, "teacher": teacher}
    (alone,) = play([sketch(PROBLEM, config, seed, baselines)], seats)
    return play([teach(alone, config, rewards, seed, teacher.count_tokens, group_size)], seats)[0]


@pytest.mark.parametrize(
    "text", ['Answer as {"principles": []}.', "{question} {approach} {", "100 % of {0!r:>{1}}"]
)
def test_fault_1_braces_in_a_template_or_text_break_the_prompt(text):
    """Every judge prompt held JSON and went through `str.format`: KeyError at the first reward."""
    for messages in (protocol.probe_messages(text), protocol.baseline_messages(text), protocol.guided_messages(text, text),
                     protocol.teacher_messages(text, text), protocol.teacher_messages(text, text, text)):  # fmt: skip
        assert text in messages[0]["content"]


def test_fault_1_the_baseline_has_no_template_or_asks_for_no_answer_tag():
    """The baseline's template defaulted to None; its fall-back asked for no tag, so the baseline was "no answer"."""
    alone, guided = (
        m[0]["content"] for m in (protocol.baseline_messages("q"), protocol.guided_messages("q", "t"))
    )
    assert "<solution></solution>" in alone and alone.rpartition("\n\n")[2] == guided.rpartition("\n\n")[2]


def test_fault_2_the_gradient_is_taken_on_another_prompt_than_was_sampled_from(place, tmp_path, monkeypatch):
    """Sampled from question + approach, scored after the bare question: the run must stop at its first step."""
    real = train_grpo.policy_batches

    def on_the_bare_problem(samples, *arguments):
        bare = [dataclasses.replace(s.rollout, prompt_ids=s.rollout.prompt_ids[:40]) for s in samples]
        return real(
            [dataclasses.replace(s, rollout=rollout) for s, rollout in zip(samples, bare)], *arguments
        )

    monkeypatch.setattr(train_grpo, "policy_batches", on_the_bare_problem)
    with pytest.raises(
        UserError, match="trainer and sampler disagree about the sampled tokens .* weights or prompts"
    ):
        run_grpo(place, tmp_path / "out", beta=0.0)
    assert not (tmp_path / "out/metrics.jsonl").read_text()


def test_fault_3_the_sampler_keeps_the_weights_it_started_with(place, tmp_path, monkeypatch):
    """The server that sampled was never told of an update in 250 steps. Here such a run stops, and says why."""

    class StaleSampler(Sampler):
        def __init__(self, model, **options):
            super().__init__(copy.deepcopy(model), **options)
            self.sync = lambda model, version: 0.0

    monkeypatch.setattr(layout, "Sampler", StaleSampler)
    with pytest.raises(UserError, match="trainer and sampler disagree .* the sampler has other weights"):
        run_grpo(place, tmp_path / "out", lr=5e-2, steps=8, eval_every=0)
    assert (
        1 <= len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) < 8
    )  # the first step still agreed


def test_fault_4_the_reward_sees_the_teachers_text_instead_of_the_students_guided_answer():
    """The judge was given the teacher's completion as the student's answer, and no baseline."""
    boasting = "<thinking>so <solution>18</solution></thinking><teaching>Multiply. <solution>18.5</solution></teaching>"
    alone = {
        protocol.PROBE_REQUEST: "Add.",
        "Teacher's guidance": "<solution>9</solution>",
        "": "<solution>9</solution>",
    }
    failed, _, _ = episodes_of(boasting, alone)
    helped, _, _ = episodes_of(boasting, {**alone, "Teacher's guidance": "<solution>18</solution>"})
    known, _, _ = episodes_of(boasting, {protocol.PROBE_REQUEST: "Add.", "": "<solution>18</solution>"})
    assert (failed.reward, failed.guided.answer) == (0.0, "9")
    assert helped.reward > 1 > known.reward > 0  # the improvement over the baseline is what counts


def test_fault_5_harm_costs_nothing_or_its_price_is_an_option_without_effect():
    """The published 2x penalty was removed from the code; its option stayed in the file and did nothing."""
    assert teaching_reward(1, 0, 50) == -2.0 and teaching_reward(0, 1, 50) < 2.0
    says = {
        protocol.PROBE_REQUEST: "Multiply.",
        "Teacher's guidance": "<solution>9</solution>",
        "": "<solution>18</solution>",
    }
    rewards = [
        episodes_of("<teaching>Add.</teaching>", says, degradation_penalty=p)[0].reward for p in (2.0, 5.0)
    ]
    assert rewards == [-2.0, -5.0]


@pytest.mark.parametrize("completion", ["Say 18.", "<thinking>secret 18</thinking>", "<thinking>secret <teaching>18</teaching>",
                                        "<teaching>secret 18"])  # fmt: skip
def test_without_a_teaching_tag_the_student_is_handed_the_whole_completion(completion):
    """That passed on the teacher's private thoughts, answer included, and rewarded it for forgetting the tag."""
    says = {protocol.PROBE_REQUEST: "Add.", "": "<solution>18</solution>"}
    episode, asked, _ = episodes_of(completion, says)
    assert len(asked) == 2 and asked[-1] == protocol.baseline_messages(PROBLEM.question)[0]["content"]
    assert episode.teaching is None and episode.reward < 0


def test_the_reference_drifts_with_the_policy(place, tmp_path, monkeypatch):
    """Mixing 0.9 of the policy into the reference every other step made the KL no anchor to the SFT checkpoint."""
    seen = []
    real = train_grpo.update

    def spy(config, policy, reference, *arguments):
        seen.append([parameter.detach().clone() for parameter in reference.parameters()])
        return real(config, policy, reference, *arguments)

    monkeypatch.setattr(train_grpo, "update", spy)
    run_grpo(place, tmp_path / "out", eval_every=0)
    start = load_model(place / "teacher").parameters()
    assert all(torch.equal(parameter, first) for parameter, first in zip(seen[-1], start, strict=True))


def test_evaluation_is_configured_but_never_happens(place, tmp_path):
    """Its option never reached the trainer. Here it shows in the metrics, and chooses the best checkpoint."""
    metrics = run_grpo(place, tmp_path / "out", steps=4, eval_every=2)
    evaluated = [record["step"] for record in metrics if "eval/reward" in record]
    assert evaluated == [2, 4] and {"eval/student_accuracy", "eval/accuracy_delta", "eval/leak_rate"} <= set(
        metrics[1]
    )
    assert (tmp_path / "out/best/model.safetensors").is_file()
    assert json.loads((tmp_path / "out/state/step-00000004/state.json").read_text())["best"] is not None


def test_the_gold_answer_is_in_the_prompt(place, tmp_path, monkeypatch):
    """GSM8K prompts were rendered with the solution in them. No seat of a real run may ever see the gold answer."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"question": f"Pick {i}.", "answer": f"canary{i}"}) + "\n" for i in range(20))
    )
    prompts = []
    real = TokenSeat.ask

    def listening(self, questions, *arguments, **options):
        prompts.extend(self.tokenizer.decode(self.prompt_ids(question.messages)) for question in questions)
        return real(self, questions, *arguments, **options)

    monkeypatch.setattr(TokenSeat, "ask", listening)
    for reward in ("teaching", "exact"):
        run_grpo(place, tmp_path / reward, problems=problems, steps=2, reward=reward)
    assert len(prompts) > 20 and not any("canary" in prompt for prompt in prompts)


def test_probe_and_baselines_are_drawn_anew_for_every_copy_of_a_problem():
    """A "group" of 32 different situations: advantages then measure the student's luck."""
    student = ScriptedSeat(lambda prompt, seed, index: f"{seed}-{index}")
    teacher = ScriptedSeat(lambda prompt, seed, index: f"<teaching>{index}</teaching>")
    group = group_of(student, teacher, baselines=4, group_size=8)
    assert len(student.asked) == 1 + 1 + 8 and len(set(teacher.asked)) == 1
    assert len({id(episode.sketch) for episode in group}) == 1


def test_copies_of_templates_and_extractors_drift_apart():
    """There were three of each. Here they exist once, and whoever needs them imports `protocol` or `answers`."""
    root = Path(train_grpo.__file__).parent
    texts = [
        protocol.ANSWER_FORMATS["solution"],
        protocol.PROBE_REQUEST,
        *protocol.TEACHING_STYLES.values(),
        "Teacher's guidance",
    ]
    extractor = re.compile(r"""(?:re\.\w+|tagged)\([^)\n]*(solution|teaching|thinking|boxed)""")
    extractors, templates = set(), set()
    for path in [*root.glob("*.py"), *(root / "nano_atlas").rglob("*.py")]:
        source = path.read_text(encoding="utf-8")
        extractors |= {path.name} if extractor.search(source) else set()
        templates |= {path.name} if any(text in source for text in texts) else set()
    assert extractors == {"protocol.py", "answers.py"} and templates == {"protocol.py"}
    assert protocol.visible is answers.visible
