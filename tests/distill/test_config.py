"""Recipes are strict: every fault stops before any work and says where it is and what would be right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import DistillRecipe, RecipeError, SceneData, load_recipe, parse_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
PRODUCTION = [path for path in RECIPES if not path.stem.startswith(("scenes-", "digits-"))]
MARK = re.compile(r"\[[A-Z]\]")


def write(folder: Path, tree: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def distil(**changes: Any) -> dict[str, Any]:
    """A valid distillation recipe with changes."""
    optimizer = {"learning_rate": 1e-4}
    tree = {
        "task": "distill", "name": "toy", "output": "bundles/toy", "teacher": "models/toy", "iterations": 10,
        "batch_size": 8, "student": dict(optimizer), "fake": dict(optimizer),
    }  # fmt: skip
    return tree | changes


def teacher(**changes: Any) -> dict[str, Any]:
    tree = {
        "task": "diffusion", "name": "toy", "output": "models/toy", "iterations": 10, "batch_size": 8,
        "data": "digits", "model": {"family": "sit"}, "optimizer": {"learning_rate": 1e-4},
    }  # fmt: skip
    return tree | changes


def fault(tree: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tree)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_ours_parses(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.batch_size % recipe.accumulate == 0
    again = parse_recipe(recipe.model_dump(mode="json"))
    assert again == recipe


@pytest.mark.parametrize("path", PRODUCTION, ids=lambda path: path.stem)
def test_every_number_of_a_production_recipe_says_where_it_comes_from(path: Path) -> None:
    """By a mark such as [O] on its line, which the recipe's head explains; digits of names are no numbers."""
    lines = [line.partition("#") for line in path.read_text(encoding="utf-8").splitlines()]
    head = {mark for code, _, said in lines if not code for mark in MARK.findall(said)}
    numbers = [(code, said) for code, _, said in lines if re.search(r"\d", re.sub(r"^(name|output):.*", "", code))]
    assert len(numbers) > 10
    assert [code for code, said in numbers if not MARK.search(said)] == []
    assert {mark for code, _, said in lines if code for mark in MARK.findall(said)} <= head


