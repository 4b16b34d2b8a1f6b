"""Which of its two teachers a run of train_grpo.py recommends."""

import pytest
from conftest import run_grpo

import train_grpo


@pytest.mark.parametrize(
    ("rewards", "said"),
    [((0.5, 0.2), "best is 0.300 (reward) above model; --teacher"), ((0.2, 0.5), ""), ((0.2, 0.2), "")],
)
def test_a_last_teacher_that_is_not_the_best_is_told_from_it(
    place, tmp_path, monkeypatch, capsys, rewards, said
):
    given = iter(rewards)
    monkeypatch.setattr(train_grpo, "evaluate", lambda *_: {"eval/reward": next(given)})
    run_grpo(place, tmp_path, steps=2, eval_every=1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert said in last and (f"--teacher {tmp_path / 'best'}" in last) is bool(said)


def test_without_evaluations_nothing_is_recommended(place, tmp_path, capsys):
    run_grpo(place, tmp_path, steps=1, eval_every=0)
    assert "above" not in capsys.readouterr().out
