"""The exported video student is torch's and diffusers': text, a step, and the decoder whole and in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from distill.bundle import Bundle, BundleError
from distill.export.graphs import load_graphs, to_uint8
from distill.export.parity import OnnxGraph
from distill.export.wan import WanDecoder, WanNextDecoder, WanStep
from distill.families.wan import Wan
from service.runtimes import OnnxRuntime, generate

GRAPHS = ["text_encoder", "step", "decoder", "decoder_next"]


@pytest.fixture(scope="module")
def family(tiny_video_sources: Path) -> tuple[Wan, Any]:
    loaded, network = Wan.from_folder(tiny_video_sources, size=(32, 32), frames=5)
    loaded.text_encoder.float()
    return loaded, network


def latents_of(frames: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn((batch, 4, frames, 16, 16), generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """One level of 255 in a thousandth of the values, where rounding decides."""
    difference = (found.int() - expected.int()).abs()
    return int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 1e-3


@torch.no_grad()
def test_the_rewritten_decoder_is_diffusers_own_for_any_number_of_frames(family: tuple[Wan, Any]) -> None:
    wan, _ = family
    decoder = WanDecoder(wan.vae)
    for frames in (1, 2, 3, 6):
        latents = latents_of(frames, batch=2, seed=frames)
        image = decoder(latents)[0]
        assert image.shape == (2, 2 * frames - 1, 32, 32, 3)
        assert close(image, to_uint8(wan.decode(latents)))
        assert image.float().std() > 10, "a grey decoder would pass any test"


@torch.no_grad()
@pytest.mark.parametrize("cut", [(1, 1, 1, 1, 1, 1), (1, 5), (3, 3), (2, 1, 3)])
def test_pieces_of_any_length_are_the_whole(family: tuple[Wan, Any], cut: tuple[int, ...]) -> None:
    wan, _ = family
    latents = latents_of(sum(cut))
    first, *following = latents.split(cut, dim=2)
    image, *kept = WanDecoder(wan.vae)(first)
    images = [image]
    for piece in following:
        image, *kept = WanNextDecoder(wan.vae)(piece, *kept)
        assert image.shape[1] == 2 * piece.shape[2]
        images.append(image)
    assert close(torch.cat(images, dim=1), to_uint8(wan.decode(latents)))


def test_the_decoder_of_three_temporal_levels_is_diffusers_own(tmp_path: Path) -> None:
    """Wan2.1's own four levels with two blocks each and attention in the middle, narrow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae: Any = AutoencoderKLWan(
            base_dim=4, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=8
        ).eval()
    latents = latents_of(3)[..., :2, :4]
    with torch.no_grad():
        expected = to_uint8(vae.decode(latents, return_dict=False)[0])
        assert close(WanDecoder(vae)(latents)[0], expected)


def test_wan22_is_refused_with_the_way_out() -> None:
    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(base_dim=8, decoder_base_dim=8, z_dim=4, is_residual=True, patch_size=2)
    with pytest.raises(BundleError, match=r"Wan2\.2"):
        WanDecoder(vae)


def test_a_bundle_without_frames_is_refused(tiny_video_sources: Path) -> None:
    manifest = Bundle.open(tiny_video_sources).manifest.model_copy(update={"frames": ()})
    with pytest.raises(BundleError, match="frames"):
        load_graphs(tiny_video_sources, manifest)


@torch.no_grad()
def test_a_guided_step_reads_wans_own_unconditional_prompt(family: tuple[Wan, Any]) -> None:
    wan, network = family
    condition, blank = wan.encode(["a red cube"]), wan.unconditional(1)
    x, t = latents_of(3), torch.tensor([0.9])
    coefficients = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]])  # next is the network's output
    step = WanStep(network, 3.0, blank["prompt_embeds"])
    found, _ = step(x, t, coefficients, torch.zeros_like(x), condition["prompt_embeds"])
    outputs = [network(**wan.inputs(x, t, c), return_dict=False)[0] for c in (condition, blank)]
    torch.testing.assert_close(found, outputs[1] + 3.0 * (outputs[0] - outputs[1]))
    with pytest.raises(ValueError, match="unconditional"):
        WanStep(network, 3.0)


# --- the compiled graphs -----------------------------------------------------------------------------------------


def test_the_manifest_lists_four_graphs_with_free_frames(tiny_video_bundle: Path) -> None:
    bundle = Bundle.open(tiny_video_bundle)
    assert [engine.graph for engine in bundle.manifest.engines] == GRAPHS
    decoder, following = bundle.engine("decoder"), bundle.engine("decoder_next")
    assert bundle.engine("step").inputs["latents"] == ("batch", 4, "frames", 16, 16)
    assert decoder.outputs["image"] == ("batch", "image_frames", 32, 32, 3)
    kept = [name for name in decoder.outputs if name != "image"]
    assert {f"past_{i}": decoder.outputs[name] for i, name in enumerate(kept)} == {
        name: shape for name, shape in following.inputs.items() if name != "latents"
    }
    assert all(row["levels"] <= 1 for row in bundle.manifest.provenance["export_onnx"]["pictures"].values())


def test_compiled_pieces_are_diffusers_whole(tiny_video_bundle: Path, family: tuple[Wan, Any]) -> None:
    """Down to one latent frame per call, which no example of the exporter has."""
    first, following = (OnnxGraph(tiny_video_bundle / f"{name}.onnx") for name in GRAPHS[2:])
    latents = latents_of(4)
    found = first.run({"latents": latents[:, :, :1]})
    images = [found["image"]]
    for i in range(1, 4):
        past = {f"past_{k}": found[f"kept_{k}"] for k in range(len(found) - 1)}
        found = following.run({"latents": latents[:, :, i : i + 1], **past})
        images.append(found["image"])
    assert close(torch.cat(images, dim=1), to_uint8(family[0].decode(latents)))


@torch.no_grad()
def test_the_service_makes_the_clip_that_the_family_makes(tiny_video_bundle: Path, family: tuple[Wan, Any]) -> None:
    """From the prompt, with entities and space in it, to frames; tokens, mask, steps and decoder together."""
    wan, network = family
    runtime = OnnxRuntime(Bundle.open(tiny_video_bundle), threads=1, max_batch=2)
    prompt = "  a red &amp;amp; blue\n cube "
    clip = generate(runtime, runtime.manifest, [prompt], [7], steps=2)
    assert clip.shape == (1, 5, 32, 32, 3)

    from distill.sampling import noise

    table = runtime.manifest.samplers[2].table()
    draws = torch.from_numpy(noise(7, 0, (4, 3, 16, 16), draws=2))
    x, condition = draws[:1], wan.encode([prompt])
    for k in range(2):
        p, q, u, y, w = (float(c) for c in table.rows[k])
        t = torch.tensor([float(table.timesteps[k])])
        output = network(**wan.inputs(x, t, condition), return_dict=False)[0]
        fresh = draws[1:] if k == 0 else torch.zeros_like(x)
        x = u * (p * x + q * output) + y * x + w * fresh
    assert close(torch.from_numpy(clip), to_uint8(wan.decode(x)))


def test_long_clips_are_decoded_in_pieces_that_come_one_by_one(tiny_video_bundle: Path) -> None:
    runtime = OnnxRuntime(Bundle.open(tiny_video_bundle), threads=1, max_batch=1)
    latents = latents_of(12).numpy()
    pieces = list(runtime.frames(latents))
    assert [len(piece) for piece in pieces] == [3, 10, 10]
    np.testing.assert_array_equal(np.concatenate(pieces), runtime.decode(latents)[0])
