"""ImageReward from a checkpoint in BLIP's names gives what BLIP gives, computed here a second time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertTokenizer

from distill.rewards import load_reward
from distill.rewards.imagereward import MAX_TOKENS, MEAN, STD
from distill.rewards.weights import WeightsError

Batches = dict[tuple[int, int], Tensor]
WIDTH, HEADS, LAYERS, PATCH, GRID = 128, 2, 2, 14, 4
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red small green gray large blue cube ball left of metal sphere cylinder !"


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention in heads of 64, written out. mask: (B, keys), 1 where a key may be seen."""
    q, k, v = (x.unflatten(2, (HEADS, 64)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / 8
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e30)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Names(nn.Module):
    """A tree of parameters under a checkpoint's own names, read by dotted name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.tensors = {name: 0.08 * torch.randn(shape) for name, shape in shapes.items()}
        for name, value in self.tensors.items():
            if "norm" in name.lower() and name.endswith("weight"):
                value += 1

    def linear(self, name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.tensors[name + ".weight"], self.tensors[name + ".bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return nn.functional.layer_norm(
            x, x.shape[-1:], self.tensors[name + ".weight"], self.tensors[name + ".bias"], eps
        )


def linear(name: str, wide: int, narrow: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (narrow, wide), f"{name}.bias": (narrow,)}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """The published checkpoint's names with small widths."""
    v, t = "blip.visual_encoder", "blip.text_encoder"
    found: dict[str, tuple[int, ...]] = {
        f"{v}.cls_token": (1, 1, WIDTH),
        f"{v}.pos_embed": (1, 1 + GRID * GRID, WIDTH),
        f"{v}.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        f"{v}.patch_embed.proj.bias": (WIDTH,),
        f"{t}.embeddings.word_embeddings.weight": (vocabulary, WIDTH),
        f"{t}.embeddings.position_embeddings.weight": (48, WIDTH),
        **norm(f"{v}.norm"),
        **norm(f"{t}.embeddings.LayerNorm"),
        **linear("blip.vision_proj", WIDTH, 8),
    }
    for i in range(LAYERS):
        b, layer = f"{v}.blocks.{i}", f"{t}.encoder.layer.{i}"
        found |= norm(f"{b}.norm1") | norm(f"{b}.norm2") | linear(f"{b}.attn.qkv", WIDTH, 3 * WIDTH)
        found |= linear(f"{b}.attn.proj", WIDTH, WIDTH) | linear(f"{b}.mlp.fc1", WIDTH, 96)
        found |= linear(f"{b}.mlp.fc2", 96, WIDTH)
        for part in ("attention", "crossattention"):
            for name in ("self.query", "self.key", "self.value", "output.dense"):
                found |= linear(f"{layer}.{part}.{name}", WIDTH, WIDTH)
            found |= norm(f"{layer}.{part}.output.LayerNorm")
        found |= linear(f"{layer}.intermediate.dense", WIDTH, 80) | linear(f"{layer}.output.dense", 80, WIDTH)
        found |= norm(f"{layer}.output.LayerNorm")
    for place, (wide, narrow) in {0: (WIDTH, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        found |= linear(f"mlp.layers.{place}", wide, narrow)
    return found


def reference_score(n: Names, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """BLIP's towers and ImageReward's head from their papers' and checkpoint's structure."""
    v, t, gelu = "blip.visual_encoder", "blip.text_encoder", nn.functional.gelu
    x = nn.functional.conv2d(
        pixels, n.tensors[f"{v}.patch_embed.proj.weight"], n.tensors[f"{v}.patch_embed.proj.bias"], PATCH
    )
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat((n.tensors[f"{v}.cls_token"].expand(len(x), -1, -1), x), 1) + n.tensors[f"{v}.pos_embed"]
    for i in range(LAYERS):
        b = f"{v}.blocks.{i}"
        q, k, value = n.linear(f"{b}.attn.qkv", n.norm(f"{b}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + n.linear(f"{b}.attn.proj", attention(q, k, value))
        x = x + n.linear(f"{b}.mlp.fc2", gelu(n.linear(f"{b}.mlp.fc1", n.norm(f"{b}.norm2", x, 1e-6))))
    seen = n.norm(f"{v}.norm", x, 1e-6)
    places = n.tensors[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = n.norm(f"{t}.embeddings.LayerNorm", n.tensors[f"{t}.embeddings.word_embeddings.weight"][ids] + places, 1e-12)
    for i in range(LAYERS):
        layer = f"{t}.encoder.layer.{i}"
        for part, keys, allowed in (("attention", None, mask), ("crossattention", seen, None)):
            p, source = f"{layer}.{part}", h if keys is None else keys
            q = n.linear(f"{p}.self.query", h)
            mixed = attention(q, n.linear(f"{p}.self.key", source), n.linear(f"{p}.self.value", source), allowed)
            h = n.norm(f"{p}.output.LayerNorm", n.linear(f"{p}.output.dense", mixed) + h, 1e-12)
        wide = gelu(n.linear(f"{layer}.intermediate.dense", h))
        h = n.norm(f"{layer}.output.LayerNorm", n.linear(f"{layer}.output.dense", wide) + h, 1e-12)
    r = h[:, 0]
    for place in (0, 2, 4, 6, 7):
        r = n.linear(f"mlp.layers.{place}", r)
    return (r[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def network() -> Names:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Names(shapes(len(WORDS.split()) + 2))


@pytest.fixture(scope="module")
def folder(network: Names, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("image-reward")
    torch.save(network.tensors, root / "ImageReward.pt")
    (root / "vocab.txt").write_text("\n".join(WORDS.split()) + "\n")
    return root


def test_scores_are_those_of_blip_and_its_head(
    network: Names, folder: Path, batches: Batches, prompts: list[str]
) -> None:
    reward = load_reward(f"imagereward:{folder}")
    prompts = [*prompts[:3], "a red cube left of " * 20]
    words = BertTokenizer.from_pretrained(folder)(
        prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    assert words.input_ids.shape == (4, 35) and words.attention_mask.sum(1).tolist()[-1] == 35
    for shape, images in batches.items():
        four = images.expand(4, -1, -1, -1)
        prepared = reward.prepare(four.float() / 127.5 - 1)
        expected = reference_score(network, prepared, words.input_ids, words.attention_mask)
        torch.testing.assert_close(reward.score(four, prompts), expected, rtol=0, atol=2e-5)
        assert float(expected.std()) > 1e-3, shape


def test_head_is_standardised(folder: Path) -> None:
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)
    reward = load_reward(f"imagereward:{folder}")
    assert not reward.training and not any(p.requires_grad for p in reward.parameters()) and len(reward.digest) == 64


def test_gradient_points_up_the_reward(folder: Path, batches: Batches, prompts: list[str]) -> None:
    reward = load_reward(f"imagereward:{folder}")
    pixels = (0.9 * (batches[56, 56].expand(4, -1, -1, -1).float() / 127.5 - 1)).requires_grad_()
    before = reward.score_pixels(pixels, prompts)
    gradient = torch.autograd.grad(before.sum(), pixels)[0]
    step = 2.0 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    assert bool((reward.score_pixels(pixels.detach() + step, prompts) > before).all())


def test_what_is_no_checkpoint_is_refused(network: Names, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds none of ImageReward\.safetensors, ImageReward\.pt"):
        load_reward(f"imagereward:{tmp_path}")
    torch.save({"blip.visual_encoder.patch_embed.proj.weight": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(WeightsError, match=r"no ImageReward checkpoint: mlp\.layers\.0\.weight is missing"):
        load_reward(f"imagereward:{tmp_path}")
    torch.save(network.tensors, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(WeightsError, match=r"gives 6 tokens for a text encoder of 20; put vocab\.txt"):
        load_reward(f"imagereward:{tmp_path}")
