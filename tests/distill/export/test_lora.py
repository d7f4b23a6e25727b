"""LoRA from a difference of weights: exact where the difference is one, honest where it is not, loaded by diffusers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel, WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from distill.bundle import Bundle
from distill.export.lora import EXACT_SIDE, comfyui_state, extract, factorise, merge
from distill.export.publish import PublishError, publish


def networks(student: Bundle, teacher: Path) -> tuple[Any, Any]:
    folders = (student.path / "unet", teacher / "unet")
    loaded: list[Any] = [UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32) for folder in folders]
    return loaded[0].eval(), loaded[1].eval()


def output(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.full((2, 6), 64.0)}
    with torch.no_grad():
        return unet(
            torch.randn(2, 4, 16, 16, generator=generator),
            torch.tensor([999, 499]),
            torch.randn(2, 16, 64, generator=generator),
            added_cond_kwargs=added,
        ).sample


# --- factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40), (12, 20, 3, 3), (40, 24, 1, 1)])
def test_a_difference_of_low_rank_is_found_exactly(shape: tuple[int, ...]) -> None:
    delta = (torch.randn(shape[0], 5) @ torch.randn(5, torch.Size(shape[1:]).numel())).reshape(shape)
    factors = factorise(delta, 5)
    assert factors.rank == 5 and factors.down.shape == (5, *shape[1:])
    assert factors.up.shape == ((shape[0], 5) if len(shape) == 2 else (shape[0], 5, 1, 1))
    torch.testing.assert_close(factors.product().reshape(shape), delta, rtol=1e-4, atol=1e-4)
    worse = float((factorise(delta, 4).product().reshape(shape) - delta).pow(2).sum())
    assert worse == pytest.approx(float(torch.linalg.svdvals(delta.flatten(1))[4] ** 2), rel=1e-3)


def test_large_matrices_are_factorised_as_well() -> None:
    side = 2 * EXACT_SIDE
    signal = torch.randn(side, 4) @ torch.randn(4, side)
    found = factorise(signal + 0.01 * torch.randn(side, side), 4).product()
    assert float((found - signal).norm() / signal.norm()) < 0.02


def test_both_factors_are_of_one_size() -> None:
    factors = factorise(1e-4 * torch.randn(30, 30), 8)
    assert float(factors.up.norm()) == pytest.approx(float(factors.down.norm()), rel=1e-4)


def test_a_student_of_low_rank_is_its_teacher_and_the_factors(low_rank_student: Bundle, tiny_sources: Path) -> None:
    student, teacher = networks(low_rank_student, tiny_sources)
    factors, fidelity = extract(student, teacher, 3)
    assert fidelity.captured > 0.999999 and fidelity.left_behind == 0 and fidelity.layers == len(factors) > 10
    changed = output(student)
    assert float((changed - output(teacher)).abs().max()) > 0.1
    torch.testing.assert_close(output(merge(teacher, factors)), changed, rtol=0, atol=1e-4)


def test_what_has_no_factors_is_counted(full_student: Bundle, tiny_sources: Path) -> None:
    student, teacher = networks(full_student, tiny_sources)
    captured = []
    for rank in (2, 8, 4096):
        factors, fidelity = extract(student, teacher, rank)
        captured.append(fidelity.captured)
        assert 0 < fidelity.left_behind < 0.1
        left = [n for n, m in student.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
        assert left and not set(left) & set(factors)
    assert captured[0] < captured[1] < captured[2] == pytest.approx(1 - fidelity.left_behind, abs=1e-6)


def test_networks_that_do_not_belong_together_are_refused(tiny_sources: Path) -> None:
    unet: Any = UNet2DConditionModel.from_pretrained(tiny_sources / "unet")
    with pytest.raises(ValueError, match="student and teacher have the same weights"):
        extract(unet, unet, 4)
    with pytest.raises(ValueError, match=r"the teacher has no weight of shape \(3, 4\); give the student's own"):
        extract(nn.Linear(4, 3), nn.Linear(4, 5), 4)


# --- files ---------------------------------------------------------------------------------------------------------


def loaded_with(folder: Path, teacher: Path, **options: Any) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's and diffusers' own deprecations
        pipeline.load_lora_weights(folder, **options)
    return pipeline.unet.eval()


def test_diffusers_loads_its_lora(low_rank_student: Bundle, tiny_sources: Path, tmp_path: Path) -> None:
    written = publish(low_rank_student.path, "lora", tmp_path / "out", rank=3, say=lambda line: None)
    names = [path.relative_to(tmp_path / "out").as_posix() for path in written]
    assert names == ["README.md", "pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json"]
    student, teacher = networks(low_rank_student, tiny_sources)
    found = output(loaded_with(tmp_path / "out", tiny_sources))
    gap = float((output(teacher) - output(student)).norm())
    assert float((found - output(student)).norm()) < 0.01 * gap


def test_diffusers_loads_the_lora_of_a_fully_trained_student(
    full_student: Bundle, tiny_sources: Path, tmp_path: Path
) -> None:
    publish(full_student.path, "lora", tmp_path / "out", rank=8, say=lambda line: None)
    student, teacher = networks(full_student, tiny_sources)
    factors, _ = extract(student, teacher, 8)
    expected = output(merge(teacher, factors))
    found = output(loaded_with(tmp_path / "out", tiny_sources))
    assert float((found - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.parametrize("kind", ["low_rank_student", "full_student"])
def test_diffusers_loads_comfyuis_names(
    kind: str, tiny_sources: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(kind)
    publish(bundle.path, "comfyui", tmp_path / "out", rank=8, say=lambda line: None)
    file = tmp_path / "out/loras/tiny-sdxl.safetensors"
    state = load_file(file)
    assert all(name.startswith("lora_unet_") for name in state)
    block = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {f"{block}.lora_down.weight", f"{block}.lora_up.weight", f"{block}.alpha"} <= state.keys()
    student, teacher = networks(bundle, tiny_sources)
    factors, _ = extract(student, teacher, 8)
    expected = output(merge(teacher, factors))
    found = output(loaded_with(file.parent, tiny_sources, weight_name=file.name))
    assert float((found - expected).norm() / expected.norm()) < 2e-3


def test_the_file_says_how_faithful_it_is(full_student: Bundle, tmp_path: Path) -> None:
    told: list[str] = []
    publish(full_student.path, "lora", tmp_path / "out", rank=2, say=told.append)
    with safe_open(tmp_path / "out/pytorch_lora_weights.safetensors", "pt") as file:
        fidelity = json.loads(file.metadata()["leapfrog_fidelity"])
    assert fidelity["rank"] == 2 and 0.05 < fidelity["captured"] < 0.9 and 0.05 < fidelity["remaining"] < 1.2
    assert f"{fidelity['captured']:.1%} of what the student changed" in told[0]
    card = (tmp_path / "out/README.md").read_text()
    assert f"{fidelity['remaining']:.4g}" in card and "those of the student itself, not of this LoRA" in card


def test_a_teacher_that_is_not_there_is_told(low_rank_student: Bundle, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"the teacher cannot be loaded .*add --teacher with its folder"):
        publish(low_rank_student.path, "lora", tmp_path / "out", teacher="nobody/nothing", say=lambda line: None)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))


def test_wan_has_the_originals_names() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, student = (
            WanTransformer3DModel(
                num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
                freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
            )
            for _ in range(2)
        )  # fmt: skip
    factors, _ = extract(student, teacher, 4)
    blocks = {name: found for name, found in factors.items() if name.startswith("blocks.")}
    state = comfyui_state(blocks, "wan")
    assert "diffusion_model.blocks.1.cross_attn.o.lora_A.weight" in state
    back = WanLoraLoaderMixin.lora_state_dict(dict(state))
    for name, found in blocks.items():
        product = back[f"transformer.{name}.lora_B.weight"].float() @ back[f"transformer.{name}.lora_A.weight"].float()
        torch.testing.assert_close(product, found.product(), rtol=0, atol=2e-3)
    assert len(back) == 2 * len(blocks)
