"""Every family against diffusers' own pipeline and scheduler: same seed, same prompt, same picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
)
from diffusers.pipelines.dit import pipeline_dit
from torch import Tensor

from distill.families.flux import pack
from distill.families.load import FAMILIES
from distill.families.published import SIT_XL_2
from distill.families.schedulers import flow
from distill.families.sit import Sit
from distill.families.wan import NEGATIVE_PROMPT
from distill.sampling import noise, ode_table, student_table
from distill.shrink import save_tiny_teacher
from distill.tasks.diffusion import sample

PROMPTS = ["a small red metal sphere", "something that is no caption at all!"]
SEEDS = [4, 9]
Folder = Callable[[str], Path]


class Uniform(FlowMatchEulerDiscreteScheduler):
    """diffusers' Euler steps on the uniform grid 1, 1 − 1/n, …, which pipelines leave to the scheduler."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(sigmas=[1 - i / num_inference_steps for i in range(num_inference_steps)], device=device)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """What DiTPipeline asks of every scheduler."""
        return sample


def latents(family: Any) -> Tensor:
    return torch.stack([torch.from_numpy(noise(seed, 0, family.latent_shape())[0]) for seed in SEEDS])


@torch.no_grad()
def ours(family: Any, network: Any, prompts: list[Any], steps: int, scale: float) -> Tensor:
    """Pictures or videos in [0, 1] by the teacher's sampler."""
    table = ode_table(family.schedule, family.prediction, steps)
    x = sample(family, network, table, family.encode(prompts), SEEDS, scale)
    return (family.decode(x) / 2 + 0.5).clamp(0, 1)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and float(expected.std()) > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("name", "kind"), [("sdxl", StableDiffusionXLPipeline), ("sd15", StableDiffusionPipeline)])
def test_teachers_of_discrete_time_paint_what_diffusers_paints(name: str, kind: Any, tiny_teacher: Folder) -> None:
    family, network = FAMILIES[name].from_folder(tiny_teacher(name), size=(48, 32))
    pipeline = quiet(kind.from_pretrained(tiny_teacher(name)))
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    expected = pipeline(
        PROMPTS, width=48, height=32, latents=latents(family), num_inference_steps=3, guidance_scale=3.0,
        output_type="pt",
    ).images  # fmt: skip
    close(ours(family, network.eval(), PROMPTS, 3, 3.0), expected)


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), [("sdxl", StableDiffusionXLPipeline), ("sd15", StableDiffusionPipeline)])
def test_a_saved_student_of_one_step_paints_the_same_in_diffusers(
    name: str, kind: Any, tiny_teacher: Folder, tmp_path: Path
) -> None:
    family, network = FAMILIES[name].from_folder(tiny_teacher(name))
    family.save(network.eval(), tmp_path)
    pipeline = quiet(kind.from_pretrained(tmp_path))
    assert type(pipeline.scheduler) is LCMScheduler
    x = latents(family)
    expected = pipeline(PROMPTS, latents=x, num_inference_steps=1, guidance_scale=0.0, output_type="pt").images
    table = student_table(family.schedule, family.prediction, family.schedule.grid(1))
    found = family.decode(sample(family, network, table, family.encode(PROMPTS), SEEDS))
    close((found / 2 + 0.5).clamp(0, 1), expected)


def test_sd3_paints_what_diffusers_paints(tiny_teacher: Folder) -> None:
    family, network = FAMILIES["sd3"].from_folder(tiny_teacher("sd3"), size=(48, 32))
    pipeline = quiet(StableDiffusion3Pipeline.from_pretrained(tiny_teacher("sd3")))
    pipeline.scheduler = Uniform.from_config(pipeline.scheduler.config, stochastic_sampling=False)
    expected = pipeline(
        PROMPTS, width=48, height=32, latents=latents(family), num_inference_steps=4, guidance_scale=3.0,
        output_type="pt",
    ).images  # fmt: skip
    assert pipeline.scheduler.sigmas[:4].tolist() == pytest.approx([1, 0.9, 0.75, 0.5], abs=1e-4)
    close(ours(family, network.eval(), PROMPTS, 4, 3.0), expected)


