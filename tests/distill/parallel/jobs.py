"""What ranks are told to do: a distillation of tiny digits, whole or in parts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import distill.parallel.checkpoint
from distill.config import load_recipe
from distill.parallel.shard import full, local
from distill.shrink import shrunk
from distill.tasks.distillation import DistillationTask
from distill.trainer import Phase, Trainer, TrainingError

ROOT = Path(__file__).parents[3]


def trainer(models: str, folder: str, overrides: list[str]) -> Trainer:
    small = [
        f"teacher={models}/digits-teacher", f"advantage.reward={models}/digits-reward", f"output={folder}/out",
        "iterations=3", "batch_size=16", "accumulate=4", "fake_warmup=1", "fake_per_student=2", "steps=[2]",
        "log_every=1", "preview_every=100", "save_every=100", "telemetry.every=null", "telemetry.prompts=2",
        "telemetry.teacher_steps=2",
    ]  # fmt: skip
    recipe = load_recipe(ROOT / "recipes/digits-amd.yaml", small + overrides)
    return Trainer(DistillationTask(recipe), Path(folder), quiet=True)


def distil(models: str, folder: str, overrides: list[str], until: int | None = None) -> dict[str, Tensor]:
    """Train from the newest checkpoint, if there is one, to the end or an iteration, and save; the whole state."""
    with one_thread():
        return _distil(trainer(models, folder, overrides), until)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As ranks have: sums by several threads have another last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rehearse(
    name: str, inputs: str, folder: str, overrides: list[str], iterations: int = 2, to_the_end: bool = False
) -> dict[str, Tensor]:
    """Some iterations of a production recipe on tiny networks of its classes, in float32; the whole state.

    to_the_end: as a run of its own, with logs, previews and a bundle.
    """
    recipe = load_recipe(
        ROOT / f"recipes/{name}.yaml", ["precision=float32", "fake_per_student=1", "fake_warmup=0", *overrides]
    )
    recipe = shrunk(recipe, Path(inputs)).model_copy(
        update={"iterations": iterations, "log_every": 1, "output": f"{folder}/out"}
    )
    made = Trainer(DistillationTask(recipe), Path(folder), quiet=True)
    return _distil(made, None if to_the_end else iterations)


def _distil(made: Trainer, until: int | None) -> dict[str, Tensor]:
    if list((made.folder / "checkpoints").glob("step-*")):
        made.resume()
    if until is None:
        made.run()
    else:
        while made.iteration < until:
            made._step()
            made.iteration += 1
        made.save()
    return _state(made)


def _state(made: Trainer) -> dict[str, Tensor]:
    return {name: full(tensor).clone() for name, tensor in made._tensors().items()}


def stopped(models: str, folder: str, overrides: list[str], iterations: int) -> int:
    """A run that the last rank's SIGTERM ends after some iterations, from the newest checkpoint; where it stopped."""
    made = trainer(models, folder, overrides)

    def last(iteration: int) -> None:
        if iteration == iterations - 1 and made.world.rank == made.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    watch(made, last)
    with one_thread():
        _distil(made, None)
    return made.iteration


def watch(made: Trainer, look: Callable[[int], None]) -> None:
    """Call ``look`` as each iteration begins."""
    phases = made.task.phases

    def looking(iteration: int) -> list[Phase]:
        look(iteration)
        return phases(iteration)

    made.task.phases = looking


def parts(models: str, folder: str, overrides: list[str]) -> list[dict[str, tuple[bool, int, int]]]:
    """Of a trained and of a resumed state: whether each tensor is in shards, its elements here, and its elements."""
    made = trainer(models, folder, overrides)
    _distil(made, 2)
    again = trainer(models, folder, overrides)
    again.resume()
    return [
        {name: (isinstance(t, DTensor), local(t).numel(), t.numel()) for name, t in each._tensors().items()}
        for each in (made, again)
    ]


