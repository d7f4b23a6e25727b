"""Where training computes: chosen once, reached by every tensor, and waited for once per iteration.

No GPU is needed: ``pretend`` stands in for one, with shapes and devices as a GPU's, and without numbers.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

import distill
from distill.config import load_recipe
from distill.data import cache
from distill.families.base import coefficients
from distill.parallel.device import device, normal, uniform
from distill.rewards import DigitClassifier
from distill.run import TASKS
from distill.sampling import Flow, ScaledLinear
from distill.shrink import shrunk
from distill.tasks.common import autocast
from distill.tasks.distillation import DistillationTask
from distill.telemetry.sink import on_host
from distill.trainer import Trainer
from tests.distill.parallel.pretend import on_device, pretended

ROOT = Path(__file__).parents[3]
SMALL = ["batch_size=4", "accumulate=1", "steps=[2]", "fake_per_student=1", "fake_warmup=0", "ema=0.9"]
METHODS = {
    "nearly every": [
        "adaptation.strength=0.3", "regression={pairs: 8, steps: 1}", "gan={r1: 0.1, r1_form: finite}", "divergence={}",
        "decoupled={}", "reward_weighting={kappa: 0.1}", "reward_gradient={weight: 0.01}", "reward_tilt={beta: 0.01}",
        "shared_teacher={anneal: 50}", "implicit_alignment={}", "segment_guidance={margin: 0.01}", "sub_interval={}",
        "sampler=deterministic", "step_aware_fake=true", "consistency={}", "heldout_rewards=[JUDGE]",
        "first_step_anchor={anchor: 1, steps: 2, matching: true}", "safeguards.reward_gap.window=2",
        "safeguards={guidance_ceiling: 1.5, coherence: 0.0, two_key: 1, ramp: 2}", "safeguards.diversity.window=1",
    ],
    "what does not go with those": [
        "policy_gradient={weight: 0.5}", "adaptation.strength=0.3", "advantage.shrinkage=0.5", "advantage.when=student",
        "foundation_gan={features: models/digits-reward}", "dynamic_renoising={}",
        "regression={pairs: 8, steps: 1, features: models/digits-reward}",
    ],
    "advantages that are kept": ["adaptation.strength=0.3", "sharpening={}", "advantage.when=reuse"],
}  # fmt: skip
MAY_WAIT = {
    "telemetry/sink.py:fetched": "once per iteration: are losses and gradients finite?",
    "objectives/regression.py:_follow": "pairs are kept on the host, once each",
    "objectives/safeguards.py:after_iteration": "statistics of a whole iteration",
    "objectives/deviation.py:after_iteration": "statistics of a whole iteration",
    "objectives/fdistill.py:after_iteration": "statistics of a whole iteration",
    "objectives/fdistill.py:<genexpr>": "the same, column by column",
    "tasks/reusing.py:keep": "advantages of an iteration with the student, for the checkpoint and the host's next ones",
}
"""Functions that may look at numbers of the device, which waits for all that it has still to do."""
ON_HOST = {"__init__", "times", "draw_times", "finished"}
"""Functions whose tensors are of the host: memories and fixed draws of hooks, and times before they are moved."""


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LEAPFROG_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny network of digits and a judge that has learned nothing."""
    folder = tmp_path_factory.mktemp("models")
    DiTTransformer2DModel(
        sample_size=8, in_channels=1, out_channels=1, patch_size=4, num_layers=1, num_attention_heads=1,
        attention_head_dim=8, num_embeds_ada_norm=10, norm_num_groups=1,
    ).save_pretrained(folder / "teacher" / "transformer")  # fmt: skip
    DigitClassifier(8, "judge").save(folder / "judge", 0.1)
    return folder


def reads_of(recipe: Any, folder: Path) -> list[str]:
    """Train one iteration on a pretended GPU; where the host waited for it."""
    with pretended() as gpu:
        trainer = Trainer(DistillationTask(recipe), folder / "run", quiet=True)
        assert all(on_device(module) for module in trainer.task.roles.values())
        gpu.reads.clear()
        telemetry = trainer._step()
        waited = list(gpu.reads)
        told = on_host(telemetry)
    assert {"student/loss", "fake/loss"} <= telemetry.keys()
    assert all(
        value.device.type == "cpu" for several in told.values() for value in several if isinstance(value, Tensor)
    )
    return waited


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_iteration_stays_on_the_device(method: str, models: Path, tmp_path: Path) -> None:
    words = [word.replace("JUDGE", str(models / "judge")) for word in METHODS[method]]
    own = [f"teacher={models}/teacher", "family=sit", f"output={tmp_path}/out"]
    waited = reads_of(load_recipe("recipes/digits-amd.yaml", [*own, *SMALL, *words]), tmp_path)
    assert set(waited) <= MAY_WAIT.keys() and waited.count("telemetry/sink.py:fetched") == 1


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("sdxl-amd-4step", "adapters={rank: 2, alpha: 2, base: bfloat16}"),
        ("wan-1.3b-amd-4step", "advantage.reward=hpsv2"),
    ],
)
def test_production_recipes_stay_on_the_device(recipe: str, more: str, tmp_path: Path) -> None:
    """Mixed precision, adapters of one base, videos, and activations that are computed again."""
    r = load_recipe(f"recipes/{recipe}.yaml", [f"output={tmp_path}/out", *SMALL, "heldout_rewards=[]", more])
    small = shrunk(r, tmp_path / "inputs").model_copy(update={"accumulate": 1, "batch_size": 4})
    assert reads_of(small, tmp_path) == ["telemetry/sink.py:fetched"]


