"""VBench's temporal flickering of clips, by VBench itself in its own interpreter; see eval.vbench.

    s = 1 − mean|x_{t+1} − x_t|/255

VBench asks for clips of static scenes; those of moving scenes lose by what moves, so read it against the row of true
clips. Without the interpreter it was *not run*: python -m eval.env create vbench.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eval.clips import write_clip
from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.statistics import bootstrap_mean

DIMENSION = "temporal_flickering"


class Scorer(Protocol):
    """A worker of eval.workers."""

    hello: dict[str, Any]

    def ask(self, request: Any, seconds: float) -> dict[str, Any]: ...

    def close(self) -> None: ...


@register
class Flickering(PerSampleMetric):
    """Mean over clips. worker: of VBench; opened, and closed by compute, unless it is given."""

    name = "vbench-flickering"
    direction = "higher"
    unit = ""
    smallest_n = 75
    media = "clips"

    def __init__(self, worker: Scorer | None = None) -> None:
        super().__init__()
        self._worker = worker or open_vbench()

    def update(self, samples: Samples) -> None:
        from eval.vbench.driver import evaluate
        from eval.vbench.protocol import Entry

        names = [str(i) for i in range(len(samples.prompts))]
        with tempfile.TemporaryDirectory() as folder:
            for name, clip in zip(names, samples.images, strict=True):
                write_clip(Path(folder) / f"{name}-0.mp4", clip)
            entries = [Entry(name, (DIMENSION,)) for name in names]
            result = evaluate(Path(folder), self._worker, entries, (DIMENSION,), per_prompt=1)
        if DIMENSION in result.not_run:
            raise EvalError(f"{self.name} was not run: {result.not_run[DIMENSION]}")
        clips = result.scored[DIMENSION].clips
        self._add(np.array([clips[f"{name}-0.mp4"] for name in names]), samples)

    def compute(self) -> Score:
        self._worker.close()
        self._need(len(self._values))
        values = np.array(self._values)
        protocol = {"package": self._worker.hello.get("versions"), "clips": "H.264 without loss"}
        return self._score(bootstrap_mean(values, self._clusters), values, protocol).check()


def open_vbench() -> Scorer:
    """VBench's own functions. Raises EvalError that says how to make its interpreter."""
    from eval.vbench.__main__ import open_worker

    try:
        return open_worker()
    except EvalError as error:
        raise EvalError(f"vbench-flickering was not run: {error}") from None
