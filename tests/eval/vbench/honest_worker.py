"""A worker that keeps VBench's contract and measures one thing itself: how little neighbouring frames differ.

    python honest_worker.py MANNER

MANNER is honest, or one way of failing, so that tests can see what the driver does about it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
MANNER = sys.argv[1]


def steadiness(path: str) -> float:
    """1 − mean|f_{i+1} − f_i|/255."""
    from eval.clips import read_clip

    frames = read_clip(Path(path))[0].astype(np.float64)
    return float(1 - np.abs(np.diff(frames, axis=0)).mean() / 255)


def score(request: dict[str, Any]) -> dict[str, Any]:
    rows = json.loads(Path(request["info"]).read_text())
    paths = [path for row in rows for path in row["video_list"]]
    scale = 100 if request["dimension"] == "imaging_quality" else 1
    results: dict[str, Any] = {path: scale * steadiness(path) for path in paths}
    if MANNER == "nan":
        results[paths[1]] = "nan"
    if MANNER == "forgetful":
        del results[paths[1]]
    return {"results": results}


def say(what: Any) -> None:
    sys.stdout.write((what if isinstance(what, str) else json.dumps(what)) + "\n")
    sys.stdout.flush()


def main() -> None:
    if MANNER == "stillborn":
        sys.stderr.write("no such module")
        raise SystemExit(1)
    probe = 0.5 if MANNER == "miscalibrated" else 0.25
    name = "stranger" if MANNER == "stranger" else "vbench"
    unable = {"scene": "its weights are missing; put them there"}
    say({"hello": name, "probe": probe, "unable": unable, "versions": {"honest": "1"}, "device": "cpu"})
    for line in sys.stdin:
        request = json.loads(line)
        if MANNER == "mortal":
            sys.stderr.write("out of memory")
            os._exit(9)
        if MANNER == "silent":
            time.sleep(60)
        if MANNER == "babbling":
            say("Loading weights …")
        elif MANNER == "refusing":
            say({"error": "RuntimeError: no kernel"})
        else:
            say(score(request))


if __name__ == "__main__":
    main()
