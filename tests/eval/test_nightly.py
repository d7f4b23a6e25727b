"""Nights from end to end on a real exported bundle: first night, baseline, clean nights, a planted regression."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.bundle import Bundle, write_manifest
from eval import baseline, nightly
from eval.errors import EvalError
from eval.night import fresh_panel
from eval.prompts import build_prompts, load_suite
from eval.store import Store
from tests.eval import nights  # registers test-contrast

assert nights.Contrast.name == "test-contrast"


def fade(path: Path) -> None:
    """Make a bundle's decoder paint a third of the contrast, with a valid manifest: a regression nobody announced."""
    import onnx
    from onnx import numpy_helper

    bundle = Bundle.open(path)
    file = path / bundle.engine("decoder").file
    model = onnx.load(file)
    last = [tensor for tensor in model.graph.initializer if "conv_out" in tensor.name]
    assert last, [tensor.name for tensor in model.graph.initializer]
    for tensor in last:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((values / 3).astype(values.dtype), tensor.name))
    onnx.save(model, file)
    write_manifest(path, bundle.manifest)


@dataclass
class Site:
    """A place with a bundle, a suite, gates and a nightly.yaml."""

    root: Path

    def write(self, name: str, tree: Any) -> Path:
        path = self.root / name
        path.write_text(yaml.safe_dump(tree))
        return path

    @property
    def store(self) -> Path:
        return self.root / "store" / "s.sqlite"

    def lay_out(self, *, at_least: float = 0.1) -> None:
        draw = {"seed": 7_650_000, "count": 8, "things": [1, 2]}
        common = {"description": "for tests", "world": "scenes", "batch": 8}
        metrics: dict[str, Any] = {"test-contrast": {}}
        quick = self.write("quick.yaml", common | {"name": "quick", "prompts": draw, "metrics": metrics})
        timed = {"name": "timed", "prompts": draw, "metrics": {"latency": {}}, "batch": 1, "cache": False}
        timed_path = self.write("timed.yaml", common | timed)
        canary = {"name": "sick", "prompts": draw | {"seed": 7_660_000}, "metrics": metrics}
        canary_path = self.write("sick.yaml", common | canary)
        gates = {
            "scores": [{"suite": str(quick), "metric": "test-contrast", "margin": 1.0}],
            "costs": [{"suite": str(timed_path), "metric": "latency", "percent": 25, "floor": 100_000}],
            "canaries": {
                "suite": str(canary_path),
                "expect": [{"damage": "blurred", "metric": "test-contrast", "at_least": at_least}],
            },
        }
        watch = {
            "bundle": str(self.root / "tiny-sdxl"), "gates": str(self.write("gates.yaml", gates)), "steps": 2,
            "runtime": "onnx", "precision": "float32", "threads": 1,
        }  # fmt: skip
        places = {"cache": str(self.root / "cache"), "judges": str(self.root), "out": str(self.root / "out")}
        self.write("nightly.yaml", places | {"store": str(self.store), "bundles": [watch]})

    def night(self, date: str, *more: str) -> int:
        return nightly.main(["--config", str(self.root / "nightly.yaml"), "--night", date, "--quiet", *more])

    def record(self, date: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads((self.root / "out" / date / "report.json").read_text())
        return found[0]

    def pin(self) -> int:
        gates = ["--gates", str(self.root / "gates.yaml"), "--store", str(self.store)]
        return baseline.main(["pin", str(self.root / "tiny-sdxl"), "--reason", "first release", *gates])


@pytest.fixture
def site(tmp_path: Path, tiny_bundle: Path) -> Site:
    shutil.copytree(tiny_bundle, tmp_path / "tiny-sdxl")
    made = Site(tmp_path)
    made.lay_out()
    return made


def test_a_first_night_a_clean_night_and_a_planted_regression(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.night("2026-01-01") == 4
    assert "no baseline yet" in (site.root / "out" / "2026-01-01" / "index.html").read_text()
    assert site.pin() == 0

    assert site.night("2026-01-02") == 0
    record = site.record("2026-01-02")
    assert record["verdict"] == "equivalent" and record["alert"] is None
    assert [(c["damage"], c["ok"]) for c in record["controls"]] == [("A/A", True), ("blurred", True)]
    assert record["controls"][0]["change"] == 0.0, "the same bundle makes the same pictures"

    fade(site.root / "tiny-sdxl")
    capsys.readouterr()
    assert site.night("2026-01-04") == 1
    out = capsys.readouterr().out
    assert "tiny-sdxl: regression" in out and "index.html" in out
    record = site.record("2026-01-04")
    contrast, latency = record["rows"]
    assert (
        contrast["verdict"] == "regression" and contrast["change"]["delta"] < -1 and latency["verdict"] == "equivalent"
    )
    assert contrast["confirmation"]["delta"] < -1 and contrast["confirmation"]["n"] == 8
    assert contrast["drift"] and contrast["history"]["nights"] == 1
    assert record["alert"]["kind"] == "regression" and "quick/test-contrast" in record["alert"]["text"]
    assert record["since"] == "2026-01-02" and any(text.startswith("digest: ") for text in record["changes"])
    page = (site.root / "out" / "2026-01-04" / "index.html").read_text()
    assert "2026-01-03 is missing" in page and page.count("data:image/png") >= 16
    assert "<failure" in (site.root / "out" / "2026-01-04" / "junit.xml").read_text()


def test_a_night_started_again_makes_nothing_twice(site: Site) -> None:
    site.night("2026-01-01")
    with Store(site.store) as store:
        before = [run["id"] for run in store.runs()]
    first = site.record("2026-01-01")
    assert site.night("2026-01-01") == 4
    with Store(site.store) as store:
        after = [run["id"] for run in store.runs()]
        assert len(store.nights()) == 1
    # What is never cached is what the controls measure again; everything else was found.
    assert set(before) <= set(after) and site.record("2026-01-01")["runs"] == first["runs"]
    assert after == before


def test_a_quick_look_is_no_night_and_no_baseline(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert site.night("2026-01-01", "--samples", "7") == 4
    record = site.record("2026-01-01")
    assert record["rows"][0]["candidate"]["n"] == 7 and record["alert"] is None
    with Store(site.store) as store:
        assert store.nights() == []
    assert site.pin() == 3
    assert "no whole run" in capsys.readouterr().err


def test_a_metric_that_misses_its_canary_is_invalid(site: Site) -> None:
    site.night("2026-01-01")
    site.pin()
    site.lay_out(at_least=1000.0)
    assert site.night("2026-01-02") == 3
    (contrast, _) = site.record("2026-01-02")["rows"]
    assert contrast["verdict"] == "invalid" and "missed its canary: blurred" in contrast["note"]


def test_a_bundle_that_cannot_be_read_is_a_broken_night_and_the_store_stays_whole(site: Site) -> None:
    site.night("2026-01-01")
    site.pin()
    file = next((site.root / "tiny-sdxl").rglob("*.onnx"))
    file.write_bytes(file.read_bytes()[:100])
    assert site.night("2026-01-02") == 3
    record = site.record("2026-01-02")
    assert {row["verdict"] for row in record["rows"]} == {"broken"} and "altered or truncated" in record["rows"][0][
        "note"
    ]
    assert record["alert"]["kind"] == "measurement"
    with Store(site.store) as store:
        assert [night["night"] for night in store.nights()] == ["2026-01-02", "2026-01-01"]


def test_without_the_baselines_bundle_the_night_says_that_it_could_not_confirm(site: Site) -> None:
    site.night("2026-01-01")
    site.pin()
    shutil.rmtree(site.store.parent / "baselines")
    fade(site.root / "tiny-sdxl")
    assert site.night("2026-01-02") == 1  # sure enough from one panel
    record = site.record("2026-01-02")
    assert record["rows"][0]["confirmation"] is None and record["failures"][0].startswith("no second panel")


def test_pinning_needs_runs_of_exactly_these_weights(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.night("2026-01-01")
    fade(site.root / "tiny-sdxl")
    assert site.pin() == 3
    assert "quick has no whole run" in capsys.readouterr().err
    assert site.night("2026-01-02") == 4
    assert site.pin() == 0
    assert baseline.main(["list", "--store", str(site.store)]) == 0
    assert "first release" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundels": []}, "did you mean 'bundles'"),
        ({"bundles": []}, "bundles: "),
        ({"expected_by": "noon"}, "expected_by"),
        ({"bundles": [{"bundle": "a", "gates": "b"}] * 2}, "a is listed twice"),
    ],
)
def test_mistakes_of_the_configuration_are_named(site: Site, change: dict[str, Any], message: str) -> None:
    tree = yaml.safe_load((site.root / "nightly.yaml").read_text())
    path = site.write("wrong.yaml", tree | change)
    with pytest.raises(EvalError, match=message):
        nightly.load_config(path)


def test_mistakes_of_the_command_are_one_line(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (["--bundle", "tiny"], "did you mean 'tiny-sdxl'"),
        (["--night", "yesterday"], "write a date"),
        (["--samples", "1"], "use 2 or more"),
        (["--config", "nowhere.yaml"], "cannot be read"),
    ):
        assert nightly.main(["--config", str(site.root / "nightly.yaml"), "--quiet", *more]) == 3
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1


def test_the_shipped_configuration_loads_and_names_what_exists() -> None:
    from eval.gates import load_gates

    config = nightly.load_config(nightly.DEFAULT_CONFIG)
    assert {watch.bundle.name for watch in config.bundles} == {"scenes-sdxl", "digits-sit", "scenes-wan"}
    assert all(load_gates(watch.gates).scores for watch in config.bundles)


@pytest.mark.parametrize(
    "name", ["scenes-trained", "scenes-fid", "scenes-diversity", "digits", "scenes-latency", "scenes-wan-trained"]
)
def test_fresh_panels_share_no_prompt_and_no_seed_with_the_suite_or_its_neighbours(name: str) -> None:
    suite = load_suite(name)
    total = suite.prompts.count * suite.seeds_per_prompt
    metric = next(iter(suite.metrics))
    seeds = {fresh_panel(suite, f"2026-11-{day:02}", [metric]).prompts.seed for day in range(1, 31)}
    for seed in seeds:
        assert seed >= suite.prompts.seed + total
        assert seed + total <= suite.prompts.seed + 50_000
    panel = fresh_panel(suite, "2026-11-23", [metric])
    assert panel.metrics == {metric: suite.metrics[metric]} and panel.name.startswith(f"{name}-fresh-")
    ours, theirs = build_prompts(suite, 4 * suite.seeds_per_prompt), build_prompts(panel, 4 * suite.seeds_per_prompt)
    assert not {prompt.key for prompt in ours} & {prompt.key for prompt in theirs}
