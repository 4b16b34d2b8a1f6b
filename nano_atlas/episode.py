"""One episode of teaching: probe, baselines, teaching, guided answer, reward. Training, runtime and evaluation all run this.

    sketch    STUDENT   question                 ->  its approach, and K answers of its own (the baselines)
    teach     TEACHER   question + approach      ->  G teachings
    guide     STUDENT   question + teaching      ->  one answer for each teaching
    verify    VERIFIER  each answer              ->  its score, 0 to 1 (`exact`: compared here)

Each is a script for `schedule.play` or `schedule.drive`. A problem's G teachings share one probe and one set
of baselines, so differences between their rewards come only from the teachings and the answers with them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Self

from nano_atlas import protocol
from nano_atlas.answers import extract_answer, is_correct, reveals_answer
from nano_atlas.config import derive_seed, option
from nano_atlas.data import Problem
from nano_atlas.reward import efficiency, teaching_reward
from nano_atlas.schedule import Call, Script, ask
from nano_atlas.seats import Fault, Generation, Reply

SeedOf = Callable[..., int]  # (kind, id of the problem, ...) -> seed of one call
CountTokens = Callable[[str], int]  # length of a text in the teacher's tokens


@dataclass(frozen=True)
class EpisodeConfig:
    """How the two models are sampled; lengths in tokens."""

    probe_tokens: int = option(500, "longest first approach (0: none)", group="sampling (tokens)", at_least=0)
    teaching_tokens: int = option(4096, "longest reply of the teacher, with its thinking", above=0)
    answer_tokens: int = option(4096, "longest answer of the student", above=0)
    temperature: tuple[float, float] = option((0.7, 0.7), "student's and teacher's (0: greedy)", at_least=0)
    answer_format: str = option("solution", "how the student marks its answer", protocol.ANSWER_FORMATS)
    verifier: str = option("exact", "exact, or function MODULE:NAME that scores answers, 0 to 1")
    top_p: float = 1.0  # nucleus mass of both; log-probs for training need 1

    @property
    def student_temperature(self) -> float:
        return self.temperature[0]

    @property
    def teacher_temperature(self) -> float:
        return self.temperature[1]

    @property
    def answering(self) -> Generation:
        return Generation(self.answer_tokens, self.student_temperature, self.top_p)

    def greedy(self) -> Self:
        return replace(self, temperature=(0.0, 0.0))


@dataclass
class Attempt:  # one answer of the student
    text: str
    answer: str | None  # extracted from the text; None: there is none
    score: float  # 0 to 1, by the verifier
    tokens: int
    is_truncated: bool

    @property
    def is_correct(self) -> bool:
        return self.score >= 1


@dataclass
class Sketch:
    """The student's approach and answers alone; shared by all teachings of the problem."""

    problem: Problem
    approach: str
    approach_tokens: int
    baselines: list[Attempt]

    @property
    def baseline_accuracy(self) -> float | None:  # None: no answers
        return fmean(own.score for own in self.baselines) if self.baselines else None


@dataclass
class Episode:
    """One teaching, the answer with it, and the reward."""

    sketch: Sketch
    style: str
    reply: Reply  # the teacher's whole completion; with a rollout when the teacher is embedded
    teaching: str | None  # None: malformed; the student got nothing
    teaching_tokens: int
    guided: Attempt | None  # after a malformed teaching the student's own answer; None: it was not asked
    is_leak: bool
    reward: float
    advantage: float = 0.0
    messages: Sequence = ()  # the policy's prompt

    @property
    def gain(self) -> float:
        return 0.0 if self.teaching is None else self.guided.score - self.sketch.baseline_accuracy


def episode(problem, config, rewards, seed: SeedOf, count: CountTokens, samples: int, size: int) -> Script:
    """`size` teachings of a problem, rewarded against `samples` answers alone -> list[Episode].

    rewards: a RewardConfig; None: the student only writes its approach, and all rewards are 0 (distillation).
    """
    alone = yield from sketch(problem, config, seed, samples if rewards else 0)
    return (yield from teach(alone, config, rewards, seed, count, size))


def sketch(problem: Problem, config: EpisodeConfig, seed: SeedOf, samples: int = 1) -> Script:
    """The student alone -> Sketch with `samples` answers. If `probe_tokens` is 0, the approach is empty."""
    probe = Generation(config.probe_tokens, config.student_temperature, config.top_p)
    calls = []
    if config.probe_tokens:
        messages = protocol.probe_messages(problem.question)
        calls.append(Call("student", "probe", messages, probe, seed("probe", problem.id)))
    if samples:
        messages = protocol.baseline_messages(problem.question, config.answer_format)
        calls.append(Call("student", "alone", messages, config.answering, seed("alone", problem.id), samples))
    replies = yield from ask(*calls)
    approach = replies[0][0] if config.probe_tokens else Reply("", 0, False)
    baselines = yield from attempts(replies[-1] if samples else [], problem, config)
    return Sketch(problem, approach.text, approach.tokens, baselines)


