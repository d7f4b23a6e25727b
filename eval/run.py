"""Score a bundle, a service or a folder of pictures or clips on a suite, and keep the result.

    python -m eval.run bundles/scenes-sdxl --suite scenes-trained --steps 4
    python -m eval.run bundles/scenes-sdxl --suite scenes-trained --runtime openvino --precision bfloat16 --threads 1
    python -m eval.run http://127.0.0.1:3000 --suite scenes-held-out --samples 200
    python -m eval.run renders --suite scenes-trained        # what the judges say of the truth
    python -m eval.run bundles/scenes-wan --suite scenes-wan-trained --steps 4               # clips

    torchrun --nproc-per-node 2 -m eval.run bundles/scenes-sdxl --suite scenes-fid           # or --shard 1/2, 2/2

Pictures are cached by content, so a run that was interrupted goes on where it stopped when it is started again. Exit
codes: 0 scored and stored, 3 the measurement could not be made.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from distill.reward_names import parse_reward
from eval import judges
from eval.errors import EvalError
from eval.golden import unverified
from eval.metrics import Metric, Samples, Score, create, preference
from eval.prompts import Prompt, Suite, build_prompts, load_suite, suite_names
from eval.shards import Shard, Shares, parse_shard
from eval.sources import Source, generate, open_source, write_folder
from eval.store import RunInfo, Store
from service.runtimes.base import Precision, RuntimeChoice
from service.settings import usable_cores

DEFAULT_STORE = Path("runs/eval/scores.sqlite")
DEFAULT_CACHE = Path("runs/eval/samples")
JUDGED = {
    "aesthetic",
    "fid",
    "fd-dinov2",
    "cmmd",
    "kid",
    "precision",
    "recall",
    "reward",
    "composition",
    "digit-accuracy",
    "diversity",
    "geneval",
    "inception-score",
    "motion-accuracy",
    "frame-composition",
    "subject-consistency",
    "fvd",
    "kvd",
}
"""Metrics that load a network from the folder of judges."""
MEASURED = {"memory", "parity"}
"""Metrics that ask the source itself, not only for its pictures."""
_PACKAGES = ("numpy", "torch", "torch-fidelity", "transformers", "onnxruntime", "openvino", "pillow")


def run(
    source: Source,
    suite: Suite,
    *,
    store: Path = DEFAULT_STORE,
    samples: int | None = None,
    label: str | None = None,
    folder: Path | None = None,
    cache: Path = DEFAULT_CACHE,
    keep: Path | None = None,
    command: str = "",
    quiet: bool = False,
) -> tuple[str, list[Score]]:
    """Generate, score and store. Returns the run's id and its scores; a failure is stored as such and raised."""
    prompts = build_prompts(suite, samples)
    metrics = _metrics(source, suite, folder)
    with Store(store) as db:
        identifier = db.begin(_info(source, suite, prompts, label or source.name, command))
        done = pending = 0
        try:
            unit = "clip" if suite.frames else "image"
            bar = tqdm(total=len(prompts), desc=f"{source.name}: {suite.name}", unit=unit, disable=quiet)
            with bar:
                for made in generate(source, prompts, batch=suite.batch, cache=cache if suite.cache else None):
                    pending = len(made.prompts)
                    _check_media(source, suite, metrics, made)
                    for metric in metrics:
                        metric.update(made)
                    done, pending = done + pending, 0
                    if keep is not None:
                        write_folder(keep, made, source.about.get("fps", 8.0))
                    bar.update(len(made.prompts))
            scores = [metric.compute() for metric in metrics]
            db.complete(identifier, prompts, scores)
        except BaseException as error:
            with suppress(Exception):
                db.fail(identifier, f"{type(error).__name__}: {error}", scored=done, failed=pending)
            raise
    return identifier, scores


