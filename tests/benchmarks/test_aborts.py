"""Clients that leave in every way cost no place and no picture; the benchmark tells if they do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import aborts
from benchmarks.aborts import WAYS, main


def arguments(bundle: Path, folder: Path, port: int) -> list[str]:
    counts = ["--aborts", "60", "--after", "8", "--threads", "1"]
    return [str(bundle), *counts, "--port", str(port), "--out", str(folder / "aborts.json")]


def test_clients_that_leave_cost_nothing(tiny_bundle: Path, tmp_path: Path, unused_tcp_port: int) -> None:
    assert main(arguments(tiny_bundle, tmp_path, unused_tcp_port)) == 0
    found = json.loads((tmp_path / "aborts.json").read_text())
    assert (found["places_lost"], found["wrong_afterwards"], found["asked_afterwards"]) == (0, 0, 8)
    assert sum(found["left"].values()) == 60 and set(found["left"]) == set(WAYS)


def test_a_wrong_picture_is_told(
    tiny_bundle: Path, tmp_path: Path, unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bare runtime draws another prompt here, so that no picture can agree."""
    draw = aborts.generate

    def other(runtime, manifest, prompts, seeds, steps):  # type: ignore[no-untyped-def]
        return draw(runtime, manifest, ["a large metal cylinder"], seeds, steps)

    monkeypatch.setattr(aborts, "generate", other)
    monkeypatch.setattr(aborts, "WAYS", WAYS[:1])
    assert main(arguments(tiny_bundle, tmp_path, unused_tcp_port)) == 1
    assert json.loads((tmp_path / "aborts.json").read_text())["wrong_afterwards"] == 8


@pytest.fixture
def unused_tcp_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
