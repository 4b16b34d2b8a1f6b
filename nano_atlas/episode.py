"""One episode of teaching: probe, baselines, teaching, guided answer, reward. Training, runtime and evaluation all run this.

Within a group (the G teachings of one problem) the probe and the baselines are drawn once and shared, so the teachings compete
from the same state and the reward carries no noise that the teacher did not cause.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

from nano_atlas import protocol
from nano_atlas.config import option
from nano_atlas.data import Problem, derive_seed
from nano_atlas.reward import RewardConfig, efficiency, teaching_reward
from nano_atlas.seats import Generation, Question, Reply, Seat


@dataclass(frozen=True)
class EpisodeConfig:
    """How the two models talk; lengths in tokens."""

    probe_tokens: int = option(500, "longest student approach (tokens; 0: no probe)", group="sampling")
    teaching_tokens: int = option(4096, "longest teacher completion, thinking included (tokens)")
    answer_tokens: int = option(4096, "longest student answer, alone or guided (tokens)")
    student_temperature: float = option(0.7, "sampling temperature of the student (0 = greedy)")
    teacher_temperature: float = option(0.7, "sampling temperature of the teacher (0 = greedy)")
    top_p: float = option(1.0, "nucleus mass of every sampler")

    def greedy(self) -> Self:
        """The same without chance."""
        return replace(self, student_temperature=0.0, teacher_temperature=0.0)


@dataclass
class Attempt:
    """One answer of the student."""

    text: str
    answer: str | None  # what stands in <solution>
    is_correct: bool
    tokens: int
    is_truncated: bool


@dataclass
class Sketch:
    """What the student does alone; shared by every teaching of the problem."""

    problem: Problem
    approach: str
    approach_tokens: int
    baselines: list[Attempt]

    @property
    def baseline_accuracy(self) -> float:
        return sum(attempt.is_correct for attempt in self.baselines) / len(self.baselines)


class Draft(NamedTuple):
    """A teaching on its way to the student."""

    sketch: Sketch
    style: str
    reply: Reply  # the teacher's whole completion
    teaching: str | None  # what the student is told


@dataclass
class Episode:
    """One teaching and what came of it."""

    sketch: Sketch
    style: str
    reply: Reply  # the teacher's whole completion; with a rollout when the teacher is embedded
    teaching: str | None  # None: malformed, and the student got nothing
    teaching_tokens: int
    guided: Attempt
    is_leak: bool
    reward: float
    advantage: float = field(default=0.0)

    @property
    def gain(self) -> float:
        return self.guided.is_correct - self.sketch.baseline_accuracy


def attempt(reply: Reply, gold: str | None) -> Attempt:
    answer = protocol.extract_answer(reply.text)
    is_correct = gold is not None and protocol.is_correct(answer, gold)
    return Attempt(reply.text, answer, is_correct, reply.tokens, reply.is_truncated)


def majority(attempts: Sequence[Attempt]) -> Attempt:
    """The first attempt with the most frequent answer, at the price of all: self-consistency (Wang et al. 2022, arXiv:2203.11171).

    Attempts without an answer have no vote, and of equally frequent answers the one given first wins.
    """
    keys = [None if attempt.answer is None else protocol.answer_key(attempt.answer) for attempt in attempts]
    votes = Counter(key for key in keys if key is not None)
    first = (
        keys.index(max(votes, key=votes.__getitem__)) if votes else 0
    )  # max: the first of the most frequent
    tokens, is_truncated = (
        sum(attempt.tokens for attempt in attempts),
        any(attempt.is_truncated for attempt in attempts),
    )
    return replace(attempts[first], tokens=tokens, is_truncated=is_truncated)


def sketch_problems(
    student: Seat,
    problems: Sequence[Problem],
    config: EpisodeConfig,
    seed: object,
    baselines: int = 1,
    progress: str | None = None,
) -> list[Sketch]:
    """One probe and `baselines` answers per problem, by the student alone; with `probe_tokens` 0 the approach is empty."""
    questions = sketch_questions(problems, config, seed, baselines)
    return read_sketches(problems, student.ask(questions, progress=progress and f"{progress}: alone"))


def sketch_questions(
    problems: Sequence[Problem], config: EpisodeConfig, seed: object, baselines: int = 1
) -> list[Question]:
    """To the student alone: first for all approaches (unless `probe_tokens` is 0), then for the answers to all problems."""
    probe = Generation(config.probe_tokens, config.student_temperature, config.top_p)
    alone = Generation(config.answer_tokens, config.student_temperature, config.top_p)
    probes = [
        Question(protocol.probe_messages(p.question), probe, derive_seed(seed, "probe", p.id))
        for p in problems
    ]
    answers = [
        Question(protocol.baseline_messages(p.question), alone, derive_seed(seed, "alone", p.id), baselines)
        for p in problems
    ]
    return (probes if config.probe_tokens else []) + answers


def read_sketches(problems: Sequence[Problem], replies: Sequence[list[Reply]]) -> list[Sketch]:
    """From the replies to `sketch_questions`."""
    answers = replies[-len(problems) :] if problems else []
    approaches = replies[: -len(problems)] or [[Reply("", 0, False)]] * len(problems)
    return [
        Sketch(problem, approach.text, approach.tokens, [attempt(reply, problem.answer) for reply in group])
        for problem, (approach,), group in zip(problems, approaches, answers, strict=True)
    ]


def teach(
    student: Seat,
    teacher: Seat,
    sketches: Sequence[Sketch],
    config: EpisodeConfig,
    rewards: RewardConfig,
    seed: object,
    group_size: int = 1,
    styles: Sequence[str] | None = None,
    progress: str | None = None,
) -> list[list[Episode]]:
    """`group_size` teachings per sketch and one guided answer each; episodes come back grouped by sketch.

    styles: a key of protocol.TEACHING_STYLES per sketch ("adaptive" where not given).
    """
    styles = styles or ["adaptive"] * len(sketches)
    questions = teaching_questions(sketches, styles, config, seed, group_size)
    drafts = read_drafts(sketches, styles, teacher.ask(questions, progress=progress and f"{progress}: teach"))
    answers = student.ask(guided_questions(drafts, config, seed), progress=progress and f"{progress}: guided")
    return regroup(read_episodes(drafts, answers, teacher, rewards), group_size)


def teaching_questions(
    sketches: Sequence[Sketch],
    styles: Sequence[str],
    config: EpisodeConfig,
    seed: object,
    group_size: int = 1,
) -> list[Question]:
    """To the teacher, for `group_size` teachings of each sketch."""
    teaching = Generation(config.teaching_tokens, config.teacher_temperature, config.top_p)
    return [
        Question(protocol.teacher_messages(sketch.problem.question, sketch.approach, style), teaching,
                 derive_seed(seed, "teach", sketch.problem.id), group_size)
        for sketch, style in zip(sketches, styles, strict=True)
    ]  # fmt: skip


def read_drafts(
    sketches: Sequence[Sketch], styles: Sequence[str], replies: Sequence[list[Reply]]
) -> list[Draft]:
    """From the replies to `teaching_questions`."""
    return [
        Draft(sketch, style, reply, protocol.parse_teaching(reply.text))
        for sketch, style, group in zip(sketches, styles, replies, strict=True)
        for reply in group
    ]


def guided_questions(drafts: Sequence[Draft], config: EpisodeConfig, seed: object) -> list[Question]:
    """To the student: each problem once more, with what it is told now."""
    answering = Generation(config.answer_tokens, config.student_temperature, config.top_p)
    place: Counter[str] = (
        Counter()
    )  # a seed names problem and place in the group, so an answer does not depend on its batch
    questions = []
    for draft in drafts:
        problem = draft.sketch.problem
        messages = protocol.guided_messages(problem.question, draft.teaching)
        questions.append(
            Question(messages, answering, derive_seed(seed, "guided", problem.id, place[problem.id]))
        )
        place[problem.id] += 1
    return questions


def read_episodes(
    drafts: Sequence[Draft], answers: Sequence[list[Reply]], teacher: Seat, rewards: RewardConfig
) -> list[Episode]:
    """From the replies to `guided_questions`."""
    episodes = []
    for draft, (answer,) in zip(drafts, answers, strict=True):
        gold, told = draft.sketch.problem.answer, draft.teaching
        guided = attempt(answer, gold)
        length = teacher.count_tokens(told) if told else 0
        is_leak = told is not None and gold is not None and protocol.reveals_answer(told, gold)
        reward = teaching_reward(
            draft.sketch.baseline_accuracy, float(guided.is_correct), length, is_leak, rewards
        )
        if told is None:  # the student's own success is not the teacher's merit
            reward = min(reward, 0.0) - rewards.malformed_penalty
        episodes.append(
            Episode(draft.sketch, draft.style, draft.reply, told, length, guided, is_leak, reward)
        )
    return episodes


def regroup(episodes: list[Episode], group_size: int) -> list[list[Episode]]:
    return [episodes[i : i + group_size] for i in range(0, len(episodes), group_size)]


def teaching_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """The published metrics of a set of episodes (names as in ATLAS), plus the rates of leaks and malformed completions."""
    count = len(episodes)
    gains = [episode.gain for episode in episodes]
    rewards = [episode.reward for episode in episodes]
    mean_reward = sum(rewards) / count
    return {
        "reward": mean_reward,
        "student_accuracy": sum(e.guided.is_correct for e in episodes) / count,
        "baseline_accuracy": sum(e.sketch.baseline_accuracy for e in episodes) / count,
        "accuracy_delta": sum(gains) / count,
        "improvement_rate": sum(gain > 0 for gain in gains) / count,
        "degradation_rate": sum(gain < 0 for gain in gains) / count,
        "non_degradation_rate": sum(gain >= 0 for gain in gains) / count,
        "token_efficiency": sum(efficiency(e.teaching_tokens) for e in episodes) / count,
        "teaching_length_mean": sum(e.teaching_tokens for e in episodes) / count,
        "student_approach_length": sum(e.sketch.approach_tokens for e in episodes) / count,
        "leak_rate": sum(e.is_leak for e in episodes) / count,
        "malformed_rate": sum(e.teaching is None for e in episodes) / count,
        "completions/mean_length": sum(e.reply.tokens for e in episodes) / count,
        "completions/truncated_ratio": sum(e.reply.is_truncated for e in episodes) / count,
    }


def episode_record(episode: Episode) -> dict:
    """A whole episode as JSON values, for people to read."""
    return {
        "id": episode.sketch.problem.id, "question": episode.sketch.problem.question, "answer": episode.sketch.problem.answer,
        "approach": episode.sketch.approach, "baselines": [a.text for a in episode.sketch.baselines],
        "baseline_accuracy": episode.sketch.baseline_accuracy, "completion": episode.reply.text, "teaching": episode.teaching or "",
        "guided": episode.guided.text, "is_correct": episode.guided.is_correct, "is_leak": episode.is_leak,
        "reward": episode.reward, "advantage": episode.advantage,
    }  # fmt: skip
