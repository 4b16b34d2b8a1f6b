"""Skills: what becomes an entry, when it is used, how its effect is known, and when it goes."""

import json
import os
import signal
from dataclasses import replace

import pytest
from runtime_fakes import TASKS, Fake, Student, Teacher, in_a_process_that_dies, run, timeless, traces_of

from nano_atlas.config import derive_seed
from nano_atlas.data import Problem
from nano_atlas.runtime import learning
from nano_atlas.runtime.learning import Experience, read_entries
from nano_atlas.runtime.traces import Outcome
from runtime_loop import Config


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(
        out=tmp_path / "out", batch=5, student="fake-student", teacher="fake-teacher", lane="paired"
    )


def proposal(pattern="hard", imperative="Name the first step.", kind="keyword", **more) -> dict:
    return {"cue": {"type": kind, "pattern": pattern}, "action": {"imperative": imperative, **more}}


def read(*proposals, secret="42") -> list[dict]:
    return read_entries("Here: " + json.dumps({"entries": proposals}), secret)


def playbook(*proposals) -> Experience:
    book = Experience()
    book.learn(Outcome("s", learned=[entry for p in proposals for entry in read(p)]))
    return book


def observe(book: Experience, sessions: int, rewards=None, hits: bool = True) -> None:
    """rewards: (with, without); the entry is used in every other session."""
    (entry,) = book.entries.values()
    for index in range(sessions):
        if entry.id in book.entries:
            used = [entry.id] if hits and index % 2 == 0 else []
            matched, reward = [entry.id] if hits else [], rewards and rewards[index % 2]
            book.learn(Outcome("s", matched=matched, skills=used, reward=reward))


@pytest.mark.parametrize("bad", [
    {}, None, [], proposal(""), proposal("x" * 300), proposal("a.*b", kind="regex"), proposal(kind=["keyword"]), proposal(kind="predicate"),
    proposal(7), proposal(["hard"]), proposal(None), proposal(imperative=["Do."]), proposal(imperative=True), {"cue": 5, "action": 5},
    {"cue": ["keyword"], "action": {}}, {"cue": {"type": "keyword", "pattern": "hard"}, "action": ["Do."]}, proposal("a/" * 5000), proposal(imperative="a" * 10**4),
    proposal(imperative=""), proposal(imperative="long " * 60), proposal(imperative="It is 42."), proposal(imperative="As on 2026-01-02."),
    proposal(imperative="See /etc/hosts."), proposal("INC-123")])  # fmt: skip
def test_gates_stop_one_entry_and_not_the_others(bad):
    assert [entry["imperative"] for entry in read(bad, proposal())] == ["Name the first step."]


@pytest.mark.parametrize(
    "reply",
    [
        "no JSON",
        '{"entries": 3}',
        '{"entries": "ab"}',
        '{"entries": {"cue": 1}}',
        '{"entries": [{"cue": {}, "action": []}]}',
    ],
)
def test_a_reply_without_entries_is_none(reply):
    assert read_entries(reply, None) == []


def test_equal_entries_are_one_and_unknown_strategies_are_dropped():
    (entry,) = read(proposal(strategy="concise"))
    assert (entry["imperative"], entry["strategy"]) == ("Name the first step.", "concise")
    for unknown in ("no such", ["concise"], {"concise": 1}, 5, True):
        assert read(proposal(strategy=unknown))[0]["strategy"] is None
    assert len(playbook(proposal(), proposal()).entries) == 1


def test_cues_are_looked_for_in_the_text():
    for pattern, text in (("Hard", "a hard task"), ("STRASSE", "eine straße")):
        assert playbook(proposal(pattern)).retrieve(text, 1)[1]
    assert not playbook(proposal(".*")).retrieve("anything", 1)[1]


def test_regex_cues_of_older_traces_are_ignored():
    old = {"id": "e", "kind": "regex", "pattern": r"(\w+\s?)*$", "imperative": "Do it.", "strategy": None}
    book = Experience()
    book.learn(Outcome("s", learned=[old, *read(proposal())]))
    assert [entry.pattern for entry in book.entries.values()] == ["hard"]
    assert book.retrieve("hard " * 10**5 + "!", 1)[1] == list(book.entries)


def test_use_is_limited_in_number_and_withheld_in_a_fifth_of_the_matches():
    book = playbook(*[proposal(imperative=f"Do {letter}.") for letter in "abcdef"])
    assert len(book.retrieve("hard", 1)[0]) == 3
    used = sum(bool(playbook(proposal()).retrieve("hard", seed)[0]) for seed in range(400))
    assert 280 < used < 360
    assert playbook(proposal()).retrieve("easy", 1) == ([], [])


def test_the_best_known_effect_comes_first(monkeypatch):
    monkeypatch.setattr(learning, "SKILLS_PER_TASK", 1)
    book = playbook(proposal(imperative="good"), proposal(imperative="unknown"), proposal(imperative="bad"))
    good, unknown, bad = book.entries
    for reward, names in ((1.0, [good]), (0.0, [])):
        book.learn(Outcome("s", matched=[good], skills=names, reward=reward))
    for reward, names in ((0.0, [bad]), (1.0, [])):
        book.learn(Outcome("s", matched=[bad], skills=names, reward=reward))
    chosen = [book.retrieve("hard", seed)[0][0].id for seed in range(30)]
    assert (
        chosen.count(good) > 15
        and set(chosen) <= {good, unknown, bad}
        and chosen.count(bad) <= chosen.count(unknown)
    )
    assert book.entries[good].effect == 1.0 and book.entries[bad].effect == -1.0


