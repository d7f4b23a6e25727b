"""What MMDiT families keep right: text as their pipelines read it, packing, shifts, guidance as an input, training."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from transformers import T5EncoderModel

from distill.data import cache
from distill.families.flux import Flux, pack, places, unpack
from distill.families.published import FLUX_DEV, FLUX_SCHNELL, SD3_MEDIUM, SD35_MEDIUM, Configs
from distill.families.schedulers import flow
from distill.families.sd3 import Sd3
from distill.run import main
from distill.shrink import save_tiny_teacher

RECIPES = Path(__file__).parents[3] / "recipes"
PROMPTS = ["  a  cat & a\ndog ", "x" * 700]
Folder = Callable[[str], Path]


# --- text ----------------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_as_sd3s_pipeline_does(tiny_teacher: Folder) -> None:
    family, _ = Sd3.from_folder(tiny_teacher("sd3"))
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(tiny_teacher("sd3"))
    embeds, nothing, pooled, no_pooled = pipeline.encode_prompt(PROMPTS, None, None)
    found, empty = family.encode(PROMPTS), family.unconditional(2)
    assert found["prompt_embeds"].shape == (2, 40 + 256, 32) and found["pooled"].shape == (2, 32)
    for ours, theirs in ((found["prompt_embeds"], embeds), (empty["prompt_embeds"], nothing)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled"], pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(empty["pooled"], no_pooled, rtol=1e-4, atol=1e-5)


def test_prompts_are_encoded_as_fluxs_pipeline_does(tiny_teacher: Folder) -> None:
    family, _ = Flux.from_folder(tiny_teacher("flux"))
    pipeline: Any = FluxPipeline.from_pretrained(tiny_teacher("flux"))
    with torch.no_grad():  # as the pipeline's own call: with a graph processors take other kernels
        embeds, pooled, ids = pipeline.encode_prompt(PROMPTS)
    found = family.encode(PROMPTS)
    assert found["prompt_embeds"].shape == (2, 512, 32) and found["guidance"].tolist() == [3.5, 3.5]
    torch.testing.assert_close(found["prompt_embeds"], embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled"], pooled, rtol=1e-4, atol=1e-5)
    inputs = family.inputs(torch.zeros(2, 4, 4, 6), torch.tensor([0.5, 1.0]), found)
    assert torch.equal(inputs["txt_ids"], ids) and inputs["timestep"].tolist() == [0.5, 1.0]


def test_without_t5_its_rows_are_zeros(tiny_teacher: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(tiny_teacher("sd3"), tmp_path / "sd3")
    shutil.rmtree(folder / "text_encoder_3")
    family, network = Sd3.from_folder(folder)
    assert "has no text_encoder_3: prompts are read by CLIP alone" in caplog.text
    whole = Sd3.from_folder(tiny_teacher("sd3"))[0].encode(["a red cube"])["prompt_embeds"]
    found = family.encode(["a red cube"])["prompt_embeds"]
    assert torch.equal(found[:, :40], whole[:, :40]) and not found[:, 40:].any() and found.shape == whole.shape
    family.save(network, tmp_path / "saved")
    pipeline: Any = StableDiffusion3Pipeline.from_pretrained(tmp_path / "saved", text_encoder_3=None, tokenizer_3=None)
    torch.testing.assert_close(found, pipeline.encode_prompt(["a red cube"], None, None)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "encoder"), [(Sd3, "text_encoder_3"), (Flux, "text_encoder_2")])
def test_t5_is_taken_as_stored_but_never_in_float16(
    kind: Any, encoder: str, tiny_teacher: Folder, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_teacher(kind.name), tmp_path / "teacher")
    for stored, taken in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        T5EncoderModel.from_pretrained(folder / encoder).to(stored).save_pretrained(folder / encoder)
        family, _ = kind.from_folder(folder)
        assert getattr(family, encoder).dtype is taken
        assert family.encode(["a dog"])["prompt_embeds"].dtype is torch.float32


# --- latents -------------------------------------------------------------------------------------------------------


def test_latents_have_a_mean_and_a_scale(tiny_teacher: Folder) -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for kind, shift, scale in ((Sd3, 0.0609, 1.5305), (Flux, 0.1159, 0.3611)):
        family: Any = kind.from_folder(tiny_teacher(kind.name), size=(32, 32))[0]
        latents = family.encode_images(images)
        assert latents.shape == (1, *family.latent_shape())
        with torch.no_grad():
            raw = family.vae.encode(images).latent_dist.mean
            torch.testing.assert_close(latents, (raw - shift) * scale)
            torch.testing.assert_close(family.decode(latents), family.vae.decode(raw).sample, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"size has 36; flux, .* takes multiples of 8 pixels"):
        family.latent_shape((32, 36))


def test_latents_are_packed_as_fluxs_pipeline_does() -> None:
    x = torch.arange(2 * 4 * 6 * 8, dtype=torch.float32).reshape(2, 4, 6, 8)
    theirs: Any = FluxPipeline
    assert torch.equal(pack(x), theirs._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpack(pack(x), 3, 4), x)
    assert torch.equal(places(x), theirs._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))


# --- time and guidance ---------------------------------------------------------------------------------------------


def test_fluxs_shift_belongs_to_the_size() -> None:
    def shallow(configs: Configs, t5: str) -> Configs:
        few = {"num_layers": 1, **({"num_single_layers": 1} if t5 == "text_encoder_2" else {})}
        return {**configs, "transformer": {**configs["transformer"], **few}, t5: {"num_layers": 1}}

    dev, schnell = (shallow(configs, "text_encoder_2") for configs in (FLUX_DEV, FLUX_SCHNELL))
    with torch.device("meta"):
        large, small = (Flux.from_config(dev, size=(side, side))[0].schedule for side in (1024, 256))
        fixed = Flux.from_config(dev, shift=3.0)[0].schedule
        static, _ = Flux.from_config(schnell)
        sd3 = Sd3.from_config(shallow(SD3_MEDIUM, "text_encoder_3"))[0].schedule
    assert large.shift == pytest.approx(math.exp(1.15)) and small.shift == pytest.approx(math.exp(0.5))
    assert [round(1000 * t) for t in large.grid(4)] == [1000, 905, 760, 513]
    assert (fixed.shift, static.schedule.shift, static.guidance) == (3.0, 1.0, None)
    assert sd3.grid(4).tolist() == pytest.approx([1, 0.9, 0.75, 0.5])
    odd = {**FLUX_DEV["scheduler"], "time_shift_type": "linear"}
    with pytest.raises(ValueError, match=r"shifts time by resolution .* 'linear'.* give shift in the recipe"):
        flow(odd, "here", tokens=4096)
    with pytest.raises(ValueError, match="shifts time by resolution"):
        flow(FLUX_DEV["scheduler"], "here")


@torch.no_grad()
def test_guidance_is_an_input_of_flux_dev(tiny_teacher: Folder, tmp_path: Path) -> None:
    family, network = Flux.from_folder(tiny_teacher("flux"), size=(32, 32), embedded_guidance=1.0)
    condition = family.encode(["a red cube"])
    x, t = torch.randn(1, *family.latent_shape()), torch.tensor([0.7])
    found = family.predict(network.eval(), x, t, condition).x0
    other = family.predict(network, x, t, {**condition, "guidance": torch.tensor([5.0])}).x0
    assert not torch.allclose(found, other, atol=1e-4)

    save_tiny_teacher("flux", FLUX_SCHNELL, tmp_path / "schnell")
    schnell, network = Flux.from_folder(tmp_path / "schnell", size=(32, 32))
    assert "guidance" not in schnell.encode(["a red cube"]) and schnell.unconditional(1).keys() == condition.keys() - {
        "guidance"
    }
    assert schnell.predict(network, x, t, schnell.encode(["a red cube"])).x0.shape == x.shape
    with pytest.raises(ValueError, match="embedded_guidance is 4, which this network does not read"):
        Flux.from_folder(tmp_path / "schnell", embedded_guidance=4.0)


def test_sd35s_network_is_of_the_family(tmp_path: Path) -> None:
    save_tiny_teacher("sd3", SD35_MEDIUM, tmp_path)
    family, network = Sd3.from_folder(tmp_path, size=(32, 48))
    assert network.config.qk_norm == "rms_norm" and network.transformer_blocks[0].use_dual_attention
    x, t = torch.randn(2, *family.latent_shape()), torch.tensor([0.2, 0.9])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = family.predict(network, x, t, family.encode(["a", "b"]), taps=("mid",))
    assert found.x0.shape == x.shape and found.features["mid"].shape == (2, 16, 6, 4)


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3-medium-amd-4step", "flux-dev-amd-4step"])
def test_dmd2_with_its_gan_trains_all_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAPFROG_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")
    nothing = [f"{key}=null" for key in ("adapters", "advantage", "adaptation", "sharpening")]
    changes = ["iterations=2", "log_every=1", "preview_every=9", "heldout_rewards=[]", "data.pictures=data"]
    gan = ["gan={}", "fake_per_student=1", f"output={tmp_path}/out"]
    assert main([str(RECIPES / f"{name}.yaml"), "--shrink", "--quiet", *nothing, *changes, *gan]) == 0
    log = (tmp_path / f"runs/{name}-shrunk/log.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in log]
    keys = ("student/loss", "fake/loss", "discriminator/loss")
    assert all(math.isfinite(line[key]) and line[key] > 0 for line in lines for key in keys)
    assert all(line["student/grad_norm"] > 0 for line in lines)
