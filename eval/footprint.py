"""How much memory one picture takes: a process of its own opens a bundle, makes one, and says its peak.

    python -m eval.footprint bundles/scenes-sdxl --steps 4 --prompt "a red cube"

A process that also judges, or has opened another bundle before, cannot tell whose memory it is. As in a service, torch
is not imported.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from distill.bundle import Bundle, BundleError
from eval.errors import EvalError
from service.runtimes import RuntimeUnavailable, generate, open_runtime
from service.runtimes.base import Precision, RuntimeChoice

if TYPE_CHECKING:
    from eval.prompts import Prompt
    from eval.sources import BundleSource

_SECONDS = 600.0


def peak_mib() -> float:
    """The most memory that this process has held so far, MiB.

    Linux keeps ru_maxrss across exec, where it is still that of the process which started this one; VmHWM is our own.
    Elsewhere ru_maxrss has to do, in bytes on macOS and KiB otherwise.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(source: BundleSource, prompt: Prompt) -> float:
    """The peak in MiB of a new process that makes one picture as ``source`` would. Raises EvalError."""
    words = [*source.command, "--prompt", prompt.text, "--seed", str(prompt.seed)]
    words += [] if prompt.label is None else ["--label", str(prompt.label)]
    try:
        command = [sys.executable, "-m", "eval.footprint", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise EvalError(f"{source.name} made no picture in {_SECONDS:g} s; look at the machine") from None
    try:
        return float(done.stdout.split()[-1])
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EvalError(f"the memory of {source.name} could not be measured: {reason}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.footprint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--steps", type=int, help="default: the bundle's own")
    parser.add_argument("--batch", type=int, default=1, help="rows that the runtime is opened for; default: 1")
    parser.add_argument("--runtime", choices=get_args(RuntimeChoice), default="auto")
    parser.add_argument("--precision", choices=get_args(Precision), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--prompt", default="a red cube")
    parser.add_argument("--seed", type=int, default=7_000_000)
    parser.add_argument("--label", type=int, help="of models that take labels instead of prompts")
    args = parser.parse_args(arguments)
    try:
        bundle = Bundle.open(args.bundle)
        runtime = open_runtime(
            bundle, threads=args.threads, max_batch=args.batch, runtime=args.runtime, precision=args.precision
        )
        asked: Any = [args.prompt] if args.label is None else {"labels": np.array([args.label], dtype=np.int64)}
        generate(runtime, bundle.manifest, asked, [args.seed], args.steps)
    except (BundleError, RuntimeUnavailable, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(f"{peak_mib():.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
