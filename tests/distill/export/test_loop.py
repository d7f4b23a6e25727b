"""All steps in one graph are the steps one after another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from distill.bundle import Bundle, BundleError
from distill.export import parity
from distill.export.__main__ import main
from distill.export.loop import export_loop
from distill.export.onnx import ExportError
from distill.sampling import noise
from service.runtimes import OnnxRuntime, generate

PROMPTS = ("a small red metal sphere", "a large blue cube left of a green sphere", "x")
SEEDS = (3, 4, 5)


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> OnnxRuntime:
    return OnnxRuntime(Bundle.open(tiny_bundle), threads=1, max_batch=4)


@pytest.mark.parametrize("steps", [1, 4])
def test_one_graph_draws_what_the_runtime_draws(
    tiny_bundle: Path, runtime: OnnxRuntime, tmp_path: Path, steps: int
) -> None:
    """Three rows, which the export itself did not compare, with prompts and noise as in service."""
    (file,) = export_loop(tiny_bundle, steps, tmp_path / "loop.onnx", say=lambda line: None)
    loop = parity.OnnxGraph(file)
    assert loop.inputs == ["input_ids", "noise"] and loop.outputs == ["image"]
    drawn = np.stack([noise(seed, 0, runtime.manifest.latent_shape(), draws=steps + 1) for seed in SEEDS])
    given = {"input_ids": runtime.tokenize(PROMPTS).ids, "noise": drawn}
    (image,) = loop.session.run(["image"], given)
    expected = generate(runtime, runtime.manifest, PROMPTS, SEEDS, steps=steps)
    assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1


def test_weights_are_there_once_and_the_file_says_what_it_is(tiny_bundle: Path, tmp_path: Path) -> None:
    sizes = []
    for steps in (1, 8):
        (file,) = export_loop(tiny_bundle, steps, tmp_path / f"{steps}.onnx", say=lambda line: None)
        about = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
        assert about["leapfrog.steps"] == str(steps)
        assert about["leapfrog.digest"] == Bundle.open(tiny_bundle).digest
        sizes.append(file.stat().st_size)
    files = [*tiny_bundle.glob("*.onnx"), *tiny_bundle.rglob("*.safetensors")]
    assert sizes[0] < 1.3 * sum(file.stat().st_size for file in files)
    assert sizes[1] - sizes[0] < 7 * 150_000  # seven more copies of the nodes, none of the weights


def test_a_loop_that_draws_something_else_is_not_written(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "pictures", lambda *given: np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(ExportError, match="the picture after 2 steps in one graph differs from torch: levels"):
        export_loop(tiny_bundle, 2, tmp_path / "loop.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_unrolled_is_refused(
    tiny_bundle: Path, tiny_sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BundleError, match=r"steps is 3; tiny-sdxl samples in \[1, 2, 4, 8\]"):
        export_loop(tiny_bundle, 3, tmp_path / "loop.onnx")
    with pytest.raises(BundleError, match=r"no onnx engine for 'step'; run: python -m distill\.export"):
        export_loop(tiny_sources, 4, tmp_path / "loop.onnx")
    (tmp_path / "loop.onnx").write_bytes(b"mine")
    assert main([str(tiny_bundle), "--to", "loop", "--out", str(tmp_path / "loop.onnx")]) == 1
    assert "loop.onnx exists; give a new file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tiny_bundle), "--to", "loop"])
    assert "--to loop needs --out" in capsys.readouterr().err
