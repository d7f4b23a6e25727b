"""The student of random weights is a bundle like any other, with the build that it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.random_student import CHANNELS, configs, main, save_student
from distill.bundle import Bundle
from distill.export.graphs import load_graphs


def test_it_has_about_200_million_parameters_and_stable_diffusions_autoencoder() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    made = configs(1000, 998, 999)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel.from_config(made["unet"]), AutoencoderKL.from_config(made["vae"])
    assert sum(parameter.numel() for parameter in unet.parameters()) == pytest.approx(220e6, rel=0.02)
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    assert unet.config.block_out_channels[0] == CHANNELS


def test_a_narrow_one_loads_and_draws(tmp_path: Path) -> None:
    save_student(tmp_path / "narrow", channels=32)
    bundle = Bundle.open(tmp_path / "narrow")
    specs = load_graphs(bundle.path, bundle.manifest)
    assert list(specs) == ["text_encoder", "step", "decoder"]
    drawn = specs["step"].sample(1, torch.Generator().manual_seed(0))
    assert specs["step"].run(drawn)["x0"].shape == (1, 4, 32, 32)


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "exists; give a new folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "new"), "--channels", "100"])
    assert "--channels is 100; give a multiple of 32" in capsys.readouterr().err
