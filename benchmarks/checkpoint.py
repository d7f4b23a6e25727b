"""How long training stands still for a checkpoint: written by the loop itself, or beside it.

    python -m benchmarks.checkpoint --mib 1 200

The state is random and float32, in tensors of at most 16 MiB. ``beside`` is the time until Saver.start returns (it
copies, once into fresh memory and then into memory that is held), ``written`` that of the same checkpoint until it is
on disk under its name, with digests and synced. Seconds, medians of ``--repeat``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from distill.parallel.saver import Saver
from distill.parallel.world import World

LARGEST = 4 * 2**20
"""Elements of a tensor."""


def state(mib: float) -> dict[str, Tensor]:
    elements = int(mib * 2**18)
    sizes = [min(LARGEST, elements - start) for start in range(0, elements, LARGEST)]
    return {f"w{i}": torch.randn(size) for i, size in enumerate(sizes)}


def measure(mib: float, repeat: int) -> dict[str, float]:
    tensors, beside, written = state(mib), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder, Saver(World()) as saver:
        for i in range(1 + repeat):
            began = time.perf_counter()
            saver.start(Path(folder), i, tensors, {}, keep=1)
            beside.append(time.perf_counter() - began)
            saver.wait()
            written.append(time.perf_counter() - began)
    return {
        "mib": mib,
        "beside_first_s": beside[0],
        "beside_s": median(beside[1:]),
        "written_s": median(written[1:]),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__.splitlines()[0])
    parser.add_argument("--mib", nargs="+", type=float, default=[1.0, 200.0], help="sizes of the state")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args(arguments)
    for mib in options.mib:
        print(json.dumps({name: round(value, 5) for name, value in measure(mib, options.repeat).items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
