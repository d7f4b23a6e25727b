"""Rewards that are the same are refused; those that share an origin, or are alone, are told of."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from distill.config import RecipeError
from distill.rewards import DigitClassifier, load_reward
from distill.rewards.judges import check_judges


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for name in ("a", "b"):
        DigitClassifier(8).save(tmp_path / name, 0.5)
    shutil.copytree(tmp_path / "a", tmp_path / "copy-of-a")
    return [str(tmp_path / name) for name in ("a", "b", "copy-of-a")]


def test_the_same_weights_under_another_name_are_refused(folders: list[str]) -> None:
    a, _, copy = folders
    with pytest.raises(RecipeError, match=r"copy-of-a has the weights of advantage\.reward .*hold out another reward"):
        check_judges(a, load_reward(a), [copy], [load_reward(copy)])


def test_other_weights_pass_in_silence(folders: list[str], caplog: pytest.LogCaptureFixture) -> None:
    a, b, _ = folders
    with caplog.at_level(logging.WARNING):
        check_judges(a, load_reward(a), [b], [load_reward(b)])
    assert not caplog.records


def test_a_reward_that_nothing_checks_is_told(folders: list[str], caplog: pytest.LogCaptureFixture) -> None:
    a, *_ = folders
    with caplog.at_level(logging.WARNING):
        check_judges(a, load_reward(a), [], [])
    assert "trains and nothing is held out: name heldout_rewards" in caplog.text


@pytest.mark.parametrize("which", ["train", "heldout"])
def test_a_reward_and_its_imitation_are_told_apart_and_of(
    which: str, folders: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    a, b, _ = folders
    reward, other = load_reward(a), load_reward(b)
    other.imitates = reward.digest
    train, held = (other, reward) if which == "train" else (reward, other)
    with caplog.at_level(logging.WARNING):
        check_judges("one", train, ["other"], [held])
    assert "one and other come from one reward" in caplog.text
