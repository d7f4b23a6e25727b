"""How recipes name rewards, and which of them can check each other. No torch: recipes are read without it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

KINDS = {
    "hpsv2": "HPDv2's human preferences on ViT-H/14",
    "hpsv2.1": "HPDv2's human preferences on ViT-H/14",
    "pickscore": "Pick-a-Pic's human preferences on ViT-H/14",
    "imagereward": "ImageReward's human preferences on BLIP",
    "clip": "captions alone",
    "dinov2": "ImageNet's labels on DINOv2",
    "videoalign": "VideoAlign's human preferences on Qwen2-VL",
}
"""Published rewards by name, with what each has learned from."""
LATENT_KIND = "latent-reward"
"""Of a folder of ours that holds a reward of latents, in its config.json."""


def parse_reward(name: str) -> tuple[str | None, str]:
    """(kind, source) of KIND or KIND:SOURCE, (None, folder) of anything else. Raises ValueError for a near miss."""
    kind, _, source = name.partition(":")
    if kind in KINDS:
        return kind, source
    near = difflib.get_close_matches(kind, KINDS, n=1)
    if not Path(name).exists() and "/" not in kind and (":" in name or near):
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(KINDS)}"
        raise ValueError(f"{name!r} is no reward's name and no folder; {hint}")
    return None, name


def reads_latents(name: str) -> bool:
    """Whether a name is the folder of a reward of latents (distill.rewards.latent), for which nothing is decoded."""
    kind, source = parse_reward(name)
    config = Path(source) / "config.json"
    return kind is None and config.is_file() and json.loads(config.read_text()).get("kind") == LATENT_KIND


def overlaps(train: str, heldout: Sequence[str]) -> list[str]:
    """Reasons why held-out rewards do not check the training reward; empty where they do.

    The same weights check nothing. Rewards tuned on the same judgements share their blind spots: HPSv2 beside HPSv2.1.
    """
    kind, _ = parse_reward(train)
    if not heldout:
        return [f"{train} trains and nothing is held out: name heldout_rewards to see whether it is being hacked"]
    learned = {name: parse_reward(name)[0] for name in heldout}
    return [
        f"{name} is held out, but has learned from {KINDS[kind]} as {train} has: expect the same blind spots"
        for name, other in learned.items()
        if kind is not None and other is not None and KINDS[other] == KINDS[kind]
    ]
