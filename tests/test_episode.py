"""Episodes with scripted seats: who is asked what, how often and with which seeds, and what the numbers come to."""

import random

import pytest
from conftest import ScriptedSeat

from nano_atlas import protocol
from nano_atlas.data import Problem
from nano_atlas.episode import (
    Attempt,
    Episode,
    EpisodeConfig,
    Sketch,
    guide,
    seeds,
    sketch,
    teach,
    teaching_metrics,
)
from nano_atlas.reward import RewardConfig, teaching_reward
from nano_atlas.schedule import play
from nano_atlas.seats import Reply

PROBLEMS = [Problem(f"p{i}", f"Question {i}?", f"canary{i}", "math") for i in range(4)]
CONFIG = EpisodeConfig(probe_tokens=11, teaching_tokens=22, answer_tokens=33, temperature=(0.5, 0.9))


def student_rule(prompt: str, seed: int, index: int) -> str:
    """Alone right in every second sample; guided right after "good", wrong after anything else."""
    gold = next(problem.answer for problem in PROBLEMS if problem.question in prompt)
    if protocol.PROBE_REQUEST in prompt:
        return f"approach-{seed}"
    is_right = "good" in prompt if "Teacher's guidance" in prompt else index % 2 == 0
    return f"<solution>{gold if is_right else 'wrong'}</solution>"


def teacher_of(*completions: str) -> ScriptedSeat:
    return ScriptedSeat(lambda prompt, seed, index: completions[index])


def run(
    teacher, student=None, problems=PROBLEMS, baselines=2, group_size=3, seed="s", **options
) -> list[list[Episode]]:
    seats = {"student": student or ScriptedSeat(student_rule), "teacher": teacher}
    seed, count = seeds(seed), teacher.count_tokens
    sketches = play([sketch(problem, CONFIG, seed, baselines) for problem in problems], seats)
    return play(
        [teach(each, CONFIG, RewardConfig(), seed, count, group_size, **options) for each in sketches], seats
    )


def tagged(*texts: str) -> tuple[str, ...]:
    return tuple(f"<thinking>private</thinking><teaching>{text}</teaching>" for text in texts)


def test_a_group_shares_one_probe_and_k_baselines_and_each_teaching_gets_one_guided_answer():
    student, teacher = ScriptedSeat(student_rule), teacher_of(*tagged("good", "bad", "good good"))
    groups = run(teacher, student, baselines=4)
    assert [[q.n for q in call] for call in student.calls] == [
        [1] * 4 + [4] * 4,
        [1] * 12,
    ]  # probe and alone, guided
    assert [[q.n for q in call] for call in teacher.calls] == [[3] * 4]
    for problem, group in zip(PROBLEMS, groups, strict=True):
        assert len(group) == 3 and all(episode.sketch is group[0].sketch for episode in group)
        assert group[0].sketch.problem is problem and len(group[0].sketch.baselines) == 4
        assert group[0].sketch.baseline_accuracy == 0.5
        assert [episode.teaching for episode in group] == ["good", "bad", "good good"]
        assert [episode.guided.is_correct for episode in group] == [True, False, True]


def test_lengths_and_temperatures_are_those_of_the_configuration():
    student, teacher = ScriptedSeat(student_rule), teacher_of(*tagged("good"))
    run(teacher, student, group_size=1)
    settings = [
        [(q.generation.max_tokens, q.generation.temperature) for q in call]
        for call in student.calls + teacher.calls
    ]
    assert settings == [[(11, 0.5)] * 4 + [(33, 0.5)] * 4, [(33, 0.5)] * 4, [(22, 0.9)] * 4]


@pytest.mark.parametrize("style", ["concise", "detailed", "adaptive", "Ask one question."])
def test_the_teacher_is_asked_about_the_students_own_approach_in_the_given_style(style):
    teacher = teacher_of(*tagged("good"))
    for prompt, (episode,) in zip(teacher.asked, run(teacher, group_size=1, style=style), strict=True):
        (message,) = protocol.teacher_messages(
            episode.sketch.problem.question, episode.sketch.approach, style
        )
        assert prompt == message["content"] and episode.sketch.approach in prompt and episode.style == style


def test_rewards_follow_from_baseline_guided_answer_and_length_of_the_teaching():
    for group in run(teacher_of(*tagged("good", "bad bad", "good good good"))):
        assert [episode.reward for episode in group] == [
            teaching_reward(0.5, 1, 1),
            -1.0,
            teaching_reward(0.5, 1, 3),
        ]
        assert [episode.teaching_tokens for episode in group] == [
            1,
            2,
            3,
        ]  # of the teaching alone, not of the thoughts


def test_a_malformed_completion_reaches_nobody_and_earns_nothing():
    """The student is not asked again: its own answers stand, and are no merit of the teacher."""
    student = ScriptedSeat(
        lambda prompt, seed, index: f"<solution>canary0</solution> {index}"
    )  # always right
    (group,) = run(teacher_of("good", "<teaching>good", "<thinking>good</thinking>"), student, PROBLEMS[:1])
    assert len(student.asked) == 2  # probe and baselines
    assert [episode.teaching for episode in group] == [None] * 3
    first, second = group[0].sketch.baselines
    assert [episode.guided for episode in group] == [first, second, first]
    assert [episode.reward for episode in group] == [-0.5] * 3
    assert [episode.gain for episode in group] == [0.0] * 3 and not any(episode.is_leak for episode in group)
    metrics = teaching_metrics(group)
    assert metrics["malformed_rate"] == metrics["token_efficiency"] == 1.0


