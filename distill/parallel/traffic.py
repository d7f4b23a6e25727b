"""What ranks hold and say to each other in a distillation, by arithmetic: where a number of GPUs stops to pay.

    python -m distill.parallel.traffic recipes/sdxl-amd-4step.yaml --gpus 8 64 512

Per micro-batch a sharded network of P parameters is gathered once for every forward pass and once more for a backward
pass (2 bytes per parameter under bfloat16), and its gradients are scattered in sums (4 bytes). A ring of n ranks takes

    t = (n − 1)·latency + (n − 1)/n·bytes / NVLink        on one machine, and besides, through all its adapters at once,
    t = (n − m)/n·bytes / (m·network)                     into a machine of m GPUs.

Copies sum their gradients, or their shards of them, once per step: 2·(n − 1)/n·4P bytes. Ranks that share a sample of S
tokens of width D exchange in each block and pass queries and keys (4 bytes each), values and results (2 in bfloat16):

    (N − 1)/N · (4 + 4 + 2 + 2) · S·D/N bytes per rank.

Bandwidths and latency are
assumptions that can be changed; nothing here was measured. Memory and operations are those of a dry run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from distill.config import DistillRecipe, RecipeError, load_recipe
from distill.dryrun import Machine, Plan, classifies, plan


@dataclass(frozen=True)
class Links:
    """GB/s of one GPU's NVLink and of its network adapter in one direction, seconds per hop, GPUs of a machine."""

    nvlink: float = 450.0
    network: float = 50.0
    latency: float = 5e-6
    machine: int = 8

    def ring(self, size: float, ranks: int) -> float:
        """Seconds of an all-gather or reduce-scatter of ``size`` bytes over consecutive ranks."""
        if ranks == 1:
            return 0.0
        within = (ranks - 1) / ranks * size / (self.nvlink * 1e9)
        inside = min(ranks, self.machine)
        across = (ranks - inside) / ranks * size / (inside * self.network * 1e9)
        return (ranks - 1) * self.latency + max(within, across)

    def apart(self, size: float, machines: int) -> float:
        """Seconds of an all-reduce of ``size`` bytes between ranks of different machines, each with its adapter."""
        if machines == 1:
            return 0.0
        return 2 * (machines - 1) * (self.latency + size / machines / (self.network * 1e9))


@dataclass(frozen=True)
class Load:
    """What one rank does per iteration of ``micros`` micro-batches: bytes, seconds of talking and of computing.

    exchanged: with the ranks that share its samples.
    """

    micros: int
    memory: float
    gathered: float
    reduced: float
    exchanged: float
    talking: float
    computing: float


def passes(recipe: DistillRecipe) -> tuple[float, float]:
    """(Gathers, reductions) of a network per micro-batch, averaged over the ratio of updates.

    gathers = d·E[k − 1] + (d − s) + s·(2 + 1 + 1) + 2·f with s = 1/fake_per_student, f the share of iterations that
    train the fake score, d roll-outs; a student's update runs itself forward and backward, teacher and fake score once.
    A GAN adds features to the student's update, and to the fake score's two passes, of real and of fake samples.
    """
    weights = recipe.step_weights or (1.0,) * len(recipe.steps)
    earlier = sum(w * (k - 1) / 2 for w, k in zip(weights, recipe.steps, strict=True)) / sum(weights)
    student = 1 / recipe.fake_per_student
    fake = 1.0 if recipe.ttur == "every" else 1 - student
    draws = 1.0 if recipe.reuse_rollout else student + fake
    gathers = draws * earlier + (draws - student) + 4 * student + 2 * fake
    if recipe.gan:
        gathers += 2 * student + (4 if classifies(recipe) else 2) * fake + (2 * fake if recipe.gan.r1 else 0)
    return gathers, student + fake


