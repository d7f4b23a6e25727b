"""The forbidden zone, measured: fixed noise and prompts are sampled again and again while the student learns.

The AMD paper (arXiv 2602.07345) calls a place forbidden where the teacher is outside of what it knows, so that its
gradients are hallucinated, and where the fake score's energy is flat, so that nothing repels (paraphrased by public
reviews). Formally Z = {x : E_real(x) > τ and ‖∇E_fake(x)‖ < δ}, which is inferred; no source gives τ or δ, and the
paper's own detector is the reward alone. What stands for both energies here, and both thresholds, are ours:

    lost(x): the teacher's denoising residual mean‖x̂_real(x_t, c) − x‖² lies above 95 % of its own samples'
    flat(x): the fake score's pull ‖mean_ε(x̂_fake(x_t, c) − x)‖ is weaker than the teacher's on half of its own samples
    x in Z:  lost and flat

The yardstick is drawn once: the teacher's guided samples of the same noise and prompts. Each measurement takes the
same level t and the same ε with both signs: x̂ is nearly linear in ε, so the noise of the pull cancels.
A perfect student has 5 % lost samples.

Everything is a function of the recipe's seed and the present weights: no random stream of training is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill import math
from distill.families.base import Condition, coefficients
from distill.objectives.plan import Roles, time_at
from distill.objectives.safeguards import group_diversity
from distill.parallel.device import normal
from distill.telemetry.options import Probing
from distill.telemetry.sink import Value

LOST = 0.95
"""Quantile of the teacher's residual on its own samples above which a sample is lost; ours."""
FLAT = 0.5
"""Quantile of the teacher's pull on its own samples below which the fake's pull is called flat; ours."""
LOW = 0.5
"""A sample of reward below μ_g − LOW·σ_g of its group is what the paper's relative detector would push; ours."""

Columns = dict[str, list[float]]


@dataclass(frozen=True)
class Sources:
    """How a probe gets its samples: clean latents (B, C, h, w) of the same noise, and their scores by name.

    rows: how many samples fit into one pass, such as a micro-batch of training.
    """

    condition: Condition
    student: Callable[[], Tensor]
    teacher: Callable[[], Tensor]
    scores: Callable[[Tensor], Mapping[str, Tensor]]
    rows: int


