"""The benchmark of training steps at full size: a rehearsal of it, its operations, and what it says without memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train_step
from benchmarks.train_step import main, out_of_memory, pass_costs, peak_of, spread
from benchmarks.untrained import Untrained
from distill.config import load_recipe
from distill.dryrun import plan
from distill.families.published import SIT_XL_2
from distill.rewards.clip import ClipReward
from distill.shrink import save_tiny_teacher

ROOT = Path(__file__).parents[2]
SMALL = ["--shrink", "--repeats", "1", "--batch", "4", "--set", "steps=[1]", "fake_per_student=1", "fake_warmup=0"]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LEAPFROG_DEVICE", "cpu")


@pytest.mark.parametrize(("family", "layout"), [("sit", "full"), ("sdxl", "lora"), ("wan", "lora")])
def test_a_rehearsal_measures_both_methods_by_phase(
    family: str, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "train_step.json"
    out.write_text('{"another": {}}')
    assert main(["--family", family, "--layout", layout, *SMALL, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    entry = found.pop(next(key for key in found if key.startswith(f"{family}, {layout}")))
    assert list(found) == ["another"] and entry["shrunk"] and entry["torch"] == torch.__version__
    assert entry["layout"] == layout
    plain, amd = entry["rows"]
    assert (plain["method"], amd["method"], plain["ratio"]) == ("dmd2", "amd", 1.0)
    assert amd["ratio"] == pytest.approx(amd["seconds"][0] / plain["seconds"][0], rel=1e-3)
    for row in (plain, amd):
        assert list(row["phases"]) == ["student", "fake"]
        assert all(part["seconds"][0] > 0 and part["mfu"] is None for part in row["phases"].values())
        assert row["seconds"][0] >= sum(part["seconds"][0] for part in row["phases"].values())
    assert "dmd2       batch 4" in capsys.readouterr().out


def test_a_folder_of_configs_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and reward are made with random weights, as at full size."""
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    monkeypatch.setattr("benchmarks.untrained.DINOV2_LARGE", {**tiny, "num_labels": 1000})
    save_tiny_teacher("sit", SIT_XL_2, tmp_path / "teacher")
    for path in (tmp_path / "teacher").rglob("*.safetensors"):
        path.unlink()
    out = tmp_path / "out.json"
    words = [word for word in SMALL if word != "--shrink"]
    assert main(["--family", "sit", "--config", str(tmp_path / "teacher"), *words, "--json", str(out)]) == 0
    (entry,) = json.loads(out.read_text()).values()
    assert [row["method"] for row in entry["rows"]] == ["dmd2", "amd"] and not entry["shrunk"]
    assert entry["stand_ins"] == {} and all(row["seconds"][0] > 0 for row in entry["rows"])


def test_operations_are_those_of_the_plan(tmp_path: Path) -> None:
    """The rows that went through each network make what the dry run counts from the recipe."""
    options = train_step.parser().parse_args(["--family", "sit", "--objective", "dmd2", *SMALL])
    found = train_step.recipes(options, 4, tmp_path)
    steps, others = train_step.contenders(found, tmp_path, shrink=True)
    (row,) = train_step.rows_of(steps, train_step.measure(steps, 1, lambda line: None), 4, None)
    passes = plan(found["dmd2"].model_copy(update={"activation_checkpointing": False})).passes
    for role in ("student", "fake"):
        per_sample = sum(p.operations * p.often for p in passes if p.phase == role)
        assert row.phases[role].tflop == pytest.approx(4 * per_sample / 1e12, abs=1e-6) and others == {}


def test_an_adapter_costs_less_to_train_than_the_whole_network() -> None:
    whole = load_recipe("recipes/sit-xl-amd-1step.yaml", ["parallel={}"])
    cost, plain = pass_costs(whole)
    assert cost.forward == plain and cost.backward == pytest.approx(2 * plain, rel=0.01)
    cost, same = pass_costs(
        load_recipe("recipes/sit-xl-amd-1step.yaml", ["parallel={}", "adapters={rank: 64, alpha: 8}"])
    )
    assert same == plain and plain < cost.forward < 1.2 * plain and cost.backward < 1.4 * plain


def test_what_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*given: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_step, "contenders", full)
    assert main(["--family", "sit", "--objective", "dmd2", *SMALL]) == 0
    told = capsys.readouterr().out
    assert "dmd2       out of memory at batch 4: 0.0 GiB" in told and "nothing is kept" in told
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: int(79.14 * 2**30))
    assert out_of_memory(8) == "out of memory at batch 8: 79.1 GiB"


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H200", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA T4", None)],
)
def test_peaks_are_known_by_name(name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: name)
    assert peak_of(torch.device("cuda", 0)) == (name, tflops)
    assert peak_of(torch.device("cpu"))[1] is None


def test_a_reward_without_an_architecture_here_is_stood_in_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"vision_config": {**tiny, "image_size": 224, "patch_size": 112}, "text_config": tiny, "projection_dim": 8}
    monkeypatch.setattr("benchmarks.untrained.VIT_H_14", sizes)
    made = Untrained(tmp_path)
    judge = made.judge("hpsv2")
    assert isinstance(judge, ClipReward) and judge.name == "hpsv2, untrained" and made.stand_ins == {}
    assert judge.score(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ["a", "b"]).shape == (2,)
    made.judge("imagereward")
    assert made.stand_ins == {"imagereward": "CLIP ViT-H/14"}


def test_a_spread_is_median_least_and_greatest() -> None:
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
