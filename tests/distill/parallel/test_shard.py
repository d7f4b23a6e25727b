"""One rank is two ranks is four, whole copies or shards: losses, weights, averages, moments, results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.parallel.shard import materialise, skeleton, whole

PROBED = ["telemetry.every=2", "iterations=2"]
LAYOUTS = {
    "ddp": ["parallel.strategy=ddp"],
    "fsdp": ["parallel.strategy=fsdp"],
    "hsdp": ["parallel.strategy=hsdp", "parallel.replicas=2"],
}
OBJECTIVES = {
    "adapters": [
        "adapters={rank: 4, alpha: 8}", "activation_checkpointing=true", "gan={}", "advantage.shrinkage=0.5",
        "safeguards={ramp: 3, diversity: {tolerate: 0.9, refuse: 0.5}, two_key: 1, reward_gap: {window: 1}}",
        "heldout_rewards=[HELDOUT]",
    ],
    "adapter of the fake": ["adapters={rank: 4, alpha: 8, roles: [fake]}", "regression={pairs: 40, steps: 2}"],
    "adapter of the student": ["adapters={rank: 4, alpha: 8, roles: [student]}", "advantage.when=student"],
    "own weights": [
        "gan={r1: 0.1, r1_form: finite}", "divergence={}", "shared_teacher={}", "implicit_alignment={}",
        "step_aware_fake=true", "activation_checkpointing=true", "first_step_anchor={}",
    ],
}  # fmt: skip


def assert_states_equal(a: dict[str, Tensor], b: dict[str, Tensor], bound: float = 1e-5) -> None:
    """Within ``bound`` + 1e-4·|b|, where AdamW's steps are of 2e-4."""
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        if name.endswith("to_k.bias"):
            continue  # softmax takes no notice of it: its gradient is rounding, which AdamW blows up
        assert float(((a[name] - tensor).abs() - 1e-4 * tensor.abs()).max()) < bound, name


def assert_streams_equal(a: list[dict[str, float]], b: list[dict[str, float]], relative: float = 1e-3) -> None:
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=relative, abs=1e-6)


@pytest.fixture(scope="module")
def alone(jobs: Any, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, jobs.distil(str(models), str(folder), PROBED)


@pytest.mark.parametrize(
    ("layout", "size"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 2), ("hsdp", 4)]
)
def test_any_number_of_ranks_trains_what_one_trains(
    ranks: Any, jobs: Any, models: Path, alone: tuple[Path, dict[str, Tensor]], tmp_path: Path, layout: str, size: int
) -> None:
    """Loss stream, probes, every tensor of the state on every rank, and the bundle."""
    folder, state = alone
    told = ranks(size, jobs.distil, str(models), str(tmp_path), [*PROBED, *LAYOUTS[layout]])
    for each in told:
        assert_states_equal(each, state)
    assert_streams_equal(jobs.stream(tmp_path), jobs.stream(folder))
    network = "out/transformer/diffusion_pytorch_model.safetensors"
    a, b = (load_file(place / network) for place in (tmp_path, folder))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name].float(), b[name].float(), atol=2e-3) for name in a)  # of float16


@pytest.mark.parametrize(
    ("objective", "layout", "size"),
    [
        *((objective, "fsdp", 2) for objective in OBJECTIVES),
        ("adapters", "ddp", 4),
        ("own weights", "fsdp", 4),
        ("own weights", "hsdp", 4),
    ],
)
def test_ranks_train_what_one_trains_with_every_kind_of_hook_and_layout(
    ranks: Any, jobs: Any, models: Path, tmp_path: Path, objective: str, layout: str, size: int
) -> None:
    words = [word.replace("HELDOUT", f"{models}/digits-heldout") for word in OBJECTIVES[objective]]
    state = jobs.distil(str(models), str(tmp_path / "one"), words)
    told = ranks(size, jobs.distil, str(models), str(tmp_path / "all"), [*words, *LAYOUTS[layout]])
    for each in told:
        assert_states_equal(each, state)
    assert_streams_equal(jobs.stream(tmp_path / "all"), jobs.stream(tmp_path / "one"))


@pytest.mark.parametrize("more", [[], ["advantage.when=reuse"]], ids=["scored", "reused"])
def test_a_run_trains_on_with_another_number_of_ranks(
    ranks: Any, jobs: Any, models: Path, tmp_path: Path, more: list[str]
) -> None:
    """An iteration on one rank, one on two in shards, one on four in shards and copies are three on one.

    The second one trains the student; the third one may take over its advantages.
    """
    state = jobs.distil(str(models), str(tmp_path / "whole"), more)
    run = str(models), str(tmp_path / "parts")
    assert jobs.stopped(*run, more, 1) == 1
    assert ranks(2, jobs.stopped, *run, [*more, *LAYOUTS["fsdp"]], 2) == [2, 2]
    for each in ranks(4, jobs.distil, *run, [*more, *LAYOUTS["hsdp"]]):
        assert_states_equal(each, state)
    assert_streams_equal(jobs.stream(tmp_path / "parts"), jobs.stream(tmp_path / "whole"))


