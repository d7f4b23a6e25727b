"""The command: help, dry runs, overrides around flags, and faults that stop before any work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distill.bundle import Bundle
from distill.config import parse_recipe
from distill.rewards import DigitClassifier
from distill.run import TASKS, main

ROOT = Path(__file__).parents[2]
REWARD = str(ROOT / "recipes/digits-reward.yaml")
AMD = str(ROOT / "recipes/digits-amd.yaml")
SHORT = ["iterations=2", "batch_size=8", "save_every=1", "preview_every=100", "optimizer.warmup=0"]


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAPFROG_RUNS", str(tmp_path / "runs"))


def test_help_shows_an_example_and_needs_no_torch() -> None:
    """In a process of its own, in which torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['run', '--help']; import distill.run as r; r.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: python -m distill.run" in done.stdout
    assert "example: python -m distill.run recipes/digits-teacher.yaml iterations=500 seed=1" in done.stdout


def test_every_task_of_a_recipe_has_its_class() -> None:
    from distill import config

    assert TASKS.keys() == config._CLASSES.keys()


def test_dry_run_prints_the_resolved_recipe_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([REWARD, "seed=7", "--dry-run", f"output={tmp_path}/out", "optimizer.clip=2"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    recipe = parse_recipe(tree)
    assert (recipe.seed, recipe.output, recipe.optimizer.clip) == (7, f"{tmp_path}/out", 2.0)
    assert recipe.optimizer.learning_rate == 2e-3 and recipe.temperature == 4.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["seed=3", "iterations=9", "--dry-run", "--quiet"],
        ["--dry-run", "--quiet", "seed=3", "iterations=9"],
        ["seed=3", "--dry-run", "iterations=9", "--quiet"],
    ],
)
def test_overrides_stand_before_and_after_flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([REWARD, *arguments]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert (tree["seed"], tree["iterations"]) == (3, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([REWARD, "iteration=3"], "iteration is unknown; did you mean iterations?"),
        ([REWARD, "iterations=many"], "iterations: Input should be a valid integer"),
        ([REWARD, "iterations"], "override 'iterations' is not key=value"),
        (["recipes/none.yaml"], "there is no recipe 'recipes/none.yaml'"),
        ([AMD, "teacher=nowhere"], "teacher: there is no folder 'nowhere'; train it first"),
        ([AMD, "teacher=.", "advantage.reward=nowhere"], "advantage.reward: there is no folder 'nowhere'"),
        ([AMD, "teacher=.", "advantage.reward=.", "heldout_rewards=[nowhere]"], "heldout_rewards: there is no folder"),
        ([AMD, "teacher=.", "data={prompts: none.txt}"], "data.prompts: there is no file 'none.txt'"),
        ([str(ROOT / "recipes/scenes-reward.yaml"), "clip=nowhere"], "clip: there is no folder 'nowhere'"),
        ([str(ROOT / "recipes/scenes-teacher.yaml"), "model.vae=nowhere"], "model.vae: there is no folder 'nowhere'"),
    ],
)
def test_faults_stop_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_result_without_a_place_is_told_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([REWARD, f"output={tmp_path}/file/out"]) == 2
    assert f"output: {tmp_path}/file is a file; name another folder" in capsys.readouterr().err
    (tmp_path / "runs").touch()
    assert main([REWARD, f"output={tmp_path}/out"]) == 2
    assert f"LEAPFROG_RUNS: {tmp_path}/runs is a file" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else_is_told_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    assert main([REWARD, f"output={tmp_path}/closed/out"]) == 2
    assert f"output: {tmp_path}/closed cannot be written to by this user" in capsys.readouterr().err


def test_a_folder_that_is_no_bundle_is_no_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([AMD, f"teacher={tmp_path}/empty", f"advantage.reward={tmp_path}/empty", f"output={tmp_path}/o"]) == 1
    assert "has neither bundle.json nor model_index.json" in capsys.readouterr().err


def test_a_copy_of_the_training_reward_held_out_stops_before_the_first_iteration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DigitClassifier(8).save(tmp_path / "judge", 0.5)
    shutil.copytree(tmp_path / "judge", tmp_path / "copy")
    rewards = [f"advantage.reward={tmp_path}/judge", f"heldout_rewards=[{tmp_path}/copy]"]
    teacher = f"teacher={ROOT}/models/digits-teacher"
    assert main([AMD, "--quiet", teacher, *rewards, f"output={tmp_path}/out", "iterations=1"]) == 1
    assert f"heldout_rewards: {tmp_path}/copy has the weights of advantage.reward" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "judge"]