def run_shard(
    source: Source,
    suite: Suite,
    shard: Shard,
    *,
    store: Path = DEFAULT_STORE,
    samples: int | None = None,
    label: str | None = None,
    folder: Path | None = None,
    cache: Path = DEFAULT_CACHE,
    command: str = "",
    quiet: bool = False,
) -> tuple[str, list[Score]] | list[int]:
    """Generate and judge a share. Returns the run of all shares where this was the last one, else those that miss.

    None are missing, and there is no run to return, where another share put all of them together meanwhile.
    """
    if not suite.cache:
        raise EvalError(f"suite {suite.name!r} measures what making takes, which shares would distort; omit --shard")
    prompts = build_prompts(suite, samples)
    metrics = _metrics(source, suite, folder)
    info = _info(source, suite, prompts, label or source.name, command)
    shares = Shares(cache, shard, _identity(info, metrics))
    if shard.index in shares.missing:
        bar = tqdm(desc=f"{source.name}: {suite.name} {shard}", unit="clip" if suite.frames else "image", disable=quiet)
        chunks = []
        with bar:
            for made in generate(source, prompts, batch=suite.batch, cache=cache, share=(shard.index - 1, shard.of)):
                _check_media(source, suite, metrics, made)
                for metric in metrics:
                    metric.update(made)
                chunks.append([metric.take() for metric in metrics])
                bar.update(len(made.prompts))
        shares.keep(chunks)
    with shares.last() as last:
        if not last:
            return [] if shard.index in shares.missing else shares.missing
        shares.put_together(metrics)
        scores = [metric.compute() for metric in metrics]
        with Store(store) as db:
            identifier = db.begin(info)
            db.complete(identifier, prompts, scores)
    return identifier, scores


def _identity(info: RunInfo, metrics: Sequence[Metric]) -> dict[str, Any]:
    """Everything that decides what a share holds."""
    return {
        "source": [info.source["name"], info.source["identity"]],
        "suite": info.suite_resolved,
        "expected": info.expected,
        "label": info.label,
        "judges": [metric.judge for metric in metrics],
        "versions": info.versions,
    }


def _metrics(source: Source, suite: Suite, folder: Path | None) -> list[Metric]:
    """The suite's metrics, on as many threads as the bundle has: sums by another number have another last bit."""
    import torch

    torch.set_num_threads(source.about.get("threads") or usable_cores())
    return [_metric(name, dict(options), folder, source) for name, options in suite.metrics.items()]


def _metric(name: str, options: dict[str, Any], folder: Path | None, source: Source) -> Metric:
    if name in JUDGED:
        options["folder"] = folder
    if name in MEASURED:
        options["source"] = source
    if name == "reward":
        options["trained_on"] = _was_trained_on(source, options.get("judge", "scenes-reward"))
    if name in preference.KINDS:
        options["trained_on"] = _was_trained_on(source, preference.KINDS[name])
    return create(name, **options)


def _check_media(source: Source, suite: Suite, metrics: Sequence[Metric], made: Samples) -> None:
    """Raises EvalError when the source made, or a metric judges, something else than the suite asks for."""
    if made.frames != suite.frames:
        kinds = [f"clips of {frames} frames" if frames else "pictures" for frames in (made.frames, suite.frames)]
        raise EvalError(f"{source.name} makes {kinds[0]} and suite {suite.name} asks for {kinds[1]}; use another suite")
    media = "clips" if made.frames else "pictures"
    for metric in metrics:
        if metric.media not in (media, "any"):
            raise EvalError(f"{metric.name} judges {metric.media} and suite {suite.name} is of {media}; leave it out")


def _was_trained_on(source: Source, judge: str) -> bool:
    """Whether the source's recipe names the judge, a folder or a published reward, as the reward of its advantage."""
    recipe = source.about.get("provenance", {}).get("recipe", {})
    reward = (recipe.get("advantage") or {}).get("reward")
    return reward is not None and judge in (Path(reward).name, parse_reward(reward)[0])


