"""A recipe's rehearsal: the same classes, plan and files with tiny networks of random weights, on any machine.

    python -m distill.run recipes/sdxl-amd-4step.yaml --shrink iterations=2
    python -m distill.run recipes/scenes-amd.yaml --shrink iterations=2

A recipe's own network gets few and narrow layers, its data are few, and what it reads is written in small beside the
run. What would be downloaded (a teacher of its family, rewards, prompts, pictures) is made up in the same formats; what
another recipe makes (a teacher, a reward, an autoencoder, text encoders, an earlier stage) is made by that recipe,
shrunk as well and not trained. Nothing else knows that it is a rehearsal: loading, phases, checkpoints and the result's
folder go the way of the real run. Pictures and scores mean nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedTokenizerFast,
)

from distill.config import Base, DistillRecipe, FileData, RecipeError, SceneData, load_recipe, parse_recipe
from distill.data.tokenizer import BEGIN, END, build_tokenizer
from distill.families.load import FAMILIES
from distill.families.published import PUBLISHED, USUAL, Configs, configs_of
from distill.reward_names import parse_reward
from distill.run import TASKS
from distill.tasks.samples import PREVIEW_PROMPTS
from distill.trainer import Trainer

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Base)

RECIPES = Path("recipes")
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
_TOWER = {"width": 16, "layers": 2, "heads": 2}
_SMALL: dict[str, dict[str, Any]] = {
    "vae": {"model": {"block_out_channels": 8, "layers_per_block": 1, "norm_num_groups": 8}},
    "video-vae": {"model": {"base_dim": 8, "res_blocks": 1}, "window": 5, "single_frames": 1, "crop": SIDE // 2},
    "clip": {"vision": _TOWER, "text": _TOWER, "text_small": {**_TOWER, "width": 8}, "patch": 8, "projection": 16},
    "text": {"tower": _TOWER},
    "reward": {},
    "latent-reward": {"width": 8, "stem_iterations": 1},
    "video-reward": {"width": 8, "layers": 1, "projection": 8},
    "labeller": {"width": 8},
    "motion": {"width": 8},
    "diffusion": {"sampling_steps": 2, "compile": False},
    "distill": {
        "fake_warmup": 0,
        "compile": False,
        "telemetry": {"every": None},
        "regression": {"pairs": 8, "steps": 2},
    },
}
"""What a rehearsal sets, by task; what is off in a recipe stays off, and a number for a list is each of its numbers."""
_SMALL_NETWORKS: dict[str, dict[str, Any]] = {
    "sdxl": {
        "unet": {
            "block_out_channels": 16,
            "layers_per_block": 1,
            "transformer_layers": 1,
            "head_dim": 8,
            "norm_num_groups": 8,
        }
    },
    "wan": {"transformer": {"width": 48, "layers": 2, "heads": 2, "feed_forward": 32}},
    "sit": {"width": 16, "layers": 1, "heads": 2},
}
"""The same for the network of a teacher to be trained, by family."""
_PARTS = ("clip", "vae", "text_encoder", "text_encoder_2", "decoder_of", "reward")
"""Keys of a recipe and of its model that name folders of what another recipe makes."""


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


# --- recipes and what they read -------------------------------------------------------------------------------------


def shrunk(recipe: R, folder: Path, beside: Path = RECIPES, *, write: bool = True, overrides: Sequence[str] = ()) -> R:
    """The recipe on tiny networks; what it reads is written to ``folder`` where it is not there yet.

    beside: the folder of the recipes that make what this one reads; recipes/ is searched after it. write: False only
    names what is read, but for a distillation, which cannot be planned without its teacher's configs. overrides: that
    the recipe was loaded with; widths, depths and the like that they name stay.
    Raises RecipeError for what no recipe makes and nothing can be made up for.
    """
    searched = tuple(_recipes_in(place) for place in dict.fromkeys((beside.resolve(), RECIPES.resolve())))
    inputs = _Inputs(folder, folder / "recipes", searched, write or isinstance(recipe, DistillRecipe))
    return _small(recipe, inputs, {override.partition("=")[0] for override in overrides})  # type: ignore[no-any-return]


def _small(recipe: Any, inputs: _Inputs, kept: Set[str] = frozenset()) -> Any:
    tree = recipe.model_dump(mode="json")
    _set(tree, _SMALL[recipe.task], kept)
    tree |= {"name": f"{recipe.name}-shrunk", "output": f"{recipe.output}-shrunk"}
    micro = min(recipe.accumulate, max(2, int(os.environ.get("WORLD_SIZE", "1"))))  # torchrun's: each rank needs one
    tree |= {"accumulate": micro, "batch_size": micro * _rows(recipe)}
    if isinstance(recipe.data, SceneData):
        frames = recipe.data.frames
        tree["data"] |= {"count": 8 if frames else 64, "size": SIDE, "frames": frames and min(frames, 9)}
    if recipe.initialise_from:
        tree["initialise_from"] = inputs.run(recipe.initialise_from) or recipe.initialise_from
    model = tree.get("model", {})
    for owner, prefix in ((tree, ""), (model, "model.")):
        parts = {key: owner[key] for key in _PARTS if owner.get(key)}
        owner |= {key: inputs.needed(prefix + key, value) for key, value in parts.items()}
    if recipe.task == "diffusion":
        _set(model, _SMALL_NETWORKS[recipe.model.family], kept, "model.")
    if recipe.task == "distill":
        _distil(recipe, tree, inputs)
    return parse_recipe(tree, recipe.name)


def _set(tree: dict[str, Any], small: dict[str, Any], kept: Set[str], within: str = "") -> None:
    for key, value in small.items():
        if not tree[key] or within + key in kept:
            continue
        if isinstance(value, dict):
            _set(tree[key], value, kept, f"{within}{key}.")
        else:
            tree[key] = [value] * len(tree[key]) if isinstance(tree[key], list) else value


def _rows(recipe: Base) -> int:
    """Samples of a micro-batch."""
    if isinstance(recipe, DistillRecipe):
        return recipe.advantage.group if recipe.advantage else 1
    return min(recipe.batch_size // recipe.accumulate, 8)


def _distil(recipe: DistillRecipe, tree: dict[str, Any], inputs: _Inputs) -> None:
    """Point a distillation at a teacher, at rewards and at files."""
    folder, teacher = inputs.own, inputs.result("teacher", recipe.teacher)
    if teacher:
        _, configs = configs_of(teacher)
        tree |= {"teacher": teacher, "size": None, "frames": None}
    else:
        family, configs = _published(recipe)
        _once(folder / "teacher", lambda place: save_tiny_teacher(family, configs, place))
        tree |= {"teacher": str(folder / "teacher")}
        tree |= {"size": None if family == "sit" else [SIDE, SIDE], "frames": 5 if family == "wan" else None}
    if recipe.advantage:
        named = [("advantage.reward", recipe.advantage.reward)]
        named += [("heldout_rewards", name) for name in recipe.heldout_rewards]
        ours = [_our_reward(key, name, inputs.needed if teacher else inputs.result) for key, name in named]
        rewards = [ours[i] or _tiny_reward(recipe, name, folder, i, configs) for i, (_, name) in enumerate(named)]
        tree["advantage"]["reward"], *tree["heldout_rewards"] = rewards
    for key in ("regression", "foundation_gan"):
        if tree[key] and tree[key]["features"]:
            tree[key]["features"] = inputs.result(f"{key}.features", tree[key]["features"]) or tree[key]["features"]
    if isinstance(recipe.data, FileData):
        _once(folder / "data", save_tiny_data)
        pictures = str(folder / "data") if recipe.data.pictures else None
        tree["data"] |= {"prompts": str(folder / "data" / "prompts.txt"), "pictures": pictures}


def _published(recipe: DistillRecipe) -> tuple[str, Configs]:
    """Family and configs of a teacher that no recipe makes. Raises RecipeError for one of no production family."""
    known = recipe.family or recipe.teacher in PUBLISHED or Path(recipe.teacher).is_dir()
    if recipe.data == "digits" or not known:
        raise RecipeError(
            f"teacher: no recipe here makes {recipe.teacher!r}, and it has no production family to shrink; put the "
            "recipe that makes it beside this one, or name its family"
        )
    family, configs = configs_of(recipe.teacher, recipe.family)
    return family, {**USUAL[family], **configs}


def _our_reward(key: str, name: str, find: Callable[[str, str], str | None]) -> str | None:
    """What stands for a reward in a folder, as ``find`` finds it; None for a published one."""
    try:
        kind, folder = parse_reward(name)
    except ValueError as error:
        raise RecipeError(f"{key}: {error}") from None
    return None if kind else find(key, folder)


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
    with tempfile.TemporaryDirectory(dir=place.parent) as temporary:
        whole = Path(temporary) / place.name
        whole.mkdir()
        write(whole)
        with contextlib.suppress(OSError):
            whole.rename(place)


# --- what other recipes make -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """What a shrunk recipe reads.

    own: folder of what is made up for it; made: of what other recipes make, each once for a whole chain; searched:
    those recipes as they are written, by file, of each folder in turn; chain: names of those that are being made.
    """

    own: Path
    made: Path
    searched: tuple[dict[Path, dict[str, Any]], ...]
    write: bool
    chain: tuple[str, ...] = ()

    def result(self, key: str, value: str) -> str | None:
        """What stands for a folder in a recipe's output; None if no recipe makes it."""
        folder = Path(value).absolute()

        def makes(tree: dict[str, Any]) -> bool:
            again = any(tree.get(key) == tree["output"] for key in _PARTS)  # a second stage, which reads a first one's
            return not again and folder.is_relative_to(Path(tree["output"]).absolute())

        found = self._maker(key, value, makes)
        if found is None:
            return None
        path, tree = found
        return str(self._make(path) / "result" / folder.relative_to(Path(tree["output"]).absolute()))

    def needed(self, key: str, value: str) -> str:
        """As result. Raises RecipeError where it is None."""
        found = self.result(key, value)
        if found is None:
            raise RecipeError(
                f"{key}: no recipe here makes {value!r}, so nothing small can stand for it; put the recipe that makes "
                "it beside this one, or name a folder that a recipe makes"
            )
        return found

    def run(self, value: str) -> str | None:
        """What stands for the folder of another recipe's run; None if no recipe has its name."""
        found = self._maker("initialise_from", value, lambda tree: tree.get("name") == Path(value).name)
        return str(self._make(found[0]) / "run") if found else None

    def _maker(
        self, key: str, value: str, makes: Callable[[dict[str, Any]], bool]
    ) -> tuple[Path, dict[str, Any]] | None:
        """The recipe of the first folder that has one. Raises RecipeError if it has several."""
        for recipes in self.searched:
            found = [(path, tree) for path, tree in recipes.items() if makes(tree)]
            if len(found) > 1:
                names = " and ".join(path.name for path, _ in found)
                raise RecipeError(f"{key}: {value!r} is made by {names}; give each a name and an output of its own")
            if found:
                return found[0]
        return None

    def _make(self, path: Path) -> Path:
        """The folder with what a recipe leaves, shrunk: its run in run/, its output in result/."""
        recipe: Base = load_recipe(path)
        chain = (*self.chain, recipe.name)
        if recipe.name in self.chain:
            raise RecipeError(f"{path}: {' reads what is made by '.join(chain)}; one of them must not read another")
        place = self.made / recipe.name
        if self.write:
            _once(place, lambda target: _untrained(recipe, target, replace(self, own=target / "inputs", chain=chain)))
        return place


