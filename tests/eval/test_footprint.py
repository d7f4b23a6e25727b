"""The process that measures memory: on a real bundle, without torch, and what it says when there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval import footprint
from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples
from eval.prompts import Prompt
from eval.sources import BundleSource

PROMPT = Prompt("p", "a red cube", 7)


def test_a_bundles_memory_and_parity_are_those_of_the_bundle_itself(tiny_bundle: Path) -> None:
    source = BundleSource(tiny_bundle, steps=1, threads=1, batch=2)
    peak = footprint.measure(source, PROMPT)
    assert 20 < peak < footprint.peak_mib()  # this process holds torch too
    metric = create("parity", source=source)
    metric.update(Samples(source.make([PROMPT]), (PROMPT,)))
    np.testing.assert_array_equal(metric.compute().per_sample, [0.0])


def test_a_bundle_that_is_gone_is_an_error_with_its_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert footprint.main([str(tmp_path)]) == 3
    assert "has no bundle.json" in capsys.readouterr().err

    class Gone:
        name, command = "gone", (str(tmp_path),)

    with pytest.raises(EvalError, match=r"memory of gone could not be measured: error: .* has no bundle.json"):
        footprint.measure(Gone(), PROMPT)  # type: ignore[arg-type]


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, eval.footprint; print(*({'torch', 'transformers', 'eval.metrics'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
