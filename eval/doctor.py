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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval import judges
from eval.env import interpreter, recipe_names
from eval.errors import EvalError, nearest
from eval.run import DEFAULT_STORE

if TYPE_CHECKING:
    from eval.metrics import Metric

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


def noise(count: int, size: int = 64, frames: int | None = None) -> NDArray[np.uint8]:
    """(count, 3, size, size) uint8, or clips (count, frames, 3, size, size), the same each time."""
    shape = (count, *((frames,) if frames else ()), 3, size, size)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def metric_probe(name: str, folder: Path | None) -> Callable[[], str]:
    """Score a few pictures of noise with a metric, judged for real."""

    def probe() -> str:
        from eval.metrics import create
        from eval.metrics.base import Samples
        from eval.prompts import build_prompts, load_suite
        from eval.run import JUDGED

        suite = load_suite(PROBES[name])
        options = dict(suite.metrics[name]) | ({"folder": folder} if name in JUDGED else {}) | _instead(name)
        if "reference_count" in options:
            options["reference_count"] = 8
        prompts = tuple(build_prompts(suite, 4))
        images = noise(4, 8 if suite.world == "digits" else 64, suite.frames)
        metric = create(name, **options)
        for _ in range(3 if name == "throughput" else 1):
            metric.update(Samples(images, prompts, np.full(4, 0.01), 0.04))
        return _scored(metric)

    return probe


def _instead(name: str) -> dict[str, Any]:
    """What stands for the bundle in probes of metrics that measure one: this process, and noise itself."""
    from distill.motion import MOVEMENTS
    from eval.footprint import peak_mib

    class Noise:
        def make(self, prompts: Sequence[object]) -> NDArray[np.uint8]:
            return noise(len(prompts))

    stands: dict[str, dict[str, Any]] = {
        "jerk": {"reference": dict.fromkeys(MOVEMENTS, 0.0)},
        "memory": {"measure": lambda prompt: peak_mib()},
        "parity": {"reference": Noise()},
    }
    return stands.get(name, {})


def _scored(metric: Metric) -> str:
    score = metric.compute()
    return f"{sys.executable}; noise scores {score.value:.4g} {score.unit}".rstrip()


PROBES = {
    "composition": "scenes-canary",
    "contrast": "scenes-canary",
    "digit-accuracy": "digits-canary",
    "diversity": "scenes-canary",
    "fid": "scenes-canary",
    "frame-composition": "scenes-wan-canary",
    "fvd": "scenes-wan-canary",
    "high-frequency": "scenes-canary",
    "inception-score": "digits-canary",
    "jerk": "scenes-wan-canary",
    "kid": "scenes-canary",
    "kvd": "scenes-wan-canary",
    "latency": "scenes-latency",
    "memory": "scenes-memory",
    "motion-accuracy": "scenes-wan-canary",
    "parity": "scenes-speed",
    "precision": "scenes-canary",
    "recall": "scenes-canary",
    "reward": "scenes-canary",
    "saturation": "scenes-canary",
    "subject-consistency": "scenes-wan-canary",
    "throughput": "scenes-speed",
}
"""A suite that uses each metric, whose options the probe takes."""


def preference_probe(name: str, folder: Path | None) -> Callable[[], str]:
    """Score noise with a published scorer, from the hub or its cache."""

    def probe() -> str:
        from eval.metrics import create
        from eval.metrics.base import Samples
        from eval.prompts import Prompt

        metric = create(name)
        frames = 17 if name == "videoalign" else None
        metric.update(Samples(noise(2, frames=frames), tuple(Prompt(f"probe-{i}", "a red cube", i) for i in range(2))))
        return _scored(metric)

    return probe


def extractor_probe(name: str, folder: Path | None) -> Callable[[], str]:
    """Features of noise under the published extractor of a metric that no embedded world uses."""

    def probe() -> str:
        from eval.metrics.extractors import load_extractor

        features = load_extractor(folder, EXTRACTORS[name])(noise(2))
        return f"{sys.executable}; {features.shape[1]} features"

    return probe


EXTRACTORS = {"cmmd": "clip-vit-l-14-336", "fd-dinov2": "dinov2-vit-l-14"}
"""Published extractors behind metrics that no embedded world uses."""


def aesthetic_probe(name: str, folder: Path | None) -> Callable[[], str]:
    """The aesthetic predictor's opinion of noise."""

    def probe() -> str:
        from eval.metrics import create
        from eval.metrics.base import Samples
        from eval.prompts import Prompt

        metric = create(name, folder=folder)
        metric.update(Samples(noise(2), tuple(Prompt(f"probe-{i}", "", i) for i in range(2))))
        return _scored(metric)

    return probe


def geneval_probe(name: str, folder: Path | None) -> Callable[[], str]:
    """Things that GenEval's detector finds in noise."""

    def probe() -> str:
        from eval.metrics.geneval import Networks

        found = Networks(folder).find(noise(1)[0])
        return f"{sys.executable}; {sum(len(things) for things in found.values())} things in noise"

    return probe


def flickering_probe(name: str, folder: Path | None) -> Callable[[], str]:
    """VBench's own score of noise, in its own interpreter."""

    def probe() -> str:
        from eval.metrics import create
        from eval.metrics.base import Samples
        from eval.prompts import Prompt

        metric = create(name)
        metric.update(Samples(noise(2, frames=17), tuple(Prompt(f"probe-{i}", "a red cube", i) for i in range(2))))
        return _scored(metric)

    return probe


def published() -> dict[str, Callable[[str, Path | None], Callable[[], str]]]:
    """Probes of metrics whose weights are not ours to ship: a machine without them is not broken."""
    from eval.metrics.preference import KINDS

    return {
        **dict.fromkeys(KINDS, preference_probe),
        **dict.fromkeys(EXTRACTORS, extractor_probe),
        "aesthetic": aesthetic_probe,
        "geneval": geneval_probe,
        "vbench-flickering": flickering_probe,
    }


def runtime_probe(runtime: str) -> Callable[[], str]:
    def probe() -> str:
        from service.runtimes import RuntimeUnavailable, choose

        try:
            name, precision = choose(runtime, "float32" if runtime == "onnx" else "auto")
        except RuntimeUnavailable as error:
            raise EvalError(str(error)) from None
        return f"{name}, {precision}"

    return probe


def environment_probe(name: str) -> Callable[[], str]:
    """Whether an interpreter of its own is there; `python -m eval.env` makes it."""
    return lambda: str(interpreter(name))


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

    names = list(only) if only else [name for name in registered() if not name.startswith("test-")]
    elsewhere, checks = published(), []
    for name in names:
        if name in elsewhere:
            checks.append(replace(check(name, elsewhere[name](name, folder)), needed=bool(only)))
        elif name in PROBES:
            checks.append(check(name, metric_probe(name, folder)))
        elif name not in registered():
            checks.append(Check(name, False, f"--metric is {name!r}; {nearest(name, registered())}"))
        else:
            checks.append(Check(name, False, "no suite uses this metric; add one to eval/suites and to PROBES"))
    environments = [replace(check(f"env {name}", environment_probe(name)), needed=False) for name in recipe_names()]
    if only:
        return checks
    checks += [check(f"runtime {runtime}", runtime_probe(runtime)) for runtime in ("onnx", "openvino")]
    return [*checks, *environments, check("store", store_probe(store)), check("disk", space_probe(store.parent))]


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
