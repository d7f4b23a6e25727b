"""One exception for everything that makes a measurement impossible or untrustworthy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ValidationError


class EvalError(Exception):
    """What is wrong, the value seen and the way out, in one sentence for the person at the terminal."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest spelling, else all names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names) or '(none is registered)'}"


def first_fault(error: ValidationError, *models: type[BaseModel]) -> str:
    """Where a file is at fault and why; an unknown key gets the nearest spelling among the fields of ``models``."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    if first["type"] != "extra_forbidden":
        return f"{where}: {first['msg']}"
    fields = {field for model in models for field in model.model_fields}
    return f"{where} is unknown; {nearest(str(first['loc'][-1]), fields)}"
