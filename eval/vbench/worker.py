"""Runs inside VBench's interpreter and scores clips with VBench's own functions; nothing of Leapfrog is imported.

    VBENCH_CACHE_DIR=/models/vbench python worker.py

It reads one JSON object per line from its standard input and answers each with one on its standard output; whatever
the packages print goes to standard error. First of all it says hello: the package's version, every dimension with the
reason why it cannot run here, and the score of a probe clip that it made itself. Then

    {"do": "score", "dimension": …, "info": FILE}  ->  {"results": {path: score}}

A score that is not a finite number is answered as the text "nan". Nothing is ever downloaded: a dimension whose weights
are not in VBENCH_CACHE_DIR cannot run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

CACHE = Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")
_CLIP_B, _CLIP_L = "clip_model/ViT-B-32.pt", "clip_model/ViT-L-14.pt"
_GRIT, _VICLIP = "grit_model/grit_b_densecap_objectdet.pth", "ViCLIP/ViClip-InternVid-10M-FLT.pth"
WEIGHTS: dict[str, tuple[str, ...]] = {
    "subject_consistency": (
        "dino_model/facebookresearch_dino_main/hubconf.py",
        "dino_model/dino_vitbase16_pretrain.pth",
    ),
    "background_consistency": (_CLIP_B,),
    "temporal_flickering": (),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": (_CLIP_L, "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "object_class": (_GRIT,),
    "multiple_objects": (_GRIT,),
    "human_action": ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",),
    "color": (_GRIT,),
    "spatial_relationship": (_GRIT,),
    "scene": ("caption_model/tag2text_swin_14m.pth",),
    "appearance_style": (_CLIP_B,),
    "temporal_style": (_VICLIP,),
    "overall_consistency": (_VICLIP,),
}
"""Files below VBENCH_CACHE_DIR that each dimension reads, as vbench.utils.init_submodules names them."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    os.environ["VBENCH_CACHE_DIR"] = str(CACHE)
    say(answers, hello())
    for line in sys.stdin:
        try:
            say(answers, answer(json.loads(line)))
        except Exception as error:
            say(answers, {"error": f"{type(error).__name__}: {error}"})


def say(answers: TextIO, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what, allow_nan=False) + "\n")


def hello() -> dict[str, Any]:
    names = ("vbench", "torch", "torchvision", "numpy", "transformers", "timm", "opencv-python-headless", "decord")
    return {
        "hello": "vbench",
        "versions": {name: importlib.metadata.version(name) for name in names},
        "device": device(),
        "unable": {name: why for name in WEIGHTS if (why := unable(name))},
        "weights": {name: digests(name) for name in WEIGHTS if not unable(name)},
        "probe": probe(),
    }


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def unable(dimension: str) -> str:
    """Why a dimension cannot run here, with the way out; nothing when it can."""
    missing = [name for name in WEIGHTS[dimension] if not (CACHE / name).is_file()]
    if missing:
        return f"{CACHE / missing[0]} is missing; put VBench's file of that name there"
    try:
        importlib.import_module(f"vbench.{dimension}")
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        return f"vbench.{dimension} cannot be imported ({type(error).__name__}: {text}); install that into {sys.prefix}"
    return ""


def digests(dimension: str) -> dict[str, str]:
    found = {}
    for name in WEIGHTS[dimension]:
        digest = hashlib.sha256()
        with (CACHE / name).open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        found[name] = digest.hexdigest()
    return found


def probe() -> float:
    """temporal_flickering of three grey frames, 10 and 30 levels apart: 1 − mean(10, 30)/255 if all is well."""
    import numpy as np

    cv2 = importlib.import_module("cv2")
    cal_score = importlib.import_module("vbench.temporal_flickering").cal_score
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "probe.avi")
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"FFV1"), 8, (32, 32))
        for level in (100, 110, 140):
            writer.write(np.full((32, 32, 3), level, np.uint8))
        writer.release()
        return float(cal_score(path))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "score":
        return {"results": score(request["dimension"], request["info"])}
    return {"error": f"what to do is {request['do']!r}; ask for score"}


def score(dimension: str, info: str) -> dict[str, float | str]:
    """One number per clip that VBench scored, in VBench's own unit (a share, but 0 to 100 for imaging_quality)."""
    why = unable(dimension)
    if why:
        raise RuntimeError(why)
    modules = importlib.import_module("vbench.utils").init_submodules([dimension], local=True)[dimension]
    compute = getattr(importlib.import_module(f"vbench.{dimension}"), f"compute_{dimension}")
    _, results = compute(info, device(), modules)
    return {result["video_path"]: number(result["video_results"]) for result in results}


def number(value: Any) -> float | str:
    found = float(value)
    return found if math.isfinite(found) else "nan"


if __name__ == "__main__":
    main()
