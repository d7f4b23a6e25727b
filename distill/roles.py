"""Roles as views: a network of their own, or one frozen base with an adapter for each role.

    adapters: {roles: [student, fake], rank: 64, alpha: 64}     # one base, the teacher is the base with no adapter
    adapters: {roles: [fake], rank: 64, alpha: 64}              # the student has its own weights

Without ``adapters`` teacher, student and fake score are three networks. With them the base is held once, frozen, and
peft's LoRA layers h = W·x + (α/r)·B·A·x carry the roles; B = 0 at first, so the fake score is the teacher at step 0.
Which adapter is at work is a field of the layers: nothing else is switched, and no ``requires_grad`` ever changes,
because FSDP2 fixes what it gathers and reduces by those flags at the first pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.config import Adapters
from distill.parallel.shard import full

NOTHING = ""
"""The name under which no adapter is at work."""
ADAPTER = "adapter.safetensors"
"""In a student's bundle, what it was trained as: float32 beside merged weights in float16, which lose small changes."""


@dataclass
class Networks:
    """Teacher, student and fake score, and the networks that hold their weights: three, two, or one base."""

    teacher: nn.Module
    student: nn.Module
    fake: nn.Module
    held: list[nn.Module] = field(default_factory=list)


def separate(teacher: nn.Module) -> Networks:
    """Three networks that are equal at first; the teacher is frozen."""
    student, fake = (copy.deepcopy(teacher).train().requires_grad_(True) for _ in range(2))
    frozen = teacher.eval().requires_grad_(False)
    return Networks(frozen, student, fake, [frozen, student, fake])


def adapted(teacher: nn.Module, adapters: Adapters, targets: Sequence[str], seed: int) -> Networks:
    """Roles named by ``adapters`` as views of the teacher, which becomes their frozen base; others get own weights."""
    own = {
        r: copy.deepcopy(teacher).train().requires_grad_(True) for r in ("student", "fake") if r not in adapters.roles
    }
    base = teacher.eval().requires_grad_(False)
    if adapters.base == "bfloat16":
        for module in base.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):  # norms stay as they are
                module.to(torch.bfloat16)
    inject(base, adapters.roles, rank=adapters.rank, alpha=adapters.alpha, targets=targets, seed=seed)
    trained: dict[str, nn.Module] = {**own}
    trained.update((role, View(base, role)) for role in adapters.roles)
    return Networks(View(base, NOTHING), trained["student"], trained["fake"], [base, *own.values()])


def inject(base: nn.Module, names: Sequence[str], *, rank: int, alpha: int, targets: Sequence[str], seed: int) -> None:
    """Put LoRA layers for these adapters into a network, in place: A ∼ Kaiming by ``seed``, B = 0, both float32."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # that of the role before
        torch.manual_seed(seed)
        for name in names:
            settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
            inject_adapter_in_model(settings, base, adapter_name=name)
    for name, parameter in base.named_parameters():
        if adapter_of(name) in names:
            parameter.data = parameter.data.float()  # peft gives them the base's dtype; masters are float32
        parameter.requires_grad_(adapter_of(name) in names)


class View(nn.Module):
    """The base with one adapter at work. Its parameters are that adapter's alone, by names without the adapter's."""

    base: nn.Module

    def __init__(self, base: nn.Module, adapter: str) -> None:
        super().__init__()
        self.__dict__["base"] = base  # no submodule: the base belongs to all roles
        self.adapter, self.layers = adapter, lora_layers(base)
        for name, parameter in base.named_parameters():
            if adapter and adapter_of(name) == adapter:
                self._parameters[name.replace(f".{adapter}.", ".")] = parameter

    def forward(self, *inputs: Any, **named: Any) -> Any:
        with at_work(self.layers, self.adapter):
            return self.base(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        """What families ask of a network: its config, its blocks."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)


def adapter_of(parameter: str) -> str:
    """The adapter in the name of a base's parameter, such as "….to_q.lora_A.student.weight"; NOTHING for others."""
    for kind in (".lora_A.", ".lora_B."):
        if kind in parameter:
            return parameter.partition(kind)[2].partition(".")[0]
    return NOTHING


def lora_layers(network: nn.Module) -> list[BaseTunerLayer]:
    return [m for m in network.modules() if isinstance(m, BaseTunerLayer)]


@contextmanager
def at_work(layers: Sequence[BaseTunerLayer], adapter: str) -> Iterator[None]:
    """Let one adapter of these layers act, or none."""
    before = [(m._active_adapter, m._disable_adapters) for m in layers]
    for layer in layers:
        # peft's own set_adapter also switches requires_grad, which would change what FSDP2 reduces.
        layer._active_adapter, layer._disable_adapters = [adapter], not adapter
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def checkpoint_activations(network: Any) -> None:
    """Compute the insides of a diffusers network's blocks again in the backward pass instead of keeping them.

    Under whichever adapter was at work in the forward pass: another role may have run in between.
    """

    def again(block: nn.Module, *inputs: Any) -> Any:
        layers = lora_layers(block)
        name = NOTHING if not layers or layers[0]._disable_adapters else layers[0].active_adapters[0]

        def run(*values: Any) -> Any:
            with at_work(layers, name):
                return block(*values)

        return checkpoint(run, *inputs, use_reentrant=False)

    network.enable_gradient_checkpointing(again)


@torch.no_grad()
def merge(network: nn.Module, adapter: Mapping[str, Tensor], scale: float) -> nn.Module:
    """W ← W + scale·B·A in a plain network, from a View's state_dict; scale is α/r. All ranks must call it."""
    for name, a in adapter.items():
        if ".lora_A." not in name:
            continue
        down, up = full(a), full(adapter[name.replace(".lora_A.", ".lora_B.")])
        weight = network.get_submodule(name.partition(".lora_A.")[0]).weight
        assert isinstance(weight, Tensor)
        delta = torch.einsum("or...,ri...->oi...", up.double(), down.double())
        weight.add_((scale * delta).to(weight))
    return network


def save_adapter(adapter: Mapping[str, Tensor], settings: Adapters, folder: Path) -> None:
    """A View's state_dict into a bundle's folder, with rank and alpha as the file's metadata."""
    tensors = {name: tensor.contiguous() for name, tensor in adapter.items()}
    save_file(tensors, folder / ADAPTER, {"rank": str(settings.rank), "alpha": str(settings.alpha)})
