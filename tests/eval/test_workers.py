"""Talking with a real process over pipes: handshake, answers, and every way in which a worker can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eval.errors import EvalError
from eval.workers import Worker

PROGRAM = str(Path(__file__).parent / "vbench" / "honest_worker.py")


def start(manner: str) -> Worker:
    return Worker([sys.executable, PROGRAM, manner], "vbench", probe=(0.25, 1e-9))


def test_a_worker_says_what_it_is_and_ends_with_its_input() -> None:
    with start("honest") as worker:
        assert worker.hello["versions"] == {"honest": "1"}
        process = worker._process
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("manner", "message"),
    [
        ("miscalibrated", r"scores its probe 0.5 instead of 0.25"),
        ("stranger", "says it is 'stranger'"),
        ("stillborn", "has ended; the end of its log: no such module"),
    ],
)
def test_a_worker_that_is_not_right_is_not_used(manner: str, message: str) -> None:
    with pytest.raises(EvalError, match=message):
        start(manner)


@pytest.mark.parametrize(
    ("manner", "message"),
    [
        ("mortal", "has ended; the end of its log: out of memory"),
        ("babbling", "which is no JSON"),
        ("refusing", "could not score: RuntimeError: no kernel"),
        ("silent", "said nothing for 0.2 s"),
    ],
)
def test_a_worker_that_fails_is_an_error_with_its_reason(manner: str, message: str) -> None:
    with start(manner) as worker, pytest.raises(EvalError, match=message):
        worker.ask({"do": "score"}, seconds=0.2 if manner == "silent" else 60)


def test_a_program_that_is_not_there_does_not_start() -> None:
    with pytest.raises(EvalError, match="does not start"):
        Worker(["/no/such/python"], "vbench", probe=(0.25, 1e-9))
