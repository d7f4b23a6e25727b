"""Which folder or name gives which reward, and which gives none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from distill.bundle import sha256
from distill.rewards import DigitClassifier, load_reward
from distill.rewards.clip import TOKENIZER_SOURCE
from distill.rewards.hpsv2 import SOURCE
from distill.rewards.weights import WeightsError
from distill.shrink import save_tiny_clip
from tests.distill.families.test_load import cached
from tests.distill.rewards.test_hpsv2 import OpenClip


@pytest.mark.parametrize("config", [None, {}, {"model_type": "bert"}])
def test_folders_without_a_reward_are_refused(tmp_path: Path, config: dict[str, Any] | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds no reward; give a folder with a CLIPModel, a video reward, a latent"):
        load_reward(tmp_path)


def test_a_folder_of_ours_loads_by_its_path(tmp_path: Path) -> None:
    DigitClassifier(8).save(tmp_path / "judge", 0.5)
    assert isinstance(load_reward(str(tmp_path / "judge")), DigitClassifier)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache, empty, of a machine without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_loads_from_the_cache(
    hub: Path, tmp_path: Path, batches: dict[tuple[int, int], Tensor], prompts: list[str]
) -> None:
    (tmp_path / "clip").mkdir()
    save_tiny_clip(tmp_path / "clip", 0)
    cached(hub, "somebody/clip", tmp_path / "clip")
    local, there = load_reward(f"clip:{tmp_path}/clip"), load_reward("clip:somebody/clip")
    assert there.digest == local.digest == sha256(tmp_path / "clip/model.safetensors")
    images = batches[64, 64].expand(4, -1, -1, -1)
    assert torch.equal(there.score(images, prompts), local.score(images, prompts))


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("source", ["", "somebody/hps"])
def test_hpsv2_and_its_tokenizer_come_from_their_own_repositories(
    source: str, pickled: bool, hub: Path, tmp_path: Path, clip_tokenizer: Path
) -> None:
    vocabulary = len(CLIPTokenizer.from_pretrained(clip_tokenizer, pad_token="<|endoftext|>"))
    (tmp_path / "hps").mkdir()
    file = tmp_path / "hps" / f"HPS_v2_compressed.{'pt' if pickled else 'safetensors'}"
    (torch.save if pickled else save_file)(OpenClip(vocabulary).state_dict(), file)
    cached(hub, source or SOURCE, tmp_path / "hps")
    name = f"hpsv2:{source}" if source else "hpsv2"
    with pytest.raises(WeightsError, match=f"hpsv2's tokenizer: '{TOKENIZER_SOURCE}' is not in the hub's local cache"):
        load_reward(name)
    cached(hub, TOKENIZER_SOURCE, clip_tokenizer)
    reward = load_reward(name)
    assert reward.digest == sha256(file) and len(reward.tokenizer) == vocabulary


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2.1", "imagereward", "pickscore", "clip", "dinov2", "videoalign"])
def test_published_weights_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(WeightsError, match=f"^{name}: .*hf download somebody/never-downloaded"):
        load_reward(f"{name}:somebody/never-downloaded")
    with pytest.raises(WeightsError, match=f"^{name}: there is no .*folder './nowhere'; give one, or a hub id"):
        load_reward(f"{name}:./nowhere")


def test_a_misspelt_name_is_told() -> None:
    with pytest.raises(ValueError, match=r"'hpsv3' is no reward's name and no folder; did you mean hpsv2"):
        load_reward("hpsv3")
