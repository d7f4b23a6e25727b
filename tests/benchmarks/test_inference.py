"""The benchmark of runtimes: its distances, and a whole run on the tiny bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.inference import KINDS, MAX_DB, Kind, compare, main, open_kinds, parse_kinds
from distill.bundle import Bundle
from service.runtimes.openvino import has_bfloat16


def test_distance_of_pictures_is_in_levels_and_decibels_of_255(rng: np.random.Generator) -> None:
    reference = rng.integers(10, 200, (4, 8, 8, 3), dtype=np.uint8)
    assert compare(reference, reference) == (MAX_DB, MAX_DB, 0)
    found = reference.copy()
    found[:3] += 1
    found[3] += 10
    median, worst, levels = compare(found, reference)
    assert levels == 10
    assert median == pytest.approx(20 * np.log10(255), abs=0.06)
    assert worst == pytest.approx(20 * np.log10(25.5), abs=0.06)


def test_distance_of_floats_is_over_the_range_of_the_row(rng: np.random.Generator) -> None:
    row = rng.standard_normal((4, 8, 8)).astype(np.float32)
    error = rng.standard_normal(row.shape).astype(np.float32) * 1e-3
    large = np.array([1, 10, 100], dtype=np.float32)[:, None, None, None]
    median, worst, levels = compare(large * (row + error), large * row)
    expected = 20 * np.log10(np.ptp(row) / np.sqrt(np.mean(error.astype(np.float64) ** 2)))
    assert levels is None
    assert median == pytest.approx(expected, abs=0.1)
    assert worst == pytest.approx(expected, abs=0.1)


def test_a_run_measures_every_runtime_and_keeps_other_bundles(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    out.write_text('{"another": {}}')
    words = [str(tiny_bundle), "--steps", "2", "--threads", "1", "--batches", "1,2", "--repeats", "1"]
    words += ["--runtimes", "torch,onnx,openvino,tensorrt", "--teacher", str(tiny_bundle)]
    monkeypatch.setattr(sys, "argv", ["inference", *words, "--out", str(out)])
    main()
    results = json.loads(out.read_text())
    assert set(results) == {"another", "tiny-sdxl"}
    entry = results["tiny-sdxl"]
    kinds = {"torch float32", "torch bfloat16", "onnx float32", "openvino float32"}
    kinds |= {"openvino bfloat16"} if has_bfloat16() else set()
    assert set(entry["runtimes"]) == kinds
    assert all(entry[key] for key in ("digest", "processor", "cores", "python"))
    assert {(row["what"], row["batch"]) for row in entry["rows"]} == {
        (what, batch)
        for what in ("teacher, 4 steps", "text", "step of 2", "decode", "picture, 2 steps")
        for batch in (1, 2)
    }
    assert entry["rows"][0]["what"] == "teacher, 4 steps" and entry["teacher"]["steps"] == 4
    for row in entry["rows"]:
        assert (row["over_teacher"] is not None) == row["what"].startswith("picture")
    for row in entry["rows"]:
        assert row["ms"] > 0 and row["times"] > 0
        exact = row["runtime"] in ("onnx", "openvino") and row["precision"] == "float32"
        if exact and row["max_levels"] is not None:
            assert row["max_levels"] <= 1
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed and "without tensorrt in float32: tensorrt was asked for" in printed
    with Image.open(tmp_path / "results-tiny-sdxl.png") as picture:
        assert picture.size == (792, 462)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
def test_torch_compile_computes_what_torch_computes(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    kinds: list[Kind] = [("torch", "float32"), ("compiled", "float32")]
    (eager, _), (compiled, _) = open_kinds(bundle, 1, 1, kinds).values()
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    theirs, ours = (runtime.decode(latents).astype(int) for runtime in (eager, compiled))
    assert np.abs(ours - theirs).max() <= 1
    assert type(compiled._decoder._module).__name__ == "OptimizedModule"  # type: ignore[attr-defined]


def test_an_unknown_runtime_is_refused_with_the_nearest_name() -> None:
    assert parse_kinds("onnx,openvino") == [kind for kind in KINDS if kind[0] in ("onnx", "openvino")]
    with pytest.raises(ValueError, match="--runtimes has 'opnvino'; did you mean 'openvino'"):
        parse_kinds("opnvino")


def test_steps_that_the_bundle_lacks_are_refused(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["inference", str(tiny_bundle), "--steps", "3"])
    with pytest.raises(SystemExit):
        main()
    assert "--steps is 3 but the bundle samples in [1, 2, 4, 8]" in capsys.readouterr().err
