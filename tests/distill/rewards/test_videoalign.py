"""VideoAlign's reward beside transformers' own Qwen2-VL with peft's adapters, in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLVideoProcessor

from distill.rewards import load_reward
from distill.rewards.videoalign import (
    AFTER,
    AXES,
    BEFORE,
    QUESTIONS,
    TOKENS,
    VIDEO,
    VideoAlign,
    fitted,
    frames_of,
    load_videoalign,
)
from distill.rewards.weights import WeightsError
from distill.shrink import save_tiny_videoalign

PROMPTS = ["a red ball rolls", "two cubes, {text_prompt}, far away"]
NORMS = {"VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": -1.0, "MQ_std": 0.25, "TA_mean": 0.0, "TA_std": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("rewards") / "videoalign"
    save_tiny_videoalign(place, 0)
    return place


def videos(frames: int = 9, height: int = 40, width: int = 56) -> Tensor:
    coarse = torch.randint(0, 256, (2, 3, frames, 5, 7), generator=torch.Generator().manual_seed(1)).float()
    return torch.nn.functional.interpolate(coarse, (frames, height, width)).to(torch.uint8)


def settings_of(folder: Path, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "model_config.json").read_text())
    return {**found, **changes}


@torch.no_grad()
def published(folder: Path, place: Path, outputs: int) -> Any:
    """A model with adapters, saved as the project saves it; a function (pixels, grid, ids, mask, tokens) -> (B, 3)."""
    config = Qwen2VLConfig.from_pretrained(folder)
    torch.manual_seed(3)
    plain = Qwen2VLForConditionalGeneration(config)
    plain.rm_head = torch.nn.Linear(32, outputs, bias=False)
    targets = [n for n, m in plain.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)]
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=[f"model.language_model.{n}" for n in targets])
    model: Any = inject_adapter_in_model(lora, plain).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.2)
    old = {
        "base_model.model." + name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for name, value in model.state_dict().items()
    }
    (place / "checkpoint-20").mkdir(parents=True)
    (place / "checkpoint-3").mkdir()  # the latest counts, not the first by name
    torch.save(old, place / "checkpoint-20" / "model.pth")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (place / name).write_bytes((folder / name).read_bytes())
    settings = settings_of(folder, inference_config=NORMS, peft_lora_config={"lora_r": 2, "lora_alpha": 8})
    (place / "model_config.json").write_text(json.dumps(settings))

    def answers(pixels: Tensor, grid: Tensor, ids: Tensor, mask: Tensor, tokens: list[int]) -> Tensor:
        plainly = torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, len(ids), -1)
        hidden = model.model(
            input_ids=ids, attention_mask=mask, position_ids=plainly, pixel_values_videos=pixels, video_grid_thw=grid
        ).last_hidden_state
        logits = model.rm_head(hidden)
        rows = [[logits[b, ids[b].tolist().index(t)] for t in tokens] for b in range(len(ids))]
        if outputs == 1:
            return torch.tensor([[float(x) for x in row] for row in rows])
        return torch.tensor([[float(x[axis]) for axis, x in enumerate(row)] for row in rows])

    return answers


@torch.no_grad()
@pytest.mark.parametrize("outputs", [1, 3])
def test_scores_are_those_of_transformers_model_with_its_adapters(outputs: int, folder: Path, tmp_path: Path) -> None:
    reference = published(folder, tmp_path, outputs)
    reward = load_reward(f"videoalign:{tmp_path}#TA=0.5,MQ=2,fps=4")
    assert isinstance(reward, VideoAlign) and reward.video and not reward.requires_grad and len(reward.digest) == 64
    found = reward.score(videos(), PROMPTS)

    # 9 frames at 4 per second hold 4.5 of 2 per second: 4 of them, on 280 × 392 pixels.
    processor = Qwen2VLVideoProcessor()
    chosen = [list(video.transpose(0, 1)[[0, 3, 5, 8]]) for video in videos()]
    large = [
        torch.stack(
            [torch.nn.functional.interpolate(f[None], (280, 392), mode="bicubic", antialias=True)[0] for f in v]
        )
        for v in chosen
    ]
    batch = processor(large, do_resize=False, do_sample_frames=False, return_tensors="pt", cap_pixels_per_frame=False)
    assert batch["video_grid_thw"].tolist() == [[2, 20, 28]] * 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    questions = [QUESTIONS.read_text().replace("{text_prompt}", prompt) for prompt in PROMPTS]
    texts = [BEFORE + VIDEO * (2 * 20 * 28 // 4) + AFTER.replace("{questions}", q) for q in questions]
    words = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    raw = reference(
        batch["pixel_values_videos"], batch["video_grid_thw"], words.input_ids, words.attention_mask,
        tokenizer.convert_tokens_to_ids(list(TOKENS)),
    )  # fmt: skip
    mean, std = (torch.tensor([NORMS[f"{axis}_{key}"] for axis in AXES]) for key in ("mean", "std"))
    expected = (raw - mean) / std
    for axis, column in zip(AXES, expected.T, strict=True):
        torch.testing.assert_close(reward.axes[axis], column, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, expected @ torch.tensor([1.0, 2.0, 0.5]), rtol=1e-3, atol=1e-3)
    assert float(expected.std(0).min()) > 1e-3


def test_the_questions_are_the_projects() -> None:
    text = QUESTIONS.read_text(encoding="utf-8")
    assert [text.count(token) for token in TOKENS] == [1, 1, 1] and text.count("{text_prompt}") == 1
    assert text.startswith("\nYou are tasked with evaluating a generated video") and text.endswith("END\n")
    assert text.index("{text_prompt}") < text.index("<|TA_reward|>") and "**Visual Quality:**  \n" in text


@pytest.mark.parametrize(
    ("total", "fps", "count"),
    [(81, 16.0, 10), (17, 16.0, 4), (5, 16.0, 4), (3, 8.0, 2), (81, 8.0, 20), (200, 2.0, 200)],
)
def test_frames_are_two_per_second(total: int, fps: float, count: int) -> None:
    assert frames_of(total, fps, 2.0) == count


def test_frames_are_fitted_as_qwen2_vl_does() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    assert fitted(480, 832, 200704) == (336, 588)
    for sides in ((32, 32), (40, 56), (480, 832), (720, 1280), (400, 448), (999, 31)):
        assert fitted(*sides, 200704) == smart_resize(*sides, 28, 128 * 28 * 28, 200704)


def test_rows_do_not_see_each_other_and_motion_counts(folder: Path) -> None:
    reward = load_videoalign(folder)
    together = reward.score(videos(), PROMPTS)
    alone = torch.cat([reward.score(videos()[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    backwards = reward.score(videos().flip(2), PROMPTS)
    assert not torch.allclose(backwards, together, atol=1e-4)
    assert set(reward.axes) == set(AXES) and reward.range == (-12.0, 12.0)


def test_what_cannot_be_scored_is_refused(folder: Path) -> None:
    reward = load_videoalign(folder)
    with pytest.raises(ValueError, match="2 pictures and 1 prompts"):
        reward.score(videos(), ["a"])
    with pytest.raises(ValueError, match="a video has 1 frame; videoalign judges motion"):
        reward.score(videos(1), PROMPTS)
    with pytest.raises(ValueError, match="a prompt has one of"):
        reward.score(videos(), ["a", f"b {TOKENS[1]}"])
    with pytest.raises(ValueError, match="option 'speed=2' is unknown; give VQ, MQ, TA, fps with = and a number"):
        load_videoalign(f"{folder}#speed=2")


def test_folders_that_are_not_the_reward_are_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no model_config.json; give the folder of KwaiVGI/VideoReward"):
        load_videoalign(tmp_path)
    (tmp_path / "model_config.json").write_text(json.dumps(settings_of(folder)))
    with pytest.raises(WeightsError, match=r"holds no model.pth; download it with: hf download KwaiVGI"):
        load_videoalign(tmp_path)
    torch.save({"model.norm.weight": torch.ones(2)}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match="holds no Qwen2-VL with rm_head"):
        load_videoalign(tmp_path)
    for part in ("checkpoint-1/model.pth", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / Path(part).name).write_bytes((folder / part).read_bytes())
    changed = settings_of(folder, model_config={"reward_token": "last", "model_name_or_path": "x/y"})
    (tmp_path / "model_config.json").write_text(json.dumps(changed))
    with pytest.raises(WeightsError, match="reward_token is 'last'; this reward knows 'special'"):
        load_videoalign(tmp_path)
