"""Finding published weights: a file, a folder, or a repository of the Hugging Face hub; and reading them safely.

Pickled checkpoints (.pt, .bin) are read with ``torch.load(weights_only=True)``, which runs no code of theirs, and their
sha256 is logged, so that a run says which weights judged it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.bundle import sha256
from distill.config import RecipeError
from distill.hub import is_hub_id, snapshot

log = logging.getLogger(__name__)
_SMALL = ("*.json", "*.txt")


class WeightsError(RecipeError):
    """Weights that are not there or not what they should be; the message names them and the way out."""


def find_file(source: str | Path, names: tuple[str, ...], purpose: str) -> Path:
    """The first of ``names`` in a folder or hub repository, or ``source`` itself if it is a file."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise WeightsError(f"{purpose}: {path} holds none of {', '.join(names)}; put one there or name the file")
    return _from_hub(str(source), names, purpose)


def find_folder(source: str | Path, purpose: str, *, weights: bool = True) -> Path:
    """The local folder of a transformers model: an existing one, or a hub id's in the hub's own cache.

    weights: False fetches configs and words alone, as a tokenizer needs.
    """
    if Path(source).is_dir():
        return Path(source)
    if not is_hub_id(str(source)):
        raise WeightsError(f"{purpose}: there is no folder {str(source)!r}; give one, or a hub id such as owner/name")
    try:
        folder = snapshot(str(source), purpose, (*_SMALL, "*.safetensors") if weights else _SMALL)
        if weights and not any(folder.glob("*.safetensors")):
            folder = snapshot(str(source), purpose, (*_SMALL, "*.bin"))
    except RecipeError as error:
        raise WeightsError(str(error)) from None
    return folder


def _from_hub(source: str, names: tuple[str, ...], purpose: str) -> Path:
    if not is_hub_id(source):
        raise WeightsError(
            f"{purpose}: there is no file or folder {source!r}; give one, or a hub id such as owner/name"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    reasons = []
    for name in names:
        try:
            return Path(hf_hub_download(source, name))
        except (LocalEntryNotFoundError, EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            reasons.append(f"{name}: {type(error).__name__}")
    raise WeightsError(
        f"{purpose}: {source!r} is no folder here, and the hub gave nothing of it ({'; '.join(reasons)}); "
        f"download it once with: hf download {source}, or name a local folder"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or pickled checkpoint, also under ``state_dict`` or ``model``; logs its sha256."""
    try:
        content: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        )
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(f"{path} cannot be read as weights ({first}); download it again") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds {type(content).__name__}, not tensors by name; give a state dict")
    return {name.removeprefix("module."): value for name, value in content.items()}


def digest_of(path: Path) -> str:
    """sha256 of a weights file, logged."""
    digest = sha256(path)
    log.info("%s has sha256 %s", path, digest)
    return digest


def weights_digest(folder: Path) -> str:
    """sha256 over the weights of a transformers folder, logged; of several files, joined by +."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return "+".join(digest_of(path) for path in files)


def fill(model: torch.nn.Module, tensors: dict[str, Tensor], origin: Path, *, optional: tuple[str, ...] = ()) -> None:
    """Load every tensor of a model in float32. Raises WeightsError that names what is missing or of another shape.

    optional: endings of names that may be absent.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in tensors and not name.endswith(optional)]
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if missing or wrong:
        shown = "; ".join([f"without {name}" for name in missing[:3]] + wrong[:3])
        raise WeightsError(f"{origin} does not fit its architecture ({shown}); give the published checkpoint")
    model.load_state_dict({name: tensors[name].float() for name in own if name in tensors}, strict=False)
