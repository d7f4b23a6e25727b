"""The command: dry runs, faults, tables of finished runs, and two real variants end to end on digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from eval.compare import collect, main, write
from eval.contrast import difference_of
from eval.metrics.base import Score
from eval.prompts import build_prompts, load_suite
from eval.run import RunInfo
from eval.statistics import bootstrap_mean
from eval.store import Store
from eval.trials import Comparison, Failure, Job, Workshop, plan

ROOT = Path(__file__).parents[2]
TREE: dict[str, Any] = {
    "name": "tiny",
    "description": "Two variants.",
    "recipe": "recipes/digits-amd.yaml",
    "shared": {
        "iterations": 2, "batch_size": 8, "fake_warmup": 0, "fake_per_student": 2, "log_every": 1, "steps": [1],
    },
    "variants": {"DMD2": {"adaptation": None, "sharpening": None}, "AMD": {"adaptation.strength": 0.5}},
    "seeds": [0, 1],
    "scores": [{"suite": "digits", "steps": 1, "samples": 300}],
    "telemetry": ["reward"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name their folders from the root of the repository."""
    monkeypatch.chdir(ROOT)


def file_of(folder: Path, **changes: Any) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TREE | changes, sort_keys=False))
    return str(path)


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m eval.compare comparisons/digits-objectives.yaml --jobs 2" in capsys.readouterr().out


