"""Interpreters of their own: a real one, made from a local wheel of a few bytes, and everything that can be wrong."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from eval import env
from eval.errors import EvalError

RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"


def wheel(folder: Path) -> Path:
    """A package leapfrog_probe 1.0 of one line."""
    path = folder / "leapfrog_probe-1.0-py3-none-any.whl"
    info = "leapfrog_probe-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("leapfrog_probe.py", "answer = 42\n")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: leapfrog-probe\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"leapfrog_probe.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(env, "RECIPES", tmp_path / "recipes")
    monkeypatch.setenv("LEAPFROG_ENVIRONMENTS", str(tmp_path / "made"))
    (tmp_path / "recipes").mkdir()
    return tmp_path


def recipe(folder: Path, *requirements: str, python: str = RUNNING) -> None:
    text = {"description": "a probe", "python": python, "requirements": list(requirements)}
    (folder / "recipes" / "probe.yaml").write_text(yaml.safe_dump(text))


def test_an_environment_is_made_used_told_stale_and_removed(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(places, str(wheel(places)))
    assert env.state("probe") == "absent" and not env.remove("probe")
    assert env.main(["create", "probe"]) == 0
    python = env.interpreter("probe")
    code = "import leapfrog_probe, numpy; print(leapfrog_probe.answer, numpy.__file__)"
    told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert told[0] == "42" and told[1].startswith(env._ours())
    with pytest.raises(ImportError):
        __import__("leapfrog_probe")
    recipe(places, "another==1.0")
    assert env.state("probe") == "stale"
    with pytest.raises(EvalError, match=r"probe is stale; run: python -m eval.env create probe"):
        env.interpreter("probe")
    assert env.main(["list"]) == 0 and "stale   probe" in capsys.readouterr().out
    assert env.main(["remove", "probe"]) == 0 and env.state("probe") == "absent"


def test_half_an_environment_is_never_used(places: Path) -> None:
    recipe(places, "x==1")
    (places / "made" / "probe" / "bin").mkdir(parents=True)
    assert env.state("probe") == "broken"
    with pytest.raises(EvalError, match=r"is broken; run: python -m eval.env create probe"):
        env.interpreter("probe")


def test_what_cannot_be_made_says_why(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe(places, "x==1", python="3.9")
    assert env.main(["create", "probe"]) == 3
    assert f"has wheels for Python 3.9 and this is {RUNNING}" in capsys.readouterr().err
    assert env.main(["create", "prob"]) == 3
    assert "did you mean 'probe'" in capsys.readouterr().err
    (places / "recipes" / "probe.yaml").write_text("description: x\npython: '3.11'\nrequirement: [a]\n")
    assert env.main(["create", "probe"]) == 3
    assert "probe.yaml: requirement" in capsys.readouterr().err


def test_the_shipped_recipes_load_and_pin_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "RECIPES", Path(env.__file__).parent / "environments")
    assert "vbench" in env.recipe_names()
    for name in env.recipe_names():
        assert all("==" in requirement for requirement in env.load_recipe(name).requirements)