def test_a_malformed_teaching_leaves_the_others_of_its_group_as_they_are():
    whole = run(teacher_of(*tagged("good", "bad", "good")))
    for group, same in zip(
        run(teacher_of(*tagged("good"), "malformed", *tagged("good"))), whole, strict=True
    ):
        assert group[1].reward == -0.5 and [group[0], group[2]] == [same[0], same[2]]


def test_the_guided_answers_alone_are_those_of_the_episode():
    """The shuffled control asks with other teachings; with the same ones, it must come to the same."""
    student, config, seed = ScriptedSeat(student_rule), CONFIG, seeds("s")
    (group,) = run(teacher_of(*tagged("good", "bad"), "malformed"), student, PROBLEMS[:1])
    told = [episode.teaching for episode in group]
    (attempts,) = play([guide(group[0].sketch, told, config, seed)], {"student": student})
    assert attempts == [episode.guided for episode in group]


def test_a_leak_is_counted_and_penalised_though_the_student_was_right():
    (group,) = run(teacher_of(*tagged("good: canary0", "good", "good canary00")), problems=PROBLEMS[:1])
    assert [episode.is_leak for episode in group] == [True, False, False]
    assert group[0].guided.is_correct and group[0].reward == -1.0
    assert teaching_metrics(group)["leak_rate"] == pytest.approx(1 / 3)


def test_the_answer_in_the_teachers_thoughts_is_no_leak_because_nobody_hears_it():
    student = ScriptedSeat(student_rule)
    teacher = teacher_of("<thinking>it is canary0</thinking><teaching>good</teaching>")
    (group,) = run(teacher, student, PROBLEMS[:1], group_size=1)
    assert not group[0].is_leak and group[0].reward > 0
    assert not any("canary" in prompt for prompt in student.asked)


def test_no_prompt_of_any_seat_holds_a_gold_answer():
    student, teacher = ScriptedSeat(student_rule), teacher_of(*tagged("good", "bad"), "malformed")
    run(teacher, student, baselines=3)
    assert len(student.asked) + len(teacher.asked) == 4 + 4 + 8 + 4
    assert not any("canary" in prompt for prompt in student.asked + teacher.asked)


def test_an_episode_does_not_depend_on_the_batch_it_ran_in():
    def by_seed(prompt, seed, index):
        draws = random.Random(f"{seed}/{index}")
        text = "".join(draws.choices("abcdefgh", k=12))
        return f"{text}<teaching>{text}</teaching><solution>{text}</solution>"

    def texts(problems, seed="s"):
        groups = run(ScriptedSeat(by_seed), ScriptedSeat(by_seed), problems, seed=seed)
        return {
            g[0].sketch.problem.id: [g[0].sketch.approach, *(b.text for b in g[0].sketch.baselines), *(e.reply.text for e in g),
                                     *(e.guided.text for e in g)]
            for g in groups
        }  # fmt: skip

    together = texts(PROBLEMS)
    assert texts([PROBLEMS[3], PROBLEMS[1]]) == {name: together[name] for name in ("p3", "p1")}
    assert len({text for all_texts in together.values() for text in all_texts}) == 4 * (
        1 + 2 + 3 + 3
    )  # no draw is repeated
    assert not set(together["p0"]) & set(texts(PROBLEMS, seed="another")["p0"])


def test_without_a_gold_answer_nothing_is_correct_and_nothing_leaks():
    problem = Problem("open", "Question 0?", None)
    (group,) = run(teacher_of(*tagged("good")), problems=[problem], group_size=1)
    assert group[0].sketch.baseline_accuracy == 0 and not group[0].guided.is_correct and not group[0].is_leak


def test_the_metrics_are_what_their_names_say():
    def attempt(is_correct, answer="answer"):
        return Attempt("text", answer, is_correct, tokens=5, is_truncated=False)

    def episode(baselines, guided, teaching, length, tokens, is_truncated, is_leak, reward, answer="answer"):
        sketch = Sketch(PROBLEMS[0], "plan", 7, [attempt(is_correct) for is_correct in baselines])
        reply = Reply("completion", tokens, is_truncated)
        return Episode(sketch, "adaptive", reply, teaching, length, attempt(guided, answer), is_leak, reward)

    metrics = teaching_metrics([
        episode([0, 1], True, "go", 0, 10, False, False, 1.0),  # improved by 1/2
        episode([1, 1], False, "no", 100, 20, True, False, -2.0, None),  # degraded by 1, unreadable
        episode([0, 0], False, None, 0, 30, False, False, -0.5),  # unchanged, malformed
        episode([1, 1], True, "42", 300, 40, False, True, -1.0),  # unchanged, a leak
    ])  # fmt: skip
    assert metrics == pytest.approx({
        "reward": -2.5 / 4, "student_accuracy": 2 / 4, "baseline_accuracy": 2.5 / 4, "accuracy_delta": -0.5 / 4,
        "improvement_rate": 1 / 4, "degradation_rate": 1 / 4, "non_degradation_rate": 3 / 4,
        "token_efficiency": (1 + 0.5 + 1 + 0.25) / 4,
        "teaching_length_mean": 100, "student_approach_length": 7, "leak_rate": 1 / 4, "malformed_rate": 1 / 4,
        "unreadable_rate": 1 / 4,
        "completions/mean_length": 25, "completions/truncated_ratio": 1 / 4,
    })  # fmt: skip
