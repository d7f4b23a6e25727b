"""What the AMD paper lacks: brakes on its reward signal. Each is off unless a recipe names it.

Where a reward is both the signal and the judge, s must shrink when held-out judges disagree (RewardGap) or samples
collapse (DiversityWatch), grow only once the fake score is worth repelling from (Ramp), and not raise β where the
teacher's direction is noise (CoherenceGate), α without bound (GuidanceCeiling), or any weight where the teacher itself
contradicts the reward (TwoKey). Rewards that are not finite have advantage 0, and σ has a floor, in advantage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from distill import math
from distill.families.base import Condition, coefficients
from distill.objectives.plan import Hook, Matching, Roles, Rollout, Telemetry, buffers, time_at
from distill.parallel.device import normal, uniform


class Ramp(Hook):
    """s and the exponent of W grow linearly from 0 over ``length`` iterations that begin at ``start``."""

    def __init__(self, *, start: int, length: int) -> None:
        self.start, self.length = start, length

    def trust(self, iteration: int) -> float:
        return min(1.0, max(0.0, (iteration - self.start) / self.length))


class GuidanceCeiling(Hook):
    """α_i is lowered until ω_i = 1 + (α_i/β_i)(ω − 1) ≤ factor·ω: s = 0.5 alone makes 22 of ω = 8."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def limit(self, rollout: Rollout, matching: Matching) -> tuple[Tensor, Tensor]:
        omega = matching.guidance
        if omega <= 1.0:
            return matching.alpha, matching.beta
        ceiling = matching.beta * (self.factor * omega - 1) / (omega - 1)
        rollout.telemetry["omega_capped"] = (matching.alpha > ceiling).float().mean()
        return matching.alpha.minimum(ceiling), matching.beta


class CoherenceGate(Hook):
    """β_i is not raised above 1 where the matching displacement of an independent (τ, ε) points elsewhere.

    cos(x_c − x_f, x_c' − x_f') < threshold: the direction that β would amplify is noise. The second point is drawn as
    matching draws its own and asks matching's teacher. One more conditional call of it and one of the fake score per
    student update.
    """

    def __init__(self, roles: Roles, *, threshold: float) -> None:
        self.roles, self.threshold = roles, threshold

    def limit(self, rollout: Rollout, matching: Matching) -> tuple[Tensor, Tensor]:
        family = self.roles.family
        t, noise = rollout.renoise(rollout, rollout.random("coherent"))
        x_t = math.add_noise(rollout.samples, noise, *coefficients(family.schedule, t))
        teacher = family.predict(matching.teacher, x_t, t, rollout.condition).x0
        second = math.dm_displacement(teacher, family.predict(self.roles.fake, x_t, t, rollout.condition).x0)
        cosine = cosine_similarity(matching.dm.flatten(1), second.flatten(1))
        gated = (cosine < self.threshold) & (matching.beta > 1)
        rollout.telemetry |= {"coherence": cosine.mean(), "coherence_gated": gated.float().mean()}
        return matching.alpha, torch.where(gated, matching.beta.clamp_max(1.0), matching.beta)


