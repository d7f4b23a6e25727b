"""Where the networks that judge pictures lie: folders beside each other, made by recipes.

    scenes-clip/      CLIPModel: the feature extractor of FID and KID
    scenes-reward/    CLIPModel tuned on preferences: the reward
    scenes-labeller/  the labeller of compositional accuracy
    digits-cnn/       the classifier of digits

A judge's digest enters the protocol of every score that it gave.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from distill.bundle import sha256
from eval.errors import EvalError

DEFAULT_FOLDER = Path("models")
"""Where the recipes write what they train."""


def find(folder: Path | None, name: str) -> Path:
    """The folder of one judge. Raises EvalError when it is not there."""
    path = (folder or DEFAULT_FOLDER) / name
    if not path.is_dir():
        raise EvalError(f"{path} is missing, so {name} cannot judge; train it with its recipe or give --judges FOLDER")
    return path


def digest(path: Path) -> str:
    """sha256 over the names and contents of a judge's files: two scores compare only when it is equal."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if not files:
        raise EvalError(f"{path} holds no files; train the judge again")
    lines = "".join(f"{sha256(p)}  {p.relative_to(path).as_posix()}\n" for p in files)
    return hashlib.sha256(lines.encode()).hexdigest()
