"""One rank is two ranks is four, whole copies or shards: losses, weights, averages, moments, results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from distill.config import load_recipe
from distill.parallel.shard import full
from distill.tasks.distillation import DistillationTask
from distill.trainer import Trainer

ROOT = Path(__file__).parents[3]


def distil(models: str, folder: str, overrides: list[str], iterations: int) -> dict[str, Tensor]:
    """A distillation of tiny digits up to an iteration; its whole state."""
    small = [
        f"teacher={models}/digits-teacher", f"advantage.reward={models}/digits-reward", f"output={folder}/out",
        "iterations=4", "batch_size=16", "accumulate=4", "fake_warmup=1", "fake_per_student=2", "steps=[2]",
        "log_every=1", "preview_every=100", "save_every=100", "telemetry.prompts=2", "telemetry.every=2",
        "telemetry.teacher_steps=2",
    ]  # fmt: skip
    recipe = load_recipe(ROOT / "recipes/digits-amd.yaml", small + overrides)
    trainer = Trainer(DistillationTask(recipe), Path(folder), quiet=True)
    if list(Path(folder, "checkpoints").glob("step-*")):
        trainer.resume()
    if iterations == recipe.iterations:
        trainer.run()
    while trainer.iteration < iterations:
        trainer._step()
        trainer.iteration += 1
    return {name: full(tensor).clone() for name, tensor in trainer._tensors().items()}


def stream(folder: Path) -> list[dict[str, float]]:
    """The numbers of a run's log but its times; counts of histograms move with the last bit."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    apart = ("time", "seconds", "samples_per_second", "histograms")
    return [{k: v for k, v in line.items() if k not in apart and "cpu_seconds" not in k} for line in lines]


def assert_close(a: list[dict[str, float]], b: list[dict[str, float]], relative: float) -> None:
    assert [line.keys() for line in a] == [line.keys() for line in b]
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=relative, abs=1e-6)


@pytest.mark.parametrize(
    "layout",
    [["parallel.strategy=ddp"], ["parallel.strategy=fsdp"], ["parallel.strategy=hsdp", "parallel.replicas=2"]],
    ids=["ddp", "fsdp", "hsdp"],
)
def test_ranks(ranks: Any, models: Path, tmp_path: Path, layout: list[str]) -> None:
    alone = distil(str(models), str(tmp_path / "1"), layout, 4)
    for size in (2, 4):
        together = ranks(size, distil, str(models), str(tmp_path / str(size)), layout, 4)
        assert together[0].keys() == alone.keys()
        for name, tensor in alone.items():
            if name.endswith("to_k.bias"):
                continue  # softmax takes no notice of it: its gradient is rounding, which AdamW blows up
            for state in together:
                difference = (state[name] - tensor).abs() - 1e-4 * tensor.abs()
                assert float(difference.max()) < 1e-5, name
        assert_close(stream(tmp_path / "1"), stream(tmp_path / str(size)), 1e-3)
    load_file(tmp_path / "1/out/transformer/diffusion_pytorch_model.safetensors")