def _info(source: Source, suite: Suite, prompts: Sequence[Prompt], label: str, command: str) -> RunInfo:
    revision, dirty = code_revision()
    return RunInfo(
        label=label,
        command=command,
        suite=suite.name,
        suite_resolved=suite.model_dump(mode="json"),
        world=suite.world,
        source={"name": source.name, "identity": source.identity, "about": source.about},
        hardware=hardware(),
        versions=package_versions(),
        revision=revision,
        dirty=dirty,
        expected=len(prompts),
    )


def code_revision() -> tuple[str, bool]:
    """The commit that runs and whether the code differs from it; ("unknown", True) outside a git checkout."""

    def git(*words: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def hardware() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    found: dict[str, Any] = {"processor": model, "cores": os.cpu_count(), "system": platform.system()}
    with suppress(ValueError, OSError, AttributeError):
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return found


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def describe_score(score: Score, store: Path = DEFAULT_STORE) -> str:
    low, high = score.ci
    line = f"{score.metric:12} {score.value:10.4f} {score.unit:8} [{low:.4f}, {high:.4f}]  n={score.n}"
    line += f"  {score.direction} is better"
    if score.trained_on:
        line += "  (training used this reward)"
    if unverified(score.metric, score.protocol, store):
        line += "  (unverified weights: run python -m eval.verify_golden)"
    if score.n < score.smallest_n:
        line += f"  (too few to report: needs {score.smallest_n})"
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"suites: {', '.join(suite_names())}",
    )
    parser.add_argument("source", help="a bundle's folder, a service's URL, a folder of PNG or MP4 files, or renders")
    parser.add_argument("--suite", required=True, help="a name from eval/suites or the path of a YAML file")
    parser.add_argument("--steps", type=int, help="sampling steps; default: the bundle's own")
    parser.add_argument("--samples", type=int, help="only the first N samples of the suite")
    parser.add_argument("--label", help="the row of the result table; default: the source's name and steps")
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    parser.add_argument(
        "--judges", type=Path, default=judges.DEFAULT_FOLDER, help="folder of judges; default: %(default)s"
    )
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="generations; default: %(default)s")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="also write every sample there as a file")
    parser.add_argument(
        "--runtime",
        choices=get_args(RuntimeChoice),
        default="auto",
        help="what computes a bundle; default: %(default)s",
    )
    parser.add_argument(
        "--precision", choices=get_args(Precision), default="float32", help="of its denoiser; default: %(default)s"
    )
    parser.add_argument("--threads", type=int, help="threads of the bundle and of the judges; default: all cores")
    parser.add_argument("--shard", metavar="I/N", help="make and judge one of N shares; the last to end stores the run")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(arguments)
    command = "python -m eval.run " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    try:
        shard = parse_shard(args.shard)
        if shard is not None and args.keep is not None:
            raise EvalError(f"--keep is {args.keep} and --shard {shard}; keep pictures of whole runs only")
        suite = load_suite(args.suite)
        source = open_source(
            args.source,
            steps=args.steps,
            threads=args.threads,
            batch=suite.batch,
            runtime=args.runtime,
            precision=args.precision,
            frames=suite.frames,
        )
        options: dict[str, Any] = {
            "store": args.store,
            "samples": args.samples,
            "label": args.label,
            "folder": args.judges,
            "cache": args.cache,
            "command": command,
            "quiet": args.quiet,
        }
        if shard is None:
            identifier, scores = run(source, suite, keep=args.keep, **options)
        else:
            found = run_shard(source, suite, shard, **options)
            if isinstance(found, list):
                others = f"{', '.join(map(str, found))} of {shard.of} are missing, and the last of them stores the run"
                print(f"kept share {shard}; {others if found else 'another one has stored the run'}")
                return 0
            identifier, scores = found
    except (EvalError, OSError, sqlite3.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    for score in scores:
        print(describe_score(score, args.store))
    print(f"wrote run {identifier} to {args.store}" + (f" and samples to {args.keep}" if args.keep else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
