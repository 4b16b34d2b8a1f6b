"""One episode of teaching: probe, baselines, teaching, guided answer, reward. Training, runtime and evaluation all run this.

Within a group (the G teachings of one problem) the probe and the baselines are drawn once and shared, so the teachings compete
from the same state and the reward carries no noise that the teacher did not cause.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nano_atlas import protocol
from nano_atlas.config import option
from nano_atlas.data import Problem, derive_seed
from nano_atlas.reward import RewardConfig, efficiency, teaching_reward
from nano_atlas.seats import Generation, Reply, Seat


@dataclass(frozen=True)
class EpisodeConfig:
    """How the two models talk; lengths in tokens."""

    probe_tokens: int = option(500, "longest student approach (tokens; 0: no probe)", group="sampling")
    teaching_tokens: int = option(4096, "longest teacher completion, thinking included (tokens)")
    answer_tokens: int = option(4096, "longest student answer, alone or guided (tokens)")
    student_temperature: float = option(0.7, "sampling temperature of the student (0 = greedy)")
    teacher_temperature: float = option(0.7, "sampling temperature of the teacher (0 = greedy)")
    top_p: float = option(1.0, "nucleus mass of every sampler")


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
    first = keys.index(max(votes, key=votes.__getitem__)) if votes else 0  # max: the first of the most frequent
    tokens, is_truncated = sum(attempt.tokens for attempt in attempts), any(attempt.is_truncated for attempt in attempts)
    return replace(attempts[first], tokens=tokens, is_truncated=is_truncated)


def sketch_problems(
    student: Seat, problems: Sequence[Problem], config: EpisodeConfig, seed: object, baselines: int = 1, progress: str | None = None
) -> list[Sketch]:
    """One probe and `baselines` answers per problem, by the student alone; with `probe_tokens` 0 the approach is empty."""
    probe_seeds, alone_seeds = ([derive_seed(seed, kind, problem.id) for problem in problems] for kind in ("probe", "alone"))
    probe = Generation(config.probe_tokens, config.student_temperature, config.top_p)
    alone = Generation(config.answer_tokens, config.student_temperature, config.top_p)
    probes, questions = ([messages(p.question) for p in problems] for messages in (protocol.probe_messages, protocol.baseline_messages))
    approaches = [[Reply("", 0, False)]] * len(problems)
    if config.probe_tokens:
        approaches = student.ask(probes, probe, probe_seeds, progress=progress and f"{progress}: probe")
    answers = student.ask(questions, alone, alone_seeds, n=baselines, progress=progress and f"{progress}: alone")
    return [
        Sketch(problem, approach[0].text, approach[0].tokens, [attempt(reply, problem.answer) for reply in replies])
        for problem, approach, replies in zip(problems, approaches, answers)
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
    styles = list(styles or ["adaptive"] * len(sketches))
    seeds = [derive_seed(seed, "teach", sketch.problem.id) for sketch in sketches]
    prompts = [protocol.teacher_messages(s.problem.question, s.approach, style) for s, style in zip(sketches, styles, strict=True)]
    teaching = Generation(config.teaching_tokens, config.teacher_temperature, config.top_p)
    groups = teacher.ask(prompts, teaching, seeds, n=group_size, progress=progress and f"{progress}: teach")

    flat = [(sketch, style, reply) for sketch, style, group in zip(sketches, styles, groups) for reply in group]
    teachings = [protocol.parse_teaching(reply.text) for _, _, reply in flat]
    return regroup(guide(student, flat, teachings, teacher, config, rewards, seed, progress), group_size)


def guide(student, flat, teachings, teacher, config, rewards, seed, progress=None) -> list[Episode]:
    """The guided answers to given teachings: `flat` holds (sketch, style, teacher's reply), `teachings` what the student is told."""
    conversations = [protocol.guided_messages(sketch.problem.question, told) for (sketch, _, _), told in zip(flat, teachings)]
    place: Counter[str] = Counter()  # a seed names problem and place in the group, so an answer does not depend on its batch
    seeds = []
    for sketch, _, _ in flat:
        seeds.append(derive_seed(seed, "guided", sketch.problem.id, place[sketch.problem.id]))
        place[sketch.problem.id] += 1
    answering = Generation(config.answer_tokens, config.student_temperature, config.top_p)
    answers = student.ask(conversations, answering, seeds, progress=progress and f"{progress}: guided")
    episodes = []
    for (sketch, style, reply), told, answer in zip(flat, teachings, answers):
        gold = sketch.problem.answer
        guided = attempt(answer[0], gold)
        length = teacher.count_tokens(told) if told else 0
        is_leak = told is not None and gold is not None and protocol.reveals_answer(told, gold)
        reward = teaching_reward(sketch.baseline_accuracy, float(guided.is_correct), length, is_leak, rewards)
        if told is None:  # the student's own success is not the teacher's merit
            reward = min(reward, 0.0) - rewards.malformed_penalty
        episodes.append(Episode(sketch, style, reply, told, length, guided, is_leak, reward))
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
