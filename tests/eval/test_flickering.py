"""VBench's flickering as a metric: through a worker that keeps its contract, and not run where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from eval.damage import damaged_clip
from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples, Score
from eval.prompts import Prompt
from eval.workers import Worker

pytest.importorskip("av", reason="clips need PyAV: pip install av")
HONEST = Path(__file__).parent / "vbench" / "honest_worker.py"


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker([sys.executable, str(HONEST), "honest"], "vbench", probe=(0.25, 1e-9)) as running:
        yield running


def clips(count: int, step: int) -> np.ndarray:
    """Clips (count, 5, 3, 16, 16) of noise that brightens by ``step`` levels a frame."""
    still = np.random.default_rng(0).integers(0, 100, (count, 1, 3, 16, 16))
    return (still + step * np.arange(5).reshape(1, -1, 1, 1, 1)).astype(np.uint8)


def score(made: np.ndarray, worker: Worker, batch: int = 8) -> Score:
    metric = create("vbench-flickering", worker=worker)
    for start in range(0, len(made), batch):
        part = made[start : start + batch]
        metric.update(Samples(part, tuple(Prompt(f"p{start + i}", "a cube", i) for i in range(len(part)))))
    return metric.compute()


def test_it_is_one_less_the_mean_difference_of_neighbours_in_batches_of_any_size(worker: Worker) -> None:
    made = np.concatenate([clips(3, 10), clips(2, 25)])
    found = score(made, worker, batch=2)
    np.testing.assert_allclose(found.per_sample, [1 - 10 / 255] * 3 + [1 - 25 / 255] * 2, atol=1e-9)
    assert found.value == pytest.approx(found.per_sample.mean()) and found.smallest_n == 75


def test_flicker_lowers_it_and_a_frozen_clip_has_none(worker: Worker) -> None:
    made = clips(3, 2)
    metric = create("vbench-flickering", worker=worker)
    worse = [np.stack([damaged_clip(c, f"frames-{how}") for c in made]) for how in ("frozen", "flickering")]
    for some in (made, *worse):
        metric.update(Samples(some, tuple(Prompt(f"p{i}", "a cube", i) for i in range(3))))
    plain, frozen, flickering = metric.compute().per_sample.reshape(3, 3).mean(1)
    assert frozen == 1 > plain > flickering


def test_without_its_interpreter_it_is_not_run_and_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEAPFROG_ENVIRONMENTS", str(tmp_path))
    with pytest.raises(
        EvalError, match=r"was not run: the environment vbench is absent; run: python -m eval.env create vbench"
    ):
        create("vbench-flickering")
