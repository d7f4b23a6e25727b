"""What goes wrong silently when a family is written in a hurry: inputs without a prompt, constants, precision, time."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import UMT5EncoderModel

from distill.families.load import FAMILIES
from distill.families.parts import Remembered, without_float16
from distill.families.sd15 import Sd15
from distill.families.sdxl import Sdxl
from distill.families.wan import NEGATIVE_PROMPT, Wan
from distill.objectives.dmd import native
from distill.sampling import Flow
from distill.tasks.diffusion import draw_times

Folder = Callable[[str], Path]


# --- without a prompt ----------------------------------------------------------------------------------------------


def test_each_family_has_its_own_input_without_a_prompt(tiny_teacher: Folder) -> None:
    sdxl, sd15, sd3, flux, sit, wan = (
        FAMILIES[name].from_folder(tiny_teacher(name))[0] for name in ("sdxl", "sd15", "sd3", "flux", "sit", "wan")
    )
    assert not any(value.any() for value in sdxl.unconditional(2).values())
    empty = sd15.unconditional(2)["prompt_embeds"]
    assert torch.equal(empty[1:], sd15.encode([""])["prompt_embeds"]) and bool(empty.any())
    assert sit.unconditional(2)["labels"].tolist() == [1000, 1000]
    negative = wan.unconditional(2)["prompt_embeds"]
    assert torch.equal(negative[:1], wan.encode([NEGATIVE_PROMPT])["prompt_embeds"])
    for family in (sd3, flux):
        nothing = family.unconditional(2)
        assert all(torch.equal(nothing[key][1:], value) for key, value in family.encode([""]).items())
        assert bool(nothing["prompt_embeds"][:, -1].any())  # T5's padding is not zero
    for family in (sdxl, sd15, sd3, flux, sit, wan):
        shapes = {name: (value.shape, value.dtype) for name, value in family.unconditional(3).items()}
        assert {name: (value.shape, value.dtype) for name, value in family.blank(3).items()} == shapes


def test_an_input_without_a_prompt_is_encoded_once() -> None:
    class Counting:
        device, calls = torch.device("cpu"), 0

        def encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
            self.calls += 1
            return {"prompt_embeds": torch.full((len(prompts), 2, 3), float(len(prompts[0])))}

    family, kept = Counting(), Remembered()
    first, second = kept.rows(family, "abc", 2), kept.rows(family, "abc", 5)
    assert (
        family.calls == 1 and first["prompt_embeds"].shape == (2, 2, 3) and second["prompt_embeds"].shape == (5, 2, 3)
    )
    assert float(second["prompt_embeds"].max()) == 3.0


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_an_input_without_a_prompt_does_not_depend_on_who_asks_first(name: str, tiny_teacher: Folder) -> None:
    """Otherwise a resumed run, whose first caller is another one, would go another way."""
    first, second = (FAMILIES[name].from_folder(tiny_teacher(name))[0] for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = first.unconditional(1)["prompt_embeds"]
    assert torch.equal(inside, second.unconditional(1)["prompt_embeds"])


def test_sdxls_second_encoder_reads_its_own_padding(tiny_teacher: Folder, tmp_path: Path) -> None:
    """Published SDXL pads the second encoder's tokens with "!", the first one's with the end token."""
    folder = shutil.copytree(tiny_teacher("sdxl"), tmp_path / "sdxl")
    path = folder / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "!"}))
    whole = folder / "tokenizer_2" / "tokenizer.json"
    tokens = json.loads(whole.read_text())
    tokens["padding"] = {**tokens["padding"], "pad_id": tokens["model"]["vocab"]["!"], "pad_token": "!"}
    whole.write_text(json.dumps(tokens))
    same, _ = Sdxl.from_folder(tiny_teacher("sdxl"))
    own, _ = Sdxl.from_folder(folder)
    a, b = (family.encode(["a red cube"])["prompt_embeds"] for family in (same, own))
    half = a.shape[-1] // 2
    assert torch.equal(a[..., :half], b[..., :half])
    assert not torch.allclose(a[..., half:], b[..., half:], atol=1e-3)
    assert torch.equal(a[:, 0, half:], b[:, 0, half:])  # what stands before the padding cannot see it


# --- autoencoders --------------------------------------------------------------------------------------------------


def test_latents_of_videos_are_normalised_per_channel(tiny_teacher: Folder) -> None:
    family, _ = Wan.from_folder(tiny_teacher("wan"), size=(32, 32), frames=5)
    video = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(video)
    assert latents.shape == (1, *family.latent_shape()) == (1, 4, 2, 4, 4)
    with torch.no_grad():
        raw = family.vae.encode(video).latent_dist.mean
    for channel, (mean, std) in enumerate([(-0.5, 1.5), (-0.25, 2.0), (0.25, 2.5), (0.5, 3.0)]):
        torch.testing.assert_close(latents[:, channel], (raw[:, channel] - mean) / std)
    with torch.no_grad():
        torch.testing.assert_close(family.decode(latents), family.vae.decode(raw).sample, rtol=1e-4, atol=1e-4)
    assert family.encode_images(video[:, :, 0]).shape == (1, 4, 1, 4, 4)


def test_autoencoders_never_decode_in_float16(tiny_teacher: Folder) -> None:
    family, _ = Sd15.from_folder(tiny_teacher("sd15"))
    with torch.no_grad():
        family.vae.decoder.conv_in.weight *= 1e6  # activations beyond 65,504, as in SDXL's
    latents = torch.randn(1, *family.latent_shape())
    expected = family.decode(latents)
    with torch.autocast("cpu", dtype=torch.float16):
        half = family.vae.decode(latents / family.vae.config.scaling_factor).sample
        found = family.decode(latents)
    assert not bool(half.isfinite().all()) and bool(found.isfinite().all())
    torch.testing.assert_close(found, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16), without_float16(latents.device):
        assert torch.is_autocast_enabled("cpu")  # bfloat16 has float32's range
    family.vae.half()
    with pytest.raises(ValueError, match="the autoencoder's weights are float16, in which SDXL's overflows"):
        family.decode(latents)


def test_a_text_encoder_in_float16_is_taken_as_float32(tiny_teacher: Folder, tmp_path: Path) -> None:
    assert Wan.from_folder(tiny_teacher("wan"))[0].text_encoder.dtype is torch.bfloat16
    folder = shutil.copytree(tiny_teacher("wan"), tmp_path / "wan")
    UMT5EncoderModel.from_pretrained(folder / "text_encoder").half().save_pretrained(folder / "text_encoder")
    family, _ = Wan.from_folder(folder)
    assert family.text_encoder.dtype is torch.float32
    assert family.encode(["a dog"])["prompt_embeds"].dtype is torch.float32


# --- time and size -------------------------------------------------------------------------------------------------


def test_one_shift_serves_sampler_and_renoising(tiny_teacher: Folder) -> None:
    folder = tiny_teacher("wan")
    assert Wan.from_folder(folder)[0].schedule.shift == 3.0  # the published scheduler's flow_shift
    schedule = Wan.from_folder(folder, shift=5.0)[0].schedule
    assert schedule.grid(4).tolist() == pytest.approx([1, 0.9375, 5 / 6, 0.625])
    t = draw_times(schedule, 200_000, torch.Generator().manual_seed(0), 0.02, 0.98)
    assert 0.02 <= float(t.min()) < 0.03 and 0.979 < float(t.max()) <= 0.98
    # Warping is monotone, so the median of warped times is the warped median of what lies between the bounds.
    middle = float(schedule.unwarp(np.array(0.02)) + schedule.unwarp(np.array(0.98))) / 2
    assert float(t.median()) == pytest.approx(float(schedule.warp(np.array(middle))), abs=2e-3)
    plain = draw_times(Flow(), 5, torch.Generator().manual_seed(1), 0.02, 0.98)
    u = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(plain, 0.02 + u * 0.96)


def test_sizes_that_a_network_cannot_cut_are_refused(tiny_teacher: Folder) -> None:
    wan = Wan.from_folder(tiny_teacher("wan"))[0]
    assert wan.latent_shape((832, 480), 81) == (4, 21, 60, 104)
    with pytest.raises(ValueError, match=r"size has 488; Wan, .* takes multiples of 16 pixels"):
        wan.latent_shape((832, 488))
    with pytest.raises(ValueError, match="frames is 80; use 1 more than a multiple of 4, such as 81"):
        wan.latent_shape((832, 480), 80)
    with pytest.raises(ValueError, match="size has 30; this autoencoder takes multiples of 4 pixels"):
        Sd15.from_folder(tiny_teacher("sd15"))[0].latent_shape((32, 30))


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_rows_do_not_see_each_other_and_every_input_matters(name: str, tiny_teacher: Folder) -> None:
    size = {"wan": {"size": (32, 32), "frames": 5}, "sd15": {}}.get(name, {"size": (48, 32)})
    family, network = FAMILIES[name].from_folder(tiny_teacher(name), **size)
    network.eval()
    x = torch.randn(2, *family.latent_shape(), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.8], dtype=torch.float64) * (1000 if name == "sd15" else 1)
    condition = family.encode(["a red cube", "two green spheres"])
    found = family.predict(network, x, t, condition, taps=("mid",))
    assert found.features["mid"].ndim == 4 and found.x0.shape == x.shape and found.x0.dtype is torch.float32
    for i in range(2):
        row = {key: value[i : i + 1] for key, value in condition.items()}
        alone = family.predict(network, x[i : i + 1], t[i : i + 1], row)
        torch.testing.assert_close(alone.x0[0], found.x0[i], rtol=1e-3, atol=1e-3)
    flipped = {key: value.flip(0) for key, value in condition.items()}
    others = ((x.flip(0), t, condition), (x, t.flip(0), condition), (x, t, flipped))
    assert all(not torch.allclose(native(family, family.predict(network, *o)), native(family, found)) for o in others)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "sit", "wan"])
def test_saved_folders_give_the_same_outputs_up_to_float16(name: str, tiny_teacher: Folder, tmp_path: Path) -> None:
    family, network = FAMILIES[name].from_folder(tiny_teacher(name))
    trained = copy.deepcopy(network).eval()
    for i, parameter in enumerate(trained.parameters()):
        parameter.add_(1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    family.save(trained, tmp_path)
    again, loaded = FAMILIES[name].from_folder(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    state = loaded.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], value.half().float()) for key, value in before.items())
    conditions = [3, 999] if name == "sit" else ["a red cube", ""]
    encoded = again.encode(conditions)
    assert all(torch.equal(encoded[key], value) for key, value in family.encode(conditions).items())
    targets = [key for key, _ in network.named_modules() if key.endswith(family.lora_targets())]
    assert targets and any(isinstance(module, family.wrap_plan()) for module in network.modules())
