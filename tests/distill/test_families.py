"""Families against diffusers: parametrisations, prompts, autoencoder, samplers, and what a saved folder gives back."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor, nn

from distill.config import SdxlSource, SitModel, UnetModel
from distill.families.base import coefficients, preview_matrix
from distill.families.sdxl import Sdxl
from distill.families.sit import Sit
from distill.objectives.dmd import native
from distill.sampling import Flow, ScaledLinear, noise, ode_table, student_table
from distill.tasks.diffusion import draw_times, sample

PROMPTS = ["a small red metal sphere", "", "a large blue cube left of a green cylinder of rubber and something long"]
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def sdxl(tiny_sources: Path) -> tuple[Sdxl, Any]:
    family, network = Sdxl.from_folder(tiny_sources)
    return family, network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sit() -> tuple[Sit, Any]:
    family = Sit(SitModel(family="sit", width=16, layers=2, heads=2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = family.new_network().eval().requires_grad_(False)
        for parameter in network.parameters():  # DiT starts at zero, which would hide a wrong input
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return family, network


@pytest.fixture(params=["sdxl", "sit"])
def case(request: pytest.FixtureRequest) -> tuple[Any, Any, dict[str, Tensor]]:
    """(family, network, condition of three rows)."""
    family, network = request.getfixturevalue(request.param)
    return family, network, family.encode(PROMPTS if request.param == "sdxl" else [3, 0, 9])


def inputs(family: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three noisy latents and three different times."""
    x_t = torch.randn(3, *family.latent_shape(), generator=torch.Generator().manual_seed(seed))
    return x_t, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64) * (1 if family.name == "sit" else 1000)


# --- predict -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_parametrisations_of_a_prediction_agree(case: tuple[Any, Any, dict[str, Tensor]]) -> None:
    family, network, condition = case
    x_t, t = inputs(family)
    found = family.predict(network, x_t, t, condition)
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in coefficients(family.schedule, t))
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x_t.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alpha * found.eps - sigma * found.x0, found.v.double(), rtol=1e-4, atol=1e-4)
    for value in (found.x0, found.eps, found.v):
        assert value.dtype == torch.float32 and value.shape == x_t.shape
    if family.name == "sdxl":
        added = {"text_embeds": condition["pooled"], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 3)}
        raw = network(x_t, t, encoder_hidden_states=condition["prompt_embeds"], added_cond_kwargs=added).sample
    else:
        raw = network(x_t, timestep=1000 * t.float(), class_labels=torch.tensor([3, 0, 9])).sample
    torch.testing.assert_close(native(family, found), raw, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_of_a_prediction_do_not_see_each_other(case: tuple[Any, Any, dict[str, Tensor]]) -> None:
    family, network, condition = case
    x_t, t = inputs(family)
    together = family.predict(network, x_t, t, condition).x0
    for i in range(3):
        row = {name: value[i : i + 1] for name, value in condition.items()}
        alone = family.predict(network, x_t[i : i + 1], t[i : i + 1], row).x0
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_input_of_a_prediction_matters(case: tuple[Any, Any, dict[str, Tensor]]) -> None:
    family, network, condition = case
    x_t, t = inputs(family)
    base = native(family, family.predict(network, x_t, t, condition))
    empty = family.unconditional(3)
    for other in (
        family.predict(network, x_t.flip(0), t, condition),
        family.predict(network, x_t, t.flip(0), condition),
        *(family.predict(network, x_t, t, condition | {name: empty[name]}) for name in condition),
    ):
        assert not torch.allclose(native(family, other), base, atol=1e-4)


def test_taps_give_the_features_on_the_way_and_change_nothing(case: tuple[Any, Any, dict[str, Tensor]]) -> None:
    family, network, condition = case
    x_t, t = inputs(family)
    plain = family.predict(network, x_t, t, condition)
    seen: list[Tensor] = []
    middle = network.mid_block if family.name == "sdxl" else network.transformer_blocks[1]
    with middle.register_forward_hook(lambda module, given, output: seen.append(output)):
        found = family.predict(network, x_t.requires_grad_(), t, condition, taps=("mid",))
    assert plain.features == {} and torch.equal(found.x0, plain.x0)
    features = found.features["mid"]
    shape = (3, 48, 8, 8) if family.name == "sdxl" else (3, 16, 4, 4)
    assert features.shape == shape
    if family.name == "sit":  # tokens run along rows of the picture
        assert torch.equal(features[:, :, 1, 2], seen[0][:, 6])
    else:
        assert torch.equal(features, seen[0])
    (gradient,) = torch.autograd.grad(features.sum(), x_t)
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())
    assert not middle._forward_hooks
    with pytest.raises(ValueError, match="there is no tap 'top'; this network offers mid"):
        family.predict(network, x_t, t, condition, taps=("mid", "top"))


