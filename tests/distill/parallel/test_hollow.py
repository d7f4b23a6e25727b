"""Networks without weights: made from their config, autoencoders read as ever, nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import Tensor

from distill.config import load_recipe
from distill.families.sdxl import Sdxl
from distill.families.sit import Sit
from distill.parallel.hollow import hollow
from distill.parallel.shard import full
from distill.shrink import shrunk
from distill.tasks.distillation import DistillationTask
from distill.trainer import Trainer

ROOT = Path(__file__).parents[3]


def test_a_hollow_network_is_the_network_without_its_weights(models: Path) -> None:
    before = ModelMixin.__dict__["from_pretrained"]
    with hollow(True):
        _, bare = Sit.from_folder(models / "digits-teacher")
    _, network = Sit.from_folder(models / "digits-teacher")
    assert ModelMixin.__dict__["from_pretrained"] is before
    assert all(t.is_meta for t in (*bare.parameters(), *bare.buffers()))
    assert {n: (t.shape, t.dtype) for n, t in bare.named_parameters()} == {
        n: (t.shape, t.dtype) for n, t in network.named_parameters()
    }
    assert dict(bare.named_buffers()).keys() == dict(network.named_buffers()).keys()
    assert not bare.training and not network.training


def test_what_every_rank_needs_whole_is_read(tiny_sources: Path) -> None:
    with hollow(True):
        family, bare = Sdxl.from_folder(tiny_sources)
    assert all(p.is_meta for p in bare.parameters())
    assert not any(p.is_meta for p in (*family.vae.parameters(), *family.text_encoder.parameters()))
    images = family.decode(torch.zeros(1, *family.latent_shape()))
    assert images.shape[1] == 3 and bool(images.isfinite().all())


def test_it_is_off_for_the_first_rank(models: Path) -> None:
    with hollow(False):
        _, network = Sit.from_folder(models / "digits-teacher")
    assert not any(p.is_meta for p in network.parameters())


@pytest.mark.parametrize("name", ["sdxl-amd-4step", "sdxl-dmd2-4step"])
def test_the_first_rank_alone_reads_the_networks_weights(ranks: Any, tmp_path: Path, name: str) -> None:
    """The second one has a teacher's folder without them, and starts from the first one's values all the same.

    DMD2's GAN has a head that is made to measure.
    """
    shrunk(load_recipe(ROOT / f"recipes/{name}.yaml"), tmp_path / "inputs")
    (one, head), (two, other) = ranks(2, started, name, str(tmp_path))
    assert head.keys() == other.keys() and all(torch.equal(head[name], other[name]) for name in head)
    assert bool(head) == ("dmd2" in name)
    stored = load_file(tmp_path / "inputs/teacher/unet/diffusion_pytorch_model.safetensors")
    for weights in (one, two):
        assert weights.keys() == stored.keys()
        assert all(torch.equal(weights[name], value.float()) for name, value in stored.items())


def started(name: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of student and discriminator at the start of a run in shards."""
    recipe = shrunk(load_recipe(ROOT / f"recipes/{name}.yaml"), Path(folder) / "inputs")
    if dist.get_rank():
        shutil.copytree(recipe.teacher, f"{folder}/bare", ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
        shutil.copytree(f"{recipe.teacher}/vae", f"{folder}/bare/vae", dirs_exist_ok=True)
        assert not list(Path(folder).glob("bare/unet/*.safetensors"))
        recipe = recipe.model_copy(update={"teacher": f"{folder}/bare"})
    made = Trainer(DistillationTask(recipe), Path(folder) / "run", quiet=True)
    head = made.task.roles["discriminator"].state_dict() if "discriminator" in made.task.roles else {}
    student = {name: full(tensor.detach()).clone() for name, tensor in made.task.student.state_dict().items()}
    return student, {name: tensor.clone() for name, tensor in head.items()}
