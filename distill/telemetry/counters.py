"""What training costs: rows that pass forward through each network, counted by hooks on the modules."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from distill.telemetry.sink import Total


class Passes:
    """Counts samples per forward call of named networks, until they are taken. A guided teacher counts twice."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.rows: Counter[str] = Counter()
        self.silent = False
        for name, network in networks.items():
            self.watch(name, network)

    def watch(self, name: str, network: nn.Module) -> None:
        """Count a further network's rows as ``name``'s."""
        network.register_forward_pre_hook(self._counting(name), with_kwargs=True)

    def count(self, name: str, rows: int) -> None:
        if not self.silent:
            self.rows[name] += rows

    def take(self) -> dict[str, Total]:
        """Rows since the last call, by ``forwards/NAME``."""
        taken = {f"forwards/{name}": Total(rows) for name, rows in self.rows.items()}
        self.rows.clear()
        return taken

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """For what is no training: probes and previews."""
        before, self.silent = self.silent, True
        try:
            yield
        finally:
            self.silent = before

    def _counting(self, name: str) -> Any:
        def counting(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = next((v for v in (*inputs, *named.values()) if isinstance(v, Tensor) and v.ndim), None)
            self.count(name, 0 if first is None else len(first))

        return counting
