"""What a distillation will need, before any weights are there: parameters, memory, operations, GPU-hours and cost.

    python -m distill.run recipes/sdxl-amd-4step.yaml --dry-run
    python -m distill.run recipes/sdxl-amd-4step.yaml --dry-run --assume gpus=16,tflops=312,mfu=0.35,dollars=1.6

Everything is counted on torch's meta device from the configs of the teacher's diffusers folder, or from those that are
published under its hub id where the folder is not here. What is assumed stands in the table; what is not counted as
well. Memory is what tensors hold: allocators add a tenth or so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import DistillRecipe, RecipeError
from distill.costs import Cost, count, pass_cost
from distill.families.load import FAMILIES, options_for, with_grid
from distill.families.published import configs_of
from distill.objectives.gan import Head
from distill.parallel.context import check_sequence, check_tokens
from distill.reward_names import parse_reward, reads_latents

REWARD_PARAMETERS = {
    "hpsv2": 986_109_441,
    "hpsv2.1": 986_109_441,
    "pickscore": 986_109_441,
    "imagereward": 478_000_000,
    "clip": 427_616_513,
    "dinov2": 304_368_640,
    "videoalign": 2_208_563_200,
}
"""Of published weights: ViT-H/14 (HPSv2, PickScore), BLIP-large (ImageReward, rounded), ViT-L/14 (CLIP, DINOv2).

VideoAlign is Qwen2-VL-2B with embeddings of 151,660 tokens and a head of one number."""
_UNCOUNTED = (
    "segment_guidance",
    "consistency",
    "first_step_anchor",
    "reward_tilt",
    "reward_gradient",
    "policy_gradient",
    "foundation_gan",
)
_STATE = 16
"""Bytes per trained parameter in float32: weight, gradient and AdamW's two moments."""


@dataclass(frozen=True)
class Machine:
    """What is assumed. tflops: dense bfloat16 peak of one GPU, 989 for an H100 or H200 SXM; mfu: the share reached."""

    gpus: int = 8
    tflops: float = 989.0
    mfu: float = 0.35
    gib: float = 80.0
    dollars: float = 2.5

    @classmethod
    def parse(cls, text: str) -> Machine:
        """From ``gpus=8,mfu=0.4``. Raises RecipeError for an unknown name or a value that is no number."""
        known, given = [f.name for f in fields(cls)], dict[str, Any]()
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in known:
                raise RecipeError(f"--assume: {name!r} is unknown; use {', '.join(known)}, such as gpus=8,mfu=0.4")
            try:
                number = int(value) if name == "gpus" else float(value)
            except ValueError:
                raise RecipeError(f"--assume: {name} is {value!r}; give a number") from None
            if number <= 0:
                raise RecipeError(f"--assume: {name} is {value}; give a number above 0")
            given[name] = number
        return replace(cls(), **given)


@dataclass(frozen=True)
class Role:
    """A network of the run. trained: its parameters that an optimizer moves; weight: bytes per parameter at rest."""

    name: str
    parameters: int
    trained: int = 0
    weight: float = 4.0
    sharded: bool = False
    averaged: bool = False

    def at_rest(self, ranks: int) -> float:
        """Bytes on one rank of ``ranks`` that share shards, without gradients."""
        owned = self.parameters * self.weight + self.trained * (_STATE - 8 + 4 * self.averaged)
        return owned / ranks if self.sharded else owned

    def gradients(self, ranks: int) -> float:
        return 4.0 * self.trained / (ranks if self.sharded else 1)


@dataclass(frozen=True)
class Pass:
    """One kind of network call. often: how many there are per sample and iteration, on average.

    runs: how often each passes the blocks of a network of the run: forward, again, backward.
    """

    phase: str
    what: str
    operations: float
    often: float
    runs: int = 0


