"""The command, on a real extractor of random weights: filled, verified, damaged; and without any weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval import verify_golden
from eval.golden import EXTRACTORS, METRICS, record_of, unverified
from eval.metrics.extractors import load_extractor


@pytest.fixture
def folder(judges_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(judges_folder / "scenes-clip", tmp_path / EXTRACTORS["cmmd"])
    (tmp_path / "golden.yaml").write_text("# What published scorers give\n{}\n")
    return tmp_path


def command(folder: Path, *words: str) -> int:
    places = ["--judges", str(folder), "--store", str(folder / "s.sqlite"), "--golden", str(folder / "golden.yaml")]
    return verify_golden.main([*places, *words])


def test_weights_are_unknown_then_filled_then_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    protocol = {"extractor": EXTRACTORS["cmmd"], "weights": load_extractor(folder, EXTRACTORS["cmmd"]).digest}
    assert command(folder, "--metric", "cmmd") == 3
    assert "unknown weights cmmd" in capsys.readouterr().out
    assert unverified("cmmd", protocol, folder / "s.sqlite")
    assert command(folder, "--metric", "cmmd", "--fill", "this machine") == 0
    assert "verified        cmmd" in capsys.readouterr().out
    assert not unverified("cmmd", protocol, folder / "s.sqlite")


def test_a_scorer_that_computes_otherwise_differs_and_is_unverified_again(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(folder, "--metric", "cmmd", "--fill", "this machine") == 0
    extractor = load_extractor(folder, EXTRACTORS["cmmd"])
    network = extractor.network
    monkeypatch.setattr(extractor, "network", lambda images: network(images.flip(1)))
    assert command(folder) == 3
    assert "differs         cmmd" in capsys.readouterr().out
    assert unverified("cmmd", {"extractor": EXTRACTORS["cmmd"], "weights": extractor.digest}, folder / "s.sqlite")


def test_changed_weights_are_other_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(folder, "--metric", "cmmd", "--fill", "this machine") == 0
    load_extractor.cache_clear()
    file = folder / EXTRACTORS["cmmd"] / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {name: values + torch.full_like(values, 1e-3) for name, values in tensors.items()}, file, {"format": "pt"}
    )
    assert command(folder) == 0
    assert "unknown weights cmmd" in capsys.readouterr().out


def test_without_weights_nothing_is_run_and_every_reason_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert command(tmp_path / "none") == 3
    assert "golden.yaml cannot be read" in capsys.readouterr().err
    (tmp_path / "golden.yaml").write_text("{}")
    assert command(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [["not", "run", name] for name in METRICS]
    assert not record_of(tmp_path / "s.sqlite").exists()
    assert command(tmp_path, "--metric", "hpsv2.1") == 3


def test_bad_options_are_one_clear_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--metric", "hpsv2.2"], "did you mean 'hpsv2.1'"),
        (["--fill", "x"], "name it with --metric"),
    ):
        assert command(folder, *words) == 3
        assert message in capsys.readouterr().err
