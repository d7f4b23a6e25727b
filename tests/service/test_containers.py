"""The images, without Docker: both Dockerfiles are executed, ours and the one that BentoML makes of a bento, and serve.

What a machine without root cannot do is skipped. Packages are not fetched but laid from this environment, exactly those
that the image's requirements need, in the versions of constraints.txt; with FETCH=1 ours runs pip as it is written,
which takes a minute or more.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from distill.bundle import Bundle
from service.encode import encode
from service.runtimes import OnnxRuntime, generate
from tests.service.containers import REPOSITORY, SITE, Stage, build, closure, lay, pins, usable, wanted

DOCKERFILE = REPOSITORY / "docs" / "operations" / "service.Dockerfile"
FETCH = bool(os.environ.get("FETCH"))
PICTURE = {"model": "scenes-sdxl", "prompt": "a large red metal cube", "seed": 7, "steps": 2}
KEY = "KEY"
DRIVER = """
import base64, json, signal, subprocess, sys, time, urllib.request
told = json.loads(sys.argv[1])
def ask(path, body=None):
    headers = {"authorization": "Bearer " + told["key"], "content-type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request("http://127.0.0.1:3000" + path, data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.status, answer.read().decode()
server = subprocess.Popen(told["command"], stdout=sys.stderr)
end = time.monotonic() + 240
while subprocess.run(told["probe"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode:
    assert server.poll() is None and time.monotonic() < end, "it does not become ready"
    time.sleep(0.5)
found = {path: ask(path)[0] for path in ("/livez", "/readyz")}
found["models"] = json.loads(ask("/v1/models")[1])["data"]
found["picture"] = json.loads(ask("/v1/images/generations", told["picture"])[1])
found["files"] = subprocess.run(["find", "/data", "-type", "f"], capture_output=True, text=True).stdout.split()
server.send_signal(signal.SIGTERM)
found["code"] = server.wait(60)
print(json.dumps(found))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if reason := usable(tmp_path / "tried"):
        pytest.skip(reason)
    return tmp_path


@pytest.fixture(scope="module")
def expected() -> bytes:
    """The picture, drawn here and without a server."""
    runtime = OnnxRuntime(Bundle.open(REPOSITORY / "bundles" / "scenes-sdxl"), threads=1, max_batch=1)
    prompt, seed, steps = str(PICTURE["prompt"]), int(str(PICTURE["seed"])), int(str(PICTURE["steps"]))
    return encode(generate(runtime, runtime.manifest, [prompt], [seed], steps=steps)[0], "png")


def served(stage: Stage, command: list[str], probe: list[str]) -> dict[str, Any]:
    """What the container of a stage answers, alone on its network, as its own user."""
    told = {"command": command, "probe": probe, "picture": PICTURE, "key": KEY}
    given = {"LEAPFROG_API_KEYS": KEY, "LEAPFROG_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = stage.run(["python", "-c", DRIVER, json.dumps(told)], given, alone=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_serves(found: dict[str, Any], expected: bytes) -> None:
    assert (found["/livez"], found["/readyz"], found["code"]) == (200, 200, 0)
    assert {model["id"] for model in found["models"]} == {"scenes-sdxl", "scenes-wan"}
    assert base64.b64decode(found["picture"]["data"][0]["b64_json"]) == expected


def pod() -> dict[str, Any]:
    every = yaml.safe_load_all((DOCKERFILE.parent / "service.kubernetes.yaml").read_text())
    deployment = next(document for document in every if document["kind"] == "Deployment")
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return found


def in_pip() -> dict[str, str]:
    """How this machine reaches its package index."""
    kept = {k: v for k, v in os.environ.items() if re.match(r"PIP_|SSL_|REQUESTS_|https?_proxy|no_proxy", k, re.I)}
    return kept if FETCH else kept | {"PIP_NO_DEPS": "1"}


def ours(stage: Stage) -> Distribution:
    """The installed package of a stage, as pip has built it in there."""
    [info] = (stage.at("/opt/leapfrog") / SITE).glob("leapfrog-*.dist-info")
    return Distribution.at(info)


@pytest.mark.slow
def test_the_dockerfile_builds_an_image_that_serves(folder: Path, expected: bytes) -> None:
    text = DOCKERFILE.read_text()
    ignored = DOCKERFILE.with_name(DOCKERFILE.name + ".dockerignore").read_text().splitlines()
    try:
        image = build(text, REPOSITORY, folder, ignored=ignored, env=in_pip())
    except AssertionError as error:
        if "No matching distribution" in str(error):
            pytest.skip("pip reaches no package index")
        raise
    extras = re.search(r"'\.\[([\w,]+)\]'", text)
    assert extras is not None
    needs = closure(need for extra in ("", *extras[1].split(",")) for need in wanted(ours(image), extra))
    known = pins()
    assert {name: p.version for name, p in needs.items() if p.version != known.get(name, p.version)} == {}
    assert not needs.keys() & {"torch", "diffusers", "transformers"}
    if not FETCH:
        lay(needs.values(), image, "/opt/leapfrog")
    args = [str(word) for word in pod()["containers"][0]["args"]]
    assert args == image.said["CMD"]
    assert image.account()[0] == pod()["securityContext"]["runAsUser"]
    found = served(image, image.said["ENTRYPOINT"] + args, image.said["HEALTHCHECK"])
    assert_serves(found, expected)
    assert found["files"], "what it keeps does not lie in the volume"


@pytest.fixture(scope="module")
def bento(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``bentoml containerize`` sends to Docker: the bento, with the Dockerfile rendered anew."""
    home = tmp_path_factory.mktemp("bento")
    code = (
        "import bentoml, shutil, sys\n"
        "from bentoml._internal.container import construct_containerfile\n"
        "bento = bentoml.bentos.build_bentofile(build_ctx='.')\n"
        "with construct_containerfile(bento) as (context, file):\n"
        "    shutil.copytree(context, sys.argv[1])\n"
    )
    environment = os.environ | {"BENTOML_HOME": str(home)}
    command = [sys.executable, "-c", code, str(home / "context")]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=300, capture_output=True)
    return home / "context"


def required(bento: Path) -> list[Requirement]:
    lines = (bento / "env" / "python" / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines]


@pytest.mark.slow
def test_a_bento_needs_what_the_extras_need(bento: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needs = closure(map(Requirement, (*project["dependencies"], *extras["serve"], *extras["tracing"])))
    found = closure(required(bento))
    assert {name: package.version for name, package in found.items()} == {
        name: package.version for name, package in needs.items()
    }


@pytest.mark.slow
def test_the_image_of_a_bento_serves(folder: Path, bento: Path, expected: bytes) -> None:
    """Executed as BentoML has written it, but for apt-get, whose packages nothing of ours needs, and for uv."""
    environment = "/app/.venv"

    def make(stage: Stage) -> None:
        stage.run(["python", "-m", "venv", "--without-pip", environment])

    def install(stage: Stage) -> None:
        lay(closure(required(bento)).values(), stage, environment)

    nothing = lambda stage: None  # noqa: E731
    instead = {"apt-get install": nothing, "pip install uv": nothing, "uv venv": make, "pip install -r": install}
    image = build((bento / "env" / "docker" / "Dockerfile").read_text(), bento, folder, instead=instead)
    assert image.account()[0] == pod()["securityContext"]["runAsUser"]
    args = [str(word) for word in pod()["containers"][0]["args"]]
    probe = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:3000/readyz')"
    found = served(image, image.said["ENTRYPOINT"] + args, ["python", "-c", probe])
    assert_serves(found, expected)
