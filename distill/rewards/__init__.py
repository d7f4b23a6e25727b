"""Rewards: networks that score pictures against their conditions. Training and evaluation import the same code.

reward = load_reward("models/scenes-reward")      # or "hpsv2.1", "pickscore:/models/pickscore", …
reward.score(images, prompts)                     # images (B, 3, H, W) uint8 -> (B,) float32
"""

from distill.rewards.base import Reward
from distill.rewards.clip import ClipReward, clip_cosine, image_features, text_features
from distill.rewards.digits import DigitClassifier
from distill.rewards.load import load_reward

__all__ = [
    "ClipReward",
    "DigitClassifier",
    "Reward",
    "clip_cosine",
    "image_features",
    "load_reward",
    "text_features",
]
