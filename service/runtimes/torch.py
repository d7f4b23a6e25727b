"""torch: the very modules that export compiles, for bundles that were not exported and for LoRAs.

It needs the ``train`` extra and is imported only where it is asked for; ``make serve`` has no torch. On a processor
torch picks its kernels by the number of rows, so batches there are for requests with ``deterministic: false``.

LoRAs. A step with LoRAs runs on weights W + Σ scale·(alpha/r)·B·A in the place of W (Hu et al., arXiv 2106.09685), so
it costs what a step without them costs and keeps its bits in the same batches. Merged weights are kept for the sets
that were used last; the bundle's own stay untouched. Files may have diffusers' names (``unet.….lora_A.weight``) or
ComfyUI's (``lora_unet_….lora_down.weight``, ``diffusion_model.….lora_A.weight``), as distill.export writes both.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from distill.bundle import Bundle, BundleError
from distill.export.graphs import GraphSpec, load_graphs
from distill.export.names import comfyui_module
from service.cache import ByteCache
from service.runtimes.base import Conditioning, FixedPrecision, Lora, LoraRefused, Worn
from service.runtimes.graphs import GraphRuntime

MERGED_BYTES = 2 << 30
"""Of merged weights that are kept besides those in use."""
LARGEST_RANK = 512
HALVES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
KEY = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<half>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(?P<alpha>alpha))"
)
Factors = tuple[Tensor, Tensor, float]
"""down (r, in[, k, k]) and up (out, r[, 1, 1]) in float32, and alpha / r."""


def has_gpu() -> bool:
    return torch.cuda.is_available()


class TorchRuntime(GraphRuntime):
    """Every graph as the torch module that it would be compiled from."""

    name = "torch"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int,
        max_batch: int,
        precision: FixedPrecision = "float32",
        replica: int = 0,
    ) -> None:
        """On the GPU number ``replica``, modulo how many there are, else on the processor."""
        torch.set_num_threads(threads)
        self.device = f"cuda:{replica % torch.cuda.device_count()}" if has_gpu() else "cpu"
        try:
            self._specs = load_graphs(bundle.path, bundle.manifest)
        except OSError as error:
            first = str(error).splitlines()[0]
            raise BundleError(f"{bundle.path} does not load in torch: {first}; write the bundle again") from None
        for spec in self._specs.values():
            spec.module.to(self.device)
        step: Any = self._specs["step"].module
        self._network = cast(nn.Module, step.unet if hasattr(step, "unet") else step.transformer)
        self._layers = {n: m for n, m in self._network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        self._own: dict[str, Tensor] = {}
        """The bundle's weights of the layers that LoRAs stand in for at the moment."""
        self._merged: ByteCache[dict[str, Tensor]] = ByteCache(MERGED_BYTES)
        self._worn: tuple[tuple[str, float], ...] = ()
        super().__init__(bundle, threads=threads, max_batch=max_batch, precision=precision)
        self.capabilities = replace(self.capabilities, loras=True)

    def version(self) -> str:
        return str(torch.__version__)

    def _load(self, bundle: Bundle, graph: str) -> TorchGraph:
        if graph not in self._specs:
            raise BundleError(f"{bundle.path} has no {graph}; write the bundle again")
        return TorchGraph(self._specs[graph], self.device, self.precision if graph == "step" else "float32")

    def memory(self) -> dict[str, int]:
        """Of tensors, and of all that torch has taken from the GPU; its CUDA context, some 500 MB, is in neither."""
        if not self.device.startswith("cuda"):
            return {}
        index = torch.device(self.device)
        return {"allocated": torch.cuda.memory_allocated(index), "reserved": torch.cuda.memory_reserved(index)}

    def read_lora(self, data: bytes) -> Lora:
        factors = {layer: self._checked(layer, parts) for layer, parts in self._parts(data).items()}
        rank = max(len(down) for down, _, _ in factors.values())
        return Lora(hashlib.sha256(data).hexdigest(), rank, len(factors), len(data), factors)

    def configure(self, *, exact: bool = True, loras: Worn = ()) -> None:
        super().configure(exact=exact, loras=loras)
        worn = tuple((lora.digest, scale) for lora, scale in loras)
        if worn == self._worn:
            return
        weights = self._weights(worn, loras)
        for layer, own in self._own.items():
            self._layers[layer].weight.data = own
        self._own = {layer: self._layers[layer].weight.data for layer in weights}
        for layer, weight in weights.items():
            self._layers[layer].weight.data = weight
        self._worn = worn

    def _weights(self, worn: tuple[tuple[str, float], ...], loras: Worn) -> dict[str, Tensor]:
        """Merged weights by layer; of no LoRA none."""
        if not worn:
            return {}
        known = self._merged.get(worn)
        if known is not None:
            return known
        merged: dict[str, Tensor] = {}
        for lora, scale in loras:
            for layer, (down, up, alpha) in lora.factors.items():
                own = self._own.get(layer, self._layers[layer].weight.data)
                product = up.to(own.device).flatten(1) @ down.to(own.device).flatten(1)
                merged[layer] = merged.get(layer, own) + scale * alpha * product.reshape(own.shape)
        self._merged.put(worn, merged, sum(weight.nbytes for weight in merged.values()))
        return merged

    def _parts(self, data: bytes) -> dict[str, dict[str, Tensor]]:
        """down, up and perhaps alpha of each layer of the network that a file is about. Raises LoraRefused."""
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, ValueError, KeyError) as error:
            raise LoraRefused(f"the body is not a safetensors file: {error}; send the bytes of one") from None
        names = {comfyui_module(layer, self.manifest.family): layer for layer in self._layers}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            found = KEY.fullmatch(key)
            if found is None:
                raise LoraRefused(f"{key[:120]} is no part of a LoRA; send lora_A and lora_B of every layer")
            told = re.sub(r"^(unet|transformer|base_model\.model)\.", "", found["layer"])
            layer = names.get(told, told)
            if layer not in self._layers:
                text = f"{found['layer'][:120]} is no layer of {self.manifest.name}'s denoiser"
                raise LoraRefused(f"{text}; give a LoRA of this model, and without text encoders")
            parts.setdefault(layer, {})[HALVES.get(found["half"] or "", "alpha")] = value
        if not parts:
            raise LoraRefused("the file has no tensors; send lora_A and lora_B of every layer")
        return parts

    def _checked(self, layer: str, parts: dict[str, Tensor]) -> Factors:
        """The factors of a layer if they fit it. Raises LoraRefused."""
        weight = self._layers[layer].weight
        shape = tuple(weight.shape)
        missing = [half for half in ("down", "up") if half not in parts]
        if missing:
            raise LoraRefused(f"{layer} has no {missing[0]} half; send lora_A and lora_B of every layer")
        down, up = parts["down"], parts["up"]
        rank = down.shape[0] if down.ndim else 0
        ones = (1,) * (len(shape) - 2)
        if (
            not 0 < rank <= LARGEST_RANK
            or tuple(down.shape[1:]) != shape[1:]
            or tuple(up.shape) != (shape[0], rank, *ones)
        ):
            seen = f"{layer} has halves of shape {tuple(down.shape)} and {tuple(up.shape)}"
            fits = f"(r, {', '.join(map(str, shape[1:]))}) and ({shape[0]}, r{''.join(', 1' for _ in ones)})"
            raise LoraRefused(f"{seen}; its weight takes {fits} with r up to {LARGEST_RANK}")
        for half in (down, up):
            if not half.is_floating_point() or not bool(torch.isfinite(half.float()).all()):
                raise LoraRefused(f"{layer} has values that are no finite floats; write the file again")
        alpha = float(parts["alpha"]) if "alpha" in parts and parts["alpha"].numel() == 1 else float(rank)
        return down.float(), up.float(), alpha / rank


class TorchGraph:
    """service.runtimes.graphs.Graph as a module."""

    def __init__(self, spec: GraphSpec, device: str, precision: FixedPrecision) -> None:
        self._module, self._names, self._device = spec.module, spec.inputs, device
        self._lower = None if precision == "float32" else cast(torch.dtype, getattr(torch, precision))
        self.inputs, self.outputs = frozenset(spec.inputs), spec.outputs

    @torch.inference_mode()
    def run(self, feed: Conditioning) -> list[NDArray[np.generic]]:
        arguments = [torch.tensor(feed[name], device=self._device) for name in self._names]
        with self._arithmetic():
            results = self._module(*arguments)
        every = results if isinstance(results, tuple) else (results,)
        return [(r.float() if r.is_floating_point() else r).cpu().numpy() for r in every]

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self._lower is None:
            return nullcontext()
        return torch.autocast(self._device.partition(":")[0], dtype=self._lower)
