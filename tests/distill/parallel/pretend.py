"""A GPU that is not there: tensors on it have shapes and no numbers, and whoever asks for a number is noted.

    with pretended() as gpu:        # LEAPFROG_DEVICE=meta
        ...                         # what is drawn on the host has its numbers, what is moved has lost them
    gpu.reads                       # where the host waited for the device

The host's tensors stay as they are; those of the device are torch's fake tensors, for which operators check devices as
kernels do: tensors of two devices do not mix unless one is a number, and shapes cannot depend on values. A copy to the
host gives ones. torch's meta device stands in for CUDA because autograd runs on it without a driver.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import distill

_ATEN = torch.ops.aten
_OURS = str(Path(distill.__file__ or "").parent)
_PRODUCTS = {
    functional.linear, functional.scaled_dot_product_attention, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul,
    torch.bmm, torch.baddbmm, torch.addmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm,
    functional.conv1d, functional.conv2d, functional.conv3d,
}  # fmt: skip


def _on_device(thing: Tensor | torch.device) -> bool:
    return (thing.device if isinstance(thing, Tensor) else thing).type == "meta"


class Mixed(TorchFunctionMode):
    """Autocast as CUDA has it: what multiplies matrices takes bfloat16."""

    enabled = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.enabled and func in _PRODUCTS:
            args, kwargs = tree_map_only(Tensor, _reduced, (args, kwargs))
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        before, self.enabled = self.enabled, enabled
        try:
            yield
        finally:
            self.enabled = before


def _reduced(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16) if _on_device(tensor) and tensor.is_floating_point() else tensor


class Pretended(FakeTensorMode):
    """Operators that touch the device are faked, others run."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        leaves = tree_leaves((args, named))
        away = [leaf for leaf in leaves if isinstance(leaf, Tensor) and _on_device(leaf)]
        if not any(
            isinstance(leaf, FakeTensor) or (isinstance(leaf, Tensor | torch.device) and _on_device(leaf))
            for leaf in leaves
        ):
            return func(*args, **named)
        if func is _ATEN._local_scalar_dense.default:
            self._read()
            return True if away[0].dtype is torch.bool else 1.0 if away[0].is_floating_point() else 1
        if func is _ATEN._to_copy.default and named.get("device", torch.device("meta")).type == "cpu":
            self._read()
            return torch.ones(away[0].shape, dtype=named.get("dtype") or away[0].dtype)
        if func is _ATEN.copy_.default and args[0].device.type == "cpu":
            self._read()
            return args[0].fill_(1)
        if func is _ATEN.empty_like.default and named.get("device", torch.device("meta")).type == "cpu":
            return torch.empty(away[0].shape, dtype=named.get("dtype") or away[0].dtype)
        return super().__torch_dispatch__(func, types, args, named)

    def _read(self) -> None:
        """Note the innermost function of ours."""
        frame = sys._getframe(1)
        while frame.f_back and not (
            "/distill/" in frame.f_code.co_filename and "/tests/" not in frame.f_code.co_filename
        ):
            frame = frame.f_back
        self.reads.append(f"{frame.f_code.co_filename.rpartition('/distill/')[2]}:{frame.f_code.co_name}")


@contextlib.contextmanager
def pretended() -> Iterator[Pretended]:
    """Inside, training finds a GPU."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}

    def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As Module._apply, which cannot put a fake tensor into a real parameter: new ones, and shared ones once."""
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
            return real["apply"](module, function, recurse)
        for child in module.children() if recurse else ():
            child._apply(function)
        for store in (module._parameters, module._buffers):
            for name, old in [(name, old) for name, old in store.items() if old is not None]:
                if id(old) not in moved:
                    new = function(old.detach())
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    moved[id(old)] = old, new
                store[name] = moved[id(old)][1]  # type: ignore[assignment]
        return module

    def autocast(kind: str, *, enabled: bool = True, **options: Any) -> Any:
        return mixed.switched(enabled) if kind == "meta" else real["autocast"](kind, enabled=enabled, **options)

    def loading(original: Any) -> Any:
        """Loaders use the meta device themselves."""

        def load(cls: Any, *places: Any, **options: Any) -> Any:
            with _disable_current_modes():
                return original.__func__(cls, *places, **options)

        return classmethod(load)

    def again(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Blocks are computed again under the autocast of the first time."""
        enabled = mixed.enabled

        def run(*values: Any) -> Any:
            with Mixed() as inner, inner.switched(enabled):  # a backward pass leaves the modes outside of it
                return function(*values)

        return checkpoint(run, *inputs, **options)

    def beside(layer: Any, adapter: str, device: Any = None) -> None:
        """peft takes the meta device for one whose values are still to come."""
        for kind in (getattr(layer, name, None) for name in layer.adapter_layer_names):
            if isinstance(kind, nn.ModuleDict) and adapter in kind:
                kind[adapter].to(layer.get_base_layer().weight.device)

    real = {"apply": nn.Module._apply, "autocast": torch.autocast}
    with pytest.MonkeyPatch.context() as patch, Pretended() as gpu, Mixed() as mixed:
        patch.setenv("LEAPFROG_DEVICE", "meta")
        patch.setattr(nn.Module, "_apply", apply)
        patch.setattr(torch, "autocast", autocast)
        patch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *given, **named: None)
        patch.setattr("distill.roles.checkpoint", again)
        patch.setattr(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", beside)
        for model in (ModelMixin, PreTrainedModel):
            patch.setattr(model, "from_pretrained", loading(model.__dict__["from_pretrained"]))
        yield gpu


def on_device(module: nn.Module) -> bool:
    """Whether every parameter of a module lies on the device."""
    return all(_on_device(parameter) for parameter in module.parameters())
