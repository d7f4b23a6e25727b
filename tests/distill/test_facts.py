"""Facts as classes: each is what the caption or the scene says, and a head can learn to read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.data.captions import Caption, Described, describe
from distill.data.world import Scene, Thing, sample_scene
from distill.tasks.facts import CLASSES, FactsHead, caption_facts, facts_loss, scene_facts

SPHERE, CUBE = Described(0, "sphere", "red", "large", None), Described(1, "cube", "blue", None, "metal")


def test_a_captions_facts_in_the_order_of_mention() -> None:
    nothing = [0, -1, -1, -1]
    first, second = [1, 1, 2, 0], [2, 2, 0, 2]
    assert caption_facts(Caption("", (SPHERE,))) == [*first, *nothing, *nothing, -1, -1, -1]
    both = caption_facts(Caption("", (SPHERE, CUBE), ((0, "left", 1),)))
    assert both == [*first, *second, *nothing, 1, -1, -1]


@pytest.mark.parametrize(("name", "backwards"), [("left", 2), ("right", 1), ("front", 4), ("behind", 3)])
def test_a_relation_is_turned_to_the_order_of_mention(name: str, backwards: int) -> None:
    assert caption_facts(Caption("", (CUBE, SPHERE), ((0, name, 1),)))[12] == backwards


def test_a_scenes_facts_come_from_left_to_right() -> None:
    things = (Thing("cube", "blue", "small", "metal", 1.0, 0.0), Thing("sphere", "red", "large", "rubber", -1.0, 0.2))
    assert scene_facts(Scene(things)) == [1, 1, 2, 1, 2, 2, 1, 2, 0, -1, -1, -1, 1, -1, -1]


def test_facts_fit_their_classes_and_tell_captions_apart() -> None:
    seen: dict[tuple[int, ...], set[tuple[object, ...]]] = {}
    for index in range(500):
        scene = sample_scene(3, index)
        caption = describe(scene, np.random.default_rng(index))
        for facts in (caption_facts(caption), scene_facts(scene)):
            assert len(facts) == len(CLASSES)
            assert all(-1 <= fact < number for fact, number in zip(facts, CLASSES, strict=True))
        stated = (*(tuple(d.stated) for d in caption.things), len(caption.relations))
        seen.setdefault(tuple(caption_facts(caption)), set()).add(stated)
    assert all(len(stated) == 1 for stated in seen.values())


def test_the_loss_is_zero_for_sure_right_answers_and_ignores_what_is_not_asked() -> None:
    facts = torch.tensor([caption_facts(Caption("", (SPHERE,))), caption_facts(Caption("", (SPHERE, CUBE)))])
    logits = torch.zeros(2, sum(CLASSES))
    start = 0
    for column, number in enumerate(CLASSES):
        for row in range(2):
            if facts[row, column] >= 0:
                logits[row, start + facts[row, column]] = 50.0
        start += number
    loss, right = facts_loss(logits, facts)
    assert float(loss) < 1e-6 and float(right) == 1.0
    logits[1, : CLASSES[0]] = torch.tensor([50.0, 0.0, 0.0, 0.0])
    worse, half = facts_loss(logits, facts)
    assert float(worse) > 1 and float(half) == 0.5


def test_a_head_learns_facts_from_a_vector_that_holds_them() -> None:
    generator = torch.Generator().manual_seed(0)
    captions = [describe(sample_scene(5, i), np.random.default_rng(i)) for i in range(64)]
    facts = torch.tensor([caption_facts(caption) for caption in captions])
    vectors = torch.randn(64, 64, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = FactsHead(64)
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(100):
        loss, right = facts_loss(head(vectors), facts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05 and float(right) > 0.95
