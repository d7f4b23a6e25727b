"""Networks whose repeated blocks torch.compile turns into fused kernels.

Blocks are compiled one kind at a time, not networks as a whole: all blocks of a kind share one graph, so it takes a
minute and not one per block, and what stands between them (features that hooks read, shards that are gathered) stays
ordinary Python.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

GRAPHS = 64
"""Graphs of one kind of block: with and without gradients, under autocast, at the batch sizes of roles and previews."""


def compile_blocks(networks: Iterable[nn.Module], kinds: tuple[type[nn.Module], ...]) -> None:
    """Compile the modules of these kinds in place. Names of parameters stay; backward passes may share a graph."""
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._functorch.config.donated_buffer = False
    for network in networks:
        for module in network.modules():
            if isinstance(module, kinds):
                module.compile()
