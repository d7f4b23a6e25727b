"""The rule of compositional accuracy on hand-made cases, and the metric on a labeller that sees perfectly or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from distill.data.captions import Caption, Described
from distill.data.world import COLOURS, sample_scene
from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples
from eval.metrics.composition import compare, judge, proportion, task
from eval.prompts import Prompt


@dataclass(frozen=True)
class Seen:
    shape: str
    colour: str
    size: str = "large"
    material: str = "metal"
    x: float = 0.0
    z: float = 0.0
    score: float = 1.0


BALL = Seen("sphere", "red", x=-1.0, z=0.5)
CUBE = Seen("cube", "blue", "small", "rubber", x=1.0, z=-0.5)
FACTS = Caption(
    "a large red metal sphere left of a small blue rubber cube",
    (Described(0, "sphere", "red", "large", "metal"), Described(1, "cube", "blue", "small", "rubber")),
    ((0, "left", 1),),
)


def test_a_right_picture_is_right_in_any_order() -> None:
    assert compare([BALL, CUBE], FACTS)
    assert compare([CUBE, BALL], FACTS)


@pytest.mark.parametrize(
    ("field", "value"), [("colour", "green"), ("shape", "cylinder"), ("size", "small"), ("material", "rubber")]
)
def test_one_wrong_attribute_makes_it_wrong(field: str, value: str) -> None:
    verdict = judge([replace(BALL, **{field: value}), CUBE], FACTS)
    assert not verdict.right and verdict.count
    assert verdict.rates == {"shape": 1.0, "colour": 1.0, "size": 1.0, "material": 1.0, "relation": 1.0} | {field: 0.5}


def test_wrong_counts_are_wrong() -> None:
    for detections in ([], [BALL], [BALL, CUBE, CUBE], [BALL, CUBE, Seen("sphere", "cyan")]):
        verdict = judge(detections, FACTS)
        assert not verdict.right and not verdict.count
    assert judge([BALL], FACTS).rates["colour"] == 0.5
    assert judge([BALL], FACTS).rates["relation"] == 0.0
    assert judge([BALL, CUBE, CUBE], FACTS).rates["relation"] == 1.0


def test_a_cluttered_picture_is_judged_at_once_by_its_surest_things() -> None:
    clutter = [Seen("cylinder", "gray", score=0.6)] * 100
    verdict = judge([*clutter, BALL, CUBE], FACTS)
    assert not verdict.right and not verdict.count and verdict.rates["colour"] == 1.0


def test_a_swapped_relation_is_wrong() -> None:
    swapped = [replace(BALL, x=1.0), replace(CUBE, x=-1.0)]
    verdict = judge(swapped, FACTS)
    assert not verdict.right and verdict.rates["relation"] == 0.0 and verdict.rates["colour"] == 1.0


def test_swapped_colours_are_not_excused_by_another_matching() -> None:
    assert not compare([replace(BALL, colour="blue"), replace(CUBE, colour="red")], FACTS)


@pytest.mark.parametrize(("name", "right"), [("left", True), ("right", False), ("front", False), ("behind", True)])
def test_every_relation_has_its_axis_and_sign(name: str, right: bool) -> None:
    assert compare([BALL, CUBE], replace(FACTS, relations=((0, name, 1),))) is right


def test_what_is_not_stated_is_not_judged() -> None:
    loose = Caption("a red sphere", (Described(0, "sphere", "red", None, None),))
    assert compare([replace(BALL, size="small", material="rubber")], loose)
    assert judge([BALL], loose).rates["size"] is None
    assert not compare([CUBE], loose)


def test_identical_things_may_be_matched_either_way() -> None:
    """Two red balls, one of them left of the cube: the assignment that satisfies the relation counts."""
    twin = Described(0, "sphere", "red", None, None)
    facts = Caption("", (twin, replace(twin, index=1), Described(2, "cube", "blue", None, None)), ((1, "left", 2),))
    near, far = replace(BALL, x=2.0), replace(BALL, x=-2.0)
    assert compare([far, near, CUBE], facts) and compare([near, far, CUBE], facts)
    assert not compare([near, near, CUBE], facts)


class Oracle:
    """Sees a scene exactly; with damage > 0 it recolours that share of the pictures' first thing."""

    def __init__(self, damage: float = 0.0) -> None:
        self.damage, self.scenes = damage, {}  # type: ignore[var-annotated]

    def detect(self, images: Any) -> Sequence[Sequence[Seen]]:
        found = []
        for picture in images:
            index = int(picture[0, 0, 0]) * 256 + int(picture[0, 0, 1])
            things = sample_scene(7_100_000, index, count=(1, 2)[index % 2]).things
            seen = [Seen(t.shape, t.colour, t.size, t.material, t.x, t.z) for t in things]
            if (index * 0.61803) % 1 < self.damage:
                seen[0] = replace(seen[0], colour=COLOURS[(COLOURS.index(seen[0].colour) + 1) % 8])
            found.append(seen)
        return found


