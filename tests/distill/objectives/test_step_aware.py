"""The step that the fake score is told: nothing at first, one row per step; no other network is touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from distill.objectives.plan import Roles, Rollout
from distill.objectives.step_aware import StepAwareFake


def estimate(roles: Roles, network: nn.Module, rollout: Rollout) -> Tensor:
    t = torch.full((len(rollout.x),), 0.5, dtype=torch.float64)
    with torch.no_grad():
        return roles.family.predict(network, rollout.samples, t, rollout.condition).x0  # type: ignore[no-any-return]


def test_a_new_fake_score_is_the_one_that_knows_nothing(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    rollout = rolled(index=1)
    before = estimate(roles, roles.fake, rollout)
    hook = StepAwareFake(roles, (1, 2, 4))
    hook.attend(rollout)
    assert torch.equal(estimate(roles, roles.fake, rollout), before)


def test_each_step_has_its_own_row_and_the_first_one_is_shared(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    hook, rollout = StepAwareFake(roles, (1, 2, 4)), rolled()
    assert isinstance(hook.memory, nn.ModuleList)
    for table in hook.memory:
        nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(0))

    def told(steps: int, index: int) -> Tensor:
        rollout.steps, rollout.index = steps, index
        hook.attend(rollout)
        return estimate(roles, roles.fake, rollout)

    first = told(1, 0)
    assert torch.equal(told(2, 0), first) and torch.equal(told(4, 0), first)
    found = [first, *(told(*step) for step in ((2, 1), (4, 1), (4, 2), (4, 3)))]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert len(hook.memory[0].weight) == len(found)


def test_only_the_row_of_the_step_learns(roles: Roles, rolled: Callable[..., Rollout]) -> None:
    hook, rollout = StepAwareFake(roles, (4,)), rolled(index=2)
    assert isinstance(hook.memory, nn.ModuleList)
    hook.attend(rollout)
    t = torch.full((len(rollout.x),), 0.5, dtype=torch.float64)
    roles.family.predict(roles.fake, rollout.samples, t, rollout.condition).x0.pow(2).sum().backward()
    for table in hook.memory:
        assert table.weight.grad.abs().sum(1).gt(0).tolist() == [False, False, True, False]
    student = estimate(roles, roles.student, rollout)
    nn.init.normal_(hook.memory[0].weight)
    assert torch.equal(estimate(roles, roles.student, rollout), student)


def test_a_network_without_a_time_embedding_is_refused(roles: Roles) -> None:
    blind = Roles(roles.family, roles.teacher, roles.student, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Linear has no time embedding to tell the step; drop step_aware_fake"):
        StepAwareFake(blind, (4,))


def test_a_unet_has_one_place_for_the_step(roles: Roles) -> None:
    """SDXL's further embedding of sizes and pooled text is left alone."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
    )  # fmt: skip
    hook = StepAwareFake(Roles(roles.family, roles.teacher, roles.student, unet), (2, 4))
    assert isinstance(hook.memory, nn.ModuleList) and [tuple(t.weight.shape) for t in hook.memory] == [(5, 32)]
