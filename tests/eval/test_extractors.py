"""Published extractors from local weights: equal to the packages that define them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Samples
from eval.metrics.extractors import load_extractor
from eval.metrics.references import FolderReference
from eval.prompts import Prompt
from tests.eval.pictures import Listed


def pictures(count: int, seed: int, size: int = 32) -> np.ndarray:
    """Smooth random pictures (count, 3, size, size) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    drawn = [np.array(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in coarse]
    return np.stack(drawn).transpose(0, 3, 1, 2).copy()


def samples(images: np.ndarray) -> Samples:
    return Samples(images, tuple(Prompt(f"p{i}", "a cube", i) for i in range(len(images))))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of judges with random weights of InceptionV3, as torch-fidelity's own network has them."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    root = tmp_path_factory.mktemp("judges")
    file = root / "inception-v3" / "weights.pth"
    file.parent.mkdir()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save({}, file)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file))
    torch.save(network.state_dict(), file)
    return root


def test_fid_over_inception_equals_torch_fidelitys(inception: Path, tmp_path: Path) -> None:
    from torch_fidelity import calculate_metrics

    ours, theirs = pictures(6, 0), pictures(5, 1)
    for i, picture in enumerate(theirs):
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / f"{i}.png")
    metric = create("fid", folder=inception, extractor="inception-v3", reference=FolderReference(tmp_path))
    metric.update(samples(ours))
    expected = calculate_metrics(
        input1=Listed(ours),
        input2=Listed(theirs),
        fid=True,
        feature_extractor_weights_path=str(inception / "inception-v3" / "weights.pth"),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert metric.compute().value == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)


def test_a_pickle_with_code_is_not_opened(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "touched",)  # type: ignore[return-value]

    folder = tmp_path / "inception-v3"
    folder.mkdir()
    torch.save(Evil(), folder / "weights.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_extractor(tmp_path, "inception-v3")
    assert not (tmp_path / "touched").exists()


def test_dinov2_gives_the_class_token_of_its_own_processor(tmp_path: Path) -> None:
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dinov2-vit-l-14")
    processor = BitImageProcessor(
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    images = pictures(2, 0, size=64)
    inputs = processor([Image.fromarray(p.transpose(1, 2, 0)) for p in images], return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state[:, 0]
    found = torch.from_numpy(load_extractor(tmp_path, "dinov2-vit-l-14")(images))
    assert found.shape == (2, 24)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert float((expected[0] - expected[1]).abs().max()) > 0.2


@pytest.mark.parametrize("name", ["inception-v3", "dinov2-vit-l-14", "clip-vit-l-14-336"])
def test_missing_weights_say_where_they_come_from(tmp_path: Path, name: str) -> None:
    with pytest.raises(EvalError, match=rf"^{name} was not run: .* is missing; put .* there$"):
        load_extractor(tmp_path, name)


def test_a_reference_folder_is_read_at_every_size_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mean(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().mean(dim=(2, 3))

    from eval.metrics.extractors import Extractor

    monkeypatch.setattr("distill.data.cache.CACHE", tmp_path / "cache")
    folder = tmp_path / "truth" / "val"
    folder.mkdir(parents=True)
    for i, size in enumerate([(8, 8), (12, 6)]):
        Image.new("RGB", size, (10 * i, 20, 30)).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("not a picture")
    reference = FolderReference(tmp_path / "truth")
    extractor = Extractor("mean", Mean(), "m")
    np.testing.assert_allclose(reference.features(extractor, 64), [[0, 20, 30], [10, 20, 30]])
    assert reference.protocol["count"] == 2 and any((tmp_path / "cache").iterdir())
    before = reference.protocol
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "0.png")
    assert FolderReference(tmp_path / "truth").protocol != before, "another reference is another protocol"
    (folder / "2.png").write_bytes(b"no picture")
    with pytest.raises(EvalError, match=r"2\.png is no picture"):
        FolderReference(tmp_path / "truth").features(Extractor("mean", Mean(), "n"), 64)
    with pytest.raises(EvalError, match="holds 0 pictures"):
        FolderReference(tmp_path / "cache")
