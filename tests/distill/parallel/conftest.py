"""Ranks on this machine, and a tiny teacher and reward of the real classes for them to distil."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distill.run import main

ROOT = Path(__file__).parents[3]
Run = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """``ranks(size, function, *arguments)``: what the function of a test file returns on each rank."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # names of machines need not resolve
    command = [sys.executable, str(Path(__file__).with_name("ranks.py"))]
    numbers = count()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin and server.stdout

        def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
            folder = tmp_path_factory.mktemp(f"ranks-{next(numbers)}")
            (folder / "arguments").write_bytes(pickle.dumps(arguments))
            job = {"size": size, "folder": str(folder), "file": function.__code__.co_filename}
            assert server.stdin and server.stdout
            server.stdin.write(json.dumps({**job, "function": function.__name__}) + "\n")
            server.stdin.flush()
            assert json.loads(server.stdout.readline()), "the ranks' parent died"
            results = [folder / f"{rank}.result" for rank in range(size)]
            told = [pickle.loads(path.read_bytes()) if path.is_file() else (False, "ended") for path in results]
            faults = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(told) if not good]
            assert not faults, "\n".join(faults)
            return [result for _, result in told]

        yield run
        server.stdin.close()


@pytest.fixture(scope="session")
def jobs() -> ModuleType:
    """jobs.py beside this file."""
    spec = spec_from_file_location("jobs", Path(__file__).with_name("jobs.py"))
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits-teacher, digits-reward and digits-heldout of another seed, trained for an iteration."""
    folder = tmp_path_factory.mktemp("models")
    small = ["iterations=1", "batch_size=8", "optimizer.warmup=0", "preview_every=100", "save_every=100"]
    narrow = ["model.width=16", "model.layers=2", "model.heads=2", "sampling_steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAPFROG_RUNS", str(folder / "runs"))
        for recipe, name, more in (
            ("digits-teacher", "digits-teacher", narrow),
            ("digits-reward", "digits-reward", []),
            ("digits-reward", "digits-heldout", ["seed=1"]),
        ):
            arguments = [f"name={name}", f"output={folder}/{name}", *small, *more]
            assert main([str(ROOT / f"recipes/{recipe}.yaml"), "--quiet", *arguments]) == 0
    return folder
