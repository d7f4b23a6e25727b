"""What one training iteration costs: methods side by side on one recipe's networks, batch and machine.

    python -m benchmarks.step                                            # AMD over DMD2 on digits and scenes
    python -m benchmarks.step recipes/digits-amd.yaml --methods dmd2 dsa rls amd "amd advantage.when=student"
    python -m benchmarks.step recipes/scenes-amd.yaml --set batch_size=8 --against dmd2=../DMD2

A method is a row of ``python -m distill.objectives``: the recipe with its own values for that method's sections and
without those of others. Words after it override keys. Everything of an iteration counts: roll-out, both phases,
decoding, reward, optimizers and averaged weights. ``--against`` times another project's DMD2 beside ours in its plan.

Contenders take turns iteration by iteration, in an order that rotates, all at the same number of the iteration and so
with the same step of the same grid. A repeat is a whole period of student and fake updates; ratios are of the sums of
one repeat over the first contender's, and their interval is that of the median (order statistics, no assumption on the
distribution). On a machine that does other work only the ratios, and best those of processor time, are to be trusted.
A recipe's entry in the result file is replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import comb, lcm
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import peers
from benchmarks.latency import processor
from benchmarks.peers import Contender
from distill.bundle import Bundle, BundleError
from distill.config import DistillRecipe, RecipeError, load_recipe
from distill.objectives.methods import HOOKS, METHODS
from distill.tasks.distillation import DistillationTask
from distill.trainer import Phase, Trainer

RECIPES = ("recipes/digits-amd.yaml", "recipes/scenes-amd.yaml")
BAR = 1.15
"""What an iteration may cost over the first contender's, AMD's over DMD2's."""
_REQUIRED = {key for key, field in DistillRecipe.model_fields.items() if field.is_required()}
_METHOD_KEYS = {*HOOKS, "advantage", "safeguards", "heldout_rewards", "discriminator"}


@dataclass(frozen=True)
class Row:
    """One contender. Seconds are per iteration; ratios are over the first contender's, intervals at least 95 %."""

    method: str
    seconds: float
    cpu_seconds: float
    ratio: float
    ratio_interval: tuple[float, float] | None
    cpu_ratio: float
    cpu_ratio_interval: tuple[float, float] | None
    phases: dict[str, float]
    """Mean seconds of processor time per iteration; decoding and reward are not in the phase that asks for them."""

    @property
    def bar(self) -> dict[str, Any]:
        """Whether the ratio of processor time, and each end of its interval, lies below the bar."""
        low, high = self.cpu_ratio_interval or (None, None)
        values = {"low": low, "middle": self.cpu_ratio, "high": high}
        below = {name: None if value is None else value < BAR for name, value in values.items()}
        known = set(below.values())
        verdict = "pass" if known == {True} else "fail" if known == {False} else "undecided"
        return {"bar": BAR, "below": below, "verdict": verdict}


class Clock:
    """Attributes processor time to the innermost part that is running."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._parts, self._since = ["rest"], time.process_time()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._parts.append(name)
        try:
            yield
        finally:
            self._turn()
            self._parts.pop()

    def phase(self, name: str) -> None:
        """From here on, what is in no part is ``name``'s."""
        self._turn()
        self._parts[0] = name

    def _turn(self) -> None:
        now = time.process_time()
        self.spent[self._parts[-1]] += now - self._since
        self._since = now

    def timed(self, owner: Any, method: str, name: str) -> None:
        """Time a method of an object as a part."""
        call = getattr(owner, method)

        def wrapped(*values: Any, **named: Any) -> Any:
            with self.part(name):
                return call(*values, **named)

        setattr(owner, method, wrapped)


