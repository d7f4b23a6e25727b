"""Known damage to a bundle: the canaries that show each night that its metrics can still see.

    source = damaged(open_source("bundles/scenes-sdxl", steps=4), "prompt-ignored")

A damaged source makes pictures or clips as the bundle would if it were broken in one way, by a known amount. Its
identity says so, hence they are cached beside, never instead of, the real ones. Damages named frames-… are for clips.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.bundle import Bundle, Manifest, Sampler, write_manifest
from eval.errors import EvalError, nearest
from eval.prompts import Draw, Prompt, digit_prompt, scene_prompt
from eval.sources import BundleSource, Source

Images = NDArray[np.uint8]
Tamper = Callable[[Source, Sequence[Prompt]], Images]


class Damaged:
    """A source whose prompts or pictures are tampered with on the way in or out."""

    def __init__(self, source: Source, damage: str, tamper: Tamper) -> None:
        self._source, self._tamper = source, tamper
        self.name = f"{source.name}, {damage}"
        self.identity = None if source.identity is None else {**source.identity, "damage": damage}
        self.about = source.about

    def make(self, prompts: Sequence[Prompt]) -> Images:
        return self._tamper(self._source, prompts)


def _prompt_ignored(source: Source, prompts: Sequence[Prompt]) -> Images:
    """Every sample is asked for another prompt, drawn by its own key, so that batches do not matter."""
    return source.make([_another(prompt) for prompt in prompts])


def _another(prompt: Prompt) -> Prompt:
    stream = zlib.crc32(repr(prompt.key).encode()) % 1_000_000
    draw = Draw(seed=7_999_999, count=1, things=(1, 2))
    if prompt.label is not None:
        wrong = digit_prompt(draw, prompt.label + 1 + stream % 9, prompt.seed)
        return replace(prompt, text=wrong.text, label=wrong.label)
    return replace(prompt, text=scene_prompt(draw, stream, prompt.seed, moving=prompt.moving).text)


def _seed_ignored(source: Source, prompts: Sequence[Prompt]) -> Images:
    """All samples of a prompt are one picture."""
    return source.make([replace(prompt, seed=7_000_000) for prompt in prompts])


def _channels_swapped(source: Source, prompts: Sequence[Prompt]) -> Images:
    """Red and blue change places."""
    return np.ascontiguousarray(np.flip(source.make(prompts), -3))


def _greyed(source: Source, prompts: Sequence[Prompt]) -> Images:
    """Colour is gone: every channel is the mean of the three."""
    images = source.make(prompts).astype(np.uint16)
    return np.repeat((images.sum(axis=-3, keepdims=True) + 1) // 3, 3, axis=-3).astype(np.uint8)


def _mode_dropped(source: Source, prompts: Sequence[Prompt]) -> Images:
    """One kind is never made: who asks for a nine gets a four, who asks for a cylinder gets a cube."""
    return source.make([_without_mode(prompt) for prompt in prompts])


def _without_mode(prompt: Prompt) -> Prompt:
    if prompt.label is not None:
        lost, instead = LOST_DIGIT
        return replace(prompt, text=str(instead), label=instead) if prompt.label == lost else prompt
    lost_thing, other = LOST_THING
    return replace(prompt, text=prompt.text.replace(lost_thing, other))


def _blurred(source: Source, prompts: Sequence[Prompt]) -> Images:
    """A mean over 3 × 3 pixels."""
    made = source.make(prompts).astype(np.uint16)
    images = np.pad(made, (*[(0, 0)] * (made.ndim - 2), (1, 1), (1, 1)), mode="edge")
    height, width = made.shape[-2:]
    shifted = [images[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.asarray((np.sum(shifted, axis=0) + 4) // 9, dtype=np.uint8)


def _of_frames(damage: str) -> Tamper:
    """Damage to the frames of each clip, drawn by its own key, so that batches do not matter."""

    def tamper(source: Source, prompts: Sequence[Prompt]) -> Images:
        clips = source.make(prompts)
        if clips.ndim != 5:
            raise EvalError(f"{damage} is damage to clips and {source.name} makes pictures; give a bundle of videos")
        seeds = [zlib.crc32(repr(prompt.key).encode()) for prompt in prompts]
        return np.stack([damaged_clip(clip, damage, seed) for clip, seed in zip(clips, seeds, strict=True)])

    return tamper


# --- clips ---------------------------------------------------------------------------------------------------------

FLICKER = 12
"""frames-flickering: levels by which every second frame is brighter."""


def _frozen(frames: Images, rng: np.random.Generator) -> Images:
    """Every frame is the first one."""
    return np.repeat(frames[:1], len(frames), axis=0)


def _shuffled(frames: Images, rng: np.random.Generator) -> Images:
    """Frames in an order in which none stays in its place: a random cycle through all of them."""
    cycle = rng.permutation(len(frames))
    order = np.empty(len(frames), dtype=np.int64)
    order[cycle] = np.roll(cycle, 1)
    return np.asarray(frames[order])


def _backwards(frames: Images, rng: np.random.Generator) -> Images:
    """The last frame comes first."""
    return np.ascontiguousarray(frames[::-1])


def _flickering(frames: Images, rng: np.random.Generator) -> Images:
    """Every second frame is FLICKER levels brighter, up to white."""
    brighter = FLICKER * (np.arange(len(frames)) % 2).reshape(-1, 1, 1, 1)
    return np.asarray(np.minimum(frames.astype(np.int64) + brighter, 255), dtype=np.uint8)


CLIP_DAMAGES = {
    "frames-frozen": _frozen,
    "frames-shuffled": _shuffled,
    "frames-backwards": _backwards,
    "frames-flickering": _flickering,
}


def damaged_clip(frames: Images, damage: str, seed: int = 0) -> Images:
    """A clip (F, 3, H, W) uint8 with one damage, the same for the same seed."""
    if damage not in CLIP_DAMAGES:
        raise EvalError(f"damage {damage!r} of clips is unknown; {nearest(damage, CLIP_DAMAGES)}")
    if len(frames) < 2:
        raise EvalError(f"a clip of {len(frames)} frames has no order to damage; give at least 2")
    made: Images = CLIP_DAMAGES[damage](frames, np.random.default_rng(seed))
    return made


# --- by name -------------------------------------------------------------------------------------------------------

_TAMPERS: dict[str, Tamper] = {
    "prompt-ignored": _prompt_ignored,
    "seed-ignored": _seed_ignored,
    "channels-swapped": _channels_swapped,
    "greyed": _greyed,
    "blurred": _blurred,
    "mode-dropped": _mode_dropped,
    **{damage: _of_frames(damage) for damage in CLIP_DAMAGES},
}
LOST_DIGIT, LOST_THING = (9, 4), ("cylinder", "cube")
"""mode-dropped: what is never made, and what is made instead."""
NOISES = {"weights-noised-slightly": 0.1, "weights-noised": 0.25, "weights-noised-strongly": 0.5}
"""Standard deviation of the noise in standard deviations of each weight matrix."""
_IN_THE_BUNDLE = (*NOISES, "step-dropped", "weights-coarse")
LEVELS = 16
"""weights-coarse: how many values a weight matrix keeps, as an int4 without groups would."""
DAMAGES = (*_TAMPERS, *_IN_THE_BUNDLE)


def damaged(source: Source, damage: str, folder: Path | None = None) -> Source:
    """The source with one damage. folder: where a damaged copy of the bundle is written, for damage to weights."""
    if damage in _TAMPERS:
        return Damaged(source, damage, _TAMPERS[damage])
    if damage not in _IN_THE_BUNDLE:
        raise EvalError(f"damage {damage!r} is unknown; {nearest(damage, DAMAGES)}")
    if not isinstance(source, BundleSource):
        raise EvalError(f"{damage} needs the weights and {source.name} has none here; give a bundle")
    if damage == "step-dropped":
        return source.sampled_by(drop_step(source.manifest, source.steps), damage)
    if folder is None:
        raise EvalError(f"{damage} writes a damaged bundle and has no folder for it; give one")
    change = noised(NOISES[damage]) if damage in NOISES else _coarse
    path = damage_weights(source.path, folder / f"{source.path.name}-{damage}", change)
    other = source.reopened(path)
    assert other.identity is not None
    other.name, other.identity["damage"] = f"{source.name}, {damage}", damage
    return other


def drop_step(manifest: Manifest, steps: int) -> Manifest:
    """The manifest without the update of a middle step: x' = x, so the next one finds more noise than it expects.

    A sampler of one step has no middle; its noise is what comes out.
    """
    sampler = manifest.samplers[steps]
    rows = list(sampler.rows)
    p, q, *_ = rows[steps // 2]
    rows[steps // 2] = (p, q, 0.0, 1.0, 0.0)
    broken = Sampler(timesteps=sampler.timesteps, rows=tuple(rows))
    return manifest.model_copy(update={"samplers": {**manifest.samplers, steps: broken}})


Change = Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]]


def noised(amount: float, seed: int = 0) -> Change:
    """Noise of ``amount`` standard deviations of a matrix; another seed draws other noise."""

    def change(weights: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
        drawn = np.random.default_rng((seed, int(rng.integers(2**32)))) if seed else rng
        return np.asarray(weights + amount * weights.std() * drawn.standard_normal(weights.shape))

    return change


def _coarse(weights: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    step = 2 * float(np.abs(weights).max()) / (LEVELS - 1)
    return weights if step == 0 else np.round(weights / step) * step


def damage_weights(bundle: Path, out: Path, change: Change) -> Path:
    """A copy of a bundle whose step graph has every weight matrix changed; seeded, with a valid manifest.

    Raises EvalError when the graph holds no matrices to damage.
    """
    import onnx
    from onnx import numpy_helper

    opened = Bundle.open(bundle)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(bundle, out)
    path = out / opened.engine("step").file
    model = onnx.load(path)
    changed = 0
    for tensor in model.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.ndim < 2 or weights.dtype not in (np.float16, np.float32):
            continue
        rng = np.random.default_rng(zlib.crc32(tensor.name.encode()))
        values = change(weights.astype(np.float64), rng).astype(weights.dtype)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        changed += 1
    if not changed:
        raise EvalError(f"{path} holds no weight matrices, so there is nothing to damage; export the bundle again")
    onnx.save(model, path)
    write_manifest(out, opened.manifest)
    return out
