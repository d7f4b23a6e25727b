"""The graphs of published architectures from random weights: does SDXL, SD1.5, DiT-XL or Wan2.1-1.3B export here?

    python -m distill.export.production sdxl --dry-run
    python -m distill.export.production wan --layers 2 --out /tmp/wan        # true widths, cut in depth
    python -m distill.export.production sdxl --full --out /tmp/sdxl          # as published; needs memory

Every graph is compared with torch like a student's, at two small sizes of different sides: height and width are free.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.bundle import Manifest, Sampler
from distill.export import parity
from distill.export.estimate import estimate, report
from distill.export.graphs import GraphSpec, SdxlStep, SitStep, VaeDecoder, affine_step, decoder_graph, step_graph
from distill.export.onnx import OPSET, ExportError, compile_graph
from distill.families.published import USUAL, Configs
from distill.sampling import Flow, ScaledLinear, student_table

NAMES = ("sdxl", "sd15", "sit", "wan")
SIZES = ((64, 128), (192, 64))
"""Of the comparison, (width, height) in pixels; both sides are free in the graphs."""
DEFAULT_LAYERS = 1


class Sd15Step(nn.Module):
    """One sampler step of an SD1.5 UNet without guidance; see distill.export.graphs.SdxlStep."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latents: Tensor, timestep: Tensor, coefficients: Tensor, noise: Tensor, prompt_embeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        output = self.unet(latents, timestep, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        return affine_step(latents, output, coefficients, noise)


def cut(family: str, configs: Configs, layers: int) -> Configs:
    """Configs of the same widths and few layers: per block of a UNet, or of a transformer in all."""
    shallow = {name: dict(config) for name, config in configs.items()}
    if "unet" in shallow:
        unet = shallow["unet"]
        unet["layers_per_block"] = layers
        if "transformer_layers_per_block" in unet:
            unet["transformer_layers_per_block"] = [layers] * len(unet["transformer_layers_per_block"])
    else:
        shallow["transformer"]["num_layers"] = layers
    key = "num_layers" if family == "wan" else "num_hidden_layers"
    for name in ("text_encoder", "text_encoder_2"):
        if name in shallow:
            shallow[name][key] = max(layers, 2)  # SDXL reads the layer before the last
    return shallow


def production_graphs(family: str, configs: Configs, device: str = "cpu") -> Iterator[GraphSpec]:
    """The denoiser and the decoder of a family, one after another so that one is in memory at a time."""
    manifest = made_up(family, configs)
    with torch.device(device):
        network = _network(family, configs)
    classes = configs.get("transformer", {}).get("num_embeds_ada_norm", 0)
    yield step_graph(_step(family, network, manifest), manifest, _conditioning(family, configs), classes)
    del network
    with torch.device(device):
        if family != "wan":
            from diffusers import AutoencoderKL

            vae: Any = AutoencoderKL.from_config(configs["vae"])
            yield decoder_graph(VaeDecoder(vae), manifest)


def made_up(family: str, configs: Configs) -> Manifest:
    """A manifest for the comparison: the family's schedule and latents, small sizes."""
    flow = family in ("sit", "wan")
    schedule: Any = Flow() if flow else ScaledLinear()
    prediction = "flow" if flow else "epsilon"
    samplers = {n: Sampler.of(student_table(schedule, prediction, schedule.grid(n))) for n in (1, 4)}
    channels = 16 if family == "wan" else 4
    stride = 8 if family == "wan" else 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    side = configs["transformer"]["sample_size"] * stride if family == "sit" else 0
    return Manifest(
        name=f"{family}-random",
        family=family,
        task={"wan": "text-to-video", "sit": "class-to-image"}.get(family, "text-to-image"),
        prediction=prediction,
        latent_channels=channels,
        latent_stride=stride,
        sizes=((side, side),) if side else SIZES,  # DiT's position embedding is of one size
        frames=(5,) if family == "wan" else (),
        frame_stride=4 if family == "wan" else 1,
        fps=16.0 if family == "wan" else 0.0,
        samplers=samplers,
        default_steps=4,
        preview=((0.0, 0.0, 0.0),) * (channels + 1),
    )


