"""The loop: a resumed run equals an uninterrupted one, faults stop it with the last good state, logs are left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import distill.parallel.checkpoint
from distill.config import Base, Optimizer, load_recipe
from distill.objectives.plan import Hook
from distill.run import main
from distill.tasks.distillation import DistillationTask
from distill.telemetry.clock import GpuClock
from distill.telemetry.sink import Total, grid
from distill.trainer import Phase, Trainer, TrainingError, _check_patience, _merged, generator, schedule

ROOT = Path(__file__).parents[2]


class ToyRecipe(Base):
    task: Literal["toy"] = "toy"
    optimizer: Optimizer = Optimizer(learning_rate=0.05, warmup=2, decay="cosine", weight_decay=0.01, clip=0.5)


class ToyTask:
    """Two linear maps that learn a rotation; "b" trains every second iteration. Rows do not see each other."""

    def __init__(self, recipe: ToyRecipe, poison: int | None = None) -> None:
        self.recipe, self.poison = recipe, poison
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            # BatchNorm has buffers, float and integer ones; its statistics need no batch in evaluation mode.
            self.roles: dict[str, nn.Module] = {
                name: nn.ModuleList([nn.Linear(2, 2), nn.BatchNorm1d(2)]) for name in "ab"
            }
        self.optimizers = dict.fromkeys("ab", recipe.optimizer)
        self.finished: list[Tensor] = []

    def phases(self, iteration: int) -> list[Phase]:
        names = "ab" if iteration % 2 == 0 else "a"
        return [Phase(name, lambda micro, name=name: self._loss(name, iteration, micro)) for name in names]

    def _loss(self, name: str, iteration: int, micro: int) -> tuple[Tensor, dict[str, Tensor | float]]:
        r = self.recipe
        x = torch.randn(r.batch_size, 2, generator=generator(r.seed, iteration, "data"))
        x = x.chunk(r.accumulate)[micro]
        y = x.flip(1) * torch.tensor([1.0, -1.0])
        linear, norm = self.roles[name]
        norm.num_batches_tracked += 1
        errors = (linear(x) - y).pow(2).mean(1)
        if iteration == self.poison and name == "b":
            errors = errors * torch.nan
        return errors.mean(), {"error": errors.detach().mean(), "micro": float(micro)}

    def preview(self) -> Tensor:
        return torch.full((3, 3, 4, 4), 7 * self.recipe.seed, dtype=torch.uint8)

    def finish(self, output: Path) -> None:
        weight = self.roles["a"][0].weight.detach().clone()
        self.finished.append(weight)
        (output / "weight.txt").write_text(str(weight.tolist()))


def toy(folder: Path, **changes: Any) -> ToyRecipe:
    values = {"name": "toy", "iterations": 6, "batch_size": 8, "ema": 0.9, "log_every": 2, "preview_every": 4}
    return ToyRecipe(**values | {"save_every": 2, "output": str(folder / "out")} | changes)


def trainer(folder: Path, poison: int | None = None, **changes: Any) -> Trainer:
    return Trainer(ToyTask(toy(folder, **changes), poison), folder / "run", quiet=True)


def interrupt_after(t: Trainer, iterations: int) -> None:
    """Let a signal arrive in the iteration before ``iterations`` are done."""
    phases = t.task.phases

    def spying(iteration: int) -> list[Phase]:
        if iteration == iterations - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return phases(iteration)

    t.task.phases = spying


def state(folder: Path, iteration: int) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step-{iteration:07d}" / "state.safetensors")


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


# --- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, first: int) -> None:
    whole = trainer(tmp_path / "whole", save_every=100)
    assert whole.run()
    stopped = trainer(tmp_path / "parts", save_every=100)
    interrupt_after(stopped, first)
    assert not stopped.run()
    resumed = trainer(tmp_path / "parts", save_every=100)
    assert resumed.resume() == first
    assert resumed.run()
    assert_equal(state(tmp_path / "whole/run", 6), state(tmp_path / "parts/run", 6))
    assert torch.equal(whole.task.finished[0], resumed.task.finished[0])


def test_a_state_holds_weights_averages_moments_and_buffers_of_every_role(tmp_path: Path) -> None:
    trainer(tmp_path, iterations=2).run()
    names = set(state(tmp_path / "run", 2))
    for role in "ab":
        for name in ("model/0.weight", "model/1.num_batches_tracked", "ema/0.weight", "optimizer/0/exp_avg"):
            assert f"{role}/{name}" in names
        assert f"{role}/optimizer/1/step" in names


def test_a_finished_run_resumes_to_its_result_alone(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    (tmp_path / "out/weight.txt").unlink()
    again = trainer(tmp_path)
    assert again.resume() == 6
    assert again.run()
    assert (tmp_path / "out/weight.txt").is_file()


def test_a_run_without_checkpoints_cannot_resume(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="has no checkpoint to resume; start without --resume"):
        trainer(tmp_path).resume()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    trainer(tmp_path, keep_checkpoints=2, save_every=1).run()
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-0000005", "step-0000006"]


@pytest.mark.parametrize("change", [{"name": "other"}, {"task": "tay"}])
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    other = trainer(tmp_path)
    other.recipe = other.recipe.model_copy(update=change)
    other.run()
    with pytest.raises(
        TrainingError, match=r"step-0000006 belongs to .*, not to toy 'toy'; resume it with its own recipe"
    ):
        trainer(tmp_path).resume()


@pytest.mark.parametrize(
    "damage",
    ["torn tensors", "altered tensors", "no tensors", "torn facts", "no facts", "torn manifest", "no manifest"],
)
def test_a_damaged_state_is_passed_over_for_the_last_whole_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    trainer(tmp_path).run()
    newest, older = (tmp_path / f"run/checkpoints/step-000000{n}" for n in (6, 4))
    break_checkpoint(newest, damage)
    t = trainer(tmp_path)
    assert t.resume() == 4
    assert re.search(r"step-0000006.* was altered or truncated; going on with the one before it", caplog.text)
    break_checkpoint(older, damage)
    before = {k: v.clone() for k, v in t.task.roles["a"].state_dict().items()}
    with pytest.raises(
        TrainingError, match=r"step-0000006.* was altered or truncated; delete .*step-0000006 to resume"
    ):
        t.resume()
    assert_equal(before, t.task.roles["a"].state_dict())


def break_checkpoint(checkpoint: Path, damage: str) -> None:
    kind, _, what = damage.partition(" ")
    file = checkpoint / {"tensors": "state.safetensors", "facts": "state.json", "manifest": "COMPLETE"}[what]
    content = file.read_bytes()
    if kind == "no":
        file.unlink()
    elif kind == "torn":
        file.write_bytes(content[:-10])
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_damaged_newer_state_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    trainer(tmp_path, save_every=3).run()
    break_checkpoint(tmp_path / "run/checkpoints/step-0000006", "torn tensors")
    again = trainer(tmp_path, save_every=1, keep_checkpoints=1, iterations=4)
    assert again.resume() == 3
    again.run()
    assert (tmp_path / "run/checkpoints/step-0000004").is_dir()
    assert trainer(tmp_path).resume() == 4


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).run()
    t = trainer(tmp_path)
    t.task.roles["a"][0] = nn.Linear(3, 2)
    with pytest.raises(TrainingError, match=r"does not fit the recipe's model .*; resume it with its own recipe"):
        t.resume()


@pytest.mark.parametrize("crash", ["save_file", "sha256", "_sync"])
def test_a_full_disk_while_saving_leaves_the_older_checkpoint_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    def torn(*arguments: Any) -> None:
        if crash == "save_file":
            Path(arguments[1]).write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    trainer(tmp_path, iterations=4).run()
    crashing = trainer(tmp_path)
    crashing.iteration = 6
    with monkeypatch.context() as patch:
        patch.setattr(distill.parallel.checkpoint, crash, torn)
        with pytest.raises(TrainingError, match=r"step-0000006 could not be written \(.*No space.*-0000004. Make room"):
            crashing.save()
    assert not list((tmp_path / "run/checkpoints").glob("*.tmp"))
    again = trainer(tmp_path)
    assert again.resume() == 4
    assert again.run()


def test_a_checkpoint_of_the_first_releases_is_resumed(tmp_path: Path) -> None:
    """One file, and no manifest but its digest in state.json."""
    trainer(tmp_path, iterations=4).run()
    newest = tmp_path / "run/checkpoints/step-0000004"
    facts = json.loads((newest / "state.json").read_text())
    facts["sha256"] = json.loads((newest / "COMPLETE").read_text())["files"]["state.safetensors"]["sha256"]
    (newest / "COMPLETE").unlink()
    (newest / "state.json").write_text(json.dumps(facts))
    t = trainer(tmp_path)
    assert t.resume() == 4
    assert_equal(state(tmp_path / "run", 4), t._tensors())
    shutil.rmtree(tmp_path / "run/checkpoints/step-0000002")
    break_checkpoint(newest, "altered tensors")
    with pytest.raises(TrainingError, match=r"step-0000004/state.safetensors was altered"):
        trainer(tmp_path).resume()


def test_what_a_recipe_changes_in_a_resumed_run_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, iterations=2).run()
    t = trainer(tmp_path, seed=1, save_every=1, optimizer=Optimizer(learning_rate=0.01))
    assert t.resume() == 2
    (told,) = [line for line in caplog.messages if "changed recipe" in line]
    assert "step-0000002 goes on with a changed recipe: seed 0 → 1; iterations 2 → 6; " in told
    assert "optimizer.learning_rate 0.05 → 0.01" in told and "save_every" not in told
    caplog.clear()
    assert trainer(tmp_path, iterations=2).resume() == 2 and "changed recipe" not in caplog.text


class StagedRecipe(ToyRecipe):
    critic: Optimizer | None = None


@pytest.mark.parametrize("critics", [(None, Optimizer(learning_rate=1.0)), (Optimizer(learning_rate=1.0), None)])
def test_another_method_of_the_same_name_is_another_stage(tmp_path: Path, critics: tuple[Any, Any]) -> None:
    recipes = [StagedRecipe(**toy(tmp_path).model_dump(), critic=critic) for critic in critics]
    Trainer(ToyTask(recipes[0]), tmp_path / "run", quiet=True).run()
    second = Trainer(ToyTask(recipes[1]), tmp_path / "run", quiet=True)
    before = {name: tensor.clone() for name, tensor in second._tensors().items()}
    with pytest.raises(
        TrainingError, match=r"step-0000006 was trained with critic: .* another stage; .*initialise_from"
    ):
        second.resume()
    assert_equal(second._tensors(), before)


# --- initialise_from -----------------------------------------------------------------------------------------------


def test_a_stage_starts_from_anothers_weights_and_from_nothing_else_of_it(tmp_path: Path) -> None:
    trainer(tmp_path / "one").run()
    first = state(tmp_path / "one/run", 6)
    second = trainer(tmp_path / "two", name="stage-two", iterations=1, initialise_from=str(tmp_path / "one/run"))
    steps = second.task.phases

    def looking(iteration: int) -> list[Phase]:
        for role, module in second.task.roles.items():
            for name, tensor in module.state_dict().items():
                assert torch.equal(tensor, first[f"{role}/model/{name}"])
                assert torch.equal(second.ema[role].named[name], tensor)
            assert not second.optimizers[role].state_dict()["state"]
        assert iteration == 0
        return steps(iteration)

    second.task.phases = looking
    assert second.run()
    assert state(tmp_path / "two/run", 1)["a/optimizer/0/step"] == 1


def test_what_a_stage_has_beside_starts_as_it_was_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    t = trainer(tmp_path / "one")
    t.task.roles = {"a": t.task.roles["a"]}
    t.task.phases = lambda iteration: [Phase("a", lambda micro: t.task._loss("a", iteration, micro))]
    t.run()
    second = trainer(tmp_path / "two", seed=3, initialise_from=str(tmp_path / "one/run"))
    made = second.task.roles["b"][0].weight.clone()
    with caplog.at_level("INFO"):
        second._initialise(tmp_path / "one/run")
    assert "has no b, which starts as it was made" in caplog.text
    assert torch.equal(second.task.roles["b"][0].weight, made)
    assert torch.equal(second.task.roles["a"][0].weight, state(tmp_path / "one/run", 6)["a/model/0.weight"])


def test_a_resumed_stage_goes_on_with_its_own_weights(tmp_path: Path) -> None:
    trainer(tmp_path / "one").run()
    source = str(tmp_path / "one/run")
    whole = trainer(tmp_path / "whole", initialise_from=source)
    whole.run()
    stopped = trainer(tmp_path / "parts", initialise_from=source)
    interrupt_after(stopped, 3)
    stopped.run()
    resumed = trainer(tmp_path / "parts", initialise_from=source)
    resumed.resume()
    resumed.run()
    assert_equal(state(tmp_path / "whole/run", 6), state(tmp_path / "parts/run", 6))


def test_a_source_without_checkpoints_or_with_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"toy: initialise_from .*nowhere: .* has no checkpoint"):
        trainer(tmp_path, initialise_from=str(tmp_path / "nowhere")).run()
    trainer(tmp_path / "one").run()
    t = trainer(tmp_path / "two", initialise_from=str(tmp_path / "one/run"))
    t.task.roles["a"][0] = nn.Linear(3, 2)
    with pytest.raises(TrainingError, match=r"a/model/0.weight has shape \(2, 2\) there and \(2, 3\) here"):
        t.run()


# --- the digits distillation itself ---------------------------------------------------------------------------------

SMALL = ["batch_size=8", "log_every=1", "preview_every=100", "save_every=100"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/digits-teacher and models/digits-reward, trained for two iterations."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAPFROG_RUNS", str(folder / "runs"))
        for name, more in (
            ("digits-teacher", ["model.width=16", "model.layers=1", "model.heads=2", "sampling_steps=2"]),
            ("digits-reward", []),
        ):
            overrides = [f"output={folder}/models/{name}", "iterations=2", "optimizer.warmup=0", *more, *SMALL]
            assert main([str(ROOT / f"recipes/{name}.yaml"), "--quiet", *overrides]) == 0
    return folder


def amd(digits: Path, folder: Path, **changes: Any) -> Trainer:
    overrides = [
        f"teacher={digits}/models/digits-teacher", f"advantage.reward={digits}/models/digits-reward",
        "iterations=6", "fake_warmup=1", "fake_per_student=2", "steps=[2]", *SMALL,
    ]  # fmt: skip
    recipe = load_recipe(ROOT / "recipes/digits-amd.yaml", overrides + [f"{k}={v}" for k, v in changes.items()])
    return Trainer(DistillationTask(recipe.model_copy(update={"output": str(folder / "out")})), folder, quiet=True)


def test_a_resumed_distillation_equals_an_uninterrupted_one_bit_for_bit(digits: Path, tmp_path: Path) -> None:
    assert amd(digits, tmp_path / "whole").run()
    stopped = amd(digits, tmp_path / "parts")
    interrupt_after(stopped, 3)
    assert not stopped.run()
    resumed = amd(digits, tmp_path / "parts")
    assert resumed.resume() == 3
    assert resumed.run()
    a, b = state(tmp_path / "whole", 6), state(tmp_path / "parts", 6)
    assert any(name.startswith("student/ema/") for name in a) and any("fake/optimizer" in name for name in a)
    assert_equal(a, b)
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        files = [tmp_path / part / "out/transformer" / name for part in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_distillation_trains_its_roles_in_turn_and_never_the_teacher(digits: Path, tmp_path: Path) -> None:
    t = amd(digits, tmp_path)
    before = {name: value.clone() for name, value in t.task.teacher.state_dict().items()}
    moved = []
    for _ in range(4):
        weights = {r: nn.utils.parameters_to_vector(m.parameters()).detach().clone() for r, m in t.task.roles.items()}
        telemetry = t._step()
        t.iteration += 1
        after = {r: nn.utils.parameters_to_vector(m.parameters()) for r, m in t.task.roles.items()}
        moved.append({r for r in after if not torch.equal(after[r], weights[r])})
        assert {"reward", "reward_group_std", "advantage_clipped", "fake_error", "w_ess"} <= telemetry.keys()
    assert moved == [{"fake"}, {"fake", "student"}, {"fake"}, {"fake", "student"}]
    assert {"dm_norm", "ca_norm", "alpha", "beta"} <= telemetry.keys()
    assert_equal(before, t.task.teacher.state_dict())


def test_hooks_hear_of_each_step_of_the_student(digits: Path, tmp_path: Path) -> None:
    class Counting(Hook):
        steps = 0

        def after_student_step(self) -> None:
            self.steps += 1

    t, hook = amd(digits, tmp_path), Counting()
    t.task.hooks.append(hook)
    for expected in (0, 1, 1, 2):
        t._step()
        t.iteration += 1
        assert hook.steps == expected


@torch.no_grad()
def test_samples_come_from_the_students_own_earlier_steps(digits: Path, tmp_path: Path) -> None:
    """Backward simulation: predict, noise to the next time of the grid, … and the clean prediction of step k."""
    task = amd(digits, tmp_path, steps="[4]").task
    seen = set()
    for iteration in range(16):
        rollout = task._rollout(iteration, 0, graph=False)
        rng = generator(task.recipe.seed, iteration, 0, "rollout")
        x, condition = torch.randn(8, 1, 8, 8, generator=rng), {"labels": torch.tensor(rollout.prompts)}
        for k, time_k in enumerate((1.0, 0.75, 0.5, 0.25)):
            labels = condition["labels"]
            flow = task.student(x, timestep=torch.full((8,), 1000 * time_k), class_labels=labels).sample
            x0 = x - time_k * flow
            if k == rollout.index:
                break
            x = (0.75 - 0.25 * k) * torch.randn(x.shape, generator=rng) + (0.25 + 0.25 * k) * x0
        torch.testing.assert_close(rollout.x, x0, rtol=1e-4, atol=1e-5)
        assert rollout.steps == 4
        seen.add(rollout.index)
    assert seen == {0, 1, 2, 3}


def test_numbers_of_steps_are_drawn_by_their_weights(digits: Path, tmp_path: Path) -> None:
    task = amd(digits, tmp_path, steps="[1, 2]", step_weights="[3, 1]").task
    with torch.no_grad():
        drawn = [task._rollout(iteration, 0, graph=False) for iteration in range(60)]
    assert {r.steps for r in drawn} == {1, 2} and sum(r.steps == 1 for r in drawn) > 35
    assert {r.index for r in drawn if r.steps == 2} == {0, 1} and all(r.index < r.steps for r in drawn)
    assert task._rollout(0, 0, graph=True).x.requires_grad


def test_a_reward_that_is_not_finite_touches_no_other_sample(digits: Path, tmp_path: Path) -> None:
    class Reward:
        name = "test"
        values = torch.tensor([1.0, 2.0, torch.nan, 3.0, torch.inf, -torch.inf, torch.nan, torch.nan])

        def score(self, images: Tensor, conditions: Any) -> Tensor:
            return self.values

    task = amd(digits, tmp_path, **{"advantage.sigma_floor": 0}).task
    task.reward = Reward()
    rollout = task._rollout(0, 0, graph=False)
    spread = (2 / 3 * 3 / 4) ** 0.5  # of 1, 2, 2, 3: the third takes the mean of its group
    expected = torch.tensor([-1 / spread, 0, 0, 1 / spread, 0, 0, 0, 0])
    torch.testing.assert_close(rollout.advantage(), expected, rtol=1e-4, atol=1e-6)
    assert int(rollout.telemetry["reward_not_finite"].mask.sum()) == 5
    assert rollout.prompts[:4] == [rollout.prompts[0]] * 4


# --- one step ------------------------------------------------------------------------------------------------------


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    trainer(tmp_path / "one", accumulate=1).run()
    trainer(tmp_path / "four", accumulate=4).run()
    one, four = state(tmp_path / "one/run", 6), state(tmp_path / "four/run", 6)
    for name in one:
        if "num_batches" not in name:
            torch.testing.assert_close(four[name], one[name], rtol=1e-5, atol=1e-6)


def test_telemetry_is_the_mean_over_micro_batches(tmp_path: Path) -> None:
    t = trainer(tmp_path, accumulate=4, log_every=1, iterations=1)
    t.run()
    line = json.loads((tmp_path / "run/log.jsonl").read_text())
    assert line["micro"] == 1.5


def test_gradients_are_clipped_for_each_role(tmp_path: Path) -> None:
    t = trainer(tmp_path, optimizer=Optimizer(learning_rate=1.0, clip=1e-3))
    t.optimizers = {name: torch.optim.SGD(m.parameters(), lr=1.0) for name, m in t.task.roles.items()}
    before = {name: nn.utils.parameters_to_vector(m.parameters()).clone() for name, m in t.task.roles.items()}
    telemetry = t._step()
    for name, module in t.task.roles.items():
        moved = (nn.utils.parameters_to_vector(module.parameters()) - before[name]).norm()
        assert float(telemetry[f"{name}/grad_norm"][0]) > 0.1
        assert moved.item() == pytest.approx(1e-3, rel=1e-2)


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    settings = Optimizer(learning_rate=1.0, warmup=4, decay="cosine")
    factors = [schedule(settings, i, 12) for i in range(12)]
    np.testing.assert_allclose(factors[:5], [0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[8] == pytest.approx(0.5) and 0 < factors[11] < 0.05
    assert all(a >= b for a, b in pairwise(factors[4:]))
    constant = Optimizer(learning_rate=1.0, warmup=1)
    assert [schedule(constant, i, 3) for i in range(3)] == [1.0, 1.0, 1.0]


def test_the_scheduled_rate_reaches_the_optimizer(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    settings, rates = t.recipe.optimizer, []
    for _ in range(6):
        t._step()
        t.iteration += 1
        rates.append(t.optimizers["a"].param_groups[0]["lr"])
    assert rates == pytest.approx([0.05 * schedule(settings, i, 6) for i in range(6)])
    assert rates[0] == pytest.approx(0.025) and rates[5] < 0.01


def test_averages_follow_the_weights_with_a_warm_up(tmp_path: Path) -> None:
    """decay_i = min(ema, (1 + i)/(10 + i)); buffers are copied."""
    t = trainer(tmp_path, ema=0.15)
    expected = t.task.roles["a"][0].weight.detach().clone()
    for i in range(4):
        t._step()
        t.iteration += 1
        decay = min(0.15, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * t.task.roles["a"][0].weight.detach()
        torch.testing.assert_close(t.ema["a"].named["0.weight"], expected)
    assert t.ema["a"].named["1.num_batches_tracked"] == 4
    assert t.ema["b"].named["1.num_batches_tracked"] == 2


def test_averaged_weights_are_swapped_in_and_back(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    for _ in range(3):
        t._step()
        t.iteration += 1
    role, average = t.task.roles["a"], t.ema["a"]
    own, mean = role[0].weight.detach().clone(), average.named["0.weight"].clone()
    assert not torch.equal(own, mean)
    with contextlib.suppress(KeyError), t.averaged():
        assert torch.equal(role[0].weight, mean) and torch.equal(average.named["0.weight"], own)
        assert not role.training
        raise KeyError("a preview failed")
    assert torch.equal(role[0].weight, own) and torch.equal(average.named["0.weight"], mean)
    assert role.training


def test_the_result_is_made_of_averaged_weights(tmp_path: Path) -> None:
    with_average, without = trainer(tmp_path / "a", ema=0.9), trainer(tmp_path / "b", ema=0.0)
    with_average.run()
    without.run()
    end = state(tmp_path / "a/run", 6)
    assert torch.equal(with_average.task.finished[0], end["a/ema/0.weight"])
    assert torch.equal(without.task.finished[0], end["a/model/0.weight"])
    assert not any("ema" in name for name in state(tmp_path / "b/run", 6))


# --- faults and signals --------------------------------------------------------------------------------------------


def test_nan_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    t = trainer(tmp_path, poison=4)
    with pytest.raises(TrainingError) as caught:
        t.run()
    text = str(caught.value)
    assert text.startswith(
        "toy: the loss or gradient of 'b' is not finite at iteration 4; the last good checkpoint is "
    )
    assert "step-0000004. Lower b.learning_rate" in text
    kept = state(tmp_path / "run", 4)
    assert all(bool(value.isfinite().all()) for value in kept.values())
    assert not (tmp_path / "out").exists()
    cured = trainer(tmp_path)
    assert cured.resume() == 4 and cured.run()


def test_nan_before_any_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="at iteration 0; no checkpoint was written yet"):
        trainer(tmp_path, poison=0).run()


def test_nan_in_an_early_micro_batch_is_noticed(tmp_path: Path) -> None:
    t = trainer(tmp_path, accumulate=2)
    loss = t.task._loss

    def first_is_nan(name: str, iteration: int, micro: int) -> Any:
        value, values = loss(name, iteration, micro)
        return value.detach().requires_grad_() * torch.nan if micro == 0 else value, values

    t.task._loss = first_is_nan
    with pytest.raises(TrainingError, match="'a' is not finite at iteration 0"):
        t.run()


def test_handlers_of_signals_are_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    trainer(tmp_path).run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_is_answered_at_once_and_a_second_one_ends_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    t = trainer(tmp_path)
    phases = t.task.phases

    def twice(iteration: int) -> list[Phase]:
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGINT)
            assert "ends after this iteration, with a checkpoint" in capfd.readouterr().err
            os.kill(os.getpid(), signal.SIGINT)
        return phases(iteration)

    t.task.phases = twice
    with pytest.raises(KeyboardInterrupt):
        t.run()
    again = trainer(tmp_path)
    assert again.resume() == 2 and again.run()


@pytest.mark.parametrize(
    ("environment", "seconds", "told"),
    [
        ({"TORCHELASTIC_RUN_ID": "1"}, 60.0, True),
        ({"TORCHELASTIC_RUN_ID": "1"}, 3.0, False),
        ({"TORCHELASTIC_RUN_ID": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}, 60.0, False),
        ({}, 60.0, False),
    ],
)
def test_iterations_longer_than_torchruns_patience_are_told(
    environment: dict[str, str],
    seconds: float,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _check_patience(seconds)
    assert ("takes 60 s, and torchrun kills its ranks 30 s" in caplog.text) == told
    assert ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in caplog.text) == told


@pytest.mark.slow
def test_a_signal_saves_and_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM to a process of its own; interrupt_after covers SIGINT."""
    monkeypatch.setenv("LEAPFROG_RUNS", str(tmp_path / "runs"))
    arguments = [
        str(ROOT / "recipes/digits-reward.yaml"), "--quiet", f"output={tmp_path}/out", "iterations=1000000",
        "log_every=1", "save_every=1000000", "preview_every=1000000", "batch_size=2",
    ]  # fmt: skip
    log = tmp_path / "runs/digits-reward/log.jsonl"
    command = [sys.executable, "-m", "distill.run", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 600
            while not (log.is_file() and log.read_text()) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130, errors
    assert f"stopped by signal {int(signal.SIGTERM)} at iteration" in errors and "continue with --resume" in errors
    (checkpoint,) = (tmp_path / "runs/digits-reward/checkpoints").iterdir()
    done = json.loads((checkpoint / "state.json").read_text())["iteration"]
    assert 0 < done < 1_000_000 and not (tmp_path / "out").exists()
    assert main([*arguments, "--resume", f"iterations={done + 1}"]) == 0
    assert f"resuming digits-reward at iteration {done}" in capsys.readouterr().out


# --- what a run leaves ---------------------------------------------------------------------------------------------


def test_a_run_leaves_logs_previews_and_tensorboard(tmp_path: Path) -> None:
    trainer(tmp_path, seed=5).run()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    assert {"a/loss", "a/grad_norm", "b/loss", "error", "samples_per_second", "time"} <= lines[0].keys()
    assert sorted(p.name for p in (tmp_path / "run/previews").iterdir()) == ["0000004.png", "0000006.png"]
    picture = np.asarray(Image.open(tmp_path / "run/previews/0000006.png"))
    assert picture.shape == (4, 8 * 4 + 7, 3), "lines between pictures"
    pictures = np.delete(picture, np.arange(4, 39, 5), axis=1)
    assert (pictures[:, :12] == 35).all() and (pictures[:, 12:] == 0).all()
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    assert b"a/loss" in events.read_bytes() and b"preview" in events.read_bytes()


def test_a_run_logs_what_each_role_cost_by_the_clock_of_its_device(tmp_path: Path) -> None:
    trainer(tmp_path / "cpu").run()
    timed = trainer(tmp_path / "gpu")
    timed.clock = GpuClock(Ticking)  # each event comes 2 ms after the one before
    timed.run()
    on_cpu, on_gpu = (
        [json.loads(line) for line in (tmp_path / place / "run/log.jsonl").read_text().splitlines()]
        for place in ("cpu", "gpu")
    )
    for line in on_cpu:
        assert 0 < line["cpu_seconds/a"] <= line["cpu_seconds"] and line["cpu_seconds/b"] > 0
        assert not [name for name in line if name.startswith("gpu_seconds")]
    # Two iterations per interval; "b" trains in one of them. Three phases have six events, and one ends the interval.
    costs = [{name: v for name, v in line.items() if name.startswith("gpu_seconds")} for line in on_gpu]
    assert costs[1] == pytest.approx({"gpu_seconds/a": 0.004, "gpu_seconds/b": 0.002, "gpu_seconds": 0.014})
    assert all("cpu_seconds" in line and "cpu_seconds/a" not in line for line in on_gpu)


class Ticking:
    now = 0.0

    def record(self) -> None:
        Ticking.now += 2.0
        self.at = Ticking.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: Ticking) -> float:
        return later.at - self.at