def test_students_and_their_controls_differ_in_the_method_alone() -> None:
    for world in ("scenes", "digits", "scenes-wan"):
        amd, dmd2 = (load_recipe(RECIPES[0].parent / f"{world}-{method}.yaml") for method in ("amd", "dmd2"))
        method = {"name", "output", "advantage", "adaptation", "sharpening"}
        assert amd.model_dump(exclude=method) == dmd2.model_dump(exclude=method)
        assert dmd2.advantage is dmd2.adaptation is dmd2.sharpening is None


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (distil(iteration=3), "iteration is unknown; did you mean iterations?"),
        (distil(student={"learning_rte": 1e-4, "learning_rate": 1}), "student.learning_rte is unknown; did you mean"),
        (distil(student={"learning_rate": 1, "clp": 1}), "student.clp is unknown; did you mean clip?"),
        (distil(data={"cout": 3}), "data.cout is unknown; did you mean count?"),
        (distil(advantage={"reward": "r", "grup": 4}), "advantage.grup is unknown; did you mean group?"),
        (distil(zzz=1), "zzz is unknown; known keys: accumulate, activation_checkpointing, "),
        # These names are tasks as well, which once lost them from the message or broke it.
        (distil(vae="models/x"), "vae is unknown; "),
        (distil(clip=1.0), "clip is unknown; "),
        (teacher(model={"family": "sit", "widht": 8}), "model.widht is unknown; did you mean width?"),
        (teacher(model={"family": "sit", "unet": {}}), "model.unet is unknown; known keys: family, heads, layers, "),
        (
            teacher(
                data={},
                model={
                    "family": "sdxl",
                    "vae": "v",
                    "text_encoder": "t",
                    "text_encoder_2": "t",
                    "unet": {"had_dim": 4},
                },
            ),
            "model.unet.had_dim is unknown; did you mean head_dim?",
        ),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_spelling(tree: dict[str, Any], message: str) -> None:
    text = fault(tree)
    assert text.startswith(f"recipe: {message}")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (distil(batch_size="many"), "batch_size: Input should be a valid integer, unable to parse"),
        (distil(batch_size=0), "batch_size: Input should be greater than 0 (got 0)"),
        (distil(iterations=2.5), "iterations: Input should be a valid integer"),
        (distil(student={"learning_rate": -1}), "student.learning_rate: Input should be greater than 0 (got -1)"),
        (distil(student={"learning_rate": float("inf")}), "student.learning_rate: Input should be a finite number"),
        (distil(student={"learning_rate": 1, "clip": -1}), "student.clip: Input should be greater than 0 (got -1)"),
        (distil(student={"learning_rate": 1, "betas": [0.9, 1.0]}), "student.betas.1: Input should be less than 1"),
        (distil(student={"learning_rate": 1, "betas": [0.9]}), "student.betas.1: Field required"),
        (distil(student=3), "student: Input should be a valid dictionary or instance of Optimizer (got 3)"),
        (distil(advantage={"reward": 3}), "advantage.reward: Input should be a valid string (got 3)"),
        (distil(precision="float16"), "precision: Input should be 'float32' or 'bfloat16' (got 'float16')"),
        (distil(name="No Spaces"), "name: String should match pattern"),
        (distil(ema=1.0), "ema: Input should be less than 1 (got 1.0)"),
        (distil(data={"count": 0}), "data.count: Input should be greater than 0 (got 0)"),
        (distil(steps=[]), "steps: Tuple should have at least 1 item"),
        (distil(steps=[4, 0]), "steps.1: Input should be greater than or equal to 1 (got 0)"),
        (distil(steps=[1, 2], step_weights=[1, 0]), "step_weights.1: Input should be greater than 0 (got 0)"),
        (distil(time_range=[0.02, 1.5]), "time_range.1: Input should be less than or equal to 1 (got 1.5)"),
        (teacher(sampling_steps=0), "sampling_steps: Input should be greater than or equal to 1 (got 0)"),
        (teacher(model={"family": "dit"}), "model.family is 'dit'; use one of sdxl, wan, sit"),
        (teacher(model={"width": 8}), "model.family is None; use one of sdxl, wan, sit"),
        (
            {"task": "paint"},
            "task is 'paint'; use one of vae, video-vae, clip, text, reward, latent-reward, video-reward, labeller, "
            "motion, diffusion, distill",
        ),
        ({"name": "x"}, "task is None; use one of vae, "),
        (distil(student={}), "student.learning_rate: Field required"),
    ],
)
def test_wrong_values_are_refused_by_key_and_value(tree: dict[str, Any], message: str) -> None:
    text = fault(tree)
    assert text.startswith(f"recipe: {message}")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (distil(accumulate=3), "batch_size 8 is not a multiple of accumulate 3"),
        (distil(adaptation={}), "adaptation and sharpening need an advantage; add advantage.reward"),
        (distil(sharpening={}), "adaptation and sharpening need an advantage; add advantage.reward"),
        (distil(advantage={"reward": "r", "group": 1}, adaptation={}), "and advantage.group of 2 or more"),
        (distil(reward_weighting={}), "reward_weighting needs a reward; add advantage.reward"),
        (distil(reward_gradient={}), "reward_gradient needs a reward; add advantage.reward"),
        (distil(reward_tilt={"beta": 1}), "reward_tilt needs a reward; add advantage.reward"),
        (distil(safeguards={"two_key": 1}), "two_key and diversity compare the samples of a prompt"),
        (distil(safeguards={"reward_gap": {}}), "reward_gap compares with held-out rewards; name heldout_rewards"),
        (distil(safeguards={"reward_gap": {"tolerate": 2}}), "tolerate 2.0 is not below refuse 1.5"),
        (distil(safeguards={"diversity": {"refuse": 0.9}}), "refuse 0.9 is not below tolerate 0.8"),
        (distil(discriminator={"learning_rate": 1}), "discriminator is an optimizer without a role; add gan"),
        (distil(gan={}, foundation_gan={"features": "f"}), "gan and foundation_gan would share one discriminator"),
        (distil(policy_gradient={"weight": 1}), "policy_gradient compares the ends of a prompt's roll-outs"),
        (distil(advantage={"reward": "r"}, policy_gradient={"weight": 1}, steps=[1]), "a number of steps above 1"),
        (
            distil(advantage={"reward": "r"}, policy_gradient={"weight": 1}, sampler="deterministic"),
            "sampler: stochastic, and a number of steps above 1",
        ),
        (
            distil(advantage={"reward": "r", "when": "student"}, sharpening={}, ttur="alternating"),
            "advantage.when student leaves the fake score without rewards under ttur alternating",
        ),
        (
            distil(advantage={"reward": "r", "when": "reuse", "group": 1}),
            "advantage.when reuse keeps the advantages of groups, and advantage.group is 1",
        ),
        (
            distil(advantage={"reward": "r", "when": "reuse"}, reuse_rollout=False),
            "advantage.when reuse gives the fake score the student's draws and their advantages, and reuse_rollout",
        ),
        (distil(advantage={"reward": "r", "share": 0}), "advantage.share"),
        (distil(divergence={}), "divergence reads the discriminator's density ratio; add gan"),
        (distil(gan={}, divergence={"bounds": [2, 1]}), "bounds is (2.0, 1.0); give two positive numbers"),
        (distil(sub_interval={}, dynamic_renoising={}), "both choose where samples are re-noised; drop one"),
        (distil(first_step_anchor={"anchor": 40}), "anchor 40 lies beyond the 30 steps of the teacher"),
        (distil(ttur="alternating", fake_per_student=1), "ttur alternating never updates the fake"),
        (distil(advantage={"reward": "r", "group": 3}), "micro-batches of 8 do not hold whole groups of 3"),
        (distil(advantage={"reward": "r"}, accumulate=4), "micro-batches of 2 do not hold whole groups of 4"),
        (distil(steps=[1, 2], step_weights=[1.0]), "step_weights has 1 entries for 2 steps"),
        (distil(time_range=[0.9, 0.1]), "time_range is (0.9, 0.1); give the smaller time first"),
        (
            distil(advantage={"reward": "r"}, adaptation={}, heldout_rewards=["r"]),
            "r is both the training reward and held out",
        ),
        (distil(heldout_rewards=["r"]), "heldout_rewards are read beside the training reward; add advantage.reward"),
        (teacher(data={}), "the sit family does not learn these data; sit takes digits, others scenes"),
        (teacher(data="digits", model={"family": "sit"}) | {"data": {"frames": 17}}, "the sit family does not learn"),
        ({"task": "reward", "name": "r", "output": "o", "iterations": 1, "batch_size": 1,
          "optimizer": {"learning_rate": 1}}, "a reward on scenes needs clip, the folder of a CLIPModel"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together_are_refused(tree: dict[str, Any], message: str) -> None:
    assert message in fault(tree)


def test_every_fault_has_its_own_line() -> None:
    lines = fault(distil(iteration=3, batch_size=0, fake={"learning_rate": 1, "warmpu": 2})).splitlines()
    assert len(lines) == 3 and all(line.startswith("recipe: ") for line in lines)


# --- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_reach_every_level_and_make_missing_ones(tmp_path: Path) -> None:
    overrides = [
        "iterations=20", "student.learning_rate=1e-5", "steps=[1, 2]", "advantage.reward=models/r", "data.count=64",
        "student.betas=[0, 0.99]", "accumulate=2", "adaptation={}",
    ]  # fmt: skip
    recipe = load_recipe(write(tmp_path, distil()), overrides)
    assert isinstance(recipe, DistillRecipe)
    assert (recipe.iterations, recipe.steps, recipe.accumulate) == (20, (1, 2), 2)
    assert recipe.student.learning_rate == 1e-5 and recipe.student.betas == (0.0, 0.99)
    assert recipe.fake.learning_rate == 1e-4
    assert recipe.advantage is not None and recipe.advantage.reward == "models/r"
    assert recipe.data == SceneData(count=64)
    assert recipe.adaptation is not None and recipe.adaptation.strength == 0.1


def test_an_override_may_replace_a_whole_section(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, distil()), ["data=digits"]).data == "digits"
    assert load_recipe(write(tmp_path, distil(adaptation=None)), ["adaptation=null"]).adaptation is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("iterations", "override 'iterations' is not key=value; for example iterations=200"),
        ("=3", "override '=3' is not key=value"),
        ("name.first=x", "override 'name.first': 'name' holds a value, not keys"),
        ("student.betas=[0, ", "override 'student.betas=[0, ': '[0, ' is no YAML value"),
        ("student.learning_rte=1", "student.learning_rte is unknown; did you mean learning_rate?"),
    ],
)
def test_wrong_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, distil()), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "is not YAML"), ("- 1\n- 2", "holds list, not keys and values"), ("", "holds NoneType, not keys")],
)
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_missing_recipe_is_answered_with_the_nearest_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES[0].parents[1])
    with pytest.raises(
        RecipeError, match=r"no recipe 'recipes/digit-amd.yaml'; did you mean recipes/digits-amd.yaml\?"
    ):
        load_recipe("recipes/digit-amd.yaml")
    with pytest.raises(RecipeError, match="recipes/ holds ours"):
        load_recipe("qqqqqq.yaml")


def test_recipes_cannot_be_changed_after_they_were_checked() -> None:
    recipe = parse_recipe(distil())
    with pytest.raises(ValueError, match="frozen"):
        recipe.iterations = 3


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (distil(steps=[1], timesteps=[999, 399]), "timesteps has 2 entries for steps [1]; name one grid"),
        (distil(steps=[2], timesteps=[399, 999]), "timesteps is (399.0, 999.0); give different times, the latest"),
        (distil(steps=[2], timesteps=[399, 399]), "give different times, the latest first"),
        (
            distil(family="pixart"),
            "family: Input should be 'sdxl', 'sd15', 'sd3', 'flux', 'sit' or 'wan' (got 'pixart')",
        ),
    ],
)
def test_a_teachers_family_and_grid_are_checked(tree: dict[str, Any], message: str) -> None:
    assert message in fault(tree)
