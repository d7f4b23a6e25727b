"""The methods as recipes, and the generated table against the code that it describes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import parse_recipe
from distill.objectives.__main__ import DOCUMENT, inserted, main
from distill.objectives.build import hooks_of
from distill.objectives.methods import COLUMNS, HOOKS, METHODS, Method, row, table
from distill.objectives.options import Safeguards
from distill.objectives.plan import Hook, Matching, Roles, Rollout

ADVANTAGE = torch.tensor([-1.0, -0.4, 0.0, 0.7, 1.0, 0.2, -0.1, -0.8])
REWARDS = torch.tensor([0.3, -0.2, 0.1, 0.0, 0.5, -0.4, 0.2, 0.05])
NONE: Any = None


def recipe_of(method: Method) -> Any:
    tree = {
        "task": "distill", "name": "toy", "output": "bundles/toy", "teacher": "models/toy", "iterations": 10,
        "batch_size": 8, "student": {"learning_rate": 1e-4}, "fake": {"learning_rate": 1e-4},
    }  # fmt: skip
    reward = {"advantage": {"reward": "r"}} if method.reward else {}
    return parse_recipe(tree | reward | method.sections)


def test_the_document_holds_the_table_of_the_code() -> None:
    text = DOCUMENT.read_text()
    assert inserted(text) == text, "run python -m distill.objectives --table"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_recipe_that_it_names(roles: Roles, name: str) -> None:
    method = METHODS[name]
    recipe = recipe_of(method)
    found = [type(hook) for hook in hooks_of(recipe, roles, object())]
    assert sorted(found, key=str) == sorted(method.hooks, key=str)


def test_every_section_of_a_recipe_has_its_hook_and_its_words() -> None:
    fields = recipe_of(METHODS["dmd2"]).model_fields_set | set(type(recipe_of(METHODS["dmd2"])).model_fields)
    plain = {
        "task", "name", "seed", "iterations", "batch_size", "accumulate", "precision", "ema", "log_every", "output",
        "preview_every", "save_every", "keep_checkpoints", "teacher", "data", "steps", "step_weights", "guidance",
        "fake_per_student", "ttur", "reuse_rollout", "fake_warmup", "time_range", "sampler", "student", "fake",
        "discriminator", "advantage", "safeguards", "heldout_rewards", "telemetry", "parallel", "adapters",
        "activation_checkpointing", "initialise_from", "family", "size", "frames", "shift", "timesteps",
        "embedded_guidance",
    }  # fmt: skip
    assert fields - plain == set(HOOKS)
    for hook in HOOKS.values():
        assert hook.terms != Hook.terms
    assert set().union(*(method.sections for method in METHODS.values())) >= set(HOOKS)
    assert all(value is None for value in Safeguards().model_dump().values())


def evaluated(formula: str, index: int) -> float:
    """A cell's formula with s = 0.1, κ = 2 and the advantage and reward of one sample."""
    python = formula.replace("−", "-").replace("·", "*").replace("exp", "math.exp").replace("ã", "a").replace("κ", "k")
    a, r = float(ADVANTAGE[index]), float(REWARDS[index])
    return float(eval(python, {"math": math, "a": a, "r": r, "s": 0.1, "k": 2.0}))


@pytest.mark.parametrize("name", ["dmd2", "re-dmd", "d-dmd", "dsa", "rls", "amd"])
def test_the_weights_in_the_table_are_those_of_the_hooks(roles: Roles, name: str) -> None:
    cells = dict(zip(COLUMNS, row(METHODS[name]), strict=True))
    recipe = recipe_of(METHODS[name])
    if recipe.sharpening:  # the table shows W before it is scaled to mean 1
        recipe = recipe.model_copy(update={"sharpening": recipe.sharpening.model_copy(update={"normalised": False})})
    x = torch.zeros(8, 1)
    rollout = Rollout(x, {}, (), 1, 0, advantage=lambda: ADVANTAGE, rewards=lambda: REWARDS)
    ones = torch.ones(8)
    alpha, beta, weight = ones, ones, ones
    matching = Matching(NONE, x, x, x, x, x, 4.0, ones, ones, ones)
    for hook in hooks_of(recipe, roles, object()):
        a, b = hook.student_weights(rollout, matching)
        alpha, beta, weight = alpha * a, beta * b, weight * hook.fake_weight(rollout, ones.double())
    for i in range(8):
        assert float(beta[i]) == pytest.approx(evaluated(cells["β"], i), rel=1e-5)
        assert float(alpha[i]) == pytest.approx(evaluated(cells["α"], i), rel=1e-5)
        assert float(weight[i]) == pytest.approx(evaluated(cells["W"], i), rel=1e-5)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == table()
    document = tmp_path / "method.md"
    document.write_text(
        "before\n<!-- methods: python -m distill.objectives --table -->\nold\n<!-- /methods -->\nafter\n"
    )
    assert main(["--table", "--document", str(document)]) == 0
    text = document.read_text()
    assert table() in text and "old" not in text and text.startswith("before\n") and text.endswith("\nafter\n")
    document.write_text("no marks")
    assert main(["--table", "--document", str(document)]) == 2
    assert "has no place for the table" in capsys.readouterr().err