# --- conditions ----------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_as_diffusers_does(sdxl: tuple[Sdxl, Any], tiny_sources: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_sources)
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, device="cpu")
    found, empty = sdxl[0].encode(PROMPTS), sdxl[0].unconditional(3)
    torch.testing.assert_close(found["prompt_embeds"], embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled"], pooled, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(embeds[0], embeds[1], atol=1e-2)
    assert torch.equal(empty["prompt_embeds"], negative) and torch.equal(empty["pooled"], negative_pooled)
    assert not empty["prompt_embeds"].any() and not empty["pooled"].any()


def test_the_unconditional_label_is_ten() -> None:
    assert Sit().unconditional(2)["labels"].tolist() == [10, 10]
    assert Sit().encode([0, 9])["labels"].tolist() == [0, 9]
    assert Sit().encode([0, 9])["labels"].dtype == torch.int64
    for labels in ([0, 10], [-1, 3]):
        with pytest.raises(ValueError, match="use 0 to 9"):
            Sit().encode(labels)


def test_the_network_drops_no_labels_by_itself(sit: tuple[Sit, Any]) -> None:
    family, network = sit
    training = copy.deepcopy(network).train()
    x_t = torch.zeros(64, 1, 8, 8)
    found = family.predict(training, x_t, torch.full((64,), 0.5), family.encode([7] * 64)).x0
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=1e-4, atol=1e-5)


# --- autoencoder ---------------------------------------------------------------------------------------------------


def test_latents_are_scaled_on_the_way_in_and_back_on_the_way_out(sdxl: tuple[Sdxl, Any]) -> None:
    family, _ = sdxl
    vae = family.vae
    assert vae.config.scaling_factor == 0.5
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(images)
    assert latents.shape == (2, *family.latent_shape()) == (2, 4, 16, 16)
    mean = vae.encode(images).latent_dist.mean
    torch.testing.assert_close(latents, 0.5 * mean)
    torch.testing.assert_close(family.decode(latents), vae.decode(mean).sample, rtol=1e-4, atol=1e-5)


def test_latent_shapes_follow_the_size(sdxl: tuple[Sdxl, Any]) -> None:
    assert sdxl[0].latent_shape((96, 64)) == (4, 16, 24)
    assert Sit().latent_shape() == Sit().latent_shape((8, 8)) == (1, 8, 8)
    with pytest.raises(ValueError, match="this network takes 8 × 8 alone"):
        Sit().latent_shape((16, 16))


def test_digits_are_their_own_latents() -> None:
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(Sit().decode(x), x.expand(2, 3, 8, 8))
    assert Sit().describe()["preview"] == ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))


def test_preview_finds_the_linear_map_from_latents_to_colours() -> None:
    latents = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    matrix = torch.tensor([[0.5, -0.25, 0.0], [0.125, 1.0, 0.75], [0.1, 0.2, -0.3]])
    colours = torch.einsum("bchw,cr->brhw", torch.cat((latents, torch.ones(4, 1, 8, 8)), 1), matrix)
    images = colours.repeat_interleave(4, 2).repeat_interleave(4, 3)
    np.testing.assert_allclose(preview_matrix(latents, images), matrix, atol=1e-5)


# --- networks and folders ------------------------------------------------------------------------------------------


