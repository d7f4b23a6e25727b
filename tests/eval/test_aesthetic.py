"""LAION's aesthetic predictor on small weights of the same architecture."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.errors import EvalError
from eval.metrics import Score, create
from eval.metrics.aesthetic import CLIP, HEAD, Predictor, layers_of
from eval.metrics.base import Samples
from eval.prompts import Prompt

WIDTH, SIZE = 12, 32


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": SIZE, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPModel(CLIPConfig(text_config=small, vision_config=vision, projection_dim=WIDTH)).eval()


def head(widths: tuple[int, ...] = (WIDTH, 16, 8, 1)) -> dict[str, Tensor]:
    """Layers with Dropout between them, hence numbers 0, 2, 4, as the published file names them."""
    rng = torch.Generator().manual_seed(1)
    tensors = {}
    for i, (ins, outs) in enumerate(itertools.pairwise(widths)):
        tensors[f"layers.{2 * i}.weight"] = torch.randn(outs, ins, generator=rng)
        tensors[f"layers.{2 * i}.bias"] = torch.randn(outs, generator=rng)
    return tensors


def pictures(count: int = 7, height: int = 40, width: int = 56) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, 3, height, width), dtype=np.uint8)


def scored(predictor: Predictor, images: np.ndarray, batch: int = 7) -> Score:
    metric = create("aesthetic", predictor=predictor)
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        metric.update(Samples(part, tuple(Prompt(f"p{start + i}", "", start + i) for i in range(len(part)))))
    return metric.compute()


def test_it_equals_transformers_processor_and_the_published_module(clip: nn.Module) -> None:
    """CLIP's own processor, and the head as its authors write it: Linear, Dropout, Linear …"""
    from PIL import Image
    from transformers import CLIPImageProcessor

    published = nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(0.2), nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    published.load_state_dict({name.removeprefix("layers."): value for name, value in head().items()})
    side = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side)
    images = pictures()
    pixels = processor([Image.fromarray(image.transpose(1, 2, 0)) for image in images], return_tensors="pt")
    with torch.inference_mode():
        pooled = clip.vision_model(**pixels).pooler_output  # type: ignore[operator, union-attr]
        embedding = clip.visual_projection(pooled)  # type: ignore[operator]
        expected = published.eval()(embedding / embedding.norm(dim=-1, keepdim=True))[:, 0]
    found = scored(Predictor(clip, layers_of(head())), images)
    assert found.per_sample == pytest.approx(expected.numpy(), abs=0.02)  # 8-bit resizing, a level here and there
    assert found.value == pytest.approx(float(expected.mean()), abs=0.01)


def test_a_head_of_zeros_gives_its_bias_and_one_layer_is_a_dot_product(clip: nn.Module) -> None:
    flat = Predictor(clip, layers_of({"weight": torch.zeros(1, WIDTH), "bias": torch.tensor([5.5])}))
    assert scored(flat, pictures()).per_sample == pytest.approx(5.5)
    shifted = head() | {"layers.4.bias": head()["layers.4.bias"] + 1}
    plain, more = (scored(Predictor(clip, layers_of(tensors)), pictures()) for tensors in (head(), shifted))
    assert more.value == pytest.approx(plain.value + 1, abs=1e-4) and more.value > plain.value


def test_neither_order_nor_batches_nor_prompts_matter(clip: nn.Module) -> None:
    predictor, images = Predictor(clip, layers_of(head())), pictures()
    whole, single = scored(predictor, images), scored(predictor, images, batch=1)
    assert whole.per_sample == pytest.approx(single.per_sample, abs=1e-4)
    assert scored(predictor, images[::-1].copy()).value == pytest.approx(whole.value, abs=1e-4)


def test_weights_are_found_and_what_is_missing_is_named(clip: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="openai/clip-vit-large-patch14 of the hub there"):
        create("aesthetic", folder=tmp_path)
    clip.save_pretrained(tmp_path / CLIP)  # type: ignore[operator]
    with pytest.raises(EvalError, match=r"aesthetic-predictor is missing; put sac\+logos"):
        create("aesthetic", folder=tmp_path)
    (tmp_path / HEAD).mkdir()
    torch.save(head(), tmp_path / HEAD / "head.pth")
    metric = create("aesthetic", folder=tmp_path)
    prompts = tuple(Prompt(f"p{i}", "", i) for i in range(7))
    metric.update(Samples(pictures(), prompts))
    assert metric.compute().value == pytest.approx(scored(Predictor(clip, layers_of(head())), pictures()).value)
    torch.save(
        {"layers.0.weight": torch.zeros(3, WIDTH), "layers.0.bias": torch.zeros(3)}, tmp_path / HEAD / "head.pth"
    )
    with pytest.raises(EvalError, match="give no score"):
        create("aesthetic", folder=tmp_path)
    torch.save({"layers.0.weight": torch.zeros(1, WIDTH)}, tmp_path / HEAD / "head.pth")
    with pytest.raises(EvalError, match=r"lacks 'layers\.0\.bias'"):
        create("aesthetic", folder=tmp_path)
