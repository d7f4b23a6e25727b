"""Published scorers of pictures and prompts as metrics: the same code and weights that can be a training reward.

    hpsv2.1, hpsv2    100 × cosine under HPSv2's towers (Wu et al., arXiv 2306.09341)
    pickscore         100 × cosine under PickScore's (Kirstain et al., arXiv 2305.01569)
    imagereward       standardised logit of ImageReward (Xu et al., arXiv 2304.05977)
    videoalign        VQ + MQ + TA of clips under VideoAlign (Liu et al., arXiv 2501.13918)
    clipscore         100 × cosine under CLIP ViT-L/14, not clipped at 0 (after Hessel et al., arXiv 2104.08718)

A score is the mean over pictures, with the mean of each style beside it; HPSv2's own printout adds the deviation of ten
chunks of 80 prompts, which is no error of the mean, so the interval is a bootstrap over prompts instead. Versions have
scales of their own and are metrics of their own. ``source`` names a local file, folder or hub id of the weights.
"""

from __future__ import annotations

from typing import ClassVar

from eval.errors import EvalError
from eval.metrics.base import register
from eval.metrics.reward import Reward, Scorer


class Preference(Reward):
    """A published scorer; subclasses say which."""

    kind: ClassVar[str]
    smallest_n = 100

    def __init__(self, source: str = "", scorer: Scorer | None = None, trained_on: bool = False) -> None:
        found = scorer or load_published(self.kind, source)
        super().__init__(scorer=found, identity=getattr(found, "digest", ""), trained_on=trained_on)


def load_published(kind: str, source: str = "") -> Scorer:
    """Raises EvalError that says which weights are missing and where they may lie."""
    from distill.rewards import load_reward
    from distill.rewards.weights import WeightsError

    try:
        scorer: Scorer = load_reward(f"{kind}:{source}" if source else kind)
    except (WeightsError, OSError) as error:
        raise EvalError(f"{kind} was not run: {error}") from None
    return scorer


@register
class HpsV21(Preference):
    name = kind = "hpsv2.1"


@register
class HpsV2(Preference):
    name = kind = "hpsv2"


@register
class PickScore(Preference):
    name = kind = "pickscore"


@register
class ImageReward(Preference):
    name = kind = "imagereward"


@register
class ClipScore(Preference):
    name, kind = "clipscore", "clip"


@register
class VideoAlign(Preference):
    name = kind = "videoalign"


KINDS = {metric.name: metric.kind for metric in (HpsV21, HpsV2, PickScore, ImageReward, ClipScore, VideoAlign)}
"""The reward behind each metric, as recipes name it."""
