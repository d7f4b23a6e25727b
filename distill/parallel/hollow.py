"""Networks without weights on all ranks but the first: it alone reads them, the others get their shards from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor


@contextmanager
def hollow(active: bool) -> Iterator[None]:
    """Inside, from_pretrained of a diffusers UNet or transformer makes it from its config on the meta device.

    Autoencoders and text encoders, which every rank needs whole, are read as ever. What is hollow is filled by
    distill.parallel.shard.
    """
    if not active:
        yield
        return
    original = ModelMixin.__dict__["from_pretrained"]

    def from_pretrained(cls: Any, path: Any, /, **options: Any) -> Any:
        if cls.__name__.startswith("Autoencoder"):
            return original.__func__(cls, path, **options)
        places = {key: options[key] for key in ("subfolder", "variant", "revision") if key in options}
        config = cls.load_config(path, **places)
        with torch.device("meta"):
            network = cls.from_config(config).to(options.get("torch_dtype", torch.float32)).eval()
        _check(network)
        return network

    setattr(ModelMixin, "from_pretrained", classmethod(from_pretrained))  # noqa: B010  (a method, to mypy)
    try:
        yield
    finally:
        setattr(ModelMixin, "from_pretrained", original)  # noqa: B010


def _check(network: Any) -> None:
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise ValueError(
                    f"{type(network).__name__} keeps {name}.{key} outside its buffers; load it on all ranks"
                )
