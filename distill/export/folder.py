"""Writing the diffusers folder of a text-to-image student, so that it loads everywhere without options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def save_pipeline(pipeline: Any, root: Path) -> None:
    """Write a diffusers pipeline to ``root``: weights in float16, tokenizers also as vocab.json and merges.txt.

    transformers computes in the dtype that config.json names and diffusers in float32, and one pipeline cannot mix
    them; so the text encoders' configs name float32. The pipeline's modules are float16 afterwards.
    """
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.half()
    pipeline.save_pretrained(root, safe_serialization=True)
    for config in sorted(root.glob("text_encoder*/config.json")):
        content = json.loads(config.read_text())
        content["dtype"] = "float32"
        config.write_text(json.dumps(content, indent=2) + "\n")
    for tokenizer in sorted(root.glob("tokenizer*/tokenizer.json")):
        model = json.loads(tokenizer.read_text())["model"]
        vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
        tokenizer.with_name("vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
        merges = "".join(f"{left} {right}\n" for left, right in (_pair(merge) for merge in model["merges"]))
        tokenizer.with_name("merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
