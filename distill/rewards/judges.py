"""Whether held-out rewards can check the training reward: said once, when a run begins."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from distill.config import RecipeError
from distill.reward_names import overlaps

log = logging.getLogger(__name__)


def check_judges(train: str, reward: Any, heldout: Sequence[str], judges: Sequence[Any]) -> None:
    """Raises RecipeError where a held-out reward has the training reward's weights; warns where they have one origin.

    A reward of latents has the origin of the one that it imitates. train, heldout: names in the recipe; reward, judges:
    what was loaded for them.
    """
    for name, judge in zip(heldout, judges, strict=True):
        digest = getattr(judge, "digest", "")
        if digest and digest == getattr(reward, "digest", ""):
            raise RecipeError(
                f"heldout_rewards: {name} has the weights of advantage.reward {train} (sha256 {digest[:12]}…), so it "
                "checks nothing; hold out another reward"
            )
        if _origins(reward) & _origins(judge):
            log.warning(
                "rewards: %s and %s come from one reward: what is held out shows where the imitation fails, and not "
                "what fools both; hold out another reward as well",
                train,
                name,
            )
    for reason in overlaps(train, heldout):
        log.warning("rewards: %s", reason)


def _origins(judge: Any) -> set[str]:
    """Digests of the weights that a judge has or has learned to imitate."""
    return {getattr(judge, "digest", ""), getattr(judge, "imitates", "")} - {""}
