"""A tiny teacher of each production family: random weights of the real classes in a diffusers folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from distill.families.published import USUAL
from distill.shrink import save_tiny_teacher


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> its folder, made once; tests must not change it."""

    @cache
    def made(family: str) -> Path:
        folder = tmp_path_factory.mktemp("teachers") / family
        save_tiny_teacher(family, USUAL[family], folder)
        return folder

    return made
