"""Suites: what they draw, and what they refuse."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from distill.data.world import HELD_OUT
from eval.errors import EvalError
from eval.prompts import EVALUATION_SEEDS, build_prompts, load_suite, suite_names


@pytest.mark.parametrize("name", suite_names())
def test_shipped_suites_load_and_repeat_themselves(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name and suite.prompts.seed in EVALUATION_SEEDS
    if suite.world == "text":
        with pytest.raises(EvalError, match="is missing, so its prompts cannot be drawn"):
            build_prompts(suite, 10)  # a benchmark's prompts are not ours to ship
        return
    prompts = build_prompts(suite, 6)
    assert prompts == build_prompts(suite, 6)
    assert len({prompt.key for prompt in prompts}) == 6
    assert all(prompt.seed in EVALUATION_SEEDS for prompt in prompts)


def test_no_two_suites_share_a_stream() -> None:
    suites = [load_suite(name) for name in suite_names()]
    starts = sorted((suite.prompts.seed, suite.prompts.count * suite.seeds_per_prompt) for suite in suites)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(starts))


def test_something_moves_in_every_clip_and_its_caption_says_what() -> None:
    prompts = build_prompts(load_suite("scenes-wan-trained"), 40)
    for prompt in prompts:
        assert prompt.moving and prompt.scene is not None and prompt.caption is not None
        stated = prompt.caption.camera if prompt.caption.motion is None else prompt.caption.motion[1]
        assert stated == prompt.scene.motion != "still" and prompt.id.startswith("moving-")
    assert len({prompt.scene.motion for prompt in prompts if prompt.scene}) > 5
    assert not any(prompt.moving for prompt in build_prompts(load_suite("scenes-trained"), 10))


def test_captions_show_the_combinations_that_the_suite_names() -> None:
    def pairs(name: str) -> list[set[tuple[str, str]]]:
        prompts = build_prompts(load_suite(name), 60)
        return [{(t.colour, t.shape) for t in p.caption.things} for p in prompts if p.caption]

    assert all(not found & HELD_OUT for found in pairs("scenes-trained"))
    assert all(found & HELD_OUT for found in pairs("scenes-held-out"))
    things = [len(p.caption.things) for p in build_prompts(load_suite("scenes-three"), 20) if p.caption]
    assert things == [3] * 20


def write(tmp_path: Path, **changes: object) -> str:
    tree = yaml.safe_load((Path("eval/suites") / "scenes-trained.yaml").read_text()) | changes
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_seeds_of_one_prompt_share_its_id(tmp_path: Path) -> None:
    prompts = build_prompts(load_suite(write(tmp_path, seeds_per_prompt=3)), 6)
    assert [p.id for p in prompts] == [prompts[0].id] * 3 + [prompts[3].id] * 3
    assert prompts[0].text == prompts[2].text and len({p.seed for p in prompts}) == 6


def test_bad_suites_are_refused_with_the_way_out(tmp_path: Path) -> None:
    cases = {
        "did you mean 'scenes-trained'": "scenes-traind",
        "metrcs is unknown; did you mean 'metrics'": write(tmp_path, metrcs={}),
    }
    for message, name in cases.items():
        with pytest.raises(EvalError, match=message):
            load_suite(name)
    draw = {"seed": 7_100_000, "count": 5}
    for message, changes in (
        ("the suite is empty", {"prompts": draw | {"count": 0}}),
        ("the suite is empty", {"metrics": {}}),
        ("training stream; use 7000000", {"prompts": draw | {"seed": 1}}),
        ("seeds_per_prompt", {"seeds_per_prompt": 0}),
    ):
        with pytest.raises(EvalError, match=message):
            load_suite(write(tmp_path, **changes))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(EvalError, match="no YAML"):
        load_suite(str(broken))


@pytest.mark.parametrize("limit", [0, -1, 1001])
def test_impossible_numbers_of_samples_are_refused(limit: int) -> None:
    with pytest.raises(EvalError, match="use 1 to 1000"):
        build_prompts(load_suite("scenes-trained"), limit)
