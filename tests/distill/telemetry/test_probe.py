"""Probes on a teacher that is known in closed form: what is lost, flat, escaped, and how much a sample differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.families.base import Condition, Prediction
from distill.objectives.plan import Roles
from distill.sampling import Flow
from distill.telemetry.options import Probing
from distill.telemetry.probe import Probe, Sources, alignment, escapes, means, newest, threshold

OPTIONS = Probing(every=10, prompts=16, samples=4, level=0.5, teacher_steps=4)
N = OPTIONS.prompts * OPTIONS.samples


class Gaussian(nn.Module):
    """A density N(mean, deviation²) per pixel, whose denoiser is exact."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a, s = (1 - t).reshape(-1, 1, 1, 1).float(), t.reshape(-1, 1, 1, 1).float()
        gain = a * self.deviation**2 / (a**2 * self.deviation**2 + s**2)
        return self.mean + gain * (x_t - a * self.mean)


class World:
    """A family whose networks are Gaussians."""

    schedule = Flow()

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        assert len(x_t) == len(condition["row"])
        x0 = network(x_t, t)
        return Prediction(x0, x0, x0, {})


def normal(mean: float, deviation: float, seed: int) -> Tensor:
    return mean + deviation * torch.randn(N, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


def probe(
    student: Any, *, teacher: Gaussian | None = None, fake: Gaussian | None = None, scores: Any = None, rows: int = N
) -> Probe:
    teacher = teacher or Gaussian(0.0, 1.0)
    roles = Roles(World(), teacher, nn.Identity(), fake or teacher)
    draw, judge = lambda: normal(teacher.mean, teacher.deviation, 1), scores or (lambda x: {})
    sources = Sources({"row": torch.arange(N)}, student=student, teacher=draw, scores=judge, rows=rows)
    return Probe(roles, sources, OPTIONS, seed=0)


def test_the_teachers_own_distribution_is_seldom_lost(tmp_path: Path) -> None:
    told = probe(lambda: normal(0.0, 1.0, 2)).measure(tmp_path, 10)
    assert told["zone/lost"] <= 0.15 and told["zone/share"] == 0.0
    assert told["probe/residual"] == pytest.approx(1.0, abs=0.1)
    assert told["probe/diversity"] == pytest.approx(1.0, abs=0.1)
    assert told["probe/fake_residual"] == 1.0 and "zone/escaped" not in told


def test_samples_where_the_teacher_is_lost_and_the_fake_has_settled_are_in_the_zone(tmp_path: Path) -> None:
    """A student that sits at 3 teacher's deviations, and a fake score that has learned to call this the middle."""
    far = probe(lambda: normal(3.0, 0.1, 2), fake=Gaussian(3.0, 0.1)).measure(tmp_path / "a", 10)
    assert far["zone/share"] == far["zone/lost"] == far["zone/flat"] == 1.0
    assert far["probe/fake_residual"] < 0.1 and far["probe/diversity"] == pytest.approx(0.1, abs=0.02)
    repelled = probe(lambda: normal(3.0, 0.1, 2), fake=Gaussian(0.0, 0.1)).measure(tmp_path / "b", 10)
    assert repelled["zone/lost"] == 1.0 and repelled["zone/flat"] == repelled["zone/share"] == 0.0


def test_residual_and_pull_are_those_of_the_formula() -> None:
    """For a linear denoiser x̂ = g·x_t the pull is (g·α − 1)·x exactly, because ε and −ε cancel."""
    p, x = probe(None), normal(0.5, 1.0, 3)
    residual, pull = p.residual(Gaussian(0.0, 1.0), x)
    gain = 0.5 / (0.25 + 0.25)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pull, (gain * 0.5 - 1) * x.flatten(1).norm(dim=1) / -4.0)
    both = [((gain * (0.5 * x + s * 0.5 * noise) - x) ** 2).flatten(1).mean(1) for s in (1, -1)]
    torch.testing.assert_close(residual, (both[0] + both[1]) / 2)


