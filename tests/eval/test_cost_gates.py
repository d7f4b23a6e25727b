"""Gates on speed, memory and parity: slow-downs that are injected as numbers turn the right gate red, and only it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import gate
from eval.gates import load_gates
from eval.metrics import create
from eval.metrics.base import Samples
from eval.prompts import Prompt
from eval.regression import Verdict
from eval.store import Store
from tests.eval.test_store import INFO

GATES = load_gates("scenes-sdxl")
USUAL = {"latency": 40.0, "throughput": 50.0, "parity": 0.4, "memory": 130.0}
"""Milliseconds, pictures per second, levels, MiB."""


class Flat:
    """A reference of one grey."""

    def make(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return np.full((len(prompts), 3, 10, 10), 100, np.uint8)


def prompts(count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"p{i}", "a cube", i) for i in range(count))


def wrong_by(levels: float, count: int) -> np.ndarray:
    """Pictures whose mean distance to the reference is ``levels``, a little more or less each."""
    images = Flat().make(prompts(count))
    for index, image in enumerate(images):
        image.reshape(-1)[: round(300 * levels * (1 + 0.1 * (index % 5 - 2))) // 2] += 2
    return images


def measured(name: str, size: float, wander: np.random.Generator) -> Any:
    """A real metric fed with times, memory or pictures of this size; clocks and memory wander by two percent."""
    many, blank = prompts(80), np.zeros((1, 3, 2, 2), np.uint8)
    around = size * (1 + 0.02 * wander.standard_normal(80))
    if name == "memory":
        metric = create("memory", measure=lambda prompt: float(around[prompt.seed]))
        metric.update(Samples(np.repeat(blank, 6, 0), many[:6]))
    elif name == "latency":
        metric = create("latency")
        for prompt in many[:30]:
            metric.update(Samples(blank, (prompt,), around[[prompt.seed]] / 1000))
    elif name == "throughput":
        metric = create("throughput")
        for start in range(0, 80, 8):
            metric.update(Samples(np.repeat(blank, 8, 0), many[start : start + 8], None, float(8 / around[start])))
    else:
        metric = create("parity", reference=Flat())
        metric.update(Samples(wrong_by(size, 80), many))
    return metric.compute()


def night(store: Store, label: str, seed: int, **changed: float) -> dict[str, dict[str, Any]]:
    """Runs by suite, with every cost at its usual size times what is changed."""
    wander, runs = np.random.default_rng(seed), {}
    scores = {name: measured(name, size * changed.get(name, 1.0), wander) for name, size in USUAL.items()}
    for suite, names in (
        ("scenes-latency", ["latency"]),
        ("scenes-speed", ["throughput", "parity"]),
        ("scenes-memory", ["memory"]),
    ):
        taken = [scores[name] for name in names]
        info = replace(INFO, label=label, suite=suite, expected=taken[0].n)
        run = store.begin(info)
        store.complete(run, prompts(taken[0].n), taken)
        runs[suite] = store.run(run)
    return runs


@pytest.mark.parametrize(
    ("changed", "red"),
    [
        ({}, None),
        ({"latency": 1.4}, "latency"),
        ({"throughput": 0.7}, "throughput"),
        ({"memory": 1.4}, "memory"),
        ({"parity": 4.0}, "parity"),
        ({"latency": 1.1, "throughput": 0.92, "memory": 1.05, "parity": 1.5}, None),
        ({"throughput": 1.5, "latency": 0.7, "memory": 0.7, "parity": 0.1}, None),
    ],
)
def test_what_got_slower_larger_or_less_alike_turns_red_beyond_percent_and_floor(
    changed: dict[str, float], red: str | None, tmp_path: Path
) -> None:
    gates = GATES.model_copy(update={"scores": (), "guards": ()})
    with Store(tmp_path / "s.sqlite") as store:
        before, tonight = night(store, "baseline", 1), night(store, "tonight", 2, **changed)
        again = night(store, "second panel", 3, **changed)

        def confirm(doubted: Sequence[gate.AnyGate]) -> dict[str, Any]:
            return {g.key: gate.evidence(store, again[g.suite], before[g.suite], g.metric) for g in doubted}

        rows = {row.gate.metric: row for row in gate.judge(store, gates, tonight, before, confirm)}
    assert set(rows) == set(USUAL)
    assert {name for name, row in rows.items() if row.verdict is Verdict.REGRESSION} == ({red} if red else set())


def test_times_of_another_machine_are_not_comparable_and_parity_is(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        before = night(store, "baseline", 1)
        elsewhere = {suite: {**run, "hardware": {"processor": "another"}} for suite, run in before.items()}
        rows = {row.gate.metric: row for row in gate.judge(store, GATES, elsewhere, before)}
    for name in ("latency", "throughput", "memory"):
        assert rows[name].verdict is Verdict.NOT_COMPARABLE and "hardware.processor" in rows[name].note
    assert rows["parity"].verdict is Verdict.EQUIVALENT
