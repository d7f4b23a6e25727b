"""Published architectures as graphs: their sizes as published, and narrow ones all the way through."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from distill.export.estimate import estimate
from distill.export.production import cut, export_production, main, production_graphs
from distill.families.published import USUAL
from distill.shrink import tiny_configs

VOCABULARY = {"<|startoftext|>": 98, "<|endoftext|>": 99, "x": 0}


@pytest.mark.parametrize(
    ("family", "millions"),
    [("sdxl", 2567.5), ("sd15", 859.5), ("wan", 1419.0)],  # the last two as their authors count; SDXL's paper: 2.6 B
)
def test_full_denoisers_are_of_the_published_size(family: str, millions: float) -> None:
    spec = next(production_graphs(family, USUAL[family], "meta"))
    assert estimate("step", spec.module, shared=False).parameters / 1e6 == pytest.approx(millions, abs=0.1)
    for side in spec.dims["latents"][-2:]:
        assert isinstance(side, str), "height and width are free"


@pytest.mark.parametrize("family", ["sdxl", "sd15", "sit", "wan"])
def test_a_cut_keeps_widths_and_drops_layers(family: str) -> None:
    whole, shallow = (
        next(production_graphs(family, configs, "meta")).module
        for configs in (USUAL[family], cut(family, USUAL[family], 1))
    )
    assert 4 * sum(1 for _ in shallow.parameters()) < 3 * sum(1 for _ in whole.parameters())
    widths = [{parameter.shape for parameter in module.parameters()} for module in (shallow, whole)]
    assert len(widths[0] - widths[1]) <= 0.1 * len(widths[0])


def test_a_narrow_one_exports_at_free_height_and_width(tmp_path: Path) -> None:
    said: list[str] = []
    configs = tiny_configs("sd15", USUAL["sd15"], VOCABULARY)
    written = export_production("sd15", configs, tmp_path, say=said.append)
    assert [path.name for path in written] == ["step.onnx", "decoder.onnx"]
    for path in written:
        (latents,) = [value for value in onnx.load(path).graph.input if value.name == "latents"]
        assert [side.dim_param for side in latents.type.tensor_type.shape.dim] == ["batch", "", "height", "width"]
    assert "GB of memory so far; max_abs" in said[0]


def test_the_command_line_wants_a_folder_or_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sdxl", "--full", "--dry-run"]) == 0
    assert "2567.5 M parameters    5136.2 MB on disk" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["sdxl"])
    assert "give --out, the folder of the graphs, or --dry-run" in capsys.readouterr().err
