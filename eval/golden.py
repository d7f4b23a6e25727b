"""Golden values: what a published scorer must give on pictures that every machine makes alike.

Weights cannot be shipped, so agreement with published scorers is checked where the weights are. A file of expected
values per metric is compared there, and the sha256 of weights that agreed is noted beside the store; scores under any
other weights are shown as *unverified weights*.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval.errors import EvalError, first_fault
from eval.metrics import create
from eval.metrics.base import Samples
from eval.metrics.preference import KINDS
from eval.prompts import Prompt

GOLDEN = Path(__file__).parent / "golden.yaml"
SEED, COUNT, SIZE = 20_260_101, 8, 256
FRAMES, PAN = 17, 4
"""Of the golden clips; pixels by which each frame lies further right than the one before."""
TEXTS = ("a red cube", "two cats on a sofa", "a castle at night, oil painting", "the letter A")
EXTRACTORS = {
    "fid": "inception-v3",
    "fd-dinov2": "dinov2-vit-l-14",
    "cmmd": "clip-vit-l-14-336",
}
"""Published extractors behind distances; their golden values are lengths of features and cosines to the first ones."""
SCORERS = (*KINDS, "aesthetic")
METRICS = (*SCORERS, *EXTRACTORS)
OF_CLIPS = frozenset({"videoalign"})
"""Scorers that judge motion, and so the golden clips."""
RELATIVE = 1e-3
"""How far a value may be from the expected one, in parts of it: other processors and batches move the sixth digit,
half precision the third."""
_HEADER = "".join(line for line in GOLDEN.read_text().splitlines(keepends=True) if line.startswith("#"))


class Expected(BaseModel):
    """Values of one metric under the weights of one sha256. tolerance: in parts of a value. source: what gave them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str
    values: tuple[float, ...] = Field(min_length=1)
    tolerance: float = Field(gt=0)
    source: str


class Outcome(BaseModel):
    """What became of one metric. text: the reason, or how far values are apart."""

    metric: str
    status: Literal["verified", "differs", "not run", "unknown weights"]
    text: str
    weights: str = ""


