"""A run divided among processes or machines that share a folder: each makes and judges every n-th chunk of samples.

    python -m eval.run BUNDLE --suite scenes-fid --shard 1/4        # … 4/4, anywhere, in any order
    torchrun --nproc-per-node 4 -m eval.run BUNDLE --suite scenes-fid

A share is kept beside the cache of generations once it is whole. Whoever finds all shares there puts them together in
the order of the samples, stores the run and removes them; a lock that dies with its process makes that happen once.
Shares of other weights, judges, prompts or packages have another folder, so they never meet.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.errors import EvalError
from eval.metrics.base import Metric

State = dict[str, list[Any]]


@dataclass(frozen=True)
class Shard:
    """Number ``index`` of ``of``, counted from 1."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def parse_shard(text: str | None) -> Shard | None:
    """i/n, else what torchrun says in RANK and WORLD_SIZE; None for a run that is not divided."""
    if text is None:
        rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if rank is None or world is None or world == "1":
            return None
        text = f"{int(rank) + 1}/{world}"
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise EvalError(f"--shard is {text!r}; write i/n with i from 1 to n, such as 1/4")
    return Shard(int(found[1]), int(found[2]))


class Shares:
    """The shares of one run in a folder. identity: everything that decides what is in them, JSON."""

    def __init__(self, folder: Path, shard: Shard, identity: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps([identity, shard.of], sort_keys=True).encode()).hexdigest()
        self.shard, self._folder = shard, folder / "shards" / key[:32]

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.pt"

    @property
    def missing(self) -> list[int]:
        """Numbers of the shares that are not there yet."""
        return [i for i in range(1, self.shard.of + 1) if not self._path(i).is_file()]

    def keep(self, chunks: Sequence[Sequence[State]]) -> None:
        """Keep our share: per chunk, what each metric has gathered."""
        import torch

        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._path(self.shard.index).with_suffix(f".{os.getpid()}.tmp")
        torch.save([[_packed(state) for state in states] for states in chunks], temporary)
        os.replace(temporary, self._path(self.shard.index))

    @contextmanager
    def last(self) -> Iterator[bool]:
        """Whether all shares are there and this process is the one to put them together; they are removed after it."""
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        with self._folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            whole = not self.missing
            yield whole
            if whole:
                shutil.rmtree(self._folder)

    def put_together(self, metrics: Sequence[Metric]) -> None:
        """Give the metrics all chunks in the order of the samples."""
        shares = [self._load(i) for i in range(1, self.shard.of + 1)]
        for number in range(sum(len(share) for share in shares)):
            states = shares[number % self.shard.of][number // self.shard.of]
            for metric, state in zip(metrics, states, strict=True):
                metric.give({name: [_unpacked(entry) for entry in entries] for name, entries in state.items()})

    def _load(self, index: int) -> list[list[State]]:
        import torch

        try:
            found: list[list[State]] = torch.load(self._path(index), weights_only=True)
        except Exception as error:
            raise EvalError(
                f"{self._path(index)} is no share of a run: {error}; delete it, run that shard again"
            ) from None
        return found


def _packed(state: State) -> State:
    """Arrays as tensors, which are read again without running anything."""
    import torch

    return {
        name: [torch.from_numpy(entry) if isinstance(entry, np.ndarray) else entry for entry in entries]
        for name, entries in state.items()
    }


def _unpacked(entry: Any) -> Any:
    import torch

    return entry.numpy() if isinstance(entry, torch.Tensor) else entry
