"""What all runtimes over compiled graphs share: batches that keep every bit, tokens, warming up.

Batches and bits. A seed must give the same picture alone and beside others, but a matrix library may pick another
kernel for another number of rows and change the last bit. So a batch size is used only if, on this machine, each of
its rows equals the same row computed alone, bit for bit; kernels are chosen by shape, not by values, so random inputs
at load decide it for good. Rows then run in chunks of the sizes that passed; where none but 1 does, rows run one by
one and the promise still holds. Rows that gave the promise up (``configure(exact=False)``) run in the others as well.

Only the step is batched, in powers of two; text and pictures go row by row, and the first picture of a batch is
ready for its encoder while the next one is decoded. Long clips are decoded in pieces, each with what the layers keep of
the one before (see distill.export.wan), in bounded memory and so that the first frames are compressed meanwhile.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distill.bundle import Bundle, BundleError, Engine
from service.runtimes.base import (
    Capabilities,
    Conditioning,
    FixedPrecision,
    Floats,
    Images,
    Lora,
    LoraRefused,
    Runtime,
    RuntimeName,
    Tokens,
    Worn,
)
from service.runtimes.tokenizer import ClipTokenizer, T5Tokenizer

logger = logging.getLogger(__name__)

STEP_INPUTS = ("latents", "timestep", "coefficients", "noise")
CLIP_ROWS = 2
"""Most clips in one step on a CPU, where one alone fills the cores: 305, 612, 1305 and 2673 ms for 1, 2, 4 and 8 of 17
frames of 64×64 by a transformer of 4 M parameters; more of them would only wait for each other, and for the start."""
PIECE = 5
"""Latent frames that are decoded at once: 17 frames of Wan."""


def graph_engine(bundle: Bundle, graph: str, precision: FixedPrecision) -> Engine:
    """The ONNX graph to run: of the step in ``precision``, of the others too where the bundle has it, else float32."""
    wanted = precision if graph == "step" or bundle.engines(graph, "onnx", precision) else "float32"
    return bundle.engine(graph, "onnx", wanted)


class Graph(Protocol):
    """One graph of a bundle, ready to run."""

    @property
    def inputs(self) -> frozenset[str]:
        """Names of what it reads."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it gives, as the manifest lists them."""
        ...

    def run(self, feed: Conditioning) -> list[NDArray[np.generic]]:
        """Its outputs for any number of rows; the arrays belong to the caller."""
        ...


