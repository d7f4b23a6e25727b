"""Samples from files: functions of their key alone, latents and text states computed once and equal to fresh ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill.config import FileData, RecipeError, load_recipe
from distill.data import cache
from distill.families.base import Condition
from distill.families.flux import Flux
from distill.families.published import USUAL
from distill.families.sdxl import Sdxl
from distill.run import train
from distill.shrink import save_tiny_teacher
from distill.tasks.common import to_float
from distill.tasks.files import CachedText, FileSamples, text_digest
from distill.tasks.samples import samples_for

PROMPTS = ["a small red metal sphere", "a large blue cube", "a green cylinder left of a cube"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CACHE", tmp_path / "cache")


@pytest.fixture
def family(tiny_sources: Path) -> Any:
    return Sdxl.from_folder(tiny_sources)[0]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "pictures").mkdir()
    for i, size in enumerate(((64, 64), (100, 80), (48, 90))):
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text(f"picture {i}")
    return tmp_path


def counted(family: Any, name: str) -> list[int]:
    """Batch sizes of every call of a family's method from now on."""
    calls: list[int] = []
    original = getattr(family, name)

    def wrapped(rows: Any) -> Any:
        calls.append(len(rows))
        return original(rows)

    setattr(family, name, wrapped)
    return calls


def test_prompts_alone_are_drawn_by_their_key(files: Path, family: Any) -> None:
    samples = samples_for(FileData(prompts=str(files / "prompts.txt")), 3, family)
    assert isinstance(samples, FileSamples)
    drawn = samples.conditions(5, 1, 200)
    assert drawn == samples.conditions(5, 1, 200) != samples.conditions(6, 1, 200)
    assert {p: drawn.count(p) > 40 for p in set(drawn)} == dict.fromkeys(PROMPTS, True)
    assert samples.preview_conditions() == PROMPTS
    with pytest.raises(ValueError, match=r"prompts alone, and this recipe learns from pictures; name data\.pictures"):
        samples.batch(0, 0, 2)


def test_pictures_come_with_their_own_captions(files: Path, family: Any) -> None:
    data = FileData(prompts=str(files / "prompts.txt"), pictures=str(files / "pictures"))
    x, captions = FileSamples(data, 0, family).batch(2, 0, 6)
    assert x.shape == (6, *family.latent_shape()) and x.dtype == torch.float32
    fresh: dict[str, Tensor] = {}
    for i in range(3):
        image = Image.open(files / f"pictures/{i}.png")
        scale = 64 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        left, top = (image.width - 64) // 2, (image.height - 64) // 2
        pixels = np.array(image.crop((left, top, left + 64, top + 64))).transpose(2, 0, 1)
        fresh[f"picture {i}"] = family.encode_images(to_float(pixels[None]))[0].half().float()
    for row, caption in zip(x, captions, strict=True):
        torch.testing.assert_close(row, fresh[caption], rtol=0, atol=2e-3)


def test_latents_are_computed_once_and_again_for_a_changed_picture(files: Path, family: Any) -> None:
    data, calls = FileData(pictures=str(files / "pictures")), counted(family, "encode_images")
    first, captions = FileSamples(data, 0, family).batch(2, 0, 8)
    assert len(calls) == len(set(captions)) == 3
    again, _ = FileSamples(data, 0, family).batch(2, 0, 8)
    assert torch.equal(first, again) and len(calls) == 3
    Image.new("RGB", (64, 64), "red").save(files / "pictures/0.png")
    changed, _ = FileSamples(data, 0, family).batch(2, 0, 8)
    assert len(calls) == 4
    differs = (changed != first).flatten(1).any(1).tolist()
    assert differs == [caption == "picture 0" for caption in captions]


def test_other_weights_have_other_latents(files: Path, family: Any) -> None:
    data = FileData(pictures=str(files / "pictures"))
    first, _ = FileSamples(data, 0, family).batch(2, 0, 4)
    with torch.no_grad():
        family.vae.encoder.conv_in.weight.mul_(1.5)
    second, _ = FileSamples(data, 0, family).batch(2, 0, 4)
    assert not torch.equal(first, second)
    family.vae.register_to_config(scaling_factor=2 * family.vae.config.scaling_factor)
    third, _ = FileSamples(data, 0, family).batch(2, 0, 4)
    torch.testing.assert_close(third, 2 * second, rtol=2e-3, atol=2e-3)  # float16 on disk


def test_labels_come_from_subfolders(files: Path, family: Any) -> None:
    for name in ("n02", "n01"):
        (files / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), "red").save(files / "classes" / name / "1.png")
    samples = FileSamples(FileData(pictures=str(files / "classes")), 0, family)
    assert set(samples.conditions(0, 0, 50)) == {0, 1} and samples.preview_conditions() == [0, 1]


