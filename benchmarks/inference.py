"""Runtimes side by side on one bundle: each graph and whole pictures, speed and distance to torch in float32.

    python -m benchmarks.inference bundles/scenes-sdxl --teacher models/scenes-teacher --batches 1,8

Runtimes take turns within each repeat, in an order that rotates, and every repeat draws from other seeds. ms is the
median of the clock per picture, cpu_ms that of processor time, all that is left to trust on a machine that does other
work; times and cpu_times are medians over repeats of torch's over the runtime's, torch as it comes ("eager") in
float32. The teacher comes first, with its own number of steps and guidance; over_teacher is how many of the student's
pictures take as long as one of the teacher's. A bundle's entry in the result file is replaced, and its plot beside it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.latency import PROMPT, processor
from distill.bundle import Bundle, BundleError
from distill.sampling import noise
from service.runtimes import Conditioning, Runtime, RuntimeUnavailable, generate, open_runtime
from service.runtimes.torch import TorchGraph, TorchRuntime

Kind = tuple[str, str]
"""A runtime and a precision."""
KINDS: tuple[Kind, ...] = (
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("compiled", "float32"),
    ("compiled", "bfloat16"),
    ("onnx", "float32"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
    ("tensorrt", "float32"),
    ("tensorrt", "float16"),
)
"""The first that is measured is the reference; "compiled" is torch.compile."""
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
    over_teacher: float | None = None
    """The teacher's median over this one, of whole pictures in the same runtime and batch."""


class CompiledRuntime(TorchRuntime):
    """torch.compile of every graph, at the shapes that come: it compiles again for each."""

    def _load(self, bundle: Bundle, graph: str) -> TorchGraph:
        if graph in self._specs:
            compiled = torch.compile(self._specs[graph].module, dynamic=False)
            self._specs[graph] = replace(self._specs[graph], module=cast(torch.nn.Module, compiled))
        return super()._load(bundle, graph)


def open_kinds(
    bundle: Bundle, threads: int, max_batch: int, kinds: Sequence[Kind] = KINDS
) -> dict[Kind, tuple[Runtime, float]]:
    """Those of the kinds that this machine and the bundle have, with the processor seconds that loading took."""
    found: dict[Kind, tuple[Runtime, float]] = {}
    for name, precision in kinds:
        start = time.process_time()
        options: dict[str, Any] = {"threads": threads, "max_batch": max_batch, "precision": precision}
        try:
            if name == "compiled":
                torch._dynamo.config.recompile_limit = 64  # one for each batch of each graph
                runtime: Runtime = CompiledRuntime(bundle, **options)
            else:
                runtime = open_runtime(bundle, runtime=cast(Any, name), **options)
        except (RuntimeUnavailable, BundleError) as error:
            print(f"without {name} in {precision}: {error}")
            continue
        if runtime.capabilities.fallback:
            print(f"without {name} in {precision}: {runtime.capabilities.fallback}")
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


def measure(kinds: Mapping[Kind, Work], what: str, batch: int, repeats: int) -> list[Row]:
    """Run the same work on every runtime in turn, ``repeats`` times after one to warm up."""
    labels = list(kinds)
    clock: dict[Kind, list[float]] = {label: [] for label in labels}
    busy: dict[Kind, list[float]] = {label: [] for label in labels}
    made: dict[Kind, list[Array]] = {label: [] for label in labels}
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


def run(
    bundle: Bundle,
    *,
    steps: int,
    threads: int,
    batches: Sequence[int],
    repeats: int,
    teacher: Bundle | None = None,
    kinds: Sequence[Kind] = KINDS,
) -> dict[str, Any]:
    """The entry of a bundle in the result file."""
    load = os.getloadavg()[0]
    rows: list[Row] = []
    if teacher is not None:
        rows += measure_all(open_kinds(teacher, threads, max(batches), kinds), teacher, None, batches, repeats)
    opened = open_kinds(bundle, threads, max(batches), kinds)
    if not opened:
        raise ValueError(f"none of {', '.join(map(' '.join, kinds))} runs {bundle.path} here; see above")
    of_teacher = {(row.runtime, row.precision, row.batch): row.ms for row in rows}
    rows += measure_all(opened, bundle, steps, batches, repeats, of_teacher)
    return {
        "digest": bundle.digest,
        "steps": steps,
        "guidance": bundle.manifest.guidance.scale,
        "teacher": teacher and {"name": teacher.manifest.name, "digest": teacher.digest, **_usual(teacher)},
        "threads": threads,
        "repeats": repeats,
        "processor": processor(),
        "bfloat16": bfloat16_units(),
        "cores": os.cpu_count(),
        "load_average_before": round(load, 1),
        "python": platform.python_version(),
        "runtimes": {
            " ".join(label): {
                "version": runtime.capabilities.version,
                "load_cpu_s": round(seconds, 2),
                "batch_sizes": runtime.capabilities.batch_sizes,
            }
            for label, (runtime, seconds) in opened.items()
        },
        "rows": [asdict(row) for row in rows],
    }


def _usual(bundle: Bundle) -> dict[str, float]:
    return {"steps": bundle.manifest.default_steps, "guidance": bundle.manifest.guidance.scale}


