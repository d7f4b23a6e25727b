"""Checkpoints that are whole or do not count, and that any number of ranks can read.

    checkpoints/step-0000500/   state.safetensors, or one shard-*.safetensors per rank   tensors by name
                                state.json                                               iteration, task, name, recipe
                                COMPLETE                                                 bytes and sha256 of each file

Everything is written under step-N.tmp, synced to disk, described in COMPLETE, and renamed: a reader sees all of it or
nothing. distill.parallel.saver does so while training goes on. Ranks write and read through
torch.distributed.checkpoint, whose safetensors storage knows the offsets of each shard; the file of one process is the
special case of one shard. Ranks on several machines need a common file system.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from distill.bundle import sha256
from distill.parallel.world import World

log = logging.getLogger(__name__)
COMPLETE, FACTS = "COMPLETE", "state.json"
T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message names what is left."""


def saved(folder: Path) -> list[Path]:
    """Checkpoints under a run's folder by iteration; whether they are whole is for ``damage`` to say."""
    return sorted(p for p in (folder / "checkpoints").glob("step-*") if not p.suffix)


def write(
    folder: Path, iteration: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], world: World, *, keep: int
) -> Path:
    """Write checkpoints/step-N under a run's folder from all ranks, then delete all but ``keep`` up to N.

    tensors: on the CPU, what this rank writes (distill.parallel.snapshot): each whole tensor on one rank, each shard on
    one. world: the ranks in the group of the calling thread. Raises CheckpointError if any rank fails, and leaves older
    checkpoints as they are.
    """
    final = folder / "checkpoints" / f"step-{iteration:07d}"
    temporary = final.with_suffix(".tmp")

    def prepare() -> None:
        if world.leader:
            for left in final.parent.glob("step-*.tmp"):  # of runs that were killed while they wrote
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir(parents=True)

    def finish() -> None:
        if world.leader:
            _finish(temporary, final, {k: v for part in described for k, v in part.items()}, facts)
            for old in [p for p in saved(folder) if p <= final][:-keep]:  # newer ones are damaged: passed over
                shutil.rmtree(old, ignore_errors=True)

    _together(prepare, final, world)
    _together(lambda: _write_tensors(temporary, tensors, world), final, world)
    described = _together(lambda: {p.name: _described(p) for p in _mine(temporary, world)}, final, world)
    facts = {"iteration": iteration, **facts}
    _together(finish, final, world)
    return final


def newest(folder: Path, world: World) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint of a run and its facts; newer ones that are damaged are passed over, and said so.

    Raises CheckpointError if there is none.
    """
    candidates, fault = saved(folder), ""
    for checkpoint in reversed(candidates):
        found = [text for text in world.gather(damage(checkpoint, world)) if text]
        if not found:
            return checkpoint, read_facts(checkpoint)
        fault = fault or f"{found[0]}; delete {checkpoint} to resume from an older one"
        log.warning("%s; going on with the one before it", found[0])
    if not candidates:
        raise CheckpointError(f"{folder} has no checkpoint; give the folder of a run that has")
    raise CheckpointError(fault)


def damage(checkpoint: Path, world: World) -> str:
    """What is wrong with the files of a checkpoint that this rank looks at, or nothing."""
    try:
        facts = read_facts(checkpoint)
        listed = json.loads((checkpoint / COMPLETE).read_text()) if (checkpoint / COMPLETE).is_file() else {}
        # Checkpoints of the first releases have no manifest; their facts hold the digest of their only file.
        files = listed.get("files") or {"state.safetensors": {"sha256": facts["sha256"]}}
    except (OSError, ValueError, KeyError, AttributeError):
        return f"{checkpoint} was altered or truncated"
    for name in sorted(files)[world.rank :: world.size]:
        path = checkpoint / name
        if not path.is_file() or sha256(path) != files[name]["sha256"]:
            return f"{path if path.is_file() else checkpoint} was altered or truncated"
    return ""


def read_facts(checkpoint: Path) -> dict[str, Any]:
    return dict(json.loads((checkpoint / FACTS).read_text()))


def shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole tensors of a checkpoint by name."""
    with _quiet():
        stored = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def read(checkpoint: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fill tensors, whole or sharded, from a checkpoint of any number of ranks. Raises ValueError for another shape."""
    stored = shapes(checkpoint)
    for name, tensor in tensors.items():
        if name not in stored:
            raise ValueError(f"it has no {name}")
        if stored[name] != tuple(tensor.shape):
            raise ValueError(f"{name} has shape {stored[name]} there and {tuple(tensor.shape)} here")
    with _quiet():
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=world.size == 1)


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    if world.size == 1:
        save_file(dict(tensors), folder / "state.safetensors")
        return
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(dict(tensors), storage_writer=writer, process_group=world.group)


def _mine(folder: Path, world: World) -> list[Path]:
    """The files that this rank describes."""
    return sorted(folder.iterdir())[world.rank :: world.size]


def _described(path: Path) -> dict[str, Any]:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _finish(temporary: Path, final: Path, files: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Describe a checkpoint and put it in its place; one of the same iteration makes way."""
    (temporary / FACTS).write_text(json.dumps(facts, indent=1))
    listed = {"files": {**files, FACTS: _described(temporary / FACTS)}}
    (temporary / COMPLETE).write_text(json.dumps(listed, indent=1))
    _sync(temporary / COMPLETE)
    _sync(temporary)
    old = final.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(temporary, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make a file or folder outlast a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _together(action: Callable[[], T], final: Path, world: World) -> list[T]:
    """Every rank does its part; what each returned. Raises CheckpointError on all ranks if one of them fails."""
    result, fault = None, ""
    try:
        result = action()
    except (OSError, CheckpointException, SafetensorError) as error:
        fault = _reason(error)
    told = world.gather((result, fault))
    faults = [f"rank {rank}: {text}" if world.size > 1 else text for rank, (_, text) in enumerate(told) if text]
    if not faults:
        return [part for part, _ in told]
    if world.leader:
        shutil.rmtree(final.with_suffix(".tmp"), ignore_errors=True)  # half a checkpoint fills the disk for nothing
    older = saved(final.parent.parent)
    kept = f"the last good checkpoint is {older[-1]}" if older else "no checkpoint was written yet"
    raise CheckpointError(f"{final} could not be written ({faults[0]}); {kept}. Make room and continue with --resume")


def _reason(error: BaseException) -> str:
    """The first line of an error, or of the first rank's in torch's collection of them."""
    if isinstance(error, CheckpointException):
        error = next((fault[0] for fault in error.failures.values()), error)
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch says that it saves without other processes, which is what one process means to do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        yield
