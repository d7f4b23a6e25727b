"""Do published scorers here give what they must? Pictures and clips from a seed, expected values from eval/golden.yaml.

    python -m eval.verify_golden
    python -m eval.verify_golden --metric hpsv2.1 --source /models/HPS_v2.1_compressed.pt
    python -m eval.verify_golden --metric hpsv2.1 --fill "hpsv2 1.2.0 on the same pictures, H100"

Run it where the weights are. Those that agree are noted beside the store, and scores under them are no longer shown as
*unverified weights*. A scorer without weights here is *not run*, with the reason. Exit codes: 0 nothing differs, 3 a
scorer differs, or one that was named could not be verified.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval import judges
from eval.errors import EvalError, nearest
from eval.golden import GOLDEN, METRICS, fill, measure, note, read_golden, record_of, verify
from eval.run import DEFAULT_STORE, hardware, package_versions


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.verify_golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--metric", action="append", help=f"only this one, of {', '.join(METRICS)}; give several")
    parser.add_argument("--source", default="", help="of one metric's weights: a file, a folder or a hub id")
    parser.add_argument("--judges", type=Path, default=judges.DEFAULT_FOLDER, help="default: %(default)s")
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="default: eval/golden.yaml")
    parser.add_argument("--fill", metavar="SOURCE", help="enter what this machine gives, and say what vouches for it")
    args = parser.parse_args(arguments)
    try:
        names = _named(args.metric, args.source, args.fill)
        if args.fill:
            for name in names:
                values, weights = measure(name, args.judges, args.source)
                fill(args.golden, name, values, weights, args.fill)
                print(f"wrote {len(values)} values of {name} under weights {weights[:12]} to {args.golden}")
        golden = read_golden(args.golden)
        outcomes = [verify(name, golden, lambda n: measure(n, args.judges, args.source)) for name in names]
        about = {"hardware": hardware(), "versions": package_versions()}
        for outcome in outcomes:
            if outcome.weights:
                note(record_of(args.store), outcome, about)
            print(f"{outcome.status:15} {outcome.metric:12} {outcome.text}")
    except (EvalError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    wrong = {"differs", "not run", "unknown weights"} if args.metric else {"differs"}
    return 3 if any(outcome.status in wrong for outcome in outcomes) else 0


def _named(metrics: Sequence[str] | None, source: str, filling: str | None) -> tuple[str, ...]:
    unknown = next((name for name in metrics or () if name not in METRICS), None)
    if unknown is not None:
        raise EvalError(f"--metric is {unknown!r}; {nearest(unknown, METRICS)}")
    if (source or filling) and len(metrics or ()) != 1:
        raise EvalError("--source and --fill are for one metric; name it with --metric")
    return tuple(metrics) if metrics else METRICS


if __name__ == "__main__":
    raise SystemExit(main())
