"""Which metric can run here, in which interpreter, and what to do about those that cannot.

    python -m eval.doctor
    python -m eval.doctor --judges models --store runs/eval/scores.sqlite

Every check does the real thing in small: it imports the packages, loads the judge and scores probe pictures. Published
scorers whose weights are not here are shown as "none". Exit codes: 0 everything else can run, 3 something cannot.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eval import judges
from eval.errors import EvalError
from eval.run import DEFAULT_STORE

_ROOM_GIB = 2.0
"""Free space below which a night may not end: pictures of all suites take about one gibibyte."""


@dataclass(frozen=True)
class Check:
    """ok, or why not and the fix, in one line. needed: a night without it is broken."""

    name: str
    ok: bool
    text: str
    needed: bool = True

    @property
    def word(self) -> str:
        return "ok" if self.ok else "FAIL" if self.needed else "none"


def check(name: str, probe: Callable[[], str]) -> Check:
    """Run a probe. It returns what it found, and anything that it raises is a failure with its fix."""
    try:
        return Check(name, True, probe())
    except EvalError as error:
        return Check(name, False, str(error))
    except Exception as error:
        return Check(name, False, diagnose(error))


def diagnose(error: BaseException) -> str:
    """The known breakages of the packages that metrics stand on, each with its way out."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if "torchvision::nms" in text:
        return f"{text}; torchvision is built for another torch: install the pair of constraints.txt, torch first"
    if "pkg_resources" in text:
        return f"{text}; openai-clip needs an old setuptools: pip install 'setuptools>=77.0.3,<82'"
    if isinstance(error, ModuleNotFoundError):
        return f"{text}; run: pip install 'leapfrog[eval]'"
    if "bpe_simple_vocab" in text:
        return f"{text}; the hpsv2 wheel lacks its vocabulary: copy the file of that name from open_clip_torch"
    return f"{text}; look at the traceback with python -X dev"


def metric_probe(name: str, folder: Path | None) -> Callable[[], str]:
    """Score a few pictures of noise with a metric, judged for real."""

    def probe() -> str:
        from eval.metrics import create
        from eval.metrics.base import Samples
        from eval.prompts import build_prompts, load_suite
        from eval.run import JUDGED

        suite = load_suite(PROBES[name])
        options = dict(suite.metrics[name]) | ({"folder": folder} if name in JUDGED else {})
        if "reference_count" in options:
            options["reference_count"] = 8
        prompts = build_prompts(suite, 4)
        size = 8 if suite.world == "digits" else 64
        images = np.random.default_rng(0).integers(0, 256, (4, 3, size, size), dtype=np.uint8)
        metric = create(name, **options)
        metric.update(Samples(images, tuple(prompts), np.full(4, 0.01)))
        score = metric.compute()
        return f"{sys.executable}; noise scores {score.value:.4g} {score.unit}".rstrip()

    return probe


PROBES = {
    "composition": "scenes-canary",
    "digit-accuracy": "digits-canary",
    "diversity": "scenes-canary",
    "fid": "scenes-canary",
    "inception-score": "digits-canary",
    "kid": "scenes-canary",
    "latency": "scenes-latency",
    "precision": "scenes-canary",
    "recall": "scenes-canary",
    "reward": "scenes-canary",
}
"""A suite that uses each metric, whose options the probe takes."""


def preference_probe(name: str) -> Callable[[], str]:
    """Score noise with a published scorer, from the hub or its cache."""

    def probe() -> str:
        from eval.metrics import create
        from eval.metrics.base import Samples
        from eval.prompts import Prompt

        images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
        metric = create(name)
        metric.update(Samples(images, tuple(Prompt(f"probe-{i}", "a red cube", i) for i in range(2))))
        return f"{sys.executable}; noise scores {metric.compute().value:.4g}"

    return probe


def runtime_probe(runtime: str) -> Callable[[], str]:
    def probe() -> str:
        from service.runtimes import RuntimeUnavailable, choose

        try:
            name, precision = choose(runtime, "float32" if runtime == "onnx" else "auto")
        except RuntimeUnavailable as error:
            raise EvalError(str(error)) from None
        return f"{name}, {precision}"

    return probe


def extractor_probe(name: str, folder: Path | None) -> Callable[[], str]:
    """Features of noise under a published extractor."""

    def probe() -> str:
        from eval.metrics.extractors import load_extractor

        images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
        return f"{sys.executable}; {load_extractor(folder, name)(images).shape[1]} features"

    return probe


EXTRACTORS = {"cmmd": "clip-vit-l-14-336", "fd-dinov2": "dinov2-vit-l-14"}
"""Published extractors behind metrics that no embedded world uses."""


def store_probe(path: Path) -> Callable[[], str]:
    def probe() -> str:
        from eval.store import Store

        if not path.is_file():
            return f"{path} does not exist yet; the first run makes it"
        with Store(path) as store:
            runs, pinned = len(store.runs()), store.baselines()
        return (
            f"{path}: {runs} complete runs, baselines of {', '.join(sorted({b['bundle'] for b in pinned})) or 'none'}"
        )

    return probe


def space_probe(path: Path) -> Callable[[], str]:
    def probe() -> str:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free / 2**30
        if free < _ROOM_GIB:
            raise EvalError(
                f"{there} has {free:.1f} GiB free and a night needs {_ROOM_GIB:g}; delete runs/eval/samples"
            )
        return f"{free:.0f} GiB free"

    return probe


def examine(folder: Path | None, store: Path, only: Sequence[str] | None = None) -> list[Check]:
    """All checks; only: these metrics and nothing else."""
    from eval.metrics import registered
    from eval.metrics.preference import KINDS

    names = list(only) if only else [name for name in registered() if not name.startswith("test-")]
    checks = []
    for name in names:
        if name in KINDS:
            checks.append(replace(check(name, preference_probe(name)), needed=bool(only)))
        elif name in EXTRACTORS:
            checks.append(replace(check(name, extractor_probe(EXTRACTORS[name], folder)), needed=bool(only)))
        elif name in PROBES:
            checks.append(check(name, metric_probe(name, folder)))
        else:
            checks.append(Check(name, False, "no suite uses this metric; add one to eval/suites and to PROBES"))
    if only:
        return checks
    checks += [check(f"runtime {runtime}", runtime_probe(runtime)) for runtime in ("onnx", "openvino")]
    return [*checks, check("store", store_probe(store)), check("disk", space_probe(store.parent))]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--judges", type=Path, default=judges.DEFAULT_FOLDER, help="default: %(default)s")
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    parser.add_argument("--metric", action="append", help="check only this one; give several")
    args = parser.parse_args(arguments)
    checks = examine(args.judges, args.store, args.metric)
    for found in checks:
        print(f"{found.word:4} {found.name:18} {found.text}")
    print(f"{sum(found.ok for found in checks)} of {len(checks)} can run")
    return 3 if any(found.needed and not found.ok for found in checks) else 0


if __name__ == "__main__":
    raise SystemExit(main())
