"""GenEval's rules on hand-made cases: counts, confidence, colours, places, exclusions, the mean of six tasks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.errors import EvalError
from eval.geneval import TASKS, Found, Wanted, by_task, confident, is_right, places, read_wanted


def thing(x: float, y: float, score: float = 0.95, size: float = 10) -> Found:
    return Found((x, y, x + size, y + size), score)


def unasked(things: Sequence[Found], name: str) -> list[str]:
    raise AssertionError("no colour was to be asked for")


def one(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def test_counting_needs_surer_things_than_naming() -> None:
    found = {"cat": [thing(0, 0, 0.5)], "dog": [thing(9, 9, 0.3)]}
    assert confident(found, "single_object") == {"cat": [thing(0, 0, 0.5)]}
    assert confident(found, "counting") == {}


def test_at_most_sixteen_of_a_class_count_and_the_surest_come_first() -> None:
    many = [thing(i, 0, 0.4 + i / 100) for i in range(20)]
    kept = confident({"cat": many}, "two_object")["cat"]
    assert kept == many[:3:-1] and len(kept) == 16


@pytest.mark.parametrize(("count", "right"), [(1, False), (2, True), (3, False)])
def test_a_count_is_exact_where_more_are_excluded(count: int, right: bool) -> None:
    wanted = Wanted("two cats", "counting", (one("cat", 2),), (one("cat", 3),))
    assert is_right({"cat": [thing(20 * i, 0) for i in range(count)]}, wanted, unasked) is right


def test_two_objects_need_both() -> None:
    wanted = Wanted("a cat and a dog", "two_object", (one("cat"), one("dog")))
    assert is_right({"cat": [thing(0, 0)], "dog": [thing(0, 0)]}, wanted, unasked)
    assert not is_right({"cat": [thing(0, 0), thing(20, 0)]}, wanted, unasked)


def test_colours_are_asked_of_the_surest_things_and_bound_to_their_class() -> None:
    asked = []

    def colours(things: Sequence[Found], name: str) -> list[str]:
        asked.append((name, [t.score for t in things]))
        return ["red" if name == "cat" else "blue"] * len(things)

    found = {"cat": [thing(0, 0, 0.6), thing(20, 0, 0.9)], "dog": [thing(40, 0)]}
    right = Wanted("…", "color_attr", (one("cat", color="red"), one("dog", color="blue")))
    swapped = Wanted("…", "color_attr", (one("cat", color="blue"), one("dog", color="red")))
    assert is_right(found, right, colours) and asked[0] == ("cat", [0.9])
    assert not is_right(found, swapped, colours)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [(-30, 0, {"left of"}), (30, 0, {"right of"}), (0, -30, {"above"}), (0, 30, {"below"}), (1, 1, set()),
     (30, 30, {"right of", "below"}), (-40, 25, {"left of"}), (3, 0, set())],
)  # fmt: skip
def test_where_a_thing_stands_of_another(x: float, y: float, expected: set[str]) -> None:
    """Sizes 10 and 10: an offset loses 2 pixels; what is left must be half of the whole offset."""
    assert places(thing(x, y), thing(0, 0)) == expected


def test_a_position_is_relative_to_an_earlier_thing_that_must_be_there() -> None:
    wanted = Wanted("a cat left of a dog", "position", (one("dog"), one("cat", position=["left of", 0])))
    assert is_right({"dog": [thing(50, 0)], "cat": [thing(0, 0)]}, wanted, unasked)
    assert not is_right({"dog": [thing(0, 0)], "cat": [thing(50, 0)]}, wanted, unasked)
    assert not is_right({"cat": [thing(0, 0)]}, wanted, unasked)


def test_overall_is_the_mean_of_six_tasks_however_many_pictures_each_has() -> None:
    tasks = [*TASKS, "position", "position", "position"]
    found = by_task([True] * 6 + [False] * 3, tasks)
    assert found["position"] == 0.25 and found["overall"] == pytest.approx(5.25 / 6)
    assert "overall" not in by_task([True], ["position"])


def test_prompts_are_read_and_faulty_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    row = {"tag": "counting", "include": [one("cat", 2)], "exclude": [one("cat", 3)], "prompt": "two cats"}
    path.write_text(json.dumps(row) + "\n")
    assert read_wanted(path)["two cats"] == Wanted("two cats", "counting", (one("cat", 2),), (one("cat", 3),))
    for line, message in (("{}", "is no prompt of GenEval"), (json.dumps(row | {"tag": "size"}), "has task 'size'")):
        path.write_text(line)
        with pytest.raises(EvalError, match=message):
            read_wanted(path)
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"include": [one("dog", 2)]}))
    with pytest.raises(EvalError, match="asks for something else"):
        read_wanted(path)
    with pytest.raises(EvalError, match=r"is missing; put GenEval's"):
        read_wanted(tmp_path / "none.jsonl")
