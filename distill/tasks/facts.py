"""What a scene or a caption states, as classes: supervision that teaches an encoder to keep every fact readable.

Contrastive training alone learns the facts that tell most pictures apart and neglects the rest, above all who stands
where. Each fact is a class of its own, never a conjunction, so combinations that training has not seen stay readable.
A scene's things come from left to right, a caption's in the order of their mention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from distill.data.captions import ATTRIBUTES, Caption
from distill.data.world import CAMERA_MOTIONS, COLOURS, MATERIALS, MOTIONS, RELATIONS, SHAPES, SIZES, Scene, relation

_VALUES: Mapping[str, tuple[str | None, ...]] = {
    "shape": (None, *SHAPES),
    "colour": COLOURS,
    "size": (None, *SIZES),
    "material": (None, *MATERIALS),
}
"""The classes of a thing's facts; no shape is no thing, no size and no material are not stated."""
_RELATIONS: tuple[str | None, ...] = (None, *RELATIONS)
_PLACES = 3
_PAIRS = tuple(combinations(range(_PLACES), 2))
CLASSES = (*(len(_VALUES[name]) for _ in range(_PLACES) for name in ATTRIBUTES), *(len(_RELATIONS) for _ in _PAIRS))
"""How many classes each fact has: four per place, then one relation per pair of places."""
MOTION_CLASSES = (*(len(MOTIONS) for _ in range(_PLACES)), len(CAMERA_MOTIONS))
"""Of what moves: how each thing does, and how the camera does."""
_NOT_ASKED = -1


def caption_facts(caption: Caption) -> list[int]:
    """One class per fact of CLASSES; −1 where there is nothing to ask."""
    things = [dict(described.stated) for described in caption.things]
    related = {(i, j): name for i, name, j in caption.relations}
    opposite = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
    order = [described.index for described in caption.things]
    pairs: dict[tuple[int, int], str | None] = {}
    for i, j in combinations(range(len(order)), 2):
        backwards = related.get((order[j], order[i]))
        pairs[i, j] = related.get((order[i], order[j])) or (opposite[backwards] if backwards else None)
    return _classes(things, pairs)


def caption_motions(caption: Caption) -> list[int]:
    """One class per fact of MOTION_CLASSES; −1 where there is no thing."""
    mover, name = caption.motion or (None, "still")
    things = [MOTIONS.index(name if thing.index == mover else "still") for thing in caption.things]
    return [*things, *[_NOT_ASKED] * (_PLACES - len(things)), CAMERA_MOTIONS.index(caption.camera)]


def scene_facts(scene: Scene) -> list[int]:
    """As ``caption_facts``, of what a picture of the scene shows."""
    things = sorted(scene.things, key=lambda thing: thing.x)
    named = [{name: getattr(thing, name) for name in ATTRIBUTES} for thing in things]
    pairs = {(i, j): relation(things[i], things[j]) for i, j in combinations(range(len(things)), 2)}
    return _classes(named, pairs)


def scene_motions(scene: Scene) -> list[int]:
    """As ``caption_motions``, of what a clip of the scene shows; its things from left to right at the start."""
    things = [MOTIONS.index(thing.motion) for thing in sorted(scene.things, key=lambda thing: thing.x)]
    return [*things, *[_NOT_ASKED] * (_PLACES - len(things)), CAMERA_MOTIONS.index(scene.camera)]


def _classes(things: Sequence[Mapping[str, str]], pairs: Mapping[tuple[int, int], str | None]) -> list[int]:
    classes = []
    for place in range(_PLACES):
        thing = things[place] if place < len(things) else None
        for name in ATTRIBUTES:
            asked = thing is not None or name == "shape"
            classes.append(_VALUES[name].index((thing or {}).get(name)) if asked else _NOT_ASKED)
    return classes + [_RELATIONS.index(pairs[pair]) if pair in pairs else _NOT_ASKED for pair in _PAIRS]


class FactsHead(nn.Module):
    """Reads all facts from one vector: (B, width) to (B, sum of ``classes``) logits, linearly."""

    def __init__(self, width: int, classes: Sequence[int] = CLASSES) -> None:
        super().__init__()
        self.read = nn.Linear(width, sum(classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x)  # type: ignore[no-any-return]


def facts_loss(logits: Tensor, facts: Tensor, classes: Sequence[int] = CLASSES) -> tuple[Tensor, Tensor]:
    """Cross-entropy over all asked facts, and the share of rows with every fact right. facts: (B, facts) int64."""
    loss, right = torch.zeros((), device=logits.device), torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    for part, truth in zip(logits.float().split(list(classes), dim=1), facts.unbind(1), strict=True):
        asked = truth != _NOT_ASKED
        loss = loss + cross_entropy(part, truth, ignore_index=_NOT_ASKED, reduction="sum")
        right &= ~asked | (part.argmax(1) == truth)
    return loss / (facts != _NOT_ASKED).sum(), right.float().mean()
