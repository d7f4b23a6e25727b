"""ONNX Runtime on the CPU.

Batches and bits. A seed must give the same picture alone and beside others, but a matrix library may pick another
kernel for another number of rows and change the last bit. So a batch size is used only if, on this machine, each of
its rows equals the same row computed alone, bit for bit; kernels are chosen by shape, not by values, so random inputs
at load decide it for good. Rows then run in chunks of the sizes that passed. On x86 with AVX-512 (onnxruntime 1.32)
every size passes; where none but 1 does, rows run one by one and the promise still holds.

What batching buys (UNet of 22 M parameters on 16x16 latents, 2 cores, milliseconds per row at 1, 2, 4, 8, 16 rows):
step 22.0, 18.6, 16.7, 16.3, 16.8; text encoder 1.6, 1.3, 1.3, 1.3, 1.2; decoder 10.5, 10.5, 10.7, 11.0, 11.1.
The gain never turns into a loss, so sizes are not chosen by a timing at load, which a busy machine would spoil.
Only the step is batched, in powers of two; text and pictures go row by row, and the first picture of a batch is
ready for its encoder while the next one is decoded.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

from distill.bundle import Bundle, BundleError
from service.runtimes.base import Capabilities, Conditioning, Floats, Images, Tokens, latent_shape

logger = logging.getLogger(__name__)

STEP_INPUTS = ("latents", "timestep", "coefficients", "noise")


class OnnxRuntime:
    """The contract of service.runtimes.base.Runtime. Not for several threads at once: one engine owns one runtime."""

    def __init__(self, bundle: Bundle, *, threads: int, max_batch: int) -> None:
        """Load, check and warm up every graph. Raises BundleError when the bundle lacks one or it does not load."""
        self.manifest = bundle.manifest
        self._step = _session(bundle, "step", threads)
        self._decoder = _session(bundle, "decoder", threads)
        self._text = self._tokenizer = None
        if self.manifest.max_tokens is not None:
            self._text = _session(bundle, "text_encoder", threads)
            self._tokenizer = ClipTokenizer(bundle, self.manifest.max_tokens)
        expected = {*STEP_INPUTS, *(("prompt_embeds", "pooled") if self._text else ("labels",))}
        found = {entry.name for entry in self._step.get_inputs()}
        if found != expected:
            raise BundleError(
                f"{bundle.path}: the step graph reads {sorted(found)}, not {sorted(expected)}; export the bundle again"
            )
        sizes, step_ms = self._calibrate(max_batch)
        self.capabilities = Capabilities("onnx", "cpu", threads, sizes, step_ms)

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        if self._tokenizer is None:
            raise ValueError(f"{self.manifest.name} takes labels, not prompts; pass {{'labels': ids}} as conditioning")
        return self._tokenizer(prompts)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """{"prompt_embeds": (B, L, D), "pooled": (B, P)} float32; longer prompts are cut, see tokenize."""
        ids = self.tokenize(prompts).ids
        assert self._text is not None, "a tokenizer comes with a text encoder"
        rows = [self._text.run(("prompt_embeds", "pooled"), {"input_ids": ids[i : i + 1]}) for i in range(len(ids))]
        return {"prompt_embeds": np.concatenate([r[0] for r in rows]), "pooled": np.concatenate([r[1] for r in rows])}

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
        rows = [self._decoder.run(("image",), {"latents": latents[i : i + 1]})[0] for i in range(len(latents))]
        return np.concatenate(rows)

    def _run_step(self, feed: Conditioning, rows: slice) -> list[Floats]:
        outputs: list[Floats] = self._step.run(("next", "x0"), {name: value[rows] for name, value in feed.items()})
        return outputs

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


class ClipTokenizer:
    """CLIP's prompt form: begin, tokens, end, padded with the end token to a fixed length."""

    BEGIN, END = "<|startoftext|>", "<|endoftext|>"

    def __init__(self, bundle: Bundle, max_tokens: int) -> None:
        path = bundle.file("tokenizer/tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"{path} does not load: {error}; write the bundle again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        begin, end = (self._tokenizer.token_to_id(token) for token in (self.BEGIN, self.END))
        if begin is None or end is None:
            raise BundleError(f"{path} lacks {self.BEGIN} or {self.END}; write the bundle again")
        self._begin, self._end, self._max_tokens = begin, end, max_tokens

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        room = self._max_tokens - 2
        ids: NDArray[np.int64] = np.full((len(prompts), self._max_tokens), self._end, dtype=np.int64)
        encoded = [self._tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
        for row, tokens in zip(ids, encoded, strict=True):
            row[0] = self._begin
            row[1 : 1 + min(len(tokens), room)] = tokens[:room]
        counts = tuple(len(tokens) for tokens in encoded)
        return Tokens(ids, counts, tuple(min(count, room) for count in counts))


def _session(bundle: Bundle, graph: str, threads: int) -> ort.InferenceSession:
    path = bundle.file(bundle.engine(graph).file)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads would take the cores from the HTTP and encoding threads between two steps.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes derive from Exception alone
        first = str(error).splitlines()[0]
        raise BundleError(f"{path} does not load in onnxruntime: {first}; export the bundle again") from None
