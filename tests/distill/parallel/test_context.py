"""Ranks that share a sequence compute what one computes: outputs, gradients, taps, and a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor

from distill.config import Adapters
from distill.families.parts import same_precision
from distill.families.wan import Wan
from distill.parallel.context import context_groups, share_sequence
from distill.parallel.gradients import average
from distill.parallel.world import World
from distill.roles import adapted, checkpoint_activations
from distill.sampling import Flow

RECIPE = "wan-1.3b-amd-4step"


def wan() -> Any:
    """Six heads; latents of 3 frames of 4 × 8 make 24 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanTransformer3DModel(
            num_attention_heads=6,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=32,
            num_layers=3,
            rope_max_seq_len=32,
        ).double()


def family() -> Any:
    """What prediction needs of it."""
    made = Wan.__new__(Wan)
    made.schedule = Flow(5.0)
    return made


def passed(network: Any, taps: bool, *, ranks: int = 1) -> dict[str, Tensor]:
    """Output, tapped feature, and gradients of a loss that reads them, averaged over ranks; float64."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 3, 4, 8, generator=rng, dtype=torch.float64).requires_grad_()
    condition = {"prompt_embeds": torch.randn(2, 5, 8, generator=rng, dtype=torch.float64)}
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    predicted = family().predict(network, x, t, condition, taps=("mid",) if taps else ())
    weights = torch.randn(predicted.x0.shape, generator=rng, dtype=torch.float64)
    loss = (weights * predicted.x0).sum() + sum(f.pow(2).mean() for f in predicted.features.values())
    loss.backward()
    parameters = dict(network.named_parameters())
    average(parameters.values(), World(dist.get_rank(), ranks) if ranks > 1 else World())
    told = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    features = {f"tap/{name}": f.detach() for name, f in predicted.features.items()}
    return {"x0": predicted.x0.detach(), "x": x.grad, **features, **told}  # type: ignore[dict-item]


def built(kind: str) -> Any:
    network = wan()
    if kind == "adapters":
        held = adapted(network, Adapters(rank=2, alpha=4), family().lora_targets(), 0)
        for parameter in held.student.parameters():  # B = 0 would hide A's gradient
            parameter.data = parameter.data.double() + 0.1
        return held.student
    if kind == "recomputed":
        checkpoint_activations(network)
    return network


def parted(kind: str, size: int) -> dict[str, Tensor]:
    network = built(kind)
    share_sequence(getattr(network, "base", network), context_groups(size))
    return passed(network, kind == "taps", ranks=size)


@pytest.mark.parametrize(("kind", "size"), [("recomputed", 2), ("adapters", 2), ("taps", 3)])
def test_a_pass_on_several_ranks_is_that_of_one(ranks: Any, kind: str, size: int) -> None:
    """Output, and the gradients of every weight and of the input; Wan's norms are float32 in any precision."""
    alone = passed(built(kind), kind == "taps")
    for each in ranks(size, parted, kind, size):
        assert each.keys() == alone.keys() and len(alone) > 10
        for name, tensor in alone.items():
            scale = float(tensor.abs().max())
            assert scale > 0 and torch.allclose(each[name], tensor, rtol=0, atol=2e-6 * scale), name


def reduced(size: int) -> dict[str, Tensor]:
    """Output and gradients of a pass in bfloat16, of one rank where size is 1."""
    network = same_precision(wan().float())
    if size > 1:
        share_sequence(network, context_groups(size))
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 3, 4, 8, generator=rng).requires_grad_()
    inputs = {"timestep": torch.tensor([300.0, 900.0]), "encoder_hidden_states": torch.randn(2, 5, 8, generator=rng)}
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x, **inputs, return_dict=False)[0]
    output.float().pow(2).sum().backward()
    average(network.parameters(), World(dist.get_rank(), size) if size > 1 else World())
    told = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"output": output.detach().float(), "x": x.grad, **told}  # type: ignore[dict-item]


def test_a_pass_in_bfloat16_is_that_of_one_to_its_precision(ranks: Any) -> None:
    """Half of bfloat16's eight bits: queries and keys are rounded before they are turned instead of after."""
    alone = reduced(1)
    for each in ranks(2, reduced, 2):
        for name, tensor in alone.items():
            error = (each[name] - tensor).norm() / tensor.norm().clamp_min(1e-6)
            assert float(error) < 2**-4, f"{name}: {float(error):.3f}"


def refusals(size: int) -> list[str]:
    """What a group of this size says of heads, of a class and of tokens that it cannot share."""
    group, found = context_groups(size), []
    network = wan()
    network.register_to_config(num_attention_heads=7)
    shared = wan()
    share_sequence(shared, group)
    inputs = {"timestep": torch.ones(1), "encoder_hidden_states": torch.zeros(1, 2, 8).double()}
    for refused in (
        lambda: share_sequence(network, group),
        lambda: share_sequence(torch.nn.Linear(1, 1), group),
        lambda: shared(torch.zeros(1, 4, 1, 2, 6).double(), **inputs),
    ):
        with pytest.raises(ValueError, match=r"parallel\.context is 2") as error:
            refused()
        found.append(str(error.value))
    return found


def test_what_cannot_be_shared_is_refused(ranks: Any) -> None:
    for heads, kind, tokens in ranks(2, refusals, 2):
        assert heads == "parallel.context is 2 for 7 heads of attention; use one of 1, 7"
        assert kind.startswith("parallel.context is 2, and Linear has no sequence that can be shared; use context: 1")
        assert tokens == "parallel.context is 2 for 3 tokens; use one of 1, 3, or another size"


@pytest.mark.parametrize(
    ("size", "more"),
    [(2, []), (2, ["parallel.strategy=fsdp"]), (4, ["parallel.strategy=hsdp", "parallel.replicas=2"])],
    ids=["ddp", "fsdp", "hsdp"],
)
def test_amd_trains_a_video_on_ranks_that_share_it_as_on_one(
    ranks: Any, jobs: Any, alone: tuple[Path, dict[str, Tensor]], tmp_path: Path, size: int, more: list[str]
) -> None:
    """Three iterations of the production recipe on tiny networks; four ranks are two copies, and two pairs.

    Two run to the end: the same numbers in the log, previews, and a bundle. Moments are gradients here (β₁ = 0): within
    5e-5 + 1e-3·|g|. Weights moved by steps of 2e-6: within 1e-7 on average.
    """
    folder, state = alone
    more = ["parallel.strategy=ddp", "parallel.context=2", *more]
    for each in ranks(size, jobs.rehearse, RECIPE, str(folder / "inputs"), str(tmp_path), more, 3, size == 2):
        assert each.keys() == state.keys()
        for name, tensor in each.items():
            error = (tensor - state[name]).abs()
            assert float((error - 1e-3 * state[name].abs()).max()) < 5e-5, name
            assert not name.startswith("student/model/") or float(error.mean()) < 1e-7, name
    if size == 2:
        assert (tmp_path / "out/bundle.json").is_file()
        for one, two in zip(jobs.stream(folder / "one"), jobs.stream(tmp_path), strict=True):
            # Matching starts at 0, where fake score and teacher are one: its angle is that of what rounding leaves.
            angles = {"dm_ca_cos": pytest.approx(one.get("dm_ca_cos", 0.0), abs=2e-3)} if "dm_ca_cos" in one else {}
            assert two == {name: pytest.approx(value, rel=5e-3, abs=1e-5) for name, value in one.items()} | angles


@pytest.fixture(scope="module")
def alone(jobs: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, jobs.rehearse(
        RECIPE, str(folder / "inputs"), str(folder / "one"), ["parallel.strategy=ddp"], 3, True
    )
