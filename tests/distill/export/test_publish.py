"""A published folder loads with diffusers alone and makes the student's pictures; the command says what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from distill.bundle import Bundle, BundleError, Sampler, write_manifest
from distill.config import load_recipe
from distill.export.__main__ import main
from distill.export.publish import PublishError, publish
from distill.run import train
from distill.sampling import ScaledLinear, student_table


def silent(line: str) -> None:
    """A publication's progress, unread."""


def picture(pipeline: Any, **call: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    result = pipeline(
        "a red cube", guidance_scale=1.0, generator=generator, output_type="np", height=64, width=64, **call
    )
    return np.asarray(result.images[0])


def test_a_folder_for_diffusers_has_no_engines_and_makes_the_same_picture(tiny_bundle: Path, tmp_path: Path) -> None:
    root = tiny_bundle
    written = publish(root, "diffusers", tmp_path / "out", say=silent)
    names = {path.relative_to(tmp_path / "out").as_posix() for path in written}
    assert {"README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= names
    assert not any(name.endswith(".onnx") or name in ("bundle.json",) or name.endswith(".bin") for name in names)
    ours, theirs = DiffusionPipeline.from_pretrained(tmp_path / "out"), DiffusionPipeline.from_pretrained(root)
    assert np.array_equal(picture(ours, num_inference_steps=4), picture(theirs, num_inference_steps=4))


def test_the_usage_of_the_card_runs(tiny_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a grid of its own, as SDXL's one step at 399."""
    root = tmp_path / "bundle"
    shutil.copytree(tiny_sources, root)
    table = student_table(ScaledLinear(), "epsilon", np.array([399.0]))
    manifest = Bundle.open(tiny_sources).manifest
    write_manifest(root, manifest.model_copy(update={"samplers": {1: Sampler.of(table)}, "default_steps": 1}))
    publish(root, "diffusers", tmp_path / "out", say=silent)
    usage = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "timesteps=[399]" in usage
    scope: dict[str, Any] = {}
    exec(usage.replace("PATH", str(tmp_path / "out")), scope)
    assert scope["result"].size == (64, 64) and scope["pipe"].scheduler.timesteps.tolist() == [399]


def test_pixel_space_students_are_a_network_and_a_scheduler(tmp_path: Path) -> None:
    publish("bundles/digits-sit", "diffusers", tmp_path / "out", say=silent)
    network: Any = DiTTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    assert network.config.in_channels == 1
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    steps = Bundle.open("bundles/digits-sit").manifest.default_steps
    usage = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    assert f"scheduler.set_timesteps(sigmas={[round(1 - i / steps, 6) for i in range(steps)]})" in usage
    assert scheduler.config.stochastic_sampling
    scope: dict[str, Any] = {}
    exec(usage.replace("PATH", str(tmp_path / "out")), scope)
    assert scope["result"].shape == (1, 1, 8, 8) and float(scope["result"].std()) > 0.5  # ink on paper, not gray


def test_nothing_is_left_of_a_publication_that_fails(tiny_sources: Path, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(tiny_sources, root)
    (root / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match="was altered or truncated"):
        publish(root, "diffusers", tmp_path / "out", say=silent)
    with pytest.raises(PublishError, match="does not say what it was distilled from; add --teacher"):
        publish(tiny_sources, "lora", tmp_path / "out", say=silent)
    with pytest.raises(PublishError, match="--rank makes a LoRA; use it with --to lora or --to comfyui"):
        publish(tiny_sources, "diffusers", tmp_path / "out", rank=4, say=silent)
    with pytest.raises(PublishError, match="no pipeline loads a LoRA into sit; use --to diffusers"):
        publish("bundles/digits-sit", "lora", tmp_path / "out", say=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_student_trained_as_a_lora_is_published_as_that_lora(
    tiny_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the recipe to the file, also what weights of float16 would round away, with the run's cost on its card."""
    monkeypatch.setenv("LEAPFROG_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("distill.data.cache.CACHE", tmp_path / "cache")
    (tmp_path / "prompts.txt").write_text("a red cube\na blue sphere\n")
    overrides = [
        f"teacher={tiny_sources}", "name=tiny-lora", f"output={tmp_path / 'tiny-lora'}", "iterations=2", "batch_size=2",
        f"data={{prompts: {tmp_path / 'prompts.txt'}}}", "steps=[1]", "fake_per_student=1", "fake_warmup=0", "ema=0",
        "adapters={rank: 2, alpha: 1}", "student.learning_rate=2e-5", "telemetry.every=null", "log_every=1",
    ]  # fmt: skip
    assert train(load_recipe("recipes/digits-dmd2.yaml", overrides), quiet=True) == 0
    told: list[str] = []
    publish(tmp_path / "tiny-lora", "lora", tmp_path / "out", run=tmp_path / "runs/tiny-lora", say=told.append)
    assert told[0].startswith("rank 2 in ") and "holds 100.0% of what the student changed" in told[0]
    trained = load_file(tmp_path / "runs/tiny-lora/checkpoints/step-0000002/state.safetensors")
    published = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    for name in [name for name in published if ".lora_A." in name]:
        ours = f"student/model/{name.removeprefix('unet.')}"
        products = [
            tensors[b].float().flatten(1) @ tensors[a].float().flatten(1)
            for tensors, a, b in (
                (published, name, name.replace("lora_A", "lora_B")),
                (trained, ours, ours.replace("lora_A", "lora_B")),
            )
        ]
        assert float(products[0].norm()) > 0
        torch.testing.assert_close(products[0], products[1] / 2, rtol=0, atol=2e-3 * float(products[1].abs().max()))
    publish(tmp_path / "tiny-lora", "lora", tmp_path / "cut", rank=1, run=tmp_path / "runs/tiny-lora", say=told.append)
    share = float(told[1].split("holds ")[1].split("%")[0])
    assert told[1].startswith("rank 1 in ") and 50 <= share < 100
    folder = tmp_path / "whole"
    publish(tmp_path / "tiny-lora", "diffusers", folder, run=tmp_path / "runs/tiny-lora", say=silent)
    assert not (folder / "adapter.safetensors").exists() and (tmp_path / "tiny-lora/adapter.safetensors").is_file()
    card = (tmp_path / "out/README.md").read_text()
    assert "2 iterations in " in card and "samples that went forward: fake " in card


def test_a_folder_with_files_is_not_overwritten(tiny_sources: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    publish(tiny_sources, "diffusers", tmp_path / "out", say=silent)
    with pytest.raises(PublishError, match="out is there already; give a new folder, or delete it"):
        publish(tiny_sources, "diffusers", tmp_path / "out", say=silent)


def test_the_command_names_what_it_wrote(
    tiny_sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_sources), "--to", "diffusers", "--out", str(tmp_path / "out")]) == 0
    assert f"wrote {tmp_path / 'out/README.md'}" in capsys.readouterr().out
    assert main([str(tiny_sources), "--to", "diffusers", "--out", str(tmp_path / "out")]) == 1
    assert "export failed: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--to", "diffusers"], "--to diffusers needs --out"),
        (["--to", "onnx", "--out", "x"], "--to onnx takes no --out"),
        (["--to", "lora", "--out", "x", "--rank", "0"], "--rank is 0; give at least 1"),
    ],
)
def test_arguments_that_do_not_fit_are_told(
    tiny_sources: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(tiny_sources), *arguments])
    assert told in capsys.readouterr().err
