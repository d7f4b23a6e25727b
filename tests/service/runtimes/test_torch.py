"""torch against ONNX Runtime on the same bundle, and LoRAs against diffusers' own way of wearing them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.bundle import Bundle, BundleError
from distill.export.names import comfyui_module
from distill.sampling import noise
from service.runtimes import LoraRefused, OnnxRuntime, RuntimeUnavailable, choose, generate, open_runtime
from service.runtimes.base import Worn
from service.runtimes.torch import TorchRuntime

PROMPTS = ("a small red metal sphere", "a large blue rubber cube left of a green cylinder", "x")
SEEDS = (3, 4, 5)
LAYERS = {
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_q": (48, 48, ()),
    "down_blocks.0.resnets.0.conv1": (32, 32, (3, 3)),
    "up_blocks.0.attentions.0.proj_in": (48, 48, ()),
}
RANK = 3


@pytest.fixture(scope="module")
def opened(tiny_bundle: Path) -> TorchRuntime:
    return TorchRuntime(Bundle.open(tiny_bundle), threads=1, max_batch=4)


@pytest.fixture
def torched(opened: TorchRuntime) -> Iterator[TorchRuntime]:
    yield opened
    opened.configure()


def factors(seed: int = 0) -> dict[str, Tensor]:
    """A LoRA of LAYERS in diffusers' names, strong enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for layer, (outputs, inputs, kernel) in LAYERS.items():
        ones = (1,) * len(kernel)
        found[f"unet.{layer}.lora_A.weight"] = 0.3 * torch.randn(RANK, inputs, *kernel, generator=generator)
        found[f"unet.{layer}.lora_B.weight"] = 0.3 * torch.randn(outputs, RANK, *ones, generator=generator)
    return found


def file(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(tensors)


def pictures(runtime: OnnxRuntime | TorchRuntime, steps: int = 2) -> NDArray[np.uint8]:
    return generate(runtime, runtime.manifest, PROMPTS, SEEDS, steps=steps)


def test_pictures_are_those_of_onnx_runtime(runtime: OnnxRuntime, torched: TorchRuntime) -> None:
    conditioning = runtime.encode_text(PROMPTS)
    for name, value in torched.encode_text(PROMPTS).items():
        np.testing.assert_allclose(value, conditioning[name], rtol=0, atol=1e-5)
    assert np.abs(pictures(torched, 4).astype(int) - pictures(runtime, 4).astype(int)).max() <= 1
    able = torched.capabilities
    assert (able.runtime, able.precision, able.device, able.loras) == ("torch", "float32", "cpu", True)
    assert able.version == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="computes on a GPU")
def test_on_a_processor_it_holds_no_memory_of_its_own(torched: TorchRuntime) -> None:
    assert torched.memory() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_tells_the_memory_that_it_holds(torched: TorchRuntime) -> None:
    held = torched.memory()
    assert 0 < held["allocated"] <= held["reserved"]


def test_clips_are_those_of_onnx_runtime(tiny_video_bundle: Path, video_runtime: OnnxRuntime) -> None:
    filming = TorchRuntime(Bundle.open(tiny_video_bundle), threads=1, max_batch=1)
    found, expected = (generate(r, r.manifest, PROMPTS[:1], [7], steps=2) for r in (filming, video_runtime))
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_bfloat16_is_near_and_is_not_float32(tiny_bundle: Path, torched: TorchRuntime) -> None:
    lower = TorchRuntime(Bundle.open(tiny_bundle), threads=1, max_batch=1, precision="bfloat16")
    found, expected = pictures(lower).astype(float), pictures(torched).astype(float)
    assert np.abs(found - expected).max() > 0
    assert np.abs(found - expected).mean() < 2


@pytest.mark.parametrize("worn", [False, True])
def test_a_seed_gives_the_same_picture_alone_and_beside_others(torched: TorchRuntime, worn: bool) -> None:
    loras: Worn = ((torched.read_lora(file(factors())), 0.7),) if worn else ()
    torched.configure(loras=loras)
    together = pictures(torched)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        np.testing.assert_array_equal(together[i], generate(torched, torched.manifest, [prompt], [seed], steps=2)[0])


