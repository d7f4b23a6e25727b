"""Runtimes side by side on one bundle: each graph and whole pictures, speed and distance to ONNX Runtime in float32.

    python -m benchmarks.inference bundles/scenes-sdxl --threads 1 --batches 1,8,32

Runtimes take turns within each repeat, in an order that rotates, and every repeat draws from other seeds. ms is the
median of the clock per picture, cpu_ms that of processor time, all that is left to trust on a machine that does other
work; times and cpu_times are medians over repeats of ONNX Runtime's over the runtime's. A bundle's entry in the result
file is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.latency import PROMPT, processor
from distill.bundle import Bundle, BundleError
from distill.sampling import noise
from service.runtimes import Conditioning, Runtime, RuntimeUnavailable, generate, open_runtime

KINDS = (("onnx", "float32"), ("openvino", "float32"), ("openvino", "bfloat16"))
"""Runtimes and precisions; the first is the reference."""
MAX_DB = 200.0
_GOLDEN = 0.6180339887
"""Multiples of it, modulo 1, are spread evenly: rows of a step stand all over the table of the sampler."""

Array = NDArray[Any]
Work = Callable[[int], Array]
"""One repeat, by its number: the result whose distance counts, one row per picture."""


@dataclass(frozen=True)
class Row:
    """One line of the table. Distances are those of all repeats together; None for the reference itself."""

    what: str
    batch: int
    runtime: str
    precision: str
    ms: float
    cpu_ms: float
    times: float
    cpu_times: float
    median_db: float | None
    worst_db: float | None
    max_levels: int | None
    """Of 255; None for what is no picture."""


def open_kinds(bundle: Bundle, threads: int, max_batch: int) -> dict[tuple[str, str], tuple[Runtime, float]]:
    """Every runtime that this machine has, with the processor seconds that loading took."""
    found: dict[tuple[str, str], tuple[Runtime, float]] = {}
    for name, precision in KINDS:
        start = time.process_time()
        try:
            runtime = open_runtime(
                bundle,
                threads=threads,
                max_batch=max_batch,
                runtime=name,  # type: ignore[arg-type]
                precision=precision,  # type: ignore[arg-type]
            )
        except RuntimeUnavailable as error:
            print(f"without {name} in {precision}: {error}")
            continue
        found[name, precision] = (runtime, time.process_time() - start)
    return found


def works(runtime: Runtime, bundle: Bundle, steps: int, batch: int, given: Conditioning) -> Iterator[tuple[str, Work]]:
    """What is timed: text, one step, decoding, and the whole. ``given``: conditioning for graphs on their own."""
    manifest = bundle.manifest
    shape = manifest.latent_shape()
    table = manifest.samplers[steps].table()

    def seeds(repeat: int) -> list[int]:
        return [repeat * batch + i for i in range(batch)]

    def latents(repeat: int) -> NDArray[np.float32]:
        return np.stack([noise(seed, 0, shape)[0] for seed in seeds(repeat)])

    def one_step(repeat: int) -> Array:
        x, at = latents(repeat), (np.array(seeds(repeat)) * _GOLDEN % 1 * len(table)).astype(int)
        return runtime.step(x, table.timesteps[at], table.rows[at], x, given)[1]

    if manifest.max_tokens is not None:
        yield "text", lambda repeat: runtime.encode_text(prompts(bundle, batch))["prompt_embeds"]
    yield f"step of {steps}", one_step
    yield "decode", lambda repeat: runtime.decode(latents(repeat))
    asked = given if manifest.max_tokens is None else prompts(bundle, batch)
    yield f"picture, {steps} steps", lambda repeat: generate(runtime, manifest, asked, seeds(repeat), steps)


def prompts(bundle: Bundle, count: int) -> list[str]:
    texts = bundle.manifest.examples or (PROMPT,)
    return [texts[i % len(texts)] for i in range(count)]


def measure(kinds: Mapping[tuple[str, str], Work], what: str, batch: int, repeats: int) -> list[Row]:
    """Run the same work on every runtime in turn, ``repeats`` times after one to warm up."""
    labels = list(kinds)
    clock: dict[tuple[str, str], list[float]] = {label: [] for label in labels}
    busy: dict[tuple[str, str], list[float]] = {label: [] for label in labels}
    made: dict[tuple[str, str], list[Array]] = {label: [] for label in labels}
    for work in kinds.values():
        work(0)
    for repeat in range(repeats):
        turn = repeat % len(labels)
        for label in labels[turn:] + labels[:turn]:
            start, start_busy = time.perf_counter(), time.process_time()
            made[label].append(kinds[label](repeat))
            busy[label].append((time.process_time() - start_busy) * 1e3 / batch)
            clock[label].append((time.perf_counter() - start) * 1e3 / batch)
    reference = np.concatenate(made[labels[0]])
    rows = []
    for label in labels:
        ratios = (float(np.median(np.array(v[labels[0]]) / np.array(v[label]))) for v in (clock, busy))
        times, cpu_times = (round(ratio, 2) for ratio in ratios)
        distance = (None, None, None) if label == labels[0] else compare(np.concatenate(made[label]), reference)
        ms, cpu_ms = (round(float(np.median(values[label])), 2) for values in (clock, busy))
        rows.append(Row(what, batch, *label, ms, cpu_ms, times, cpu_times, *distance))
    return rows


def compare(found: Array, reference: Array) -> tuple[float, float, int | None]:
    """Peak signal to noise per picture in dB, median and worst, and the greatest difference of pictures in levels.

    The peak is 255 for uint8 and otherwise the range of the row of the reference; found, reference: (B, …).
    """
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (found, reference))
    pictures = reference.dtype == np.uint8
    peak = 255.0 if pictures else np.ptp(b, axis=1)
    error = np.mean((a - b) ** 2, axis=1) / peak**2
    db = np.minimum(MAX_DB, -10 * np.log10(np.maximum(error, 10 ** (-MAX_DB / 10))))
    levels = int(np.abs(a - b).max()) if pictures else None
    return round(float(np.median(db)), 1), round(float(db.min()), 1), levels


def run(bundle: Bundle, *, steps: int, threads: int, batches: Sequence[int], repeats: int) -> dict[str, Any]:
    """The entry of a bundle in the result file."""
    load = os.getloadavg()[0]
    kinds = open_kinds(bundle, threads, max(batches))
    rows: list[Row] = []
    for batch in batches:
        given: Conditioning = {"labels": np.arange(batch, dtype=np.int64) % 2}
        if bundle.manifest.max_tokens is not None:
            given = next(iter(kinds.values()))[0].encode_text(prompts(bundle, batch))
        turns = {label: dict(works(r, bundle, steps, batch, given)) for label, (r, _) in kinds.items()}
        for what in next(iter(turns.values())):
            rows += measure({label: named[what] for label, named in turns.items()}, what, batch, repeats)
            print_rows(rows[-len(kinds) :], header=len(rows) == len(kinds))
    return {
        "digest": bundle.digest,
        "steps": steps,
        "guidance": bundle.manifest.guidance.scale,
        "threads": threads,
        "repeats": repeats,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average_before": round(load, 1),
        "python": platform.python_version(),
        "runtimes": {
            " ".join(label): {
                "version": runtime.capabilities.version,
                "load_cpu_s": round(seconds, 2),
                "batch_sizes": runtime.capabilities.batch_sizes,
            }
            for label, (runtime, seconds) in kinds.items()
        },
        "rows": [asdict(row) for row in rows],
    }


def print_rows(rows: Sequence[Row], *, header: bool) -> None:
    if header:
        print(f"{'':20}batch  {'runtime':18} ms/picture    cpu ms   times  of cpu  median dB  worst levels")
    for row in rows:
        far = "" if row.median_db is None else f"{row.median_db:11.1f}{row.worst_db:7.1f}"
        levels = "" if row.max_levels is None else f"{row.max_levels:7d}"
        print(
            f"{row.what:20}{row.batch:5}  {row.runtime + ' ' + row.precision:18}{row.ms:11.2f}{row.cpu_ms:10.2f}"
            f"{row.times:8.2f}{row.cpu_times:8.2f}{far}{levels}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description="ONNX Runtime against OpenVINO in float32 and bfloat16, per graph and end to end, in one run.",
        epilog="example: python -m benchmarks.inference bundles/scenes-sdxl --threads 1 --batches 1,8,32",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, help="default: the bundle's own")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--batches", default="1,8", help="pictures at a time, by commas; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "inference.json")
    options = parser.parse_args()
    try:
        bundle = Bundle.open(options.bundle)
        steps = options.steps or bundle.manifest.default_steps
        if steps not in bundle.manifest.samplers:
            parser.error(f"--steps is {steps} but the bundle samples in {sorted(bundle.manifest.samplers)}")
        batches = [int(word) for word in options.batches.split(",")]
        entry = run(bundle, steps=steps, threads=options.threads, batches=batches, repeats=options.repeats)
    except (BundleError, ValueError) as error:
        parser.error(str(error))
    known = json.loads(options.out.read_text()) if options.out.is_file() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(known | {bundle.manifest.name: entry}, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
