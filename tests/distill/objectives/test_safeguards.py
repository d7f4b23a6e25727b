"""Each safeguard beside the failure that it prevents: the same world without it, and with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.families.base import Prediction, coefficients
from distill.math import convert, group_advantage
from distill.objectives.amd import DynamicScoreAdaptation, RepulsiveSharpening
from distill.objectives.dmd import fake_loss, match, student_loss
from distill.objectives.plan import Hook, Roles, Rollout, student_weights, trust
from distill.objectives.safeguards import (
    CoherenceGate,
    DiversityWatch,
    GuidanceCeiling,
    Ramp,
    RewardGap,
    TwoKey,
    falling,
    group_diversity,
)
from distill.sampling import Flow
from distill.toy import Mixture, Plane

NONE: Any = None
Network = Any


class World:
    """Flow matching with networks (x_t, t) -> clean estimate, so that scores can be exact."""

    prediction, schedule = "flow", Flow()

    def predict(
        self, network: Network, x_t: Tensor, t: Tensor, condition: Any, *, taps: Sequence[str] = ()
    ) -> Prediction:
        level = t[:, None].to(x_t)
        flow = (x_t - network(x_t, level)) / level
        return Prediction(*convert("flow", x_t, flow, *coefficients(self.schedule, t)), features={})

    def unconditional(self, n: int) -> dict[str, Tensor]:
        return {"c": torch.zeros(n)}


def gaussian(mean: Tensor | float, deviation: Tensor | float) -> Network:
    """The denoiser of N(mean, deviation²)."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        gain = (1 - t) * deviation**2 / (((1 - t) * deviation) ** 2 + t**2)
        return mean + gain * (x_t - (1 - t) * mean)

    return denoise


def roles_of(teacher: Network, fake: Network) -> Roles:
    family: Any = World()
    return Roles(family, teacher, NONE, fake)


def rollout_of(x: Tensor, advantage: Tensor | None = None, **more: Any) -> Rollout:
    rollout = Rollout(x, {"c": torch.zeros(len(x))}, (), 1, 0, **more)
    if advantage is not None:
        rollout.advantage = lambda: advantage
    return rollout


# --- the reward's gap ----------------------------------------------------------------------------------------------


