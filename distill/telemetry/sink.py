"""Where telemetry goes: one JSON line per interval, TensorBoard, and previews as PNG.

A value is a mean over its interval if it is a float or a tensor without dimensions; a tensor of samples adds a
histogram; a Total and a Count are summed; Some tells the mean of the samples that it chooses, if any. Values that are
not finite are counted and left out of means. Tensors stay on their device until the interval is told: looking at one
waits for it.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

BINS = 16


class Total(float):
    """A float that is summed over an interval: passes, seconds."""


class Some(NamedTuple):
    """The mean of those values (B,) that a mask (B,) chooses, chosen when it is told; nothing where there are none."""

    values: Tensor
    mask: Tensor


class Count(NamedTuple):
    """How many of a mask are true, counted when it is told and summed over an interval."""

    mask: Tensor


Value = Tensor | float | Some | Count


def on_host(telemetry: Mapping[str, Sequence[Value]]) -> dict[str, list[Value]]:
    """Values that can travel, without graphs and devices; those of a device come in one copy per dtype."""
    found = [part for several in telemetry.values() for value in several for part in _tensors(value)]
    host = {id(tensor): moved for tensor, moved in zip(found, fetched(found), strict=True)}

    def placed(value: Value) -> Value:
        parts = [host[id(part)] for part in _tensors(value)]
        return type(value)(*parts) if isinstance(value, Some | Count) else parts[0] if parts else value

    return {name: [placed(value) for value in several] for name, several in telemetry.items()}


def fetched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors on the host, without graphs."""
    host, away = [tensor.detach() for tensor in tensors], dict[tuple[torch.device, torch.dtype], list[int]]()
    for i, tensor in enumerate(host):
        if tensor.device.type != "cpu":
            away.setdefault((tensor.device, tensor.dtype), []).append(i)
    for indices in away.values():
        flat = torch.cat([host[i].reshape(-1) for i in indices]).cpu()
        for i, part in zip(indices, flat.split([host[i].numel() for i in indices]), strict=True):
            host[i] = part.reshape(host[i].shape)
    return host


def _tensors(value: Value) -> tuple[Tensor, ...]:
    if isinstance(value, Some | Count):
        return value
    return (value,) if isinstance(value, Tensor) else ()


class Sink:
    """``add`` what each iteration tells, ``flush`` once per interval."""

    def __init__(self, folder: Path, iteration: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TensorBoard's own deprecations on import
            from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.file = (folder / "log.jsonl").open("a")
        self.values: dict[str, list[Value]] = {}
        self._restart(iteration)

    def add(self, telemetry: Mapping[str, Sequence[Value]]) -> None:
        for name, values in telemetry.items():
            self.values.setdefault(name, []).extend(values)

    def flush(self, iteration: int, batch_size: int) -> dict[str, str]:
        """Write one line; the losses as text for the progress bar."""
        numbers, histograms, faults = summary(self.values)
        elapsed = max(time.monotonic() - self.wall, 1e-9)
        numbers |= {
            "samples_per_second": (iteration - self.since) * batch_size / elapsed,
            "seconds": elapsed,
            "cpu_seconds": time.process_time() - self.cpu,
        }
        line: dict[str, Any] = {"iteration": iteration, "time": time.time()}
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line |= {"histograms": histograms} if histograms else {}
        line |= {"not_finite": faults} if faults else {}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, iteration)
        for name in histograms:
            values = pooled(self.values[name])
            self.writer.add_histogram(f"histograms/{name}", values[np.isfinite(values)], iteration)
        self._restart(iteration)
        return {k: f"{v:.4g}" for k, v in numbers.items() if k.endswith("loss")}

    def picture(self, iteration: int, images: Tensor) -> None:
        path = self.folder / "previews" / f"{iteration:07d}.png"
        path.parent.mkdir(exist_ok=True)
        sheet = grid(images)
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)
        self.writer.add_image("preview", sheet, iteration)

    def close(self) -> None:
        self.file.close()
        self.writer.close()

    def _restart(self, iteration: int) -> None:
        self.values, self.since = {}, iteration
        self.wall, self.cpu = time.monotonic(), time.process_time()


def summary(
    values: Mapping[str, Sequence[Value]],
) -> tuple[dict[str, float], dict[str, list[Any]], dict[str, int]]:
    """(means and totals, histograms, counts of values that are not finite) by name.

    A mean without any finite value is NaN. A histogram is [least, greatest, counts of BINS equal bins].
    """
    numbers, histograms, faults = dict[str, float](), dict[str, list[Any]](), dict[str, int]()
    for name, several in values.items():
        array = pooled(several)
        if not len(array):
            continue
        finite = array[np.isfinite(array)]
        if len(finite) < len(array):
            faults[name] = len(array) - len(finite)
        total = any(isinstance(value, Total | Count) for value in several)
        numbers[name] = float((finite.sum() if total else finite.mean()) if len(finite) else math.nan)
        if len(finite) and any(isinstance(value, Tensor) and value.ndim for value in several):
            histograms[name] = histogram(finite)
    return numbers, histograms, faults


def pooled(values: Sequence[Value]) -> NDArray[np.float64]:
    """All numbers of several values in one row."""
    return np.concatenate([_row(value) for value in values]).astype(np.float64)


def _row(value: Value) -> NDArray[np.float64]:
    if isinstance(value, Some):
        value = value.values[value.mask].mean().reshape(-1)[: int(value.mask.any())]
    if isinstance(value, Count):
        value = value.mask.sum()
    return value.detach().double().cpu().reshape(-1).numpy() if isinstance(value, Tensor) else np.array([value])


def histogram(values: NDArray[np.float64]) -> list[Any]:
    """[least, greatest, counts] of finite values; a single bin where all are equal."""
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-12 * max(1.0, abs(low)):
        return [low, low, [len(values)]]
    counts, _ = np.histogram(values, BINS, (low, high))
    return [low, high, counts.tolist()]


def grid(images: Tensor, columns: int = 8) -> Tensor:
    """(N, C, H, W) uint8 to one RGB picture (3, height, width); missing cells are black, gray lines lie between cells.

    Without the lines small pictures on black, such as digits, run into each other.
    """
    n, c, h, w = images.shape
    rows, line = -(-n // columns), max(1, h // 16)
    cells = torch.full((rows * columns, 3, h + line, w + line), 96, dtype=torch.uint8)
    cells[:, :, :h, :w] = 0
    cells[:n, :, :h, :w] = images.expand(n, 3, h, w) if c == 1 else images
    sheet = cells.view(rows, columns, 3, h + line, w + line).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2)
    return sheet[:, :-line, :-line]
