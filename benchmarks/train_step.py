"""Seconds, memory and operations of training steps at full size, on random weights: DMD2 and AMD in one process.

    python -m benchmarks.train_step --family sdxl --layout lora --batch 4 8           # a GPU; benchmarks/results/
    python -m benchmarks.train_step --family wan --frames 17 --objective dmd2
    python -m benchmarks.train_step --family sdxl --shrink --json step.json           # a rehearsal on a CPU

The iterations are the trainer's own under the family's recipe: roll-out, decoding, reward, both phases, optimizers.
Both methods drive the same networks and optimizers in turn, at the same iterations and in an order that alternates; a
repeat is a whole period of student and fake updates. Phases are timed with the device idle at both ends, so that an
iteration is a little slower here than in a run. What a phase's role begins, such as its roll-out, counts to that phase.

Operations are those of the model: forward passes by the rows that went through each network and one backward pass,
without what activation checkpointing computes again, and without text encoders, decoder and reward. ``benchmarks.step``
compares more methods, and other projects', on bundles that a CPU can train.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.latency import processor
from benchmarks.step import median_interval, variant
from benchmarks.untrained import Untrained
from distill.config import DistillRecipe, RecipeError
from distill.costs import Cost, pass_cost
from distill.families.load import FAMILIES, options_for
from distill.families.published import configs_of
from distill.parallel.device import device, prepare
from distill.roles import inject
from distill.shrink import shrunk
from distill.tasks.distillation import DistillationTask
from distill.tasks.samples import PREVIEW_PROMPTS
from distill.trainer import Phase, Trainer

RECIPES = {
    "sdxl": "sdxl-amd-4step",
    "sd15": "sd15-amd-1step",
    "sd3": "sd3-medium-amd-4step",
    "flux": "flux-dev-amd-4step",
    "sit": "sit-xl-amd-1step",
    "wan": "wan-1.3b-amd-4step",
}
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
}
"""Dense bfloat16 TFLOP/s by what is in a GPU's name, from NVIDIA's data sheets; the first that fits counts."""
GIB = 2**30


@dataclass(frozen=True)
class Part:
    """One role's phase. seconds: median, least and greatest; tflop: on average; mfu: None where no peak is known."""

    seconds: tuple[float, float, float]
    peak_gib: float | None
    tflop: float
    mfu: float | None


@dataclass(frozen=True)
class Row:
    """One method at one batch. seconds: per iteration, averaged over a period of updates, as of a Part."""

    method: str
    batch: int
    seconds: tuple[float, float, float]
    ratio: float
    ratio_interval: tuple[float, float] | None
    phases: dict[str, Part]


