"""Write a bundle's scores from the store into its manifest, so that it carries them wherever it goes.

    python -m eval.inscribe bundles/scenes-sdxl

Only runs of exactly these weights count (the digest over the bundle's files, which scores do not enter), the newest per
suite and number of steps. Engines and weights stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.bundle import Bundle, BundleError, write_manifest
from eval.errors import EvalError
from eval.run import DEFAULT_STORE
from eval.store import Store

KEPT = ("value", "low", "high", "n", "unit", "direction", "trained_on")


def scores_of(store: Store, digest: str) -> dict[str, Any]:
    """{suite: {steps: {metric: {value, low, high, n, …}}}} of complete runs of the weights ``digest``."""
    found: dict[str, Any] = {}
    for run in store.runs():
        identity = run["source"]["identity"] or {}
        if identity.get("digest") != digest or "damage" in identity:
            continue
        by_steps = found.setdefault(run["suite"], {})
        if str(identity["steps"]) not in by_steps:  # runs come newest first
            results = store.results(run["id"])
            by_steps[str(identity["steps"])] = {m: {k: r[k] for k in KEPT} for m, r in results.items()}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.inscribe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        bundle = Bundle.open(args.bundle)
        if not args.store.is_file():
            raise EvalError(f"{args.store} is missing; score something first with python -m eval.run")
        with Store(args.store) as store:
            scores = scores_of(store, bundle.digest)
        if not scores:
            raise EvalError(f"{args.store} holds no complete run of {args.bundle}; score it with python -m eval.run")
        write_manifest(args.bundle, bundle.manifest.model_copy(update={"scores": scores}))
    except (BundleError, EvalError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(f"wrote the scores of {', '.join(sorted(scores))} into {args.bundle / 'bundle.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
