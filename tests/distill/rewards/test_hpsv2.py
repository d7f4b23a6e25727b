"""HPSv2 from a checkpoint in OpenCLIP's names gives what that architecture gives, computed here a second time."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPTokenizer

from distill.bundle import sha256
from distill.rewards import load_reward
from distill.rewards.pixels import FitAndPad
from distill.rewards.weights import WeightsError

Batches = dict[tuple[int, int], Tensor]


class Block(nn.Module):
    """A residual attention block as OpenCLIP names it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 3 * width), "c_proj": nn.Linear(3 * width, width)})

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


def tower(width: int, heads: int, layers: int) -> nn.ModuleDict:
    return nn.ModuleDict({"resblocks": nn.ModuleList(Block(width, heads) for _ in range(layers))})


class Visual(nn.Module):
    def __init__(self, width: int, layers: int, patch: int, grid: int, projection: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(1 + grid * grid, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = tower(width, width // 80, layers)
        self.proj = nn.Parameter(torch.randn(width, projection))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """OpenCLIP's ViT-H/14 made small: heads of 80 and 64, two and three layers, 56 × 56 pixels."""

    def __init__(self, vocabulary: int, projection: int = 48) -> None:
        super().__init__()
        self.visual = Visual(160, 2, 14, 4, projection)
        self.token_embedding = nn.Embedding(vocabulary, 128)
        self.positional_embedding = nn.Parameter(torch.randn(77, 128))
        self.transformer = tower(128, 2, 3)
        self.ln_final = nn.LayerNorm(128)
        self.text_projection = nn.Parameter(torch.randn(128, projection))
        self.logit_scale = nn.Parameter(torch.tensor(4.0))
        self.register_buffer("attn_mask", torch.full((77, 77), -torch.inf).triu(1))

    def text(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids) + self.positional_embedding
        for block in self.transformer["resblocks"]:
            x = block(x, self.attn_mask)
        return self.ln_final(x)[torch.arange(len(x)), ids.argmax(1)] @ self.text_projection

    def cosine(self, pixels: Tensor, ids: Tensor) -> Tensor:
        return (normalize(self.visual(pixels), dim=-1) * normalize(self.text(ids), dim=-1)).sum(-1)


@pytest.fixture(scope="module")
def reference(clip_tokenizer: Path) -> OpenClip:
    vocabulary = len(CLIPTokenizer.from_pretrained(clip_tokenizer, pad_token="<|endoftext|>"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OpenClip(vocabulary).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(reference: OpenClip, clip_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as the project publishes it, pickled under ``state_dict``, beside a tokenizer."""
    root = tmp_path_factory.mktemp("hpsv2")
    torch.save({"epoch": 1, "state_dict": reference.state_dict()}, root / "HPS_v2.1_compressed.pt")
    shutil.copytree(clip_tokenizer, root / "tokenizer")
    return root


def test_scores_are_a_hundred_times_openclips_cosine(
    reference: OpenClip, folder: Path, batches: Batches, prompts: list[str], clip_tokenizer: Path
) -> None:
    reward = load_reward(f"hpsv2.1:{folder}")
    assert (reward.name, reward.range) == ("hpsv2.1", (-100.0, 100.0))
    tokenizer = CLIPTokenizer.from_pretrained(clip_tokenizer, pad_token="<|endoftext|>")
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    ids[(ids == tokenizer.eos_token_id).cumsum(1) > 1] = 0  # OpenCLIP pads with 0
    for shape, images in batches.items():
        four = images.expand(4, -1, -1, -1)
        expected = 100 * reference.cosine(FitAndPad(56)(four.float() / 127.5 - 1), ids)
        torch.testing.assert_close(reward.score(four, prompts), expected, rtol=0, atol=2e-4)
        assert float(expected.std()) > 0.5, shape


def test_weights_are_reported_by_their_digest(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        reward = load_reward(f"hpsv2.1:{folder}")
    digest = sha256(folder / "HPS_v2.1_compressed.pt")
    assert reward.digest == digest and digest in caplog.text


def test_safetensors_and_a_named_file_load_alike(
    reference: OpenClip, folder: Path, batches: Batches, prompts: list[str], tmp_path: Path
) -> None:
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    save_file(reference.state_dict(), tmp_path / "HPS_v2_compressed.safetensors")
    images = batches[64, 64].expand(4, -1, -1, -1)
    scores = load_reward(f"hpsv2:{tmp_path}").score(images, prompts)
    assert torch.equal(
        scores, load_reward(f"hpsv2:{tmp_path / 'HPS_v2_compressed.safetensors'}").score(images, prompts)
    )
    torch.testing.assert_close(scores, load_reward(f"hpsv2.1:{folder}").score(images, prompts))


def test_gradient_points_up_the_reward(folder: Path, batches: Batches, prompts: list[str]) -> None:
    reward = load_reward(f"hpsv2.1:{folder}")
    pixels = (batches[64, 64].expand(4, -1, -1, -1).float() / 127.5 - 1).requires_grad_()
    before = reward.score_pixels(pixels, prompts)
    gradient = torch.autograd.grad(before.sum(), pixels)[0]
    step = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    after = reward.score_pixels(pixels.detach() + 0.5 * step, prompts)
    assert bool((after > before).all())
    assert not any(parameter.requires_grad for parameter in reward.clip.parameters())


def test_what_is_no_checkpoint_is_refused(folder: Path, reference: OpenClip, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds none of HPS_v2_compressed\.safetensors, HPS_v2_compressed\.pt"):
        load_reward(f"hpsv2:{folder}")
    with pytest.raises(WeightsError, match="hpsv2: there is no file or folder '/nowhere'"):
        load_reward("hpsv2:/nowhere")
    broken = tmp_path / "broken.pt"
    broken.write_bytes((folder / "HPS_v2.1_compressed.pt").read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"broken\.pt cannot be read as weights"):
        load_reward(f"hpsv2:{broken}")
    state = reference.state_dict()
    torch.save({"visual.conv1.weight": state["visual.conv1.weight"]}, tmp_path / "part.pt")
    with pytest.raises(WeightsError, match=r"is no OpenCLIP checkpoint: visual\.proj is missing"):
        load_reward(f"hpsv2:{tmp_path / 'part.pt'}")
    del state["visual.ln_post.bias"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(WeightsError, match=r"without vision_model\.post_layernorm\.bias"):
        load_reward(f"hpsv2:{tmp_path / 'less.pt'}")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Image.new("RGB", (2, 2))}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(WeightsError, match=r"cannot be read as weights .*download it again"):
        load_reward(f"hpsv2:{tmp_path}")


def test_a_missing_tokenizer_is_told(reference: OpenClip, tmp_path: Path) -> None:
    torch.save(reference.state_dict(), tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(WeightsError, match=r"^hpsv2.*'laion/CLIP-ViT-H-14.*hf download laion/CLIP"):
        load_reward(f"hpsv2:{tmp_path}")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(WeightsError, match=r"gives \d tokens for a text tower of \d+; put tokenizer_config\.json"):
        load_reward(f"hpsv2:{tmp_path}")
