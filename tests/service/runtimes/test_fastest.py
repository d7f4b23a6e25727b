"""The runtime that is faster here and now, for those who ask for it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import service.runtimes as module
from distill.bundle import Bundle
from service.runtimes import RuntimeUnavailable, generate, open_runtime
from service.runtimes.graphs import GraphRuntime


def test_it_is_measured_and_said(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    taken = open_runtime(bundle, threads=1, max_batch=1, runtime="fastest")
    able = taken.capabilities
    told = dict(re.findall(r"(onnx|openvino) in float32 ([\d.]+) ms", able.measured))
    assert told.keys() == {"onnx", "openvino"}
    assert float(told[able.runtime]) == min(map(float, told.values()))
    asked = open_runtime(bundle, threads=1, max_batch=1, runtime=able.runtime)  # type: ignore[arg-type]
    assert asked.capabilities.measured == ""
    ours, theirs = (generate(one, bundle.manifest, ["a red cube"], [3], steps=2) for one in (taken, asked))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("faster", ["onnx", "openvino"])
def test_the_best_of_several_turns_decides(faster: str, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = {"onnx": [9.0, 5.0, 7.0], "openvino": [90.0, 4.0 if faster == "openvino" else 6.0, 8.0]}

    def timed(runtime: GraphRuntime) -> float:
        return turns[runtime.name].pop(0)

    monkeypatch.setattr(module, "_time_picture", timed)
    taken = open_runtime(Bundle.open(tiny_bundle), threads=1, max_batch=1, runtime="fastest")
    assert taken.capabilities.runtime == faster


def test_a_precision_that_none_has_is_refused_with_both_reasons(tiny_bundle: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="precision is float16, which is for GPUs"):
        open_runtime(Bundle.open(tiny_bundle), threads=1, max_batch=1, runtime="fastest", precision="float16")