class Probe:
    """Measures the samples of fixed noise and prompts; ``folder`` holds one JSON file per probe, and the yardstick."""

    def __init__(
        self, roles: Roles, sources: Sources, options: Probing, *, seed: int, sigma_floor: float = 0.0
    ) -> None:
        self.roles, self.sources, self.options = roles, sources, options
        self.seed, self.sigma_floor = seed, sigma_floor

    @torch.no_grad()
    def measure(self, folder: Path, iteration: int) -> dict[str, Value]:
        """Telemetry of the present weights; reads the probe before this one and leaves its own file."""
        yardstick = self._yardstick(folder)
        x = self.sources.student()
        residual, _ = self.residual(self.roles.teacher, x)
        tracked, pull = self.residual(self.roles.fake, x)
        columns = {
            "residual": residual.tolist(),
            "fake_residual": tracked.tolist(),
            "pull": pull.tolist(),
            "diversity": group_diversity(x, self.options.samples).tolist(),
            **{name: values.tolist() for name, values in self.sources.scores(x).items()},
        }
        columns["lost"] = (
            (np.array(columns["residual"]) > np.quantile(yardstick["residual"], LOST)).astype(int).tolist()
        )
        columns["flat"] = (np.array(columns["pull"]) < np.quantile(yardstick["pull"], FLAT)).astype(int).tolist()
        previous = newest(folder, before=iteration)
        _write(folder / f"{iteration:07d}.json", columns)
        telemetry = means(columns, yardstick, self.options.samples)
        return telemetry | escapes(previous, columns, self.options.samples, self.sigma_floor)

    def residual(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean‖x̂(x_t) − x‖², ‖mean_ε(x̂(x_t) − x)‖/√d), each (B,), over ε and −ε at the probe's level."""
        noise = normal(x.shape, torch.Generator().manual_seed(self.seed), x.device)
        parts = [self._residual(network, x, noise, rows) for rows in slices(len(x), self.sources.rows)]
        return torch.cat([residual for residual, _ in parts]), torch.cat([pull for _, pull in parts])

    def _residual(self, network: nn.Module, x: Tensor, noise: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        family, x, noise = self.roles.family, x[rows], noise[rows]
        condition = {name: value[rows] for name, value in self.sources.condition.items()}
        t = time_at(family.schedule, torch.full((len(x),), self.options.level, dtype=torch.float64, device=x.device))
        alpha, sigma = coefficients(family.schedule, t)
        pulls = [
            family.predict(network, math.add_noise(x, sign * noise, alpha, sigma), t, condition).x0 - x
            for sign in (1.0, -1.0)
        ]
        squared = torch.stack([pull.float().pow(2).flatten(1).mean(1) for pull in pulls]).mean(0)
        return squared, (0.5 * (pulls[0] + pulls[1])).float().pow(2).flatten(1).mean(1).sqrt()

    def _yardstick(self, folder: Path) -> Columns:
        """The teacher's own samples, measured once per run."""
        settings = {**self.options.model_dump(mode="json", exclude={"every"}), "seed": self.seed}
        path = folder / "teacher.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if known.get("settings") == settings:
            return dict(known["columns"])
        y = self.sources.teacher()
        residual, pull = self.residual(self.roles.teacher, y)
        columns = {
            "residual": residual.tolist(),
            "pull": pull.tolist(),
            "diversity": group_diversity(y, self.options.samples).tolist(),
            **{name: values.tolist() for name, values in self.sources.scores(y).items()},
        }
        _write(path, {"settings": settings, "columns": columns})
        return columns


def means(columns: Columns, yardstick: Columns, group: int) -> dict[str, Value]:
    """What a probe logs: shares of the zone, ratios to the teacher's own samples, and mean scores.

    reward_lead is in standard deviations between the teacher's samples.
    """
    lost, flat = np.array(columns["lost"]), np.array(columns["flat"])
    telemetry: dict[str, Value] = {
        "zone/share": float((lost & flat).mean()),
        "zone/lost": float(lost.mean()),
        "zone/flat": float(flat.mean()),
        "probe/residual": _ratio(columns["residual"], yardstick["residual"]),
        "probe/fake_residual": _ratio(columns["fake_residual"], columns["residual"]),
        "probe/diversity": _ratio(columns["diversity"], yardstick["diversity"]),
    }
    for name in (n for n in columns if n == "reward" or n.startswith("heldout/")):
        telemetry[f"probe/{name}"] = _finite_mean(columns[name])
        telemetry[f"probe/teacher/{name}"] = _finite_mean(yardstick[name])
    if "reward" in columns:
        deviation = float(np.nanstd(yardstick["reward"]))
        lead = _finite_mean(columns["reward"]) - _finite_mean(yardstick["reward"])
        telemetry["probe/reward_lead"] = lead / max(deviation, 1e-12)
        telemetry["probe/alignment"] = alignment(columns["reward"], columns["residual"], group)
    return telemetry


def escapes(previous: Columns | None, now: Columns, group: int, sigma_floor: float) -> dict[str, Value]:
    """What became of the samples of the probe before: who left the zone, who entered it, who is no longer low."""
    if previous is None or len(previous["lost"]) != len(now["lost"]):
        return {}
    before, after = (np.array(c["lost"]).astype(bool) & np.array(c["flat"]).astype(bool) for c in (previous, now))
    telemetry: dict[str, Value] = {}
    if before.any():
        telemetry["zone/escaped"] = float((~after[before]).mean())
    if not before.all():
        telemetry["zone/entered"] = float(after[~before].mean())
    if "reward" in now and "reward" in previous:
        bar = threshold(previous["reward"], group, sigma_floor)
        low = np.array(previous["reward"]) < bar
        if low.any():
            telemetry["zone/reward_escaped"] = float((np.array(now["reward"]) >= bar)[low].mean())
    return telemetry


def threshold(rewards: Sequence[float], group: int, sigma_floor: float) -> NDArray[np.float64]:
    """μ_g − LOW·σ_g of each sample's group, (B,): below it lies what the paper's detector pushes."""
    r = np.array(rewards, dtype=np.float64).reshape(-1, group)
    bar = r.mean(1) - LOW * np.maximum(r.std(1), sigma_floor)
    return np.repeat(bar, group)


def alignment(rewards: Sequence[float], residuals: Sequence[float], group: int) -> float:
    """Spearman's correlation of reward and −residual, both centred on their prompt: the paper's Assumption 3.3.

    Near 1: what the reward likes is what the teacher knows. Near 0 or below, a good score says nothing of that.
    """
    r, e = (np.array(v, dtype=np.float64).reshape(-1, group) for v in (rewards, residuals))
    a, b = _ranks((r - r.mean(1, keepdims=True)).ravel()), _ranks(-(e - e.mean(1, keepdims=True)).ravel())
    if not (np.isfinite(r).all() and a.std() > 0 and b.std() > 0):
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def slices(count: int, rows: int) -> list[slice]:
    """``count`` rows in pieces of at most ``rows``."""
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def newest(folder: Path, *, before: int) -> Columns | None:
    """The columns of the last probe before an iteration."""
    earlier = [path for path in folder.glob("[0-9]*.json") if int(path.stem) < before]
    return dict(json.loads(max(earlier, key=lambda p: int(p.stem)).read_text())) if earlier else None


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks with ties averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse], dtype=np.float64)


def _ratio(values: Sequence[float], yardstick: Sequence[float]) -> float:
    """Mean over mean."""
    return float(np.mean(values)) / max(float(np.mean(yardstick)), 1e-12)


def _finite_mean(values: Sequence[float]) -> float:
    array = np.array(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    return float(finite.mean()) if len(finite) else float("nan")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)