def test_rows_that_gave_bits_up_run_together(torched: TorchRuntime) -> None:
    """Whether this processor's kernels change the last bit or not, the picture stays what it is for the eye."""
    able = torched.capabilities
    assert able.loose_sizes == () or set(able.batch_sizes) < set(able.loose_sizes) == {1, 2, 4}
    exact = pictures(torched)
    torched.configure(exact=False)
    assert np.abs(pictures(torched).astype(int) - exact.astype(int)).max() <= 1


# --- LoRAs ---------------------------------------------------------------------------------------------------------


def test_a_lora_changes_the_step_as_diffusers_changes_it(tiny_bundle: Path, torched: TorchRuntime) -> None:
    """Two at once, by peft's layers beside the weights: another way to the same numbers."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_bundle / "unet", torch_dtype=torch.float32).eval()
    unet.load_lora_adapter(factors(0), prefix="unet", adapter_name="one")
    with pytest.warns(UserWarning, match="multiple adapters"):
        unet.load_lora_adapter(factors(1), prefix="unet", adapter_name="two")
    unet.set_adapters(["one", "two"], [0.8, -0.5])
    one, two = (torched.read_lora(file(factors(seed))) for seed in (0, 1))
    assert (one.rank, one.layers) == (RANK, len(LAYERS))
    torched.configure(loras=((one, 0.8), (two, -0.5)))
    latents = noise(7, 0, (4, 16, 16))
    text = torched.encode_text(PROMPTS[:1])
    output_is_x0 = np.array([[0, 1, 1, 0, 0]], dtype=np.float32)
    _, found = torched.step(latents, np.array([499], np.float32), output_is_x0, latents, text)
    with torch.no_grad():
        expected = unet(
            torch.from_numpy(latents),
            torch.tensor([499.0]),
            torch.from_numpy(text["prompt_embeds"]),
            added_cond_kwargs={
                "text_embeds": torch.from_numpy(text["pooled"]),
                "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
            },
        ).sample.numpy()
    plain = torched_step_without(torched, latents, output_is_x0)
    assert np.abs(plain - expected).max() > 0.05, "the LoRA does nothing"
    assert np.abs(found - expected).max() <= 1e-5 * np.ptp(expected)


def torched_step_without(
    runtime: TorchRuntime, latents: NDArray[np.float32], row: NDArray[np.float32]
) -> NDArray[np.float32]:
    runtime.configure()
    return runtime.step(latents, np.array([499], np.float32), row, latents, runtime.encode_text(PROMPTS[:1]))[1]


def test_what_is_taken_off_leaves_no_trace(torched: TorchRuntime) -> None:
    before = pictures(torched)
    one, two = (torched.read_lora(file(factors(seed))) for seed in (0, 1))
    seen = []
    for loras in (((one, 1.0),), ((two, 1.0),), ((one, 1.0), (two, 0.5)), ((one, 1.0),)):
        torched.configure(loras=loras)
        seen.append(pictures(torched))
    torched.configure()
    np.testing.assert_array_equal(pictures(torched), before)
    np.testing.assert_array_equal(seen[0], seen[3])
    assert len({picture.tobytes() for picture in (before, *seen[:3])}) == 4


def test_comfyui_names_and_alpha_mean_the_same(torched: TorchRuntime) -> None:
    theirs: dict[str, Tensor] = {}
    for key, value in factors().items():
        layer, half = key.removeprefix("unet.").rsplit(".lora_", 1)
        name = comfyui_module(layer, "sdxl")
        theirs[f"{name}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = value
        theirs[f"{name}.alpha"] = torch.tensor(RANK / 2.0)
    torched.configure(loras=((torched.read_lora(file(theirs)), 2.0),))
    found = pictures(torched)
    torched.configure(loras=((torched.read_lora(file(factors())), 1.0),))
    np.testing.assert_array_equal(found, pictures(torched))


NAME = "unet.down_blocks.0.resnets.0.conv1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{NAME}.lora_A.weight": None}, r"conv1 has no down half; send lora_A and lora_B"),
        (
            {f"{NAME}.lora_A.weight": torch.ones(3, 31, 3, 3)},
            r"\(3, 31, 3, 3\) and .*takes \(r, 32, 3, 3\) and",
        ),
        ({f"{NAME}.lora_A.weight": torch.ones(2, 32, 3, 3)}, r"\(32, r, 1, 1\) with r up to 512"),
        ({f"{NAME}.lora_B.weight": torch.full((32, 3, 1, 1), torch.nan)}, r"no finite floats"),
        ({f"{NAME}.lora_B.weight": torch.ones(32, 3, 1, 1, dtype=torch.int8)}, r"no finite floats"),
        ({"unet.nowhere.lora_A.weight": torch.ones(3, 32)}, r"unet\.nowhere is no layer of tiny-sdxl's denoiser"),
        ({"text_encoder.a.lora_A.weight": torch.ones(3, 32)}, r"without text encoders"),
        ({"unet.conv_in.weight": torch.ones(3, 32)}, r"unet\.conv_in\.weight is no part of a LoRA"),
        (dict.fromkeys(factors()), r"the file has no tensors"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    torched: TorchRuntime, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {key: value for key, value in (factors() | change).items() if value is not None}
    with pytest.raises(LoraRefused, match=message):
        torched.read_lora(file(tensors))


@pytest.mark.parametrize("data", [b"", b"\x80\x04}.", b"\xff" * 100, file(factors())[:-5]])
def test_what_is_no_safetensors_file_is_refused(torched: TorchRuntime, data: bytes) -> None:
    with pytest.raises(LoraRefused, match=r"not a safetensors file: .*; send the bytes of one"):
        torched.read_lora(data)


def test_other_runtimes_name_the_way_out(runtime: OnnxRuntime) -> None:
    assert not runtime.capabilities.loras
    with pytest.raises(LoraRefused, match="tiny-sdxl runs on onnx, which takes no LoRAs; set LEAPFROG_RUNTIME=torch"):
        runtime.read_lora(file(factors()))


# --- which runtime -------------------------------------------------------------------------------------------------


def test_a_bundle_that_was_not_exported_runs_on_torch_and_tells_why(tiny_sources: Path) -> None:
    able = open_runtime(Bundle.open(tiny_sources), threads=1, max_batch=1).capabilities
    assert (able.runtime, able.fallback) == ("torch", "the bundle was not exported to onnx")
    with pytest.raises(BundleError, match=r"python -m distill\.export"):
        open_runtime(Bundle.open(tiny_sources), threads=1, max_batch=1, runtime="onnx")


def test_torch_is_taken_by_name(tiny_bundle: Path) -> None:
    opened = open_runtime(Bundle.open(tiny_bundle), threads=1, max_batch=1, runtime="torch")
    assert (opened.capabilities.runtime, opened.capabilities.fallback) == ("torch", "")
    assert choose("torch", "auto") == choose("torch", "float32") == ("torch", "float32")
    assert choose("torch", "bfloat16") == ("torch", "bfloat16")


def test_precisions_that_torch_has_not_are_refused() -> None:
    with pytest.raises(RuntimeUnavailable, match="precision is int8, which torch has not"):
        choose("torch", "int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has float16")
def test_float16_needs_a_gpu() -> None:
    with pytest.raises(RuntimeUnavailable, match="precision is float16, which is for GPUs"):
        choose("torch", "float16")


def test_without_torch_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailable, match=r"torch is not installed; run: pip install 'leapfrog\[train\]'"):
        choose("torch", "float32")


def test_a_folder_without_weights_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    root = tmp_path / "broken"
    shutil.copytree(tiny_bundle, root)
    bundle = Bundle.open(root)
    next((root / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(BundleError, match=r"broken does not load in torch: .*; write the bundle again"):
        TorchRuntime(bundle, threads=1, max_batch=1)