def test_text_states_are_read_back_to_the_last_bit(files: Path, family: Any) -> None:
    texts = [PROMPTS[1], "a prompt that no file has", PROMPTS[0], PROMPTS[1]]
    fresh = family.encode(texts)
    calls, plain = counted(family, "encode"), family.encode
    samples = FileSamples(FileData(prompts=str(files / "prompts.txt"), cache_text=True), 0, family)
    assert isinstance(family.encode, CachedText)
    calls.clear()
    for expected in (1 + 2, 1):  # at first all three, then the unknown one alone
        found = family.encode(texts)
        assert sum(calls) == expected
        calls.clear()
        assert found.keys() == fresh.keys()
        for name, value in fresh.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    once = family.encode(PROMPTS)
    family.encode = plain
    again = FileSamples(samples.data, 0, family)
    assert equal(again.family.encode(PROMPTS), once)


def test_text_states_of_other_weights_are_not_taken(files: Path, family: Any) -> None:
    data, plain = FileData(prompts=str(files / "prompts.txt"), cache_text=True), family.encode
    FileSamples(data, 0, family)
    first = family.encode(PROMPTS)
    family.encode = plain
    with torch.no_grad():
        family.text_encoder.get_input_embeddings().weight.mul_(1.5)
    FileSamples(data, 0, family)
    assert not equal(family.encode(PROMPTS), first)
    assert equal(family.encode(PROMPTS), plain(PROMPTS), 1e-6)


def test_text_states_of_another_guidance_or_tokenizer_are_not_taken(files: Path, tmp_path: Path) -> None:
    """FLUX's condition holds the guidance that its network reads; its tokenizers lie in a list."""
    save_tiny_teacher("flux", USUAL["flux"], tmp_path / "flux")
    data = FileData(prompts=str(files / "prompts.txt"), cache_text=True)
    flux, other = (Flux.from_folder(tmp_path / "flux", embedded_guidance=scale)[0] for scale in (1.0, 3.5))
    for family in (flux, other):
        FileSamples(data, 0, family)
        for _ in range(2):  # computed, and read
            assert family.encode(PROMPTS)["guidance"].tolist() == [family.guidance] * 3
    before = text_digest(flux)
    flux.tokenizers[0].model_max_length -= 1
    assert text_digest(flux) != before


def equal(one: Condition, other: Condition, tolerance: float = 0.0) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=0, atol=tolerance) for name in one)


def test_videos_do_not_learn_from_stills(files: Path) -> None:
    wan = SimpleNamespace(latent_shape=lambda: (16, 3, 8, 8))
    with pytest.raises(RecipeError, match=r"holds stills and this student makes videos \(latents \(16, 3, 8, 8\)\)"):
        FileSamples(FileData(pictures=str(files / "pictures")), 0, wan).batch(0, 0, 1)


# --- recipes -------------------------------------------------------------------------------------------------------


def distill_recipe(overrides: Sequence[str]) -> Any:
    return load_recipe("recipes/digits-dmd2.yaml", list(overrides))


def test_recipes_name_files() -> None:
    recipe = distill_recipe(["data={prompts: a.txt, pictures: 'b/*.tar', caption_key: text}"])
    assert recipe.data == FileData(prompts="a.txt", pictures="b/*.tar", caption_key="text")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data={promts: a.txt, pictures: b}"], r"data\.promts is unknown; did you mean prompts"),
        (["data={caption_key: text}"], "data: names neither prompts nor pictures; add one"),
        (["data={prompts: a.txt}", "gan={}"], r"compare with real pictures; add data\.pictures"),
        (["data=scenes"], r"data: Input should be 'digits' or 'labels' \(got 'scenes'\)"),
        (["data={cuont: 3}"], r"data\.cuont is unknown; did you mean count"),
    ],
)
def test_faults_of_data_are_told(overrides: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        distill_recipe(overrides)


def test_a_distillation_learns_from_files(
    tiny_sources: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, a GAN's pictures and cached text through the whole loop; a second run finds what the first computed."""
    monkeypatch.setenv("LEAPFROG_RUNS", str(tmp_path / "runs"))
    overrides = [
        f"teacher={tiny_sources}", "iterations=2", "batch_size=2", "steps=[1]", "fake_per_student=1", "gan={}",
        f"data={{prompts: {files}/prompts.txt, pictures: {files}/pictures, cache_text: true}}",
        "precision=float32", "telemetry.every=null", "preview_every=2", "save_every=2",
    ]  # fmt: skip
    encode, single = Sdxl.encode_images, []
    monkeypatch.setattr(Sdxl, "encode_images", lambda s, x: single.append(len(x) == 1) or encode(s, x))
    for name, computed in (("first", True), ("second", False)):
        single.clear()
        recipe = distill_recipe([*overrides, f"name={name}", f"output={tmp_path / name}"])
        assert train(recipe, quiet=True) == 0
        assert any(single) is computed  # pictures of the cache go one by one, those of the preview together
        assert (tmp_path / name / "bundle.json").is_file()
    assert len(list((tmp_path / "cache").glob("*.rows"))) == 2