class Ours:
    """A recipe under the trainer."""

    def __init__(self, recipe: DistillRecipe, folder: Path) -> None:
        self.period, self.first = recipe.fake_per_student, recipe.fake_warmup
        self._clock = Clock()
        task = DistillationTask(recipe)
        for decoding in (task, task.family):
            self._clock.timed(decoding, "decode", "decode")
        for judge in (task.reward, *task.heldout):
            for method in ("score", "score_pixels", "score_latents"):
                if hasattr(judge, method):
                    self._clock.timed(judge, method, "reward")
        plan = task.phases
        self._clock.timed(task, "phases", "rest")
        setattr(task, "phases", lambda iteration: [self._marked(phase) for phase in plan(iteration)])  # noqa: B010
        self.trainer = Trainer(task, folder, quiet=True)

    @property
    def spent(self) -> dict[str, float]:
        return self._clock.spent

    def step(self, iteration: int) -> None:
        self.trainer.iteration = self.first + iteration
        self._clock.phase("rest")
        self.trainer._step()
        self._clock.phase("rest")

    def _marked(self, phase: Phase) -> Phase:
        def loss(micro: int) -> Any:
            self._clock.phase(phase.role)
            return phase.loss(micro)

        return replace(phase, loss=loss)


def variant(path: str, words: str, given: Sequence[str] = ()) -> DistillRecipe:
    """The recipe as another method: its values where it has the method's sections, overrides last."""
    name, *overrides = words.split()
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; use one of {', '.join(METHODS)}")
    method, own = METHODS[name], load_recipe(path)
    if not isinstance(own, DistillRecipe):
        raise ValueError(f"{path} is a recipe of task {own.task}; give one of task distill")
    if method.reward and own.advantage is None:
        raise ValueError(f"{path} has no advantage.reward, which {name} needs; use a recipe such as digits-amd")
    plain = DistillRecipe.model_validate(own.model_dump(include=_REQUIRED)).model_dump(mode="json")
    there = own.model_dump(mode="json")
    settings = {key: plain[key] for key in _METHOD_KEYS} | method.sections
    for key in _METHOD_KEYS & {*method.sections, *(["advantage"] if method.reward else [])}:
        if there[key] != plain[key]:
            settings[key] = there[key]
    changes = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    recipe: DistillRecipe = load_recipe(path, [*changes, *given, *overrides])
    return recipe


def measure(contenders: Mapping[str, Contender], repeats: int, say: Callable[[str], None] = print) -> list[Row]:
    """Run whole periods of all contenders in turn, ``repeats`` times after one to warm up."""
    labels = list(contenders)
    period = lcm(*(contender.period for contender in contenders.values()))
    wall, busy = (np.zeros((len(labels), repeats)) for _ in range(2))
    for repeat in range(-1, repeats):
        if repeat == 0:
            for contender in contenders.values():
                contender.spent.clear()
        for i in range(period):
            iteration = (repeat + 1) * period + i
            turn = iteration % len(labels)
            for which in (*range(turn, len(labels)), *range(turn)):
                start, start_busy = time.perf_counter(), time.process_time()
                contenders[labels[which]].step(iteration)
                if repeat >= 0:
                    busy[which, repeat] += (time.process_time() - start_busy) / period
                    wall[which, repeat] += (time.perf_counter() - start) / period
        say(f"repeat {repeat + 1} of {repeats}")
    rows = []
    for which, label in enumerate(labels):
        ratio, cpu_ratio = (values[which] / values[0] for values in (wall, busy))
        phases = {
            name: round(seconds / (period * repeats), 6)
            for name, seconds in sorted(contenders[label].spent.items())
            if name != "rest"
        }
        rows.append(
            Row(
                label,
                round(float(np.median(wall[which])), 6),
                round(float(np.median(busy[which])), 6),
                round(float(np.median(ratio)), 4),
                median_interval(ratio),
                round(float(np.median(cpu_ratio)), 4),
                median_interval(cpu_ratio),
                phases,
            )
        )
    return rows


def median_interval(values: Any, level: float = 0.95) -> tuple[float, float] | None:
    """The order statistics x_(k), x_(n+1−k) between which the median lies with at least ``level``; None for n < 6.

    P(x_(k) ≤ median ≤ x_(n+1−k)) = 1 − 2·P(Binomial(n, ½) < k), for any continuous distribution.
    """
    x, n = np.sort(np.asarray(values, dtype=np.float64)), len(values)
    k, below = 0, 0.0
    while below + comb(n, k) / 2**n <= (1 - level) / 2:
        below += comb(n, k) / 2**n
        k += 1
    return None if k == 0 else (round(float(x[k - 1]), 4), round(float(x[n - k]), 4))


