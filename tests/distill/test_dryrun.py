"""The dry run: every recipe is counted without weights, and the table's numbers hang together."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import CLIPConfig, CLIPModel

from distill.config import RecipeError, load_recipe, parse_recipe
from distill.dryrun import REWARD_PARAMETERS, Machine, Plan, plan, table
from distill.run import main

RECIPES = Path(__file__).parents[2] / "recipes"
PRODUCTION = sorted(p.stem for p in RECIPES.glob("*.yaml") if not p.stem.startswith(("scenes-", "digits-")))
GIB = 2**30


def counted(name: str, *overrides: str, **machine: float) -> Plan:
    return plan(load_recipe(RECIPES / f"{name}.yaml", list(overrides)), Machine(**machine))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)  # recipes name models/ from there


def peak() -> int:
    """The largest size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("name", PRODUCTION)
def test_every_production_recipe_is_counted_without_its_weights(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = peak()
    assert main([str(RECIPES / f"{name}.yaml"), "--dry-run", "--assume", "gpus=4,mfu=0.5"]) == 0
    assert peak() - before < GIB  # the smallest of these networks has 2.8 of float32 alone
    printed = capsys.readouterr().out
    assert parse_recipe(yaml.safe_load(printed)) == load_recipe(RECIPES / f"{name}.yaml")
    comments = [line for line in printed.splitlines() if line.startswith("#")]
    for words in ("GPU-hours", "teacher", "student phase", "fake phase", "50% of it", "on 4 GPUs", "a checkpoint has"):
        assert any(words in line for line in comments), words


@pytest.mark.parametrize("name", [p.stem for p in sorted(RECIPES.glob("*.yaml")) if p.stem not in PRODUCTION])
def test_every_other_recipe_dry_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The teachers of scenes are not in the repository; where nobody has trained them, those that need them say so."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    teacher = getattr(recipe, "teacher", None)
    here = teacher is None or Path(teacher).is_dir()
    assert main([str(RECIPES / f"{name}.yaml"), "--dry-run"]) == (0 if here else 2)
    if not here:
        assert teacher in ("models/scenes-teacher", "models/scenes-wan-teacher")
        assert teacher in capsys.readouterr().err
        return
    printed = capsys.readouterr().out
    assert parse_recipe(yaml.safe_load(printed)) == recipe
    assert ("GPU-hours" in printed) == (recipe.task == "distill")


def test_a_toy_with_its_teacher_here_is_counted_too() -> None:
    found = counted("digits-amd", "teacher=models/none", "family=sit")
    assert found.latents == (4, 32, 32)
    lines = list(table(counted("digits-dmd2")))  # its teacher is in models/
    assert any("latents 1 × 8 × 8" in line for line in lines)
    assert not any("are not in a folder here" in line for line in lines)


def test_operations_follow_the_update_plan() -> None:
    """Per sample: 1.5 earlier steps of 4 on average; in one of five iterations a student's update."""
    wan = counted("wan-1.3b-amd-4step", "activation_checkpointing=false", "frames=21")
    often = {f"{p.phase}: {p.what}": p.often for p in wan.passes}
    assert often["roll-out: student, steps before k"] == 1.5
    assert often["roll-out: student, step k without gradient"] == pytest.approx(0.8)
    assert often["student: teacher, with and without prompt"] == pytest.approx(0.4)
    assert often["fake: fake score, forward and backward"] == 1.0
    assert often["prompts: text encoders"] == 0.25
    forward = next(p.operations for p in wan.passes if p.what == "fake score")
    train = next(p.operations for p in wan.passes if p.what == "fake score, forward and backward")
    # 9,360 tokens: two operations per parameter and token, and attention's two products over all pairs.
    tokens = 6 * 30 * 52
    assert forward == pytest.approx(2 * 1.3e9 * tokens + 30 * 4 * tokens**2 * 1536, rel=0.07)
    assert 2.9 * forward < train < 3.6 * forward
    per_sample = sum(p.operations * p.often for p in wan.passes)
    assert wan.operations == pytest.approx(64 * per_sample)
    hours = wan.operations * 6000 / (989e12 * 0.35) / 3600
    assert wan.gpu_hours == pytest.approx(hours)
    shared = load_recipe(RECIPES / "wan-1.3b-amd-4step.yaml", ["parallel.context=2"])
    assert any("shards over 8 ranks, 2 ranks share a sample" in line for line in table(replace(wan, recipe=shared)))


def test_a_network_without_a_sequence_cannot_be_shared() -> None:
    with pytest.raises(RecipeError, match=r"context is 2, and DiTTransformer2DModel has no sequence .* wan family"):
        counted("sit-xl-amd-1step", "parallel.context=2")


def test_memory_follows_the_roles_and_the_shards() -> None:
    n = 749_808_016
    whole = counted("sit-xl-amd-1step", "ema=0.99")
    held = whole.memory("student")
    frozen = sum(role.at_rest(1) for role in whole.roles if not role.trained)
    # Weight, two moments and average of student and fake, 16 bytes; the teacher is frozen.
    assert held["at rest"] == pytest.approx(frozen + 2 * 16 * n)
    assert held["gradients"] == 4 * n and held["copies"] == 2 * n
    assert held["activations"] == 64 * whole.kept
    assert whole.checkpoint() == 2 * 16 * n
    sharded = counted("sit-xl-amd-1step", "parallel.strategy=fsdp", "activation_checkpointing=true", gpus=16)
    shards = sharded.memory("student")
    rest = sum(r.at_rest(1) for r in sharded.roles if r.name not in ("teacher", "student", "fake"))
    assert shards["at rest"] == pytest.approx(rest + (4 + 2 * 12) * n / 16)
    assert shards["gradients"] == pytest.approx(4 * n / 16)
    assert shards["activations"] < held["activations"] / 10  # computed again
    groups = load_recipe(RECIPES / "sit-xl-amd-1step.yaml", ["parallel={strategy: hsdp, replicas: 4}"])
    some = replace(sharded, recipe=groups)
    assert some.shards() == 4 and some.memory("fake")["gradients"] == pytest.approx(n)


def test_adapters_are_counted_as_peft_makes_them() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    from distill.families.load import FAMILIES
    from distill.families.published import SD15

    found = counted("sd15-amd-1step", "adapters={rank: 16}")
    with torch.device("meta"):
        family, network = FAMILIES["sd15"].from_config(SD15)
        inject_adapter_in_model(LoraConfig(r=16, target_modules=list(family.lora_targets())), network)
    adapters = sum(p.numel() for name, p in network.named_parameters() if "lora_" in name)
    student = next(role for role in found.roles if role.name == "student")
    assert student.trained == student.parameters == adapters
    assert found.memory("student")["gradients"] == 4 * adapters


def test_sdxl_in_4_steps_fits_80_gb_as_adapters_of_one_frozen_base_alone() -> None:
    found = counted("sdxl-amd-4step-lora", gpus=1)
    held = {phase: found.memory(phase) for phase in ("student", "fake")}
    assert all(sum(parts.values()) < 80e9 / 2 for parts in held.values())
    assert all(min(parts.values()) > 0 for parts in held.values())
    teacher, student, fake = found.roles[:3]
    assert (teacher.parameters, teacher.weight, teacher.trained) == (2_567_463_684, 2.0, 0)
    assert 0 < student.trained == fake.trained < 0.07 * teacher.parameters
    own = [replace(role, parameters=teacher.parameters, trained=teacher.parameters) for role in (student, fake)]
    whole = replace(found, roles=(replace(teacher, weight=4.0), *own, *found.roles[3:]))
    assert sum(whole.memory("student").values()) > 80e9


def test_mixed_layouts_hold_the_base_once_and_one_network_beside_it() -> None:
    found = counted("sit-xl-amd-1step", "adapters={roles: [student], rank: 8, base: bfloat16}")
    teacher, student, fake = found.roles[:3]
    assert (teacher.weight, fake.trained) == (2.0, teacher.parameters) and student.trained < 0.02 * fake.trained
    assert found.memory("student")["gradients"] == 4 * student.trained
    assert found.memory("fake")["gradients"] == 4 * fake.trained
    assert any("adapters are counted with" in line for line in table(found))


def test_published_rewards_are_as_large_as_the_table_says() -> None:
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = CLIPConfig(vision_config={**vision, "patch_size": 14}, text_config=text, projection_dim=1024)
    with torch.device("meta"):
        size = sum(p.numel() for p in CLIPModel(config).parameters())
    assert REWARD_PARAMETERS["pickscore"] == REWARD_PARAMETERS["hpsv2"] == size


def test_warnings_stand_below_the_table() -> None:
    lines = list(table(counted("sd15-amd-1step", "safeguards.two_key=2", gpus=24, gib=24)))
    assert any("64 micro-batches do not divide among 24 GPUs" in line for line in lines)
    assert any("not counted: safeguards.two_key" in line for line in lines)
    assert any("more than nine tenths of 24 GiB" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu=8", "'gpu' is unknown; use gpus, tflops, mfu, gib, dollars"),
        ("gpus=many", "gpus is 'many'; give a number"),
        ("mfu=0", "mfu is 0; give a number above 0"),
    ],
)
def test_assumptions_are_strict(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Machine.parse(text)
    assert Machine.parse("gpus=16,mfu=0.5") == Machine(gpus=16, mfu=0.5)


def test_a_size_that_the_network_cannot_cut_stops_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPES / "sd15-amd-1step.yaml"), "size=[500, 512]", "--dry-run"]) == 2
    assert "(size has 500; this autoencoder takes multiples of 8 pixels)" in capsys.readouterr().err


def test_an_unknown_teacher_stops_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPES / "digits-dmd2.yaml"), "teacher=nobody/nothing", "--dry-run"]) == 2
    assert "teacher: 'nobody/nothing' is no folder here and none of" in capsys.readouterr().err