def hack(guards: list[Hook], iterations: int = 300) -> tuple[float, float]:
    """Sharpening in a world whose teacher is N(0, 1): the training reward is x, a held-out one falls with x².

    The fake score is the exact one of p·e^{−trust·a}, N(μ − trust·σ, σ²), whose fixed point lies trust·σ beyond the
    teacher. Returns the student's mean and the last trust.
    """
    mean, rng, factor = torch.tensor(0.0, requires_grad=True), torch.Generator().manual_seed(0), 1.0
    optimizer = torch.optim.SGD([mean], lr=0.03)
    for iteration in range(iterations):
        x = mean + torch.randn(128, 1, generator=rng)
        factor = trust(guards, iteration)
        rollout = rollout_of(x, heldout={"judge": -(x.detach()[:, 0] ** 2)})
        rewards = x.detach()[:, 0]
        rollout.rewards = lambda rewards=rewards: rewards
        t, noise = torch.full((128,), 0.5, dtype=torch.float64), torch.randn(128, 1, generator=rng)
        fake = gaussian(float(mean.detach()) - factor, 1.0)
        loss, _ = student_loss(World(), gaussian(0.0, 1.0), fake, rollout, t, noise, guidance=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for guard in guards:
            guard.after_iteration([rollout])
    return float(mean.detach()), factor


def test_a_hacked_reward_runs_away_unless_its_gap_is_watched() -> None:
    """Without the guard the student sits one deviation off, where the held-out reward has fallen by as much."""
    free, _ = hack([])
    assert free == pytest.approx(1.0, abs=0.15)
    guarded, factor = hack([RewardGap(["judge"], tolerate=0.2, refuse=0.6, window=5, decay=0.8)])
    assert 0.1 < guarded < 0.5 and factor < 0.6


def gap_after(train: list[float], held: list[float], **options: Any) -> RewardGap:
    """A guard that has seen means like these, each of two samples one deviation to either side."""
    guard = RewardGap(["a"], **{"tolerate": 0.5, "refuse": 1.5, "window": 2, "decay": 0.0} | options)
    for r, h in zip(train, held, strict=True):
        both = torch.tensor([-1.0, 1.0])
        rollout = rollout_of(torch.zeros(2, 1), heldout={"a": h + 2 * both})
        rewards = r + both
        rollout.rewards = lambda rewards=rewards: rewards
        guard.after_iteration([rollout])
    return guard


def test_the_gap_is_counted_in_deviations_between_samples() -> None:
    assert gap_after([0, 0], [0, 0]).gap() == 0.0
    assert gap_after([0, 1, 2], [0, 2, 3]).gap() == pytest.approx(1.5 - 1.0)  # from the means 0.5 and 1 of the window
    assert gap_after([5, 5, 9], [7, 7, 7]).gap() == pytest.approx(4.0)
    assert gap_after([5, 5, 9], [7, 7, 15]).gap() == pytest.approx(0.0)
    assert gap_after([0, 9], [0, 0], window=5).gap() == 0.0


def test_trust_falls_between_what_is_tolerated_and_what_is_refused() -> None:
    assert [falling(v, 0.5, 1.5) for v in (-3.0, 0.5, 1.0, 1.5, 9.0)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert gap_after([0, 0, 1], [0, 0, 0]).trust(0) == pytest.approx(0.5)
    watching = gap_after([0, 0, 1], [0, 0, 0], acts=False)
    assert watching.gap() == pytest.approx(1.0) and watching.trust(0) == 1.0


def test_scores_that_are_not_finite_leave_the_gap_alone() -> None:
    guard = gap_after([0, 0, 1], [0, 0, 0])
    lost = rollout_of(torch.zeros(2, 1), heldout={"a": torch.full((2,), torch.nan)})
    lost.rewards = lambda: torch.full((2,), 5.0)
    guard.after_iteration([lost])
    assert guard.gap() == pytest.approx(1.0)


def test_a_gap_survives_in_its_memory_and_does_not_see_micro_batches() -> None:
    whole, parts = gap_after([], []), gap_after([], [])
    scores = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for row in scores:
        rollouts = []
        for own in (slice(0, 8), slice(0, 4), slice(4, 8)):
            rollout = rollout_of(torch.zeros(len(row[own]), 1), heldout={"a": 2 * row[own] ** 2})
            rollout.rewards = lambda values=row[own]: values
            rollouts.append(rollout)
        whole.after_iteration(rollouts[:1])
        parts.after_iteration(rollouts[1:])
    assert whole.gap() == pytest.approx(parts.gap()) != 0.0
    fresh = gap_after([], [])
    fresh.memory.load_state_dict(whole.memory.state_dict())
    assert fresh.gap() == whole.gap()


# --- diversity -----------------------------------------------------------------------------------------------------


def collapse(guards: list[Hook], iterations: int = 300) -> float:
    """Sharpening with 0.4·a for a reward −x² under the teacher N(0, 1); returns the student's deviation.

    σ_r = √2·s², so the tilted fake score is N(0, s²/(1 − 0.4·√2·trust)): a narrower student sharpens the reward, and
    the fixed point is s² = 1 − 0.4·√2·trust.
    """
    log_s, rng = torch.tensor(0.0, requires_grad=True), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD([log_s], lr=0.03)
    for iteration in range(iterations):
        x = log_s.exp() * torch.randn(128, 1, generator=rng)
        rollout = rollout_of(x)
        factor = trust(guards, iteration)
        fake = gaussian(0.0, log_s.detach().exp() / (1 - 0.4 * 2**0.5 * factor) ** 0.5)
        t, noise = torch.full((128,), 0.5, dtype=torch.float64), torch.randn(128, 1, generator=rng)
        loss, _ = student_loss(World(), gaussian(0.0, 1.0), fake, rollout, t, noise, guidance=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for guard in guards:
            guard.after_iteration([rollout])
    return float(log_s.detach().exp())


def test_samples_become_alike_unless_their_diversity_is_watched() -> None:
    free = collapse([])
    assert free == pytest.approx((1 - 0.4 * 2**0.5) ** 0.5, abs=0.05)
    guarded = collapse([DiversityWatch([1], group=4, tolerate=0.95, refuse=0.75, window=3, decay=0.8)])
    assert guarded > free + 0.1


def test_diversity_is_the_distance_between_samples_of_a_group() -> None:
    x = torch.randn(8, 3, 2, generator=torch.Generator().manual_seed(0))
    expected = []
    for group in x.reshape(2, 4, 6):
        pairs = [(a - b).pow(2).mean() for i, a in enumerate(group) for b in group[i + 1 :]]
        expected.append(torch.stack(pairs).mean().sqrt())
    torch.testing.assert_close(group_diversity(x, 4), torch.stack(expected))


def test_each_step_has_its_own_reference() -> None:
    """A blurred first step is no loss of diversity."""
    watch = DiversityWatch([2, 1], group=2, tolerate=0.8, refuse=0.5, window=1, decay=0.0)
    spreads = {(1, 0): 1.0, (2, 0): 0.2, (2, 1): 3.0}

    def see(factor: float) -> None:
        for (steps, index), spread in spreads.items():
            x = factor * spread * torch.tensor([[1.0], [-1.0]])
            watch.after_iteration([Rollout(x, {}, (), steps, index)])

    see(1.0)
    assert watch.ratio() == pytest.approx(1.0) and watch.trust(0) == 1.0
    see(0.65)
    assert watch.ratio() == pytest.approx(0.65) and watch.trust(0) == pytest.approx(0.5)
    see(0.3)
    assert watch.trust(0) == 0.0


# --- the ramp ------------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """A fake score per seed that learns: the denoiser of a Gaussian, which starts as the teacher's class N(1, 0.4²)."""

    def __init__(self, seeds: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(CLASSES.means[1].repeat(seeds, 1))
        self.log_s = nn.Parameter(torch.full((seeds, 2), math.log(0.4)))

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        own = [p.repeat_interleave(len(x_t) // len(self.mean), 0) for p in (self.mean, self.log_s)]
        mean, variance = own[0], (2 * own[1]).exp()
        a, s = alpha.to(x_t)[:, None], sigma.to(x_t)[:, None]
        return mean + a * variance / (a**2 * variance + s**2) * (x_t - a * mean)


CLASSES = Mixture(torch.ones(2), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.4, torch.tensor([0, 1]))
SEEDS, EACH = 5, 128


def grow_up(hooks: list[Hook], updates: int, iterations: int = 180) -> Tensor:
    """Share of the particles of each seed that end more than five deviations from the class that they should show.

    Guidance is 4, and targets lie two deviations off. The reward is the distance from the class, which is right
    everywhere. The fake score learns by its own loss, ``updates`` times per step of the particles.
    """
    family, rng, home = Plane(CLASSES.unconditional), torch.Generator().manual_seed(0), CLASSES.means[1]
    condition, fake = {"labels": torch.ones(SEEDS * EACH, dtype=torch.int64)}, Learner(SEEDS)
    optimizer = torch.optim.Adam(fake.parameters(), lr=0.0142)

    def anywhere(x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.02 + 0.96 * torch.rand(len(x), generator=rng).double(), torch.randn(x.shape, generator=rng)

    particles = home + 0.3 * torch.randn(SEEDS * EACH, 2, generator=rng)
    for iteration in range(iterations):
        x = particles.reshape(-1, 2, 1, 1).requires_grad_()
        advantage = group_advantage(-(particles - home).norm(dim=1), 4)
        rollout = Rollout(x, condition, (), 1, 0, lambda a=advantage: a, trust=trust(hooks, iteration))
        loss, _ = student_loss(family, CLASSES, fake, rollout, *anywhere(x), guidance=4.0, hooks=hooks)
        (gradient,) = torch.autograd.grad(loss, x)
        for _ in range(updates):
            optimizer.zero_grad()
            fake_loss(family, fake, rollout, *anywhere(x), hooks=hooks)[0].backward()
            optimizer.step()
        others = torch.rand(SEEDS, EACH, generator=rng).argsort(1) + EACH * torch.arange(SEEDS)[:, None]
        particles = (particles - 0.05 * x.numel() * gradient.flatten(1))[others.flatten()].detach()
    return ((particles - home).norm(dim=1) > 5 * 0.4).float().reshape(SEEDS, EACH).mean(1)


def test_a_young_fake_score_loses_what_adaptation_amplifies_unless_s_grows_with_it() -> None:
    """The fake score starts as the teacher: x_c − x_f is 0 and guidance acts alone, until it has followed the samples.

    After 180 steps 39 % of DMD2's particles are lost. Adaptation gives 1 + s times the guidance, and 1 − s times what
    grows against it, to those that are still near their class, the best of their groups, so that these leave too:
    over 96 % in each of 96 seeds (with sharpening in nine of ten), where with a ramp that ends at 0.72·s it is 2 %.
    To a fake score that learns twice per step none of this happens: 2 % without and 8 % with the ramp, 20 % of DMD2.
    The ramp must last as long as the youth: at half the learning rate AMD loses all in spite of it.
    Medians of seeds, since a single particle that the normaliser throws far may take the fake score with it.
    """
    amd, ramp = DynamicScoreAdaptation(0.5), Ramp(start=0, length=250)
    dmd2, free, ramped = (float(grow_up(hooks, updates=1).median()) for hooks in ([], [amd], [amd, ramp]))
    assert ramped < 0.15 and 2 * ramped < dmd2 < 0.55 and free > 0.9, (dmd2, free, ramped)
    grown, both = (float(grow_up(hooks, updates=2).median()) for hooks in ([amd], [amd, ramp]))
    assert max(grown, both) < 0.15, (grown, both)


def test_before_a_ramp_begins_both_weights_are_those_of_dmd2() -> None:
    ramp = Ramp(start=100, length=50)
    assert [ramp.trust(i) for i in (0, 100, 125, 150, 999)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    advantage = torch.tensor([-1.0, 1.0])
    x = torch.zeros(2, 1)
    young, untamed = rollout_of(x, advantage, trust=ramp.trust(100)), rollout_of(x, advantage)
    hook, weight = DynamicScoreAdaptation(0.5), RepulsiveSharpening(group=2)
    assert hook.student_weights(untamed, NONE)[1].tolist() == [1.5, 0.5]
    assert hook.student_weights(young, NONE)[1].tolist() == [1.0, 1.0]
    t = torch.zeros(2, dtype=torch.float64)
    assert weight.fake_weight(young, t).tolist() == [1.0, 1.0] != weight.fake_weight(untamed, t).tolist()


# --- guidance ------------------------------------------------------------------------------------------------------


def test_guidance_of_a_sample_has_a_ceiling() -> None:
    """s = 0.5 and ω = 8 make ω_i = 22 of the best sample; with the ceiling 12, and worse samples are as before."""
    advantage = torch.tensor([1.0, 0.2, 0.0, -1.0])
    rollout, roles = rollout_of(torch.randn(4, 2), advantage), roles_of(gaussian(0.0, 1.0), gaussian(1.0, 1.0))
    t, noise = torch.full((4,), 0.5, dtype=torch.float64), torch.randn(4, 2)

    def omega(hooks: list[Hook]) -> Tensor:
        matching = match(World(), roles.teacher, roles.fake, rollout, t, noise, guidance=8.0)
        alpha, beta = student_weights(hooks, rollout, matching)
        return 1 + alpha / beta * 7

    free = omega([DynamicScoreAdaptation(0.5)])
    capped = omega([DynamicScoreAdaptation(0.5), GuidanceCeiling(1.5)])
    assert float(free[0]) == pytest.approx(22.0) and float(capped[0]) == pytest.approx(12.0)
    torch.testing.assert_close(capped[1:], free[1:])
    assert rollout.telemetry["omega_capped"] == 0.25


def test_without_guidance_there_is_nothing_to_cap() -> None:
    matching: Any = type("M", (), {"alpha": torch.ones(2), "beta": torch.ones(2), "guidance": 1.0})()
    assert GuidanceCeiling(1.5).limit(rollout_of(torch.zeros(2, 1)), matching) == (matching.alpha, matching.beta)


# --- coherence -----------------------------------------------------------------------------------------------------


def anywhere(rollout: Rollout, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Times in [0.4, 0.9] and noise."""
    return 0.4 + 0.5 * torch.rand(len(rollout.x), generator=rng).double(), torch.randn(rollout.x.shape, generator=rng)


def test_noise_is_not_amplified_where_two_draws_disagree() -> None:
    """On one side the teacher hallucinates: its estimate is noise. AMD's β makes the random walk there faster."""
    rng = torch.Generator().manual_seed(0)
    sane = gaussian(0.0, 0.5)

    def teacher(x_t: Tensor, t: Tensor) -> Tensor:
        wild = 30 * torch.randn(x_t.shape, generator=rng)
        return torch.where(x_t.mean(1, keepdim=True) > 0, wild, sane(x_t, t))

    x = torch.cat((torch.full((100, 64), -4.0), torch.full((100, 64), 4.0)))
    roles = roles_of(teacher, gaussian(x, 0.2))
    advantage = torch.full((200,), -1.0)
    draws = {"coherent": torch.Generator().manual_seed(1)}
    rollout = rollout_of(x, advantage, random=lambda purpose: draws[purpose], renoise=anywhere)
    t, noise = torch.full((200,), 0.5, dtype=torch.float64), torch.randn(200, 64, generator=rng)

    def beta(hooks: list[Hook]) -> Tensor:
        matching = match(World(), roles.teacher, roles.fake, rollout, t, noise, guidance=2.0)
        return student_weights(hooks, rollout, matching)[1]

    amd = DynamicScoreAdaptation(0.5)
    assert torch.equal(beta([amd]), torch.full((200,), 1.5))
    gated = beta([amd, CoherenceGate(roles, threshold=0.6)])
    assert bool((gated[:100] == 1.5).all()) and bool((gated[100:] == 1.0).all())
    assert rollout.telemetry["coherence_gated"] == 0.5
    good = rollout_of(x, torch.ones(200), random=lambda purpose: torch.Generator().manual_seed(1), renoise=anywhere)
    matching = match(World(), roles.teacher, roles.fake, good, t, noise, guidance=2.0)
    hooks = [amd, CoherenceGate(roles, threshold=0.6)]
    assert torch.equal(student_weights(hooks, good, matching)[1], torch.full((200,), 0.5))
    assert good.telemetry["coherence_gated"] == 0.0


def test_the_second_draw_is_made_as_matching_makes_its_own() -> None:
    """The gate asks the teacher that a hook puts in the place of the recipe's, at the point where the task re-noises.

    x_c − x_f is a multiple of x_t, negative for the hook's teacher, positive for the other: a draw that repeats
    matching's own has a cosine of 1.
    """

    class Other(Hook):
        def teacher(self, rollout: Rollout, teacher: Any) -> Any:
            return gaussian(0.0, 0.5)

    roles = roles_of(gaussian(0.0, 4.0), gaussian(0.0, 2.0))
    point = torch.full((4,), 0.3, dtype=torch.float64), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    rollout = rollout_of(torch.zeros(4, 8), renoise=lambda rollout, rng: point)
    matching = match(World(), roles.teacher, roles.fake, rollout, *point, guidance=2.0, hooks=[Other()])
    CoherenceGate(roles, threshold=0.0).limit(rollout, matching)
    assert float(torch.as_tensor(rollout.telemetry["coherence"])) == pytest.approx(1.0, abs=1e-5)


# --- two keys ------------------------------------------------------------------------------------------------------


def test_a_sample_that_only_the_reward_likes_is_neither_refined_nor_spared() -> None:
    """The best-rewarded sample of each group lies where the teacher N(0, 0.5²) cannot denoise it."""
    x = torch.tensor([0.1, -0.2, 0.4, 6.0, 0.3, 0.0, -0.5, -7.0])[:, None].expand(8, 6).contiguous()
    rewards = torch.tensor([2.0, 1.0, 0.0, 9.0, 2.0, 1.0, 0.0, 9.0])
    advantage = group_advantage(rewards, 4)
    roles = roles_of(gaussian(0.0, 0.5), NONE)
    keys = TwoKey(roles, group=4, draws=4, time_range=(0.1, 0.9))
    rollout = rollout_of(x, random=lambda purpose: torch.Generator().manual_seed(0))
    judged = keys.judge(rollout, advantage)
    hacked = [3, 7]
    assert bool((advantage[hacked] > 1).all()) and judged[hacked].tolist() == [0.0, 0.0]
    for values, expected in ((advantage, 1.5), (judged, 1.0)):
        hacked_rollout = rollout_of(x, values)
        alpha = DynamicScoreAdaptation(0.5).student_weights(hacked_rollout, NONE)[0][hacked]
        assert alpha.tolist() == [expected, expected]
    spared = RepulsiveSharpening().fake_weight(rollout_of(x, advantage), torch.zeros(8))[3]
    assert (
        float(spared) < 0.4 and float(RepulsiveSharpening().fake_weight(rollout_of(x, judged), torch.zeros(8))[3]) == 1
    )


def test_keys_that_agree_turn_by_the_weaker() -> None:
    rollout = rollout_of(torch.zeros(4, 1))
    keys = TwoKey(NONE, group=4, draws=1, time_range=(0.1, 0.9))
    residual = torch.tensor([4.0, 3.0, 2.0, 1.0])
    keys.residual = lambda x, condition, rng: residual  # type: ignore[method-assign]
    key = group_advantage(-residual, 4)
    advantage = torch.tensor([-0.3, 0.4, 0.0, 5.0])
    expected = torch.tensor([-0.3, 0.0, 0.0, float(key[3])])
    torch.testing.assert_close(keys.judge(rollout, advantage), expected)


def test_a_group_is_judged_at_the_same_noise() -> None:
    """Equal samples have equal residuals, and the residual grows with the distance from what the teacher knows."""
    keys = TwoKey(roles_of(gaussian(0.0, 0.5), NONE), group=4, draws=3, time_range=(0.1, 0.9))
    equal = keys.residual(torch.full((8, 5), 0.3), {}, torch.Generator().manual_seed(0)).reshape(2, 4)
    assert torch.equal(equal, equal[:, :1].expand(2, 4)) and float(equal[0, 0]) != float(equal[1, 0])
    distances = torch.tensor([0.0, 1.0, 3.0, 9.0])[:, None].expand(4, 5)
    found = keys.residual(distances, {}, torch.Generator().manual_seed(0)).tolist()
    assert all(a < b for a, b in pairwise(found))
