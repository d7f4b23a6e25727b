"""Rewards by name: ``KIND``, ``KIND:SOURCE`` or the folder of one of ours.

load_reward("hpsv2.1")                              # the published weights, from the hub
load_reward("pickscore:/models/pickscore")          # the same from a local folder
load_reward("models/scenes-reward")                 # ours
load_reward("models/scenes-latent-reward")          # ours, of latents (distill.rewards.latent)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from distill.config import RecipeError
from distill.reward_names import LATENT_KIND, parse_reward
from distill.rewards.clip import ClipReward, load_clip_score, load_pickscore
from distill.rewards.digits import DigitClassifier
from distill.rewards.dinov2 import load_dinov2
from distill.rewards.hpsv2 import load_hpsv2
from distill.rewards.imagereward import load_imagereward
from distill.rewards.latent import LatentReward
from distill.rewards.video import VideoReward
from distill.rewards.videoalign import load_videoalign

_LOADERS: dict[str, Callable[..., Any]] = {
    "hpsv2": partial(load_hpsv2, "hpsv2"),
    "hpsv2.1": partial(load_hpsv2, "hpsv2.1"),
    "pickscore": load_pickscore,
    "imagereward": load_imagereward,
    "clip": load_clip_score,
    "dinov2": load_dinov2,
    "videoalign": load_videoalign,
}


def load_reward(name: str | Path) -> Any:
    """The reward that a recipe names. Raises RecipeError for a name or folder that holds none."""
    kind, source = parse_reward(str(name))
    if kind is not None:
        return _LOADERS[kind](source) if source else _LOADERS[kind]()
    path = Path(name) / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    if config.get("kind") == "digit-classifier":
        return DigitClassifier.load(name)
    if config.get("kind") == "video-reward":
        return VideoReward.load(name)
    if config.get("kind") == LATENT_KIND:
        return LatentReward.load(name)
    if config.get("model_type") == "clip":
        return ClipReward.load(name)
    raise RecipeError(
        f"{name} holds no reward; give a folder with a CLIPModel, a video reward, a latent reward or a digit "
        "classifier, or a known name"
    )
