"""Checkpoints in the background hold the state of their moment, one at a time, and their faults are heard."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distill.parallel import checkpoint, saver
from distill.parallel.saver import Saver
from distill.parallel.world import World
from distill.trainer import Phase, TrainingError

PATIENCE = 60.0
"""Seconds after which a test that waits has failed."""


class Gate:
    """Holds the thread that describes files until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.opened, described = threading.Event(), checkpoint._described

        def held(path: Path) -> dict[str, Any]:
            if not self.opened.wait(PATIENCE):
                raise OSError("nothing went on meanwhile")
            return described(path)

        if monkeypatch:
            monkeypatch.setattr(checkpoint, "_described", held)
        else:
            checkpoint._described = held


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def read(folder: Path, name: str, shape: tuple[int, ...], world: World) -> torch.Tensor:
    blank = {name: torch.zeros(shape)}
    checkpoint.read(checkpoint.newest(folder, world)[0], blank, world)
    return blank[name]


def test_what_is_written_is_the_state_when_saving_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, weight = Gate(monkeypatch), torch.ones(4)
    with Saver(World()) as writer:
        writer.start(tmp_path, 1, {"w": weight}, {}, keep=2)
        weight += 1
        assert not checkpoint.saved(tmp_path) and not writer.failed
        gate.opened.set()
        assert writer.wait() == tmp_path / "checkpoints/step-0000001"
    assert read(tmp_path, "w", (4,), World()).tolist() == [1.0] * 4


def test_the_next_one_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is let go by the very warning."""
    gate, heard = Gate(monkeypatch), list[str]()
    monkeypatch.setattr(saver, "LONG", 0.0)

    class Opens(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())
            gate.opened.set()

    handler = Opens()
    saver.log.addHandler(handler)
    try:
        with Saver(World()) as writer:
            writer.start(tmp_path, 1, {"w": torch.ones(1)}, {}, keep=2)
            writer.start(tmp_path, 2, {"w": torch.ones(1)}, {}, keep=2)
            assert checkpoint.saved(tmp_path)[0].name == "step-0000001"
    finally:
        saver.log.removeHandler(handler)
    assert heard[0] == "training waits for checkpoint-1; raise save_every or use a faster disk"
    assert [p.name for p in checkpoint.saved(tmp_path)] == ["step-0000001", "step-0000002"]


def test_a_fault_is_raised_once_and_the_older_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Saver(World())
    writer.start(tmp_path, 1, {"w": torch.ones(1)}, {}, keep=2)
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", full)
        writer.start(tmp_path, 2, {"w": torch.ones(1)}, {}, keep=2)
        with pytest.raises(checkpoint.CheckpointError, match=r"step-0000002 could not be written .*-0000001\. Make"):
            writer.wait()
    assert not writer.failed
    writer.wait()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"]


def test_what_ended_a_run_is_not_hidden_by_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpoint, "_sync", full)

    def run(state: dict[str, torch.Tensor], name: str) -> None:
        with Saver(World()) as writer:
            writer.start(tmp_path, 1, state, {}, keep=2)
            state[name]

    with pytest.raises(KeyError, match="unknown"):
        run({"w": torch.ones(1)}, "unknown")
    assert "No space left" in caplog.text
    with pytest.raises(checkpoint.CheckpointError, match="No space left"):
        run({"w": torch.ones(1)}, "w")


def test_training_goes_on_while_a_checkpoint_is_written(
    jobs: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is complete only after the iteration behind it; the run and what it left are those of a patient one."""
    small = ["accumulate=1", "batch_size=4", "save_every=2"]
    patient = jobs.trainer(str(models), str(tmp_path / "patient"), small)
    assert patient.run()
    gate, made = Gate(monkeypatch), jobs.trainer(str(models), str(tmp_path / "run"), small)
    phases = made.task.phases

    def opening(iteration: int) -> list[Phase]:
        if iteration == 2:
            assert not checkpoint.saved(made.folder)  # of the two that are done
            gate.opened.set()
        return list(phases(iteration))

    made.task.phases = opening
    assert made.run()
    assert [p.name for p in checkpoint.saved(made.folder)] == ["step-0000002", "step-0000003"]
    state, expected = made._tensors(), patient._tensors()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_a_full_disk_is_heard_at_the_next_iteration(
    jobs: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = jobs.trainer(str(models), str(tmp_path), ["accumulate=1", "batch_size=4", "iterations=9", "save_every=2"])
    phases = made.task.phases

    def filling(iteration: int) -> list[Phase]:
        if iteration == 3:
            made.saver.wait()
            monkeypatch.setattr(checkpoint, "_sync", full)
        if iteration == 4:  # the checkpoint of 4 iterations is being written
            made.saver._thread.join()
        return list(phases(iteration))

    made.task.phases = filling
    with pytest.raises(TrainingError, match=r"step-0000004 could not be written \(.*No space.*-0000002\. Make room"):
        made.run()
    assert made.iteration == 5
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]


def test_ranks_talk_while_their_threads_agree_and_each_writes_its_share(ranks: Any, tmp_path: Path) -> None:
    told = ranks(2, talking, str(tmp_path))
    assert told == [[0, 1], [0, 1]]
    shards = [p.stat().st_size for p in (tmp_path / "checkpoints/step-0000001").glob("shard-*")]
    assert len(shards) == 2 and max(shards) < 2 * 4 * 1000
    for name, value in (("a", 1.0), ("b", 2.0)):
        assert read(tmp_path, name, (1000,), World()).tolist() == [value] * 1000


def talking(folder: str) -> list[int]:
    gate, world = Gate(), World(dist.get_rank(), dist.get_world_size())
    with Saver(world) as writer:
        state = {"a": torch.full((1000,), 1.0), "b": torch.full((1000,), 2.0)}
        writer.start(Path(folder), 1, state, {}, keep=1)
        heard = world.gather(world.rank)
        gate.opened.set()
    return heard
