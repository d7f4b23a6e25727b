"""Train the judge of digits, in seconds, and say how good it is.

    python -m eval.digits --out models/digits-cnn

A module of its own, so that the metric which it serves is not registered a second time under the name of the command.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from eval import judges
from eval.metrics.digits import NAME, held_out_accuracy, train


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.digits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=judges.DEFAULT_FOLDER / NAME, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(arguments)
    model = train(args.seed)
    right, count = held_out_accuracy(model)
    model.save(args.out, right / count)
    print(f"right on {right} of {count} held-out scans ({100 * right / count:.1f} %)\nwrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
