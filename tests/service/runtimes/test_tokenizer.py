"""Tokens as CLIP makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from service.runtimes import OnnxRuntime

PROMPTS = ("a red cube", "Zebra — 3 naïve cats!", "  a  RED\ncube ", "x", "a small cube " * 9)


def test_tokens_equal_those_of_transformers(runtime: OnnxRuntime, tiny_bundle: Path) -> None:
    from transformers import CLIPTokenizer

    reference = CLIPTokenizer.from_pretrained(tiny_bundle / "tokenizer")
    length = runtime.manifest.max_tokens
    expected = reference(list(PROMPTS), padding="max_length", truncation=True, max_length=length)["input_ids"]
    np.testing.assert_array_equal(runtime.tokenize(PROMPTS).ids, expected)


def test_tokens_tell_how_many_were_cut(runtime: OnnxRuntime) -> None:
    tokens = runtime.tokenize(["a red cube", " ".join(["red"] * 40)])
    assert tokens.counts == (3, 40)
    assert tokens.kept == (3, 14)
    assert tokens.ids.shape == (2, 16)


def test_t5_tokens_and_mask_equal_those_that_wan_reads(video_runtime: OnnxRuntime, tiny_video_bundle: Path) -> None:
    """Cleaned, cut with the end kept, padded, and with the prompt's end masked off; special words are no exception."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny_video_bundle / "tokenizer")
    prompts = [*PROMPTS, "a &lt;b&gt; &amp;amp; c", "x" * 600, "a <pad> cube </s>"]
    expected = reference(
        [prompt_clean(prompt) for prompt in prompts], padding="max_length", truncation=True, max_length=512
    )
    tokens = video_runtime.tokenize(prompts)
    np.testing.assert_array_equal(tokens.ids, expected["input_ids"])
    np.testing.assert_array_equal(tokens.mask, expected["attention_mask"])
    assert (tokens.counts[-2], tokens.kept[-2]) == (600, 511)
