"""The original names: diffusers' own converters bring every weight back to where it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel, WanTransformer3DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_wan_transformer_to_diffusers,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from distill.bundle import Bundle, Manifest, Sampler, write_manifest
from distill.data.tokenizer import build_tokenizer
from distill.export.names import comfyui_module, unet_name, unet_state, vae_state, wan_name
from distill.export.publish import PublishError, checkpoint, publish, write_comfyui
from distill.families.sd15 import Sd15
from distill.sampling import student_table


def sdxl_unet() -> Any:
    """SDXL's own layout of blocks, narrow."""
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16, 32), layers_per_block=2, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3), attention_head_dim=(1, 2, 4), cross_attention_dim=8,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )  # fmt: skip


def test_every_weight_of_sdxls_unet_comes_back() -> None:
    unet = sdxl_unet()
    own, theirs = unet.state_dict(), unet_state(unet.state_dict(), unet.config)
    assert len(theirs) == len(own)
    back = convert_ldm_unet_checkpoint(dict(theirs), dict(unet.config))
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("down_blocks.1.attentions.0.proj_in.weight", "input_blocks.4.1.proj_in.weight"),
        ("down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
        ("mid_block.resnets.1.conv1.bias", "middle_block.2.in_layers.2.bias"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.2.conv.weight"),
        ("up_blocks.2.resnets.2.conv_shortcut.weight", "output_blocks.8.0.skip_connection.weight"),
        ("add_embedding.linear_2.bias", "label_emb.0.2.bias"),
    ],
)  # fmt: skip
def test_names_of_the_published_sdxl_checkpoint(ours: str, theirs: str) -> None:
    assert unet_name(ours, 2, {0: True, 1: True, 2: False}) == theirs


def test_names_without_a_place_are_refused() -> None:
    with pytest.raises(ValueError, match=r"class_embedding\.weight has no place in the original UNet"):
        unet_name("class_embedding.weight", 2, {})


def test_every_weight_of_the_autoencoder_comes_back() -> None:
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=2,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4,
    )  # fmt: skip
    own, theirs = vae.state_dict(), vae_state(vae.state_dict(), vae.config)
    assert theirs["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    back = convert_ldm_vae_checkpoint(dict(theirs), dict(vae.config))
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name].reshape(own[name].shape), own[name]) for name in own)


def test_every_weight_of_wan_comes_back() -> None:
    wan: Any = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    own = wan.state_dict()
    theirs = {wan_name(name): value for name, value in own.items()}
    for name in ("blocks.0.self_attn.q.weight", "blocks.1.modulation", "head.modulation", "blocks.0.norm3.weight"):
        assert name in theirs
    back = convert_wan_transformer_to_diffusers(dict(theirs))
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)


def test_lora_layers_have_the_names_that_comfyui_maps() -> None:
    assert comfyui_module("mid_block.attentions.0.proj_in", "sdxl") == "lora_unet_mid_block_attentions_0_proj_in"
    assert comfyui_module("add_embedding.linear_1", "sdxl") == "lora_unet_label_emb_0_0"
    assert comfyui_module("blocks.3.ffn.net.0.proj", "wan") == "diffusion_model.blocks.3.ffn.0"


# --- whole checkpoints ---------------------------------------------------------------------------------------------


def test_diffusers_reads_the_checkpoint_back(tmp_path: Path) -> None:
    """The embedded bundle, because diffusers tells SDXL's text encoders apart by their widths."""
    source = "bundles/scenes-sdxl"
    publish(source, "comfyui", tmp_path / "out", say=lambda line: None)
    file = tmp_path / "out/checkpoints/scenes-sdxl.safetensors"
    again: Any = StableDiffusionXLPipeline.from_single_file(str(file), config=source, local_files_only=True)
    own: Any = StableDiffusionXLPipeline.from_pretrained(source)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(own, part).state_dict(), getattr(again, part).state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(theirs[name].float(), value.float()), (part, name)


def test_v_prediction_is_marked_as_comfyui_looks_for_it() -> None:
    bundle = Bundle.open("bundles/scenes-sdxl")
    assert bundle.manifest.prediction == "v"
    state = checkpoint(bundle)
    assert {"v_pred", "ztsnr"} <= state.keys()
    assert "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight" in state


def test_noise_prediction_is_not_marked(tiny_sources: Path) -> None:
    state = checkpoint(Bundle.open(tiny_sources))
    assert not {"v_pred", "ztsnr"} & state.keys()
    prefixes = {name.split(".")[0] for name in state}
    assert prefixes == {"model", "first_stage_model", "conditioner"}


def test_families_that_comfyui_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="the weights of sit have no names of ComfyUI's here; use --to diff"):
        publish("bundles/digits-sit", "comfyui", tmp_path / "out")


def test_a_prediction_that_no_checkpoint_tells_of_is_refused(tiny_sources: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_sources)
    other = replace(bundle, manifest=bundle.manifest.model_copy(update={"prediction": "x0"}))
    with pytest.raises(PublishError, match="predicts x0, of which a checkpoint cannot tell ComfyUI; use --to diff"):
        write_comfyui(other, tmp_path / "out")


def as_bundle(family: Any, network: Any, folder: Path, manifest: Manifest) -> Path:
    """What a distillation writes of a family, without its training."""
    family.save(network, folder)
    prediction = {"wan": "flow"}.get(family.name, "epsilon")
    tables = {4: student_table(family.schedule, prediction, family.schedule.grid(4))}
    update = {
        "name": folder.name, "family": family.name, "prediction": prediction, "default_steps": 4,
        "samplers": {n: Sampler.of(table) for n, table in tables.items()},
    }  # fmt: skip
    write_manifest(folder, manifest.model_copy(update=update))
    return folder


def test_sd15_is_one_checkpoint_in_the_first_stable_diffusions_names(tmp_path: Path, manifest: Manifest) -> None:
    """The names of v1-5-pruned.safetensors, as far as a narrow network has them."""
    build_tokenizer(tmp_path / "words", 77)
    family, network = tiny_sd15(CLIPTokenizer.from_pretrained(tmp_path / "words"))
    publish(as_bundle(family, network, tmp_path / "sd", manifest), "comfyui", tmp_path / "out", say=lambda line: None)
    state = load_file(tmp_path / "out/checkpoints/sd.safetensors")
    for name in (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "first_stage_model.decoder.up.0.block.0.conv1.weight",
        "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    ):
        assert name in state
    own = network.state_dict()
    back = convert_ldm_unet_checkpoint(dict(state), dict(network.config))
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name].half()) for name in own)


def tiny_sd15(tokenizer: Any) -> tuple[Any, Any]:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=32, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    unet: Any = UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    return Sd15(vae, CLIPTextModel(text), tokenizer), unet