@pytest.mark.parametrize(("sessions", "rewards", "hits", "is_kept"), [
    (9, (0.0, 1.0), True, True), (10, (0.0, 1.0), True, False),  # harmful: pruned after ten sessions, not before
    (40, (1.0, 0.5), True, True),  # helpful: stays
    (9, None, False, True), (10, None, False, False),  # its cue is never found
    (40, None, True, True)])  # fmt: skip  # nothing known of its effect
def test_pruning_by_the_published_rules(sessions, rewards, hits, is_kept):
    book = playbook(proposal())
    observe(book, sessions, rewards, hits)
    assert bool(book.entries) is is_kept


def test_what_changes_nothing_goes_if_it_is_mostly_adopted_and_what_only_one_task_needs_goes():
    book = playbook(proposal())
    (entry,) = book.entries.values()
    for index in range(12):
        skills = [entry.id] if index % 3 else []
        book.learn(Outcome("s", matched=[entry.id], skills=skills, reward=0.5))
    assert not book.entries
    book = playbook(proposal())
    (entry,) = book.entries.values()
    for index in range(20):
        book.learn(Outcome("s", matched=[entry.id] if index == 5 else []))
    assert not book.entries


def test_pruned_entries_do_not_come_back_and_the_size_is_limited(monkeypatch):
    monkeypatch.setattr(learning, "PLAYBOOK_SIZE", 3)
    book = playbook(proposal())
    observe(book, 10, (0.0, 1.0))
    book.learn(Outcome("s", learned=read(proposal())))
    assert not book.entries
    assert len(playbook(*[proposal(imperative=f"Do {word}.") for word in "abcde"]).entries) == 3


def test_sessions_beside_the_one_that_found_a_skill_do_not_count_against_it():
    """They could not use it; counted as sessions that it does not match, a batch of them would prune it for ever."""
    experience = Experience(["adaptive"])
    experience.learn(
        *[Outcome(f"s{index}", learned=read(proposal()) if index == 0 else []) for index in range(40)]
    )
    (entry,) = experience.entries.values()
    assert entry.sessions_observed == 0


# ------------------------------------------------------------------------------------------------------------- skills


class SkillWriter(Fake):
    def reply(self, prompt, seed):
        return json.dumps(
            {
                "entries": [
                    {"cue": {"type": "keyword", "pattern": "hard"}, "action": {"imperative": "Say HELP."}}
                ]
            }
        )


class Obedient(Teacher):
    def reply(self, prompt, seed):
        lucky = derive_seed(seed, prompt) % 4 == 0
        return f"<teaching>{'HELP' if 'Say HELP.' in prompt or lucky else 'Well.'}</teaching>"


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_skills_are_learned_from_sessions_that_went_well_used_and_rebuilt_from_the_traces(config):
    tasks = [Problem(f"t{i}", f"Task {i} is hard.", "x", "math") for i in range(60)]
    config = replace(config, skill_writer="writer", batch=10)
    outcomes = run(config, tasks, Student(tasks), Obedient(), **{"skill writer": SkillWriter()})
    used = [o.guided for o in outcomes if o.skills]
    assert used and set(used) == {1.0}
    plain = run(
        replace(config, skill_writer=None, out=config.out / "plain"), tasks, Student(tasks), Obedient()
    )
    assert sum(o.guided for o in outcomes) > sum(o.guided for o in plain) + 15
    with_skill = next(t for t in traces_of(config) if t["outcome"]["skills"])
    assert with_skill["teacher_learning"] == "Say HELP."
    (entry,) = json.loads((config.out / "playbook.json").read_text())["entries"]
    assert (
        entry["effect"] > 0.5 and entry["hits"] > entry["adoptions"] > 0
    )  # withheld now and then, to know its effect

    class Mortal(Student):
        life = 7

        def ask(self, *arguments, **options):
            self.life -= 1
            if self.life == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().ask(*arguments, **options)

    again = replace(config, out=config.out / "again")
    assert (
        in_a_process_that_dies(
            lambda: run(again, tasks, Mortal(tasks), Obedient(), **{"skill writer": SkillWriter()})
        )
        == -9
    )
    assert timeless(
        run(again, tasks, Student(tasks), Obedient(), **{"skill writer": SkillWriter()})
    ) == timeless(outcomes)
    assert (again.out / "playbook.json").read_text() == (config.out / "playbook.json").read_text()


def test_sessions_that_went_well_teach_skills(config, monkeypatch):
    monkeypatch.setattr(learning, "SKILL_REWARD", 1.5)
    writer = SkillWriter()
    run(replace(config, skill_writer="writer"), TASKS, Student(), Teacher(), **{"skill writer": writer})
    assert len(writer.prompts) == sum(
        i % 3 != 0 for i in range(23)
    )  # those that gained; the kept ones earn about 1
    assert not any(task.answer in prompt for task in TASKS for prompt in writer.prompts)
