"""The files for running the service: they parse, and every metric, probe and setting that they name exists."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from service import metrics
from service.edge import OPEN_PATHS
from service.settings import PREFIX, Settings

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "docs" / "operations"
FILES = ("service.md", "service.alerts.yaml", "service.grafana.json", "service.kubernetes.yaml")


def samples() -> set[str]:
    """Names under which Prometheus knows our metrics."""
    found = set()
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            family = next(iter(metric.describe()))
            ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("", "_bucket", "_sum", "_count")}
            found |= {family.name + end for end in ends[family.type]}
    return found


def labels() -> dict[str, set[str]]:
    """Labels of each family."""
    every = [m for m in vars(metrics).values() if isinstance(m, Counter | Gauge | Histogram)]
    return {next(iter(metric.describe())).name: set(metric._labelnames) for metric in every}


def expressions() -> Iterator[str]:
    rules = yaml.safe_load((FOLDER / "service.alerts.yaml").read_text())
    yield from (rule["expr"] for group in rules["groups"] for rule in group["rules"])
    board = json.loads((FOLDER / "service.grafana.json").read_text())
    yield from (target["expr"] for panel in board["panels"] for target in panel["targets"])


def documents() -> dict[str, Any]:
    every = yaml.safe_load_all((FOLDER / "service.kubernetes.yaml").read_text())
    return {document["kind"]: document for document in every}


@pytest.mark.parametrize("name", FILES)
def test_every_metric_and_setting_that_is_named_exists(name: str) -> None:
    text = (FOLDER / name).read_text()
    named = set(re.findall(r"\bleapfrog_[a-z_]+\b", text))
    assert named and named <= samples()
    settings = {key.lower() for key in re.findall(rf"\b{PREFIX}([A-Z_]+)\b", text)}
    assert settings <= set(Settings.model_fields)


def test_the_board_draws_every_metric() -> None:
    text = (FOLDER / "service.grafana.json").read_text()
    drawn = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in re.findall(r"\bleapfrog_[a-z_]+\b", text)}
    assert drawn == set(labels())


def test_the_image_is_made_of_what_there_is_and_runs_without_rights() -> None:
    text = (FOLDER / "service.Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    said = {word: [rest for found, rest in lines if found == word] for word, _ in lines}
    copied = [source for rest in said["COPY"] if "--from" not in rest for source in rest.split()[:-1]]
    ignored = (FOLDER / "service.Dockerfile.dockerignore").read_text().splitlines()
    assert copied and all((REPOSITORY / source).exists() and f"!{source}" in ignored for source in copied)
    given = dict(re.findall(r"(\w+)=(\S+)", said["ENV"][-1]))
    Settings.from_env(given)
    assert (
        said["USER"] == ["leapfrog"]
        and f"--uid {documents()['Deployment']['spec']['template']['spec']['securityContext']['runAsUser']} " in text
    )
    [container] = documents()["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert json.loads(said["ENTRYPOINT"][0]) == ["bentoml"], "as in the image of a bento, so that a pod's args fit both"
    assert json.loads(said["CMD"][0]) == container["args"] and container["args"][0] == "serve"
    assert f"bentofile.yaml {said['WORKDIR'][-1]}/" in said["COPY"]
    assert said["EXPOSE"] == ["3000"] and "0.0.0.0" in said["CMD"][0]
    [probe] = re.findall(r"127\.0\.0\.1:3000(/\w+)", said["HEALTHCHECK"][0])
    assert probe in OPEN_PATHS
    extras = re.search(r"'\.\[([\w,]+)\]'", text)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert extras is not None and "serve" in extras[1].split(",")
    needs = [need for extra in extras[1].split(",") for need in project["optional-dependencies"][extra]]
    assert needs and not any("torch" in need for need in needs)


def test_expressions_use_labels_that_their_metrics_have() -> None:
    known = labels()
    checked = 0
    for expression in expressions():
        for name, matchers in re.findall(r"(leapfrog_[a-z_]+)\{([^}]*)\}", expression):
            family = re.sub(r"_(total|bucket|sum|count)$", "", name)
            assert set(re.findall(r"(\w+)=", matchers)) <= known[family], expression
            checked += 1
        families = {re.sub(r"_(total|bucket|sum|count)$", "", n) for n in re.findall(r"leapfrog_[a-z_]+", expression)}
        grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for label in by.split(",")}
        assert grouped - {"le"} <= set().union(*(known[family] for family in families)), expression
    assert checked > 10


def test_outcomes_that_alerts_wait_for_can_happen() -> None:
    asked = {o for e in expressions() for group in re.findall(r'outcome=~?"([^"]+)"', e) for o in group.split("|")}
    assert asked and asked <= set(metrics.OUTCOMES)


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    board = json.loads((FOLDER / "service.grafana.json").read_text())
    places: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places and at["x"] + at["w"] <= 24
        places |= cells
        assert panel["title"] and panel["description"].endswith(".")
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_pods_are_probed_where_no_key_is_needed() -> None:
    """A probe that met the API keys would restart the pod for ever."""
    pod = documents()["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    probes = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/livez"}
    assert set(probes.values()) <= OPEN_PATHS
    longest = Settings.model_fields["max_queue_s"].default
    assert pod["terminationGracePeriodSeconds"] > longest, "queued work is finished before the pod is killed"
    given = {entry["name"]: entry.get("value", "a-key") for entry in container["env"]}
    Settings.from_env(given)
