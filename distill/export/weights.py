"""The weights of a bundle, which its ONNX graphs read from the safetensors files beside them: they are stored once.

ONNX takes the bytes of a tensor from another file, by its location, an offset and a length ("external data"). A
safetensors file is a header and then the bytes of its tensors one after another [1], so a graph can point into it.
Which tensor is meant is found by content: the bytes of an initialiser are there, as they are (a reshape changes none)
or transposed, where the exporter turned the weight of a linear layer round. Runtimes turn it back once, when they load.

ONNX Runtime and the checker refuse files outside of the graph's own folder, so graphs lie at the root of a bundle.

[1] https://huggingface.co/docs/safetensors, "Format"
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data

from distill.bundle import Bundle

SIGNATURE = "leapfrog.weights"
"""The property of a graph by which its sha256 covers its weights: the sha256 of what it reads from other files."""


@dataclass(frozen=True)
class Place:
    """Where the bytes of a tensor lie."""

    file: str
    """Relative to the folder of the graph, / as separator."""
    offset: int
    length: int
    digest: bytes
    """sha256 of the bytes."""
    transposed: bool = False
    """The matrix lies there with its axes exchanged."""


class Weights:
    """The float16 tensors of safetensors files, by content. names: of the files, relative to ``root``."""

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self._places: dict[bytes, Place] = {}
        for name in names:
            for place in _tensors(root, name):
                self._places.setdefault(place.digest, place)

    @classmethod
    def of(cls, bundle: Bundle) -> Weights:
        return cls(bundle.path, [name for name in sorted(bundle.manifest.files) if name.endswith(".safetensors")])

    def find(self, half: NDArray[np.float16]) -> Place | None:
        """Where a tensor's bytes lie, None when they are in none of the files."""
        place = self._places.get(digest_of(half))
        if place is None and half.ndim == 2:
            turned = self._places.get(digest_of(half.T))
            return turned and replace(turned, transposed=True)
        return place


def digest_of(half: NDArray[np.float16]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(half).data).digest()


def _tensors(root: Path, name: str) -> Iterator[Place]:
    """The float16 tensors of one file. Its bytes are read once, one tensor at a time."""
    with (root / name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        first = 8 + int.from_bytes(data[:8], "little")
        for key, entry in json.loads(data[8:first]).items():
            if key == "__metadata__" or entry["dtype"] != "F16":
                continue
            start, end = (first + offset for offset in entry["data_offsets"])
            yield Place(name, start, end - start, hashlib.sha256(data[start:end]).digest())


def share(model: onnx.ModelProto, weights: Weights) -> None:
    """Replace the float16 initialisers of a graph by references into the files, where they are stored as they are."""
    found = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT16:
            continue
        place = weights.find(numpy_helper.to_array(tensor))
        if place is not None and not place.transposed:
            set_external_data(tensor, place.file, place.offset, place.length)
            tensor.ClearField("raw_data")
            found.append(place)
    sign(model, found)


def sign(model: onnx.ModelProto, places: Iterable[Place]) -> None:
    """Write into a graph what it reads from other files, so that another student's graph is another file."""
    digests = b"".join(place.digest for place in places)
    kept = [entry for entry in model.metadata_props if entry.key != SIGNATURE]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    if digests:
        model.metadata_props.add(key=SIGNATURE, value=hashlib.sha256(digests).hexdigest())


def graph_bytes(path: Path) -> int:
    """Of an ONNX file and of the weights that it reads from other files."""
    model = onnx.load(path, load_external_data=False)
    outside = (entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "length")
    return path.stat().st_size + sum(int(entry.value) for entry in outside)
