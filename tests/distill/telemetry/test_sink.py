"""What a line of the log says of its interval."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.telemetry.sink import BINS, Count, Sink, Some, Total, fetched, histogram, on_host, summary


def test_floats_are_averaged_and_totals_summed() -> None:
    numbers, histograms, faults = summary({"a": [1.0, torch.tensor(4.0)], "b": [Total(3), Total(5)]})
    assert numbers == {"a": 2.5, "b": 8.0} and histograms == {} and faults == {}


def test_samples_are_pooled_into_a_mean_and_a_histogram() -> None:
    numbers, histograms, _ = summary({"a": [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0])]})
    assert numbers == {"a": 1.5}
    low, high, counts = histograms["a"]
    assert (low, high) == (0.0, 4.0) and len(counts) == BINS
    assert [i for i, n in enumerate(counts) for _ in range(n)] == [0, 4, 4, 15]


def test_values_that_are_not_finite_are_counted_and_left_out_of_means() -> None:
    numbers, histograms, faults = summary(
        {"a": [1.0, math.nan, 3.0], "b": [math.inf], "c": [torch.tensor([2.0, math.nan])], "d": [0.0]}
    )
    assert faults == {"a": 1, "b": 1, "c": 1}
    assert numbers["a"] == 2.0 and math.isnan(numbers["b"]) and numbers["c"] == 2.0
    assert histograms["c"] == [2.0, 2.0, [1]] and "b" not in histograms


def test_some_tells_the_mean_of_what_it_chooses_and_nothing_where_that_is_nothing() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    none, two = torch.zeros(3, dtype=torch.bool), values > 1
    numbers, histograms, faults = summary(
        {"a": [Some(values, none), Some(values, two), 2.0], "b": [Some(values, none)]}
    )
    assert numbers == {"a": 3.0} and histograms == {} and faults == {}


def test_a_count_is_summed_over_an_interval_also_after_it_has_travelled() -> None:
    one, two = Count(torch.tensor([True, False, True])), Count(torch.tensor([[True], [False]]))
    for values in ({"a": [one, two, one]}, on_host({"a": [one, two, one]})):
        numbers, histograms, faults = summary(values)
        assert numbers == {"a": 5.0} and histograms == {} and faults == {}


def test_what_travels_has_neither_graph_nor_another_place() -> None:
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    told = on_host({"a": [x * 2, 0.5], "b": [Some(x * 3, torch.tensor([False, True]))], "c": [Total(2)]})
    assert torch.equal(told["a"][0], torch.tensor([2.0, 6.0])) and told["a"][1:] == [0.5] and told["c"] == [Total(2)]  # type: ignore[arg-type]
    assert not any(t.requires_grad for t in (told["a"][0], told["b"][0].values))  # type: ignore[union-attr]
    assert summary(told)[0] == {"a": pytest.approx(8.5 / 3), "b": 9.0, "c": 2.0}
    assert fetched([]) == []


@pytest.mark.parametrize("value", [0.0, 1.0, -3e5])
def test_equal_values_make_one_bin(value: float) -> None:
    assert histogram(np.full(7, value)) == [value, value, [7]]


def test_a_line_holds_numbers_histograms_and_faults(tmp_path: Path) -> None:
    sink = Sink(tmp_path, 10)
    sink.add({"x": [1.0, 3.0], "y": [torch.tensor([1.0, 2.0])], "z": [math.nan], "fake/loss": [0.5]})
    assert sink.flush(12, batch_size=4) == {"fake/loss": "0.5"}
    sink.add({"x": [5.0]})
    sink.flush(14, batch_size=4)
    sink.close()
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["iteration"], first["x"], first["y"], first["z"]) == (12, 2.0, 1.5, None)
    assert first["not_finite"] == {"z": 1} and first["histograms"] == {"y": [1.0, 2.0, [1, *[0] * 14, 1]]}
    assert first["seconds"] > 0 and first["cpu_seconds"] >= 0
    assert first["samples_per_second"] == pytest.approx(8 / first["seconds"])
    assert second["x"] == 5.0 and not {"y", "histograms", "not_finite"} & second.keys()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"histograms/y" in events.read_bytes()
