"""Publishing a bundle for others: a diffusers folder, a LoRA of its teacher, or files for ComfyUI.

    python -m distill.export bundles/scenes-sdxl --to diffusers --out /tmp/scenes
    python -m distill.export bundles/scenes-sdxl --to lora --rank 64 --out /tmp/scenes-lora
    python -m distill.export bundles/my-sdxl --to comfyui --out ComfyUI/models

Weights are safetensors throughout, and a model card lies beside them. A folder appears under its name when it is whole.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.bundle import Bundle, BundleError, Manifest
from distill.config import RecipeError
from distill.export.card import card, read_cost
from distill.export.lora import Factors, Fidelity, comfyui_state, diffusers_state, lora_of, merge
from distill.export.names import clip_state, openclip_state, unet_state, vae_state, wan_name
from distill.export.steps import scheduler_for, write_scheduler
from distill.families.flux import EMBEDDED_GUIDANCE
from distill.families.load import FAMILIES, local_folder
from distill.roles import ADAPTER

Form = Literal["diffusers", "lora", "comfyui"]
COMPONENT = {"sdxl": "unet", "sd15": "unet", "sd3": "transformer", "flux": "transformer", "wan": "transformer"}
"""The networks that diffusers' pipelines load a LoRA into."""
_TAKE_SIGMAS = ("sd3", "flux")
"""Families whose pipelines pass the noise levels of a call on to their scheduler."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""
Say = Callable[[str], None]


class PublishError(ValueError):
    """A bundle that cannot be published in this form; the message says why and what can be done."""


def publish(
    path: str | os.PathLike[str],
    form: Form,
    out: Path,
    *,
    rank: int | None = None,
    teacher: str | None = None,
    run: Path | None = None,
    say: Say = print,
) -> list[Path]:
    """Write a bundle in a form for others into the new folder ``out`` and return what was written.

    rank: of a LoRA, None is that of its training or 64; for comfyui, a LoRA in the place of a checkpoint. teacher: None
    is the one that the bundle names. run: folder of the training run, for its cost; None: runs/NAME. Raises
    PublishError, BundleError.
    """
    bundle = Bundle.open(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PublishError(f"{out} is there already; give a new folder, or delete it")
    if form == "lora" or rank is not None:
        write: Callable[[Bundle, Path], dict[str, Any]] = _lora_writer(form, rank, teacher, say)
    else:
        write = {"diffusers": write_diffusers, "comfyui": write_comfyui}[form]
    draft = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        notes = write(bundle, draft)
        usage = notes.pop("usage")
        recipe = bundle.manifest.provenance.get("recipe", {})
        cost = read_cost(run or Path("runs") / str(recipe.get("name", bundle.manifest.name)), recipe)
        (draft / "README.md").write_text(card(bundle.manifest, usage, cost, notes), encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        os.replace(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return sorted(file for file in out.rglob("*") if file.is_file())


# --- diffusers -----------------------------------------------------------------------------------------------------


def write_diffusers(bundle: Bundle, folder: Path) -> dict[str, Any]:
    """The bundle's diffusers folder without our engines, with a scheduler that takes the student's steps."""
    engines = {f"{engine.file}{end}" for engine in bundle.manifest.engines for end in ("", ".data")}
    for name in bundle.manifest.files:
        if name not in engines and name != ADAPTER:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
    scheduler, calls = scheduler_for(bundle.manifest, _scheduler_config(bundle))
    write_scheduler(scheduler, calls, folder / "scheduler")
    index = folder / "model_index.json"
    if index.is_file():
        content = json.loads(index.read_text()) | {"scheduler": ["diffusers", type(scheduler).__name__]}
        index.write_text(json.dumps(content, indent=2) + "\n")
    return {"usage": _pipeline_usage(bundle.manifest, calls, index.is_file())}


def _scheduler_config(bundle: Bundle) -> dict[str, Any]:
    path = bundle.path / "scheduler" / "scheduler_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return config


def _loop_usage(manifest: Manifest, calls: dict[int, dict[str, Any]], vae: bool) -> str:
    """For flows of classes: diffusers' DiTPipeline asks its scheduler for what flow schedulers do not have."""
    (width, height), *_ = manifest.sizes
    shape = (1, manifest.latent_channels, height // manifest.latent_stride, width // manifest.latent_stride)
    names = ("AutoencoderKL, " if vae else "") + "DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler"
    decoded = (
        'vae = AutoencoderKL.from_pretrained("PATH", subfolder="vae")\n'
        "result = vae.decode(x / vae.config.scaling_factor).sample.detach()"
        if vae
        else "result = x  # pixels in [-1, 1]; there is no autoencoder"
    )
    return (
        f"import torch\nfrom diffusers import {names}\n\n"
        'network = DiTTransformer2DModel.from_pretrained("PATH", subfolder="transformer").eval()\n'
        'scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained("PATH", subfolder="scheduler")\n'
        f"scheduler.set_timesteps({_spelt(calls[manifest.default_steps])})\n"
        f"x, label = torch.randn{shape}, torch.tensor([7])\n"
        "for t in scheduler.timesteps:\n"
        "    with torch.no_grad():\n"
        "        v = network(x, timestep=t.expand(1), class_labels=label).sample\n"
        "    x = scheduler.step(v, t, x).prev_sample\n"
        f"{decoded}"
    )


def _pipeline_usage(manifest: Manifest, calls: dict[int, dict[str, Any]], vae: bool) -> str:
    steps = manifest.default_steps
    if manifest.task == "class-to-image" and manifest.prediction == "flow":
        return _loop_usage(manifest, calls, vae)
    example = manifest.examples[0] if manifest.examples else "a photo of a cat"
    what = "class_labels=[207]" if manifest.task == "class-to-image" else repr(example)
    output = "frames" if manifest.task == "text-to-video" else "images"
    start = (
        'import torch\nfrom diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("PATH")\n'
    )
    call, given = calls[steps], f"num_inference_steps={steps}"
    if "timesteps" in call:
        given = _spelt(call)
    elif "sigmas" in call and manifest.family in _TAKE_SIGMAS:
        given += f", {_spelt(call)}"
    elif "sigmas" in call:
        start += (
            "set_timesteps = pipe.scheduler.set_timesteps  # this pipeline passes on a number alone\n"
            "pipe.scheduler.set_timesteps = lambda steps, device=None: "
            f"set_timesteps({_spelt(call)}, device=device)\n"
        )
    given += f", guidance_scale={_guidance(manifest):g}"
    if manifest.task != "class-to-image":
        (width, height), *_ = manifest.sizes
        given += f", height={height}, width={width}"
    if frames := manifest.provenance.get("recipe", {}).get("frames"):
        given += f", num_frames={frames}"
    return f"{start}result = pipe({what}, {given}).{output}[0]"


def _guidance(manifest: Manifest) -> float:
    """What the pipeline calls guidance_scale: of FLUX the scale that the student reads as an input."""
    if manifest.family != "flux":
        return manifest.guidance.scale
    asked = manifest.provenance.get("recipe", {}).get("embedded_guidance")
    return EMBEDDED_GUIDANCE if asked is None else float(asked)


def _spelt(call: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in call.items())


# --- LoRA ----------------------------------------------------------------------------------------------------------


def _lora_writer(
    form: Form, rank: int | None, teacher: str | None, say: Say
) -> Callable[[Bundle, Path], dict[str, Any]]:
    if form == "diffusers":
        raise PublishError("--rank makes a LoRA; use it with --to lora or --to comfyui")

    def write(bundle: Bundle, folder: Path) -> dict[str, Any]:
        if bundle.manifest.family not in COMPONENT:
            raise PublishError(f"no pipeline loads a LoRA into {bundle.manifest.family}; use --to diffusers")
        source = teacher or bundle.manifest.provenance.get("recipe", {}).get("teacher")
        if not source:
            raise PublishError(f"{bundle.path} does not say what it was distilled from; add --teacher")
        family, student, base = _networks(bundle, str(source))
        try:
            factors, fidelity = lora_of(bundle.path, student, base, rank)
        except ValueError as error:
            raise PublishError(f"{bundle.path} beside {source}: {error}") from None
        fidelity = replace(fidelity, remaining=remaining(family, student, base, factors, bundle.manifest))
        say(
            f"rank {fidelity.rank} in {fidelity.layers} layers holds {fidelity.captured:.1%} of what the student "
            f"changed; {fidelity.remaining:.1%} of its effect on the output is missing"
        )
        return _write_lora(bundle, folder, factors, fidelity, form, str(source))

    return write


def _networks(bundle: Bundle, teacher: str) -> tuple[Any, nn.Module, nn.Module]:
    """The family, the student and its teacher."""
    loader, manifest = FAMILIES[bundle.manifest.family], bundle.manifest
    options = {"embedded_guidance": _guidance(manifest)} if manifest.family == "flux" else {}
    family, student = loader.from_folder(bundle.path, size=manifest.sizes[0], **options)
    try:
        _, base = loader.from_folder(local_folder(teacher))
    except (RecipeError, OSError) as error:
        raise PublishError(f"the teacher cannot be loaded ({error}); add --teacher with its folder") from None
    return family, student, base


@torch.no_grad()
def remaining(
    family: Any, student: nn.Module, teacher: nn.Module, factors: dict[str, Factors], manifest: Manifest
) -> float:
    """rms(f(teacher + LoRA) − f(student)) over rms(f(teacher) − f(student)), where f is the first step's x0.

    Videos are measured on two latent frames of 32 × 32: a whole one would take hours on a CPU.
    """
    merged = merge(copy.deepcopy(teacher), factors)
    prompts = [*manifest.examples, "a photo of a cat", "a photo of a dog"]
    encoded = family.encode(prompts[:2] if manifest.max_tokens else [0, 1])
    channels, *sides = family.latent_shape()
    if len(sides) == 3:
        sides = [min(side, limit) for side, limit in zip(sides, (2, 32, 32), strict=True)]
    x = torch.randn(2, channels, *sides, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), manifest.samplers[manifest.default_steps].timesteps[0], dtype=torch.float64)
    outputs = [family.predict(network.eval(), x, t, encoded).x0 for network in (student, teacher, merged)]
    return float((outputs[2] - outputs[0]).norm() / (outputs[1] - outputs[0]).norm().clamp_min(1e-12))