def run(
    path: str, methods: Sequence[str], against: Sequence[peers.Checkout], overrides: Sequence[str], repeats: int
) -> dict[str, Any]:
    """The entry of a recipe in the result file."""
    load, recipes = os.getloadavg()[0], {words: variant(path, words, overrides) for words in methods}
    first = recipes[methods[0]]
    family = Bundle.open(first.teacher).manifest.family
    plans = {peer.name: (peer, peer.plan(first, family)) for peer in against}
    say = partial(print, end=" ", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="leapfrog-step-") as folder:
        contenders: dict[str, Contender] = {
            words: Ours(recipe, Path(folder) / words) for words, recipe in recipes.items()
        }
        rows = measure(contenders, repeats, partial(say, f"\r{first.name}:"))
        print_rows(rows)
        print_bar(rows)
        beside = {}
        for name, (peer, plan) in plans.items():
            ours = variant(path, "dmd2", [*overrides, *plan])
            pair: dict[str, Contender] = {
                "ours": Ours(ours, Path(folder) / name),
                f"{name}'s": peer.open(ours, Path(folder)),
            }
            found = measure(pair, repeats, partial(say, f"\r{first.name} beside {name}:"))
            print_rows(found)
            beside[name] = {"commit": peer.commit, "plan": plan, "rows": [asdict(row) for row in found]}
    return {
        "methods": {words: recipe.model_dump(mode="json", exclude_defaults=True) for words, recipe in recipes.items()},
        "batch": first.batch_size,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average_before": round(load, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": [asdict(row) | {"bar": row.bar} for row in rows],
        "against": beside,
    }


def print_rows(rows: Sequence[Row]) -> None:
    width = max(len(row.method) for row in rows)
    names = sorted({name for row in rows for name in row.phases})
    phases = "".join(f"{name:>10}" for name in names)
    print(f"\n{'':{width}}  ms/iteration  of cpu   ratio {'interval':13}  of cpu {'interval':13}{phases}")
    for row in rows:
        spans = (
            "–" if span is None else f"{span[0]:.3f}–{span[1]:.3f}"
            for span in (row.ratio_interval, row.cpu_ratio_interval)
        )
        wall, cpu = (f"{span:13}" for span in spans)
        parts = "".join(f"{1e3 * row.phases[n]:10.1f}" if n in row.phases else f"{'–':>10}" for n in names)
        print(
            f"{row.method:{width}}{1e3 * row.seconds:14.1f}{1e3 * row.cpu_seconds:8.1f}"
            f"{row.ratio:8.3f} {wall}{row.cpu_ratio:8.3f} {cpu}{parts}"
        )


def print_bar(rows: Sequence[Row]) -> None:
    """Per contender after the first: the verdict, and which of low end, middle and high end lie below the bar."""
    words = {True: "below", False: "not below", None: "unknown"}
    for row in rows[1:]:
        found = row.bar
        told = ", ".join(f"{name} {words[below]}" for name, below in found["below"].items())
        print(f"{row.method}: {found['verdict']} at {BAR} of {rows[0].method}'s processor time ({told})")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="Seconds per training iteration of methods on one recipe, side by side in one run.",
        epilog='example: python -m benchmarks.step recipes/digits-amd.yaml --methods dmd2 amd --set "steps=[4]"',
    )
    parser.add_argument("recipes", nargs="*", default=list(RECIPES), help="default: %(default)s")
    parser.add_argument(
        "--methods", nargs="+", default=["dmd2", "amd"], metavar="NAME [KEY=VALUE …]", help="the first is the reference"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for every method")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=f"a checkout of {' or '.join(peers.PEERS)}, whose DMD2 is timed on the same networks in the same turns",
    )
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=11, help="periods; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    try:
        against = peers.checkouts(options.against)
        for path in options.recipes:
            entry = run(path, options.methods, against, options.set, options.repeats)
            known = json.loads(options.out.read_text()) if options.out.is_file() else {}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(known | {Path(path).stem: entry}, indent=1, ensure_ascii=False) + "\n")
    except (RecipeError, BundleError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    main()
