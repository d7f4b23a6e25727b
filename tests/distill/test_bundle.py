"""The bundle refuses whatever it cannot vouch for, and says which file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from distill.bundle import MANIFEST, Bundle, BundleError, Engine, Manifest, Sampler, sha256, write_manifest
from distill.sampling import ScaledLinear, student_table

WEIGHTS = "unet/weights.bin"


@pytest.fixture
def root(tmp_path: Path, manifest: Manifest) -> Path:
    """A bundle of two small files; bundle.py does not look into them."""
    (tmp_path / "unet").mkdir()
    (tmp_path / WEIGHTS).write_bytes(bytes(range(256)) * 16)
    (tmp_path / "model_index.json").write_text("{}")
    write_manifest(tmp_path, manifest)
    return tmp_path


def edit(root: Path, **changes: Any) -> None:
    content = json.loads((root / MANIFEST).read_text())
    (root / MANIFEST).write_text(json.dumps(content | changes))


def test_bundle_opens_with_every_file_listed_and_hashed(root: Path, manifest: Manifest) -> None:
    bundle = Bundle.open(root)
    assert set(bundle.manifest.files) == {WEIGHTS, "model_index.json"}
    assert bundle.manifest.files[WEIGHTS] == sha256(root / WEIGHTS)
    assert bundle.file(WEIGHTS) == root / WEIGHTS
    assert bundle.manifest.model_copy(update={"files": {}}) == manifest


def test_manifest_keeps_the_sampler_bit_for_bit(root: Path) -> None:
    schedule = ScaledLinear()
    expected = student_table(schedule, "epsilon", schedule.grid(8))
    found = Bundle.open(root).manifest.samplers[8].table()
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.timesteps, expected.timesteps)
    assert found.rows.dtype == np.float32


def test_missing_file_is_refused_by_name(root: Path) -> None:
    (root / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=r"unet/weights\.bin is missing"):
        Bundle.open(root)


def test_truncated_file_is_refused_by_name_and_size(root: Path) -> None:
    (root / WEIGHTS).write_bytes((root / WEIGHTS).read_bytes()[:100])
    with pytest.raises(BundleError, match=r"unet/weights\.bin was altered or truncated \(100 bytes"):
        Bundle.open(root)


def test_one_flipped_bit_is_refused_by_name(root: Path) -> None:
    content = bytearray((root / WEIGHTS).read_bytes())
    content[1000] ^= 1
    (root / WEIGHTS).write_bytes(content)
    with pytest.raises(BundleError, match=r"unet/weights\.bin was altered"):
        Bundle.open(root)


@pytest.mark.parametrize("name", ["../secret.txt", "unet/../../secret.txt", "ABSOLUTE"])
def test_listed_path_outside_the_bundle_is_refused_even_with_the_right_hash(root: Path, name: str) -> None:
    outside = root.parent / "secret.txt"
    outside.write_text("secret")
    name = str(outside) if name == "ABSOLUTE" else name
    edit(root, files={name: sha256(outside)})
    with pytest.raises(BundleError, match=r"secret\.txt'?, which lies outside the bundle"):
        Bundle.open(root)


def test_unlisted_file_is_not_handed_out(root: Path) -> None:
    (root / "extra.bin").write_bytes(b"extra")
    bundle = Bundle.open(root)
    with pytest.raises(BundleError, match=r"extra\.bin is not listed"):
        bundle.file("extra.bin")


def test_folder_without_manifest_is_refused_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no bundle\.json; give the folder of a bundle"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "schema_version is 99"),
        ({"surprise": 1}, "surprise"),
        ({"task": "text-to-smell"}, "task"),
        ({"default_steps": 3}, "default_steps is 3"),
        ({"preview": [[0, 0, 0]]}, "preview has 1 rows"),
        ({"samplers": {"4": {"timesteps": [1.0], "rows": [[1, 0, 1, 0]]}}}, "samplers"),
        ({"samplers": {"4": {"timesteps": [1.0], "rows": [[1, 0, 1, 0, 0]]}}}, "1 timesteps; give 4"),
        ({"engines": [{"graph": "unknown"}]}, "engines.0"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(root: Path, changes: dict[str, Any], message: str) -> None:
    edit(root, **changes)
    with pytest.raises(BundleError, match=r"bundle\.json") as caught:
        Bundle.open(root)
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_broken_json_is_refused(root: Path, content: bytes) -> None:
    (root / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"bundle\.json.*write the bundle again"):
        Bundle.open(root)


def test_missing_engine_names_the_command_that_makes_it(root: Path) -> None:
    with pytest.raises(BundleError, match=r"python -m distill\.export .* --to onnx"):
        Bundle.open(root).engine("step")


def test_engine_is_found_by_graph_and_runtime(root: Path, manifest: Manifest) -> None:
    engine = Engine(
        graph="decoder", file=WEIGHTS, opset=22, inputs={"x": ("batch", 4)}, outputs={}, parity={"levels": 1}
    )
    write_manifest(root, manifest.model_copy(update={"engines": (engine,)}))
    assert Bundle.open(root).engine("decoder") == engine


def test_digest_follows_the_content_and_not_the_place(root: Path, manifest: Manifest, tmp_path: Path) -> None:
    before = Bundle.open(root).digest
    assert write_manifest(root, manifest).digest == before
    (root / WEIGHTS).write_bytes(b"other")
    assert write_manifest(root, manifest).digest != before


def test_interrupted_write_leaves_the_old_manifest_in_force(root: Path) -> None:
    (root / (MANIFEST + ".tmp")).write_text('{"half": ')
    (root / "onnx.tmp").write_bytes(b"draft")
    bundle = Bundle.open(root)
    assert write_manifest(root, bundle.manifest).manifest.files.keys() == bundle.manifest.files.keys()
    assert not (root / (MANIFEST + ".tmp")).exists()


def test_manifest_is_immutable_and_strict(manifest: Manifest) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        manifest.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="rows"):
        Sampler(timesteps=(1.0,), rows=())
