"""The arithmetic of traffic: rings, passes per micro-batch against those that are run, and what the table says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from distill.config import DistillRecipe, load_recipe
from distill.dryrun import Machine, _missing, plan
from distill.parallel.traffic import Links, load, main, passes, table

ROOT = Path(__file__).parents[3]


def test_a_ring_passes_all_but_its_own_part() -> None:
    links = Links(nvlink=100.0, network=10.0, latency=1e-3, machine=4)
    assert links.ring(8e9, 1) == 0.0
    assert links.ring(8e9, 4) == pytest.approx(3e-3 + 6e9 / 100e9)
    assert links.ring(8e9, 8) == pytest.approx(7e-3 + 4e9 / 40e9)  # half of it enters through four adapters
    assert links.apart(8e9, 1) == 0.0
    assert links.apart(8e9, 2) == pytest.approx(2e-3 + 8e9 / 10e9)


@pytest.mark.parametrize(
    "changes",
    [
        ["steps=[4]", "fake_per_student=5"],
        ["steps=[1, 2, 4]", "fake_per_student=2"],
        ["steps=[2]", "fake_per_student=2", "gan={}"],
        ["steps=[2]", "fake_per_student=2", "gan={source: teacher}"],
        ["steps=[2]", "fake_per_student=2", "gan={fake_weight: 0, r1: 1, r1_form: finite}"],
    ],
)
def test_passes_are_those_of_a_run(jobs: Any, models: Path, tmp_path: Path, changes: list[str]) -> None:
    """Forward and backward passes of the first block of every network per micro-batch, over many iterations."""
    made = jobs.trainer(str(models), str(tmp_path), ["fake_warmup=0", "accumulate=1", "batch_size=4", *changes])
    seen = Counter[str]()

    def count(block: nn.Module, inputs: Any, output: Any) -> None:
        seen["forward"] += 1
        if output.requires_grad:
            output.register_hook(lambda gradient: seen.update(["backward"]))

    for network in made.task.networks():
        next(m for m in network.modules() if isinstance(m, made.task.blocks())).register_forward_hook(count)
    rounds = 20
    for made.iteration in range(rounds):
        made._step()
    gathers, reduces = passes(made.recipe)
    if not made.recipe.gan:  # whose gradients stop at the samples where the student learns
        assert seen["backward"] / rounds == pytest.approx(reduces, abs=0.01)
    assert (seen["forward"] + seen["backward"]) / rounds == pytest.approx(gathers, rel=0.1)  # steps are drawn


def test_the_table_says_what_does_not_fit_and_how_the_batch_grows(jobs: Any, models: Path, tmp_path: Path) -> None:
    recipe = jobs.trainer(str(models), str(tmp_path), ["batch_size=64", "accumulate=16"]).recipe
    roomy, tight = (list(table(recipe, [8, 64], Links(), Machine(gib=gib))) for gib in (80.0, 1e-4))
    assert roomy[0].startswith("| GPUs | strategy | batch |") and len(roomy) == 2 + 2 * 3
    cells = {tuple(part.strip() for part in row.split("|")[1:3]): row.split("|")[3:-1] for row in roomy[2:]}
    assert all("too much" in row for row in tight[2:]) and not any("too much" in row for row in roomy)
    assert int(cells["8", "fsdp"][0]) == 64 and int(cells["64", "fsdp"][0]) == 64 * 4


def test_copies_on_each_machine_talk_less_than_one_copy_over_all(jobs: Any, models: Path, tmp_path: Path) -> None:
    """Shards over more ranks take less memory and longer rings."""
    recipe = jobs.trainer(str(models), str(tmp_path), []).recipe
    counted = plan(recipe, Machine())
    whole, shards, groups = (load(counted, 64, strategy, Links()) for strategy in ("ddp", "fsdp", "hsdp"))
    assert groups.talking < shards.talking and groups.gathered == shards.gathered > whole.gathered == 0
    assert shards.memory < groups.memory < whole.memory
    assert whole.computing == shards.computing == groups.computing


def test_a_shared_teacher_is_cut_as_the_other_networks_and_a_head_is_not() -> None:
    digits = [f"teacher={ROOT}/models/digits-teacher", "batch_size=64", "accumulate=64"]
    plain, shared, gan = (
        plan(load_recipe(ROOT / "recipes/digits-dmd2.yaml", [*digits, *more]))
        for more in ([], ["shared_teacher={}"], ["gan={}"])
    )
    network, head = plain.roles[0].parameters, gan.brought[0].parameters
    for strategy, ranks in (("ddp", 1), ("fsdp", 64), ("hsdp", 8)):
        before, fourth, beside = (load(counted, 64, strategy, Links()) for counted in (plain, shared, gan))
        assert fourth.memory - before.memory == pytest.approx(4 * network / ranks)
        graphs = (len(gan.graphs("fake")) - 1) * gan.kept
        assert beside.memory - before.memory == pytest.approx(16 * head + graphs)  # weight, moments, average
        assert beside.reduced == before.reduced  # of the networks


def test_ranks_that_share_a_sample_hold_a_part_of_it_and_exchange_the_rest() -> None:
    """Wan-1.3B by four: a quarter of activations and operations, and what arithmetic says is sent."""
    recipe = load_recipe(ROOT / "recipes/wan-1.3b-amd-4step.yaml")
    one = plan(recipe, Machine())
    four = replace(one, recipe=_context(recipe, 4))
    assert one.sequence == 21 * 30 * 52 * 1536
    assert four.memory("fake")["activations"] == pytest.approx(one.memory("fake")["activations"] / 4)
    alone, parted = (load(counted, 8, "fsdp", Links()) for counted in (one, four))
    assert alone.exchanged == 0 and parted.memory < alone.memory and parted.talking > alone.talking
    assert (alone.micros, parted.micros) == (2, 8) and parted.computing == pytest.approx(alone.computing)
    runs = sum(p.often * p.runs for p in one.passes)
    assert parted.exchanged == pytest.approx(8 * 30 * runs * 3 / 4 * 8 * 4 * one.sequence / 4)
    assert any("8 GPUs of which 3 share a sample" in line for line in _missing(_context(recipe, 3), Machine()))


def _context(recipe: DistillRecipe, ranks: int) -> DistillRecipe:
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"context": ranks})})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["recipes/none.yaml"], "there is no recipe 'recipes/none.yaml'"),
        ([str(ROOT / "recipes/digits-reward.yaml")], "has task reward; give a recipe of a distillation"),
        ([str(ROOT / "recipes/digits-amd.yaml"), "--assume", "gpu=8"], "'gpu' is unknown; use gpus"),
    ],
)
def test_faults_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert told in capsys.readouterr().err
