"""Networks without weights: made from their config, autoencoders read as ever, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ModelMixin

from distill.families.sdxl import Sdxl
from distill.families.sit import Sit
from distill.parallel.hollow import hollow


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
