"""A strict driver of VBench's own functions.

VBench's driver averages what is left when clips are missing or damaged, averages NaN, and its last script counts a
dimension that was not run as 0. Here every clip that the protocol asks for must be there, whole, of one length, size
and rate, and every one must get a finite score; else nothing is scored and each fault is named with its file. What
cannot run here is *not run*, with the reason, and what needs it does not exist.

A dimension is the mean over clips. As all clips are equally long this is also VBench's own mean over frames, and does
not depend on the number of processes as that does.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from eval.clips import read_clip
from eval.errors import EvalError
from eval.statistics import LEVEL, RESAMPLES, Interval, bootstrap_mean
from eval.vbench.protocol import LONGEST_SECONDS, PER_PROMPT, Clip, Entry, clips, of_dimensions
from eval.vbench.scores import DIMENSIONS, dimension, group_score, total_score

LEAST_FRAMES = 3
"""motion_smoothness leaves out every second frame and needs one between two others."""
_SHOWN = 5
_SECONDS = 24 * 3600.0
"""For one dimension: 470 clips on a processor may take hours."""


class Scorer(Protocol):
    """What a worker says and answers; see eval.vbench.worker."""

    hello: dict[str, Any]

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]: ...


class FaultyClips(EvalError):
    """Clips that cannot be scored. faults: why, by file."""

    def __init__(self, folder: Path, faults: dict[str, str]) -> None:
        self.faults = faults
        shown = "; ".join(list(faults.values())[:_SHOWN])
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        super().__init__(f"{folder} has {len(faults)} clips that cannot be scored, so nothing was: {shown}{more}")


@dataclass(frozen=True)
class Scored:
    """One dimension. raw: in [0, 1]; undefined: clips that showed nothing to judge; clips: raw score by file."""

    name: str
    interval: Interval
    undefined: int
    clips: dict[str, float]
    weights: dict[str, str]

    @property
    def raw(self) -> float:
        return self.interval.value


@dataclass(frozen=True)
class Result:
    """scored, not_run: by dimension. quality, semantic, total: in [0, 1] with a joint interval, None where a dimension
    is missing."""

    scored: dict[str, Scored]
    not_run: dict[str, str]
    quality: Interval | None
    semantic: Interval | None
    total: Interval | None
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    folder: Path,
    worker: Scorer,
    entries: Sequence[Entry],
    names: Sequence[str] = tuple(DIMENSIONS),
    *,
    per_prompt: int = PER_PROMPT,
) -> Result:
    """Score a folder of clips. Raises FaultyClips, or EvalError when the worker fails."""
    unable = {name: str(worker.hello["unable"][name]) for name in names if name in worker.hello["unable"]}
    able = [name for name in names if name not in unable]
    shape = check_clips(folder, clips(entries, able, per_prompt))
    scored = {name: _score(folder, worker, entries, name, per_prompt) for name in able}
    of_clips = {name: found.clips for name, found in scored.items()}
    about = {key: worker.hello.get(key) for key in ("versions", "device")}
    about |= {"folder": str(folder), "per_prompt": per_prompt, **shape}
    joint = joint_intervals(of_clips, {clip.file: clip.prompt for clip in clips(entries, able, per_prompt)})
    return Result(scored, unable, joint["quality"], joint["semantic"], joint["total"], about)


# --- are the clips fit to be scored? -------------------------------------------------------------------------------


def check_clips(folder: Path, wanted: Sequence[Clip]) -> dict[str, Any]:
    """Frames, size and rate that all clips share. Raises FaultyClips that names every clip that is not fit."""
    faults: dict[str, str] = {}
    shapes: dict[str, tuple[int, int, int, float]] = {}
    for clip in wanted:
        try:
            frames, fps = read_clip(folder / clip.file)
        except EvalError as error:
            faults[clip.file] = str(error)
            continue
        why = _too_short_or_long(len(frames), fps)
        if why:
            faults[clip.file] = f"{clip.file} {why}"
        else:
            shapes[clip.file] = (len(frames), *frames.shape[2:], round(fps, 3))
    usual = max(shapes.values(), key=list(shapes.values()).count, default=(0, 0, 0, 0.0))
    for file, shape in shapes.items():
        if shape != usual:
            faults[file] = f"{file} is {_describe(shape)} and the others are {_describe(usual)}; make it like them"
    faults |= {file: why for file, why in _confused(folder, wanted).items() if file not in faults}
    if faults:
        raise FaultyClips(folder, faults)
    return dict(zip(("frames", "height", "width", "fps"), usual, strict=True))


def _too_short_or_long(frames: int, fps: float) -> str:
    if frames < LEAST_FRAMES:
        return f"has {frames} frames and needs {LEAST_FRAMES}; make it longer"
    if fps <= 0:
        return "does not say its frames per second; write it again"
    if frames / fps >= LONGEST_SECONDS:
        return f"lasts {frames / fps:.2f} s and VBench takes less than {LONGEST_SECONDS:g} s; cut it"
    return ""


def _describe(shape: tuple[int, int, int, float]) -> str:
    frames, height, width, fps = shape
    return f"{frames} frames of {width}×{height} at {fps:g}/s"


def _confused(folder: Path, wanted: Sequence[Clip]) -> dict[str, str]:
    """Clips of two prompts that are one file, as where a file system takes upper and lower case for the same."""
    owners: dict[tuple[int, int], str] = {}
    faults = {}
    for clip in wanted:
        path = folder / clip.file
        if not path.is_file():
            continue
        place = path.stat().st_dev, path.stat().st_ino
        if owners.setdefault(place, clip.file) != clip.file:
            faults[clip.file] = f"{clip.file} and {owners[place]} are one file; use a file system that tells case apart"
    return faults


# --- one dimension -------------------------------------------------------------------------------------------------


def _score(folder: Path, worker: Scorer, entries: Sequence[Entry], name: str, per_prompt: int) -> Scored:
    rows: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    for entry in of_dimensions(entries, [name]):
        paths = [str((folder / f"{entry.prompt}-{number}.mp4").absolute()) for number in range(per_prompt)]
        files |= dict.fromkeys(paths, entry.prompt)
        rows.append(
            {"prompt_en": entry.prompt, "dimension": [name], "video_list": paths, "auxiliary_info": entry.looks_for}
        )
    if not rows:
        raise EvalError(f"no prompt is scored in {name}; give prompts that are, or leave the dimension out")
    with tempfile.TemporaryDirectory() as scratch:
        info = Path(scratch) / "info.json"
        info.write_text(json.dumps(rows), encoding="utf-8")
        answer = worker.ask({"do": "score", "dimension": name, "info": str(info)}, _SECONDS)
    found = _numbers(folder, name, answer["results"], list(files))
    scale = dimension(name).scale
    values = {Path(path).name: scale * value for path, value in found.items()}
    interval = bootstrap_mean(np.array([*values.values()]), [files[path] for path in found])
    weights = dict(worker.hello.get("weights", {}).get(name, {}))
    return Scored(name, interval, len(files) - len(found), values, weights)


def _numbers(folder: Path, name: str, results: Mapping[str, Any], paths: Sequence[str]) -> dict[str, float]:
    """One finite score per clip. Raises FaultyClips that names the clips without."""
    faults: dict[str, str] = {}
    found: dict[str, float] = {}
    for path in paths:
        file, value = Path(path).name, results.get(path)
        if value is None and not dimension(name).partial:
            faults[file] = f"{file} got no score in {name}; look at the worker's log"
        elif isinstance(value, int | float) and np.isfinite(value):
            found[path] = float(value)
        elif value is not None:
            faults[file] = f"{file} scores {value} in {name}; look at the clip and at the weights"
    if faults:
        raise FaultyClips(folder, faults)
    if not found:
        raise EvalError(f"no clip showed anything to judge in {name}; look at the clips and at the weights")
    return found


# --- all of them ---------------------------------------------------------------------------------------------------

Level = Literal["quality", "semantic", "total"]


def joint_intervals(
    values: Mapping[str, Mapping[str, float]], prompts: Mapping[str, str], *, seed: int = 0
) -> dict[Level, Interval | None]:
    """Quality, Semantic and Total of scores by dimension and file, with one bootstrap over prompts for all dimensions.

    Suites share prompts, so that the errors of their dimensions are not independent. prompts: by file.
    """
    names = list(dict.fromkeys(prompts.values()))
    place = {prompt: i for i, prompt in enumerate(names)}
    raw = {name: float(np.mean([*found.values()])) for name, found in values.items()}
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / max(1, len(names))), RESAMPLES)
    means = {name: _drawn_means(found, prompts, place, drawn) for name, found in values.items()}

    def interval(of: Any) -> Interval | None:
        value = of(raw)
        if value is None:
            return None
        again = np.array([of({name: mean[i] for name, mean in means.items()}) for i in range(RESAMPLES)])
        low, high = np.nanquantile(again, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return Interval(value, float(low), float(high), float(np.nanstd(again)), len(names))

    return {
        "quality": interval(lambda scores: group_score(scores, "quality")),
        "semantic": interval(lambda scores: group_score(scores, "semantic")),
        "total": interval(total_score),
    }


def _drawn_means(
    found: Mapping[str, float], prompts: Mapping[str, str], place: Mapping[str, int], drawn: Any
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(RESAMPLES,) means of a dimension over drawn prompts; NaN where none of its prompts was drawn."""
    sums, counts = np.zeros(len(place)), np.zeros(len(place))
    for file, value in found.items():
        sums[place[prompts[file]]] += value
        counts[place[prompts[file]]] += 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((drawn @ sums) / (drawn @ counts))
