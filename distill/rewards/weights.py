"""Finding published weights: a file, a folder, or a repository of the Hugging Face hub; and reading them safely.

Pickled checkpoints (.pt, .bin) are read with ``torch.load(weights_only=True)``, which runs no code of theirs, and their
sha256 is logged, so that a run says which weights judged it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.bundle import sha256

log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class WeightsError(ValueError):
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


def find_folder(source: str | Path, purpose: str) -> str:
    """What ``from_pretrained`` takes: an existing folder or a hub id. Raises WeightsError for anything else."""
    if Path(source).is_dir() or _is_hub_id(str(source)):
        return str(source)
    raise WeightsError(f"{purpose}: there is no folder {str(source)!r}; give one, or a hub id such as owner/name")


def _is_hub_id(source: str) -> bool:
    return bool(_HUB_ID.fullmatch(source)) and not source.startswith(".")


def _from_hub(source: str, names: tuple[str, ...], purpose: str) -> Path:
    if not _is_hub_id(source):
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


def weights_digest(folder: str) -> str:
    """sha256 over the weights of a transformers folder; "" for a hub id, whose revision the hub's own cache keeps."""
    files = sorted(p for p in Path(folder).glob("*") if p.suffix in (".safetensors", ".bin"))
    return digest_of(files[0]) if len(files) == 1 else "+".join(digest_of(path) for path in files)


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
