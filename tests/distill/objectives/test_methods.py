"""The methods as recipes, and the generated table against the code that it describes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import beta, kstest, uniform
from torch.nn.utils import parameters_to_vector

from distill.config import parse_recipe
from distill.objectives.__main__ import DOCUMENT, inserted, main
from distill.objectives.build import hooks_of
from distill.objectives.dmd import match
from distill.objectives.fdistill import DivergenceWeight
from distill.objectives.methods import COLUMNS, HOOKS, METHODS, Method, row, table
from distill.objectives.options import Safeguards
from distill.objectives.plan import Hook, Roles, Rollout, claimed_times, fake_weight, student_weights
from distill.trainer import generator

ADVANTAGE = torch.tensor([-1.0, -0.4, 0.0, 0.7, 1.0, 0.2, -0.1, -0.8])
REWARDS = torch.tensor([0.3, -0.2, 0.1, 0.0, 0.5, -0.4, 0.2, 0.05])


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
        "embedded_guidance", "compile",
    }  # fmt: skip
    assert fields - plain == set(HOOKS)
    for hook in HOOKS.values():
        assert hook.terms != Hook.terms
    assert set().union(*(method.sections for method in METHODS.values())) >= set(HOOKS)
    assert all(value is None for value in Safeguards().model_dump().values())


def evaluated(formula: str, **symbols: float) -> float:
    """A cell's formula with s = 0.1, κ = 2, and the symbols of one sample."""
    for written, python in {
        "−": "-", "·": "*", "exp(½": "exp(0.5*", "exp": "math.exp", "min(SNR": "min(snr", "ã": "a", "κ": "kappa",
        "ε'²": "carried", "ε²": "fresh", "0 if k = 1 < K": "0 if k == 1 < K else 1",
        "h(p/q)": "h(ratio)",
    }.items():  # fmt: skip
        formula = formula.replace(written, python)
    return float(eval(formula, {"math": math, "s": 0.1, "kappa": 2.0, "h": lambda r: r / (1 + r), **symbols}))


def told(name: str) -> tuple[dict[str, str], Any]:
    """A method's row of the table, and its recipe with W as the table shows it, before it is scaled to mean 1."""
    recipe = recipe_of(METHODS[name])
    if recipe.sharpening:
        recipe = recipe.model_copy(update={"sharpening": recipe.sharpening.model_copy(update={"normalised": False})})
    return dict(zip(COLUMNS, row(METHODS[name]), strict=True)), recipe


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("steps", "index"), [(1, 0), (4, 0), (4, 1)])
def test_the_weights_in_the_table_are_those_of_the_hooks(
    roles: Roles, rolled: Callable[..., Rollout], name: str, steps: int, index: int
) -> None:
    """α, β, and W on ‖x̂ − x‖² where SNR is in it (the network's loss is ‖Δv‖² = ‖Δx0‖²/σ²); ε is a mean of squares."""
    cells, recipe = told(name)
    rollout = rolled(steps, index, advantage=lambda: ADVANTAGE, rewards=lambda: REWARDS)
    t = 0.05 + 0.9 * torch.linspace(0, 1, 8, dtype=torch.float64)
    noise = carried = torch.randn(rollout.x.shape, generator=torch.Generator().manual_seed(0))
    hooks = hooks_of(recipe, roles, object())
    for hook in hooks:
        carried = hook.noise(rollout, "fake", t, carried)
    matching = match(roles.family, roles.teacher, roles.fake, rollout, t, noise, guidance=4.0)
    alpha, beta = student_weights(hooks, rollout, matching)
    weight, snr = fake_weight(hooks, rollout, t), ((1 - t) / t) ** 2
    judges = [hook.adversary for hook in hooks if isinstance(hook, DivergenceWeight)]
    ratio = torch.cat([*(judge.logits(matching.x_t, t, rollout.condition) for judge in judges), torch.ones(8)]).exp()
    energy = [(e**2).flatten(1).mean(1) for e in (noise, carried)]
    carries = recipe.sampler == "deterministic"
    assert carries == ("ε'" in cells["W"]) and torch.equal(*energy) == (not carries or index + 1 == steps)
    for i in range(8):
        symbols = {
            "a": ADVANTAGE[i], "r": REWARDS[i], "snr": snr[i], "ratio": ratio[i],
            "fresh": energy[0][i], "carried": energy[1][i],
        }  # fmt: skip
        found = {key: float(value) for key, value in symbols.items()} | {"k": index + 1, "K": steps}
        assert float(beta[i]) == pytest.approx(evaluated(cells["β"], **found), rel=1e-4)
        assert float(alpha[i]) == pytest.approx(evaluated(cells["α"], **found), rel=1e-4)
        native = float(t[i]) ** 2 if "SNR" in cells["W"] else 1.0
        assert float(weight[i]) == pytest.approx(native * evaluated(cells["W"], **found), rel=1e-4)


TIMES: dict[str, Callable[[Rollout], Any]] = {
    "uniform in [t_{k+1}, t_k]": lambda r: uniform(max(r.until, 0.02), min(r.level, 0.98) - max(r.until, 0.02)),
    "Beta(a, b), annealed to uniform": lambda r: beta(*((4.0, 1.5) if r.iteration == 0 else (1.0, 1.0)), 0.02, 0.96),
    "uniform up to t_k": lambda r: uniform(0.02, min(r.level, 0.98) - 0.02),
}  # fmt: skip
"""What a cell of a τ column says, as the distribution of the times within [0.02, 0.98]."""


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("index", "iteration"), [(0, 0), (2, 1_000_000)])
def test_the_times_in_the_table_are_those_of_the_hooks(
    roles: Roles, rolled: Callable[..., Rollout], name: str, index: int, iteration: int
) -> None:
    cells, recipe = told(name)
    hooks, rollout = hooks_of(recipe, roles, object()), rolled(4, index, 1, iteration)
    rollout.x = torch.zeros(2000, 1)
    for part, column, unclaimed in (
        ("dm", "τ of DM and fake", "uniform"), ("fake", "τ of DM and fake", "uniform"), ("ca", "τ of CA", "that of DM"),
    ):  # fmt: skip
        found = claimed_times(hooks, roles.family.schedule, rollout, part, generator(0, part), (0.02, 0.98))  # type: ignore[arg-type]
        assert (found is None) == (cells[column] == unclaimed)
        if found is not None:
            assert kstest(found.numpy(), TIMES[cells[column]](rollout).cdf).pvalue > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_in_the_table_is_that_of_the_hooks(roles: Roles, rolled: Callable[..., Rollout], name: str) -> None:
    cells, recipe = told(name)
    found, rollout = roles.teacher, rolled()
    for hook in hooks_of(recipe, roles, object()):
        found = hook.teacher(rollout, found)
    theta, phi, real = (parameters_to_vector(m.parameters()) for m in (roles.teacher, roles.fake, found))
    if cells["d_real from"] == "teacher":
        assert found is roles.teacher
    else:
        assert cells["d_real from"] == "θ + w·(φ − θ)"
        torch.testing.assert_close(real, theta + recipe.shared_teacher.share * (phi - theta))


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