class GraphRuntime(ABC):
    """The contract of service.runtimes.base.Runtime. Not for several threads at once: one engine owns one runtime."""

    name: RuntimeName
    device = "cpu"

    def __init__(self, bundle: Bundle, *, threads: int, max_batch: int, precision: FixedPrecision) -> None:
        """Load, check and warm up every graph. Raises BundleError when the bundle lacks one or it does not load."""
        self.manifest, self.threads, self.precision = bundle.manifest, threads, precision
        self._step = self._load(bundle, "step")
        self._decoder = self._load(bundle, "decoder")
        self._continued = self._load(bundle, "decoder_next") if self.manifest.frames else None
        self._text: Graph | None = None
        self._tokenizer: ClipTokenizer | T5Tokenizer | None = None
        if self.manifest.max_tokens is not None:
            self._text = self._load(bundle, "text_encoder")
            kind = T5Tokenizer if "attention_mask" in self._text.inputs else ClipTokenizer
            self._tokenizer = kind(bundle, self.manifest.max_tokens)
        expected = {*STEP_INPUTS, *(self._text.outputs if self._text else ("labels",))}
        if self._step.inputs != expected:
            raise BundleError(
                f"{bundle.path}: the step graph reads {sorted(self._step.inputs)}, not {sorted(expected)}; "
                "export the bundle again"
            )
        alone = self.manifest.frames and self.device == "cpu"
        exact, every = self._calibrate(min(max_batch, CLIP_ROWS) if alone else max_batch)
        self._sizes = tuple(exact)
        room = None if self._tokenizer is None else self._tokenizer.room
        loose = every if len(every) > len(exact) else {}
        self.capabilities = Capabilities(
            self.name,
            self.version(),
            precision,
            self.device,
            threads,
            tuple(exact),
            tuple(exact.values()),
            room,
            loose_sizes=tuple(loose),
            loose_ms=tuple(loose.values()),
        )

    @abstractmethod
    def version(self) -> str:
        """Of the package that computes."""

    @abstractmethod
    def _load(self, bundle: Bundle, graph: str) -> Graph:
        """Raises BundleError when the bundle lacks the graph or it does not load."""

    def read_lora(self, data: bytes) -> Lora:
        raise LoraRefused(f"{self.manifest.name} runs on {self.name}, which takes no LoRAs; set LEAPFROG_RUNTIME=torch")

    def configure(self, *, exact: bool = True, loras: Worn = ()) -> None:
        able = self.capabilities
        assert able.loras or not loras, f"{self.name} cannot have read a LoRA"
        self._sizes = able.batch_sizes if exact else able.loose_sizes or able.batch_sizes

    def lane(self) -> Runtime | None:
        return None

    def memory(self) -> dict[str, int]:
        return {}

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        if self._tokenizer is None:
            raise ValueError(f"{self.manifest.name} takes labels, not prompts; pass {{'labels': ids}} as conditioning")
        return self._tokenizer(prompts)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """{"prompt_embeds": (B, L, D), "pooled": (B, P)} float32; longer prompts are cut, see tokenize.

        Wan has no pooled embedding, and zeros beyond a prompt's end.
        """
        tokens, text = self.tokenize(prompts), self._text
        assert text is not None, "a tokenizer comes with a text encoder"
        feed = {"input_ids": tokens.ids, "attention_mask": tokens.mask}
        rows = [text.run({name: feed[name][i : i + 1] for name in text.inputs}) for i in range(len(tokens.ids))]
        return {name: np.concatenate([row[k] for row in rows]) for k, name in enumerate(text.outputs)}

    def step(
        self, latents: Floats, timestep: Floats, coefficients: Floats, noise: Floats, conditioning: Conditioning
    ) -> tuple[Floats, Floats]:
        feed: Conditioning = dict(zip(STEP_INPUTS, (latents, timestep, coefficients, noise), strict=True))
        feed |= conditioning
        parts, start = [], 0
        while start < len(latents):
            size = next(s for s in reversed(self._sizes) if s <= len(latents) - start)
            parts.append(self._run_step(feed, slice(start, start + size)))
            start += size
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def decode(self, latents: Floats) -> Images:
        each = (latents[i : i + 1] for i in range(len(latents)))
        if self._continued is not None:
            return np.stack([np.concatenate(list(self.frames(clip))) for clip in each])
        rows = [self._decoder.run({"latents": picture})[0] for picture in each]
        return np.concatenate(rows).astype(np.uint8, copy=False)

    def frames(self, latents: Floats) -> Iterator[Images]:
        """The first piece is the shorter one, so that all others have one shape, which is compiled once."""
        if self._continued is None:
            raise ValueError(f"{self.manifest.name} draws pictures; call decode")
        first = (latents.shape[2] - 1) % PIECE + 1
        image, *kept = self._decoder.run({"latents": latents[:, :, :first]})
        yield image[0].astype(np.uint8, copy=False)
        for start in range(first, latents.shape[2], PIECE):
            past = {f"past_{i}": value for i, value in enumerate(kept)}
            image, *kept = self._continued.run({"latents": latents[:, :, start : start + PIECE]} | past)
            yield image[0].astype(np.uint8, copy=False)

    def _run_step(self, feed: Conditioning, rows: slice) -> list[Floats]:
        outputs = self._step.run({name: value[rows] for name, value in feed.items()})
        return [output.astype(np.float32, copy=False) for output in outputs]

    def _calibrate(self, max_batch: int) -> tuple[dict[int, float], dict[int, float]]:
        """Milliseconds of a step by batch size (powers of two, from 1): of those that are bit-exact, and of all."""
        feed = self._random_feed(max_batch)
        solo = [self._run_step(feed, slice(i, i + 1)) for i in range(max_batch)]
        every, size = {1: self._time_step(feed, 1)}, 2
        inexact: list[int] = []
        while size <= max_batch:
            together = self._run_step(feed, slice(0, size))
            exact = all(
                np.array_equal(output[i], solo[i][k][0], equal_nan=True)
                for k, output in enumerate(together)
                for i in range(size)
            )
            every[size] = self._time_step(feed, size)
            if not exact:
                inexact.append(size)
            size *= 2
        if inexact:
            told = f"batches of {', '.join(map(str, inexact))} change the last bit here"
            logger.warning("%s: %s and are only used for requests with deterministic: false", self.manifest.name, told)
        self.decode(feed["latents"][:1].astype(np.float32))
        return {size: ms for size, ms in every.items() if size not in inexact}, every

    def _time_step(self, feed: Conditioning, size: int) -> float:
        start = time.perf_counter()
        self._run_step(feed, slice(0, size))
        return round((time.perf_counter() - start) * 1e3, 2)

    def _random_feed(self, rows: int) -> Conditioning:
        random = np.random.default_rng(0)
        shape = (rows, *self.manifest.latent_shape())
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