def test_a_run_writes_its_result_recipe_and_provenance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([REWARD, "--quiet", f"output={tmp_path}/out", *SHORT]) == 0
    folder = tmp_path / "runs/digits-reward"
    assert f"wrote {tmp_path}/out (logs, previews and checkpoints in {folder})" in capsys.readouterr().out
    assert (tmp_path / "out/model.safetensors").is_file()
    assert parse_recipe(yaml.safe_load((folder / "recipe.yaml").read_text())).iterations == 2
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["recipe"]["iterations"] == 2
    assert provenance["packages"]["torch"] and "revision" in provenance

    # A second run neither overwrites the first nor trains on by itself.
    assert main([REWARD, "--quiet", f"output={tmp_path}/out", *SHORT]) == 1
    assert "holds checkpoints of an earlier run; add --resume, or delete the folder" in capsys.readouterr().err
    assert main([REWARD, "--quiet", "--resume", f"output={tmp_path}/out", *SHORT, "iterations=3"]) == 0
    assert "resuming digits-reward at iteration 2" in capsys.readouterr().out
    assert (folder / "checkpoints/step-0000003").is_dir()


def test_resume_without_a_checkpoint_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that ``make models`` is one command; the torn checkpoint of a crash counts for nothing."""
    (tmp_path / "runs/digits-reward/checkpoints/step-0000001.tmp").mkdir(parents=True)
    assert main([REWARD, "--quiet", "--resume", f"output={tmp_path}/out", *SHORT]) == 0
    assert "resuming" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs/digits-reward/checkpoints/step-0000001.tmp").mkdir(parents=True)
    assert main([REWARD, "--quiet", f"output={tmp_path}/out", *SHORT]) == 0


def test_altered_checkpoints_are_passed_over_and_stop_the_command_if_none_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [REWARD, "--quiet", "--resume", f"output={tmp_path}/out", *SHORT, "save_every=1"]
    main(arguments)
    states = [tmp_path / f"runs/digits-reward/checkpoints/step-000000{n}/state.safetensors" for n in (2, 1)]
    states[0].write_bytes(states[0].read_bytes()[:-1])
    assert main(arguments) == 0
    assert "resuming digits-reward at iteration 1" in capsys.readouterr().out
    assert f"{states[0]} was altered or truncated; going on with the one before it" in caplog.text
    for state in states:
        state.write_bytes(state.read_bytes()[:-1])
    assert main(arguments) == 1
    assert "state.safetensors was altered or truncated; delete" in capsys.readouterr().err


def test_teacher_is_a_bundle_that_says_how_it_was_made(tmp_path: Path) -> None:
    overrides = ["model.width=16", "model.layers=1", "model.heads=2", "sampling_steps=3", "guidance=2.5"]
    recipe = str(ROOT / "recipes/digits-teacher.yaml")
    assert main([recipe, "--quiet", f"output={tmp_path}/teacher", *SHORT, *overrides]) == 0
    manifest = Bundle.open(tmp_path / "teacher").manifest
    assert (manifest.family, manifest.task, manifest.prediction) == ("sit", "class-to-image", "flow")
    assert manifest.guidance.scale == 2.5 and manifest.default_steps == 3
    assert manifest.provenance["recipe"]["sampling_steps"] == 3
    assert manifest.max_tokens is None


def torchrun(tmp_path: Path, *arguments: str) -> str:
    """What two ranks of SDXL's rehearsal say on stdout, started as docs/recipes.md starts them."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    recipe = ["recipes/sdxl-amd-4step.yaml", "--shrink", "--quiet", f"output={tmp_path}/out", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # names of machines need not resolve
    done = subprocess.run(
        [*ranks, "-m", "distill.run", *recipe],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_torchrun_trains_resumes_and_says_it_once(tmp_path: Path) -> None:
    run = tmp_path / "runs/sdxl-amd-4step-shrunk"
    wrote = f"wrote {tmp_path}/out-shrunk (logs, previews and checkpoints in {run})\n"
    assert torchrun(tmp_path, "iterations=2", "log_every=1") == wrote
    resumed = f"resuming sdxl-amd-4step-shrunk at iteration 2\n{wrote}"
    assert torchrun(tmp_path, "--resume", "iterations=3", "log_every=1") == resumed
    for step in (2, 3):
        shards = list((run / f"checkpoints/step-000000{step}").glob("shard-*.safetensors"))
        assert len(shards) == 2 and all(shard.stat().st_size > 10_000 for shard in shards)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert sorted(Bundle.open(tmp_path / "out-shrunk").manifest.samplers) == [4]
