"""ONNX graphs of a bundle to TensorRT engines, each built in a child process.

An engine that was built but not executed says so (status "built"); only ``check`` runs the engines on this machine's
GPU, compares them with torch as the ONNX export does, and says "verified".
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from distill.bundle import Bundle, Engine, Manifest, Target
from distill.engines.tensorrt import INSTALL, PORTABLE, Flavour, installed, platform_name
from distill.export.build import Reply, Request
from distill.export.check import check_engines, require_gpu
from distill.export.drafts import check_room, drafts
from distill.export.onnx import ExportError
from distill.export.weights import graph_bytes

MAX_OPSET = 22
"""Opset 23 brings Attention, which TensorRT does not build in float32 nor for every head size."""
ROWS = (1, 4, 8)
"""Least, usual and greatest number of rows of a profile; the service takes up to 8 unless told otherwise."""
BUILD_TIMEOUT_S = 3600
ENGINE_BYTES = 3
"""Greatest size of an engine over that of its ONNX graph, whose weights are float16."""


def export_tensorrt(
    path: Path | str,
    *,
    precision: str = "float32",
    rows: tuple[int, int, int] = ROWS,
    check: bool = False,
    say: Callable[[str], None] = print,
) -> Bundle:
    """Build the engines of a bundle's graphs and write them and the manifest into the bundle.

    Engines of another GPU or version stay. Raises BundleError for a bundle without ONNX graphs and ExportError for
    what TensorRT does not take; in both cases the bundle is as it was.
    """
    bundle = Bundle.open(path)
    sources = onnx_engines(bundle, precision)
    flavour = pick_flavour()
    if check:
        require_gpu(PORTABLE if flavour == "tensorrt-rtx" else None)
    check_room(bundle.path, ENGINE_BYTES * sum(graph_bytes(bundle.path / source.file) for source in sources))
    building = bundle.path / flavour / "building"
    with drafts(bundle.path) as made:
        built: list[Engine] = []
        files: dict[str, Path] = {}
        for index, source in enumerate(sources, start=1):
            draft = made.path(building / f"{source.graph}.engine")
            shapes = profile_shapes(source, bundle.manifest, rows)
            reply = run_builder(request_for(bundle, source, flavour, shapes, draft))
            built.append(_record(bundle, source, flavour, reply, shapes))
            files[source.graph] = made.move(draft, bundle.path / built[-1].file)  # only the builder knows the key
            size_mb = files[source.graph].stat().st_size / 1e6
            target = f"{reply.architecture}, {flavour} {reply.version}"
            say(f"[{index}/{len(sources)}] {source.graph}: {size_mb:.1f} MB in {reply.duration_s:.0f} s for {target}")
        if check:
            built = check_engines(bundle, built, files, flavour, say)
        else:
            say("built, not executed: run again with --check on the GPU that the engines are for")
        names = {engine.file for engine in built}
        kept = tuple(engine for engine in bundle.manifest.engines if engine.file not in names)
        return made.commit(bundle.manifest.model_copy(update={"engines": (*kept, *built)}))


def onnx_engines(bundle: Bundle, precision: str) -> list[Engine]:
    """The ONNX graphs to build from: of the step in ``precision``, of the others too where the bundle has them.

    Raises BundleError without them and ExportError for an opset that TensorRT does not take.
    """
    graphs = dict.fromkeys(e.graph for e in bundle.manifest.engines if e.runtime == "onnx") or {"step": None}
    found = []
    for graph in graphs:
        reduced = bundle.engines(graph, "onnx", precision)
        found.append(
            reduced[0] if reduced else bundle.engine(graph, "onnx", precision if graph == "step" else "float32")
        )
    for source in found:
        if source.opset > MAX_OPSET:
            raise ExportError(
                f"{source.file} is of opset {source.opset} and TensorRT is built from {MAX_OPSET} at most; "
                f"run: python -m distill.export {bundle.path} --to onnx --opset {MAX_OPSET}"
            )
    return found


def pick_flavour() -> Flavour:
    """TensorRT where it is installed, else TensorRT-RTX. Raises ExportError with the install line."""
    flavours = installed()
    if not flavours:
        raise ExportError(f"TensorRT is not installed; run: {INSTALL}")
    return flavours[0]


def profile_shapes(
    source: Engine, manifest: Manifest, rows: tuple[int, int, int] = ROWS
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Least, usual and greatest shape of each input: ``rows`` pictures, and the sizes that the manifest declares.

    The usual height and width are those of the first size. Raises ExportError for rows out of order.
    """
    least, usual, greatest = rows
    if not 1 <= least <= usual <= greatest:
        raise ExportError(f"rows is {rows}; give least <= usual <= greatest, from 1")
    stride = manifest.latent_stride
    ranges = {"batch": rows}
    for axis, sides in (("width", [w for w, _ in manifest.sizes]), ("height", [h for _, h in manifest.sizes])):
        ranges[axis] = (min(sides) // stride, sides[0] // stride, max(sides) // stride)
    clips = [manifest.latent_frames(count) for count in manifest.frames]
    if clips:
        ranges["frames"] = (1, clips[0], max(clips))
    for name, shape in source.inputs.items():
        unknown = [side for side in shape if isinstance(side, str) and side not in ranges]
        if unknown:
            raise ExportError(f"{source.file}: {name} has a free axis {unknown[0]!r}; export clips of one size")
    return {
        name: tuple(tuple(side if isinstance(side, int) else ranges[side][at] for side in shape) for at in range(3))
        for name, shape in source.inputs.items()
    }


def request_for(
    bundle: Bundle, source: Engine, flavour: Flavour, shapes: Mapping[str, tuple[tuple[int, ...], ...]], engine: Path
) -> Request:
    cache = Path.home() / ".cache" / "leapfrog" / "tensorrt" / "timing.cache"
    if flavour == "tensorrt":
        cache.parent.mkdir(parents=True, exist_ok=True)
    listed = {name: [list(shape) for shape in of] for name, of in shapes.items()}
    return Request(flavour, str(bundle.file(source.file)), str(engine), listed, str(cache))


def run_builder(request: Request) -> Reply:
    """Build in a child process. Raises ExportError when it refuses, crashes or does not end."""
    command = [sys.executable, "-m", "distill.export.build"]
    name = Path(request.onnx).stem
    started = time.perf_counter()
    try:
        ended = subprocess.run(
            command,
            input=json.dumps(asdict(request)),
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(f"{request.flavour} took more than {BUILD_TIMEOUT_S} s for {name} and was ended") from None
    if ended.returncode != 0:
        raise ExportError(
            f"{request.flavour} crashed on {name} after {time.perf_counter() - started:.0f} s ({_cause(ended)}); "
            "nothing was written, export the graph at another --opset"
        )
    reply = Reply(**json.loads(ended.stdout.splitlines()[-1]))
    if reply.error:
        raise ExportError(f"{request.flavour} does not build {name}: {reply.error}; nothing was written")
    return reply


def _cause(ended: subprocess.CompletedProcess[str]) -> str:
    if ended.returncode < 0:
        return signal.Signals(-ended.returncode).name
    return (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]


def _record(
    bundle: Bundle, source: Engine, flavour: Flavour, reply: Reply, shapes: dict[str, tuple[tuple[int, ...], ...]]
) -> Engine:
    target = Target(
        architecture=reply.architecture,
        version=reply.version,
        platform=platform_name(),
        source=bundle.manifest.files[source.file],
        shapes=shapes,
    )
    key = f"{reply.architecture}-{reply.version}-{source.precision}"
    return source.model_copy(
        update={
            "runtime": flavour,
            "file": f"{flavour}/{key}/{source.graph}.engine",
            "status": "built",
            "parity": {},
            "latency_ms": {},
            "target": target,
        }
    )