@pytest.mark.parametrize("name", ["digits-reward", "digits-teacher", "scenes-vae", "scenes-clip", "scenes-labeller"])
def test_what_makes_teachers_and_judges_stays_on_the_device(name: str, tmp_path: Path) -> None:
    words = [f"output={tmp_path}/out", "batch_size=4", "accumulate=1"]
    words += ["data={seed: 1, count: 4, size: 64}"] if name.startswith("scenes") else []
    recipe = load_recipe(f"recipes/{name}.yaml", words)
    module, _, task = TASKS[recipe.task].partition(":")
    with pretended() as gpu:
        trainer = Trainer(getattr(import_module(module), task)(recipe), tmp_path / "run", quiet=True)
        assert all(on_device(module) for module in trainer.task.roles.values())
        telemetry = trainer._step()
    assert gpu.reads == ["telemetry/sink.py:fetched"] and len(telemetry) > 2


def test_tensors_are_made_where_they_are_needed() -> None:
    """A tensor without a device is one of the host: moved at once, or in a function that ON_HOST names."""
    makers = {"randn", "rand", "zeros", "ones", "full", "empty", "tensor", "arange", "linspace", "randint", "as_tensor"}
    folder = Path(distill.__file__ or "").parent
    files = [*(folder / "objectives").glob("*.py"), folder / "telemetry/probe.py", folder / "tasks/distillation.py"]
    found = []
    for path in [*files, folder / "tasks/diffusion.py", folder / "math.py"]:
        tree = ast.parse(path.read_text())
        above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            made = isinstance(call.func, ast.Attribute) and ast.unparse(call.func).removeprefix("torch.") in makers
            if not made or any(k.arg == "device" for k in call.keywords):
                continue
            around = list(_above(call, above))
            moved = any(isinstance(n, ast.Call) and ast.unparse(n.func) == "moved" for n in around)
            owner = next((n.name for n in around if isinstance(n, ast.FunctionDef)), "")
            if not moved and owner not in ON_HOST:
                found.append(f"{path.name}:{call.lineno} {ast.unparse(call)}")
    assert not found, "give device=, or draw with distill.parallel.device"


def _above(node: ast.AST, above: dict[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    while node in above:
        node = above[node]
        yield node


def test_the_pretended_gpu_refuses_what_a_gpu_refuses() -> None:
    with pretended() as gpu:
        there, here = normal((3,), torch.Generator().manual_seed(0), device()), torch.ones(3)
        assert here.tolist() == [1.0] * 3 and gpu.reads == []
        with pytest.raises(RuntimeError, match="two different devices"):
            there + here
        with pytest.raises(DynamicOutputShapeException):
            there[there > 0]
        assert (there * 2.0).device == device() and there.sum().item() == 1.0 and len(gpu.reads) == 1
        with autocast("bfloat16"):
            assert (there[None] @ there[:, None]).dtype == torch.bfloat16


def test_the_device_is_a_gpu_per_rank_unless_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEAPFROG_DEVICE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device() == torch.device("cuda", 3)
    monkeypatch.setenv("LEAPFROG_DEVICE", "cpu")
    assert device() == torch.device("cpu")
    monkeypatch.setenv("LEAPFROG_DEVICE", "cuda:1")
    assert device() == torch.device("cuda", 1)
    monkeypatch.delenv("LEAPFROG_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device() == torch.device("cpu")


def test_draws_are_those_of_the_host() -> None:
    there = torch.device("cpu")
    rng, same = (torch.Generator().manual_seed(5) for _ in range(2))
    assert torch.equal(normal((2, 3), rng, there), torch.randn(2, 3, generator=same))
    assert torch.equal(uniform(4, rng, there), torch.rand(4, generator=same, dtype=torch.float64))


@pytest.mark.parametrize("schedule", [ScaledLinear(), ScaledLinear(zero_terminal=True), Flow(3.0)])
def test_coefficients_are_the_schedules_own_to_the_last_bit(schedule: Any) -> None:
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64) * schedule.t_max
    alpha, sigma = coefficients(schedule, t)
    assert torch.equal(alpha, torch.from_numpy(schedule.alpha(t.numpy())))
    assert torch.equal(sigma, torch.from_numpy(schedule.sigma(t.numpy())))
