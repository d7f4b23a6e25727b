"""The command, and VBench itself where its interpreter has been made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from distill.data.scenes import render_clip
from distill.data.world import sample_scene
from eval import env
from eval.clips import write_clip
from eval.damage import damaged_clip
from eval.vbench import __main__ as command
from eval.vbench.driver import evaluate
from eval.vbench.protocol import clips, of_dimensions
from eval.vbench.scores import DIMENSIONS
from eval.workers import Worker

pytest.importorskip("av", reason="clips need PyAV: pip install av")
HONEST = [sys.executable, str(Path(__file__).parent / "honest_worker.py"), "honest"]
installed = pytest.mark.skipif(
    env.state("vbench") != "ready", reason="VBench has no interpreter here: python -m eval.env create vbench"
)


def moving(index: int) -> np.ndarray:
    scene = sample_scene(7_990_000, index, moving=True)
    return np.ascontiguousarray(render_clip(scene, 8, 64).numpy().transpose(1, 0, 2, 3))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt_en": f"scene {i}", "dimension": ["temporal_flickering", "scene"]} for i in range(2)]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(rows))
    return path


def test_the_command_plans_scores_and_writes(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompts", str(prompts), "--per-prompt", "1", "--dimension", "temporal_flickering"]
    assert command.main(["plan", *options]) == 0
    planned = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for index, row in enumerate(planned):
        write_clip(tmp_path / row["file"], moving(index))
    monkeypatch.setattr(command, "open_worker", lambda: Worker(HONEST, "vbench", probe=(0.25, 1e-9)))
    out = tmp_path / "vbench.json"
    options += ["--dimension", "scene", "--out", str(out)]
    assert command.main(["score", str(tmp_path), *options]) == 0
    shown = capsys.readouterr().out
    assert "scene                   not run: its weights are missing" in shown and "n/a" in shown
    written = json.loads(out.read_text())
    assert set(written["scored"]["temporal_flickering"]["clips"]) == {row["file"] for row in planned}
    assert written["total"] is None
    (tmp_path / planned[0]["file"]).unlink()
    assert command.main(["score", str(tmp_path), *options]) == 3
    assert "scene 0-0.mp4 is missing" in capsys.readouterr().err


def test_without_the_interpreter_the_command_that_makes_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LEAPFROG_ENVIRONMENTS", str(tmp_path))
    assert command.main(["plan"]) == 3
    assert "vbench is absent; run: python -m eval.env create vbench" in capsys.readouterr().err


@installed
@pytest.mark.slow
def test_vbenchs_own_flickering_sees_planted_damage_in_the_right_order(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "no weights"))
    entries = command.read_entries(prompts, None)
    shown = {"clean": [moving(0), moving(1)]}
    for damage in ("frames-frozen", "frames-shuffled", "frames-flickering"):
        shown[damage] = [damaged_clip(frames, damage, seed) for seed, frames in enumerate(shown["clean"])]
    raw = {}
    with command.open_worker() as worker:
        for name, made in shown.items():
            for index, frames in enumerate(made):
                write_clip(tmp_path / name / f"scene {index}-0.mp4", frames)
            result = evaluate(tmp_path / name, worker, entries, ["temporal_flickering", "scene"], per_prompt=1)
            assert "tag2text_swin_14m.pth is missing" in result.not_run["scene"]
            raw[name] = result.scored["temporal_flickering"].raw
            own = [1 - np.abs(np.diff(frames.astype(float), axis=0)).mean() / 255 for frames in made]
            assert raw[name] == pytest.approx(np.mean(own), abs=1e-6)
    assert raw["frames-frozen"] == 1.0 > raw["clean"] > raw["frames-shuffled"] > raw["frames-flickering"]


@installed
def test_vbenchs_own_prompts_are_the_protocols() -> None:
    entries = command.official_entries()
    wanted = clips(entries, tuple(DIMENSIONS))
    assert len(entries) == 946 and len(wanted) == 944 * 5 == len({clip.file for clip in wanted})
    assert len({clip.file.lower() for clip in wanted}) == 943 * 5
    counts = {name: len(of_dimensions(entries, [name])) for name in DIMENSIONS}
    assert counts["human_action"] == 100 and counts["temporal_flickering"] == 75 and sum(counts.values()) == 1362
