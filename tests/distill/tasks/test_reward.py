"""What rewards learn from: damaged pictures, and captions that are wrong but nearly right."""

from __future__ import annotations

import numpy as np
import torch

from distill.data.captions import true_of
from distill.data.world import sample_scene
from distill.tasks.clip import wrong_caption
from distill.tasks.common import to_float, to_uint8
from distill.tasks.reward import degrade


def test_every_picture_is_damaged_and_stays_in_range() -> None:
    clean = to_float(torch.randint(0, 256, (48, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8))
    damaged = degrade(clean, np.random.default_rng(0), torch.Generator().manual_seed(0))
    assert damaged.shape == clean.shape and float(damaged.abs().max()) <= 1
    assert float((damaged - clean).abs().flatten(1).mean(1).min()) > 0.01
    again = degrade(clean, np.random.default_rng(0), torch.Generator().manual_seed(0))
    assert torch.equal(damaged, again)


def test_a_wrong_caption_is_false_but_nearly_right() -> None:
    rng, kinds = np.random.default_rng(0), set()
    for index in range(300):
        scene = sample_scene(11, index)
        caption = wrong_caption(scene, rng)
        assert not true_of(caption, scene)
        kinds_stated = sorted(tuple(value for _, value in d.stated) for d in caption.things)
        kinds_shown = sorted((t.shape, t.colour, t.size, t.material) for t in scene.things)
        missing = [kind for kind in kinds_shown if kind not in kinds_stated]
        kinds.add("attribute" if missing else "places")
        assert len(missing) <= 1
    assert kinds == {"attribute", "places"}


def test_uint8_and_float_pictures_convert_without_loss() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_uint8(torch.tensor([-2.0, 2.0, 0.0])).tolist() == [0, 255, 128]