def test_saved_folders_give_the_same_outputs_up_to_float16(
    case: tuple[Any, Any, dict[str, Tensor]], tmp_path: Path
) -> None:
    family, network, condition = case
    trained = copy.deepcopy(network)
    with torch.no_grad():
        for i, parameter in enumerate(trained.parameters()):
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    family.save(trained, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())

    again, loaded = type(family).from_folder(tmp_path)
    state = loaded.state_dict()
    assert state.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(state[name], value.half().float()), name
    x_t, t = inputs(family)
    with torch.no_grad():
        expected = native(family, family.predict(trained, x_t, t, condition))
        found = native(again, again.predict(loaded.eval(), x_t, t, condition))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    if family.name == "sdxl":
        encoded = again.encode(PROMPTS)
        assert all(torch.equal(encoded[name], condition[name]) for name in condition)
        assert all(torch.equal(a, b) for a, b in zip(again.vae.parameters(), family.vae.parameters(), strict=True))


def test_a_saved_folder_is_a_pipeline_of_diffusers_with_the_students_steps(
    sdxl: tuple[Sdxl, Any], tmp_path: Path
) -> None:
    family, network = sdxl
    family.save(network, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline.scheduler) is LCMScheduler
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == family.schedule.grid(4).tolist()
    assert pipeline.config.force_zeros_for_empty_prompt


def fresh(tiny_sources: Path, **options: Any) -> Sdxl:
    source = SdxlSource(
        family="sdxl", vae=str(tiny_sources / "vae"), text_encoder=str(tiny_sources / "text_encoder"),
        text_encoder_2=str(tiny_sources / "text_encoder_2"), unet=UnetModel(block_out_channels=(16, 32), head_dim=8),
        **options,
    )  # fmt: skip
    return Sdxl.from_source(source)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_a_family_that_learns_from_pure_noise_survives_its_folder(
    tiny_sources: Path, tmp_path: Path, prediction: str
) -> None:
    family = fresh(tiny_sources, prediction=prediction, zero_terminal_snr=True)
    network = family.new_network().eval()
    family.save(network, tmp_path)
    again, _ = Sdxl.from_folder(tmp_path)
    assert (again.prediction, again.schedule) == (prediction, ScaledLinear(zero_terminal=True))
    x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([999.0, 999.0])
    with torch.no_grad():
        found = again.predict(network, x_t, t, again.encode(PROMPTS[:2]))
    assert bool(found.x0.isfinite().all()) and torch.equal(found.x0, -found.v)
    torch.testing.assert_close(found.eps, x_t)


def test_a_scheduler_of_another_kind_is_refused(tiny_sources: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sources, tmp_path / "other")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"score"'))
    with pytest.raises(ValueError, match=r"prediction_type 'score'.*epsilon, sample or v_prediction"):
        Sdxl.from_folder(folder)


def test_a_fresh_network_fits_its_parts(tiny_sources: Path) -> None:
    family = fresh(tiny_sources)
    network = family.new_network()
    assert family.predict(network, *inputs(family), family.encode(PROMPTS)).x0.shape == (3, 4, 16, 16)
    assert all(isinstance(module, nn.Module) for module in (family.vae, family.text_encoder))
    assert not any(p.requires_grad for m in (family.vae, family.text_encoder_2) for p in m.parameters())
    assert any(isinstance(m, family.wrap_plan()) for m in network.modules())
    names = [name for name, _ in network.named_modules()]
    assert all(any(name.endswith(target) for name in names) for target in family.lora_targets())


def test_loaded_families_have_no_recipe_for_a_fresh_network(sdxl: tuple[Sdxl, Any]) -> None:
    for family in (sdxl[0], Sit()):
        with pytest.raises(ValueError, match="was loaded from a folder"):
            family.new_network()


def test_digits_targets_exist(sit: tuple[Sit, Any]) -> None:
    family, network = sit
    assert isinstance(network, DiTTransformer2DModel)
    assert any(isinstance(m, family.wrap_plan()) for m in network.modules())
    names = [name for name, _ in network.named_modules()]
    assert all(any(name.endswith(target) for name in names) for target in family.lora_targets())


# --- samplers ------------------------------------------------------------------------------------------------------