@pytest.mark.parametrize("true_guidance", [1.0, 3.0])
def test_flux_paints_what_diffusers_paints(true_guidance: float, tiny_teacher: Folder) -> None:
    family, network = FAMILIES["flux"].from_folder(tiny_teacher("flux"), size=(48, 32), embedded_guidance=2.5)
    pipeline = quiet(FluxPipeline.from_pretrained(tiny_teacher("flux")))
    dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**dynamic)
    family.schedule = flow({"_class_name": "FlowMatchEulerDiscreteScheduler", **dynamic}, "here", tokens=4 * 6)
    expected = pipeline(
        PROMPTS, negative_prompt=[""] * 2, width=48, height=32, latents=pack(latents(family)), num_inference_steps=4,
        guidance_scale=2.5, true_cfg_scale=true_guidance, output_type="pt",
    ).images  # fmt: skip
    assert pipeline.scheduler.sigmas[:4].tolist() == pytest.approx(family.schedule.grid(4).tolist(), abs=1e-4)
    close(ours(family, network.eval(), PROMPTS, 4, true_guidance), expected)


def test_wan_films_what_diffusers_films(tiny_teacher: Folder) -> None:
    family, network = FAMILIES["wan"].from_folder(tiny_teacher("wan"), size=(48, 32), frames=5, shift=5.0)
    pipeline = quiet(WanPipeline.from_pretrained(tiny_teacher("wan")))
    pipeline.scheduler = Uniform(shift=5.0)
    expected = pipeline(
        PROMPTS, [NEGATIVE_PROMPT] * 2, width=48, height=32, num_frames=5, latents=latents(family),
        num_inference_steps=4, guidance_scale=5.0, output_type="pt",
    ).frames  # fmt: skip
    assert pipeline.scheduler.sigmas[:4].tolist() == pytest.approx([1, 0.9375, 0.8333, 0.625], abs=1e-4)
    close(ours(family, network.eval(), PROMPTS, 4, 5.0).transpose(1, 2), expected)


@pytest.mark.parametrize("kind", ["flow", "epsilon"])
def test_class_conditional_teachers_paint_what_diffusers_paints(
    kind: str, tiny_teacher: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_teacher("sit")
    if kind == "epsilon":  # DiT-XL/2's scheduler
        scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
        folder = tmp_path / "dit"
        save_tiny_teacher("sit", {**SIT_XL_2, "scheduler": {**scheduler, "num_train_timesteps": 1000}}, folder)
    family, network = Sit.from_folder(folder)
    assert family.prediction == kind
    pipeline = quiet(DiTPipeline.from_pretrained(folder))
    pipeline.scheduler = (
        Uniform()
        if kind == "flow"
        else DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    )
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *shape, **options: latents(family))  # its own noise
    expected = pipeline([7, 999], guidance_scale=4.0, num_inference_steps=3, output_type="pt").images
    close(ours(family, network.eval(), [7, 999], 3, 4.0), expected)


def test_prompts_are_encoded_as_wans_pipeline_does(tiny_teacher: Folder) -> None:
    family, _ = FAMILIES["wan"].from_folder(tiny_teacher("wan"))
    pipeline = WanPipeline.from_pretrained(tiny_teacher("wan"), text_encoder=family.text_encoder)
    prompts = ["  a  cat &amp; a\ndog ", "x" * 700]
    embeds, negative = pipeline.encode_prompt(prompts, [NEGATIVE_PROMPT] * 2, max_sequence_length=512)
    found, empty = family.encode(prompts)["prompt_embeds"], family.unconditional(2)["prompt_embeds"]
    torch.testing.assert_close(found, embeds.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(empty, negative.float(), rtol=0, atol=1e-5)
    assert not found[0, 20:].any() and bool(found[1, -1].any())
    other = family.encode([""])["prompt_embeds"]
    assert not torch.allclose(empty[:1], other, atol=1e-2)