def _recipes_in(folder: Path) -> dict[Path, dict[str, Any]]:
    """The recipes of a folder as they are written; a file that is none makes nothing."""
    loader, found = getattr(yaml, "CSafeLoader", yaml.SafeLoader), {}  # the same ten times as fast
    for path in sorted(folder.glob("*.yaml")):
        with contextlib.suppress(yaml.YAMLError):
            tree = yaml.load(path.read_text(), loader)
            if isinstance(tree, dict) and isinstance(tree.get("output"), str):
                found[path] = tree
    return found


def _untrained(recipe: Any, place: Path, inputs: _Inputs) -> None:
    """What a shrunk recipe leaves, with the weights that it starts from; its scores are not told."""
    log.info("%s makes what is read: shrunk, and not trained", recipe.name)
    start = recipe.model_copy(update={"initialise_from": None})
    with _alone(), torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()):
        small = _small(start, inputs).model_copy(update={"output": str(place / "result")})
        module, _, name = TASKS[small.task].partition(":")
        trainer = Trainer(getattr(importlib.import_module(module), name)(small), place / "run", quiet=True)
        trainer.save()
        (place / "result").mkdir(exist_ok=True)
        with trainer.averaged():
            trainer.task.finish(place / "result")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Outside of torchrun's world, whose ranks each make what they read."""
    size = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if size is not None:
            os.environ["WORLD_SIZE"] = size