def test_dry_run_lists_every_run_and_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([file_of(tmp_path), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(": to train" in line for line in lines) == 4
    assert "AMD, seed 1, 2 iterations: to train" in lines[3]
    assert lines[4] == "4 runs of 2 variants and 2 seeds" and not (tmp_path / "out").exists()


def test_known_paces_make_runs_of_equal_wall_clock_without_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A variant whose iteration takes as long, within 5 %, keeps its iterations."""
    shared, variants = TREE["shared"] | {"iterations": 10}, TREE["variants"] | {"slow": {"adaptation.strength": 0.9}}
    paces = {"DMD2": 100, "AMD": 104, "slow": 200}
    path = file_of(tmp_path, shared=shared, variants=variants, clocks=["wall-clock"], paces=paces)
    assert main([path, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    planned = dict(line.split("  ")[1].split(", seed 0, ") for line in out.splitlines() if ", seed 0, " in line)
    assert {name: words.split(" ")[0] for name, words in planned.items()} == {"DMD2": "10", "AMD": "10", "slow": "5"}
    assert "then, at equal wall-clock" not in out


def test_every_comparison_of_ours_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    """Recipes, overrides, suites and steps fit; folders may be missing until their recipes have run."""
    paths = sorted((ROOT / "comparisons").glob("*.yaml"))
    assert paths
    for path in paths:
        assert main([str(path), "--dry-run"]) == 0, path
        out = capsys.readouterr().out
        assert "to train" in out or "finished" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": {}}, "variant is unknown; did you mean 'variants'?"),
        ({"variants": {"A": {"guidence": 2}}}, "guidence is unknown; did you mean guidance?"),
        ({"paces": {"DMD2": 100.0}}, "paces and variants differ in ['AMD']; give a pace for every variant, or none"),
    ],
)
def test_faults_end_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert main([file_of(tmp_path, **changes), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_earlier_start_is_kept_unless_resume_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "tiny" / "runs").mkdir(parents=True)
    assert main([file_of(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "add --resume, or delete the folder" in capsys.readouterr().err


# --- tables of finished runs ---------------------------------------------------------------------------------------


def keep(shop: Workshop, job: Job, values: np.ndarray, reward: float, classifier: str = "a") -> None:
    """What a training and a scoring leave: run.json, a bundle's folder, the log, and a complete run in the store."""
    home = shop.home(job)
    (home / "bundle").mkdir(parents=True)
    (home / "run.json").write_text(json.dumps({"digest": job.digest, "seconds": {"train": 4.0, "export": 1.0}}))
    log = home / "training" / "student" / "log.jsonl"
    log.parent.mkdir(parents=True)
    lines = [{"iteration": n, "samples_per_second": 80.0, "reward": reward - 2 + n} for n in (1, 2)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    suite = load_suite("digits")
    prompts = build_prompts(suite, 300)
    score = Score("digit-accuracy", bootstrap_mean(values), 300, "higher", "%", 200, {"classifier": classifier}, values)
    others = [
        Score(name, bootstrap_mean(values), 300, "lower", "", 200, {}, values - values.mean(), "influence")
        for name in suite.metrics
        if name != "digit-accuracy"
    ]
    source = {"name": "s", "identity": {"steps": 1, "runtime": "onnx", "precision": "float32"}, "about": {}}
    info = RunInfo(job.digest, "", suite.name, suite.model_dump(mode="json"), "digits", source, {}, {}, "r", False, 300)
    with Store(shop.store) as store:
        store.complete(store.begin(info), prompts, [score, *others])


def test_finished_runs_become_a_table_paired_by_seed_and_prompt(tmp_path: Path) -> None:
    """AMD is 2 points better in every seed and prompt, while seeds and prompts differ by much more."""
    made, shop, rng = Comparison.model_validate(TREE), Workshop(tmp_path, 1, ROOT / "models"), np.random.default_rng(0)
    jobs, prompts = plan(made), rng.normal(50, 10, 300)
    for job in jobs:
        values = prompts + 5 * job.seed + 2 * (job.variant == "AMD") + rng.normal(0, 0.1, 300)
        keep(shop, job, values, reward=float(job.seed))
    accuracy, fid, kid, *_, reward = collect(made, jobs, shop)
    found = difference_of(accuracy, "AMD", "DMD2")
    assert found is not None and found.value == pytest.approx(2, abs=0.03) and 0 < found.low < 2 < found.high < 3
    assert (fid.better, kid.better, accuracy.better) == (-1, -1, 1)
    # A statistic that is no mean keeps its own value whatever its influences are.
    assert fid.runs["AMD"][0].mean() == pytest.approx(accuracy.runs["AMD"][0].mean())
    assert {seed: float(array[0]) for seed, array in reward.runs["AMD"].items()} == {0: 0.0, 1: 1.0}

    failure = Failure("AMD, seed 2", "train", 1, "x.log", "out of luck")
    files = write(made, [jobs], shop, [failure])
    assert [path.name for path in files] == ["table.md", "table.json", "figure.png"]
    text = files[0].read_text()
    assert "| AMD | **+2.0" in text and "failed: AMD, seed 2: train ended with 1: out of luck" in text
    assert "| AMD | iterations | 2 of 2 | 2 | 100.0 | 4 |" in text
    tree = json.loads(files[1].read_text())
    assert tree["measures"][0]["variants"]["AMD"]["difference"]["n"] == 2
    assert tree["failures"][0]["stage"] == "train" and len(tree["runs"]) == 4
    assert tree["comparison"]["variants"]["AMD"] == {"adaptation.strength": 0.5}


def test_scores_of_different_judges_are_not_compared(tmp_path: Path) -> None:
    made, shop = Comparison.model_validate(TREE), Workshop(tmp_path, 1, ROOT / "models")
    for number, job in enumerate(jobs := plan(made)):
        keep(shop, job, np.linspace(0, 1, 300), 0.0, classifier=str(number % 2))
    with pytest.raises(Exception, match="digit-accuracy was measured in 2 ways"):
        collect(made, jobs, shop)


def test_scores_of_another_runtime_or_number_of_steps_do_not_count(tmp_path: Path) -> None:
    made, shop = Comparison.model_validate(TREE), Workshop(tmp_path, 1, ROOT / "models")
    (job, *_), (score,) = plan(made), made.scores
    keep(shop, job, np.linspace(0, 1, 300), 0.0)
    asked = {"runtime": "onnx"}, {"runtime": "openvino"}, {"precision": "bfloat16"}, {"steps": 2}, {"samples": 200}
    found = [shop.scored(job, score.model_copy(update=change)) is not None for change in ({}, *asked)]
    assert found == [True, True, False, False, False, False]


# --- for real ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_variants_are_trained_scored_and_resumed_and_a_failure_loses_neither(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = TREE["variants"] | {"broken": {"teacher": "nowhere"}}
    places = ["--out", str(tmp_path / "out"), "--quiet"]
    arguments = [file_of(tmp_path, variants=variants, seeds=[3]), *places, "--jobs", "2"]
    assert main(arguments) == 1
    out = tmp_path / "out" / "tiny"
    assert "broken, seed 3, 2 iterations: train ended with 2: teacher: there is no folder" in capsys.readouterr().err
    first = json.loads((out / "table.json").read_text())
    assert [failure["run"] for failure in first["failures"]] == ["broken, seed 3, 2 iterations"], first["failures"]
    accuracy = first["measures"][0]["variants"]
    assert accuracy["AMD"]["seeds"].keys() == {"3"} and accuracy["broken"]["seeds"] == {}
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/run.json")}
    assert len(stamps) == 2 and not list(out.glob("runs/*/training/student/checkpoints"))

    assert main([file_of(tmp_path, seeds=[3]), *places, "--resume"]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("runs/*/run.json")}
    again = json.loads((out / "table.json").read_text())
    assert again["measures"][0]["variants"]["AMD"] == accuracy["AMD"] and again["failures"] == []
