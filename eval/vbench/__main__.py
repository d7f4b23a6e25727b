"""VBench's sixteen dimensions of a folder of clips, by VBench itself in its own interpreter.

    python -m eval.env create vbench
    python -m eval.vbench plan > clips.jsonl                     # every clip there must be: file, prompt, seed
    python -m eval.vbench score FOLDER --out vbench.json         # FOLDER/PROMPT-0.mp4 …
    python -m eval.vbench score FOLDER --prompts mine.json --dimension temporal_flickering --per-prompt 1

Weights lie in VBENCH_CACHE_DIR (default ~/.cache/vbench) under VBench's own names; nothing is downloaded. Exit codes: 0
scored, 3 nothing could be scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from eval import env
from eval.errors import EvalError
from eval.statistics import Interval
from eval.vbench.driver import Result, evaluate
from eval.vbench.protocol import PER_PROMPT, Entry, clips, parse_dimensions, read_entries
from eval.vbench.scores import DIMENSIONS
from eval.workers import Worker

PROBE = 1 - 20 / 255, 1e-6
"""temporal_flickering of the probe clip, whose neighbouring frames are 10 and 30 levels apart."""


def open_worker() -> Worker:
    """VBench's own functions in its own interpreter. Raises EvalError with the command that makes it."""
    python = env.interpreter("vbench")
    return Worker([str(python), "-W", "ignore", str(Path(__file__).parent / "worker.py")], "vbench", probe=PROBE)


def official_entries() -> tuple[Entry, ...]:
    """The 946 entries of the installed package."""
    folder = env.interpreter("vbench").parents[1]
    files = sorted(folder.glob("lib/python*/site-packages/vbench/VBench_full_info.json"))
    if not files:
        raise EvalError(f"{folder} holds no VBench_full_info.json; run: python -m eval.env create vbench")
    return read_entries(files[0])


def table(result: Result) -> list[str]:
    """Lines for people: raw and normalised scores with intervals in percent, and what was not run."""
    lines = []
    for name, dimension in DIMENSIONS.items():
        if name in result.scored:
            found = result.scored[name]
            normal = f"normalised {100 * dimension.normalise(found.raw):6.2f}"
            count = f"{len(found.clips)} clips" + (f", {found.undefined} undefined" if found.undefined else "")
            lines.append(f"{dimension.title:23} {_percent(found.interval)}  {normal}  {count}")
        elif name in result.not_run:
            lines.append(f"{dimension.title:23} not run: {result.not_run[name]}")
    groups = {"Quality": result.quality, "Semantic": result.semantic, "Total": result.total}
    for title, interval in groups.items():
        lines.append(f"{title:23} " + (_percent(interval) if interval else "n/a: some of its dimensions were not run"))
    return lines


def _percent(interval: Interval) -> str:
    value, low, high = (100 * part for part in (interval.value, interval.low, interval.high))
    return f"{value:6.2f} [{low:.2f}, {high:.2f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.vbench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="print the clips that there must be, one JSON object per line")
    score = commands.add_parser("score", help="score a folder of clips")
    score.add_argument("folder", type=Path)
    score.add_argument("--out", type=Path, help="also write everything, with the score of each clip, as JSON")
    for command in (plan, score):
        command.add_argument("--prompts", type=Path, help="other prompts, in the form of VBench_full_info.json")
        command.add_argument("--dimension", action="append", help=f"only this one; default: all {len(DIMENSIONS)}")
        command.add_argument("--per-prompt", type=int, default=PER_PROMPT, help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        names = parse_dimensions(args.dimension)
        entries = read_entries(args.prompts, None) if args.prompts else official_entries()
        if args.command == "plan":
            for clip in clips(entries, names, args.per_prompt):
                print(json.dumps({"file": clip.file, **asdict(clip)}))
            return 0
        with open_worker() as worker:
            result = evaluate(args.folder, worker, entries, names, per_prompt=args.per_prompt)
        if args.out:
            args.out.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")
    except (EvalError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print("\n".join(table(result)))
    if args.out:
        print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