def numbered(prompts: list[Prompt]) -> Samples:
    """Pictures that carry their index in two pixels, so that the oracle knows which scene was asked for."""
    images = np.zeros((len(prompts), 3, 4, 4), np.uint8)
    for prompt, image in zip(prompts, images, strict=True):
        image[0, 0, :2] = divmod(int(prompt.id.rsplit("-", 1)[1]), 256)
    return Samples(images, tuple(prompts))


def test_real_scenes_answer_their_own_captions(scene_prompts: Callable[[int], list[Prompt]]) -> None:
    prompts = scene_prompts(300)
    values = {}
    for damage in (0.0, 0.2, 0.5):
        metric = create("composition", labeller=Oracle(damage), identity="oracle")
        for start in range(0, 300, 70):
            metric.update(numbered(prompts[start : start + 70]))
        values[damage] = metric.compute()
    assert values[0.0].value == 100.0 and values[0.0].ci[1] == 100.0 and values[0.0].ci[0] > 98
    names = ("count", "shape", "colour", "size", "material", "relation")
    tasks = ("colors", "counting", "color_attr", "position")
    assert values[0.0].parts == dict.fromkeys([*names, *(f"task {name}" for name in tasks)], 1.0)
    assert values[0.2].value == pytest.approx(80, abs=1.5) and values[0.5].value == pytest.approx(50, abs=1.5)
    assert values[0.2].ci[0] < 80 < values[0.2].ci[1]
    assert values[0.5].parts["colour"] < values[0.2].parts["colour"] < 1.0 == values[0.5].parts["shape"]


def test_accuracy_does_not_depend_on_the_batch_size(scene_prompts: Callable[[int], list[Prompt]]) -> None:
    prompts = scene_prompts(40)
    one, whole = (create("composition", labeller=Oracle(0.3), identity="oracle") for _ in range(2))
    for prompt in prompts:
        one.update(numbered([prompt]))
    whole.update(numbered(prompts))
    assert one.compute().interval == whole.compute().interval
    np.testing.assert_array_equal(one.compute().per_sample, whole.compute().per_sample)


def test_prompts_without_facts_are_refused() -> None:
    metric = create("composition", labeller=Oracle(), identity="oracle")
    with pytest.raises(EvalError, match="no facts"):
        metric.update(Samples(np.zeros((1, 3, 4, 4), np.uint8), (Prompt("digits-0-1", "7", 0, label=7),)))


def test_seeds_of_one_prompt_widen_the_interval() -> None:
    percent = np.repeat(np.array([100.0, 0.0] * 25), 4)
    clustered = proportion(percent, np.repeat(np.arange(50), 4).astype(str).tolist())
    plain = proportion(percent, [str(i) for i in range(200)])
    assert clustered.high - clustered.low > 1.8 * (plain.high - plain.low)
    assert proportion(np.full(8, 100.0), list("aabbccdd")).low < 100


def test_pictures_are_told_apart_by_genevals_tasks() -> None:
    ball, cube = FACTS.things
    one, two = Caption("…", (ball,)), Caption("…", (ball, replace(ball, index=1)))
    both = Caption("…", (ball, cube))
    assert [task(facts) for facts in (one, two, both, FACTS)] == ["colors", "counting", "color_attr", "position"]
