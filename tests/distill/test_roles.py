"""Roles as adapters of one base: equal to the teacher at first, apart from each other, merged without loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from distill.config import Adapters, SitModel
from distill.families.sit import Sit
from distill.parallel.mean import Average
from distill.parallel.shard import kept_ties
from distill.roles import Networks, adapted, checkpoint_activations, merge, separate

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2", "conv1")
Made = tuple[nn.Module, Callable[[nn.Module], Tensor]]


@pytest.fixture(params=["sit", "sdxl"])
def made(request: pytest.FixtureRequest) -> Made:
    """A tiny teacher of each kind and how it is run; SDXL's has convolutions among its targets."""
    torch.manual_seed(0)
    x = torch.randn(2, 1 if request.param == "sit" else 4, 8, 8)
    if request.param == "sit":
        network = Sit(SitModel(family="sit", width=16, layers=2, heads=2)).new_network()
        labels = torch.tensor([1, 3])
        return network, lambda m: m(x, timestep=torch.tensor([300.0, 700.0]), class_labels=labels).sample
    network = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1, attention_head_dim=2, cross_attention_dim=12,
    )  # fmt: skip
    text = torch.randn(2, 5, 12)
    return network, lambda m: m(x, torch.tensor([300, 700]), encoder_hidden_states=text).sample


def roles(network: nn.Module, **changes: Any) -> Networks:
    return adapted(network, Adapters(**{"rank": 3, "alpha": 6, **changes}), TARGETS, seed=1)


def stir(module: nn.Module) -> None:
    """Weights as after some training."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def test_at_first_every_role_is_the_teacher(made: Made) -> None:
    network, run = made
    expected = run(network).detach()
    for held in (separate(copy.deepcopy(network)), roles(copy.deepcopy(network)), roles(network, roles=("fake",))):
        for role in (held.teacher, held.student, held.fake):
            assert torch.equal(run(role).detach(), expected)


def test_each_adapter_moves_its_own_role_alone(made: Made) -> None:
    network, run = made
    held = roles(network)
    before = run(held.teacher).detach()
    stir(held.student)
    student = run(held.student).detach()
    assert not torch.allclose(student, before, atol=1e-3)
    assert torch.equal(run(held.fake), before) and torch.equal(run(held.teacher), before)
    stir(held.fake)
    assert torch.equal(run(held.student), student) and torch.equal(run(held.teacher), before)


def test_gradients_reach_their_role_and_flags_never_change(made: Made) -> None:
    network, run = made
    held = roles(network)
    stir(held.student)
    stir(held.fake)
    flags = {name: p.requires_grad for name, p in held.held[0].named_parameters()}
    loss = run(held.student).pow(2).mean()
    with torch.no_grad():
        run(held.fake), run(held.teacher)
    loss.backward()
    assert all(p.grad is not None for p in held.student.parameters())
    assert all(p.grad is None for p in held.fake.parameters())
    assert not list(held.teacher.parameters())
    assert {name: p.requires_grad for name, p in held.held[0].named_parameters()} == flags
    trained = {id(p) for p in held.held[0].parameters() if p.requires_grad}
    assert {id(p) for role in (held.student, held.fake) for p in role.parameters()} == trained
    assert not {id(p) for p in held.student.parameters()} & {id(p) for p in held.fake.parameters()}


def test_merged_is_unmerged(made: Made) -> None:
    network, run = made
    plain = copy.deepcopy(network)
    held = roles(network)
    stir(held.student)
    merged = merge(plain, held.student.state_dict(), scale=6 / 3)
    torch.testing.assert_close(run(merged), run(held.student), rtol=1e-4, atol=1e-5)


def test_names_are_those_of_lora_files(made: Made) -> None:
    network, _ = made
    names = set(roles(network).student.state_dict())
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert not any("student" in name or "base" in name for name in names)


def test_mixed_layouts_hold_two_networks(made: Made) -> None:
    network, run = made
    held = roles(network, roles=("fake",))
    assert len(held.held) == 2 and held.held[1] is held.student
    stir(held.student)
    assert torch.equal(run(held.fake), run(held.teacher))
    assert all(p.requires_grad for p in held.student.parameters())


def test_a_base_in_bfloat16_computes_what_autocast_computes(made: Made) -> None:
    network, run = made
    exact, half = roles(copy.deepcopy(network)), roles(network, base="bfloat16")
    assert all(p.dtype == torch.float32 for p in half.student.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        torch.testing.assert_close(run(half.student), run(exact.student))


@pytest.mark.parametrize("layout", ["separate", "adapted"])
def test_activations_computed_again_give_the_same_gradients(made: Made, layout: str) -> None:
    """Even though another role runs between the student's forward and backward pass."""
    network, run = made
    held = [separate(n) if layout == "separate" else roles(n) for n in (copy.deepcopy(network), network)]
    gradients, kept = [], []
    for again, one in enumerate(held):
        one.held[0].train()  # diffusers computes again in training mode only
        torch.manual_seed(2)
        stir(one.student)
        stir(one.fake)
        if again:
            for each in one.held:
                checkpoint_activations(each)
        saved = list[int]()

        def keep(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = run(one.student).pow(2).mean()
        with torch.no_grad():
            run(one.fake)
        loss.backward()
        gradients.append([p.grad for p in one.student.parameters()])
        kept.append(sum(saved))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert kept[1] < 0.7 * kept[0]


def test_an_average_follows_an_adapter_alone(made: Made) -> None:
    network, run = made
    held = roles(network)
    average = Average(held.student)
    teacher = run(held.teacher).detach()
    stir(held.student)
    moved = run(held.student).detach()
    average.swap()
    assert torch.equal(run(held.student), teacher)
    average.swap()
    average.follow(0.0)
    assert torch.equal(run(held.student), moved)
    assert set(average.state_dict()) == set(held.student.state_dict())


def test_parameters_that_are_replaced_in_the_base_are_replaced_in_its_views(made: Made) -> None:
    network, run = made
    held = roles(network)
    with kept_ties(held.held[0], [held.student, held.fake]):
        for module in held.held[0].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    before = run(held.teacher).detach()
    stir(held.student)
    assert not torch.allclose(run(held.student), before, atol=1e-3)
    assert torch.equal(run(held.fake), before)
