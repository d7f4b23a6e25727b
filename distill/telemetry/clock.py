"""What a phase costs: seconds of this process on the CPU, or seconds of its GPU.

A GPU works behind its host, so that neither the wall's clock nor the process's tells what a phase has cost it. Events
in the current stream do, and they are read once per interval: nothing waits for the device inside an iteration.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch

from distill.telemetry.sink import Total

CUDA_EVENT = partial(torch.cuda.Event, enable_timing=True)


class Clock(Protocol):
    """``phase`` times what is done within it, ``take`` tells the seconds since it was last asked."""

    def phase(self, role: str) -> contextlib.AbstractContextManager[None]: ...

    def take(self) -> dict[str, list[Total]]: ...


class CpuClock:
    """``cpu_seconds/ROLE``: processor time of this process, of all its threads."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, role: str) -> Iterator[None]:
        began = time.process_time()
        yield
        name = f"cpu_seconds/{role}"
        self._spent[name] = self._spent.get(name, 0.0) + time.process_time() - began

    def take(self) -> dict[str, list[Total]]:
        spent, self._spent = self._spent, {}
        return {name: [Total(seconds)] for name, seconds in spent.items()}


class GpuClock:
    """``gpu_seconds/ROLE``: time that the current stream spent between a phase's begin and its end.

    ``gpu_seconds`` is all of it since the first phase, or since the last ``take``: also previews, checkpoints and what
    the GPU waited for its host. event: makes what can record(), synchronize() and tell elapsed_time(later) in ms.
    """

    def __init__(self, event: Callable[[], Any] = CUDA_EVENT) -> None:
        self._event = event
        self._since: Any = None
        self._phases: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def phase(self, role: str) -> Iterator[None]:
        begin = self._now()
        self._since = self._since or begin
        yield
        self._phases.append((role, begin, self._now()))

    def take(self) -> dict[str, list[Total]]:
        if self._since is None:
            return {}
        now = self._now()
        now.synchronize()  # what was recorded before it in the stream has happened too
        spent = {"gpu_seconds": [Total(self._since.elapsed_time(now) / 1e3)]}
        for role, begin, end in self._phases:
            spent.setdefault(f"gpu_seconds/{role}", []).append(Total(begin.elapsed_time(end) / 1e3))
        self._since, self._phases = now, []
        return spent

    def _now(self) -> Any:
        event = self._event()
        event.record()
        return event


def clock_of(place: torch.device) -> Clock:
    """The clock of a device."""
    return GpuClock() if place.type == "cuda" else CpuClock()