def raw_output(family: Any, network: Any, x: Tensor, t: float, condition: dict[str, Tensor], scale: float) -> Tensor:
    """The network's output with guidance, as diffusers' pipelines compute it."""
    times, empty = torch.full((len(x),), t, dtype=torch.float64), family.unconditional(len(x))
    cond = native(family, family.predict(network, x, times, condition))
    uncond = native(family, family.predict(network, x, times, empty))
    return uncond + scale * (cond - uncond)


def initial(family: Any, seeds: list[int]) -> Tensor:
    return torch.stack([torch.from_numpy(noise(s, 0, family.latent_shape())[0]) for s in seeds])


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_teacher_sampler_equals_diffusers_ddim(sdxl: tuple[Sdxl, Any], scale: float) -> None:
    family, network = sdxl
    condition, seeds = family.encode(PROMPTS), [4, 0, 9]
    found = sample(family, network, ode_table(family.schedule, "epsilon", 5), condition, seeds, scale)
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(5)
    x = initial(family, seeds)
    for t in scheduler.timesteps:
        x = scheduler.step(raw_output(family, network, x, float(t), condition, scale), t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


@torch.no_grad()
def test_teacher_sampler_equals_diffusers_euler_for_flows(sit: tuple[Sit, Any]) -> None:
    family, network = sit
    condition, seeds = family.encode([1, 2, 3]), [4, 0, 9]
    found = sample(family, network, ode_table(family.schedule, "flow", 6), condition, seeds, 1.5)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - i / 6 for i in range(6)])
    x = initial(family, seeds)
    for t in scheduler.timesteps:
        x = scheduler.step(raw_output(family, network, x, float(t) / 1000, condition, 1.5), t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_student_sampler_predicts_and_noises_as_diffusers_does(sdxl: tuple[Sdxl, Any]) -> None:
    family, network = sdxl
    condition, seeds, times = family.encode(PROMPTS), [4, 0, 9], [999, 749, 499, 249]
    found = sample(family, network, student_table(family.schedule, "epsilon", np.array(times)), condition, seeds)
    scheduler = DDPMScheduler(**BETAS, clip_sample=False)
    draws = torch.stack([torch.from_numpy(noise(s, 0, family.latent_shape(), 4)) for s in seeds])
    x = draws[:, 0]
    for k, t in enumerate(times):
        eps = raw_output(family, network, x, float(t), condition, 1.0)
        alpha = scheduler.alphas_cumprod[t].double()
        x = ((x - (1 - alpha).sqrt() * eps) / alpha.sqrt()).float()
        if k < 3:
            x = scheduler.add_noise(x, draws[:, k + 1], torch.tensor([times[k + 1]] * 3))
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


@torch.no_grad()
def test_a_picture_depends_on_its_own_seed_alone(case: tuple[Any, Any, dict[str, Tensor]]) -> None:
    family, network, condition = case
    table = student_table(family.schedule, family.prediction, family.schedule.grid(2))
    together = sample(family, network, table, condition, [7, 8, 7])
    for i, seed in enumerate((7, 8, 7)):
        row = {name: value[i : i + 1] for name, value in condition.items()}
        alone = sample(family, network, table, row, [seed])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-3 * float(alone.abs().max()))
    same = {name: value[:1].expand(2, *value.shape[1:]) for name, value in condition.items()}
    a, b = sample(family, network, table, same, [7, 8])
    assert not torch.allclose(a, b, atol=1e-2)


def test_times_of_discrete_schedules_are_whole_and_inclusive() -> None:
    rng = torch.Generator().manual_seed(0)
    full, cut = draw_times(ScaledLinear(), 100_000, rng), draw_times(ScaledLinear(), 100_000, rng, 0.02, 0.98)
    assert (full.min(), full.max()) == (0, 999) and (cut.min(), cut.max()) == (20, 980)
    assert torch.equal(cut, cut.round()) and full.dtype == torch.float64
    assert full.mean().item() == pytest.approx(499.5, abs=4)


def test_times_of_flows_are_uniform_fractions() -> None:
    rng = torch.Generator().manual_seed(0)
    cut = draw_times(Flow(), 100_000, rng, 0.02, 0.98)
    assert 0.02 <= float(cut.min()) < 0.021 and 0.979 < float(cut.max()) < 0.98
    assert cut.mean().item() == pytest.approx(0.5, abs=0.005)
