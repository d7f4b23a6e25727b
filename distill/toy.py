"""Distribution matching in the plane, where every score is exact: the method's proofs in seconds, and its picture.

    python -m distill.toy --out docs/toy.png

The teacher is a Gaussian mixture, the student is a cloud of particles, and the fake score is the exact minimiser of
the fake score's loss on them. Losses and hooks are those of distill.objectives, called as the training task calls them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distill.families.base import Condition, Prediction, coefficients
from distill.math import convert, group_advantage
from distill.objectives.amd import DynamicScoreAdaptation, RepulsiveSharpening
from distill.objectives.dmd import student_loss
from distill.objectives.plan import Hook, Rollout, fake_weight
from distill.sampling import Flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Reward = Callable[[Tensor], Tensor]


class Mixture(nn.Module):
    """Σ_k w_k·N(μ_k, s_k²·1) in the plane, and its denoiser: a teacher, or the fake score of particles (s_k = 0).

    weights, deviations: (K,), means: (K, 2). classes: (K,) int64, the label that each component belongs to, or None
    when there are none; the label ``number of classes`` means all components, the unconditional input.
    """

    def __init__(
        self, weights: Tensor, means: Tensor, deviations: Tensor | float, classes: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weights, self.means = weights / weights.sum(), means
        self.deviations = torch.as_tensor(deviations, dtype=means.dtype).expand(len(weights))
        self.classes = classes

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """E[x | x_t, label] at x_t = α·x + σ·ε.  x_t: (B, 2); α, σ: (B,); labels: (B,). Returns (B, 2).

        Σ_k ρ_k·[μ_k + α·s_k²/V_k·(x_t − α·μ_k)] with V_k = α²s_k² + σ² and ρ_k ∝ w_k·N(x_t; α·μ_k, V_k).
        """
        a, s = alpha.to(x_t)[:, None], sigma.to(x_t)[:, None]
        variance = (a * self.deviations) ** 2 + s**2
        gain = a * self.deviations**2 / variance
        rho = self._log_joint(x_t, a, variance, labels).softmax(1)
        return (rho * (1 - gain * a)) @ self.means + (rho * gain).sum(1, keepdim=True) * x_t

    def log_prob(self, x: Tensor, *, alpha: float = 1.0, sigma: float = 0.0, label: int | None = None) -> Tensor:
        """log p_t of x (…, 2): the density of α·X + σ·ε, with σ = 0 that of X itself. label None: of all components."""
        flat = x.reshape(-1, 2)
        a = torch.full((len(flat), 1), alpha, dtype=x.dtype)
        labels = torch.full((len(flat),), self.unconditional if label is None else label)
        joint = self._log_joint(flat, a, (a * self.deviations) ** 2 + sigma**2, labels)
        chosen = torch.ones_like(self.weights) if label is None or self.classes is None else (self.classes == label)
        return (joint.logsumexp(1) - (self.weights * chosen).sum().log()).reshape(x.shape[:-1])

    @property
    def unconditional(self) -> int:
        return 0 if self.classes is None else int(self.classes.max()) + 1

    def _log_joint(self, x_t: Tensor, a: Tensor, variance: Tensor, labels: Tensor) -> Tensor:
        """log w_k·N(x_t; α·μ_k, V_k), (B, K); −∞ for components of other classes."""
        square = x_t.pow(2).sum(1, keepdim=True) - 2 * a * x_t @ self.means.T + a**2 * self.means.pow(2).sum(1)
        joint = self.weights.log() - 0.5 * square / variance - (2 * math.pi * variance).log()
        if self.classes is None:
            return joint
        hidden = (labels[:, None] != self.unconditional) & (labels[:, None] != self.classes)
        return joint.masked_fill(hidden, -math.inf)

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """(n, 2)."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        noise = torch.randn(n, 2, generator=rng, dtype=self.means.dtype)
        return self.means[which] + self.deviations[which, None] * noise

    def tilted(self, slope: Tensor) -> Mixture:
        """p(x)·e^{λ·x}/Z: means μ_k + s_k²·λ, weights w_k·exp(λ·μ_k + s_k²|λ|²/2). slope: λ, (2,)."""
        variance = self.deviations**2
        growth = self.means @ slope + 0.5 * variance * slope.square().sum()
        return Mixture(
            self.weights * growth.exp(), self.means + variance[:, None] * slope, self.deviations, self.classes
        )