def resumed(models: str, folder: str, overrides: list[str]) -> tuple[int, list[str]]:
    """At which iteration a run goes on, and what it says of checkpoints."""
    said: list[str] = []
    distill.parallel.checkpoint.log.addFilter(lambda record: not said.append(record.getMessage()))
    return trainer(models, folder, overrides).resume(), said


def trainable(models: str, folder: str, overrides: list[str]) -> list[dict[str, bool]]:
    """What of all networks wants gradients: before training, and every other answer at any pass of three iterations."""
    made = trainer(models, folder, overrides)
    networks = made.task.networks()

    def now() -> dict[str, bool]:
        return {f"{i}/{name}": p.requires_grad for i, n in enumerate(networks) for name, p in n.named_parameters()}

    seen = [now()]

    def look(*_: object) -> None:
        if (found := now()) not in seen:
            seen.append(found)

    for network in networks:
        network.register_forward_pre_hook(look, prepend=True)
    _distil(made, 3)
    look()
    return seen


def first_state(models: str, folder: str, overrides: list[str]) -> dict[str, Tensor]:
    """The whole state that the first iteration of a run meets."""
    made, met = trainer(models, folder, overrides), dict[str, Tensor]()
    watch(made, lambda _: met.update(met or _state(made)))
    made.run()
    return met


def killed(models: str, folder: str, overrides: list[str], moment: str) -> None:
    """A run that is killed in its last iteration, or while it saves that one."""
    made = trainer(models, folder, overrides)
    phases, finish = made.task.phases, distill.parallel.checkpoint._finish

    def dying(iteration: int) -> list[Phase]:
        if iteration == made.recipe.iterations - 1 and moment == "step":
            found = phases(iteration)
            return [*found[:-1], Phase(found[-1].role, lambda micro: os.kill(os.getpid(), signal.SIGKILL))]
        return phases(iteration)

    def torn(temporary: Path, final: Path, *rest: object) -> None:
        if final.name.endswith(f"-{made.recipe.iterations:07d}"):
            os.kill(os.getpid(), signal.SIGKILL)
        finish(temporary, final, *rest)

    made.task.phases = dying
    distill.parallel.checkpoint._finish = torn
    made.run()


def troubles(models: str, folder: str) -> list[str]:
    """A signal, a full disk and a loss that is not finite on the last rank alone, told by every rank."""
    told = []
    made = trainer(models, folder, ["parallel.strategy=fsdp"])
    mine = made.world.rank == made.world.size - 1
    phases = made.task.phases

    def signalled(iteration: int) -> list[Phase]:
        if mine and iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return phases(iteration)

    made.task.phases = signalled
    told.append(f"complete: {made.run()} at {made.iteration}")

    described = distill.parallel.checkpoint._described

    def full_disk(path: Path) -> dict[str, object]:
        if mine:
            raise OSError(28, "No space left on device")
        return described(path)

    distill.parallel.checkpoint._described = full_disk
    made.iteration += 1
    try:
        made.save()
    except TrainingError as error:
        told.append(str(error))
    distill.parallel.checkpoint._described = described

    def poisoned(iteration: int) -> list[Phase]:
        return [Phase(p.role, lambda micro, p=p: _not_finite(p, micro, mine)) for p in phases(iteration)]

    made.task.phases = poisoned
    try:
        made._step()
    except TrainingError as error:
        told.append(str(error))
    return told


def _not_finite(phase: Phase, micro: int, mine: bool) -> tuple[Tensor, dict[str, Tensor | float]]:
    loss, values = phase.loss(micro)
    return loss + (float("inf") if mine else 0.0), dict(values)


def stream(folder: Path) -> list[dict[str, float]]:
    """The numbers of a run's log but its times; counts of histograms move with the last bit."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    apart = ("time", "seconds", "samples_per_second", "histograms")
    return [{k: v for k, v in line.items() if k not in apart and "cpu_seconds" not in k} for line in lines]
