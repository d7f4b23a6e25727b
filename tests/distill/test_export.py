"""The exported student is torch's student: graph by graph, row by row, and picture by picture."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel, StableDiffusionXLPipeline

from distill.bundle import Bundle, BundleError, Guidance, Manifest, Sampler, sha256, write_manifest
from distill.export import onnx as onnx_export
from distill.export import parity, run
from distill.export.__main__ import main
from distill.export.graphs import (
    GraphSpec,
    Inputs,
    PixelDecoder,
    SdxlStep,
    SitStep,
    VaeDecoder,
    affine_step,
    decoder_graph,
    load_graphs,
    step_graph,
    to_uint8,
)
from distill.export.onnx import ExportError, compile_graph
from distill.export.parity import OnnxGraph
from distill.export.run import export_onnx
from distill.export.weights import Weights
from distill.sampling import Flow, student_table

GRAPHS = ("text_encoder", "step", "decoder")


@pytest.fixture(scope="module")
def compiled(tiny_bundle: Path) -> dict[str, OnnxGraph]:
    return {name: OnnxGraph(tiny_bundle / f"{name}.onnx") for name in GRAPHS}


@pytest.fixture(scope="module")
def specs(tiny_bundle: Path) -> dict[str, GraphSpec]:
    return load_graphs(tiny_bundle, Bundle.open(tiny_bundle).manifest)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> StableDiffusionXLPipeline:
    loaded = DiffusionPipeline.from_pretrained(tiny_bundle)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def rows(inputs: Inputs, index: slice) -> Inputs:
    return {name: value[index] for name, value in inputs.items()}


def listing(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): sha256(path) for path in root.rglob("*") if path.is_file()}


# --- what is written -------------------------------------------------------------------------------------------


def test_manifest_vouches_for_engines_and_their_parity(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert [engine.graph for engine in bundle.manifest.engines] == list(GRAPHS)
    for engine in bundle.manifest.engines:
        assert bundle.file(engine.file).is_file()
        for shape in (*engine.inputs.values(), *engine.outputs.values()):
            assert shape[0] == "batch"
    assert bundle.engine("step").inputs["latents"] == ("batch", 4, 16, 16)
    assert bundle.engine("decoder").outputs == {"image": ("batch", 64, 64, 3)}
    assert 0 < bundle.engine("step").parity["relative"] <= 1e-4
    assert bundle.engine("step").parity["psnr_db"] > 100
    pictures = bundle.manifest.provenance["export_onnx"]["pictures"]
    assert set(pictures) == {"1", "2", "4", "8"}
    assert all(row["levels"] <= 1 for row in pictures.values())


@pytest.mark.parametrize("name", GRAPHS)
def test_file_holds_the_graph_and_nothing_about_its_making(tiny_bundle: Path, name: str) -> None:
    path = tiny_bundle / f"{name}.onnx"
    model = onnx.load(path)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert [entry.key for entry in model.metadata_props] == ["leapfrog.weights"] and not model.graph.value_info
    for trace in (b".py", b"site-packages", str(Path.cwd()).encode(), str(tiny_bundle).encode()):
        assert trace not in path.read_bytes()
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("name", GRAPHS)
def test_weights_are_stored_in_half_precision_without_loss(
    tiny_bundle: Path, specs: dict[str, GraphSpec], name: str
) -> None:
    model = onnx.load(tiny_bundle / f"{name}.onnx")
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    halves = {key.removesuffix(".float16"): value for key, value in stored.items() if value.dtype == np.float16}
    assert halves
    assert all(value.nbytes < 4096 for value in stored.values() if value.dtype == np.float32)
    parameters = dict(specs[name].module.named_parameters())
    for key in halves.keys() & parameters.keys():
        np.testing.assert_array_equal(halves[key].astype(np.float32), parameters[key].numpy())
    assert name == "decoder" or halves.keys() & parameters.keys()


def test_compiling_twice_gives_the_same_bytes(tiny_bundle: Path, specs: dict[str, GraphSpec], tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    compile_graph(specs["text_encoder"], root / "again.onnx", weights=Weights.of(Bundle.open(root)))
    assert sha256(root / "again.onnx") == sha256(tiny_bundle / "text_encoder.onnx")
    assert listing(root).keys() - listing(tiny_bundle).keys() == {"again.onnx"}


# --- rows of a batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_row_of_a_batch_equals_the_row_alone(
    compiled: dict[str, OnnxGraph], specs: dict[str, GraphSpec], name: str
) -> None:
    inputs = specs[name].sample(5, torch.Generator().manual_seed(1))
    together = compiled[name].run(inputs)
    for row in range(5):
        alone = compiled[name].run(rows(inputs, slice(row, row + 1)))
        for output in specs[name].outputs:
            difference = parity.compare(alone[output], together[output][row : row + 1])
            assert difference.get("relative", 0) < 1e-5 and difference.get("levels", 0) <= 1


def test_rows_at_different_steps_share_a_batch(
    compiled: dict[str, OnnxGraph], specs: dict[str, GraphSpec], manifest: Manifest
) -> None:
    """Every step of the eight-step sampler at once, and each row against its own batch of one."""
    table = manifest.samplers[8].table()
    inputs = specs["step"].sample(8, torch.Generator().manual_seed(2))
    inputs |= {"timestep": torch.from_numpy(table.timesteps), "coefficients": torch.from_numpy(table.rows)}
    together = compiled["step"].run(inputs)
    for row in range(8):
        alone = specs["step"].run(rows(inputs, slice(row, row + 1)))
        for output in ("next", "x0"):
            assert parity.compare(alone[output], together[output][row : row + 1])["relative"] < 1e-5


def test_changing_one_row_leaves_the_others_alone(compiled: dict[str, OnnxGraph], specs: dict[str, GraphSpec]) -> None:
    inputs = specs["step"].sample(3, torch.Generator().manual_seed(3))
    before = compiled["step"].run(inputs)["next"]
    inputs["latents"][1] += 1.0
    after = compiled["step"].run(inputs)["next"]
    assert not torch.allclose(before[1], after[1])
    torch.testing.assert_close(before[[0, 2]], after[[0, 2]], rtol=1e-5, atol=1e-5)


# --- against diffusers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_pictures_equal_those_of_the_diffusers_pipeline(
    compiled: dict[str, OnnxGraph], pipeline: StableDiffusionXLPipeline, manifest: Manifest, steps: int
) -> None:
    """The folder loaded by diffusers, with its own scheduler, tokenizer and size conditioning, paints the same."""
    prompts = ["a small red metal sphere", "unknown words, and a blue cube left of a green sphere"]
    latents = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    expected = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=0.0,
        latents=latents.clone(),
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    ids = pipeline.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    text = compiled["text_encoder"].run({"input_ids": ids})
    table, fresh = manifest.samplers[steps].table(), torch.Generator().manual_seed(5)
    for step in range(steps):
        inputs = {
            "latents": latents,
            "timestep": torch.full((2,), float(table.timesteps[step])),
            "coefficients": torch.from_numpy(table.rows[step]).expand(2, 5),
            "noise": torch.randn(latents.shape, generator=fresh),
        }
        latents = compiled["step"].run(inputs | text)["next"]
    image = compiled["decoder"].run({"latents": latents})["image"].numpy()
    levels = np.abs(image.astype(int) - (expected * 255).round().astype(int))
    assert levels.max() <= 1
    assert expected.std() > 0.1  # not grey on grey


def test_guidance_is_the_standard_form_with_zeros_as_unconditional_text(
    pipeline: StableDiffusionXLPipeline, specs: dict[str, GraphSpec], manifest: Manifest
) -> None:
    step = SdxlStep(pipeline.unet, 4, guidance_scale=3.0)
    inputs = specs["step"].sample(2, torch.Generator().manual_seed(4))
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, 6)

    def output(embeds: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        added = {"text_embeds": pooled, "time_ids": ids}
        return pipeline.unet(inputs["latents"], inputs["timestep"], embeds, added_cond_kwargs=added).sample

    with torch.no_grad():
        c = output(inputs["prompt_embeds"], inputs["pooled"])
        u = output(torch.zeros_like(inputs["prompt_embeds"]), torch.zeros_like(inputs["pooled"]))
        expected = affine_step(inputs["latents"], u + 3.0 * (c - u), inputs["coefficients"], inputs["noise"])
        found = step(*(inputs[name] for name in specs["step"].inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(c, u, atol=1e-3)


# --- class-conditional, guided, pixel space --------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional DiT on 8×8 pixels with random weights and guidance inside its graph."""
    root = tmp_path_factory.mktemp("bundles") / "tiny-digits"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=1,
            out_channels=1,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
            norm_num_groups=8,
        )
    transformer.half().save_pretrained(root / "transformer")
    samplers = {n: Sampler.of(student_table(Flow(), "flow", Flow().grid(n))) for n in (1, 4)}
    manifest = Manifest(
        name="tiny-digits",
        family="sit",
        task="class-to-image",
        prediction="flow",
        latent_channels=1,
        latent_stride=1,
        sizes=((8, 8),),
        samplers=samplers,
        default_steps=4,
        guidance=Guidance(scale=2.0),
        preview=((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    )
    write_manifest(root, manifest)
    export_onnx(root, say=lambda line: None)
    return root


def test_guided_class_conditional_student_exports(digits_bundle: Path) -> None:
    bundle = Bundle.open(digits_bundle)
    assert [engine.graph for engine in bundle.manifest.engines] == ["step", "decoder"]
    step = OnnxGraph(bundle.file("step.onnx"))
    assert step.inputs == ["latents", "timestep", "coefficients", "noise", "labels"]
    transformer = DiTTransformer2DModel.from_pretrained(digits_bundle / "transformer", torch_dtype=torch.float32).eval()
    inputs = load_graphs(digits_bundle, bundle.manifest)["step"].sample(3, torch.Generator().manual_seed(0))

    def flow(labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return transformer(inputs["latents"], timestep=inputs["timestep"] * 1000, class_labels=labels).sample

    c, u = flow(inputs["labels"]), flow(torch.full((3,), 10))
    expected = affine_step(inputs["latents"], u + 2.0 * (c - u), inputs["coefficients"], inputs["noise"])
    found = step.run(inputs)
    torch.testing.assert_close(found["next"], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["x0"], expected[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(c, u, atol=1e-3)


def test_pixels_become_grey_pictures(digits_bundle: Path) -> None:
    decoder = OnnxGraph(digits_bundle / "decoder.onnx")
    latents = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(5, 1, 1, 1).expand(5, 1, 8, 8)
    image = decoder.run({"latents": latents.contiguous()})["image"]
    assert image.shape == (5, 8, 8, 3) and image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [[0] * 3, [0] * 3, [128] * 3, [255] * 3, [255] * 3]


# --- several sizes ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sizes_that_differ_leave_height_and_width_free(
    specs: dict[str, GraphSpec], manifest: Manifest, tmp_path: Path
) -> None:
    sizes = manifest.model_copy(update={"sizes": ((64, 64), (96, 64), (64, 80))})
    spec = decoder_graph(specs["decoder"].module, sizes)
    compile_graph(spec, tmp_path / "decoder.onnx")
    graph = OnnxGraph(tmp_path / "decoder.onnx")
    assert spec.dims["image"] == ("batch", "image_height", "image_width", 3)
    for width, height in sizes.sizes:
        latents = torch.randn(1, 4, height // 4, width // 4, generator=torch.Generator().manual_seed(0))
        found, expected = graph.run({"latents": latents}), spec.run({"latents": latents})
        assert found["image"].shape == (1, height, width, 3)
        assert parity.compare(expected["image"], found["image"])["levels"] <= 1


def test_size_conditioning_follows_the_latents() -> None:
    step = SdxlStep(torch.nn.Identity(), stride=8)
    ids = step._time_ids(torch.zeros(2, 4, 12, 16), torch.zeros(2))
    assert ids.tolist() == [[96, 128, 0, 0, 96, 128]] * 2


def test_size_that_is_no_multiple_of_the_stride_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="width 66; use multiples of latent_stride 4"):
        decoder_graph(PixelDecoder(), manifest.model_copy(update={"sizes": ((66, 64),)}))


# --- gates and refusals ----------------------------------------------------------------------------------------


class Affine(torch.nn.Module):
    """A step whose network is one small layer, to compile in a second."""

    def __init__(self, fixed_batch: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(16, 4, 5, 5, generator=generator))
        self.fixed_batch = fixed_batch

    def forward(
        self, latents: torch.Tensor, timestep: torch.Tensor, coefficients: torch.Tensor, noise: torch.Tensor
    ) -> Any:
        hidden = torch.nn.functional.conv2d(latents, self.weight, padding=2)
        output = hidden[:, :4] * (1 + timestep / 1000)[:, None, None, None]
        if self.fixed_batch:
            output = output + torch.arange(2.0)[:, None, None, None]
        return affine_step(latents, output, coefficients, noise)


def test_graph_that_works_at_one_batch_only_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    module = Affine(fixed_batch=True)
    module.half().float()
    with pytest.raises(ExportError, match="step"):
        compile_graph(step_graph(module.eval().requires_grad_(False), manifest, {}), tmp_path / "step.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_half_precision_would_change_are_refused_by_name(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"weight changes by up to .* in float16; save the bundle's weights as float16"
    ):
        compile_graph(step_graph(Affine().eval().requires_grad_(False), manifest, {}), tmp_path / "step.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused_by_name(manifest: Manifest, tmp_path: Path) -> None:
    module = Affine().half().float()
    with torch.no_grad():
        module.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ExportError, match="weight holds NaN or infinity"):
        compile_graph(step_graph(module.eval().requires_grad_(False), manifest, {}), tmp_path / "step.onnx")


def test_weights_beyond_one_file_lie_beside_it(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a graph of more than 2 GB: the same values, from a file that runtimes can map."""
    module = Affine().half().float().eval().requires_grad_(False)
    spec = step_graph(module, manifest, {})
    compile_graph(spec, tmp_path / "one" / "step.onnx")
    monkeypatch.setattr(onnx_export, "MAX_FILE_BYTES", 1000)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "step.onnx.data").write_bytes(bytes(100_000))  # of an earlier export: it is not appended to
    compile_graph(spec, tmp_path / "two" / "step.onnx")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"step.onnx", "step.onnx.data"}
    assert (tmp_path / "two" / "step.onnx.data").stat().st_size == module.weight.numel() * 2
    assert (tmp_path / "two" / "step.onnx").stat().st_size < (tmp_path / "one" / "step.onnx").stat().st_size
    inputs = spec.sample(3, torch.Generator().manual_seed(0))
    one, two = (OnnxGraph(tmp_path / name / "step.onnx").run(inputs) for name in ("one", "two"))
    for name in ("next", "x0"):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
    for change in (float("nan"), 1 / 3):
        with torch.no_grad():
            module.weight[0, 0, 0, 0] = change
        with pytest.raises(ExportError, match=r"weight holds NaN|weight changes by up to"):
            compile_graph(spec, tmp_path / "three" / "step.onnx")


def test_gate_catches_a_graph_of_slightly_different_weights(tiny_bundle: Path, compiled: dict[str, OnnxGraph]) -> None:
    spec = load_graphs(tiny_bundle, Bundle.open(tiny_bundle).manifest)["step"]
    parity.check_graph(spec, compiled["step"])
    with torch.no_grad():
        unet: Any = spec.module.unet
        unet.conv_out.weight.mul_(1.002)
    with pytest.raises(ExportError, match=r"step\.\w+ at batch 1 differs from torch: relative .*, allowed 0\.0001"):
        parity.check_graph(spec, compiled["step"])


def test_gate_catches_pictures_of_another_decoder(
    tiny_bundle: Path, compiled: dict[str, OnnxGraph], specs: dict[str, GraphSpec], manifest: Manifest
) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_bundle / "vae", torch_dtype=torch.float32).eval()
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.05
    other = dict(specs) | {"decoder": decoder_graph(VaeDecoder(vae), manifest)}
    with pytest.raises(ExportError, match="the picture after 1 steps differs from torch: levels"):
        parity.check_pictures(other, compiled, manifest)


def test_comparison_counts_nan_as_a_difference_and_weighs_rows_by_their_own_range() -> None:
    small, large = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1000.0]])
    reference = torch.cat((small, large))
    found = reference + torch.tensor([[0.01], [0.0]])
    assert parity.compare(reference, found)["relative"] == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(ExportError, match="differs"):
        parity.gate("nan", parity.compare(reference, reference * float("nan")))
    with pytest.raises(ExportError, match=r"torch\.uint8 .* where torch gives torch\.float32"):
        parity.compare(reference, reference.to(torch.uint8))
    assert parity.compare(reference, reference) == {"max_abs": 0, "relative": 0, "psnr_db": parity.MAX_PSNR}


def test_failing_gate_leaves_the_bundle_as_it_was(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, root)
    before = listing(root)
    monkeypatch.setitem(parity.TOLERANCES, "float32", replace(parity.TOLERANCES["float32"], relative=0.0))
    monkeypatch.setattr(run, "first_difference", lambda spec, file, opset: "they part first nowhere")
    with pytest.raises(ExportError, match="nothing was written"):
        export_onnx(root, say=lambda line: None)
    assert listing(root) == before
    Bundle.open(root)


def test_altered_weights_are_refused_before_any_work(tiny_sources: Path, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_sources, root)
    weights = root / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError, match=r"diffusion_pytorch_model\.safetensors was altered"):
        export_onnx(root)
    assert not list(root.glob("*.onnx"))


def test_unknown_family_and_missing_folder_are_refused(tiny_sources: Path, tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(BundleError, match="family 'pixie'; export knows sdxl, sit"):
        load_graphs(tiny_sources, manifest.model_copy(update={"family": "pixie"}))
    with pytest.raises(BundleError, match=r"text_encoder is missing or has no config\.json"):
        load_graphs(tmp_path, manifest)


# --- command line ----------------------------------------------------------------------------------------------


def test_command_line_exports_and_names_what_it_wrote(
    digits_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "digits"
    shutil.copytree(digits_bundle, root)
    assert main([str(root), "--to", "onnx"]) == 0
    printed = capsys.readouterr().out
    for name in ("step.onnx", "decoder.onnx", "bundle.json"):
        assert f"wrote {root / name}" in printed
    assert "[1/2] step" in printed
    assert Bundle.open(root).digest == Bundle.open(digits_bundle).digest


def test_command_line_refuses_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--to", "onnx"]) == 1
    assert "has no bundle.json" in capsys.readouterr().err


def test_command_line_names_what_it_offers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--to", "coreml"])
    assert "invalid choice: 'coreml'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--to", "onnx", "--check"])
    assert "--check is for --to tensorrt; --to onnx always compares" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "example: python -m distill.export bundles/scenes-sdxl --to onnx" in capsys.readouterr().out


def test_rounding_to_levels_is_that_of_diffusers() -> None:
    image = torch.linspace(-1.2, 1.2, 4 * 3 * 10 * 10).view(4, 3, 10, 10)
    expected = ((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype("uint8")
    np.testing.assert_array_equal(to_uint8(image).numpy(), expected)


def test_sit_step_reads_time_in_thousandths() -> None:
    """Time is in [0, 1] for the sampler and in [0, 1000] for the sinusoid, as diffusers' flow pipelines have it."""
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor, **others: Any) -> tuple[torch.Tensor]:
            seen.append(timestep)
            return (x,)

    step = SitStep(Network(), num_classes=10)
    step(torch.zeros(2, 1, 8, 8), torch.tensor([1.0, 0.25]), torch.zeros(2, 5), torch.zeros(2, 1, 8, 8), torch.zeros(2))
    assert seen[0].tolist() == [1000.0, 250.0]
