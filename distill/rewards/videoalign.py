"""VideoAlign's VideoReward: visual quality, motion quality and text alignment of videos (Liu et al., arXiv 2501.13918).

    reward = load_reward("videoalign")                               # from the hub: KwaiVGI/VideoReward
    reward = load_reward("videoalign:/models/videoreward#TA=0.5")    # a folder with model_config.json, checkpoint-*/

A Qwen2-VL-2B reads frames and a fixed text that ends each of its three questions with a token of its own; a linear head
on the last hidden states at these tokens gives VQ, MQ and TA, each normalised by the mean and deviation that the folder
names. The score is a weighted sum, with weights 1 the project's own "Overall"; how AMD's paper joins the axes is not
known. After the ``#`` stand weights and ``fps``, the frames per second of the videos that are scored (Wan's 16).

Conventions of the project's inference code, which the weights depend on:

* 2 frames per second, at least 4, an even number, the first, the last and evenly between, resized on 8 bits (bicubic)
  to multiples of 28 pixels between 128·28² and the folder's ``max_frame_pixels``.
* Positions of tokens are 0, 1, 2, … in all three of Qwen2-VL's axes: the code runs on transformers 4.45, where the
  video's own axes enter through ``generate`` alone, and so it was trained.
* ``model.pth`` holds the network inside peft's wrapping: LoRA is merged here, W + α/r·B·A.

Computed in float32, there in bfloat16. The text is the project's (MIT License, © 2025 Kling Team, Kuaishou Technology).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from distill.hub import is_hub_id, snapshot
from distill.rewards.base import check_counts
from distill.rewards.pixels import CLIP_MEAN, CLIP_STD
from distill.rewards.weights import WeightsError, digest_of, fill, find_folder, read_tensors

SOURCE = "KwaiVGI/VideoReward"
AXES = ("VQ", "MQ", "TA")
TOKENS = tuple(f"<|{axis}_reward|>" for axis in AXES)
QUESTIONS = Path(__file__).with_suffix(".txt")
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER = "<|vision_end|>{questions}<|im_end|>\n<|im_start|>assistant\n"
"""Qwen2-VL's chat template around one video and one text."""
VIDEO = "<|video_pad|>"
PATCH, MERGE, PAIR = 14, 2, 2
"""Pixels of a patch, patches of a token along height and width, frames of a token."""
MIN_PIXELS, MIN_FRAMES, MAX_FRAMES = 128 * 28 * 28, 4, 768
FPS = 16.0


@dataclass(frozen=True)
class Reading:
    """How frames and scores are taken: of the folder's model_config.json, and of the reward's name.

    rate: frames per second that the network sees, of ``fps`` that a video has; max_pixels: of a frame.
    """

    rate: float = 2.0
    max_pixels: int = 448 * 448
    means: tuple[float, ...] = (0.0, 0.0, 0.0)
    deviations: tuple[float, ...] = (1.0, 1.0, 1.0)
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    fps: float = FPS


