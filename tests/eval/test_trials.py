"""Plans, digests, paces and failures of a comparison's runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import DistillRecipe
from distill.objectives.options import Advantage
from eval.errors import EvalError
from eval.trials import (
    Comparison,
    Workshop,
    execute,
    load_comparison,
    make_job,
    pace,
    plan,
    plan_wall_clock,
    recipe_digest,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name their folders from the root of the repository."""
    monkeypatch.chdir(ROOT)


def tree(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "recipe": "recipes/digits-amd.yaml",
        "shared": {"iterations": 20, "steps": [2]},
        "variants": {"DMD2": {"adaptation": None, "sharpening": None}, "AMD": {"adaptation.strength": 0.3}},
        "seeds": [0, 1],
        "scores": [{"suite": "digits", "steps": 2, "samples": 300}],
    } | changes


def comparison(**changes: Any) -> Comparison:
    return Comparison.model_validate(tree(**changes))


def workshop(folder: Path) -> Workshop:
    return Workshop(folder, 1, ROOT / "models")


def test_overrides_are_those_of_the_command_line() -> None:
    jobs = plan(comparison())
    assert [(job.variant, job.seed) for job in jobs] == [("DMD2", 0), ("AMD", 0), ("DMD2", 1), ("AMD", 1)]
    dmd2, amd = jobs[0].recipe, jobs[1].recipe
    assert (dmd2.adaptation, dmd2.sharpening, dmd2.seed, dmd2.iterations, dmd2.steps) == (None, None, 0, 20, (2,))
    assert amd.adaptation is not None and amd.adaptation.strength == 0.3 and amd.sharpening is not None
    assert amd.advantage == dmd2.advantage is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": {}}, "variant is unknown; did you mean 'variants'?"),
        ({"scores": [{"suit": "digits"}]}, "scores.0.suit is unknown; did you mean 'suite'?"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [1, 1]}, "seeds [1, 1] repeat one"),
        ({"shared": {"seed": 3}}, "seed is set for every run by the comparison"),
        ({"variants": {"A": {"output": "x"}}}, "output is set for every run"),
        ({"clocks": ["minutes"]}, "clocks.0: "),
    ],
)
def test_faults_of_the_file_name_the_key_and_the_way_out(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree(**changes)))
    with pytest.raises(EvalError) as caught:
        load_comparison(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"A": {"adaptation.strenght": 0.1}}}, "adaptation.strenght is unknown; did you mean strength?"),
        ({"variants": {"A": {}, "B": {"iterations": 20}}}, "variants 'A' and 'B' resolve to the same recipe"),
        ({"scores": [{"suite": "digits", "steps": 4}]}, "asks for 4 steps, but 'DMD2' learns [2]"),
        ({"scores": [{"suite": "digit"}]}, "suite 'digit' is unknown; did you mean 'digits'?"),
        ({"scores": [{"suite": "digits", "samples": 99999}]}, "--samples is 99999"),
        (
            {"recipe": "recipes/digits-teacher.yaml", "variants": {"A": {}}, "shared": {}},
            "takes a recipe with task distill",
        ),
    ],
)
def test_plans_that_can_say_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EvalError) as caught:
        plan(comparison(**changes))
    assert message in str(caught.value)


def test_digest_follows_what_decides_the_result_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "models/digits-reward", tmp_path / "reward")

    def digest(variant: str = "AMD", **overrides: Any) -> str:
        overrides = {"advantage.reward": str(tmp_path / "reward"), **overrides}
        made = comparison(variants={variant: {"adaptation.strength": 0.3, **overrides}})
        return make_job(made, variant, 0, "iterations").digest

    first = digest()
    assert digest("renamed") == first
    assert digest(**{"student.learning_rate": 1e-3}) != first
    assert (
        make_job(comparison(), "AMD", 1, "iterations").digest != make_job(comparison(), "AMD", 0, "iterations").digest
    )
    copy = tmp_path / "other"
    shutil.copytree(tmp_path / "reward", copy)
    config = copy / "config.json"
    config.write_text(config.read_text() + " ")
    assert digest(**{"advantage.reward": str(copy)}) != first


def test_pace_ignores_warm_up_and_interruptions() -> None:
    """10 ms per iteration; the warm-up is faster, and previews and a busy machine make single intervals slower."""
    recipe = make_job(
        comparison(shared={"iterations": 300, "log_every": 50, "steps": [2]}), "AMD", 0, "iterations"
    ).recipe
    seconds = {50: 0.004, 100: 0.010, 150: 0.010, 200: 0.030, 250: 0.010, 300: 0.012}
    log = [{"iteration": n, "samples_per_second": recipe.batch_size / s} for n, s in seconds.items()]
    assert recipe.fake_warmup == 50
    assert pace(log, recipe) == pytest.approx(0.010)
    assert pace(log[:1], recipe) == pytest.approx(0.004) and pace([], recipe) is None