def pictures() -> tuple[NDArray[np.uint8], tuple[Prompt, ...]]:
    """(8, 3, 256, 256) uint8 and their prompts: waves and blocks in integers, so that no machine rounds otherwise."""
    rng = np.random.default_rng(SEED)
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    images = np.empty((COUNT, 3, SIZE, SIZE), np.uint8)
    for image in images:
        blocks = rng.integers(0, 256, (3, 8, 8)).repeat(SIZE // 8, 1).repeat(SIZE // 8, 2)
        slopes, shifts = rng.integers(1, 5, (3, 2)), rng.integers(0, 512, 3)
        ramps = np.stack([(a * x + b * y + c) % 512 for (a, b), c in zip(slopes, shifts, strict=True)])
        image[:] = (blocks + np.minimum(ramps, 511 - ramps)) // 2
    return images, tuple(Prompt(f"golden-{i}", TEXTS[i % len(TEXTS)], i) for i in range(COUNT))


def clips() -> tuple[NDArray[np.uint8], tuple[Prompt, ...]]:
    """(8, 17, 3, 256, 256) uint8 and their prompts: the golden pictures, panned by whole pixels."""
    images, prompts = pictures()
    return np.stack([np.roll(images, PAN * frame, axis=-1) for frame in range(FRAMES)], axis=1), prompts


def measure(name: str, folder: Path | None, source: str = "") -> tuple[NDArray[np.float64], str]:
    """Values on the golden pictures, or clips, and the sha256 of the weights. Raises EvalError without them."""
    images, prompts = clips() if name in OF_CLIPS else pictures()
    if name in SCORERS:
        metric = create(name, source=source) if name in KINDS else create(name, folder=folder)
        metric.update(Samples(images, prompts))
        score = metric.compute()
        return score.per_sample, str(score.protocol["weights"])
    from eval.metrics.extractors import load_extractor

    extractor = load_extractor(folder, EXTRACTORS[name])
    features = extractor(images).astype(np.float64)
    sizes = np.linalg.norm(features, axis=1)
    return np.concatenate([sizes, features @ features[0] / (sizes * sizes[0])]), extractor.digest


def read_golden(path: Path = GOLDEN) -> dict[str, list[Expected]]:
    """Expected values by metric. Raises EvalError that names the field at fault."""
    try:
        rows = yaml.safe_load(path.read_text()) or {}
        return {name: [Expected.model_validate(entry) for entry in entries] for name, entries in rows.items()}
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise EvalError(f"{path} cannot be read: {error}; take it from the repository again") from None
    except ValidationError as error:
        raise EvalError(f"{path}: {first_fault(error, Expected)}") from None


def fill(path: Path, name: str, values: NDArray[np.float64], weights: str, source: str) -> None:
    """Add what a trusted machine measured. Raises EvalError where other values are expected of these weights."""
    golden = read_golden(path)
    entries = golden.setdefault(name, [])
    if any(entry.weights == weights for entry in entries):
        raise EvalError(
            f"{path} already holds values of {name} under {weights[:12]}; remove them first to replace them"
        )
    numbers = tuple(float(f"{value:.9g}") for value in values)
    entries.append(Expected(weights=weights, values=numbers, tolerance=RELATIVE, source=source))
    tree = {metric: [entry.model_dump(mode="json") for entry in found] for metric, found in sorted(golden.items())}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(_HEADER + yaml.safe_dump(tree, sort_keys=False, width=120))
    os.replace(temporary, path)


Measure = Callable[[str], tuple[NDArray[np.float64], str]]


def verify(name: str, golden: dict[str, list[Expected]], measured: Measure) -> Outcome:
    """One metric against its expected values; without its weights it is not run, and says why."""
    try:
        values, weights = measured(name)
    except EvalError as error:
        return Outcome(metric=name, status="not run", text=str(error))
    known = next((entry for entry in golden.get(name, []) if entry.weights == weights), None)
    if known is None:
        known_of = ", ".join(entry.weights[:12] for entry in golden.get(name, [])) or "none"
        text = f"no values are known of weights {weights[:12]} (known: {known_of}); see --fill"
        return Outcome(metric=name, status="unknown weights", text=text, weights=weights)
    if len(values) != len(known.values):
        text = f"gives {len(values)} values and {len(known.values)} are expected; fill them again"
        return Outcome(metric=name, status="differs", text=text, weights=weights)
    expected = np.array(known.values)
    apart = np.abs(values - expected) / np.maximum(np.abs(expected), 1e-6)
    worst = int(np.argmax(np.where(np.isfinite(apart), apart, np.inf)))
    text = f"value {worst} is {values[worst]:.6g}, expected {expected[worst]:.6g} ± {100 * known.tolerance:g} %"
    text += f" ({known.source})"
    agrees = bool(apart[worst] <= known.tolerance)
    return Outcome(metric=name, status="verified" if agrees else "differs", text=text, weights=weights)


# --- what has been verified where a store lies ---------------------------------------------------------------------


def record_of(store: Path) -> Path:
    """The file beside a store that says which weights were verified there."""
    return store.parent / "verified-weights.json"


def note(path: Path, outcome: Outcome, about: dict[str, Any]) -> None:
    """Enter verified weights, and strike out what differs now."""
    known = _read(path)
    key = f"{outcome.metric}:{outcome.weights}"
    known.pop(key, None)
    if outcome.status == "verified":
        known[key] = {"at": datetime.now(UTC).isoformat(timespec="seconds"), **about}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(known, indent=1))
    os.replace(temporary, path)


def unverified(metric: str, protocol: dict[str, Any], store: Path) -> bool:
    """Whether a score was given by published weights that have not been verified beside this store."""
    published = metric in SCORERS or (metric in EXTRACTORS and EXTRACTORS[metric] == protocol.get("extractor"))
    return published and f"{metric}:{protocol.get('weights')}" not in _read(record_of(store))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
