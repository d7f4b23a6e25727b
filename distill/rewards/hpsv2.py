"""HPSv2 and HPSv2.1: 100 × cosine under a ViT-H/14 tuned on human preferences (Wu et al., arXiv 2306.09341).

    reward = load_reward("hpsv2.1")                     # from the hub: xswu/HPSv2
    reward = load_reward("hpsv2.1:/models/hpsv2")       # HPS_v2.1_compressed.pt and a CLIP tokenizer in this folder

The two are different checkpoints on different scales: SDXL Base 0.9 has 27.73 under v2.0 and 30.63 under v2.1 (the
project's README), so values of one are never compared with the other's. Published benchmarks print 100 × cosine, and so
does this; the package's ``score`` gives the cosine. Arithmetic is float32, the package's on GPUs is float16.

Equal to the package's transform and OpenCLIP's model (hpsv2 1.2.0, open_clip 3.3.0) to 2e-5 points in float32, for
pictures of any shape, with weights drawn at random; the tokenizer leaves out OpenCLIP's repair of broken Unicode and of
HTML entities, which no clean prompt has.
"""

from __future__ import annotations

from pathlib import Path

from distill.rewards.clip import TOKENIZER_SOURCE, ClipReward, load_tokenizer
from distill.rewards.openclip import clip_from_openclip
from distill.rewards.pixels import FitAndPad
from distill.rewards.weights import digest_of, find_file, read_tensors

SOURCE = "xswu/HPSv2"
FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}


def load_hpsv2(version: str, source: str | Path = SOURCE) -> ClipReward:
    """version: a key of FILES; source: the checkpoint, its folder or a hub id. Raises WeightsError."""
    pickled = FILES[version]
    path = find_file(source, (Path(pickled).with_suffix(".safetensors").name, pickled), version)
    clip = clip_from_openclip(read_tensors(path), path)
    beside = path.parent if (path.parent / "tokenizer_config.json").is_file() else path.parent / "tokenizer"
    tokenizer = load_tokenizer(beside if beside.is_dir() else TOKENIZER_SOURCE, version, clip)
    size = int(clip.config.vision_config.image_size)
    return ClipReward(clip, tokenizer, version, prepare=FitAndPad(size), digest=digest_of(path))