def test_ranks_that_share_a_sequence_say_its_loss_once_and_each_their_own_cost() -> None:
    told = [{"loss": [0.5], "gpu_seconds/a": [Total(2.0 + rank)], "gpu_seconds": [Total(4.0)]} for rank in (0, 1)]
    assert _merged(told, 2) == {"loss": [0.5], "gpu_seconds/a": [2.0, 3.0], "gpu_seconds": [4.0, 4.0]}


def test_logged_losses_are_means_of_their_interval(tmp_path: Path) -> None:
    trainer(tmp_path / "fine", log_every=1).run()
    trainer(tmp_path / "coarse", log_every=6).run()
    fine = [json.loads(line) for line in (tmp_path / "fine/run/log.jsonl").read_text().splitlines()]
    (coarse,) = [json.loads(line) for line in (tmp_path / "coarse/run/log.jsonl").read_text().splitlines()]
    assert coarse["a/loss"] == pytest.approx(np.mean([line["a/loss"] for line in fine]))
    assert coarse["b/loss"] == pytest.approx(np.mean([line["b/loss"] for line in fine if "b/loss" in line]))


def test_a_grid_shows_pictures_row_by_row() -> None:
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 1, 2, 3)
    sheet = grid(images)
    assert sheet.shape == (3, 5, 31) and sheet.dtype == torch.uint8
    for corner in (sheet[0, ::3, ::4], sheet[1, 1::3, 2::4]):
        np.testing.assert_array_equal(corner, [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 0, 0, 0, 0, 0]])
    assert set(sheet[:, 2].flatten().tolist()) == set(sheet[:, :, 3].flatten().tolist()) == {96}  # between the cells


def test_generators_depend_on_every_part_of_their_key() -> None:
    keys = [
        (0, 1, 2, "noise"),
        (1, 1, 2, "noise"),
        (0, 2, 2, "noise"),
        (0, 1, 3, "noise"),
        (0, 1, 2, "data"),
        (0, 1, "noise"),
    ]
    draws = {tuple(torch.randn(4, generator=generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)
    assert torch.equal(torch.randn(4, generator=generator(3, "x")), torch.randn(4, generator=generator(3, "x")))
