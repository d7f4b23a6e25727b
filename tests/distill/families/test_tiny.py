"""A small decoder shows the judge the pictures that diffusers decodes; one of other latents is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from distill.config import DistillRecipe, RecipeError, load_recipe
from distill.families.tiny import tiny_decoder
from distill.shrink import shrunk
from distill.tasks.common import to_uint8
from distill.tasks.distillation import DistillationTask

RECIPE = Path(__file__).parents[3] / "recipes/sdxl-amd-4step.yaml"
STRIDE_4 = (8, 8, 8)


def saved(folder: Path, channels: int = 4, widths: tuple[int, ...] = STRIDE_4) -> AutoencoderTiny:
    torch.manual_seed(3)
    vae = AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        num_encoder_blocks=(1,) * len(widths), num_decoder_blocks=(1,) * len(widths),
    )  # fmt: skip
    vae.save_pretrained(folder)
    return vae.eval()


def recipe(tmp_path: Path, decoder: Path | None) -> DistillRecipe:
    small = shrunk(load_recipe(RECIPE, ["precision=float32", "fake_warmup=0"]), tmp_path / "inputs")
    assert small.advantage is not None
    advantage = small.advantage.model_copy(update={"decoder": decoder and str(decoder)})
    return small.model_copy(update={"advantage": advantage})


def test_what_is_judged_is_what_it_decodes(tmp_path: Path) -> None:
    vae = saved(tmp_path / "tiny")
    task = DistillationTask(recipe(tmp_path, tmp_path / "tiny"))
    judge, seen = task.reward, list[Tensor]()

    class Watching:
        name = "watching"

        def score(self, images: Tensor, prompts: list[str]) -> Any:
            seen.append(images)
            return judge.score(images, prompts)

    task.reward = Watching()
    rollout = task._rollout(0, 0, graph=False)
    with torch.no_grad():
        expected = to_uint8(vae.decode(rollout.samples).sample)
    assert torch.equal(seen[0], expected)
    assert not torch.equal(expected, to_uint8(task.family.decode(rollout.samples)))


@pytest.mark.parametrize(
    ("channels", "widths", "message"),
    [(8, STRIDE_4, "8 channels at stride 4"), (4, (8, 8), "4 channels at stride 2")],
)
def test_one_of_other_latents_is_refused(tmp_path: Path, channels: int, widths: tuple[int, ...], message: str) -> None:
    saved(tmp_path / "tiny", channels, widths)
    with pytest.raises(RecipeError, match=message):
        DistillationTask(recipe(tmp_path, tmp_path / "tiny"))


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(RecipeError, match=r"nothing holds no AutoencoderTiny"):
        tiny_decoder(str(tmp_path / "nothing"), None)
