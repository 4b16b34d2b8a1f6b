"""The ablation's rows: every option exists, and every fault that is patched in has an effect."""

from types import SimpleNamespace

import pytest
from conftest import SMALL, records

import train_grpo
from benchmarks import ablation
from nano_atlas.config import parse
from nano_atlas.presets import presets


def test_every_row_has_its_directory_and_options_of_train_grpo():
    assert len({row.key for row in ablation.ROWS}) == len(ablation.ROWS)
    for row in ablation.ROWS:
        parse(train_grpo.Config, row.flags.split(), presets("train_grpo"), "")


def run(place, out) -> list[tuple[float, ...]]:
    files = {
        "teacher": place / "teacher",
        "problems": place / "problems.jsonl",
        "student": str(place / "student"),
    }
    options = SMALL | files | {"steps": 3, "eval_every": 0, "max_logp_diff": 1e9, "out": out}
    train_grpo.train(train_grpo.Config(**options))
    return [(record["reward"], record["loss"], record["kl"]) for record in records(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def right(place, tmp_path_factory) -> list[tuple[float, ...]]:
    return run(place, tmp_path_factory.mktemp("right") / "out")


def test_groups_of_equal_rewards_are_skipped_unless_all_are(monkeypatch):
    def rolled_out(*rewards_PG):
        groups = [[SimpleNamespace(reward=reward) for reward in rewards_G] for rewards_G in rewards_PG]
        monkeypatch.setattr(train_grpo, "roll_out", lambda *_: (groups, {"reward": 1}))
        with ablation.groups_of_equal_rewards_skipped():
            kept, metrics = train_grpo.roll_out(None, None, None, 0)
        assert metrics == {"reward": 1}
        return [groups.index(group) for group in kept]

    assert rolled_out((1, 1), (0, 1), (2, 2), (1, 0)) == [1, 3] and rolled_out((1, 1), (2, 2)) == [0, 1]


CHANGING = [row for row in ablation.ROWS if row.fault and row.section != "groups of equal rewards"]


@pytest.mark.parametrize("row", CHANGING, ids=lambda row: row.name)
def test_a_fault_changes_what_a_run_computes(row, right, place, tmp_path):
    with row.fault():
        wrong = run(place, tmp_path / "out")
    assert wrong != right