class VideoAlign(nn.Module):
    """model: Qwen2VLModel; head: a linear layer to one number, or to one per axis."""

    requires_grad = False
    video = True

    def __init__(self, model: Any, head: nn.Linear, tokenizer: Any, reading: Reading, *, digest: str = "") -> None:
        super().__init__()
        self.model, self.head, self.tokenizer, self.reading = model, head, tokenizer, reading
        self.name, self.digest = "videoalign", digest
        self.axes: dict[str, Tensor] = {}
        """Of the last call, (B,) by axis."""
        self._questions = QUESTIONS.read_text(encoding="utf-8")

    @property
    def range(self) -> tuple[float, float]:
        """Normalised scores seldom leave [−4, 4]."""
        width = 4 * sum(abs(w) for w in self.reading.weights)
        return (-width, width)

    @torch.no_grad()
    def score(self, images: Tensor, conditions: Sequence[str]) -> Tensor:
        """Videos (B, 3, F, H, W) uint8 and their prompts to Σ weight·axis, (B,) float32."""
        check_counts(images, conditions, "prompt")
        raw = self._raw(images, list(conditions)).float()
        read = self.reading
        means, deviations, weights = (raw.new_tensor(v) for v in (read.means, read.deviations, read.weights))
        scores = (raw - means) / deviations
        self.axes = dict(zip(AXES, scores.unbind(1), strict=True))
        return (weights * scores).sum(1)

    def _raw(self, videos: Tensor, prompts: list[str]) -> Tensor:
        """The head's answers at the three tokens, (B, 3)."""
        frames = torch.stack([self._seen(video) for video in videos.transpose(1, 2)])
        patches, grid = patchify((frames / 255 - _column(CLIP_MEAN, frames)) / _column(CLIP_STD, frames))
        ids, mask = (part.to(videos.device) for part in self._ids(prompts, int(grid.prod()) // MERGE**2))
        hidden = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape),
            pixel_values_videos=patches.flatten(0, 1),
            video_grid_thw=grid.to(ids.device).expand(len(ids), 3),
            use_cache=False,
        ).last_hidden_state
        answers: Tensor = self.head(hidden[self._asked(ids)].unflatten(0, (len(ids), len(AXES))))
        return answers.diagonal(dim1=1, dim2=2) if answers.shape[2] == len(AXES) else answers[..., 0]

    def _seen(self, video: Tensor) -> Tensor:
        """Frames (F', 3, H', W') float32 in whole levels [0, 255] of one video (F, 3, H, W) uint8."""
        if len(video) < PAIR:
            raise ValueError(f"a video has {len(video)} frame; videoalign judges motion: give {PAIR} frames or more")
        count = frames_of(len(video), self.reading.fps, self.reading.rate)
        index = torch.linspace(0, len(video) - 1, count).round().long()
        size = list(fitted(video.shape[2], video.shape[3], self.reading.max_pixels))
        resized: Tensor = resize(video[index], size, InterpolationMode.BICUBIC, antialias=True)
        return resized.float()

    def _ids(self, prompts: list[str], tokens: int) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, (B, L), filled up on the right. tokens: of one video."""
        texts = [
            BEFORE + VIDEO * tokens + AFTER.replace("{questions}", self._questions.replace("{text_prompt}", prompt))
            for prompt in prompts
        ]
        rows = [torch.tensor(row) for row in self.tokenizer(texts, add_special_tokens=False).input_ids]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long()

    def _asked(self, ids: Tensor) -> Tensor:
        """Where the three tokens stand, (B, L) bool."""
        asked = torch.isin(ids, ids.new_tensor(self.tokenizer.convert_tokens_to_ids(list(TOKENS))))
        if bool((asked.sum(1) != len(AXES)).any()):
            raise ValueError(f"a prompt has one of {', '.join(TOKENS)} in it, which ask for scores; leave them out")
        return asked


def frames_of(total: int, fps: float, rate: float) -> int:
    """How many of a video's frames the network sees: ``rate`` per second, even, between 4 and what there is."""
    most = min(MAX_FRAMES, total) // PAIR * PAIR
    wanted = min(max(total / fps * rate, MIN_FRAMES), most)
    return min(round(wanted / PAIR) * PAIR, total)


