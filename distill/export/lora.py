"""A student as a LoRA of its teacher: the difference of their weights in factors, for diffusers or for ComfyUI.

W_student ≈ W_teacher + B·A with A, B the first ``rank`` singular directions of the difference, each carrying √σ, and
alpha = rank, so that nothing scales it. A student that was trained as a LoRA has it in its bundle, and that one is
taken: merged into weights of float16 it would lose what is small beside them. Of a fully trained one the strongest
directions stay, and norms, biases and embeddings, which have no factors, are left behind: ``Fidelity`` says how much,
and the model card repeats it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill.export.names import comfyui_module
from distill.roles import ADAPTER

RANK = 64
"""Of a LoRA of a fully trained student, unless another one is asked for."""
EXACT_SIDE = 256
"""Matrices with no side beyond this are decomposed exactly, larger ones by random projections."""


@dataclass(frozen=True)
class Factors:
    """down: (r, in) or (r, in, k, k), up: (out, r) or (out, r, 1, 1), float32; alpha is r."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)

    def product(self) -> Tensor:
        """(out, in·k·k) float32."""
        return self.up.flatten(1) @ self.down.flatten(1)


Lora = dict[str, Factors]
"""Factors by the names of the layers that they change."""


@dataclass(frozen=True)
class Fidelity:
    """How well the factors stand for the difference of student and teacher.

    captured: share of the squared difference of all parameters. left_behind: share in parameters without factors.
    remaining: rms of the network's output error over rms of what the student changed; 0 is the student, 1 the teacher.
    """

    rank: int
    layers: int
    captured: float
    left_behind: float
    remaining: float = float("nan")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def lora_of(folder: Path, student: nn.Module, teacher: nn.Module, rank: int | None) -> tuple[Lora, Fidelity]:
    """The LoRA of the bundle in ``folder``: its own where it was trained as one, cut to ``rank`` where that is less.

    rank: None is its own, or 64. Raises ValueError if student and teacher do not differ or do not belong together.
    """
    own = kept(folder)
    if not own:
        return extract(student, teacher, rank or RANK)
    trained = max(factors.rank for factors in own.values())
    if rank is None or rank >= trained:
        return own, Fidelity(trained, len(own), 1.0, 0.0)
    less = {name: factorise(f.product().reshape(len(f.up), *f.down.shape[1:]), rank) for name, f in own.items()}
    lost, whole = 0.0, 0.0
    for name, factors in own.items():
        whole += float(factors.product().double().pow(2).sum())
        lost += float((factors.product() - less[name].product()).double().pow(2).sum())
    return less, Fidelity(rank, len(less), 1 - lost / whole, 0.0)


def kept(folder: Path) -> Lora:
    """The factors that a student was trained as, α/r within them and both of one size; none if it was not."""
    if not (folder / ADAPTER).is_file():
        return {}
    with safe_open(folder / ADAPTER, "pt") as stored:
        settings = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (no mapping)
    scale, factors = float(settings["alpha"]) / float(settings["rank"]), {}
    for name, down in tensors.items():
        if ".lora_A." not in name:
            continue
        up = scale * tensors[name.replace(".lora_A.", ".lora_B.")]
        if bool(up.any()):
            balance = (up.norm() / down.norm()).sqrt()
            factors[name.partition(".lora_A.")[0]] = Factors(down * balance, up / balance)
    return factors


def extract(student: nn.Module, teacher: nn.Module, rank: int) -> tuple[dict[str, Factors], Fidelity]:
    """Factors by module name for every linear and convolutional layer that differs. Raises ValueError if none does."""
    theirs = dict(teacher.named_parameters())
    factors: dict[str, Factors] = {}
    total, rest, left = 0.0, 0.0, 0.0
    layers = {
        f"{n}.weight": n for n, m in student.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and _plain(m)
    }
    for name, value in student.named_parameters():
        if name not in theirs or theirs[name].shape != value.shape:
            raise ValueError(f"the teacher has no {name} of shape {tuple(value.shape)}; give the student's own teacher")
        delta = value.detach().float() - theirs[name].detach().float()
        energy = float(delta.double().pow(2).sum())
        total += energy
        if not energy:
            continue
        if name in layers:
            found = factorise(delta, rank)
            factors[layers[name]] = found
            rest += float((delta.flatten(1) - found.product()).double().pow(2).sum())
        else:
            rest += energy
            left += energy
    if not factors:
        raise ValueError("student and teacher have the same weights; a LoRA of nothing would be empty")
    return factors, Fidelity(rank, len(factors), 1 - rest / total, left / total)


def _plain(module: nn.Linear | nn.Conv2d) -> bool:
    return isinstance(module, nn.Linear) or module.groups == 1


def factorise(delta: Tensor, rank: int) -> Factors:
    """The best approximation of (out, in) or (out, in, k, k) by ``rank`` directions; randomised for large matrices."""
    matrix, kernel = delta.flatten(1), tuple(delta.shape[1:])
    r = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(EXACT_SIDE, 2 * r):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=r + 16, niter=4)
        vh = v.T
    root = s[:r].sqrt()
    down, up = (root[:, None] * vh[:r]).reshape(r, *kernel), u[:, :r] * root
    return Factors(down.contiguous(), (up if delta.ndim == 2 else up[:, :, None, None]).contiguous())


def merge(network: nn.Module, factors: Mapping[str, Factors]) -> nn.Module:
    """Add the factors to a network's weights, in place."""
    modules = dict(network.named_modules())
    with torch.no_grad():
        for name, found in factors.items():
            weight: Any = modules[name].weight
            weight += found.product().reshape(weight.shape).to(weight)
    return network


def diffusers_state(factors: Mapping[str, Factors], component: str) -> dict[str, Tensor]:
    """diffusers' own keys, which are peft's: ``unet.….lora_A.weight``.

    Without alphas diffusers takes the commonest rank for all of them, so smaller ones are filled up with zeros.
    """
    state: dict[str, Tensor] = {}
    rank = max(found.rank for found in factors.values())
    for name, found in factors.items():
        missing = rank - found.rank
        down = torch.cat((found.down, found.down.new_zeros(missing, *found.down.shape[1:])))
        up = torch.cat((found.up, found.up.new_zeros(len(found.up), missing, *found.up.shape[2:])), dim=1)
        state[f"{component}.{name}.lora_A.weight"] = down.half()
        state[f"{component}.{name}.lora_B.weight"] = up.half()
    return state


def comfyui_state(factors: Mapping[str, Factors], family: str) -> dict[str, Tensor]:
    """ComfyUI's keys, which are kohya's for UNets and the original transformer's for Wan."""
    down, up = ("lora_A", "lora_B") if family == "wan" else ("lora_down", "lora_up")
    state: dict[str, Tensor] = {}
    for name, found in factors.items():
        key = comfyui_module(name, family)
        state[f"{key}.{down}.weight"] = found.down.half()
        state[f"{key}.{up}.weight"] = found.up.half()
        state[f"{key}.alpha"] = torch.tensor(float(found.rank))
    return state
