"""Every production family in every form that it has: what the card says to type runs, and gives the student."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanTransformer3DModel

from distill.bundle import Manifest, Sampler, write_manifest
from distill.export.publish import COMPONENT, PublishError, publish
from distill.families.load import FAMILIES
from distill.families.published import USUAL
from distill.sampling import student_table
from distill.shrink import SIDE, save_tiny_teacher


def silent(line: str) -> None:
    """A publication's progress, unread."""


def student(name: str, folder: Path, manifest: Manifest) -> Path:
    """A bundle as a distillation writes it, with its teacher beside it: the teacher, queries changed by rank one."""
    save_tiny_teacher(name, USUAL[name], folder / "teacher")
    shape: dict[str, Any] = {} if name == "sit" else {"size": (SIDE, SIDE)}
    frames = {"frames": 5} if name == "wan" else {}
    family, network = FAMILIES[name].from_folder(folder / "teacher", **shape, **frames)
    generator = torch.Generator().manual_seed(0)
    for module in (m for key, m in network.named_modules() if key.endswith("to_q")):
        out, into = module.weight.shape
        change = torch.randn(out, 1, generator=generator) @ torch.randn(1, into, generator=generator)
        module.weight.data += 2 * module.weight.std() * change
    family.save(network, folder / "student")
    table = student_table(family.schedule, family.prediction, family.schedule.grid(4))
    update: dict[str, Any] = {
        "name": "student", "samplers": {4: Sampler.of(table)}, "default_steps": 4, "max_tokens": None, "examples": (),
        "provenance": {"recipe": {"teacher": str(folder / "teacher"), "name": "student", **frames}},
        **family.describe(),
    }  # fmt: skip
    return write_manifest(folder / "student", manifest.model_copy(update=update)).path


def typed(folder: Path) -> dict[str, Any]:
    """Run what the card says to type, with the folder in the place of PATH and a small picture wanted."""
    usage = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's and diffusers' own
        exec(usage.replace("PATH", str(folder)), scope)
    return scope


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "sit", "wan"])
def test_usage_on_the_card_runs(name: str, tmp_path: Path, manifest: Manifest) -> None:
    bundle = student(name, tmp_path, manifest)
    publish(bundle, "diffusers", tmp_path / "out", say=silent)
    scope = typed(tmp_path / "out")
    assert np.isfinite(np.asarray(scope["result"])).all()
    scheduler = scope["scheduler"] if name == "sit" else scope["pipe"].scheduler
    assert len(scheduler.timesteps) == 4


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan"])
def test_usage_of_a_lora_gives_the_student(name: str, tmp_path: Path, manifest: Manifest) -> None:
    bundle = student(name, tmp_path, manifest)
    publish(bundle, "lora", tmp_path / "out", rank=1, say=silent)
    scope = typed(tmp_path / "out")
    assert_fused_is(scope["pipe"], bundle, COMPONENT[name])


def assert_fused_is(pipe: Any, bundle: Path, part: str) -> None:
    """A pipeline's network with its LoRA has the queries of the student."""
    ours = getattr(DiffusionPipeline.from_pretrained(bundle), part).state_dict()
    pipe.fuse_lora()
    found = {k.replace(".base_layer", ""): v for k, v in getattr(pipe, part).state_dict().items()}
    for key in (key for key in ours if key.endswith("to_q.weight")):
        torch.testing.assert_close(found[key].float(), ours[key].float(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_diffusers_reads_comfyuis_lora_and_gives_the_student(name: str, tmp_path: Path, manifest: Manifest) -> None:
    """SDXL's is read in test_lora.py."""
    bundle = student(name, tmp_path, manifest)
    publish(bundle, "comfyui", tmp_path / "out", rank=1, say=silent)
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's and diffusers' own
        pipe.load_lora_weights(tmp_path / "out/loras", weight_name="student.safetensors")
    assert_fused_is(pipe, bundle, COMPONENT[name])


def test_a_students_own_guidance_and_times_are_typed(tmp_path: Path, manifest: Manifest) -> None:
    bundle = student("flux", tmp_path, manifest)
    publish(bundle, "diffusers", tmp_path / "out", say=silent)
    assert "sigmas=[1.0, 0.75, 0.5, 0.25], guidance_scale=3.5" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(PublishError, match="the weights of flux have no names of ComfyUI's here; use --to diffusers"):
        publish(bundle, "comfyui", tmp_path / "comfyui", say=silent)


def test_wan_is_one_transformer_for_comfyui(tmp_path: Path, manifest: Manifest) -> None:
    bundle = student("wan", tmp_path, manifest)
    publish(bundle, "comfyui", tmp_path / "out", say=silent)
    again: Any = WanTransformer3DModel.from_single_file(
        str(tmp_path / "out/diffusion_models/student.safetensors"), config=str(bundle), subfolder="transformer"
    )
    own: Any = WanTransformer3DModel.from_pretrained(bundle / "transformer")
    theirs = again.state_dict()
    assert all(torch.equal(theirs[name].float(), value.float()) for name, value in own.state_dict().items())
