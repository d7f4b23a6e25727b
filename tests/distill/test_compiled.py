"""Compiled blocks train what plain ones train; names, features and repeated backward passes stay as they were."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from distill.compiled import compile_blocks
from distill.config import SitModel, load_recipe
from distill.families.sit import Sit
from distill.shrink import shrunk
from distill.tasks.distillation import DistillationTask
from distill.trainer import Trainer

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: install g++"),
    pytest.mark.filterwarnings("default"),  # torch.compile provokes warnings of torch itself
]


def test_outputs_gradients_and_names_stay() -> None:
    torch.manual_seed(0)
    plain = Sit(SitModel(family="sit", width=16, layers=2, heads=2)).new_network()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    compiled = copy.deepcopy(plain)
    compile_blocks([compiled], (BasicTransformerBlock,))
    assert all(m._compiled_call_impl for m in compiled.modules() if isinstance(m, BasicTransformerBlock))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, 1, 8, 8)
    labels, times = torch.tensor([1, 3, 5]), torch.tensor([10.0, 300.0, 700.0])
    outputs, gradients = [], []
    for network in (plain, compiled):
        y = network(x, timestep=times, class_labels=labels).sample
        parameters = [p for p in network.parameters() if p.requires_grad]
        outputs.append(y.detach())
        for target in (y.square().sum(), y.sum()):  # two backward passes through one graph
            found = torch.autograd.grad(target, parameters, retain_graph=True, allow_unused=True)
            gradients.append([torch.zeros(()) if g is None else g for g in found])
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    for one, other in ((gradients[0], gradients[2]), (gradients[1], gradients[3])):
        assert all(_near(a, b) for a, b in zip(one, other, strict=True))


def test_a_recipe_compiles_its_roles(tmp_path: Path) -> None:
    """Wan's transformer, its blocks computed again in backward passes, under AMD."""
    states = []
    for compiles in ("false", "true"):
        words = ["precision=float32", "fake_per_student=1", "fake_warmup=0", f"compile={compiles}"]
        given = load_recipe(ROOT / "recipes/wan-1.3b-amd-4step.yaml", words)
        recipe = shrunk(given, tmp_path / "inputs", overrides=words)
        made = Trainer(DistillationTask(recipe), tmp_path / compiles, quiet=True)
        blocks = [m for network in made.task.networks() for m in network.modules() if isinstance(m, made.task.blocks())]
        assert all((m._compiled_call_impl is not None) == (compiles == "true") for m in blocks)
        made._step()
        states.append(made._tensors())
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert _near(states[1][name], tensor), name


def _near(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= 5e-5 + 1e-3 * float(b.abs().max())
