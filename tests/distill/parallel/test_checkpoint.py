"""Checkpoints survive kills, full disks and another number of ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from distill.objectives.methods import HOOKS
from distill.objectives.options import Safeguards
from distill.parallel import checkpoint
from distill.parallel.world import World

OBJECTIVES = {
    "amd": [
        "safeguards={ramp: 3, diversity: {tolerate: 0.9}, reward_gap: {tolerate: 0, window: 3, decay: 0.5}}",
        "heldout_rewards=[HELDOUT]", "advantage.shrinkage=0.5",
    ],
    "turns": [
        "ttur=alternating", "reuse_rollout=false", "safeguards={two_key: 1, coherence: 0.0, guidance_ceiling: 1.05}",
    ],
    "gan": ["gan={}", "divergence={}", "step_aware_fake=true"],
    "adapters": ["adapters={rank: 4, alpha: 8}"],
    "mixed": ["adapters={rank: 4, alpha: 8, roles: [fake]}", "consistency={}"],
    "mixed, student": ["adapters={rank: 4, alpha: 8, roles: [student]}"],
    "most hooks": [
        "regression={pairs: 8, steps: 2}", "gan={r1: 0.1}", "divergence={}", "decoupled={}",
        "reward_weighting={kappa: 0.1}", "reward_gradient={weight: 0.01}", "reward_tilt={beta: 0.01}",
        "shared_teacher={}", "implicit_alignment={}", "segment_guidance={margin: 0.01}", "sub_interval={}",
        "step_aware_fake=true", "consistency={}", "first_step_anchor={anchor: 1, steps: 2}", "sampler=deterministic",
    ],
    "the others": [
        "policy_gradient={weight: 0.5}", "dynamic_renoising={}", "foundation_gan={features: REWARD}",
        "advantage.when=student",
    ],
}  # fmt: skip
"""Every hook, every safeguard and every layout."""


def test_every_hook_is_killed_and_resumed() -> None:
    said = [word.partition("=") for words in OBJECTIVES.values() for word in words]
    assert HOOKS.keys() - {key for key, _, _ in said} == {"adaptation", "sharpening"}  # which the recipe has
    guards = [yaml.safe_load(value) for key, _, value in said if key == "safeguards"]
    assert {guard for each in guards for guard in each} == Safeguards.model_fields.keys()


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ten_iterations_are_five_and_a_kill_and_five_bit_for_bit(
    ranks: Any, jobs: Any, models: Path, tmp_path: Path, objective: str
) -> None:
    places = {"REWARD": f"{models}/digits-reward", "HELDOUT": f"{models}/digits-heldout"}
    words = [re.sub("REWARD|HELDOUT", lambda found: places[found[0]], word) for word in OBJECTIVES[objective]]
    overrides = [*words, "batch_size=8", "accumulate=1", "iterations=10", "save_every=5"]
    whole = jobs.distil(str(models), str(tmp_path / "whole"), overrides)
    with pytest.raises(AssertionError, match="ended"):
        ranks(1, jobs.killed, str(models), str(tmp_path / "parts"), overrides, "step")
    assert [p.name for p in checkpoint.saved(tmp_path / "parts")] == ["step-0000005"]
    assert_identical(jobs.distil(str(models), str(tmp_path / "parts"), overrides), whole)
    told = [
        # A start has passes of its own, such as those of regression's pairs.
        [{k: v for k, v in line.items() if not k.startswith("forwards/")} for line in jobs.stream(tmp_path / part)[-5:]]
        for part in ("parts", "whole")
    ]
    assert told[0] == told[1]


def test_a_kill_while_saving_costs_that_checkpoint_alone(ranks: Any, jobs: Any, models: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ended"):
        ranks(1, jobs.killed, str(models), str(tmp_path), ["accumulate=1", "save_every=2"], "save")
    assert (tmp_path / "checkpoints/step-0000003.tmp").is_dir()
    newest, facts = checkpoint.newest(tmp_path, World())
    assert newest.name == "step-0000002" and facts["iteration"] == 2
    jobs.distil(str(models), str(tmp_path), ["accumulate=1"])
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-0000002", "step-0000003"]


def test_a_run_goes_on_with_another_number_of_ranks(ranks: Any, jobs: Any, models: Path, tmp_path: Path) -> None:
    """One whole rank, two in shards, four in shards and copies, one: what is read is what was written, bit for bit."""
    hsdp = ["parallel.strategy=hsdp", "parallel.replicas=2"]
    first = jobs.distil(str(models), str(tmp_path), [], 1)
    second = ranks(2, jobs.distil, str(models), str(tmp_path), ["parallel.strategy=fsdp"], 1)
    for state in second:
        assert_identical(state, first)
    third = ranks(4, jobs.distil, str(models), str(tmp_path), hsdp, 2)
    assert_identical(jobs.distil(str(models), str(tmp_path), [], 2), third[3])
    assert len(list((tmp_path / "checkpoints/step-0000002").glob("*.safetensors"))) == 1


def test_ranks_pass_over_a_checkpoint_of_which_one_shard_is_torn(
    ranks: Any, jobs: Any, models: Path, tmp_path: Path
) -> None:
    """Whichever it is: each is looked at by one of the ranks."""
    more = ["parallel.strategy=fsdp", "iterations=2", "save_every=1"]
    ranks(2, jobs.distil, str(models), str(tmp_path), more)
    shards = sorted((tmp_path / "checkpoints/step-0000002").glob("shard-*"))
    assert len(shards) == 2
    for shard in shards:
        content = shard.read_bytes()
        shard.write_bytes(content[:-10])
        said = f"{shard} was altered or truncated; going on with the one before it"
        assert ranks(2, jobs.resumed, str(models), str(tmp_path), more) == [(1, [said])] * 2
        shard.write_bytes(content)


def test_every_rank_hears_of_the_trouble_of_one(ranks: Any, jobs: Any, models: Path, tmp_path: Path) -> None:
    told = ranks(2, jobs.troubles, str(models), str(tmp_path))
    assert told[0] == told[1]
    stopped, full_disk, not_finite = told[0]
    assert stopped == "complete: False at 2"
    assert "step-0000003 could not be written (rank 1: [Errno 28] No space left" in full_disk
    assert "step-0000002. Make room and continue with --resume" in full_disk
    assert "is not finite at iteration 3; the last good checkpoint is" in not_finite
    listed = json.loads((tmp_path / "checkpoints/step-0000002/COMPLETE").read_text())["files"]
    assert sum(name.startswith("shard-") for name in listed) == 2
    assert all((tmp_path / "checkpoints/step-0000002" / n).stat().st_size == f["bytes"] for n, f in listed.items())
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def state(**tensors: Tensor) -> dict[str, Tensor]:
    return {f"a/{name}": tensor for name, tensor in tensors.items()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = state(w=torch.randn(3, 2), step=torch.tensor(5.0), n=torch.tensor(7), half=torch.randn(4).bfloat16())
    written = checkpoint.write(tmp_path, 12, tensors, {"task": "t"}, World(), keep=1)
    assert written.name == "step-0000012" and checkpoint.damage(written, World()) == ""
    assert checkpoint.read_facts(written) == {"iteration": 12, "task": "t"}
    blank = {name: torch.zeros_like(t) for name, t in tensors.items()}
    checkpoint.read(written, blank, World())
    assert_identical(blank, tensors)
    assert checkpoint.shapes(written) == {name: tuple(t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (state(w=torch.zeros(2, 2)), r"a/w has shape \(3, 2\) there and \(2, 2\) here"),
        (state(v=torch.zeros(1)), "it has no a/v"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(
    tmp_path: Path, wanted: dict[str, Tensor], message: str
) -> None:
    written = checkpoint.write(tmp_path, 1, state(w=torch.ones(3, 2)), {}, World(), keep=1)
    with pytest.raises(ValueError, match=message):
        checkpoint.read(written, wanted, World())
    assert all(not bool(t.any()) for t in wanted.values())


def test_a_checkpoint_of_the_same_iteration_makes_way(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        written = checkpoint.write(tmp_path, 1, state(w=torch.full((2,), value)), {}, World(), keep=1)
    blank = state(w=torch.zeros(2))
    checkpoint.read(written, blank, World())
    assert blank["a/w"].tolist() == [2.0, 2.0]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]
