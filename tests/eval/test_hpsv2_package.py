"""HPSv2 here and by its own package, hpsv2 1.2.0 in its own interpreter, on the same small weights and pictures."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import env
from eval.metrics import create
from eval.metrics.base import Samples
from eval.prompts import Prompt

PROMPTS = ("a red cube", "Two cats, asleep on a sofa", "a castle at night, oil painting by nobody", "")
SIZES = ((64, 64), (40, 72), (96, 60), (120, 33))
"""Never 56 on the longest side: there the package leaves out its bars and fails."""
PACKAGE = """
import importlib.util, json, pathlib, shutil, sys, types

out = pathlib.Path(sys.argv[1])
sys.modules["turtle"] = types.ModuleType("turtle")  # its factory imports a name from it, and slim machines lack Tk
sys.modules["turtle"].forward = None
ours, theirs = (pathlib.Path(importlib.util.find_spec(n).submodule_search_locations[0]) for n in ("hpsv2", "open_clip"))
name = "bpe_simple_vocab_16e6.txt.gz"
shutil.copy(theirs / name, ours / "src" / "open_clip" / name)  # the wheel lacks it

import torch
from hpsv2 import img_score
from hpsv2.src.open_clip import create_model_and_transforms, factory
from hpsv2.src.open_clip.tokenizer import SimpleTokenizer

torch.manual_seed(0)
factory._MODEL_CONFIGS["ViT-H-14"] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 160, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 3},
}
model, _, preprocess = create_model_and_transforms(
    "ViT-H-14", None, precision="fp32", device="cpu", output_dict=True, light_augmentation=True, aug_cfg={},
    with_score_predictor=False, with_region_predictor=False,
)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
torch.save({"state_dict": model.state_dict()}, out / "HPS_v2.1_compressed.pt")
tokenizer = SimpleTokenizer()
(out / "tokenizer").mkdir()
ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}  # as transformers calls them
(out / "tokenizer" / "vocab.json").write_text(json.dumps({ends.get(k, k): v for k, v in tokenizer.encoder.items()}))
merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
(out / "tokenizer" / "merges.txt").write_text("#version: 0.2\\n" + "\\n".join(" ".join(pair) for pair in merges))
img_score.model_dict.update(model=model, preprocess_val=preprocess)
scores = [
    float(img_score.score(str(out / picture), prompt, cp=str(out / "HPS_v2.1_compressed.pt"))[0])
    for picture, prompt in json.loads((out / "asked.json").read_text())
]
print(json.dumps(scores))
"""


@pytest.mark.slow
@pytest.mark.skipif(env.state("hpsv2") != "ready", reason="python -m eval.env create hpsv2 has not been run")
def test_scores_are_those_of_the_package(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (3, height, width), dtype=np.uint8) for height, width in SIZES]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / f"{number}.png")
    asked = [(f"{number}.png", prompt) for number in range(len(pictures)) for prompt in PROMPTS]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [str(env.interpreter("hpsv2")), "-W", "ignore", "-c", PACKAGE, str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"HPS_ROOT": str(tmp_path / "root")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])

    words = tmp_path / "tokenizer"
    CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=77).save_pretrained(words)
    ours = []
    for picture in pictures:
        metric = create("hpsv2.1", source=str(tmp_path))
        prompts = tuple(Prompt(f"p{i}", text, i) for i, text in enumerate(PROMPTS))
        metric.update(Samples(np.repeat(picture[None], len(PROMPTS), axis=0), prompts))
        ours.extend(metric.compute().per_sample)
    assert np.std(ours) > 1, "the weights tell pictures and prompts apart"
    assert np.asarray(ours) == pytest.approx(100 * np.asarray(theirs), abs=1e-3)