class Plane:
    """What the objectives read of a family, for the plane: latents (B, 2, 1, 1), labels, flow matching.

    A network is a module (x_t (B, 2), α (B,), σ (B,), labels (B,)) -> E[x | x_t, label], so that it may be exact.
    """

    name, prediction, schedule = "plane", "flow", Flow()

    def __init__(self, unconditional: int = 0) -> None:
        self._unconditional = unconditional

    def predict(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, *, taps: Sequence[str] = ()
    ) -> Prediction:
        if taps:
            raise ValueError(f"taps is {tuple(taps)}; a closed form has no features, leave taps empty")
        alpha, sigma = coefficients(self.schedule, t)
        x0 = network(x_t.flatten(1), alpha, sigma, condition["labels"]).reshape(x_t.shape)
        velocity = (x_t - x0) / sigma.to(x_t).reshape(-1, 1, 1, 1)
        return Prediction(*convert(self.prediction, x_t, velocity, alpha, sigma), features={})

    def encode(self, prompts: Sequence[int]) -> Condition:
        return {"labels": torch.as_tensor(list(prompts), dtype=torch.int64)}

    def unconditional(self, n: int) -> Condition:
        return {"labels": torch.full((n,), self._unconditional)}

    def latent_shape(self) -> tuple[int, ...]:
        return (2, 1, 1)


def optimal_fake(rollout: Rollout, hooks: Sequence[Hook] = ()) -> Mixture:
    """The minimiser of fake_loss over all functions, on a finite set of samples with their weights W_i.

    argmin_f Σ_i W_i·E‖f(x_t) − x_i‖² = Σ_i W_i·N(x_t; α·x_i, σ²)·x_i / Σ_i W_i·N(x_t; α·x_i, σ²): the denoiser of the
    points themselves, each as heavy as its weight. As the number of samples grows it becomes the denoiser of
    q ∝ p_θ·W, which is what a fake score with enough capacity learns.
    """
    points = rollout.samples.flatten(1)
    anywhere = torch.full((len(points),), 0.5)  # the hooks used here weigh samples, not times
    return Mixture(fake_weight(hooks, rollout, anywhere).to(points), points, 0.0)


@dataclass(frozen=True)
class Plan:
    """How particles are distilled. step: of x += step·H/n, falls to 0 over the second half when cools.

    draws: independent (t, ε) per particle and iteration. group: particles per advantage, drawn anew each iteration;
    None takes the reward itself for the advantage, whose temperature then is fixed.
    times: range of re-noising, uniform; equal ends mean that time alone. label: the condition, None for none.
    """

    iterations: int = 200
    step: float = 0.05
    cools: bool = True
    draws: int = 1
    group: int | None = 4
    sigma_floor: float = 0.0
    times: tuple[float, float] = (0.02, 0.98)
    guidance: float = 1.0
    label: int | None = None
    seed: int = 0


def distil(
    teacher: Mixture, start: Tensor, plan: Plan, hooks: Sequence[Hook] = (), reward: Reward | None = None
) -> Tensor:
    """Particles (N, 2) under the student's loss with the exact fake score; their path (iterations + 1, N, 2).

    reward: (N, 2) -> (N,), read through group advantages by the hooks and never differentiated.
    """
    family, rng = Plane(teacher.unconditional), torch.Generator().manual_seed(plan.seed)
    labels = torch.full((len(start),), teacher.unconditional if plan.label is None else plan.label)
    particles, path = start.clone(), [start.clone()]
    for iteration in range(plan.iterations):
        order = torch.randperm(len(particles), generator=rng)
        x = particles[order].reshape(-1, *family.latent_shape()).requires_grad_()
        advantage = _advantage(x.detach().flatten(1), reward, plan)
        fake = optimal_fake(_rollout(x, labels, advantage), hooks)
        many = _rollout(x.repeat(plan.draws, 1, 1, 1), labels.repeat(plan.draws), advantage.repeat(plan.draws))
        low, high = plan.times
        t = low + (high - low) * torch.rand(len(many.x), generator=rng, dtype=torch.float64)
        noise = torch.randn(many.x.shape, generator=rng)
        loss, _ = student_loss(family, teacher, fake, many, t, noise, guidance=plan.guidance, hooks=hooks)
        (gradient,) = torch.autograd.grad(loss, x)
        # The loss is a mean over all elements, so this is the mean over draws of −H/n per particle.
        rate = plan.step * (min(1.0, 2 - 2 * iteration / plan.iterations) if plan.cools else 1.0)
        particles[order] -= rate * x.numel() * gradient.flatten(1)
        path.append(particles.clone())
    return torch.stack(path)