def test_a_rank_holds_its_share_of_weights_averages_and_moments(
    ranks: Any, jobs: Any, models: Path, tmp_path: Path
) -> None:
    """Of every network, trained or resumed; heads, memories and counts of steps are held whole."""
    more = ["gan={}", "safeguards={diversity: {}}", *LAYOUTS["fsdp"]]
    for one, other in zip(*ranks(2, jobs.parts, str(models), str(tmp_path), more), strict=True):
        kept_whole = {name for name in one if re.search(r"^discriminator/|DiversityWatch|/step$", name)}
        assert {name for name, (sharded, _, _) in one.items() if not sharded} == kept_whole
        for kind in ("student/model", "student/ema", "student/optimizer", "fake/model", "fake/ema", "fake/optimizer"):
            found = [name for name in one if name.startswith(kind) and name not in kept_whole]
            here, there, total = (sum(t[n][i] for n in found) for t, i in ((one, 1), (other, 1), (one, 2)))
            assert here + there == total and here == pytest.approx(total / 2, rel=0.05), kind


def test_what_wants_gradients_never_changes(ranks: Any, jobs: Any, models: Path, tmp_path: Path) -> None:
    """FSDP2 sums the gradients of what wants them when a network is first run."""
    more = ["adapters={rank: 4, alpha: 8}", "gan={}"]
    alone = jobs.trainable(str(models), str(tmp_path / "one"), more)
    assert len(alone) == 1 and 0 < sum(alone[0].values()) < len(alone[0])
    assert ranks(2, jobs.trainable, str(models), str(tmp_path / "two"), [*more, *LAYOUTS["fsdp"]]) == [alone, alone]


def test_a_run_in_shards_starts_from_one_of_one_rank(ranks: Any, jobs: Any, models: Path, tmp_path: Path) -> None:
    """First weights and averages are that run's weights; its averages and moments are left."""
    trained = jobs.distil(str(models), str(tmp_path / "one"), [], 2)
    weights = {name: tensor for name, tensor in trained.items() if "/model/" in name}
    more = [f"initialise_from={tmp_path}/one", "iterations=1", *LAYOUTS["fsdp"]]
    for each in ranks(2, jobs.first_state, str(models), str(tmp_path / "two"), more):
        assert each.keys() == {*weights, *(name.replace("/model/", "/ema/") for name in weights)}
        assert [n for n, t in each.items() if not torch.equal(t, weights[n.replace("/ema/", "/model/")])] == []


@pytest.mark.parametrize("recipe", ["sdxl-dmd2-4step", "wan-1.3b-amd-4step"])
def test_production_recipes_train_in_shards_what_they_train_alone(
    ranks: Any, jobs: Any, tmp_path: Path, recipe: str
) -> None:
    """A UNet with a GAN on its middle block, and Wan's transformer; the blocks of both computed again.

    Wider and deeper than the toys, so that the order of sums shows in the moments, which are not divided by their size.
    """
    inputs = str(tmp_path / "inputs")
    state = jobs.rehearse(recipe, inputs, str(tmp_path / "one"), ["parallel.strategy=ddp"])
    for each in ranks(2, jobs.rehearse, recipe, inputs, str(tmp_path / "two"), ["parallel.strategy=fsdp"]):
        assert_states_equal(each, state, bound=5e-5)


def test_groups_of_ranks_sum_their_gradients_once_per_step(ranks: Any, jobs: Any, models: Path, tmp_path: Path) -> None:
    """Two micro-batches per rank, in shards within groups that are copies."""
    more = ["accumulate=8", "batch_size=32", "iterations=1", "fake_warmup=0"]
    state = jobs.distil(str(models), str(tmp_path / "one"), more)
    for each in ranks(4, jobs.distil, str(models), str(tmp_path / "four"), [*more, *LAYOUTS["hsdp"]]):
        assert_states_equal(each, state)


def test_bfloat16_is_gathered_and_float32_is_kept(ranks: Any, jobs: Any, models: Path, tmp_path: Path) -> None:
    """Masters, averages and moments; losses stay within 5 % of float32 in shards, which round norms as well."""
    half = ["precision=bfloat16"]
    state = jobs.distil(str(models), str(tmp_path / "one"), half)
    (told, _) = ranks(2, jobs.distil, str(models), str(tmp_path / "two"), [*half, "parallel.strategy=fsdp"])
    assert all(tensor.dtype == state[name].dtype == torch.float32 for name, tensor in told.items())
    for one, two in zip(jobs.stream(tmp_path / "one"), jobs.stream(tmp_path / "two"), strict=True):
        assert two["fake/loss"] == pytest.approx(one["fake/loss"], rel=0.05)
        assert two["fake/loss"] != one["fake/loss"]


def test_a_skeleton_has_everything_but_values() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    network[0].bias.requires_grad_(False)
    bare = skeleton(network)
    assert all(t.is_meta for t in (*bare.parameters(), *bare.buffers()))
    assert [p.requires_grad for p in bare.parameters()] == [p.requires_grad for p in network.parameters()]
    assert not any(t.is_meta for t in (*network.parameters(), *network.buffers()))
    assert whole(network) is network


def test_tied_weights_stay_tied(ranks: Any) -> None:
    assert ranks(2, tied) == [(True, 2.0), (True, 2.0)]


def tied() -> tuple[bool, float]:
    import torch.distributed as dist

    network = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    network[1].weight = network[0].weight
    nn.init.constant_(network[0].weight, 2.0 + dist.get_rank())
    materialise(network)
    return network[1].weight is network[0].weight, float(network[1].weight[0, 0])
