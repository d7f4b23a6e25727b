"""A recipe's rehearsal: the same classes, plan and files with tiny networks of random weights, on any machine.

    python -m distill.run recipes/sdxl-amd-4step.yaml --shrink iterations=2

Everything that would be downloaded is written as small files of the same formats beside the run, a teacher of the
recipe's family and its rewards, and the recipe is pointed at them. Nothing else knows that it is a rehearsal: loading,
phases, checkpoints and the student's folder go the way of the real run. Pictures and scores mean nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedTokenizerFast,
)

from distill.config import DistillRecipe, FileData, RecipeError, SceneData, parse_recipe
from distill.data.tokenizer import BEGIN, END, build_tokenizer
from distill.families.load import FAMILIES
from distill.families.published import PUBLISHED, USUAL, Configs, configs_of
from distill.reward_names import parse_reward
from distill.tasks.samples import PREVIEW_PROMPTS

MAX_TOKENS = 40
SIDE = 32
"""Pixels of a shrunk picture or frame."""
_TINY_VAE = {
    "sample_size": SIDE,
    "block_out_channels": [8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
_TINY_UNET = {
    "sample_size": SIDE // 4,
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
}
_TINY_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": MAX_TOKENS,
    "projection_dim": 16,
}
_TINY_T5 = {
    "vocab_size": 300,
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_heads": 2,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
}


def _tiny_text(vocabulary: dict[str, int]) -> dict[str, Any]:
    begin, end = (vocabulary[token] for token in (BEGIN, END))
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    return {**_TINY_TEXT, **ids, "vocab_size": len(vocabulary)}


def tiny_configs(family: str, configs: Configs, vocabulary: dict[str, int]) -> Configs:
    """A teacher's configs with few and narrow layers; its schedule and constants stay. vocabulary: CLIP's ids."""
    text = _tiny_text(vocabulary)
    constants = {key: v for key, v in configs.get("vae", {}).items() if key in ("scaling_factor", "shift_factor")}
    vae = {**_TINY_VAE, "scaling_factor": 1.0, **constants}
    scheduler = {"scheduler": configs["scheduler"]} if "scheduler" in configs else {}
    if family == "sdxl":
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        unet = {**_TINY_UNET, **added, "cross_attention_dim": 32, "projection_class_embeddings_input_dim": 16 + 6 * 4}
        return {"unet": unet, "vae": vae, "text_encoder": text, "text_encoder_2": text, **scheduler}
    if family == "sd15":
        return {"unet": _TINY_UNET, "vae": vae, "text_encoder": text, **scheduler}
    if family == "sit":
        shape = {"sample_size": SIDE // 4, "in_channels": 4, "out_channels": 4, "patch_size": 2}
        depth = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "norm_num_groups": 1}
        classes = {"num_embeds_ada_norm": configs["transformer"].get("num_embeds_ada_norm", 1000)}
        return {"transformer": {**shape, **depth, **classes}, "vae": vae, **scheduler}
    if family in ("sd3", "flux"):
        return {**_tiny_mmdit(family, configs, text), "vae": vae, **scheduler}
    transformer = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16}
    channels = {"in_channels": 4, "out_channels": 4, "text_dim": 16}
    video = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_scales": []}
    statistics = {"latents_mean": [-0.5, -0.25, 0.25, 0.5], "latents_std": [1.5, 2.0, 2.5, 3.0]}
    return {
        "transformer": {**transformer, **channels},
        "vae": {**video, **statistics},
        "text_encoder": _TINY_T5,
        **scheduler,
    }


def _tiny_mmdit(family: str, configs: Configs, text: dict[str, Any]) -> Configs:
    """Network and text encoders of an MMDiT; what its kinds differ in stays."""
    given = configs.get("transformer", {})
    narrow = {"num_attention_heads": 2, "num_layers": 2, "joint_attention_dim": 32}
    t5 = {**_TINY_T5, "d_model": 32}
    if family == "flux":
        kind = {key: given[key] for key in ("guidance_embeds",) if key in given}
        shape = {"in_channels": 16, "num_single_layers": 2, "attention_head_dim": 8, "axes_dims_rope": [4, 2, 2]}
        network = {**narrow, **shape, "pooled_projection_dim": 16, **kind}
        return {"transformer": network, "text_encoder": text, "text_encoder_2": t5}
    kind = {key: given[key] for key in ("qk_norm",) if key in given}
    kind |= {"dual_attention_layers": [0]} if given.get("dual_attention_layers") else {}
    shape = {"sample_size": SIDE // 4, "in_channels": 4, "out_channels": 4, "attention_head_dim": 8}
    sizes = {"caption_projection_dim": 16, "pooled_projection_dim": 32, "pos_embed_max_size": 2 * SIDE // 4}
    encoders = {"text_encoder": text, "text_encoder_2": text, "text_encoder_3": t5}
    return {"transformer": {**narrow, **shape, **sizes, **kind}, **encoders}


def save_tiny_teacher(family: str, configs: Configs, folder: Path) -> None:
    """Write a tiny teacher's diffusers folder, always the same one."""
    build_tokenizer(folder / "words", MAX_TOKENS)
    vocabulary = json.loads((folder / "words" / "vocab.json").read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made, network = FAMILIES[family].from_config(tiny_configs(family, configs, vocabulary))
    clip = CLIPTokenizer.from_pretrained(folder / "words")
    if family == "wan":
        made.tokenizer = tiny_t5_tokenizer()
    elif family in ("sd3", "flux"):
        made.tokenizers = [*[clip] * (len(made.tokenizers) - 1), tiny_t5_tokenizer()]
    elif family != "sit":
        made.tokenizer = made.tokenizer_2 = clip
    made.save(network, folder)
    shutil.rmtree(folder / "words")


def tiny_t5_tokenizer() -> Any:
    """A tokenizer of bytes with T5's special tokens: pads with 0, ends with 1."""
    from tokenizers import processors

    tokenizer = _bytes(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _byte_tokenizer(special: list[str]) -> Any:
    """A tokenizer of bytes that pads with the first of its special tokens and knows the others in a text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_bytes(special), pad_token=special[0], additional_special_tokens=special[1:]
    )


def _bytes(special: list[str]) -> Any:
    """Byte-pair encoding without pairs, the special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    unknown = {"unk_token": "<unk>"} if "<unk>" in special else {}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], **unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tiny_clip(folder: Path, seed: int) -> None:
    """A CLIPModel with its tokenizer, as published CLIP rewards lie in a folder."""
    build_tokenizer(folder, MAX_TOKENS)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    text = _tiny_text(vocabulary)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": SIDE, "patch_size": 8}, projection_dim=16
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": SIDE, "crop_size": SIDE}))


def save_tiny_videoalign(folder: Path, seed: int) -> None:
    """A Qwen2-VL with a head, its tokenizer and settings, as VideoAlign publishes its reward."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    tokenizer = _byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    )
    words, ids = len(tokenizer) + 3, tokenizer.get_vocab()  # three more ask for scores
    width: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    width |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": words,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = Qwen2VLConfig(
        text_config={**width, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
        video_token_id=ids["<|video_pad|>"],
        image_token_id=words,  # none of the words
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen2VLModel(config)
        head = torch.randn(1, 32) / 32**0.5
    old = {name.replace("language_model.", "model."): value for name, value in model.state_dict().items()}
    (folder / "checkpoint-1").mkdir(parents=True)
    torch.save({**old, "rm_head.weight": head}, folder / "checkpoint-1" / "model.pth")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {
        "data_config": {"fps": 2.0, "max_frame_pixels": 200704, "prompt_template_type": "detailed_special"},
        "model_config": {"reward_token": "special", "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"},
    }
    (folder / "model_config.json").write_text(json.dumps(settings, indent=2))


def save_tiny_classifier(folder: Path, seed: int, classes: int) -> None:
    """A Dinov2ForImageClassification."""
    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 2}
    config = Dinov2Config.from_dict({**width, "image_size": SIDE, "patch_size": 8, "num_labels": classes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Dinov2ForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": SIDE, "crop_size": SIDE}))


def save_tiny_data(folder: Path) -> None:
    """prompts.txt, and pictures of coloured noise with the same prompts beside them."""
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PREVIEW_PROMPTS), encoding="utf-8")
    rng = np.random.default_rng(0)
    for i, prompt in enumerate(PREVIEW_PROMPTS):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(prompt, encoding="utf-8")


def shrunk(recipe: DistillRecipe, folder: Path) -> DistillRecipe:
    """The recipe on tiny networks, whose files are written to ``folder`` where they are not there yet."""
    if recipe.data == "digits" or not (recipe.family or recipe.teacher in PUBLISHED or Path(recipe.teacher).is_dir()):
        raise RecipeError(f"teacher: {recipe.teacher!r} has no production family to shrink; name its family")
    family, configs = configs_of(recipe.teacher, recipe.family)
    configs = {**USUAL[family], **configs}
    _once(folder / "teacher", lambda place: save_tiny_teacher(family, configs, place))
    tree = recipe.model_dump(mode="json")
    tree |= {"name": f"{recipe.name}-shrunk", "output": f"{recipe.output}-shrunk", "teacher": str(folder / "teacher")}
    tree |= {"size": None if family == "sit" else [SIDE, SIDE], "frames": 5 if family == "wan" else None}
    if recipe.advantage:
        tree["advantage"]["reward"] = _tiny_reward(recipe, recipe.advantage.reward, folder, 0, configs)
    tree["heldout_rewards"] = [
        _tiny_reward(recipe, name, folder, 1 + i, configs) for i, name in enumerate(recipe.heldout_rewards)
    ]
    if isinstance(recipe.data, FileData):
        _once(folder / "data", save_tiny_data)
        pictures = str(folder / "data") if recipe.data.pictures else None
        tree["data"] |= {"prompts": str(folder / "data" / "prompts.txt"), "pictures": pictures}
    elif isinstance(recipe.data, SceneData):
        tree["data"] |= {"count": 64, "size": SIDE}
    micro = min(recipe.accumulate, max(2, int(os.environ.get("WORLD_SIZE", "1"))))  # torchrun's: each rank needs one
    tree |= {"accumulate": micro, "batch_size": micro * (recipe.advantage.group if recipe.advantage else 1)}
    tree["telemetry"] |= {"every": None}
    if recipe.regression:
        tree["regression"] |= {"pairs": 8, "steps": 2}
    return parse_recipe(tree, recipe.name)  # type: ignore[no-any-return]


def _tiny_reward(recipe: DistillRecipe, name: str, folder: Path, seed: int, configs: Configs) -> str:
    """A reward of labels, of videos, or of pictures, as the recipe's own is."""
    place, labels = folder / f"reward-{seed}", recipe.data == "labels"
    if parse_reward(name)[0] == "videoalign":
        _once(place, lambda target: save_tiny_videoalign(target, seed))
        return f"videoalign:{place}"
    if labels:
        classes = int(configs["transformer"].get("num_embeds_ada_norm", 1000))
        _once(place, lambda target: save_tiny_classifier(target, seed, classes))
    else:
        _once(place, lambda target: save_tiny_clip(target, seed))
    return f"{'dinov2' if labels else 'clip'}:{place}"


def _once(place: Path, write: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all; several ranks may do so at once, and the first one's stays."""
    if place.is_dir():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent))
    write(temporary)
    try:
        temporary.rename(place)
    except OSError:
        shutil.rmtree(temporary)