@torch.no_grad()
def test_samples_may_be_measured_in_pieces() -> None:
    x, fake = normal(0.5, 1.0, 3), Gaussian(1.0, 0.5)
    whole, parts = probe(None).residual(fake, x), probe(None, rows=7).residual(fake, x)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_escapes_are_told_from_the_probe_before(tmp_path: Path) -> None:
    samples = [normal(3.0, 0.1, 2), torch.cat((normal(3.0, 0.1, 2)[: N // 4], normal(0.0, 1.0, 5)[N // 4 :]))]
    p = probe(lambda: samples.pop(0), fake=Gaussian(3.0, 0.1))
    p.measure(tmp_path, 10)
    told = p.measure(tmp_path, 20)
    assert told["zone/escaped"] == 0.75 and told["zone/share"] == 0.25 and "zone/entered" not in told


def test_a_probe_reads_the_last_one_before_it_and_ignores_later_ones(tmp_path: Path) -> None:
    """As after a resume from an older checkpoint: files of iterations that are still to come do not count."""
    p = probe(lambda: normal(0.0, 1.0, 2))
    first = p.measure(tmp_path, 10)
    p.measure(tmp_path, 30)
    assert newest(tmp_path, before=10) is None and newest(tmp_path, before=31) is not None
    again = probe(lambda: normal(0.0, 1.0, 2))
    assert again.measure(tmp_path, 10) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000010.json", "0000030.json", "teacher.json"]


def test_the_yardstick_is_drawn_once_and_anew_for_other_settings(tmp_path: Path) -> None:
    drawn = []

    def counted(options: Probing) -> None:
        p = probe(lambda: normal(0.0, 1.0, 2))
        draw = p.sources.teacher
        sources = replace(p.sources, teacher=lambda: (drawn.append(1), draw())[1])
        Probe(p.roles, sources, options, seed=0).measure(tmp_path, 10)

    counted(OPTIONS)
    counted(OPTIONS.model_copy(update={"every": 5}))
    assert len(drawn) == 1
    counted(OPTIONS.model_copy(update={"level": 0.4}))
    assert len(drawn) == 2


def test_scores_are_told_beside_the_teachers(tmp_path: Path) -> None:
    def scores(x: Tensor) -> dict[str, Tensor]:
        r = -x.flatten(1).pow(2).mean(1)
        return {"reward": r, "heldout/judge": 2 * r}

    told = probe(lambda: normal(1.0, 1.0, 2), scores=scores).measure(tmp_path, 10)
    assert told["probe/reward"] == pytest.approx(-2.0, abs=0.2)
    assert told["probe/teacher/heldout/judge"] == pytest.approx(-2.0, abs=0.2)
    # this reward falls with the distance from the teacher's mean, as its residual rises
    assert told["probe/alignment"] > 0.5


def test_alignment_is_the_rank_correlation_within_prompts() -> None:
    rng = np.random.default_rng(0)
    offsets = np.repeat(rng.normal(size=6) * 100, 4)
    residual = rng.random(24)
    assert alignment(list(-residual), list(residual), 4) == pytest.approx(1.0)
    assert alignment(list(residual + offsets), list(residual + offsets), 4) == pytest.approx(-1.0)
    assert abs(alignment(list(rng.random(4000)), list(rng.random(4000)), 4)) < 0.1
    assert alignment([1.0] * 8, list(range(8)), 4) == 0.0


def test_the_bar_of_low_rewards_is_that_of_each_group_with_a_floor() -> None:
    np.testing.assert_allclose(threshold([0.0, 2.0, 5.0, 5.0], 2, 0.0), [0.5, 0.5, 5.0, 5.0])
    np.testing.assert_allclose(threshold([0.0, 2.0, 5.0, 5.0], 2, 4.0), [-1.0, -1.0, 3.0, 3.0])


def test_rewards_that_rose_above_their_bar_have_escaped() -> None:
    before = {"lost": [0, 0, 0, 0], "flat": [0, 0, 0, 0], "reward": [0.0, 2.0, 1.0, 5.0]}
    after = before | {"reward": [0.4, 0.0, 4.0, 0.0], "residual": [1.0] * 4}
    told = escapes(before, after, 2, 0.0)
    assert told == {"zone/entered": 0.0, "zone/reward_escaped": 0.5}
    assert escapes(None, after, 2, 0.0) == {}


def test_a_score_that_is_not_finite_leaves_the_others_mean() -> None:
    columns = {
        "lost": [1, 0], "flat": [1, 1], "residual": [2.0, 4.0], "fake_residual": [1.0, 1.0], "pull": [0.0, 0.0],
        "diversity": [1.0], "reward": [float("nan"), 3.0],
    }  # fmt: skip
    told = means(columns, columns, 2)
    assert told["zone/share"] == 0.5 and told["probe/reward"] == 3.0 and told["probe/alignment"] == 0.0
    assert told["probe/fake_residual"] == pytest.approx(1 / 3)
