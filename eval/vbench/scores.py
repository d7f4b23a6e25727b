"""From VBench's raw dimensions to its Quality, Semantic and Total scores (Huang et al., arXiv 2311.17982).

    normalised = (raw − min)/(max − min), not clipped
    Quality    = Σ w·normalised / Σ w over 7 dimensions, w = 1 but ½ for dynamic_degree
    Semantic   = mean of normalised over 9 dimensions
    Total      = (4·Quality + Semantic)/5

Minima, maxima and weights are those of scripts/constant.py of Vchitect/VBench. The official script puts raw 0 for a
dimension that is absent; here a score that needs one that was not run does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from eval.errors import EvalError, nearest


@dataclass(frozen=True)
class Dimension:
    """How one dimension enters. least, most: raw scores that are normalised to 0 and 1. scale: of a clip's raw score.

    partial: a clip that shows nothing to judge leaves the mean instead of counting as 0, as VBench has it for colours.
    """

    name: str
    group: Literal["quality", "semantic"]
    least: float = 0.0
    most: float = 1.0
    weight: float = 1.0
    scale: float = 1.0
    partial: bool = False

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")

    def normalise(self, raw: float) -> float:
        return (raw - self.least) / (self.most - self.least)


DIMENSIONS = {
    dimension.name: dimension
    for dimension in (
        Dimension("subject_consistency", "quality", 0.1462),
        Dimension("background_consistency", "quality", 0.2615),
        Dimension("temporal_flickering", "quality", 0.6293),
        Dimension("motion_smoothness", "quality", 0.706, 0.9975),
        Dimension("dynamic_degree", "quality", weight=0.5),
        Dimension("aesthetic_quality", "quality"),
        Dimension("imaging_quality", "quality", scale=0.01),
        Dimension("object_class", "semantic"),
        Dimension("multiple_objects", "semantic"),
        Dimension("human_action", "semantic"),
        Dimension("color", "semantic", partial=True),
        Dimension("spatial_relationship", "semantic"),
        Dimension("scene", "semantic", 0.0, 0.8222),
        Dimension("appearance_style", "semantic", 0.0009, 0.2855),
        Dimension("temporal_style", "semantic", 0.0, 0.364),
        Dimension("overall_consistency", "semantic", 0.0, 0.364),
    )
}
QUALITY_SHARE = 4 / 5


def dimension(name: str) -> Dimension:
    if name not in DIMENSIONS:
        raise EvalError(f"dimension {name!r} is unknown; {nearest(name, DIMENSIONS)}")
    return DIMENSIONS[name]


def group_score(raw: Mapping[str, float], group: Literal["quality", "semantic"]) -> float | None:
    """Quality or Semantic in [0, 1] of raw scores by dimension; None unless every dimension of the group is there."""
    members = [found for found in DIMENSIONS.values() if found.group == group]
    if any(member.name not in raw for member in members):
        return None
    weighted = sum(member.weight * member.normalise(raw[member.name]) for member in members)
    return weighted / sum(member.weight for member in members)


def total_score(raw: Mapping[str, float]) -> float | None:
    """Total in [0, 1]; None unless all 16 dimensions are there."""
    quality, semantic = group_score(raw, "quality"), group_score(raw, "semantic")
    if quality is None or semantic is None:
        return None
    return QUALITY_SHARE * quality + (1 - QUALITY_SHARE) * semantic


def worth(name: str) -> float:
    """How much Total rises when a dimension's raw score rises by 1."""
    found = dimension(name)
    members = [other for other in DIMENSIONS.values() if other.group == found.group]
    share = QUALITY_SHARE if found.group == "quality" else 1 - QUALITY_SHARE
    return share * found.weight / sum(other.weight for other in members) / (found.most - found.least)