class TwoKey(Hook):
    """An advantage acts only as far as the teacher's own denoising residual agrees with it.

    k_i is the group advantage of −‖x̂_real(x_τ, c) − x‖², averaged over ``draws`` noise levels that a group shares;
    a_i becomes sign(a_i)·min(|a_i|, |k_i|) where both have one sign, else 0. A sample that a reward likes and the
    teacher cannot denoise, the mark of a hacked reward, is then neither refined (α) nor repelled less (W).
    The reward alone is the paper's detector. ``draws`` calls of the teacher per iteration.
    """

    def __init__(self, roles: Roles, *, group: int, draws: int, time_range: tuple[float, float]) -> None:
        self.roles, self.group, self.draws, self.time_range = roles, group, draws, time_range

    def judge(self, rollout: Rollout, advantage: Tensor) -> Tensor:
        residual = self.residual(rollout.samples, rollout.condition, rollout.random("two-key"))
        key = math.group_advantage(-residual, self.group)
        agreed = torch.where(advantage * key > 0, advantage.abs().minimum(key.abs()) * advantage.sign(), 0.0)
        rollout.telemetry |= {"residual": residual.mean(), "keys_agree": (advantage * key > 0).float().mean()}
        return agreed.to(advantage)

    @torch.no_grad()
    def residual(self, x: Tensor, condition: Condition, rng: torch.Generator) -> Tensor:
        """mean_τ of mean_chw (x̂_real(x_τ, c) − x)², (B,)."""
        family, (low, high), total = self.roles.family, self.time_range, torch.zeros(len(x), device=x.device)
        for _ in range(self.draws):
            u = uniform(len(x) // self.group, rng, x.device)
            t = time_at(family.schedule, low + u * (high - low)).repeat_interleave(self.group)
            noise = normal((len(x) // self.group, *x.shape[1:]), rng, x.device).repeat_interleave(self.group, 0)
            x_t = math.add_noise(x, noise, *coefficients(family.schedule, t))
            total += (family.predict(self.roles.teacher, x_t, t, condition).x0 - x).pow(2).flatten(1).mean(1)
        return total / self.draws


class RewardGap(Hook):
    """s shrinks as the training reward runs ahead of held-out ones.

    gap = Δtrain/σ_train − mean_j Δheldout_j/σ_j: progress since the first ``window`` iterations, in standard deviations
    between samples then, of running means (``decay``). trust falls from 1 at gap = tolerate to 0 at gap = refuse.
    acts: False logs the gap and leaves s alone, which every run with held-out rewards does.
    """

    memory: nn.Module

    def __init__(
        self,
        heldout: Sequence[str],
        *,
        tolerate: float,
        refuse: float,
        window: int = 50,
        decay: float = 0.98,
        acts: bool = True,
    ) -> None:
        self.names, self.acts = list(heldout), acts
        self.tolerate, self.refuse, self.window, self.decay = tolerate, refuse, window, decay
        zeros = torch.zeros(1 + len(self.names), dtype=torch.float64)
        self.memory = buffers(mean=zeros, deviation=zeros, now=zeros, seen=torch.zeros(1, dtype=torch.int64))

    def gap(self) -> float:
        """In standard deviations; 0 while the first window is not over."""
        mean, deviation, now = (self.memory.get_buffer(name) for name in ("mean", "deviation", "now"))
        if int(self.memory.get_buffer("seen")) < self.window:
            return 0.0
        progress = (now - mean) / deviation.clamp_min(1e-12)
        return float(progress[0] - progress[1:].mean())

    def trust(self, iteration: int) -> float:
        return falling(self.gap(), self.tolerate, self.refuse) if self.acts else 1.0

    def fake_telemetry(self, rollout: Rollout, t: Tensor, errors: Tensor, weight: Tensor) -> Telemetry:
        return {"reward_gap": self.gap(), "trust": rollout.trust}

    @torch.no_grad()
    def after_iteration(self, rollouts: Sequence[Rollout]) -> None:
        columns = [[r.rewards() for r in rollouts], *([r.heldout[name] for r in rollouts] for name in self.names)]
        scores = torch.stack([torch.cat(column).double() for column in columns]).cpu()
        finite = [column[column.isfinite()] for column in scores]
        if any(len(column) == 0 for column in finite):
            return
        means = torch.stack([column.mean() for column in finite])
        deviations = torch.stack([column.std(unbiased=False) for column in finite])
        mean, deviation, now, seen = (self.memory.get_buffer(n) for n in ("mean", "deviation", "now", "seen"))
        if int(seen) < self.window:
            mean.lerp_(means, 1 / (int(seen) + 1))
            deviation.lerp_(deviations, 1 / (int(seen) + 1))
            now.copy_(mean)
        else:
            now.lerp_(means, 1 - self.decay)
        seen += 1


class DiversityWatch(Hook):
    """s shrinks as the samples of a prompt become alike.

    The diversity of a group is √(mean over pairs of mean_chw (x_i − x_j)²), kept apart for every step of every grid,
    because early steps are blurred. Its running mean over that of the first ``window`` iterations, averaged over steps,
    is the ratio; trust falls from 1 at ratio = tolerate to 0 at ratio = refuse.
    """

    memory: nn.Module

    def __init__(
        self,
        grids: Sequence[int],
        *,
        group: int,
        tolerate: float,
        refuse: float,
        window: int = 20,
        decay: float = 0.95,
    ) -> None:
        self.group, self.tolerate, self.refuse, self.window, self.decay = group, tolerate, refuse, window, decay
        self.rows = {(steps, k): i for i, (steps, k) in enumerate((n, k) for n in sorted(set(grids)) for k in range(n))}
        zeros = torch.zeros(len(self.rows), dtype=torch.float64)
        self.memory = buffers(first=zeros, now=zeros, seen=zeros)

    def ratio(self) -> float:
        """Present diversity over the first, 1 before a first one is known."""
        first, now, seen = (self.memory.get_buffer(name) for name in ("first", "now", "seen"))
        known = seen >= self.window
        return float((now[known] / first[known].clamp_min(1e-12)).mean()) if bool(known.any()) else 1.0

    def trust(self, iteration: int) -> float:
        return falling(-self.ratio(), -self.tolerate, -self.refuse)

    def fake_telemetry(self, rollout: Rollout, t: Tensor, errors: Tensor, weight: Tensor) -> Telemetry:
        return {"diversity_ratio": self.ratio(), "trust": rollout.trust}

    @torch.no_grad()
    def after_iteration(self, rollouts: Sequence[Rollout]) -> None:
        first, now, seen = (self.memory.get_buffer(name) for name in ("first", "now", "seen"))
        row = self.rows[rollouts[0].steps, rollouts[0].index]
        spread = torch.cat([group_diversity(r.samples, self.group) for r in rollouts]).double().cpu().mean()
        if seen[row] < self.window:
            first[row] += (spread - first[row]) / (seen[row] + 1)
            now[row] = first[row]
        else:
            now[row] = torch.lerp(spread, now[row], self.decay)
        seen[row] += 1


def group_diversity(x: Tensor, group: int) -> Tensor:
    """Root mean square distance per element between samples of a group, (groups,): √(2·unbiased variance)."""
    grouped = x.float().reshape(-1, group, x[0].numel())
    return (2.0 * grouped.var(1, unbiased=True).mean(1)).sqrt()


def falling(value: float, tolerate: float, refuse: float) -> float:
    """1 up to ``tolerate``, 0 from ``refuse`` on, linear between."""
    return min(1.0, max(0.0, (refuse - value) / (refuse - tolerate)))
