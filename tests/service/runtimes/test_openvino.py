"""OpenVINO against ONNX Runtime on the same graphs, in the precision that was asked for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray

from distill.bundle import Bundle
from distill.sampling import noise
from service.runtimes import OnnxRuntime, RuntimeUnavailable, generate, open_runtime
from service.runtimes import openvino as module
from service.runtimes.base import Conditioning, Floats
from service.runtimes.openvino import OpenVinoGraph, OpenVinoRuntime, core, has_bfloat16, take_time_out

PROMPTS = ("a small red metal sphere", "a large blue rubber cube left of a green cylinder", "x")
SEEDS = (3, 4, 5)
FLOAT32_RELATIVE = 1e-4
"""Greatest difference over the range of a row, as for the export itself; what is left is the order of additions."""
BFLOAT16_STEP_DB = 45.0
BFLOAT16_PICTURE_DB = 40.0


@pytest.fixture(scope="module")
def float32(tiny_bundle: Path) -> OpenVinoRuntime:
    return OpenVinoRuntime(Bundle.open(tiny_bundle), threads=1, max_batch=4)


@pytest.fixture(scope="module")
def bfloat16(tiny_bundle: Path) -> OpenVinoRuntime:
    if not has_bfloat16():
        pytest.skip("this processor does not multiply in bfloat16")
    return OpenVinoRuntime(Bundle.open(tiny_bundle), threads=1, max_batch=4, precision="bfloat16")


def psnr_db(found: NDArray[np.generic], reference: NDArray[np.generic], span: float) -> float:
    error = found.astype(np.float64) - reference.astype(np.float64)
    return float(10 * np.log10(span**2 / np.mean(error**2)))


def first_steps(runtime: OnnxRuntime | OpenVinoRuntime, conditioning: Conditioning) -> list[tuple[Floats, Floats]]:
    """(x0 of each timestep of four, at batch 3), on the same inputs for every runtime."""
    table = runtime.manifest.samplers[4].table()
    latents = np.stack([noise(seed, 0, (4, 16, 16))[0] for seed in SEEDS])
    times = [np.full(3, time, dtype=np.float32) for time in table.timesteps]
    rows = [np.tile(row, (3, 1)) for row in table.rows]
    return [runtime.step(latents, t, row, latents, conditioning) for t, row in zip(times, rows, strict=True)]


def test_float32_equals_onnx_runtime(runtime: OnnxRuntime, float32: OpenVinoRuntime) -> None:
    conditioning = runtime.encode_text(PROMPTS)
    for name, value in float32.encode_text(PROMPTS).items():
        np.testing.assert_allclose(value, conditioning[name], rtol=0, atol=1e-5)
    for found, reference in zip(first_steps(float32, conditioning), first_steps(runtime, conditioning), strict=True):
        for a, b in zip(found, reference, strict=True):
            assert np.abs(a - b).max() / np.ptp(b) <= FLOAT32_RELATIVE
    pictures, expected = (generate(r, r.manifest, PROMPTS, SEEDS, steps=4) for r in (float32, runtime))
    assert np.abs(pictures.astype(int) - expected.astype(int)).max() <= 1


def test_bfloat16_is_near_and_is_not_float32(runtime: OnnxRuntime, bfloat16: OpenVinoRuntime) -> None:
    conditioning = runtime.encode_text(PROMPTS)
    for found, reference in zip(first_steps(bfloat16, conditioning), first_steps(runtime, conditioning), strict=True):
        assert BFLOAT16_STEP_DB <= psnr_db(found[1], reference[1], float(np.ptp(reference[1]))) < 90
    pictures, expected = (generate(r, r.manifest, PROMPTS, SEEDS, steps=4) for r in (bfloat16, runtime))
    assert psnr_db(pictures, expected, 255.0) >= BFLOAT16_PICTURE_DB


def test_the_part_that_knows_the_time_is_cut_out_whole(float32: OpenVinoRuntime, tiny_bundle: Path) -> None:
    """Both parts in float32 compute what the graph did; a graph without a timestep is left alone."""
    bundle = Bundle.open(tiny_bundle)
    conditioning = float32.encode_text(PROMPTS)
    table = float32.manifest.samplers[4].table()
    latents = np.stack([noise(seed, 0, (4, 16, 16))[0] for seed in SEEDS])
    feed = {"latents": latents, "timestep": table.timesteps[:3], "coefficients": table.rows[:3], "noise": latents}
    model = core().read_model(bundle.file(bundle.engine("step").file))
    model.reshape({name: list(value.shape) for name, value in (feed | conditioning).items()})
    time_model = take_time_out(model)
    assert time_model is not None
    assert "timestep" not in {entry.any_name for entry in model.inputs}
    assert [entry.any_name for entry in time_model.inputs] == ["timestep"]
    exact = {"INFERENCE_PRECISION_HINT": ov.Type.f32, "INFERENCE_NUM_THREADS": 1}
    features = core().compile_model(time_model, "CPU", exact)({"timestep": feed["timestep"]})
    assert {entry.any_name for entry in features} <= {entry.any_name for entry in model.inputs}
    rest = {name: value for name, value in (feed | conditioning).items() if name != "timestep"}
    parts = core().compile_model(model, "CPU", exact)(rest | {e.any_name: value for e, value in features.items()})
    whole = float32.step(latents, feed["timestep"], feed["coefficients"], latents, conditioning)
    for name, expected in zip(("next", "x0"), whole, strict=True):
        assert np.abs(parts[name] - expected).max() / np.ptp(expected) <= 1e-5
    decoder = core().read_model(bundle.file(bundle.engine("decoder").file))
    assert take_time_out(decoder) is None


def test_a_seed_gives_the_same_picture_alone_and_beside_others(bfloat16: OpenVinoRuntime) -> None:
    together = generate(bfloat16, bfloat16.manifest, PROMPTS, SEEDS, steps=2)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = generate(bfloat16, bfloat16.manifest, [prompt], [seed], steps=2)
        np.testing.assert_array_equal(together[i], alone[0])


def test_a_file_that_changes_after_it_was_opened_changes_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    """Shapes are compiled when they are first met; all of them are of the graph that was verified."""
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    file = bundle.file(bundle.engine("decoder").file)
    latents = np.stack([noise(seed, 0, (4, 16, 16))[0] for seed in SEEDS])
    opened = OpenVinoGraph(file, ("image",), 1, "float32")
    (first,) = opened.run({"latents": latents[:1]})
    for changed in (file, bundle.file("vae/diffusion_pytorch_model.safetensors")):
        with changed.open("r+b") as data:  # in place: what is mapped changes too
            data.write(bytes(changed.stat().st_size))
    (second,) = opened.run({"latents": latents[:2]})
    np.testing.assert_array_equal(second[0], first[0])


SIGNALLED = """
import gc, os, signal, sys
from pathlib import Path
from distill.bundle import Bundle
from service.runtimes.openvino import OpenVinoRuntime

