"""Sources that are hub ids: told apart from folders without torch, and fetched once into the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from distill.config import RecipeError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(source: str) -> bool:
    """Whether a source that is no folder can be meant for the hub: owner/name whose owner is no folder of ours."""
    return bool(_HUB_ID.fullmatch(source)) and not Path(source.partition("/")[0]).is_dir()


def snapshot(source: str, key: str, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """The local folder of a hub id's files. Raises RecipeError, which names the key, where it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=list(wanted), ignore_patterns=list(unwanted)))
    except LocalEntryNotFoundError:
        raise RecipeError(
            f"{key}: {source!r} is not in the hub's local cache and the hub cannot be reached; run `hf download "
            f"{source}` where there is a network and unset HF_HUB_OFFLINE, or give a local folder"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        first = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"{key}: the hub has no {source!r} for you ({first}); check the id, or run `hf auth login`"
        ) from None