class Steps:
    """A trainer's iterations with the seconds, memory and rows of each phase."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.rows: dict[str, dict[str, float]] = defaultdict(dict)
        self.peak: dict[str, float] = defaultdict(float)
        plan = trainer.task.phases
        setattr(trainer.task, "phases", lambda iteration: [self._watched(p) for p in plan(iteration)])  # noqa: B010

    def step(self, iteration: int) -> float:
        """One iteration; its seconds."""
        began = self._now()
        self.trainer.iteration = iteration
        self.trainer._step()
        return self._now() - began

    def forget(self) -> None:
        """What was measured so far was to warm up."""
        self.seconds.clear()
        self.peak.clear()

    def _watched(self, phase: Phase) -> Phase:
        began: list[float] = []
        rows: dict[str, float] = defaultdict(float)

        def loss(micro: int) -> Any:
            if not began:
                began.append(self._now())
                if self._gpu:
                    torch.cuda.reset_peak_memory_stats()
            found = phase.loss(micro)
            for name, value in found[1].items():
                if name.startswith("forwards/") and isinstance(value, float):
                    rows[name.removeprefix("forwards/")] += value
            return found

        def after() -> None:
            if phase.after is not None:
                phase.after()
            self.seconds[phase.role].append(self._now() - began[0])
            # How many steps come before the trained one is drawn; what is told is the mean.
            known = self.rows[phase.role]
            n = len(self.seconds[phase.role])
            for name in rows.keys() | known.keys():
                known[name] = known.get(name, 0.0) + (rows[name] - known.get(name, 0.0)) / n
            if self._gpu:
                self.peak[phase.role] = max(self.peak[phase.role], torch.cuda.max_memory_allocated() / GIB)

        return replace(phase, loss=loss, after=after)

    @property
    def _gpu(self) -> bool:
        return self.trainer.device.type == "cuda"

    def _now(self) -> float:
        if self._gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


def recipes(options: argparse.Namespace, batch: int, folder: Path) -> dict[str, DistillRecipe]:
    """The methods that are measured, by name, DMD2 first."""
    words = [
        f"name={options.family}-train-step", f"output={folder}/out", "parallel={strategy: ddp}", "telemetry={}",
        "accumulate=1", f"batch_size={batch}",
    ]  # fmt: skip
    words += [f"teacher={options.config}", f"family={options.family}"] if options.config else []
    words += [f"size=[{options.size[0]}, {options.size[1]}]"] if options.size else []
    words += [f"frames={options.frames}"] if options.frames else []
    if options.layout != "recipe":
        words.append("adapters={rank: 64, alpha: 8, base: bfloat16}" if options.layout == "lora" else "adapters=null")
    if options.family != "sit":
        (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PREVIEW_PROMPTS))
        words.append(f"data={{prompts: {folder}/prompts.txt}}")
    path = str(Path(__file__).parents[1] / "recipes" / f"{RECIPES[options.family]}.yaml")
    wanted = ["dmd2"] if options.objective == "dmd2" else ["dmd2", "amd"]
    found = {name: variant(path, name, [*words, *options.set]) for name in wanted}
    if options.shrink:
        small = {name: shrunk(recipe, folder / "inputs") for name, recipe in found.items()}
        return {n: r.model_copy(update={"accumulate": 1, "batch_size": batch}) for n, r in small.items()}
    return found


def contenders(
    found: dict[str, DistillRecipe], folder: Path, *, shrink: bool
) -> tuple[dict[str, Steps], dict[str, str]]:
    """One trainer per method on the same networks and optimizers, and rewards that others stand in for."""
    made = Untrained(folder)
    loaders: dict[str, Any] = {} if shrink else {"teacher": made.teacher, "judge": made.judge}
    richest = list(found)[-1]
    trainer = Trainer(DistillationTask(found[richest], **loaders), folder / "run", quiet=True)
    trainers = {richest: trainer}
    for name in [name for name in found if name != richest]:  # DMD2: the same roles without hooks and rewards
        plain = copy.copy(trainer)
        plain.task = copy.copy(trainer.task)
        bare: Any = plain.task
        plain.recipe = bare.recipe = found[name]
        bare.hooks, bare.reward, bare.heldout = [], None, []
        trainers[name] = plain
    return {name: Steps(trainers[name]) for name in found}, made.stand_ins


def pass_costs(recipe: DistillRecipe) -> tuple[Cost, float]:
    """(operations of one row of a trained role, of a forward pass of the teacher), counted without weights."""
    name, configs = configs_of(recipe.teacher, recipe.family)
    with torch.device("meta"):
        family, network = FAMILIES[name].from_config(configs, **options_for(recipe, name))
        inputs = family.inputs(torch.empty(1, *family.latent_shape()), torch.empty(1), family.blank(1))
    network.train().requires_grad_(recipe.adapters is None)
    plain = pass_cost(network, inputs).forward
    if recipe.adapters:
        a = recipe.adapters
        inject(network, ["student"], rank=a.rank, alpha=a.alpha, targets=family.lora_targets(), seed=0)
    return pass_cost(network, inputs, train=True), plain


def measure(steps: dict[str, Steps], repeats: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds per iteration of whole periods, ``repeats`` times after one to warm up, by method."""
    names, recipe = list(steps), next(iter(steps.values())).trainer.recipe
    period, first = recipe.fake_per_student, recipe.fake_warmup
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        spent = dict.fromkeys(names, 0.0)
        for i in range(repeat * period, (repeat + 1) * period):
            for name in names if i % 2 == 0 else reversed(names):
                spent[name] += steps[name].step(first + i) / period
        for name in names:
            if repeat == 0:
                steps[name].forget()
            else:
                seconds[name].append(spent[name])
        say(f"repeat {repeat} of {repeats}")
    return seconds


