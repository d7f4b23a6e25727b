"""The strict driver over clips of moving scenes and a worker that is a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distill.data.scenes import render_clip
from distill.data.world import sample_scene
from eval.clips import write_clip
from eval.damage import damaged_clip
from eval.errors import EvalError
from eval.statistics import bootstrap_mean
from eval.vbench.driver import FaultyClips, Result, evaluate, joint_intervals
from eval.vbench.protocol import Entry
from eval.vbench.scores import DIMENSIONS, total_score
from eval.workers import Worker

pytest.importorskip("av", reason="clips need PyAV: pip install av")

PROMPTS = ("a red cube rolling", "a Blue sphere", "two cones")
ENTRIES = [Entry(prompt, ("temporal_flickering", "imaging_quality", "scene", "color")) for prompt in PROMPTS]
PROGRAM = str(Path(__file__).parent / "honest_worker.py")


def clip(index: int, frames: int = 5) -> np.ndarray:
    scene = sample_scene(7_990_000, index, moving=True)
    return np.ascontiguousarray(render_clip(scene, frames, 32).numpy().transpose(1, 0, 2, 3))


@pytest.fixture(scope="module")
def scenes() -> list[np.ndarray]:
    return [clip(index) for index in range(2 * len(PROMPTS))]


@pytest.fixture
def folder(tmp_path: Path, scenes: list[np.ndarray]) -> Path:
    for index, frames in enumerate(scenes):
        write_clip(tmp_path / f"{PROMPTS[index // 2]}-{index % 2}.mp4", frames)
    return tmp_path


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with start("honest") as found:
        yield found


def start(manner: str) -> Worker:
    return Worker([sys.executable, PROGRAM, manner], "vbench", probe=(0.25, 1e-9))


def score(folder: Path, worker: Worker, *names: str) -> Result:
    return evaluate(folder, worker, ENTRIES, names or ("temporal_flickering",), per_prompt=2)


def test_every_clip_is_scored_and_a_dimension_is_their_mean(
    folder: Path, worker: Worker, scenes: list[np.ndarray]
) -> None:
    expected = [1 - np.abs(np.diff(frames.astype(float), axis=0)).mean() / 255 for frames in scenes]
    result = score(folder, worker, "temporal_flickering", "imaging_quality", "scene")
    found = result.scored["temporal_flickering"]
    assert list(found.clips) == [f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(2)]
    np.testing.assert_allclose([*found.clips.values()], expected)
    assert found.interval == bootstrap_mean(np.array([*found.clips.values()]), np.repeat(PROMPTS, 2).tolist())
    assert result.scored["imaging_quality"].raw == pytest.approx(found.raw)
    assert result.about["frames"] == 5 and result.about["fps"] == 8


def test_what_cannot_run_is_not_run_and_there_is_no_total(folder: Path, worker: Worker) -> None:
    result = score(folder, worker, "temporal_flickering", "scene")
    assert result.not_run == {"scene": "its weights are missing; put them there"}
    assert "scene" not in result.scored and result.quality is None and result.total is None


def test_faulty_clips_are_all_named_and_nothing_is_scored(folder: Path, worker: Worker) -> None:
    broken = [f"{prompt}-{i}.mp4" for prompt in PROMPTS[:2] for i in range(2)]
    missing, corrupt, short, other = (folder / file for file in broken)
    missing.unlink()
    corrupt.write_bytes(b"no clip")
    write_clip(short, clip(2)[:2])
    write_clip(other, clip(3, frames=6))
    with pytest.raises(FaultyClips, match="has 4 clips that cannot be scored, so nothing was") as caught:
        score(folder, worker)
    reasons = (
        "is missing",
        "cannot be decoded",
        "has 2 frames and needs 3",
        "is 6 frames of 32×32 at 8/s and the others",
    )
    assert list(caught.value.faults) == broken
    for (file, why), reason in zip(caught.value.faults.items(), reasons, strict=True):
        assert why.startswith(file) and reason in why


def test_clips_of_five_seconds_are_another_benchmarks(folder: Path, worker: Worker) -> None:
    write_clip(folder / f"{PROMPTS[2]}-0.mp4", clip(4), fps=1)
    with pytest.raises(FaultyClips, match=r"two cones-0.mp4 lasts 5.00 s and VBench takes less than 5 s"):
        score(folder, worker)


def test_a_stray_file_changes_nothing(folder: Path, worker: Worker) -> None:
    before = score(folder, worker)
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "another prompt-0.mp4").write_bytes(b"")
    assert score(folder, worker).scored == before.scored


def test_clips_of_two_prompts_that_are_one_file_are_refused(folder: Path, worker: Worker) -> None:
    (folder / f"{PROMPTS[1]}-0.mp4").unlink()
    (folder / f"{PROMPTS[1]}-0.mp4").hardlink_to(folder / f"{PROMPTS[0]}-0.mp4")
    with pytest.raises(FaultyClips, match="are one file"):
        score(folder, worker)


@pytest.mark.parametrize(
    ("manner", "message"), [("nan", "scores nan in temporal_flickering"), ("forgetful", "got no score in temporal")]
)
def test_a_clip_without_a_finite_score_is_named_and_never_averaged_away(
    manner: str, message: str, folder: Path
) -> None:
    with start(manner) as worker, pytest.raises(FaultyClips, match=message) as caught:
        score(folder, worker)
    assert list(caught.value.faults) == [f"{PROMPTS[0]}-1.mp4"]


def test_only_colours_may_leave_out_a_clip_with_nothing_to_judge(folder: Path) -> None:
    with start("forgetful") as worker:
        found = score(folder, worker, "color").scored["color"]
    assert found.undefined == 1 and len(found.clips) == 5


def test_planted_damage_is_seen_in_the_right_order(folder: Path, worker: Worker, scenes: list[np.ndarray]) -> None:
    raw = {"clean": score(folder, worker).scored["temporal_flickering"].raw}
    for damage in ("frames-frozen", "frames-shuffled", "frames-flickering"):
        for index, frames in enumerate(scenes):
            write_clip(folder / f"{PROMPTS[index // 2]}-{index % 2}.mp4", damaged_clip(frames, damage, index))
        raw[damage] = score(folder, worker).scored["temporal_flickering"].raw
    assert raw["frames-frozen"] == 1.0 > raw["clean"] > raw["frames-shuffled"] > raw["frames-flickering"]


def test_a_dimension_without_prompts_is_refused(folder: Path, worker: Worker) -> None:
    with pytest.raises(EvalError, match="no prompt is scored in dynamic_degree"):
        score(folder, worker, "dynamic_degree", "temporal_flickering")


def test_total_has_one_interval_for_dimensions_that_share_prompts() -> None:
    """All dimensions the same numbers on the same prompts: Total's error is |slope|·se, not that of 16 samples."""
    rng = np.random.default_rng(1)
    files = {f"p{i}-{k}.mp4": f"p{i}" for i in range(200) for k in range(2)}
    level = {prompt: rng.normal(0.5, 0.1) for prompt in dict.fromkeys(files.values())}
    values = {file: level[prompt] for file, prompt in files.items()}
    found = joint_intervals(dict.fromkeys(DIMENSIONS, values), files)["total"]
    assert found is not None
    same = dict.fromkeys(DIMENSIONS, float(np.mean([*values.values()])))
    assert found.value == total_score(same)
    more, less = total_score({n: v + 0.5 for n, v in same.items()}), total_score({n: v - 0.5 for n, v in same.items()})
    assert more is not None and less is not None
    se = np.std([*level.values()], ddof=1) / np.sqrt(200)
    assert found.se == pytest.approx((more - less) * se, rel=0.1)
    assert found.low < found.value < found.high
    alone = joint_intervals({"scene": values}, files)
    assert alone == {"quality": None, "semantic": None, "total": None}
