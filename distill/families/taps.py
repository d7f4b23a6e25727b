"""Features of a network on the way to its output, by name: what a discriminator reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from distill.config import RecipeError


@contextmanager
def tapped(offered: Mapping[str, nn.Module], taps: Sequence[str], *, place: int = 0) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the modules that ``taps`` names while the network runs inside the block.

    place: which one of a module that gives several; blocks of an MMDiT give those of the text first.

    Gradients flow through what is collected. Raises RecipeError for a name that is not offered.
    """
    unknown = [tap for tap in taps if tap not in offered]
    if unknown:
        raise RecipeError(f"there is no tap {unknown[0]!r}; this network offers {', '.join(offered)}")
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output[place] if isinstance(output, tuple) else output

        return hook

    handles = [offered[name].register_forward_hook(keep(name)) for name in taps]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