def rows_of(steps: dict[str, Steps], seconds: dict[str, list[float]], batch: int, peak: float | None) -> list[Row]:
    """One row per method; ratios are over the first."""
    base, found = np.array(next(iter(seconds.values()))), []
    for name, some in steps.items():
        cost, plain = pass_costs(some.trainer.recipe)
        parts = {}
        for role, each in some.seconds.items():
            rows = some.rows[role]
            forward = plain * rows.get("teacher", 0.0) + cost.forward * (
                rows.get("student", 0.0) + rows.get("fake", 0.0)
            )
            operations = forward + cost.backward * batch
            mfu = None if peak is None else round(operations / float(np.mean(each)) / (peak * 1e12), 4)
            memory = round(some.peak[role], 2) if role in some.peak else None
            parts[role] = Part(spread(each), memory, round(operations / 1e12, 6), mfu)
        ratio = np.array(seconds[name]) / base
        found.append(
            Row(name, batch, spread(seconds[name]), round(float(np.median(ratio)), 4), median_interval(ratio), parts)
        )
    return found


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest."""
    return (round(float(np.median(values)), 6), round(min(values), 6), round(max(values), 6))


def peak_of(place: torch.device) -> tuple[str, float | None]:
    """The device's name and its bfloat16 peak in TFLOP/s, None where it is not known."""
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else processor()
    known = next((tflops for word, tflops in PEAKS.items() if place.type == "cuda" and word in name), None)
    return name, known


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The entry of the result file: a row per method and batch, or why there is none."""
    prepare(device())
    name, peak = peak_of(device())
    rows: list[dict[str, Any]] = []
    recipe: DistillRecipe | None = None
    stand_ins: dict[str, str] = {}
    for batch in options.batch:
        with tempfile.TemporaryDirectory(prefix="leapfrog-train-step-") as scratch:
            found = recipes(options, batch, Path(scratch))
            recipe = found[list(found)[-1]]
            rows += _at(batch, found, Path(scratch), options, peak, stand_ins)
    assert recipe is not None
    return {
        "device": name,
        "peak_tflops": "unknown" if peak is None else peak,
        "shrunk": options.shrink,
        "layout": "lora" if recipe.adapters else "full",
        "precision": recipe.precision,
        "size": recipe.size,
        "frames": recipe.frames,
        "activation_checkpointing": recipe.activation_checkpointing,
        "repeats": options.repeats,
        "stand_ins": stand_ins,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "rows": rows,
    }


def _at(
    batch: int,
    found: dict[str, DistillRecipe],
    folder: Path,
    options: argparse.Namespace,
    peak: float | None,
    stand_ins: dict[str, str],
) -> list[dict[str, Any]]:
    """The rows of one batch; one that says so where the GPU's memory does not suffice."""
    gc.collect()  # the last batch's networks
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        steps, others = contenders(found, folder, shrink=options.shrink)
        stand_ins |= others
        say = partial(print, f"\r{options.family}, batch {batch}:", end=" ", file=sys.stderr, flush=True)
        return [asdict(row) for row in rows_of(steps, measure(steps, options.repeats, say), batch, peak)]
    except torch.OutOfMemoryError:
        return [{"method": "/".join(found), "batch": batch, "error": out_of_memory(batch)}]


def out_of_memory(batch: int) -> str:
    """What a run that did not fit had reached."""
    held = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
    return f"out of memory at batch {batch}: {held:.1f} GiB"


def print_rows(entry: dict[str, Any]) -> None:
    """The entry as a table for people."""
    print(f"\n{entry['device']}, {entry['layout']}, {entry['precision']}")
    for row in entry["rows"]:
        if "error" in row:
            print(f"{row['method']:10} {row['error']}")
            continue
        middle, low, high = row["seconds"]
        print(
            f"{row['method']:10} batch {row['batch']}: {middle:.3f} s ({low:.3f}–{high:.3f}), ratio {row['ratio']:.3f}"
        )
        for role, part in row["phases"].items():
            memory = "–" if part["peak_gib"] is None else f"{part['peak_gib']:.1f} GiB"
            share = "unknown" if part["mfu"] is None else f"{part['mfu']:.1%}"
            print(f"  {role:8} {part['seconds'][0]:.3f} s, {memory}, {part['tflop']:.3g} TFLOP, MFU {share}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description="Training steps of published architectures with random weights: seconds, memory, operations.",
        epilog="example: python -m benchmarks.train_step --family sdxl --layout lora --batch 4 8",
    )
    parser.add_argument("--family", choices=RECIPES, required=True, help="whose recipe and architecture")
    parser.add_argument("--config", help="a diffusers folder or a published name; default: the recipe's teacher")
    parser.add_argument("--layout", choices=("recipe", "full", "lora"), default="recipe", help="default: %(default)s")
    parser.add_argument("--objective", choices=("dmd2", "amd"), default="amd", help="amd measures DMD2 beside it")
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="samples per step; default: %(default)s")
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="pixels; default: the recipe's")
    parser.add_argument("--frames", type=int, help="of a video; default: the recipe's")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--repeats", type=int, default=7, help="periods of updates; default: %(default)s")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--shrink", action="store_true", help="tiny networks: a rehearsal")
    parser.add_argument("--json", type=Path, help="where to write; default: benchmarks/results, and only from a GPU")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = (given := parser()).parse_args(arguments)
    if options.device:
        os.environ["LEAPFROG_DEVICE"] = options.device
    try:
        entry = run(options)
    except (RecipeError, ValueError) as error:
        given.error(str(error))
    print_rows(entry)
    out = options.json
    if out is None and device().type == "cuda" and not options.shrink:
        out = Path(__file__).parent / "results" / "train_step.json"
    if out is None:
        print("nothing is kept: results are written from a GPU at full size, or with --json PATH")
        return 0
    known = json.loads(out.read_text()) if out.is_file() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    key = f"{options.family}, {entry['layout']}, {entry['device']}"
    out.write_text(json.dumps(known | {key: entry}, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
