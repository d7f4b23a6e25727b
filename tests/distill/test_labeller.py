"""The labeller's geometry agrees with the renderer, and exact answers of the network give exact scenes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.data.scenes import project, render
from distill.data.world import MATERIALS, SHAPES, SIZES, Scene, Thing, sample_scene
from distill.labeller import ATTRIBUTES, STRIDE, Detection, Labeller
from distill.tasks.labeller import matches, targets


class Perfect(Labeller):
    """The detector's reading of logits alone: ``answers`` replace what its layers would say."""

    def __init__(self, answers: dict[str, Tensor]) -> None:
        super().__init__(8)
        self.answers = answers

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: value[: len(images)] for name, value in self.answers.items()}


def perfect_logits(scenes: list[Scene], size: int = 64, sure: float = 20.0) -> dict[str, Tensor]:
    """Logits that say exactly what the scenes hold."""
    side, truth = size // STRIDE, targets(scenes, size)
    b, row, column = truth["cells"].unbind(1)
    out = {name: torch.zeros(len(scenes), len(values), side, side) for name, values in ATTRIBUTES}
    out["object"] = torch.full((len(scenes), 1, side, side), -sure)
    out["position"] = torch.zeros(len(scenes), 2, side, side)
    out["object"][b, 0, row, column] = sure
    for i, (name, _) in enumerate(ATTRIBUTES):
        out[name][b, truth["attributes"][:, i], row, column] = sure
    out["position"][b, :, row, column] = truth["position"]
    return out


def blank(n: int, size: int = 64) -> Tensor:
    return torch.zeros(n, 3, size, size, dtype=torch.uint8)


# --- detect --------------------------------------------------------------------------------------------------------


def test_exact_logits_give_the_exact_scene() -> None:
    scenes = [sample_scene(3, i, combinations="held_out" if i % 2 else "trained") for i in range(250)]
    found = Perfect(perfect_logits(scenes)).detect(blank(250))
    wrong = [i for i, (scene, things) in enumerate(zip(scenes, found, strict=True)) if not matches(scene, things)]
    assert wrong == []
    for scene, things in zip(scenes, found, strict=True):
        places, expected = sorted((d.x, d.z) for d in things), sorted((t.x, t.z) for t in scene.things)
        assert sum(places, ()) == pytest.approx(sum(expected, ()), abs=1e-6)
        assert all(d.score == pytest.approx(1.0) for d in things)


def test_a_peak_is_found_once_where_neighbours_are_sure_too() -> None:
    scene = [sample_scene(3, 0, count=1)]
    answers = perfect_logits(scene)
    _, row, column = targets(scene, 64)["cells"][0].tolist()
    answers["object"][0, 0, row - 1 : row + 2, column - 1 : column + 2] = 25.0
    answers["object"][0, 0, row, column] = 30.0
    (found,) = Perfect(answers).detect(blank(1))
    assert len(found) == 1


def test_only_what_passes_the_threshold_is_found() -> None:
    scene = [sample_scene(3, 1, count=2)]
    labeller = Perfect(perfect_logits(scene, sure=1.0))
    assert len(labeller.detect(blank(1), threshold=0.7)[0]) == 2  # sigmoid(1) = 0.73
    assert labeller.detect(blank(1), threshold=0.75) == [[]]


def test_empty_ground_has_nothing_on_it() -> None:
    answers = {name: torch.zeros(2, len(values), 16, 16) for name, values in ATTRIBUTES}
    answers |= {"object": torch.full((2, 1, 16, 16), -9.0), "position": torch.zeros(2, 2, 16, 16)}
    assert Perfect(answers).detect(blank(2)) == [[], []]


@pytest.mark.parametrize("images", [torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(1, 3, 64, 64)])
def test_pictures_of_another_kind_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images is \(.*\) torch\..*; give \(B, 3, H, W\) uint8"):
        Labeller(8).detect(images)


def test_detection_does_not_depend_on_the_batch() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        labeller = Labeller(8).eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    together = labeller.detect(images, threshold=0.3)
    assert sum(map(len, together)) > 0
    for i in range(3):
        (alone,) = labeller.detect(images[i : i + 1], threshold=0.3)
        assert [(d.shape, d.colour, d.size, d.material) for d in alone] == [
            (d.shape, d.colour, d.size, d.material) for d in together[i]
        ]
        assert [d.score for d in alone] == pytest.approx([d.score for d in together[i]], abs=1e-4)


def test_matching_is_by_attributes_in_any_order_and_number() -> None:
    a, b = Thing("cube", "red", "small", "metal", 0, 0), Thing("sphere", "blue", "large", "rubber", 1, 1)
    found = [Detection(t.shape, t.colour, t.size, t.material, t.x, t.z, 1.0) for t in (b, a)]
    assert matches(Scene((a, b)), found)
    assert not matches(Scene((a,)), found) and not matches(Scene((a, b)), found[:1])
    assert not matches(Scene((a, b)), [replace(found[0], colour="red"), found[1]])
    assert not matches(Scene((a, a)), found)


# --- geometry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_appears_where_it_is_projected(shape: str) -> None:
    """The pixels that change with a thing's colour, and so belong to it, surround its projected centre."""
    places = [(-1.3, -1.1), (1.2, 1.0), (0.0, 0.0), (1.1, -0.9), (-1.0, 1.1)]
    things = [Thing(shape, "red", SIZES[i % 2], MATERIALS[1 - i % 2], x, z) for i, (x, z) in enumerate(places)]
    scenes = [Scene((replace(thing, colour=colour),)) for colour in ("red", "cyan") for thing in things]
    red, cyan = render(scenes, 64).int().chunk(2)
    for thing, picture in zip(things, (red - cyan).abs().sum(1) > 60, strict=True):
        rows, columns = picture.nonzero().unbind(1)
        middle = [(float(v.min()) + float(v.max()) + 1) / 2 / 64 for v in (columns, rows)]
        assert project(thing) == pytest.approx(middle, abs=2.5 / 64)
        u, v = project(thing)
        assert picture[int(v * 64), int(u * 64)]


def test_targets_put_each_thing_into_the_cell_of_its_centre() -> None:
    scenes = [sample_scene(3, i) for i in range(20)]
    truth = targets(scenes, 64)
    things = [(b, thing) for b, scene in enumerate(scenes) for thing in scene.things]
    assert len(truth["cells"]) == len(things)
    for (b, thing), cell, values, place in zip(
        things, truth["cells"], truth["attributes"], truth["position"], strict=True
    ):
        u, v = project(thing)
        assert cell.tolist() == [b, int(16 * v), int(16 * u)]
        named = [names[int(i)] for i, (_, names) in zip(values, ATTRIBUTES, strict=True)]
        assert named == [thing.shape, thing.colour, thing.size, thing.material]
        assert place.tolist() == pytest.approx([thing.x, thing.z], abs=1e-6)


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_saved_labeller_gives_the_same_answers(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        labeller = Labeller(8).eval()
    with torch.no_grad():
        for parameter in labeller.parameters():
            parameter.copy_(parameter.half().float())
    labeller.save(tmp_path / "judge", {"trained": 0.99, "held_out": 0.97})
    again = Labeller.load(tmp_path / "judge")
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = labeller(images), again(images)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    config = json.loads((tmp_path / "judge/config.json").read_text())
    assert config == {"width": 8, "accuracy": {"trained": 0.99, "held_out": 0.97}}
