"""The measurement of checkpoints runs, and its state is as large as asked."""

from __future__ import annotations

import json

import pytest

from benchmarks.checkpoint import main, state


def test_a_state_has_the_size_asked_for() -> None:
    tensors = state(20.0)
    assert sum(t.nbytes for t in tensors.values()) == 20 * 2**20 and len(tensors) == 2


def test_copying_is_a_part_of_writing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mib", "0.01", "--repeat", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["mib"] == 0.01 and 0 < told["beside_s"] <= told["written_s"]