signal.signal(signal.SIGINT, lambda number, frame: print("handled"))
runtimes = [OpenVinoRuntime(Bundle.open(Path(sys.argv[1])), threads=1, max_batch=1) for _ in range(2)]
for runtime in runtimes:
    runtime.encode_text(["x"])
del runtime
while runtimes:
    runtimes.pop(0)
    gc.collect()
os.kill(os.getpid(), signal.SIGINT)
"""


def test_signals_are_handled_after_runtimes_are_gone(tiny_bundle: Path) -> None:
    """A Core that is freed takes the thread's signal stack along, and the next signal kills without a word."""
    command = [sys.executable, "-X", "faulthandler", "-c", SIGNALLED, str(tiny_bundle)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr


def test_results_of_a_call_outlive_the_next(float32: OpenVinoRuntime) -> None:
    latents = np.stack([noise(seed, 0, (4, 16, 16))[0] for seed in SEEDS])
    first = float32.decode(latents[:1])
    kept = first.copy()
    float32.decode(latents[1:2])
    np.testing.assert_array_equal(first, kept)


def test_bfloat16_on_a_processor_without_it_is_refused(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_bfloat16", lambda: False)
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(RuntimeUnavailable, match=r"neither AMX nor AVX512-BF16; use float32"):
        open_runtime(bundle, threads=1, max_batch=1, precision="bfloat16")


def test_clips_equal_those_of_onnx_runtime_piece_by_piece(video_runtime: OnnxRuntime, tiny_video_bundle: Path) -> None:
    other = OpenVinoRuntime(Bundle.open(tiny_video_bundle), threads=1, max_batch=1)
    reference, found = (
        generate(each, each.manifest, [PROMPTS[0]], [3], steps=2, frames=21).astype(int)
        for each in (video_runtime, other)
    )
    assert found.shape == (1, 21, 32, 32, 3)
    assert np.abs(found - reference).max() <= 1


def test_shapes_that_were_not_used_for_longest_leave(float32: OpenVinoRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHAPES", 2)
    decoder = float32._decoder
    assert isinstance(decoder, OpenVinoGraph)
    made: list[int] = []
    monkeypatch.setattr(
        decoder, "_specialise", lambda shapes: made.append(shapes["latents"][0]) or (lambda feed: {"image": 0})
    )
    monkeypatch.setattr(decoder, "_compiled", type(decoder._compiled)())
    for rows in (1, 2, 1, 3, 1, 2):
        decoder.run({"latents": np.zeros((rows, 4, 16, 16), dtype=np.float32)})
    assert made == [1, 2, 3, 2]