def _rollout(x: Tensor, labels: Tensor, advantage: Tensor) -> Rollout:
    return Rollout(x, {"labels": labels}, (), 1, 0, advantage.clone)


def _advantage(x: Tensor, reward: Reward | None, plan: Plan) -> Tensor:
    if reward is None:
        return torch.full((len(x),), math.nan)  # whatever reads it shows
    return reward(x) if plan.group is None else group_advantage(reward(x), plan.group, sigma_floor=plan.sigma_floor)


# --- the picture ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ForbiddenZone:
    """Three modes on a plateau, and a student that has collapsed onto the plateau's middle.

    The plateau is a wide component of little weight: the teacher's score is exact there, but its energy is high and
    flat. The student's samples, hence the fake score, are N(0, spread²·1). A point lies in the zone when
    E_real = −log p_real > energy and ‖∇E_fake‖ = ‖x‖/spread² < force (the formal definition is inferred from the
    paper's words). ``energy`` is what 99 % of a mode's own samples stay below. The reward is the negative distance to
    the nearest mode: it knows what is right and nothing of densities.
    """

    radius: float = 2.0
    deviation: float = 0.3
    plateau_weight: float = 0.05
    plateau_deviation: float = 1.5
    spread: float = 0.35
    force: float = 5.0

    @property
    def modes(self) -> Tensor:
        angle = torch.tensor([math.pi / 2, math.pi * 7 / 6, -math.pi / 6])
        modes: Tensor = self.radius * torch.stack((angle.cos(), angle.sin()), 1)
        return modes

    @property
    def teacher(self) -> Mixture:
        share = (1 - self.plateau_weight) / 3
        weights = torch.tensor([share, share, share, self.plateau_weight])
        deviations = torch.tensor([*[self.deviation] * 3, self.plateau_deviation])
        return Mixture(weights, torch.cat((self.modes, torch.zeros(1, 2))), deviations)

    @property
    def energy(self) -> float:
        """E_real at the distance from a mode that 1 % of a mode's samples exceed: ‖x − μ‖² > 2·s²·ln 100."""
        edge = self.modes[0] + torch.tensor([0.0, self.deviation * math.sqrt(2 * math.log(100))])
        return -float(self.teacher.log_prob(edge))

    def start(self, n: int, seed: int) -> Tensor:
        return self.spread * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))

    def reward(self, x: Tensor) -> Tensor:
        nearest: Tensor = (x[:, None] - self.modes).norm(dim=2).amin(1)
        return -nearest

    def height(self, x: Tensor) -> Tensor:
        """E_real − energy of (…, 2) points: above 0 a point is outside every mode."""
        return -self.teacher.log_prob(x) - self.energy

    def depth(self, x: Tensor) -> Tensor:
        """Above 0 in the zone, where the energy is high and the force of the fake score is small."""
        weakness: Tensor = self.force - x.norm(dim=-1) / self.spread**2
        return torch.minimum(self.height(x), weakness)


def methods(strength: float = 0.5, group: int = 4) -> dict[str, list[Hook]]:
    """What the picture compares; s is larger than a recipe's 0.1 so that a short path shows it."""
    adaptation, sharpening = DynamicScoreAdaptation(strength), RepulsiveSharpening(group=group)
    return {
        "DMD": [],
        "adaptation only": [adaptation],
        "sharpening only": [sharpening],
        "AMD": [adaptation, sharpening],
    }


def draw(out: Path, *, particles: int = 256, iterations: int = 200, seeds: int = 5) -> dict[str, float]:
    """Write the picture; returns the share of samples that are still lost at half time, by method."""
    from matplotlib.figure import Figure

    zone, plan = ForbiddenZone(), Plan(iterations=iterations, step=0.05, cools=False, draws=2)
    paths = {
        name: torch.stack(
            [
                distil(zone.teacher, zone.start(particles, seed), replace(plan, seed=seed), hooks, zone.reward)
                for seed in range(seeds)
            ]
        )
        for name, hooks in methods().items()
    }
    figure = Figure(figsize=(10.5, 9.4), layout="constrained")
    (landscape, dmd), (amd, curves) = figure.subplots(2, 2)
    half = iterations // 2
    _draw_landscape(landscape, zone, paths["DMD"][0, 0])
    _draw_paths(dmd, zone, "b  DMD", paths["DMD"][0, : half + 1])
    _draw_paths(amd, zone, "c  AMD", paths["AMD"][0, : half + 1])
    _draw_curves(curves, zone, paths)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100, pil_kwargs={"optimize": True} if out.suffix == ".png" else {})
    return {name: float((zone.height(path[:, half]) > 0).float().mean()) for name, path in paths.items()}


