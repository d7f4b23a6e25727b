"""What all runtimes over compiled graphs share: batches that keep every bit, tokens, warming up.

Batches and bits. A seed must give the same picture alone and beside others, but a matrix library may pick another
kernel for another number of rows and change the last bit. So a batch size is used only if, on this machine, each of
its rows equals the same row computed alone, bit for bit; kernels are chosen by shape, not by values, so random inputs
at load decide it for good. Rows then run in chunks of the sizes that passed; where none but 1 does, rows run one by
one and the promise still holds.

Only the step is batched, in powers of two; text and pictures go row by row, and the first picture of a batch is
ready for its encoder while the next one is decoded.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from distill.bundle import Bundle, BundleError
from service.runtimes.base import (
    Capabilities,
    Conditioning,
    FixedPrecision,
    Floats,
    Images,
    RuntimeName,
    Tokens,
    latent_shape,
)
from service.runtimes.tokenizer import ClipTokenizer

logger = logging.getLogger(__name__)

STEP_INPUTS = ("latents", "timestep", "coefficients", "noise")
OUTPUTS = {"text_encoder": ("prompt_embeds", "pooled"), "step": ("next", "x0"), "decoder": ("image",)}
"""By graph, in the order in which Graph.run returns them; see distill.export.graphs."""


class Graph(Protocol):
    """One graph of a bundle, ready to run."""

    @property
    def inputs(self) -> frozenset[str]:
        """Names of what it reads."""
        ...

    def run(self, feed: Conditioning) -> list[NDArray[np.generic]]:
        """Its OUTPUTS for any number of rows; the arrays belong to the caller."""
        ...


class GraphRuntime(ABC):
    """The contract of service.runtimes.base.Runtime. Not for several threads at once: one engine owns one runtime."""

    name: ClassVar[RuntimeName]

    def __init__(self, bundle: Bundle, *, threads: int, max_batch: int, precision: FixedPrecision) -> None:
        """Load, check and warm up every graph. Raises BundleError when the bundle lacks one or it does not load."""
        self.manifest, self.threads, self.precision = bundle.manifest, threads, precision
        self._step = self._load(bundle, "step")
        self._decoder = self._load(bundle, "decoder")
        self._text = self._tokenizer = None
        if self.manifest.max_tokens is not None:
            self._text = self._load(bundle, "text_encoder")
            self._tokenizer = ClipTokenizer(bundle, self.manifest.max_tokens)
        expected = {*STEP_INPUTS, *(OUTPUTS["text_encoder"] if self._text else ("labels",))}
        if self._step.inputs != expected:
            raise BundleError(
                f"{bundle.path}: the step graph reads {sorted(self._step.inputs)}, not {sorted(expected)}; "
                "export the bundle again"
            )
        sizes, step_ms = self._calibrate(max_batch)
        self.capabilities = Capabilities(self.name, self.version(), precision, "cpu", threads, sizes, step_ms)

    @staticmethod
    @abstractmethod
    def version() -> str:
        """Of the package that computes."""

    @abstractmethod
    def _load(self, bundle: Bundle, graph: str) -> Graph:
        """Raises BundleError when the bundle lacks the graph or it does not load."""

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        if self._tokenizer is None:
            raise ValueError(f"{self.manifest.name} takes labels, not prompts; pass {{'labels': ids}} as conditioning")
        return self._tokenizer(prompts)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """{"prompt_embeds": (B, L, D), "pooled": (B, P)} float32; longer prompts are cut, see tokenize."""
        ids = self.tokenize(prompts).ids
        assert self._text is not None, "a tokenizer comes with a text encoder"
        rows = [self._text.run({"input_ids": ids[i : i + 1]}) for i in range(len(ids))]
        return {name: np.concatenate([row[k] for row in rows]) for k, name in enumerate(OUTPUTS["text_encoder"])}

    def step(
        self, latents: Floats, timestep: Floats, coefficients: Floats, noise: Floats, conditioning: Conditioning
    ) -> tuple[Floats, Floats]:
        feed: Conditioning = dict(zip(STEP_INPUTS, (latents, timestep, coefficients, noise), strict=True))
        feed |= conditioning
        parts, start = [], 0
        while start < len(latents):
            size = next(s for s in reversed(self.capabilities.batch_sizes) if s <= len(latents) - start)
            parts.append(self._run_step(feed, slice(start, start + size)))
            start += size
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def decode(self, latents: Floats) -> Images:
        rows = [self._decoder.run({"latents": latents[i : i + 1]})[0] for i in range(len(latents))]
        return np.concatenate(rows).astype(np.uint8, copy=False)

    def _run_step(self, feed: Conditioning, rows: slice) -> list[Floats]:
        outputs = self._step.run({name: value[rows] for name, value in feed.items()})
        return [output.astype(np.float32, copy=False) for output in outputs]

    def _calibrate(self, max_batch: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Batch sizes (powers of two, from 1) that are bit-exact, with the milliseconds of one step each."""
        feed = self._random_feed(max_batch)
        solo = [self._run_step(feed, slice(i, i + 1)) for i in range(max_batch)]
        sizes, step_ms, size = [1], [self._time_step(feed, 1)], 2
        while size <= max_batch:
            together = self._run_step(feed, slice(0, size))
            exact = all(
                np.array_equal(output[i], solo[i][k][0], equal_nan=True)
                for k, output in enumerate(together)
                for i in range(size)
            )
            if exact:
                sizes.append(size)
                step_ms.append(self._time_step(feed, size))
            else:
                logger.warning("%s: batches of %d change the last bit here and are not used", self.manifest.name, size)
            size *= 2
        self.decode(feed["latents"][:1].astype(np.float32))
        return tuple(sizes), tuple(round(ms, 2) for ms in step_ms)

    def _time_step(self, feed: Conditioning, size: int) -> float:
        start = time.perf_counter()
        self._run_step(feed, slice(0, size))
        return (time.perf_counter() - start) * 1e3

    def _random_feed(self, rows: int) -> Conditioning:
        random = np.random.default_rng(0)
        shape = (rows, *latent_shape(self.manifest, self.manifest.sizes[0]))
        samplers = [s.table() for s in self.manifest.samplers.values()]
        times = np.concatenate([s.timesteps for s in samplers])
        coefficients = np.concatenate([s.rows for s in samplers])
        pick = np.arange(rows) % len(times)
        conditioning: Conditioning = {"labels": np.zeros(rows, dtype=np.int64)}
        if self._text is not None:
            words = self.manifest.examples or ("a picture",)
            conditioning = self.encode_text([words[i % len(words)] for i in range(rows)])
        return {
            "latents": random.standard_normal(shape, dtype=np.float32),
            "timestep": times[pick],
            "coefficients": coefficients[pick],
            "noise": random.standard_normal(shape, dtype=np.float32),
            **conditioning,
        }