def load(counted: Plan, gpus: int, strategy: str, links: Links) -> Load:
    """One rank's part under a strategy; hsdp has a copy per machine. Collectives are counted block by block.

    A rank, or a group of them that share samples, has one micro-batch at least: with more than ``accumulate`` of them
    the batch has to grow.
    """
    machines = max(1, gpus // links.machine)
    replicas = {"ddp": 1, "fsdp": 1, "hsdp": machines}[strategy]
    recipe = counted.recipe.model_copy(
        update={"parallel": counted.recipe.parallel.model_copy(update={"strategy": strategy, "replicas": replicas})}
    )
    sharded = strategy != "ddp"
    roles = tuple(replace(r, sharded=sharded and r.name in ("teacher", "student", "fake")) for r in counted.roles)
    there = replace(counted, recipe=recipe, roles=roles, machine=replace(counted.machine, gpus=gpus))
    context = recipe.parallel.context
    ranks, micros = there.shards(), -(-recipe.accumulate * context // gpus)
    gathers, reduces = passes(recipe)
    network = max(role.parameters for role in roles if role.name in ("teacher", "student", "fake"))
    trained = sum(role.trained for role in roles) / 2
    width = 2 if recipe.precision == "bfloat16" else 4
    blocks = counted.blocks + 1
    gathered, reduced = (micros * gathers * width * network, micros * reduces * 4 * trained) if sharded else (0.0, 0.0)
    seconds = 0.0
    if sharded:
        seconds += micros * gathers * blocks * links.ring(width * network / blocks, ranks)
        seconds += micros * reduces * blocks * links.ring(4 * trained / blocks, ranks)
        seconds += reduces * links.apart(4 * trained / ranks, replicas)
    else:
        reduced = reduces * 4 * trained
        seconds += reduces * 2 * links.ring(4 * trained, gpus)
    exchanged, waiting = exchanges(counted, micros, links)
    peak = counted.machine.tflops * 1e12 * counted.machine.mfu
    memory = max(sum(there.memory(role).values()) for role in ("student", "fake"))
    computing = micros * counted.operations / recipe.accumulate / context / peak
    return Load(micros, memory, gathered, reduced, exchanged, seconds + waiting, computing)


def exchanges(counted: Plan, micros: int, links: Links) -> tuple[float, float]:
    """(Bytes, seconds) in which one of N ranks exchanges heads and tokens of ``micros`` micro-batches with the rest."""
    recipe = counted.recipe
    ranks = recipe.parallel.context
    if ranks == 1:
        return 0.0, 0.0
    blocks = micros * counted.blocks * sum(p.often * p.runs for p in counted.passes)
    samples = recipe.batch_size // recipe.accumulate
    values = 2 if recipe.precision == "bfloat16" else 4
    size = (ranks - 1) / ranks * 4 * values * samples * counted.sequence / ranks
    speed = (links.nvlink if ranks <= links.machine else links.network) * 1e9
    return blocks * size, blocks * (4 * (ranks - 1) * links.latency + size / speed)


def table(recipe: DistillRecipe, gpus: list[int], links: Links, machine: Machine) -> Iterator[str]:
    """Rows of a Markdown table: strategies × numbers of GPUs."""
    counted = plan(recipe, machine)
    yield (
        "| GPUs | strategy | batch | GiB per GPU | GB gathered | GB reduced | GB exchanged | s talking | s computing |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for number in gpus:
        for strategy in ("ddp", "fsdp", "hsdp"):
            one = load(counted, number, strategy, links)
            groups = number // recipe.parallel.context
            batch = one.micros * groups * recipe.batch_size // recipe.accumulate
            full = "" if one.memory < 0.9 * machine.gib * 2**30 else " (too much)"
            yield (
                f"| {number} | {strategy} | {batch} | {one.memory / 2**30:.1f}{full} | {one.gathered / 1e9:.1f} | "
                f"{one.reduced / 1e9:.1f} | {one.exchanged / 1e9:.1f} | {one.talking:.2f} | {one.computing:.2f} |"
            )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.parallel.traffic",
        description="Memory, traffic and time of a distillation on numbers of GPUs, by arithmetic.",
        epilog="example: python -m distill.parallel.traffic recipes/sdxl-amd-4step.yaml --gpus 8 64 512",
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--assume", default="", metavar="KEY=VALUE,…", help="as of distill.run --dry-run")
    parser.add_argument("--nvlink", type=float, default=Links.nvlink, help="GB/s per GPU and direction")
    parser.add_argument("--network", type=float, default=Links.network, help="GB/s per GPU and direction")
    parser.add_argument("--latency", type=float, default=Links.latency, help="seconds per hop")
    options = parser.parse_intermixed_args(arguments)
    links = Links(options.nvlink, options.network, options.latency)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if recipe.task != "distill":
            raise RecipeError(f"{options.recipe} has task {recipe.task}; give a recipe of a distillation")
        for line in table(recipe, options.gpus, links, Machine.parse(options.assume)):
            print(line)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
