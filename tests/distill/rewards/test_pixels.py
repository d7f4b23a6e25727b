"""Preprocessing gives what the references' own does, and lets gradients through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms import functional as tvf
from transformers import CLIPImageProcessor

from distill.rewards.pixels import CLIP_MEAN, CLIP_STD, FillAndCrop, FitAndPad, whole_levels

Pictures = dict[tuple[int, int], Image.Image]
Batches = dict[tuple[int, int], Tensor]
LEVEL = 1 / 255 / min(CLIP_STD)
"""The most that one level of 255 amounts to after normalisation."""


def to_pixels(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def hps_transform(picture: Image.Image, size: int) -> Tensor:
    """HPSv2's transform, written from its description: float tensor, longest side, black bars, normalisation."""
    x = ToTensor()(picture)
    scale = size / max(x.shape[1:])
    height, width = round(x.shape[1] * scale), round(x.shape[2] * scale)
    x = tvf.resize(x, [height, width], InterpolationMode.BICUBIC, antialias=True)
    across, down = size - width, size - height
    x = tvf.pad(x, [across // 2, down // 2, across - across // 2, down - down // 2], fill=0)
    return Normalize(CLIP_MEAN, CLIP_STD)(x)


def test_longest_side_and_black_bars_equal_the_reference(gallery: Pictures, batches: Batches) -> None:
    for shape, picture in gallery.items():
        ours = FitAndPad(64)(to_pixels(batches[shape]))[0]
        assert ours.shape == (3, 64, 64)
        torch.testing.assert_close(ours, hps_transform(picture, 64), rtol=0, atol=2e-6)


def test_pictures_of_the_longest_side_get_bars_too() -> None:
    white = FitAndPad(64)(torch.ones(1, 3, 64, 40))
    black = -torch.tensor(CLIP_MEAN) / torch.tensor(CLIP_STD)
    assert white.shape == (1, 3, 64, 64)
    torch.testing.assert_close(white[0, :, 5, 11], black)
    torch.testing.assert_close(white[0, :, 5, 12], (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD))


def test_middle_of_the_shortest_side_equals_the_processor(gallery: Pictures, batches: Batches) -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    for shape, picture in gallery.items():
        ours = FillAndCrop(64, 64)(to_pixels(batches[shape]))[0]
        difference = (ours - processor(picture, return_tensors="pt").pixel_values[0]).abs()
        assert float(difference.max()) < 2.05 * LEVEL, shape
        assert float((difference > 0.5 * LEVEL).float().mean()) < 0.01, shape


def test_middle_of_the_shortest_side_equals_torchvision(gallery: Pictures, batches: Batches) -> None:
    reference = Compose(
        [Resize(72, InterpolationMode.BICUBIC), CenterCrop(64), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)]
    )
    for shape, picture in gallery.items():
        ours = FillAndCrop(64, 72, centre="torchvision")(to_pixels(batches[shape]))[0]
        difference = (ours - reference(picture)).abs()
        assert float(difference.max()) < 2.05 * LEVEL, shape
        assert float((difference > 0.5 * LEVEL).float().mean()) < 0.01, shape


def test_a_crop_larger_than_the_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="resize is 32, less than the crop's size 64; give at least the size"):
        FillAndCrop(64, 32)(torch.zeros(1, 3, 100, 100))


@pytest.mark.parametrize("prepare", [FitAndPad(32), FillAndCrop(32, 32)])
def test_gradients_reach_every_pixel_that_is_seen(prepare: FitAndPad | FillAndCrop) -> None:
    pixels = (torch.rand(1, 3, 48, 48) * 1.6 - 0.8).requires_grad_()
    weights = torch.randn(1, 3, 32, 32)
    (prepare(pixels) * weights).sum().backward()
    assert pixels.grad is not None and float((pixels.grad == 0).float().mean()) < 0.01


def test_gradient_is_that_of_a_resize_without_rounding() -> None:
    pixels = (torch.rand(1, 3, 48, 48) * 1.6 - 0.8).requires_grad_()
    weights = torch.randn(1, 3, 32, 32)
    ours = torch.autograd.grad((FillAndCrop(32, 32)(pixels) * weights).sum(), pixels)[0]
    smooth = torch.nn.functional.interpolate((pixels + 1) / 2, (32, 32), mode="bicubic", antialias=True)
    smooth = (smooth - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
    expected = torch.autograd.grad((smooth * weights).sum(), pixels)[0]
    assert float((ours - expected).norm() / expected.norm()) < 0.1


def test_whole_levels_round_forwards_and_pass_gradients_backwards() -> None:
    x = torch.tensor([-0.2, 0.3001, 0.5, 1.4], requires_grad=True)
    rounded = whole_levels(x)
    np.testing.assert_allclose(rounded.detach().numpy() * 255, [0, 77, 128, 255], atol=1e-4)
    rounded.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 0]