def fitted(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """Multiples of 28 nearest to a frame's sides, with an area between MIN_PIXELS and ``max_pixels``, as Qwen2-VL."""
    side = PATCH * MERGE
    h, w = (max(side, round(length / side) * side) for length in (height, width))
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h, w = (math.floor(length / shrink / side) * side for length in (height, width))
    elif h * w < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        h, w = (math.ceil(length * grow / side) * side for length in (height, width))
    return h, w


def patchify(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Videos (B, F, 3, H, W) as rows of patches (B, F/2·H/14·W/14, 3·2·14·14), and their grid (F/2, H/14, W/14).

    The four patches that become one token follow each other.
    """
    time, rows, columns = frames.shape[1] // PAIR, frames.shape[3] // PATCH, frames.shape[4] // PATCH
    x = frames.unflatten(4, (columns // MERGE, MERGE, PATCH)).unflatten(3, (rows // MERGE, MERGE, PATCH))
    x = x.unflatten(1, (time, PAIR))  # batch, time, pair, channel, row, merge, y, column, merge, x
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return x.flatten(6).flatten(1, 5), torch.tensor([time, rows, columns])


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(values)[:, None, None]


# --- loading -------------------------------------------------------------------------------------------------------


def load_videoalign(source: str | Path = SOURCE) -> VideoAlign:
    """source: the folder or hub id, then perhaps # and VQ=…, MQ=…, TA=…, fps=… with commas. Raises WeightsError."""
    place, _, chosen = str(source).partition("#")
    folder = _folder(place or SOURCE)
    path = folder / "model_config.json"
    if not path.is_file():
        raise WeightsError(f"videoalign: {folder} has no model_config.json; give the folder of {SOURCE}")
    settings = json.loads(path.read_text(encoding="utf-8"))
    tensors, digest = _tensors(folder, settings)
    if "head" not in tensors or "language_model.embed_tokens.weight" not in tensors:
        raise WeightsError(f"videoalign: {folder} holds no Qwen2-VL with rm_head; give the folder of {SOURCE}")
    weight = tensors.pop("head")
    if weight.shape[0] not in (1, len(AXES)):
        raise WeightsError(f"videoalign: rm_head of {folder} has {weight.shape[0]} outputs; this reward has 1 or 3")
    beside = _beside(folder) or find_folder(
        settings["model_config"]["model_name_or_path"], "videoalign's tokenizer and config", weights=False
    )
    config: Any = Qwen2VLConfig.from_pretrained(beside)
    config.text_config.vocab_size = len(tensors["language_model.embed_tokens.weight"])
    model: Any = Qwen2VLModel(config)
    fill(model, tensors, folder)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    fill(head, {"weight": weight}, folder)
    words = _tokenizer(beside, int(config.text_config.vocab_size))
    reward = VideoAlign(model, head, words, _reading(settings, chosen), digest=digest)
    return reward.eval().requires_grad_(False)


def _folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_id(source):
        raise WeightsError(f"videoalign: there is no folder {source!r}; give one, or a hub id such as owner/name")
    try:
        return snapshot(source, "videoalign", ("*.json", "checkpoint-*/*.pth", "checkpoint-*/*.safetensors"))
    except ValueError as error:
        raise WeightsError(str(error)) from None


def _beside(folder: Path) -> Path | None:
    """Where the folder keeps Qwen2-VL's own config and tokenizer, if it does."""
    return next(
        (place for place in (folder, folder / "tokenizer") if (place / "tokenizer_config.json").is_file()), None
    )


def _tensors(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Weights by Qwen2VLModel's names, adapters merged, rm_head as ``head``; and the sha256 of their files."""
    steps = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    place = steps[-1] if steps else folder
    whole, parts = place / "model.pth", (place / "non_lora_state_dict.pth", place / "adapter_model.safetensors")
    if whole.is_file():
        files: tuple[Path, ...] = (whole,)
        found = read_tensors(whole)
    elif all(path.is_file() for path in parts):
        base = find_folder(settings["model_config"]["model_name_or_path"], "videoalign's base")
        files = (*sorted(base.glob("*.safetensors")), *parts)
        found = {_plain(name): value for path in files for name, value in read_tensors(path).items()}
    else:
        raise WeightsError(f"videoalign: {place} holds no model.pth; download it with: hf download {SOURCE}")
    found = {_plain(name): value for name, value in found.items()}
    return _merged(found, settings.get("peft_lora_config", {})), "+".join(digest_of(path) for path in files)


def _plain(name: str) -> str:
    """A weight's name without peft's wrapping, by transformers 5's modules."""
    for wrapping in ("base_model.model.", ".base_layer", ".default"):
        name = name.replace(wrapping, "")
    if name.startswith("rm_head."):
        return "head"
    if name.startswith(("model.visual.", "model.language_model.")):
        return name.removeprefix("model.")
    return "language_model." + name.removeprefix("model.") if name.startswith("model.") else name


def _merged(tensors: dict[str, Tensor], lora: dict[str, Any]) -> dict[str, Tensor]:
    """W + scale·B·A wherever there is an adapter; scale is α/r, or α/√r for rank-stabilised ones."""
    kept = {name: value for name, value in tensors.items() if ".lora_" not in name and not name.startswith("lm_head")}
    for name, down in tensors.items():
        if ".lora_A" not in name:
            continue
        target, rank = name.replace(".lora_A", ""), down.shape[0]
        scale = lora["lora_alpha"] / (math.sqrt(rank) if lora.get("use_rslora") else rank)
        up = tensors[name.replace(".lora_A", ".lora_B")]
        kept[target] = kept[target].float() + scale * (up.float() @ down.float())
    return kept


def _tokenizer(folder: Path, expected: int) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    if len(tokenizer) != expected:
        raise WeightsError(
            f"videoalign: {folder} gives {len(tokenizer)} tokens for {expected} embeddings; put config.json and the "
            "tokenizer of Qwen/Qwen2-VL-2B-Instruct beside model_config.json"
        )
    return tokenizer


def _reading(settings: dict[str, Any], chosen: str) -> Reading:
    """Raises WeightsError for a convention that this reward does not have, ValueError for an option that it has not."""
    data, model = settings.get("data_config", {}), settings["model_config"]
    conventions = {
        "reward_token": (model.get("reward_token"), "special"),
        "prompt_template_type": (data.get("prompt_template_type"), "detailed_special"),
        "sample_type": (data.get("sample_type", "uniform"), "uniform"),
        "num_frames": (data.get("num_frames"), None),
    }
    for key, (seen, known) in conventions.items():
        if seen != known:
            raise WeightsError(f"videoalign: {key} is {seen!r}; this reward knows {known!r}, as {SOURCE} has it")
    options = {"VQ": 1.0, "MQ": 1.0, "TA": 1.0, "fps": FPS}
    for item in filter(None, chosen.split(",")):
        key, _, value = item.partition("=")
        if key not in options or not value.replace(".", "", 1).isdigit():
            raise ValueError(f"videoalign: option {item!r} is unknown; give {', '.join(options)} with = and a number")
        options[key] = float(value)
    norms = settings.get("inference_config") or {}
    return Reading(
        rate=float(data.get("fps", 2.0)),
        max_pixels=int(data.get("max_frame_pixels", 448 * 448)),
        means=tuple(float(norms.get(f"{axis}_mean", 0.0)) for axis in AXES),
        deviations=tuple(float(norms.get(f"{axis}_std", 1.0)) for axis in AXES),
        weights=tuple(options[axis] for axis in AXES),
        fps=options["fps"],
    )
