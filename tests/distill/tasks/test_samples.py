"""What a distillation is prompted with: captions of trained combinations, or a share of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import AutoencoderKL

from distill.config import FileData, RecipeError, SceneData
from distill.data import cache
from distill.data.world import HELD_OUT
from distill.tasks.samples import LabelSamples, SceneSamples, samples_for

SIZE = 200


def prompts(**data: Any) -> list[str]:
    return SceneSamples(SceneData(**data), 0, cast(Any, None)).conditions(3, 0, SIZE)


def names_held_out(caption: str) -> bool:
    """Whether it names a held-out combination in the grammar's plainest words; others go unseen."""
    surfaces = ("", "metal ", "rubber ")
    return any(f"{colour} {surface}{shape}" in caption for colour, shape in HELD_OUT for surface in surfaces)


def test_prompts_are_those_of_the_data_unless_a_share_is_held_out() -> None:
    assert prompts() == prompts(held_out_prompts=0.0)
    assert not any(names_held_out(caption) for caption in prompts())
    named = {share: sum(map(names_held_out, prompts(held_out_prompts=share))) for share in (0.5, 1.0)}
    assert 0 < named[0.5] < named[1.0]


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_between_zero_and_one(share: float) -> None:
    with pytest.raises(ValueError, match="held_out_prompts"):
        SceneData(held_out_prompts=share)


@pytest.mark.parametrize(
    ("data", "attributes", "told"),
    [
        ("labels", {"name": "sdxl"}, "data is labels, and the sdxl family reads prompts; name data.prompts"),
        ("digits", {"name": "wan"}, "data is digits, and the wan family reads prompts"),
        (FileData(prompts="p.txt"), {"name": "sit", "classes": 9}, "the sit family reads labels; use data: labels"),
        (SceneData(), {"name": "sit", "classes": 9}, "data has prompts, and the sit family reads labels"),
    ],
)
def test_labels_and_prompts_are_not_taken_for_each_other(data: Any, attributes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        samples_for(data, 0, cast(Any, type("Reader", (), attributes)))


def test_labels_are_drawn_alike_and_have_no_pictures() -> None:
    family = cast(Any, type("Classes", (), {"classes": 1000}))
    samples = samples_for("labels", 3, family)
    assert isinstance(samples, LabelSamples)
    drawn = [label for i in range(20) for label in samples.conditions(i, 0, 500)]
    assert samples.conditions(4, 1, 8) == samples.conditions(4, 1, 8) != samples.conditions(4, 2, 8)
    assert (min(drawn), max(drawn)) == (0, 999) and abs(sum(drawn) / len(drawn) - 499.5) < 12
    assert samples.preview_conditions() == [0, 125, 250, 375, 500, 625, 750, 875]
    with pytest.raises(ValueError, match="data: labels has no pictures, which gan and the like need"):
        samples.batch(0, 0, 4)


def test_latents_are_encoded_again_for_another_encoder_or_precision_and_not_for_another_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "CACHE", tmp_path)
    vae: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8, latent_channels=4)

    class Family:
        vae: Any
        device = torch.device("cpu")

        def latent_shape(self) -> tuple[int, ...]:
            return (4, 16, 16)

        def encode_images(self, images: torch.Tensor) -> torch.Tensor:
            return vae.encode(images).latent_dist.mode().detach()

    family = Family()
    family.vae = vae

    def files(precision: str = "bfloat16") -> int:
        SceneSamples(SceneData(count=4, size=16), 0, family, precision).batch(0, 0, 2)
        return len(list(tmp_path.glob("latents-*")))

    assert files() == 1
    with torch.no_grad():
        vae.decoder.conv_out.weight.add_(1.0)
    assert files() == 1
    with torch.no_grad():
        vae.encoder.conv_in.weight.add_(1.0)
    assert files() == 2
    assert files("float32") == 3 and files("float32") == 3
