"""One exception for everything that makes a measurement impossible or untrustworthy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EvalError(Exception):
    """What is wrong, the value seen and the way out, in one sentence for the person at the terminal."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest spelling, else all names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names) or '(none is registered)'}"