def _write_lora(
    bundle: Bundle, folder: Path, factors: dict[str, Factors], fidelity: Fidelity, form: Form, teacher: str
) -> dict[str, Any]:
    family = bundle.manifest.family
    metadata = {"format": "pt", "leapfrog_fidelity": json.dumps(fidelity.as_dict()), "base_model": teacher}
    notes = _told(fidelity)
    if form == "comfyui":
        _check_comfyui(bundle)
        file = folder / "loras" / f"{bundle.manifest.name}.safetensors"
        file.parent.mkdir()
        save_file(comfyui_state(factors, family), file, metadata)
        return notes | {"usage": f"# {_comfyui_usage(bundle.manifest, 'loras', teacher)}"}
    save_file(diffusers_state(factors, COMPONENT[family]), folder / LORA_FILE, metadata)
    scheduler, calls = scheduler_for(bundle.manifest, _scheduler_config(bundle))
    write_scheduler(scheduler, calls, folder / "scheduler")
    kind = type(scheduler).__name__
    usage = _pipeline_usage(bundle.manifest, calls, True).replace('"PATH"', repr(teacher)).splitlines()
    usage[1] = f"from diffusers import DiffusionPipeline, {kind}"
    at = next(i for i, line in enumerate(usage) if line.startswith("pipe = ")) + 1
    usage[at:at] = [
        f'pipe.scheduler = {kind}.from_pretrained("PATH", subfolder="scheduler")',
        'pipe.load_lora_weights("PATH")',
    ]
    return notes | {"usage": "\n".join(usage)}