def teach(sketch, config, rewards, seed, count_tokens: CountTokens, group_size=1, style="adaptive") -> Script:
    """`group_size` teachings, an answer with each, rewards -> list[Episode]. style: see `protocol.teacher_messages`."""
    problem = sketch.problem
    messages = protocol.teacher_messages(problem.question, sketch.approach, style)
    generation = Generation(config.teaching_tokens, config.teacher_temperature, config.top_p)
    call = Call("teacher", "teaching", messages, generation, seed("teach", problem.id), group_size)
    (replies,) = yield from ask(call)
    teachings = [protocol.parse_teaching(reply.text) for reply in replies]
    answers = (yield from guide(sketch, teachings, config, seed)) if rewards else [None] * group_size
    episodes = []
    for reply, told, guided in zip(replies, teachings, answers):
        length, reward = 0 if told is None else count_tokens(told), 0.0
        is_leak = None not in (told, problem.answer) and reveals_answer(told, problem.answer)
        if rewards:
            score = None if told is None else guided.score
            reward = teaching_reward(sketch.baseline_accuracy, score, length, is_leak, rewards)
        made = sketch, style, reply, told, length, guided, is_leak, reward
        episodes.append(Episode(*made, messages=messages))
    return episodes


def guide(sketch: Sketch, teachings: Sequence[str | None], config: EpisodeConfig, seed: SeedOf) -> Script:
    """The student's answer with each teaching -> list[Attempt]; for teaching None its own answer of sample i."""
    problem, own, calls = sketch.problem, sketch.baselines, []
    for i, told in enumerate(teachings):
        if told is not None:
            messages = protocol.guided_messages(problem.question, told, config.answer_format)
            calls.append(Call("student", "guided", messages, config.answering, seed("guided", problem.id, i)))
    replies = yield from ask(*calls)
    answers = iter((yield from attempts([reply for (reply,) in replies], problem, config)))
    return [own[i % len(own)] if told is None else next(answers) for i, told in enumerate(teachings)]


def answer(problem: Problem, config: EpisodeConfig, seed: SeedOf, group_size: int) -> Script:
    """The control without a teacher: the policy itself answers, its score is its reward -> list[Episode]."""
    generation = Generation(config.answer_tokens, config.teacher_temperature, config.top_p)
    messages = protocol.baseline_messages(problem.question, config.answer_format)
    call = Call("teacher", "alone", messages, generation, seed("alone", problem.id), group_size)
    (replies,) = yield from ask(call)
    answers = yield from attempts(replies, problem, config)
    alone = Sketch(problem, "", 0, answers)
    made = ((alone, "", reply, "", 0, own, False, own.score) for reply, own in zip(replies, answers))
    return [Episode(*fields, messages=messages) for fields in made]


def seeds(seed: Any) -> SeedOf:
    """Seeds that depend only on `seed` and the call, so that an answer does not depend on the batch."""
    return lambda *call: derive_seed(seed, *call)


def attempts(replies: Sequence[Reply], problem: Problem, config: EpisodeConfig) -> Script:
    """The scored answers in the replies -> list[Attempt]."""
    found = []
    for reply in replies:
        answer = extract_answer(reply.text, config.answer_format)
        found.append(Attempt(reply.text, answer, 0.0, reply.tokens, reply.is_truncated))
    for one, score in zip(found, (yield from verify(problem, found, config))):
        if score is None:
            raise Fault(f"--verifier {config.verifier} gave no score for an answer to {problem.id}")
        one.score = score
    return found


def verify(problem: Problem, answers: Sequence, config: EpisodeConfig) -> Script:
    """The scores of `answers`, objects with `text` and `answer` -> list[float | None]. Raises Fault."""
    gold = problem.answer
    if config.verifier == "exact":
        return [float(gold is not None and is_correct(one.answer, gold)) for one in answers]
    asked = {"question": problem.question, "gold": gold}
    told = [asked | {"answer": one.answer, "text": one.text} for one in answers]
    scores = yield from ask(*(Call("verifier", "verifier", [fields], Generation(1), 0) for fields in told))
    return [json.loads(reply.text) for (reply,) in scores]


def teaching_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """The published metrics (names as in ATLAS), and the rates of leaks, malformed and unreadable completions."""
    mean = lambda value: sum(map(value, episodes)) / len(episodes)
    metrics = {
        "reward": mean(lambda e: e.reward),
        "token_efficiency": mean(lambda e: efficiency(e.teaching_tokens)),
        "teaching_length_mean": mean(lambda e: e.teaching_tokens),
        "student_approach_length": mean(lambda e: e.sketch.approach_tokens),
        "leak_rate": mean(lambda e: e.is_leak),
        "malformed_rate": mean(lambda e: e.teaching is None),
        "completions/mean_length": mean(lambda e: e.reply.tokens),
        "completions/truncated_ratio": mean(lambda e: e.reply.is_truncated),
    }
    if episodes[0].guided is None:  # distillation: the student does not answer
        return metrics
    return metrics | {
        "student_accuracy": mean(lambda e: e.guided.score),
        "baseline_accuracy": mean(lambda e: e.sketch.baseline_accuracy),
        "accuracy_delta": mean(lambda e: e.gain),
        "improvement_rate": mean(lambda e: e.gain > 0),
        "degradation_rate": mean(lambda e: e.gain < 0),
        "non_degradation_rate": mean(lambda e: e.gain >= 0),
        "unreadable_rate": mean(lambda e: e.guided.answer is None),
    }


def episode_record(episode: Episode) -> dict:
    """A whole episode as JSON values."""
    sketch, values = asdict(episode.sketch), asdict(episode)
    del values["sketch"], values["reply"], values["messages"]
    values |= {"baseline_accuracy": episode.sketch.baseline_accuracy, "completion": episode.reply.text}
    return {**sketch.pop("problem"), **sketch, **values}
