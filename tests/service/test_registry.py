"""Loading bundles: which ones, and what is said when one cannot be trusted."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.bundle import Bundle, BundleError, write_manifest
from service.errors import ApiError
from service.jobs import StoreError
from service.registry import Registry, find_bundles
from service.settings import Settings


def test_while_loading_requests_are_told_to_come_back(tiny_bundle: Path) -> None:
    registry = Registry(Settings(bundles=tiny_bundle))
    with pytest.raises(ApiError) as refused:
        registry.get(None)
    assert (refused.value.status, refused.value.code) == (503, "model_loading")
    assert refused.value.headers["retry-after"] == "2"
    assert registry.alive
    assert not registry.ready


def test_a_bundle_or_a_folder_of_bundles(tiny_bundle: Path) -> None:
    assert find_bundles(tiny_bundle) == find_bundles(tiny_bundle.parent) == [tiny_bundle]
    registry = Registry(Settings(bundles=tiny_bundle, threads=1, max_batch=1))
    registry.load()
    try:
        assert registry.ready
        assert registry.get(None) is registry.get("tiny-sdxl")
        with pytest.raises(ApiError, match="this server has tiny-sdxl") as refused:
            registry.get("dall-e-3")
        assert (refused.value.status, refused.value.code, refused.value.param) == (404, "model_not_found", "model")
    finally:
        registry.close()
    assert not registry.ready


def test_the_runtime_is_the_one_of_the_settings(tiny_bundle: Path) -> None:
    registry = Registry(Settings(bundles=tiny_bundle, threads=1, max_batch=1, runtime="openvino"))
    registry.load()
    try:
        able = registry.get(None).runtime.capabilities
        assert (able.runtime, able.precision) == ("openvino", "float32")
    finally:
        registry.close()


@pytest.mark.parametrize(
    ("settings", "lanes"),
    [
        ({"threads": 2}, 2),
        ({"threads": 2, "lanes": 1}, 1),
        ({"threads": 1}, 1),
        ({"threads": 2, "replicas": 2, "lanes": 2}, 2),
        ({"threads": 2, "runtime": "openvino"}, 1),
    ],
)
def test_a_processor_has_a_lane_per_thread_where_the_runtime_can(
    tiny_bundle: Path, settings: dict[str, Any], lanes: int
) -> None:
    registry = Registry(Settings(bundles=tiny_bundle, max_batch=1, **settings))
    registry.load()
    try:
        model = registry.get(None)
        assert model.engine.lane_count(model.name) == lanes
        assert model.runtime.capabilities.threads == settings["threads"], "of a picture that is alone"
    finally:
        registry.close()


def test_a_runtime_that_is_not_installed_is_named_and_nothing_is_served(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    registry = Registry(Settings(bundles=tiny_bundle, runtime="openvino"))
    registry.load()
    assert registry.state == "failed"
    assert registry.reason.endswith("run: pip install 'leapfrog[openvino]'")


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "unlisted"])
def test_a_damaged_file_is_named_and_nothing_is_served(tiny_bundle: Path, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "bundles" / "tiny"
    shutil.copytree(tiny_bundle, root)
    file = root / Bundle.open(root).engine("step").file
    data = file.read_bytes()
    if damage == "altered":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "missing":
        file.unlink()
    else:
        (root / "bundle.json").unlink()
        file = root / "bundle.json"
    registry = Registry(Settings(bundles=root.parent))
    registry.load()
    assert registry.state == "failed"
    assert not registry.alive
    assert file.name in registry.reason
    with pytest.raises(ApiError, match=file.name) as refused:
        registry.get(None)
    assert refused.value.status == 503


def test_two_bundles_of_one_name_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(tiny_bundle, tmp_path / name)
    registry = Registry(Settings(bundles=tmp_path, threads=1, max_batch=1))
    registry.load()
    assert registry.state == "failed"
    assert "rename one" in registry.reason


def test_models_that_do_not_draw_from_text_are_skipped(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "labels")
    bundle = Bundle.open(tmp_path / "labels")
    write_manifest(bundle.path, bundle.manifest.model_copy(update={"task": "class-to-image"}))
    registry = Registry(Settings(bundles=tmp_path))
    registry.load()
    assert "no bundle that draws or films from text" in registry.reason


def test_no_bundles_at_all(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="LEAPFROG_BUNDLES"):
        find_bundles(tmp_path)
    with pytest.raises(BundleError, match="is not a folder"):
        find_bundles(tmp_path / "nowhere")


def test_a_model_is_found_by_what_it_makes(tiny_bundle: Path, tiny_video_bundle: Path, tmp_path: Path) -> None:
    for bundle in (tiny_bundle, tiny_video_bundle):
        (tmp_path / bundle.name).symlink_to(bundle)
    registry = Registry(Settings(bundles=tmp_path, threads=1, max_batch=1))
    registry.load()
    assert registry.state == "ready", registry.reason
    assert registry.get(None, films=True).name == "tiny-wan" and registry.get(None, films=False).name == "tiny-sdxl"
    assert registry.get("tiny-wan").films and not registry.get("tiny-sdxl").films
    for name, films, way in (("tiny-wan", False, "/v1/videos"), ("tiny-sdxl", True, "/v1/images/generations")):
        with pytest.raises(ApiError, match=way):
            registry.get(name, films=films)
    registry.close()


def test_what_must_be_done_before_serving_can_fail_it(tiny_bundle: Path) -> None:
    registry = Registry(Settings(bundles=tiny_bundle, threads=1, max_batch=1))

    def refuse() -> None:
        raise StoreError("the folder belongs to another")

    registry.load(refuse)
    assert (registry.state, registry.reason) == ("failed", "the folder belongs to another")
    registry.close()
