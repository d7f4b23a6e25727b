"""From a recipe's teacher to its family and network: a bundle, a diffusers folder, or a hub id.

    teacher = load_teacher(recipe)      # teacher.family, teacher.network

A hub id is downloaded once into the hub's own cache; what is not there cannot be had without a network, and says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from distill.bundle import MANIFEST, Bundle, sha256
from distill.config import DistillRecipe, RecipeError
from distill.families.flux import Flux
from distill.families.sd3 import Sd3
from distill.families.sd15 import Sd15
from distill.families.sdxl import Sdxl
from distill.families.sit import Sit
from distill.families.wan import Wan
from distill.hub import is_hub_id, snapshot

FAMILIES: dict[str, Any] = {"sdxl": Sdxl, "sd15": Sd15, "sd3": Sd3, "flux": Flux, "sit": Sit, "wan": Wan}
PIPELINES = {
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionPipeline": "sd15",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "DiTPipeline": "sit",
    "WanPipeline": "wan",
}
"""Families by the class that a diffusers folder's model_index.json names."""
_WANTED = ("*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors")
_UNWANTED = ("*.fp16*", "*.bf16*", "*non_ema*", "*flax*", "safety_checker/*", "feature_extractor/*", "*_lora*")


_OPTIONS = {
    "size": ("sdxl", "sd15", "sd3", "flux", "wan"),
    "frames": ("wan",),
    "shift": ("sd3", "flux", "wan"),
    "embedded_guidance": ("flux",),
}
"""What a recipe may say of a teacher's shape and time, with the families that take it."""


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher. examples: prompts that its bundle offers; source: what it was loaded from, for provenance."""

    family: Any
    network: Any
    examples: tuple[str, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)


def load_teacher(recipe: DistillRecipe) -> Teacher:
    """The family, with the recipe's size, frames, shift and grid, and the network of its teacher, all on the CPU."""
    folder = local_folder(recipe.teacher)
    bundle = Bundle.open(folder) if (folder / MANIFEST).is_file() else None
    name = _agreed(recipe, bundle.manifest.family if bundle else pipeline_family(folder), folder)
    own = clip_of(bundle) if bundle and name == "wan" else {}
    given = own | options_for(recipe, name)
    try:
        family, network = FAMILIES[name].from_folder(folder, **given)
    except (ValueError, OSError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise RecipeError(f"teacher: {folder} does not load as {name} ({first}); fetch it again") from error
    try:
        family.latent_shape()
    except ValueError as error:
        raise RecipeError(str(error)) from None
    family.schedule = with_grid(family.schedule, recipe)
    if bundle:
        source = {"digest": bundle.digest, **bundle.manifest.provenance}
        return Teacher(family, network, bundle.manifest.examples, source)
    return Teacher(family, network, (), {"source": recipe.teacher, "revision": _revision(folder), **_digests(folder)})


def clip_of(bundle: Bundle) -> dict[str, Any]:
    """Size, frames and frames per second of a bundle's clips, which its diffusers folder does not tell."""
    manifest = bundle.manifest
    return {"size": manifest.sizes[0], "frames": manifest.frames[0], "fps": manifest.fps} if manifest.frames else {}


def options_for(recipe: DistillRecipe, family: str) -> dict[str, Any]:
    """What a recipe says of the teacher's shape and time. Raises RecipeError for what its family does not have."""
    given = {key: getattr(recipe, key) for key in _OPTIONS if getattr(recipe, key) is not None}
    for key, value in given.items():
        if family not in _OPTIONS[key]:
            raise RecipeError(f"{key} is {value}, which the {family} family does not take; drop it")
    return given


def with_grid(schedule: Any, recipe: DistillRecipe) -> Any:
    """The schedule with the recipe's own timesteps. Raises RecipeError for times that it does not have."""
    if recipe.timesteps is None:
        return schedule
    if max(recipe.timesteps) > schedule.t_max:
        raise RecipeError(f"timesteps has {max(recipe.timesteps):g}; the teacher's time ends at {schedule.t_max:g}")
    return replace(schedule, grids={len(recipe.timesteps): recipe.timesteps})


def family_of(folder: Path) -> str:
    """The family of a diffusers folder. Raises RecipeError for one that we do not have."""
    family = pipeline_family(folder)
    if family is None:
        kind = _pipeline(folder)
        seen = f"is a {kind}" if kind else "has neither bundle.json nor model_index.json"
        raise RecipeError(f"teacher: {folder} {seen}; give the folder of {' or '.join(PIPELINES)}, or a bundle")
    return family


def pipeline_family(folder: Path) -> str | None:
    """The family of the pipeline that a folder's model_index.json names; None where it names none of ours."""
    return PIPELINES.get(_pipeline(folder) or "")


def _pipeline(folder: Path) -> str | None:
    index = folder / "model_index.json"
    return json.loads(index.read_text()).get("_class_name") if index.is_file() else None


def _agreed(recipe: DistillRecipe, said: str | None, folder: Path) -> str:
    """The family of a teacher by its folder and by the recipe. Raises RecipeError where they contradict each other."""
    if recipe.family and said and recipe.family != said:
        raise RecipeError(f"family is {recipe.family} and the teacher in {folder} is of the {said} family; drop family")
    return recipe.family or said or family_of(folder)


def local_folder(source: str) -> Path:
    """The folder of a source, downloaded where it is a hub id. Raises RecipeError where it cannot be had."""
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_id(source):
        raise RecipeError(f"teacher: there is no folder {source!r}; train or convert it first, or give a hub id")
    return snapshot(source, "teacher", _WANTED, _UNWANTED)


def _revision(folder: Path) -> str | None:
    """The commit of a snapshot in the hub's cache; None for other folders."""
    return folder.name if folder.parent.name == "snapshots" else None


def _digests(folder: Path) -> dict[str, Any]:
    """sha256 of the small files that say what a teacher is; its weights are named with their sizes."""
    configs = {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*.json"))}
    weights = {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*.safetensors"))}
    return {"configs": configs, "weights": weights}
