"""The contract of a runtime, and the plain sampling loop over it.

runtime = open_runtime(Bundle.open("bundles/scenes-sdxl"), threads=2, max_batch=8)
images = generate(runtime, manifest, ["a red cube"], seeds=[7], steps=4)      # (1, H, W, 3) uint8
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from distill.bundle import Manifest
from distill.sampling import noise

Floats = NDArray[np.float32]
Images = NDArray[np.uint8]
Conditioning = dict[str, NDArray[np.generic]]
"""What the step graph reads besides latents, by input name; every array has the rows of the batch first."""

RuntimeName = Literal["onnx", "openvino", "tensorrt", "tensorrt-rtx", "torch"]
RuntimeChoice = Literal["auto", "onnx", "openvino", "tensorrt", "torch", "fastest"]
FixedPrecision = Literal["float32", "bfloat16", "float16", "int8"]
"""Of the arithmetic of the denoiser. What comes in and goes out is float32 whatever it is."""
Precision = Literal["auto", "float32", "bfloat16", "float16", "int8"]


class RuntimeUnavailable(Exception):
    """The runtime or precision that was asked for cannot be had on this machine; the message tells the way out."""


class LoraRefused(Exception):
    """A LoRA that does not fit the model, or a runtime that takes none; the message tells the way out."""


@dataclass(frozen=True, eq=False)
class Lora:
    """Low-rank additions to the weights of one model's denoiser, read and checked by its runtime."""

    digest: str
    """sha256 of the file."""
    rank: int
    """The greatest of its layers."""
    layers: int
    bytes: int
    factors: Mapping[str, Any] = field(repr=False)
    """By layer, as the runtime that read them keeps them."""


Worn = tuple[tuple[Lora, float], ...]
"""LoRAs with their scales, together on one model."""


@dataclass(frozen=True)
class Capabilities:
    """What a runtime can do on this machine; shown by GET /v1/models."""

    runtime: RuntimeName
    version: str
    """Of the package that computes."""
    precision: FixedPrecision
    device: str
    threads: int
    batch_sizes: tuple[int, ...]
    """Numbers of rows that one denoising call takes; other numbers are split into these."""
    step_ms: tuple[float, ...]
    """Milliseconds of one denoising call at each of batch_sizes, measured while warming up."""
    prompt_tokens: int | None = None
    """Of a prompt that are read; None: the model takes labels."""
    fallback: str = ""
    """Why this is not the runtime that was asked for; empty where it is."""
    measured: str = ""
    """What "fastest" went by: milliseconds per picture of each runtime; empty where none was measured."""
    loose_sizes: tuple[int, ...] = ()
    """The same for rows that asked for speed and not for bits; empty where batch_sizes are all that there are."""
    loose_ms: tuple[float, ...] = ()
    loras: bool = False
    """Whether read_lora and configure take LoRAs."""

    @property
    def max_batch(self) -> int:
        return self.batch_sizes[-1]


@dataclass(frozen=True)
class Tokens:
    """Token ids and mask (B, L) int64 of some prompts; per prompt, how many tokens it has and how many were kept."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    """1 for what the text encoder shall see, 0 for padding."""
    counts: tuple[int, ...]
    kept: tuple[int, ...]


class Runtime(Protocol):
    """Computes one bundle. Row i of every result depends on row i of the inputs alone, to the last bit.

    After ``configure(exact=False)`` the last bits may depend on the number of rows as well.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    def read_lora(self, data: bytes) -> Lora:
        """A LoRA in a safetensors file, from any thread. Raises LoraRefused."""
        ...

    def configure(self, *, exact: bool = True, loras: Worn = ()) -> None:
        """How the next steps are computed: in batches that keep every bit, with which LoRAs. Cheap when unchanged."""
        ...

    def lane(self) -> Runtime | None:
        """Another one with the same weights, whose calls may run while this one's do; None where there is none."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes by kind that this process holds on the runtime's GPU, from any thread; empty where that is not told."""
        ...

    def tokenize(self, prompts: Sequence[str]) -> Tokens: ...

    def encode_text(self, prompts: Sequence[str]) -> Conditioning: ...

    def step(
        self, latents: Floats, timestep: Floats, coefficients: Floats, noise: Floats, conditioning: Conditioning
    ) -> tuple[Floats, Floats]:
        """One denoising step of rows that may stand at different steps: (next latents, x0), both (B, C, h, w).

        latents, noise: (B, C, h, w), of clips (B, C, f, h, w) here and below; timestep: (B,) in the model's time;
        coefficients: (B, 5), see distill.sampling.
        """
        ...

    def decode(self, latents: Floats) -> Images:
        """Pictures (B, H, W, 3) uint8 of latents (B, C, h, w), or clips (B, F, H, W, 3)."""
        ...

    def frames(self, latents: Floats) -> Iterator[Images]:
        """The frames of one clip's latents (1, C, f, h, w), some (n, H, W, 3) uint8 at a time, as they come."""
        ...


def stack(conditionings: Sequence[Conditioning]) -> Conditioning:
    """One conditioning of all rows, in order."""
    return {name: np.concatenate([c[name] for c in conditionings]) for name in conditionings[0]}


def generate(
    runtime: Runtime,
    manifest: Manifest,
    prompts: Sequence[str] | Conditioning,
    seeds: Sequence[int],
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> Images:
    """Pictures (B, H, W, 3) uint8, or clips (B, F, H, W, 3), one per seed, without a queue.

    The reference for the engine, and what eval calls.

    ``prompts`` are texts, or the conditioning itself for models that take labels ({"labels": (B,) int64}).
    """
    conditioning = prompts if isinstance(prompts, dict) else runtime.encode_text(prompts)
    table = manifest.samplers[steps or manifest.default_steps].table()
    shape = manifest.latent_shape(size, frames)
    draws = np.stack([noise(seed, 0, shape, draws=len(table)) for seed in seeds], axis=1)
    latents = draws[0]
    for k, (time, row) in enumerate(zip(table.timesteps, table.rows, strict=True)):
        fresh = draws[k + 1] if k + 1 < len(table) else np.zeros_like(latents)
        times = np.full(len(seeds), time, dtype=np.float32)
        latents, _ = runtime.step(latents, times, np.tile(row, (len(seeds), 1)), fresh, conditioning)
    return runtime.decode(latents)
