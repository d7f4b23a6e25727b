"""What an export will take, before it is done: bytes on the disk and in memory, and seconds. For --dry-run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

SECONDS_PER_LAYER = 0.06
"""Of tracing and translating, which do not depend on widths: SD1.5's UNet has 686 layers and took 39 s on 2 cores."""
GRAPH_BYTES_PER_LAYER = 1000
"""Of nodes, and of what is too small to be read from elsewhere: 131 kB for the 151 layers of scenes-sdxl's UNet."""
BYTES_PER_SECOND = 2e8
"""Of converting, writing, hashing and reading weights."""
MEMORY = 4 * 1.3
"""Bytes per parameter at the peak: float32 weights, and what the exporter and the file's buffers add."""


@dataclass(frozen=True)
class Estimate:
    """One graph's export."""

    name: str
    parameters: int
    file_bytes: int
    memory_bytes: int
    duration_s: float

    def __str__(self) -> str:
        return (
            f"{self.name:14}{self.parameters / 1e6:10.1f} M parameters{self.file_bytes / 1e6:10.1f} MB on disk"
            f"{self.memory_bytes / 1e9:8.2f} GB in memory   about {self.duration_s:.0f} s"
        )


def estimate(name: str, module: nn.Module, *, shared: bool) -> Estimate:
    """Of a module on any device, the meta device too. shared: its weights lie on the disk already, as a bundle's."""
    parameters = sum(parameter.numel() for parameter in module.parameters())
    layers = sum(1 for layer in module.modules() if not any(True for _ in layer.children()))
    weights = 2 * parameters
    file_bytes = layers * GRAPH_BYTES_PER_LAYER + (0 if shared else weights)
    seconds = layers * SECONDS_PER_LAYER + weights / BYTES_PER_SECOND
    return Estimate(name, parameters, file_bytes, int(MEMORY * parameters), seconds)


def report(rows: Iterable[Estimate]) -> list[str]:
    """Lines of a table with the sum; memory is that of the largest graph, as they are compiled one by one."""
    listed = list(rows)
    whole = Estimate(
        "all",
        sum(row.parameters for row in listed),
        sum(row.file_bytes for row in listed),
        max(row.memory_bytes for row in listed),
        sum(row.duration_s for row in listed),
    )
    return [str(row) for row in (*listed, whole)]
