"""Times, routed gradients and the defaults of a hook."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distill.objectives.plan import Hook, Roles, Rollout, buffers, claimed_times, fraction_of, routed, time_at, trust
from distill.sampling import Flow, ScaledLinear


def test_fractions_of_the_axis_are_whole_timesteps_of_discrete_schedules() -> None:
    schedule = ScaledLinear()
    fractions = torch.tensor([0.0, 0.0009, 0.25, 0.7499, 0.999, 1.0], dtype=torch.float64)
    assert time_at(schedule, fractions).tolist() == [0, 0, 250, 749, 999, 999]
    assert torch.equal(time_at(Flow(), fractions), fractions)


@pytest.mark.parametrize("schedule", [ScaledLinear(), ScaledLinear(zero_terminal=True), Flow(), Flow(shift=3.0)])
def test_fractions_below_a_steps_level_lie_at_its_time_or_before(schedule: ScaledLinear | Flow) -> None:
    for t in schedule.grid(4):
        level = fraction_of(schedule, float(t))
        below = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1] * level
        assert float(time_at(schedule, below).max()) <= t
        assert float(time_at(schedule, below).max()) == pytest.approx(t, abs=0.002 * schedule.t_max)


def test_routed_losses_keep_their_value_and_reach_their_inputs_alone() -> None:
    layer, x = nn.Linear(3, 1), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    leaf, target = x.clone().requires_grad_(), (2 * x).detach().requires_grad_()
    loss = layer(leaf).pow(2).mean()
    found = routed(loss, [leaf], [target])
    torch.testing.assert_close(found, loss)
    found.backward()
    expected = 2 * layer(x) * layer.weight / 4
    assert target.grad is not None and layer.weight.grad is None and leaf.grad is None
    torch.testing.assert_close(target.grad, expected.detach())


def test_routed_gradients_that_are_not_finite_are_zero() -> None:
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    routed(x.sqrt().sum(), [x]).backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.25]


def test_the_first_hook_that_claims_a_part_decides_its_times() -> None:
    class Claims(Hook):
        def times(self, rollout: Rollout, part: str, rng: torch.Generator, low: float, high: float) -> Tensor | None:
            return torch.full((2,), low + 0.5 * (high - low), dtype=torch.float64) if part == "fake" else None

    rollout, rng = Rollout(torch.zeros(2, 1), {}, (), 1, 0), torch.Generator()
    hooks = [Hook(), Claims()]
    found = claimed_times(hooks, ScaledLinear(), rollout, "fake", rng, (0.0, 0.5))
    assert found is not None and found.tolist() == [250, 250]
    assert claimed_times(hooks, ScaledLinear(), rollout, "dm", rng, (0.0, 0.5)) is None


def test_trust_is_a_product() -> None:
    class Half(Hook):
        def trust(self, iteration: int) -> float:
            return 0.5 if iteration else 1.0

    assert (trust([], 1), trust([Half(), Hook(), Half()], 1), trust([Half()], 0)) == (1.0, 0.25, 1.0)


def test_a_hook_adds_nothing_by_itself(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    hook, rollout = Hook(), rolled()
    t, noise = torch.full((8,), 0.5, dtype=torch.float64), torch.randn(8, 1, 8, 8)
    assert hook.noise(rollout, "dm", t, noise) is noise and hook.teacher(rollout, roles.teacher) is roles.teacher
    assert hook.extra_student_loss(rollout) is hook.extra_fake_loss(rollout) is None
    assert torch.equal(hook.fake_weight(rollout, t), torch.ones(8)) and hook.memory is None


def test_a_rollout_says_what_it_lacks() -> None:
    rollout = Rollout(torch.zeros(2, 1), {}, (), 1, 0)
    for read, name in ((rollout.advantage, "advantage"), (rollout.rewards, "reward"), (rollout.real, "real samples")):
        with pytest.raises(ValueError, match=f"this rollout has no {name}; its task gives none, or the recipe names"):
            read()


def test_memories_are_copies_in_the_state() -> None:
    zeros = torch.zeros(2)
    memory = buffers(a=zeros, b=zeros)
    memory.get_buffer("a")[0] = 1
    assert zeros.sum() == 0 and memory.get_buffer("b").sum() == 0 and set(memory.state_dict()) == {"a", "b"}