@dataclass(frozen=True)
class Plan:
    """A counted run. unit: parameters of the largest block.

    kept: bytes that a sample keeps for the backward pass of a trained network; saved: of one that computes no block
    again. brought: roles that hooks bring, beside the teacher's, the student's and the fake score's.
    sequence: tokens times width of a sample in a network whose ranks can share it, or 0.
    """

    recipe: DistillRecipe
    machine: Machine
    latents: tuple[int, ...]
    size: tuple[int, int]
    schedule: tuple[float, ...]
    roles: tuple[Role, ...]
    brought: tuple[Role, ...]
    passes: tuple[Pass, ...]
    kept: float
    saved: float
    blocks: int
    unit: int
    sequence: int
    missing: tuple[str, ...]

    @property
    def operations(self) -> float:
        """Per iteration, over all ranks."""
        return self.recipe.batch_size * sum(p.operations * p.often for p in self.passes)

    @property
    def gpu_hours(self) -> float:
        peak = self.machine.tflops * 1e12 * self.machine.mfu
        return self.operations * self.recipe.iterations / peak / 3600

    def shards(self) -> int:
        """Ranks that hold one copy together."""
        parallel = self.recipe.parallel
        return 1 if parallel.strategy == "ddp" else max(1, self.machine.gpus // parallel.replicas)

    @property
    def phases(self) -> tuple[str, ...]:
        """Roles that train, in the order of their phases."""
        return ("student", "fake", "discriminator") if self.recipe.gan else ("student", "fake")

    def graphs(self, phase: str) -> tuple[str, ...]:
        """The network of each pass whose graph lives at a phase's fullest moment.

        Student: its own, the regression's, and the features' until they have given the samples their gradient. Fake:
        its own and the features of samples and of real ones. The head reads those features again without a graph; R1
        has that of a pass and of its gradient, or of two passes, through which nothing goes where none is trained.
        """
        gan = self.recipe.gan
        if phase == "student":
            return ("student",) * (2 if self.recipe.regression else 1) + ((gan.source,) if gan else ())
        if phase == "fake":
            return ("fake",) * (3 if classifies(self.recipe) else 1)
        regular = gan and gan.r1 and (gan.r1_form == "exact" or gan.source == "fake")
        return (gan.source,) * 2 if gan and regular else ()

    def memory(self, role: str) -> dict[str, float]:
        """Bytes on one rank at the fullest moment of a role's phase, by what holds them."""
        r, n, roles = self.recipe, self.shards(), (*self.roles, *self.brought)
        graphs = self.graphs(role)
        trained = next(x for x in roles if x.name == role)
        # Under autocast each matrix is copied to bfloat16 for its pass, and the backward pass keeps the copies.
        copies = 2.0 if r.precision == "bfloat16" else 0.0
        one_by_one = graphs and (n > 1 or r.activation_checkpointing)
        held = self.unit if one_by_one else sum(x.parameters for x in roles if x.name in (role, *graphs))
        rows = r.batch_size // r.accumulate
        return {
            "at rest": sum(x.at_rest(n) for x in roles),
            "gradients": trained.gradients(n),
            "activations": rows * sum(self._held(network, role) for network in graphs) / r.parallel.context,
            "copies": copies * held + (4.0 * self.unit if n > 1 and graphs else 0.0),
        }

    def _held(self, network: str, phase: str) -> float:
        """Bytes of a sample's graph; a frozen network's and a second derivative's blocks are not computed again."""
        gan, adapters = self.recipe.gan, self.recipe.adapters
        derived = phase == "discriminator" and gan is not None and gan.r1_form == "exact"
        return self.saved if derived or (network == "teacher" and adapters is None) else self.kept

    def checkpoint(self) -> float:
        """Bytes of a checkpoint: what is trained, its moments and its average."""
        return sum(role.trained * (12.0 + 4.0 * role.averaged) for role in (*self.roles, *self.brought))


class _Decoder(nn.Module):
    def __init__(self, family: Any) -> None:
        super().__init__()
        self.family = family

    def forward(self, latents: Tensor) -> Tensor:
        return self.family.decode(latents)  # type: ignore[no-any-return]


class _TextEncoders(nn.Module):
    """length: of the prompts; CLIP reads no more of them than it has places for."""

    def __init__(self, encoders: Mapping[str, nn.Module], length: int) -> None:
        super().__init__()
        self.encoders, self.length = nn.ModuleDict(encoders), length

    def forward(self, rows: int) -> None:
        for encoder in self.encoders.values():
            config: Any = encoder.config
            length = min(self.length, getattr(config, "max_position_embeddings", self.length))
            encoder(input_ids=torch.zeros(rows, length, dtype=torch.long))


def plan(recipe: DistillRecipe, machine: Machine | None = None) -> Plan:
    """Count a recipe. Raises RecipeError where its teacher is neither here nor known."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # what it says of configs is said when weights are loaded
    try:
        name, configs = configs_of(recipe.teacher, recipe.family)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"teacher: {error}") from None
    family: Any
    network: Any
    try:
        with torch.device("meta"):
            family, network = FAMILIES[name].from_config(configs, **options_for(recipe, name))
            family.schedule = with_grid(family.schedule, recipe)
            x = torch.empty(1, *family.latent_shape())
            condition = family.blank(1)
            inputs = family.inputs(x, torch.empty(1), condition)
    except (ValueError, KeyError) as error:
        raise RecipeError(f"teacher: {recipe.teacher} does not make a {name} network ({error})") from error
    if recipe.parallel.context > 1:
        try:
            check_sequence(network, recipe.parallel.context)
            check_tokens(network, x, recipe.parallel.context)
        except ValueError as error:
            raise RecipeError(str(error)) from None
    network.train().requires_grad_(True)
    cost = pass_cost(network, inputs, blocks=family.wrap_plan(), train=True)
    wrapped = [m for m in network.modules() if isinstance(m, family.wrap_plan())]
    half = 0.5 if recipe.precision == "bfloat16" else 1.0
    with torch.device("meta"):
        adapted = _adapter_parameters(recipe, network, family.lora_targets())
        brought = tuple(_brought(recipe, family, network, x, condition))
    return Plan(
        recipe,
        machine or Machine(),
        tuple(family.latent_shape()),
        family.size,
        tuple(float(t) for t in family.schedule.grid(max(recipe.steps))),
        tuple(_roles(recipe, family, network, adapted)),
        brought,
        tuple(_passes(recipe, family, cost, x, condition)),
        half * (cost.checkpointed if recipe.activation_checkpointing else cost.saved),
        half * cost.saved,
        len(wrapped),
        max(count(m) for m in wrapped),
        _sequence(network, x),
        tuple(_missing(recipe, machine or Machine())),
    )


def _sequence(network: Any, x: Tensor) -> int:
    try:
        check_sequence(network, 1)
    except ValueError:
        return 0
    config = network.config
    tokens = x[0, 0].numel() // prod(config.patch_size)
    return int(tokens * config.num_attention_heads * config.attention_head_dim)


def _adapter_parameters(recipe: DistillRecipe, network: nn.Module, targets: tuple[str, ...]) -> int:
    """Of one LoRA: rank·(in + out) per matrix that it is put beside."""
    if recipe.adapters is None:
        return 0
    beside = [m for name, m in network.named_modules() if name.endswith(targets)]
    linear = sum(m.in_features + m.out_features for m in beside if isinstance(m, nn.Linear))
    convolution = sum(m.weight[0].numel() + m.out_channels for m in beside if isinstance(m, nn.Conv2d))
    return recipe.adapters.rank * (linear + convolution)


def _roles(recipe: DistillRecipe, family: Any, network: nn.Module, adapted: int) -> Iterator[Role]:
    whole, ema = count(network), recipe.ema > 0
    adapters = recipe.adapters
    shards = recipe.parallel.strategy != "ddp"
    yield Role("teacher", whole, 0, 2.0 if adapters and adapters.base == "bfloat16" else 4.0, shards)
    for name in ("student", "fake"):
        size = adapted if adapters and name in adapters.roles else whole
        yield Role(name, size, size, 4.0, shards, ema)
    for name, part in family.parts.items():
        yield Role(name, count(part), 0, float(next(part.parameters()).element_size()))
    for reward in [*([recipe.advantage.reward] if recipe.advantage else []), *recipe.heldout_rewards]:
        yield Role(f"reward {reward}", _reward_parameters(reward))


@torch.no_grad()
def _brought(recipe: DistillRecipe, family: Any, network: nn.Module, x: Tensor, condition: Any) -> Iterator[Role]:
    """Roles of hooks: a second teacher, cut as the first, and a head on features, whole on every rank."""
    if recipe.shared_teacher:
        yield Role("shared teacher", count(network), sharded=True)
    if recipe.gan:
        taps = (recipe.gan.tap,)
        features = family.predict(network, x, torch.zeros(1, dtype=torch.float64), condition, taps=taps).features
        head = count(Head(*features[recipe.gan.tap].shape[1:]))
        yield Role("discriminator", head, head, averaged=recipe.ema > 0)


def classifies(recipe: DistillRecipe) -> bool:
    """Whether the fake score's phase trains the network under the head, and leaves the head its features."""
    return recipe.gan is not None and recipe.gan.source == "fake" and recipe.gan.fake_weight > 0


def _reward_parameters(name: str) -> int:
    """Of a published reward by its kind, of another by the files in its folder (float16 on disk); 0 if unknown."""
    kind, source = parse_reward(name)
    if kind is not None:
        return REWARD_PARAMETERS[kind]
    return sum(path.stat().st_size for path in Path(source).glob("*.safetensors")) // 2


def _passes(
    recipe: DistillRecipe, family: Any, cost: Cost, x: Tensor, condition: Mapping[str, Tensor]
) -> Iterator[Pass]:
    """Network calls per sample and iteration; see the phases of distill.tasks.distillation."""
    r = recipe
    weights = r.step_weights or (1.0,) * len(r.steps)
    earlier = sum(w * (k - 1) / 2 for w, k in zip(weights, r.steps, strict=True)) / sum(weights)
    student = 1 / r.fake_per_student
    fake = 1.0 if r.ttur == "every" else 1 - student
    again = cost.forward if r.activation_checkpointing else 0.0
    train = cost.forward + cost.backward + again
    both = 3 if again else 2
    draws = 1.0 if r.reuse_rollout else student + fake
    each = r.parallel.context  # ranks that share a sequence all read its prompt and judge its pictures
    yield Pass("roll-out", "student, steps before k", cost.forward, draws * earlier, 1)
    yield Pass("roll-out", "student, step k without gradient", cost.forward, draws - student, 1)
    yield Pass("student", "student, forward and backward", train, student, both)
    yield Pass("student", "teacher, with and without prompt", cost.forward, student * (3 if r.decoupled else 2), 1)
    yield Pass("student", "fake score", cost.forward, student, 1)
    yield Pass("fake", "fake score, forward and backward", train, fake, both)
    if r.gan:
        yield Pass("student", "features for the GAN, to its input", train, student, both)
        if classifies(r):
            yield Pass("fake", "classification, real and fake", train, 2.0 * fake, both)
        else:
            yield Pass("discriminator", "features, real and fake", cost.forward, 2.0 * fake, 1)
        if r.gan.r1 and r.gan.r1_form == "exact":
            yield Pass("discriminator", "R1, forward and twice backward", train + cost.backward, fake, both + 1)
        elif r.gan.r1:
            yield Pass("discriminator", "R1, two passes", cost.forward, 2.0 * fake, 1)
    if r.regression:
        yield Pass("student", "regression, forward and backward", train, student, both)
    if r.advantage:
        last = draws / max(1.0, 2 * earlier + 1)
        scored = {"always": draws, "student": student, "reuse": student, "last-step": last}
        seen = not all(reads_latents(name) for name in (r.advantage.reward, *r.heldout_rewards))
        with torch.device("meta"):
            decode = pass_cost(_Decoder(family), {"latents": x}).forward if family.parts and seen else 0.0
        yield Pass("reward", "decoder", decode, each * scored[r.advantage.when] * r.advantage.share)
    encoders = {name: part for name, part in family.parts.items() if name.startswith("text_encoder")}
    if encoders:
        length = getattr(family, "max_tokens", condition["prompt_embeds"].shape[1])
        text = pass_cost(_TextEncoders(encoders, length), {"rows": 1}).forward
        yield Pass("prompts", "text encoders", text, each * draws / (r.advantage.group if r.advantage else 1))


def _missing(recipe: DistillRecipe, machine: Machine) -> Iterator[str]:
    """Inputs that are not on this machine, and terms that are not counted."""
    if not Path(recipe.teacher).is_dir():
        yield f"the weights of {recipe.teacher} are not in a folder here: counted from the published configs"
    if machine.gpus % recipe.parallel.context or recipe.accumulate * recipe.parallel.context % machine.gpus:
        shared = f" of which {recipe.parallel.context} share a sample" if recipe.parallel.context > 1 else ""
        yield (
            f"{recipe.accumulate} micro-batches do not divide among {machine.gpus} GPUs{shared}: "
            "change accumulate or gpus"
        )
    if recipe.regression:
        pairs, steps = recipe.regression.pairs, recipe.regression.steps
        calls = 2 * pairs * steps
        yield f"not counted: the teacher's {pairs:,} ODE pairs of {steps} steps, made once ({calls:,} calls)"
    if recipe.adapters:
        yield "adapters are counted with the gradients of all weights, of which they need few: an upper bound"
    for key in _UNCOUNTED:
        if getattr(recipe, key):
            yield f"not counted: {key}"
    for key in ("two_key", "coherence"):
        if getattr(recipe.safeguards, key) is not None:
            yield f"not counted: safeguards.{key}"
    if recipe.gan:
        yield "passes for the discriminator are counted whole, of which their graphs end at its tap: an upper bound"
    if recipe.regression and recipe.regression.features:
        yield "not counted: regression.features, which compares decoded pictures with a graph"
    yield "not counted: the reward's own passes, previews, probes; what decoding holds while it runs"


# --- the table -----------------------------------------------------------------------------------------------------


def table(plan: Plan) -> Iterator[str]:
    """The plan as lines for people."""
    r, m = plan.recipe, plan.machine
    shape = " × ".join(map(str, plan.latents))
    yield f"{r.name}: {plan.size[0]} × {plan.size[1]} pixels, latents {shape}"
    yield f"longest grid: {', '.join(f'{t:g}' for t in plan.schedule)}"
    micro = r.batch_size // r.accumulate
    yield f"batch {r.batch_size}: {r.accumulate} micro-batches of {micro} over all ranks, {r.iterations:,} iterations"
    yield ""
    yield f"{'role':<28}{'parameters':>16}{'trained':>16}{'GiB at rest':>14}"
    for role in (*plan.roles, *plan.brought):
        rest = _gib(role.at_rest(plan.shards()))
        known = f"{role.parameters:,}" if role.parameters else "?"
        yield f"{role.name:<28}{known:>16}{role.trained or '–':>16{',' if role.trained else ''}}{rest:>14.2f}"
    yield ""
    yield f"{'pass':<48}{'TFLOP':>10}{'per sample':>12}{'share':>8}"
    total = sum(p.operations * p.often for p in plan.passes) or 1.0
    for p in plan.passes:
        label = f"{p.phase}: {p.what}"
        share = p.operations * p.often / total
        yield f"{label:<48}{p.operations / 1e12:>10.3g}{p.often:>12.3g}{share:>8.1%}"
    yield f"{'per iteration':<48}{plan.operations / 1e12:>10,.4g}"
    yield ""
    shards, strategy = plan.shards(), r.parallel.strategy
    held = f"shards over {shards} ranks" if shards > 1 else "whole copies"
    if r.parallel.context > 1:
        held += f", {r.parallel.context} ranks share a sample"
    yield f"{strategy} on {m.gpus} GPUs: {held}; {plan.blocks} blocks, the largest of {plan.unit:,} parameters"
    yield f"{'GiB on one GPU':<28}{'at rest':>10}{'gradients':>11}{'activations':>13}{'copies':>9}{'sum':>9}"
    for phase in plan.phases:
        held_by = plan.memory(phase)
        cells = [_gib(value) for value in held_by.values()]
        fits = "" if sum(cells) < 0.9 * m.gib else f"   more than nine tenths of {m.gib:g} GiB"
        yield (
            f"{phase + ' phase':<28}"
            + "".join(
                f"{value:>{width}.1f}" for value, width in zip((*cells, sum(cells)), (10, 11, 13, 9, 9), strict=True)
            )
            + fits
        )
    saved = _gib(plan.checkpoint())
    yield f"a checkpoint has {saved:.1f} GiB, and takes {saved / m.gpus:.1f} GiB of each rank's host memory"
    yield ""
    hours = plan.gpu_hours
    seconds = hours * 3600 / m.gpus / r.iterations
    yield (
        f"at {m.tflops:g} TFLOP/s and {m.mfu:.0%} of it: {seconds:.3g} s per iteration, {hours:,.3g} GPU-hours, "
        f"{hours / m.gpus:,.3g} hours on {m.gpus} GPUs, ${hours * m.dollars:,.0f} at ${m.dollars:g} per GPU-hour"
    )
    yield "an estimate of arithmetic alone: loading, waiting and communication come on top"
    yield from plan.missing


def _gib(size: float) -> float:
    return size / 2**30
