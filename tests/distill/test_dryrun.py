"""The dry run: every recipe is counted without weights, and the table's numbers hang together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import CLIPConfig, CLIPModel

from distill.config import RecipeError, load_recipe, parse_recipe
from distill.costs import count
from distill.dryrun import REWARD_PARAMETERS, Machine, Plan, plan, table
from distill.parallel.options import Parallel
from distill.run import main
from distill.tasks.distillation import DistillationTask

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
PRODUCTION = sorted(p.stem for p in RECIPES.glob("*.yaml") if not p.stem.startswith(("scenes-", "digits-")))
GIB = 2**30


def counted(name: str, *overrides: str, **machine: float) -> Plan:
    return plan(load_recipe(RECIPES / f"{name}.yaml", list(overrides)), Machine(**machine))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)  # recipes name models/ from there


ONE_AFTER_ANOTHER = """
import contextlib, io, json, resource, sys
from pathlib import Path
import distill.dryrun
from distill.run import main

def peak():
    status = Path("/proc/self/status")  # ru_maxrss begins at the parent's on Linux, and is in bytes on a Mac
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
for name in map(str.strip, sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main([f"recipes/{name}.yaml", "--dry-run"])
    print(json.dumps((code, peak() - before, printed.getvalue())), flush=True)
"""
DryRun = Callable[[str], tuple[int, int, str]]


@pytest.fixture(scope="module")
def dry_run() -> Iterator[DryRun]:
    """By recipe: exit status, bytes by which a process of its own has grown, what was printed."""
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asked, told = process.stdin, process.stdout
        assert asked and told

        @cache
        def run(name: str) -> tuple[int, int, str]:
            print(name, file=asked, flush=True)
            code, grown, printed = json.loads(told.readline())
            return code, grown, printed

        yield run
        asked.close()


def commented(printed: str) -> list[str]:
    return [line.removeprefix("#").removeprefix(" ") for line in printed.splitlines() if line.startswith("#")]


@pytest.mark.parametrize("name", PRODUCTION)
def test_every_production_recipe_is_counted_without_its_weights(name: str, dry_run: DryRun) -> None:
    code, grown, printed = dry_run(name)
    assert code == 0 and grown < GIB  # the smallest of these networks has 2.8 of float32 alone
    assert parse_recipe(yaml.safe_load(printed)) == load_recipe(RECIPES / f"{name}.yaml")
    told = "\n".join(commented(printed))
    for words in (
        "parameters", "teacher", "student phase", "fake phase", "35% of it", "on 8 GPUs", "a checkpoint has",
        r"on 8 GPUs: (shards over 8 ranks|whole copies); \d+ blocks",
    ):  # fmt: skip
        assert re.search(words, told), words
    (cost,) = re.findall(r"(\S+) GPU-hours, \S+ hours on 8 GPUs, \$(\S+) at \$2.5 per GPU-hour", told)
    hours, dollars = (float(number.replace(",", "")) for number in cost)
    assert dollars == pytest.approx(2.5 * hours, rel=0.01)  # the hours are printed with three digits


def test_what_is_assumed_is_what_is_reckoned_with(capsys: pytest.CaptureFixture[str]) -> None:
    given = "gpus=4,mfu=0.5,tflops=312,gib=40,dollars=1.6"
    assert main([str(RECIPES / "sit-xl-amd-1step.yaml"), "--dry-run", "--assume", given]) == 0
    told = "\n".join(commented(capsys.readouterr().out))
    hours = counted("sit-xl-amd-1step").operations * load_recipe(RECIPES / "sit-xl-amd-1step.yaml").iterations
    hours /= 312e12 * 0.5 * 3600
    assert "at 312 TFLOP/s and 50% of it" in told and "ddp on 4 GPUs: whole copies" in told
    assert f"{hours:,.3g} GPU-hours, {hours / 4:,.3g} hours on 4 GPUs, ${1.6 * hours:,.0f} at $1.6 per GPU-hour" in told
    assert "more than nine tenths of 40 GiB" in told


def test_the_page_shows_what_the_command_prints(dry_run: DryRun) -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    (name, block), *others = re.findall(
        r"<!-- python -m distill.run recipes/(\S+).yaml --dry-run -->\n((?:\n| .*\n)+)", page
    )
    assert not others
    shown = [part.splitlines() for part in textwrap.dedent(block).strip().split("\n\n")]
    assert len(shown) == 3
    told = "\n".join(commented(dry_run(name)[2]))
    for part in shown:
        assert "\n".join(part) in told


@pytest.mark.parametrize("name", PRODUCTION)
def test_the_pages_table_has_the_printed_numbers(name: str, dry_run: DryRun) -> None:
    page, told = (ROOT / "docs/recipes.md").read_text(), "\n".join(commented(dry_run(name)[2]))
    (row,) = re.findall(rf"^\| `{name}` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    (forward,) = re.findall(r"^student: fake score +(\S+)", told, re.MULTILINE)
    (hours,) = re.findall(r"(\S+) GPU-hours,", told)
    sums = re.findall(r"^\w+ phase .* (\S+)$", told, re.MULTILINE)
    assert [float(cell) for cell in row] == [float(forward), float(hours), max(map(float, sums))]


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


def test_what_is_decoded_for_the_reward_follows_the_recipe(tmp_path: Path) -> None:
    """In iterations with the student alone, which are one of ten; and nothing for a reward of latents."""
    (tmp_path / "config.json").write_text(json.dumps({"kind": "latent-reward"}))

    def decoder(*overrides: str) -> tuple[float, bool]:
        (row,) = [p for p in counted("sd15-amd-1step", *overrides).passes if p.what == "decoder"]
        return row.often, row.operations > 0

    assert decoder() == (1.0, True)
    assert decoder("advantage.when=student") == decoder("advantage.when=reuse") == (0.1, True)
    latent = f"advantage.reward={tmp_path}"
    assert decoder(latent, "heldout_rewards=[]")[1] is False and decoder(latent, "heldout_rewards=[hpsv2]")[1] is True


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


class Living:
    """Bytes that graphs hold at present and at most, each storage once and no parameters."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self.now = self.most = 0
        self._parameters = {p.untyped_storage().data_ptr() for network in networks for p in network.parameters()}
        self._holders = Counter[int]()

    def pack(self, tensor: Tensor) -> list[Tensor]:
        storage, kept = tensor.untyped_storage(), Held([tensor])
        if storage.data_ptr() not in self._parameters:
            self._hold(storage.data_ptr(), storage.nbytes(), 1)
            weakref.finalize(kept, self._hold, storage.data_ptr(), storage.nbytes(), -1)
        return kept

    def _hold(self, place: int, size: int, more: int) -> None:
        before = self._holders[place]
        self._holders[place] += more
        self.now += size * ((before + more > 0) - (before > 0))
        self.most = max(self.most, self.now)


class Held(list[Tensor]):
    """A list of which it is seen that it goes."""


@pytest.mark.parametrize(
    ("sections", "graphs"),
    [
        ([], (1, 1)),
        (["regression={pairs: 32, steps: 2}"], (2, 1)),
        (["gan={}"], (2, 3, 0)),
        (["gan={}", "regression={pairs: 32, steps: 2}"], (3, 3, 0)),
        (["gan={source: teacher}"], (2, 1, 0)),
        (["gan={fake_weight: 0}"], (2, 1, 0)),
        (["gan={r1: 1}"], (2, 3, 2)),
        (["gan={r1: 1, r1_form: finite}"], (2, 3, 2)),
        (["gan={r1: 1, r1_form: finite, source: teacher}"], (2, 1, 0)),
    ],
)
def test_memory_has_the_graphs_that_live_together_in_each_phase(sections: list[str], graphs: tuple[int, ...]) -> None:
    """Of features a half is counted too much, what lies between the tap and the network's end."""
    small = ["batch_size=32", "fake_per_student=1", "fake_warmup=0", "steps=[2]"]
    found = counted("digits-dmd2", *small, *sections)
    assert tuple(len(found.graphs(phase)) for phase in found.phases) == graphs
    task = DistillationTask(found.recipe)
    heads = 0.05 * 32 * found.kept
    phases = task.phases(0)
    assert [phase.role for phase in phases] == list(found.phases)
    for phase in phases:
        living = Living(task.roles.values())
        task.passes.take()
        with saved_tensors_hooks(living.pack, lambda kept: kept[0]):
            torch.autograd.backward(phase.loss(0)[0])
        expected = found.memory(phase.role)["activations"]
        assert 0.7 * expected <= living.most <= expected + heads
        for network in task.roles.values():
            network.zero_grad()
    for role in (*found.roles[:3], *found.brought):
        assert role.parameters == count(task.roles.get(role.name, task.teacher))


def test_a_teacher_of_its_own_computes_no_block_again() -> None:
    found = counted("digits-dmd2", "gan={source: teacher}", "activation_checkpointing=true")
    assert found.kept < 0.5 * found.saved
    assert found.memory("student")["activations"] == pytest.approx(128 * (found.kept + found.saved))
    assert found.memory("fake")["activations"] == pytest.approx(128 * found.kept)


def test_each_pass_of_the_discriminator_is_counted_once() -> None:
    """Where the fake score's phase has classified, the head's phase reads its features."""

    def rows(*sections: str) -> dict[str, float]:
        found = counted("digits-dmd2", "batch_size=32", "fake_per_student=1", "fake_warmup=0", "steps=[1]", *sections)
        task, seen = DistillationTask(found.recipe), dict[str, float]()
        phases = {phase.role: phase.loss for phase in task.phases(0)}
        phases.pop("student")(0)
        for role, loss in phases.items():
            task.passes.rows.clear()
            told: Any = loss(0)[1].get("forwards/fake", 0.0)
            seen[role] = task.passes.rows["fake"] + told
            assert seen[role] == 32 * sum(p.often for p in found.passes if p.phase == role)
        return seen

    assert rows("gan={}") == {"fake": 96, "discriminator": 0}
    assert rows("gan={fake_weight: 0}") == {"fake": 32, "discriminator": 64}
    assert rows("gan={r1: 1}") == {"fake": 96, "discriminator": 32}
    assert rows("gan={r1: 1, r1_form: finite}") == {"fake": 96, "discriminator": 64}


def test_dmd2s_discriminator_has_a_row_and_a_phase(dry_run: DryRun) -> None:
    told = commented(dry_run("sdxl-dmd2-4step")[2])
    sides, width = 3, 1280  # 32 × 32 to 4 × 4
    head = sides * (16 * width**2 + width + 2 * width) + 16 * width + 1
    (row,) = [line.split() for line in told if line.startswith("discriminator  ")]
    assert row == ["discriminator", f"{head:,}", f"{head:,}", f"{12 * head / GIB:.2f}"]
    parts = {
        words[0]: [float(cell) for cell in words[2:]] for line in told if (words := line.split())[1:2] == ["phase"]
    }
    assert parts["student"][2] == pytest.approx(2 / 3 * parts["fake"][2], abs=0.1) and parts["fake"][2] > 4
    assert parts["discriminator"][1:3] == [round(4 * head / GIB, 1), 0.0]
    assert any(line.startswith("passes for the discriminator are counted whole") for line in told)


def test_a_shared_teacher_is_a_fourth_network() -> None:
    plain, shared = (counted("digits-dmd2", *more, gpus=4) for more in ([], ["shared_teacher={}"]))
    n = plain.roles[0].parameters
    assert shared.memory("fake")["at rest"] == plain.memory("fake")["at rest"] + 4 * n
    cut = replace(shared, recipe=shared.recipe.model_copy(update={"parallel": Parallel(strategy="fsdp")}))
    assert [role.at_rest(cut.shards()) for role in cut.brought] == [n]
    lines = list(table(shared))
    assert any(line.startswith(f"shared teacher {n:>29,}") for line in lines)
    assert (
        not any("not counted: shared_teacher" in line for line in lines) and shared.checkpoint() == plain.checkpoint()
    )


def test_wan_14b_is_counted_with_four_ranks_to_a_sample() -> None:
    """The line of docs/recipes.md."""
    words = ("teacher=Wan-AI/Wan2.1-T2V-14B-Diffusers", "parallel.context=4")
    assert f"recipes/wan-1.3b-amd-4step-lora.yaml {' '.join(words)}" in (ROOT / "docs/recipes.md").read_text()
    found = counted("wan-1.3b-amd-4step-lora", *words)
    assert (found.roles[0].parameters, found.blocks) == (14_288_491_584, 40)
    tokens = 21 * 30 * 52
    assert found.sequence == tokens * 40 * 128 and tokens % 4 == 0
    assert found.memory("student")["activations"] == found.kept * found.recipe.batch_size / found.recipe.accumulate / 4
    with pytest.raises(RecipeError, match=r"context is 3 for 40 heads of attention; use one of 1, 2, 4, 5, 8"):
        counted("wan-1.3b-amd-4step-lora", words[0], "parallel.context=3")


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
