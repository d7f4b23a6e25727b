"""Distances in feature maps: against their formula in float64, as a metric should behave, and where gradients go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from distill.objectives.features import Perception, load_perception
from distill.rewards import DigitClassifier

ROOT = Path(__file__).parents[3]


@pytest.fixture
def classifier() -> DigitClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DigitClassifier(8)


@pytest.fixture(scope="module")
def tower() -> Perception:
    return load_perception(ROOT / "models" / "scenes-clip")


def pictures(n: int, size: int, seed: int) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_distance_is_the_mean_over_depths_and_places_of_unit_vectors(classifier: DigitClassifier) -> None:
    look, x, y = Perception(classifier), pictures(3, 8, 0), pictures(3, 8, 1)
    expected = np.zeros(3)
    for a, b in zip(look.maps(x), look.maps(y), strict=True):
        u, v = (m.double().numpy() for m in (a, b))
        u, v = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (u, v))
        expected += ((u - v) ** 2).sum(1).mean(1) / 3
    np.testing.assert_allclose(look.distance(x, y).detach().numpy(), expected, rtol=1e-5)
    assert [m.shape for m in look.maps(x)] == [(3, 8, 64), (3, 16, 16), (3, 16, 16)]


def test_the_maps_of_a_clip_tower_are_its_layers(tower: Perception) -> None:
    assert isinstance(tower.network, CLIPModel)
    x = pictures(2, 64, 0)
    maps, config = tower.maps(x), tower.network.config.vision_config
    places = (config.image_size // config.patch_size) ** 2 + 1
    assert [m.shape for m in maps] == [(2, config.hidden_size, places)] * config.num_hidden_layers
    pooled = tower.network.vision_model.post_layernorm(maps[-1][:, :, 0])
    torch.testing.assert_close(pooled, tower.network.vision_model(pixel_values=x).pooler_output)


def test_a_picture_is_at_no_distance_from_itself_and_further_from_a_worse_copy(tower: Perception) -> None:
    x = pictures(2, 64, 0)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    near, far = (tower.distance(x, (x + strength * noise).clamp(-1, 1)) for strength in (0.05, 0.5))
    assert float(tower.distance(x, x).abs().max()) == 0.0
    assert bool((near > 0).all()) and bool((far > near).all()) and float(far.max()) <= 4.0
    torch.testing.assert_close(tower.distance(x, x + 0.1 * noise), tower.distance(x + 0.1 * noise, x))


def test_pictures_are_brought_to_the_networks_size(classifier: DigitClassifier) -> None:
    look = Perception(classifier)
    for size in (5, 8, 33):
        flat = torch.full((1, 3, size, size), 0.3)
        for found, expected in zip(look.maps(flat), look.maps(flat[:, :, :1, :1].expand(1, 3, 8, 8)), strict=True):
            torch.testing.assert_close(found, expected)
    assert float(look.distance(pictures(1, 33, 0), pictures(1, 33, 1))) > 0


def test_the_gradient_reaches_the_pixels_and_not_the_network(classifier: DigitClassifier) -> None:
    look, x = Perception(classifier), pictures(2, 8, 0).requires_grad_()
    look.distance(x, pictures(2, 8, 1)).sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_a_folder_without_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a folder with a CLIPModel, a video reward"):
        load_perception(tmp_path)
