"""The service files of the nightly measurement: they parse, agree on the hour, and start a command that exists."""

from __future__ import annotations

import argparse
import configparser
import importlib
import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.config import load_recipe
from eval import nightly

FOLDER = Path(__file__).parents[2] / "docs" / "operations"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(FOLDER / name)
    return parser


def manifests() -> dict[str, Any]:
    documents = yaml.safe_load_all((FOLDER / "nightly.cronjob.yaml").read_text())
    return {document["kind"]: document for document in documents}


def commands() -> dict[str, str]:
    """How each of the four starts a night."""
    pod = manifests()["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    steps = yaml.safe_load((FOLDER / "nightly.github.yaml").read_text())["jobs"]["measure"]["steps"]
    cron = re.search(r"^ +0 2 \* \* \* +(.+)$", (FOLDER / "nightly.md").read_text(), re.MULTILINE)
    assert cron is not None
    return {
        "systemd": unit("nightly.service")["Service"]["ExecStart"],
        "kubernetes": " ".join(pod["command"]),
        "github": next(step["run"] for step in steps if step.get("name") == "measure"),
        "cron": cron[1],
    }


@pytest.mark.parametrize("where", ["systemd", "kubernetes", "github", "cron"])
def test_each_starts_the_nightly_with_options_that_it_has(
    where: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = re.search(r"python -m eval\.nightly((?: --?\S+)*)", commands()[where])
    assert found is not None
    arguments = [*found[1].split(), "--config", str(tmp_path / "none.yaml")]
    assert nightly.main(arguments) == 3  # the options are known, and only the configuration is not there
    assert "none.yaml cannot be read" in capsys.readouterr().err


def test_all_start_at_the_same_hour_before_a_night_counts_as_late() -> None:
    workflow = yaml.safe_load((FOLDER / "nightly.github.yaml").read_text())
    assert workflow[True]["schedule"] == [{"cron": "0 2 * * *"}]  # YAML 1.1 reads "on" as true
    assert manifests()["CronJob"]["spec"]["schedule"] == "0 2 * * *"
    assert unit("nightly.timer")["Timer"]["OnCalendar"] == "*-*-* 02:00:00 UTC"
    assert nightly.load_config(nightly.DEFAULT_CONFIG).expected_by > "02:00"


def test_the_shell_reads_every_command_and_cron_makes_the_folder_of_its_lock() -> None:
    for command in commands().values():
        subprocess.run(["bash", "-n", "-c", command], check=True)
        assert "%" not in command, "cron ends a command there"
    made, locked = (commands()["cron"].index(word) for word in ("mkdir -p runs", "flock -n runs/"))
    assert made < locked


def test_a_regression_is_not_measured_away_and_runs_survive() -> None:
    job = manifests()["CronJob"]["spec"]
    assert job["concurrencyPolicy"] == "Forbid" and job["jobTemplate"]["spec"]["backoffLimit"] == 0
    pod = job["jobTemplate"]["spec"]["template"]["spec"]
    (volume,) = pod["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == manifests()["PersistentVolumeClaim"]["metadata"]["name"]
    assert pod["containers"][0]["volumeMounts"] == [{"name": volume["name"], "mountPath": "/srv/leapfrog/runs"}]
    assert unit("nightly.service")["Service"]["ReadWritePaths"] == "/srv/leapfrog/runs"
    assert "1" not in unit("nightly.service")["Service"]["SuccessExitStatus"].split()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd on this machine")
def test_systemd_accepts_the_timer_and_the_service() -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", *(str(FOLDER / f"nightly.{kind}") for kind in ("timer", "service"))],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "nightly" in line]
    assert all("/srv/leapfrog/.venv/bin/python is not executable" in line for line in complaints), done.stderr


def test_the_page_names_only_commands_that_exist() -> None:
    text = (FOLDER / "nightly.md").read_text()
    for name in set(re.findall(r"python -m eval\.(\w+)", text)):
        assert (Path(nightly.__file__).parent / f"{name}.py").is_file(), name
    for link in set(re.findall(r"\]\(([\w.]+)\)", text)):
        assert (FOLDER / link).is_file(), link


class Parsed(Exception):
    """The real parser took all words."""


OURS = r"-m ((?:eval|distill|benchmarks)(?:\.\w+)+)"
ROOT = FOLDER.parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(FOLDER.glob("*.md")))


def documented() -> list[tuple[str, list[str]]]:
    """Module and words of every command of ours on the pages; docs/design.md states a grammar instead."""
    found = []
    for page in (page for page in PAGES if page.name != "design.md"):
        text = page.read_text().replace("\\\n", " ")
        for module, rest in re.findall(rf"^    .*{OURS}(.*)$", text, re.MULTILINE):
            words = shlex.split(re.sub(r"\[(-.*?)\]", r"\1", rest), comments=True)
            if "…" in words:  # what any run is told
                continue
            found.append((module, list(itertools.takewhile(lambda word: word not in ("&&", ">", ">>"), words))))
        for module, rest in re.findall(rf"`[^`\n]*{OURS}([^`]*)`", text):
            words = shlex.split(rest)
            if len(words) > 1:  # others are named, not to be typed
                found.append((module, words))
    return found


def module_of(name: str) -> str:
    """What -m runs, which must be there."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    return f"{name}.__main__" if spec.submodule_search_locations else name


@pytest.mark.parametrize(("module", "words"), documented())
def test_every_command_on_the_pages_is_understood_by_the_real_parser(
    module: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, kind)

        def parse_and_stop(*given: Any, parse: Any = parse) -> Any:
            raise Parsed(parse(*given))

        monkeypatch.setattr(argparse.ArgumentParser, kind, parse_and_stop)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(module_of(module)).main()
    (options,) = parsed.value.args
    if "recipe" in options and "overrides" in options and options.recipe.startswith("recipes/"):
        load_recipe(ROOT / options.recipe, [word for word in options.overrides if word != "$common"])


def test_every_module_that_the_pages_name_can_be_run() -> None:
    named = {module for page in PAGES for module in re.findall(OURS, page.read_text())}
    assert {"distill.run", "distill.parallel.traffic", "benchmarks.checkpoint", "eval.run"} <= named
    for module in sorted(named):
        assert callable(importlib.import_module(module_of(module)).main), module
