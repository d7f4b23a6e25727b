"""What an export will take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distill.bundle import Bundle
from distill.export.__main__ import main
from distill.export.estimate import BYTES_PER_SECOND, SECONDS_PER_LAYER, estimate, report


def test_sizes_follow_parameters_and_time_the_layers() -> None:
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(50)))
    found, shared = (estimate("step", module, shared=shared) for shared in (False, True))
    assert (found.parameters, found.file_bytes) == (50_000_000, 100_050_000)
    assert (shared.file_bytes, shared.duration_s) == (50_000, found.duration_s)
    assert found.duration_s == pytest.approx(50 * SECONDS_PER_LAYER + 1e8 / BYTES_PER_SECOND)
    lines = report([found, estimate("decoder", nn.Linear(10, 10), shared=False)])
    assert lines[0].startswith("step") and "50.0 M parameters" in lines[0]
    assert f"{found.file_bytes / 1e6:.1f} MB on disk" in lines[0]
    assert (
        lines[2].startswith("all")
        and lines[2].split("disk")[1].split("about")[0] == lines[0].split("disk")[1].split("about")[0]
    )


def test_a_dry_run_of_a_bundle_names_its_graphs_and_writes_nothing(
    tiny_sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_sources), "--to", "onnx", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["text_encoder", "step", "decoder", "all"]
    assert Bundle.open(tiny_sources).manifest.engines == ()
    with pytest.raises(SystemExit):
        main([str(tiny_sources), "--to", "tensorrt", "--dry-run"])
    assert "--dry-run is for --to onnx in float32" in capsys.readouterr().err