def _told(fidelity: Fidelity) -> dict[str, Any]:
    return {
        "rank": fidelity.rank,
        "layers": fidelity.layers,
        "share of the squared change of weights that is here": fidelity.captured,
        "share in norms, biases and embeddings, which have no factors": fidelity.left_behind,
        "part of the student's effect on the output that is missing (0 is the student, 1 the teacher)": (
            fidelity.remaining
        ),
        "scores below": "those of the student itself, not of this LoRA",
    }


# --- ComfyUI -------------------------------------------------------------------------------------------------------


def write_comfyui(bundle: Bundle, folder: Path) -> dict[str, Any]:
    """One checkpoint in the original names for UNets, the transformer alone for Wan, under ComfyUI's folders."""
    _check_comfyui(bundle)
    kind = "diffusion_models" if bundle.manifest.family == "wan" else "checkpoints"
    file = folder / kind / f"{bundle.manifest.name}.safetensors"
    file.parent.mkdir()
    save_file({name: value.contiguous() for name, value in checkpoint(bundle).items()}, file, {"format": "pt"})
    return {"usage": f"# {_comfyui_usage(bundle.manifest, kind, '')}"}


def _check_comfyui(bundle: Bundle) -> None:
    if bundle.manifest.family not in ("sdxl", "sd15", "wan"):
        raise PublishError(
            f"the weights of {bundle.manifest.family} have no names of ComfyUI's here; use --to diffusers"
        )
    if bundle.manifest.prediction == "x0":
        raise PublishError("the student predicts x0, of which a checkpoint cannot tell ComfyUI; use --to diffusers")


