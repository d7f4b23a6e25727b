"""What is compiled computes what diffusers computes: SDXL's second encoder, filled up with its own token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTokenizer

from distill.bundle import Manifest
from distill.export.graphs import SdxlTextEncoder, _second_padding, load_graphs
from distill.export.onnx import OPSET, compile_graph
from distill.export.parity import OnnxGraph
from distill.families.published import SDXL
from distill.shrink import save_tiny_teacher

PROMPTS = ["a small red metal sphere", "", "words " * 60, "two ends <|endoftext|> in one prompt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL whose second tokenizer pads with "!", as the published one does."""
    place = tmp_path_factory.mktemp("sdxl")
    save_tiny_teacher("sdxl", SDXL, place)
    config, whole = place / "tokenizer_2" / "tokenizer_config.json", place / "tokenizer_2" / "tokenizer.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token": "!"}))
    tokens = json.loads(whole.read_text())
    tokens["padding"] = {**tokens["padding"], "pad_id": tokens["model"]["vocab"]["!"], "pad_token": "!"}
    whole.write_text(json.dumps(tokens))
    return place


def rows(folder: Path) -> Tensor:
    """Prompts as the service reads them: with the first tokenizer, filled up with the end token."""
    words: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids: Tensor = words(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


@torch.no_grad()
def test_one_row_of_ids_serves_both_encoders_as_two_tokenizers_do(
    folder: Path, tmp_path: Path, manifest: Manifest
) -> None:
    update = {"family": "sdxl", "max_tokens": 40, "latent_stride": 4, "sizes": ((32, 32),), "latent_channels": 4}
    text = load_graphs(folder, manifest.model_copy(update=update))["text_encoder"]
    found = text.run({"input_ids": rows(folder)})
    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(folder)
    embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    torch.testing.assert_close(found["prompt_embeds"], embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["pooled"], pooled, rtol=1e-4, atol=1e-5)

    same = SdxlTextEncoder(pipeline.text_encoder, pipeline.text_encoder_2)(rows(folder))[0]
    half = same.shape[-1] // 2
    assert torch.equal(same[..., :half], found["prompt_embeds"][..., :half])
    assert not torch.allclose(same[0, 20:, half:], found["prompt_embeds"][0, 20:, half:], atol=1e-3)

    compile_graph(text, tmp_path / "text.onnx", OPSET)
    compiled = OnnxGraph(tmp_path / "text.onnx").run({"input_ids": rows(folder)})
    for name, value in found.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-4)


def test_bundles_with_one_tokenizer_compile_as_before(folder: Path, tmp_path: Path) -> None:
    words: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    end = int(words.eos_token_id)
    assert _second_padding(folder, end) == words.convert_tokens_to_ids("!") != end
    assert _second_padding(tmp_path, end) is None
    (tmp_path / "tokenizer_2").symlink_to(folder / "tokenizer")
    assert _second_padding(tmp_path, end) is None
