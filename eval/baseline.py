"""The pinned baseline of a bundle: the release that every night is held against. It moves only by hand, with a reason.

    python -m eval.baseline pin bundles/scenes-sdxl --reason "first release"
    python -m eval.baseline list

Pinning takes the newest night's run of each gated suite with exactly these weights, and copies the bundle, so that a
suspicion can be checked later on prompts that nobody has seen. Exit codes: 0 done, 3 impossible.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.bundle import Bundle, BundleError
from eval.errors import EvalError
from eval.gates import Gates, load_gates
from eval.run import DEFAULT_STORE
from eval.store import Store


def pin(store: Store, bundle: Bundle, gates: Gates, reason: str, *, folder: Path) -> dict[str, Any]:
    """Pin and return the baseline's row. folder: where bundles of baselines are kept, by digest.

    Raises EvalError when a gated suite has no whole, undamaged run of these weights.
    """
    name = bundle.manifest.name
    runs = {}
    for suite in gates.suites:
        stem = Path(suite).stem
        ours = (run for run in store.runs(suite=stem) if _is_of(run, name, bundle.digest) and _is_whole(run))
        run = next(ours, None)
        if run is None:
            raise EvalError(f"{stem} has no whole run of {bundle.path} as it is; let python -m eval.nightly score it")
        runs[suite] = run["id"]
    copy = folder / bundle.digest[:16]
    if not copy.is_dir():
        unfinished = folder / f"{bundle.digest[:16]}.{os.getpid()}.tmp"
        shutil.copytree(bundle.path, unfinished)
        os.replace(unfinished, copy)
    store.pin(name, runs, bundle.digest, str(copy), reason)
    return store.baselines(name)[0]


def _is_of(run: dict[str, Any], name: str, digest: str) -> bool:
    """Whether a night made this run of exactly these weights: as many steps, on the runtime, as every night will."""
    identity = run["source"]["identity"] or {}
    of_a_night = re.fullmatch(rf"{re.escape(name)}, night \d{{4}}-\d\d-\d\d", run["label"]) is not None
    return of_a_night and identity.get("digest") == digest and "damage" not in identity


def _is_whole(run: dict[str, Any]) -> bool:
    """Whether every sample of the suite was scored, not only the first ones for a quick look."""
    suite = run["resolved"]
    return bool(run["scored"] == suite["prompts"]["count"] * suite["seeds_per_prompt"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.baseline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True)
    pinning = commands.add_parser("pin", help="make the newest runs of a bundle the baseline")
    pinning.add_argument("bundle", type=Path)
    pinning.add_argument("--reason", required=True, help="why, for whoever reads the report")
    pinning.add_argument("--gates", help="default: the bundle's name")
    listing = commands.add_parser("list", help="every baseline so far, newest first")
    for command in (pinning, listing):
        command.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        if not args.store.is_file():
            raise EvalError(f"{args.store} is missing; score something first with python -m eval.nightly")
        with Store(args.store) as store:
            if args.what == "list":
                for row in store.baselines():
                    print(f"{row['pinned'][:16]}  {row['bundle']:16} {row['digest'][:12]}  {row['reason']}")
                return 0
            bundle = Bundle.open(args.bundle)
            gates = load_gates(args.gates or bundle.manifest.name)
            row = pin(store, bundle, gates, args.reason, folder=args.store.parent / "baselines")
    except (EvalError, BundleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(f"pinned {row['bundle']} {row['digest'][:12]}: {', '.join(row['runs'].values())}\nwrote {row['path']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
