"""A snapshot is a copy of its moment, in memory that is used again, of what this rank writes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distill.parallel.snapshot import Snapshot, share
from distill.parallel.world import World


def test_later_changes_do_not_show() -> None:
    snapshot, tensors = Snapshot(), {"w": torch.ones(3, 2), "step": torch.tensor(5), "t": torch.ones(2, 3).T}
    taken = snapshot.take(tensors)
    snapshot.ready()
    snapshot.settle()
    for tensor in tensors.values():
        tensor.zero_()
    assert taken["w"].tolist() == [[1.0, 1.0]] * 3 and int(taken["step"]) == 5
    assert taken["t"].is_contiguous() and taken["t"].shape == (3, 2)


def test_memory_is_taken_once_and_anew_for_another_shape() -> None:
    snapshot = Snapshot()
    first = snapshot.take({"w": torch.ones(3), "v": torch.ones(3)})
    second = snapshot.take({"w": torch.zeros(3), "v": torch.zeros(4)})
    assert second["w"].data_ptr() == first["w"].data_ptr() and not second["w"].any()
    assert second["v"].shape == (4,)
    assert snapshot.take({"w": torch.zeros(3)}).keys() == snapshot.held.keys() == {"w"}


def test_whole_tensors_are_shared_out_in_about_equal_bytes() -> None:
    tensors = {f"{n}": torch.zeros(n) for n in range(1, 41)}
    parts = [share(tensors, World(rank, 3)) for rank in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(tensors)
    sizes = [sum(t.nbytes for t in part.values()) for part in parts]
    assert max(sizes) - min(sizes) <= 40 * 4
    assert list(parts[0]) == [name for name in tensors if name in parts[0]]  # in the order given


def test_shards_stay_where_they_lie_and_copies_of_them_are_written_once(ranks: Any) -> None:
    told = ranks(4, sharded)
    assert [names for names, _, _ in told] == [told[0][0], told[0][0], told[2][0], told[2][0]]
    assert sorted(told[0][0] + told[2][0]) == ["a", "b", "c", "d"]
    assert all(rows == [2] * len(names) and kind for names, rows, kind in told)


def sharded() -> tuple[list[str], list[int], bool]:
    """Two copies of shards over two ranks: which names this rank keeps, their local rows, and their kind."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    tensors = {
        name: distribute_tensor(torch.arange(12.0).reshape(4, 3), mesh, (Replicate(), Shard(0))) for name in "abcd"
    }
    kept = Snapshot().take(share(tensors, World(dist.get_rank(), 4)))
    same = all(torch.equal(t.to_local(), tensors[n].to_local()) for n, t in kept.items() if isinstance(t, DTensor))
    return sorted(kept), [len(t.to_local()) for t in kept.values() if isinstance(t, DTensor)], same
