"""Where a teacher comes from: bundles, diffusers folders, hub ids; what is refused, and how it says so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.bundle import sha256
from distill.config import RecipeError, parse_recipe
from distill.families.load import family_of, load_teacher, local_folder
from distill.hub import is_hub_id, snapshot

Folder = Callable[[str], Path]
REVISION = "0123456789abcdef" * 2 + "01234567"


def recipe(teacher: str | Path, **changes: Any) -> Any:
    optimizer = {"learning_rate": 1e-4}
    tree = {
        "task": "distill", "name": "toy", "output": "bundles/toy", "teacher": str(teacher), "iterations": 10,
        "batch_size": 8, "student": optimizer, "fake": optimizer,
    }  # fmt: skip
    return parse_recipe(tree | changes)


@pytest.mark.parametrize("name", ["sdxl", "sd15", "sd3", "flux", "sit", "wan"])
def test_a_diffusers_folder_says_its_family(name: str, tiny_teacher: Folder) -> None:
    assert family_of(tiny_teacher(name)) == name
    loaded = load_teacher(recipe(tiny_teacher(name)))
    assert loaded.family.name == name
    assert loaded.source["source"] == str(tiny_teacher(name)) and loaded.source["revision"] is None
    assert "model_index.json" in loaded.source["configs"] and any(loaded.source["weights"].values())


def test_a_recipe_sets_size_frames_shift_and_grid(tiny_teacher: Folder) -> None:
    wan = load_teacher(recipe(tiny_teacher("wan"), size=[48, 32], frames=9, shift=5.0)).family
    assert (wan.latent_shape(), wan.schedule.shift) == ((4, 3, 4, 6), 5.0)
    sdxl = load_teacher(recipe(tiny_teacher("sdxl"), steps=[1], timesteps=[399])).family
    assert sdxl.schedule.grid(1).tolist() == [399.0] and sdxl.schedule.t_first == 399.0
    assert sdxl.schedule.grid(4).tolist() == [999.0, 749.0, 499.0, 249.0]
    assert wan.schedule.t_first == 1.0
    flux = load_teacher(recipe(tiny_teacher("flux"), size=[48, 32], shift=2.0, embedded_guidance=1.5)).family
    assert (flux.latent_shape(), flux.schedule.shift, flux.guidance) == ((4, 8, 12), 2.0, 1.5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sit", {"size": [16, 16]}, r"size is \(16, 16\), which the sit family does not take; drop it"),
        ("sdxl", {"shift": 3.0}, "shift is 3.0, which the sdxl family does not take"),
        ("sd3", {"embedded_guidance": 3.5}, "embedded_guidance is 3.5, which the sd3 family does not take"),
        ("sit", {"steps": [1], "timesteps": [399]}, "timesteps has 399; the teacher's time ends at 1"),
    ],
)
def test_what_a_family_does_not_have_is_refused(
    name: str, changes: dict[str, Any], message: str, tiny_teacher: Folder
) -> None:
    with pytest.raises(RecipeError, match=message):
        load_teacher(recipe(tiny_teacher(name), **changes))


def test_folders_of_other_pipelines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has neither bundle.json nor model_index.json"):
        family_of(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    with pytest.raises(RecipeError, match="is a PixArtSigmaPipeline; give the folder of StableDiffusionXLPipeline or"):
        family_of(tmp_path)


def test_a_family_that_contradicts_the_folder_is_refused(tiny_teacher: Folder) -> None:
    with pytest.raises(RecipeError, match=r"family is wan and the teacher in .* is of the sd15 family; drop family"):
        load_teacher(recipe(tiny_teacher("sd15"), family="wan"))


def test_a_teacher_that_was_fetched_in_part_or_cut_to_a_wrong_size_is_told(
    tiny_teacher: Folder, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_teacher("sd15"), tmp_path / "teacher")
    with pytest.raises(RecipeError, match=r"^size has 30; .* multiples of 4 pixels$"):
        load_teacher(recipe(folder, size=(30, 32)))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RecipeError, match=r"teacher: .* does not load as sd15 \(.*\); fetch it again"):
        load_teacher(recipe(folder))
    weights.unlink()
    with pytest.raises(RecipeError, match=r"teacher: .* does not load as sd15 \(.*\); fetch it again"):
        load_teacher(recipe(folder))


def test_hub_ids_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_hub_id("stabilityai/stable-diffusion-xl-base-1.0")
    assert not is_hub_id("models/mine") and not is_hub_id("mine") and not is_hub_id("/a/b") and not is_hub_id("a/b/c")
    with pytest.raises(RecipeError, match="there is no folder 'models/mine'; train or convert it first"):
        local_folder("models/mine")


def cached(hub: Path, source: str, folder: Path) -> None:
    """Lay a folder into a hub's cache as `hf download` does: blobs, a commit of links to them, and the branch main."""
    place = hub / f"models--{source.replace('/', '--')}"
    (place / "blobs").mkdir(parents=True)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        blob = place / "blobs" / sha256(file)
        link = place / "snapshots" / REVISION / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (place / "refs").mkdir()
    (place / "refs/main").write_text(REVISION)


@pytest.mark.parametrize("name", ["sdxl", "wan"])
def test_a_hub_id_loads_from_the_cache_and_keeps_its_revision(
    name: str, tiny_teacher: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "somebody/tiny", tiny_teacher(name))
    local, hub = load_teacher(recipe(tiny_teacher(name))), load_teacher(recipe("somebody/tiny"))
    assert hub.family.name == name
    assert hub.source == local.source | {"source": "somebody/tiny", "revision": REVISION}
    weights = dict(local.network.named_parameters())
    assert all(torch.equal(weights.pop(key), tensor) for key, tensor in hub.network.named_parameters())
    assert not weights


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        RecipeError, match=r"teacher: 'nobody/nothing' is not in the hub's local cache .* run `hf download"
    ):
        local_folder("nobody/nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RecipeError, match="vae: 'nobody/nothing' is not in"):
        snapshot("nobody/nothing", "vae", ("*.json",))
