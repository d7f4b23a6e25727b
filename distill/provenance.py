"""Where a result comes from: kept beside every run and in every bundle."""

from __future__ import annotations

import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "safetensors")


def provenance(recipe: Any) -> dict[str, Any]:
    """What a later reader needs to trust a result: resolved recipe, code revision, packages, time."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "revision": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "packages": {name: _version(name) for name in PACKAGES},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