def test_pace_is_processor_time_where_a_cpu_did_the_work() -> None:
    """10 ms of processor time on a machine that gave a third of it; a GPU's host tells nothing of the GPU."""
    recipe = make_job(
        comparison(shared={"iterations": 120, "log_every": 50, "steps": [2]}), "AMD", 0, "iterations"
    ).recipe
    spent = {50: 0.2, 100: 0.5, 120: 0.2}
    log = [
        {"iteration": n, "samples_per_second": recipe.batch_size / 0.030, "cpu_seconds": s} for n, s in spent.items()
    ]
    assert pace(log, recipe) == pytest.approx(0.010)
    assert pace([line | {"peak_gib": 1.0} for line in log], recipe) == pytest.approx(0.030)


def pretend_finished(shop: Workshop, job: Any, seconds_per_iteration: float) -> None:
    """What a training leaves that comparisons read: run.json, a bundle's folder and the log."""
    home = shop.home(job)
    (home / "bundle").mkdir(parents=True)
    (home / "run.json").write_text(json.dumps({"digest": job.digest, "seconds": {"train": 1.0, "export": 1.0}}))
    log = home / "training" / "student" / "log.jsonl"
    log.parent.mkdir(parents=True)
    line = {"iteration": job.recipe.iterations, "samples_per_second": job.recipe.batch_size / seconds_per_iteration}
    log.write_text(json.dumps(line) + "\n")


def test_wall_clock_gives_each_variant_the_time_of_the_first(tmp_path: Path) -> None:
    made, shop = comparison(variants=tree()["variants"] | {"late": {"guidance": 2.0}}), workshop(tmp_path)
    jobs = plan(made)
    for job in jobs:
        if job.variant != "late":
            pretend_finished(shop, job, {"DMD2": 0.010, "AMD": 0.0125}[job.variant])
    timed = plan_wall_clock(made, jobs, shop)
    assert [(job.variant, job.seed, job.recipe.iterations) for job in timed] == [
        ("DMD2", 0, 20), ("AMD", 0, 16), ("DMD2", 1, 20), ("AMD", 1, 16),
    ]  # fmt: skip
    assert timed[0].digest == jobs[0].digest and timed[1].digest not in {job.digest for job in jobs}
    assert {job.clock for job in timed} == {"wall-clock"}


def test_a_new_option_leaves_finished_runs_finished_while_it_has_its_default() -> None:
    class Later(DistillRecipe):
        option: float = 3.0
        section: Advantage = Advantage(reward="models/digits-reward")

    recipe = plan(comparison())[0].recipe
    tree = recipe.model_dump(mode="json")
    same, other, nested = (
        recipe_digest(Later.model_validate(tree | more))
        for more in ({}, {"option": 4.0}, {"section": {"reward": "models/digits-reward", "group": 8}})
    )
    assert recipe_digest(recipe) == same and len({same, other, nested}) == 3


def test_a_finished_run_is_one_whose_digest_and_bundle_are_there(tmp_path: Path) -> None:
    shop, job = workshop(tmp_path), plan(comparison())[0]
    assert shop.facts(job) == {} and shop.scored(job, comparison().scores[0]) is None
    pretend_finished(shop, job, 0.01)
    assert shop.facts(job)["seconds"] == {"train": 1.0, "export": 1.0}
    shutil.rmtree(shop.home(job) / "bundle")
    assert shop.facts(job) == {}
    (shop.home(job) / "run.json").write_text('{"digest"')
    assert shop.facts(job) == {}


def test_a_run_that_fails_is_reported_with_its_last_words_and_stops_no_other(tmp_path: Path) -> None:
    made = comparison(variants={"A": {"teacher": "nowhere"}, "B": {"teacher": "elsewhere"}}, seeds=[0])
    failures = execute(plan(made), made, workshop(tmp_path), 2, quiet=True)
    assert sorted(failure.run for failure in failures) == ["A, seed 0, 20 iterations", "B, seed 0, 20 iterations"]
    for failure in failures:
        assert failure.stage == "train" and failure.code == 2
        assert "there is no folder" in failure.last_line
        assert Path(failure.log).read_text().strip().endswith(failure.last_line)
