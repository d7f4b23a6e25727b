"""Checkpoints in the background: training goes on while one thread writes what a snapshot holds.

    with Saver(world) as saver:                       # leaving it waits for what is being written
        saver.start(folder, iteration, tensors, facts, keep=3)
        ...
        saver.settle()                                # before state changes
        optimizer.step()

One checkpoint is written at a time; the next one waits for it. The writing threads of all ranks agree in a gloo group
of their own, because the ranks' other talk goes on meanwhile.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from distill.parallel import checkpoint
from distill.parallel.snapshot import Snapshot, share
from distill.parallel.world import World

log = logging.getLogger(__name__)
LONG = 5.0
"""Seconds of waiting for the last checkpoint after which the log says so."""


class Saver:
    """Writes checkpoints one at a time beside training. All ranks must call ``start`` for the same iterations."""

    def __init__(self, world: World) -> None:
        self.world = world.apart()
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._written: Path | None = None
        self._fault: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written, as far as this rank has heard; ``wait`` says why."""
        return self._fault is not None

    def start(
        self, folder: Path, iteration: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, keep: int
    ) -> None:
        """Begin to write checkpoints/step-N once the one before is written.

        Raises CheckpointError if that one could not be.
        """
        if self._thread is not None:
            self._thread.join(LONG)
            if self._thread.is_alive() and self.world.leader:
                log.warning("training waits for %s; raise save_every or use a faster disk", self._thread.name)
        self.wait()
        state = self._snapshot.take(share(tensors, self.world))

        def work() -> None:
            try:
                self._snapshot.ready()
                self._written = checkpoint.write(folder, iteration, state, facts, self.world, keep=keep)
            except BaseException as fault:  # raised again by wait()
                self._fault = fault

        self._thread = threading.Thread(target=work, name=f"checkpoint-{iteration}")
        self._thread.start()

    def settle(self) -> None:
        """Call it before state changes in place: a GPU's copy of it may still be under way."""
        self._snapshot.settle()

    def wait(self) -> Path | None:
        """The last checkpoint, once it is written. Raises CheckpointError, once, if it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault
        return self._written

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        else:
            self.drain()

    def drain(self) -> None:
        """Wait for what is being written where something else ends the run: a fault is logged."""
        try:
            self.wait()
        except checkpoint.CheckpointError as fault:
            log.warning("%s", fault)