def measure_all(
    kinds: Mapping[Kind, tuple[Runtime, float]],
    bundle: Bundle,
    steps: int | None,
    batches: Sequence[int],
    repeats: int,
    of_teacher: Mapping[tuple[str, str, int], float] | None = None,
) -> list[Row]:
    """Rows of every graph and of whole pictures at each batch; steps None: of whole pictures of a teacher alone."""
    rows: list[Row] = []
    for batch in batches:
        given: Conditioning = {"labels": np.arange(batch, dtype=np.int64) % 2}
        if bundle.manifest.max_tokens is not None:
            given = next(iter(kinds.values()))[0].encode_text(prompts(bundle, batch))
        taken = steps or bundle.manifest.default_steps
        turns = {label: dict(works(r, bundle, taken, batch, given)) for label, (r, _) in kinds.items()}
        for what in next(iter(turns.values())):
            whole = what.startswith("picture")
            if steps is None and not whole:
                continue
            named = what if steps else what.replace("picture", "teacher")
            found = measure({label: work[what] for label, work in turns.items()}, named, batch, repeats)
            if whole and of_teacher:
                slow = (of_teacher.get((row.runtime, row.precision, batch)) for row in found)
                found = [
                    replace(row, over_teacher=ms and round(ms / row.ms, 1)) for row, ms in zip(found, slow, strict=True)
                ]
            print_rows(found, header=not rows)
            rows += found
    return rows


def bfloat16_units() -> list[str]:
    """Which instructions this processor has for products in bfloat16, by Linux' names."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return [name for name in ("avx512_bf16", "amx_bf16") if name in flags]


def plot(entry: Mapping[str, Any], name: str, file: Path) -> None:
    """Milliseconds per picture over the batch, a line per runtime; the teacher's are dashed."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    whole = [row for row in entry["rows"] if row["what"].startswith(("picture", "teacher"))]
    labels = list(dict.fromkeys((row["runtime"], row["precision"]) for row in whole))
    for row_of, dashes in (("picture", "-"), ("teacher", "--")):
        for index, label in enumerate(labels):
            points = [
                (row["batch"], row["ms"])
                for row in whole
                if (row["runtime"], row["precision"]) == label and row["what"].startswith(row_of)
            ]
            if points:
                title = " ".join(label) + (", teacher" if row_of == "teacher" else "")
                axes.plot(*zip(*points, strict=True), dashes, marker=".", color=f"C{index}", label=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("pictures at a time")
    axes.set_ylabel("milliseconds per picture")
    axes.set_title(f"{name}, {entry['steps']} steps, {entry['threads']} threads of {entry['processor']}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=110)


def print_rows(rows: Sequence[Row], *, header: bool) -> None:
    if header:
        print(f"{'':20}batch  {'runtime':18} ms/picture    cpu ms   times  of cpu  median dB  worst levels  of teacher")
    for row in rows:
        far = "" if row.median_db is None else f"{row.median_db:11.1f}{row.worst_db:7.1f}"
        levels = "" if row.max_levels is None else f"{row.max_levels:7d}"
        faster = "" if row.over_teacher is None else f"{row.over_teacher:11.1f}x"
        print(
            f"{row.what:20}{row.batch:5}  {row.runtime + ' ' + row.precision:18}{row.ms:11.2f}{row.cpu_ms:10.2f}"
            f"{row.times:8.2f}{row.cpu_times:8.2f}{far}{levels}{faster}",
            flush=True,
        )


def parse_kinds(words: str) -> list[Kind]:
    """Of --runtimes: "torch,onnx" is every precision of these. Raises ValueError."""
    names = words.split(",")
    known = list(dict.fromkeys(name for name, _ in KINDS))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)}"
            raise ValueError(f"--runtimes has {name!r}; {hint}")
    return [kind for kind in KINDS if kind[0] in names]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inference",
        description="torch, torch.compile, ONNX Runtime, OpenVINO and TensorRT, per graph and end to end, in one run.",
        epilog="example: python -m benchmarks.inference bundles/scenes-sdxl --threads 1 --batches 1,8,32",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--teacher", type=Path, help="a bundle that is measured first, at its own steps and guidance")
    parser.add_argument("--steps", type=int, help="default: the bundle's own")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default: all cores")
    parser.add_argument("--batches", default="1,2,4,8,16", help="pictures at a time, by commas; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--runtimes", help="by commas, of torch, compiled, onnx, openvino, tensorrt; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "inference.json")
    options = parser.parse_args()
    try:
        bundle = Bundle.open(options.bundle)
        steps = options.steps or bundle.manifest.default_steps
        if steps not in bundle.manifest.samplers:
            parser.error(f"--steps is {steps} but the bundle samples in {sorted(bundle.manifest.samplers)}")
        entry = run(
            bundle,
            steps=steps,
            threads=options.threads,
            batches=[int(word) for word in options.batches.split(",")],
            repeats=options.repeats,
            teacher=Bundle.open(options.teacher) if options.teacher else None,
            kinds=parse_kinds(options.runtimes) if options.runtimes else KINDS,
        )
    except (BundleError, ValueError) as error:
        parser.error(str(error))
    known = json.loads(options.out.read_text()) if options.out.is_file() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(known | {bundle.manifest.name: entry}, indent=1) + "\n")
    picture = options.out.with_name(f"{options.out.stem}-{bundle.manifest.name}.png")
    plot(entry, bundle.manifest.name, picture)
    print(f"wrote {options.out} and {picture}")


if __name__ == "__main__":
    main()