def _grid() -> tuple[Tensor, Tensor]:
    axis = torch.linspace(-3.7, 3.7, 241)
    return axis, torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)


def _frame(axes: Axes, title: str) -> None:
    axes.set(xlabel="$x_1$", ylabel="$x_2$", xlim=(-3, 3), ylim=(-2.4, 3.6), aspect="equal")
    axes.set_title(title, fontsize=12, loc="left")


def _draw_landscape(axes: Axes, zone: ForbiddenZone, samples: Tensor) -> None:
    axis, grid = _grid()
    energy = (-zone.teacher.log_prob(grid)).clamp(max=8)
    image = axes.contourf(axis, axis, energy, levels=torch.linspace(0, 8, 25).tolist(), cmap="Blues_r")
    figure = axes.figure
    figure.colorbar(image, ax=axes, label="energy of the teacher, −log p", ticks=range(0, 9, 2), shrink=0.8)
    axes.scatter(samples[:, 0], samples[:, 1], s=6, color="#c8452e", label="samples of the student: collapsed")
    axes.contour(axis, axis, zone.depth(grid), levels=[0.0], colors="black", linewidths=1.5)
    axes.plot([], [], color="black", label="forbidden zone")
    note = "weak forces:\nenergies are\nhigh but flat"
    axes.annotate(note, xy=(0.5, 0.38), xytext=(1.3, 1.0), fontsize=9, arrowprops={"arrowstyle": "->"})
    for i, place in enumerate(zone.modes.tolist()):
        axes.annotate(f"mode {i + 1}", place, color="white", fontsize=9, ha="center", va="center")
    axes.legend(loc="upper left", fontsize=9)
    _frame(axes, "a  the teacher's energy, and a student that is stuck")


def _draw_paths(axes: Axes, zone: ForbiddenZone, title: str, path: Tensor) -> None:
    axis, grid = _grid()
    axes.contour(axis, axis, zone.height(grid), levels=[0.0], colors="#888888", linewidths=1)
    axes.contour(axis, axis, zone.depth(grid), levels=[0.0], colors="black", linewidths=1.5)
    shown = path[:, :100]
    lost = zone.height(shown[-1]) > 0
    for i in range(shown.shape[1]):
        axes.plot(
            shown[:, i, 0],
            shown[:, i, 1],
            lw=0.6,
            color="#c8452e" if lost[i] else "#2e6fc8",
            alpha=0.9 if lost[i] else 0.3,
        )
    for chosen, colour, label in (
        (~lost, "#2e6fc8", "has reached a mode (circles)"),
        (lost, "#c8452e", "still outside"),
    ):
        axes.scatter(shown[-1, chosen, 0], shown[-1, chosen, 1], s=14, color=colour, label=label, zorder=3)
    share = float((zone.height(path[-1]) > 0).float().mean())
    axes.legend(loc="upper left", fontsize=9)
    _frame(axes, f"{title}: {share:.0%} still outside after {len(path) - 1} iterations")


def _draw_curves(axes: Axes, zone: ForbiddenZone, paths: dict[str, Tensor]) -> None:
    for (name, path), colour in zip(paths.items(), ("#222222", "#5aa17f", "#d9903d", "#2e6fc8"), strict=True):
        share = 100 * (zone.height(path) > 0).float().mean(2)
        axes.plot(share.mean(0), color=colour, lw=2, label=name)
        axes.fill_between(range(share.shape[1]), share.amin(0), share.amax(0), color=colour, alpha=0.15, lw=0)
    own = zone.teacher.sample(20_000, torch.Generator().manual_seed(0))
    level = 100 * float((zone.height(own) > 0).float().mean())
    axes.axhline(level, color="#888888", ls=":", label="the teacher's own samples")
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set(xlabel="iterations", ylabel="samples outside every mode (%)", yscale="log", ylim=(1, 110))
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.grid(axis="y", alpha=0.3)
    seeds = len(next(iter(paths.values())))
    axes.legend(fontsize=9, title=f"mean and range of {seeds} seeds", title_fontsize=9)
    axes.set_title("d  how fast they leave", fontsize=12, loc="left")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.toy",
        description="Draw how DMD and AMD leave a forbidden zone in the plane, with exact scores: seconds on one core.",
        epilog="example: python -m distill.toy --out docs/toy.png",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/toy.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    for name, share in draw(options.out).items():
        print(f"{name:16} {share:6.1%} of the samples are outside every mode at half time")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