def checkpoint(bundle: Bundle) -> dict[str, Tensor]:
    """The weights of a bundle under the original's names; markers for v-prediction as ComfyUI looks for them."""
    read = {part: _weights(bundle.path / part) for part in _parts(bundle)}
    if bundle.manifest.family == "wan":
        return {wan_name(name): value for name, value in read["transformer"].items()}
    state = unet_state(read["unet"], _config(bundle, "unet")) | vae_state(read["vae"], _config(bundle, "vae"))
    if bundle.manifest.family == "sd15":
        return state | clip_state(read["text_encoder"], "cond_stage_model.transformer.")
    state |= clip_state(read["text_encoder"], "conditioner.embedders.0.transformer.")
    state |= openclip_state(read["text_encoder_2"], "conditioner.embedders.1.model.")
    if bundle.manifest.prediction == "v":
        state["v_pred"] = torch.tensor([])
        if _scheduler_config(bundle).get("rescale_betas_zero_snr"):
            state["ztsnr"] = torch.tensor([])
    return state


def _parts(bundle: Bundle) -> tuple[str, ...]:
    return {
        "wan": ("transformer",),
        "sd15": ("unet", "vae", "text_encoder"),
        "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    }[bundle.manifest.family]


def _config(bundle: Bundle, part: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle.path / part / "config.json").read_text())
    return content


def _weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a component, whatever number of files it has. Raises BundleError if there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BundleError(f"{folder} has no safetensors; write the bundle again")
    return {name: value for file in files for name, value in load_file(file).items()}


def _comfyui_usage(manifest: Manifest, kind: str, teacher: str) -> str:
    steps = manifest.default_steps
    times = ", ".join(f"{t:g}" for t in manifest.samplers[steps].timesteps)
    beside = f" beside {teacher}" if kind == "loras" else ""
    return (
        f"copy {kind}/ into ComfyUI's models/, load {manifest.name}{beside}; KSampler: {steps} steps, "
        f"cfg {manifest.guidance.scale:g}, sampler lcm, scheduler sgm_uniform\n"
        f"# the student was trained at the times {times}: check the preview of sigmas where yours differ"
    )