def _network(family: str, configs: Configs) -> Any:
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel

    kinds = {"sit": DiTTransformer2DModel, "wan": WanTransformer3DModel}
    return kinds.get(family, UNet2DConditionModel).from_config(configs["transformer" if family in kinds else "unet"])


def _step(family: str, network: Any, manifest: Manifest) -> nn.Module:
    if family == "sdxl":
        return SdxlStep(network, manifest.latent_stride)
    if family == "sd15":
        return Sd15Step(network)
    if family == "sit":
        return SitStep(network, int(network.config.num_embeds_ada_norm))
    from distill.export.wan import WanStep

    return WanStep(network, 1.0, None)


def _conditioning(family: str, configs: Configs) -> dict[str, tuple[int, ...]]:
    if family == "sdxl":
        pooled = configs["text_encoder_2"]["projection_dim"]
        return {"prompt_embeds": (77, configs["unet"]["cross_attention_dim"]), "pooled": (pooled,)}
    if family == "sd15":
        return {"prompt_embeds": (77, configs["unet"]["cross_attention_dim"])}
    if family == "sit":
        return {"labels": ()}
    return {"prompt_embeds": (64, configs["transformer"].get("text_dim", 4096))}


def export_production(
    family: str, configs: Configs, out: Path, opset: int = OPSET, say: Callable[[str], None] = print
) -> list[Path]:
    """Compile the graphs to ``out`` and compare them with torch. Raises ExportError beyond the tolerance."""
    written = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for spec in production_graphs(family, configs):
            started, path = time.perf_counter(), out / f"{spec.name}.onnx"
            for parameter in spec.module.parameters():
                parameter.copy_(parameter.half())  # as a bundle's, and in place
            spec.module.eval().requires_grad_(False)
            compile_graph(spec, path, opset)
            measured = parity.check_graph(spec, parity.OnnxGraph(path))
            files = [file for file in (path, path.with_name(path.name + ".data")) if file.is_file()]
            size_mb = sum(file.stat().st_size for file in files) / 1e6
            numbers = ", ".join(f"{key} {value:.3g}" for key, value in measured.items())
            peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes
            took = f"{time.perf_counter() - started:.0f} s, at most {peak_gb:.1f} GB of memory so far"
            say(f"{family} {spec.name}: {size_mb:.0f} MB in {took}; {numbers}")
            written += files
            del spec
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.export.production",
        description="Export a published architecture from random weights and compare it with torch.",
        epilog="example: python -m distill.export.production sdxl --layers 1 --out /tmp/sdxl",
    )
    parser.add_argument("family", choices=NAMES)
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--layers", type=int, default=DEFAULT_LAYERS, help="depth; default: %(default)s")
    depth.add_argument("--full", action="store_true", help="the published depth")
    parser.add_argument("--out", type=Path, help="new folder of the graphs")
    parser.add_argument("--opset", type=int, default=OPSET, help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="sizes and time; nothing is written")
    options = parser.parse_args(arguments)
    if options.layers < 1:
        parser.error(f"--layers is {options.layers}; give at least 1")
    configs = USUAL[options.family] if options.full else cut(options.family, USUAL[options.family], options.layers)
    if options.dry_run:
        rows = [
            estimate(spec.name, spec.module, shared=False)
            for spec in production_graphs(options.family, configs, "meta")
        ]
        print("\n".join(report(rows)))
        return 0
    if options.out is None:
        parser.error("give --out, the folder of the graphs, or --dry-run")
    try:
        for path in export_production(options.family, configs, options.out, options.opset):
            print(f"wrote {path}")
    except ExportError as error:
        print(f"export failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
