"""The training loop. It knows phases, optimizers, averages, checkpoints and logs; it knows no objective or family.

A task offers, per iteration, phases; each phase trains one role and yields a loss per micro-batch. The trainer runs
them one at a time, so that only one graph is alive:

    for phase in task.phases(iteration):  for each micro-batch: loss.backward();  clip;  optimizer[role].step()

Everything random is drawn from generators seeded by (seed, iteration, micro-batch, purpose), so a resumed run equals
an uninterrupted one without any generator state, and several ranks share the micro-batches of one (distill.parallel).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from distill.changes import changes
from distill.config import Base, Optimizer
from distill.parallel import checkpoint, gradients
from distill.parallel.context import context_groups, share_sequence
from distill.parallel.device import device, prepare
from distill.parallel.mean import Average
from distill.parallel.saver import Saver
from distill.parallel.shard import kept_ties, let_go, materialise, mesh_of, shard, sum_groups
from distill.parallel.world import world
from distill.telemetry.clock import clock_of
from distill.telemetry.sink import Sink, Value, fetched, on_host

log = logging.getLogger(__name__)
Telemetry = Mapping[str, Value]


PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
PER_RANK = ("cpu_seconds/", "gpu_seconds", "peak_gib")
"""Beginnings of what ranks that share their micro-batches each tell of themselves."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and where the last good state lies."""


@dataclass(frozen=True)
class Phase:
    """One optimizer step of one role: ``loss(micro)`` returns the mean loss of a micro-batch and its telemetry.

    after: called once when the step is done.
    """

    role: str
    loss: Callable[[int], tuple[Tensor, Telemetry]]
    after: Callable[[], None] | None = None


class Task(Protocol):
    """What the trainer needs to know of a thing to be trained."""

    recipe: Any
    roles: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]

    def phases(self, iteration: int) -> list[Phase]: ...

    def preview(self) -> Tensor:
        """Pictures of the present weights with fixed conditions and seeds: (N, 3, H, W) uint8."""
        ...

    def finish(self, output: Path) -> None:
        """Write the result; the trainer has swapped in the averaged weights."""
        ...


@runtime_checkable
class Probed(Protocol):
    """A task that can measure its present weights in ways too dear for each iteration."""

    probe_every: int | None

    def probe(self, folder: Path, iteration: int) -> Telemetry:
        """Telemetry of the present weights; may keep files in ``folder``. Draws nothing that training draws."""
        ...


@runtime_checkable
class Shardable(Protocol):
    """A task whose networks can be sharded; every other parameter of its roles is held whole by each rank."""

    def networks(self) -> list[nn.Module]:
        """All networks that run in training, trained or frozen."""
        ...

    def blocks(self) -> tuple[type[nn.Module], ...]:
        """Modules that are gathered one at a time."""
        ...


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on its key alone, such as (seed, iteration, micro, "noise")."""
    words = [int.from_bytes(k.encode()[:8], "little") if isinstance(k, str) else int(k) for k in key]
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def seeded(*key: int | str) -> np.random.Generator:
    """As generator(), for numpy."""
    words = [int.from_bytes(k.encode()[:8], "little") if isinstance(k, str) else int(k) for k in key]
    return np.random.default_rng(words)


class Trainer:
    """Runs a task to its end. ``run()`` returns True when the run is complete, False when it was interrupted."""

    def __init__(self, task: Task, folder: Path, *, quiet: bool = False) -> None:
        self.task, self.recipe, self.folder, self.world = task, task.recipe, folder, world()
        self.device = device()
        prepare(self.device)
        self.quiet = quiet or not self.world.leader
        self.iteration = 0
        try:
            self.context = self.recipe.parallel.context if self.world.size > 1 else 1
            self.micros = self.world.micros(self.recipe.accumulate, self.context)
            self._place()
        except ValueError as error:
            raise TrainingError(f"{self.recipe.name}: {error}") from None
        self.optimizers = {role: _adamw(task.roles[role], task.optimizers[role]) for role in task.roles}
        self.ema = {role: Average(module) for role, module in task.roles.items()} if self.recipe.ema else {}
        self.saver = Saver(self.world)
        self.clock = clock_of(self.device)
        self._stop: int | None = None

    def _place(self) -> None:
        """Shard the task's networks, or hold them whole, and let ranks share sequences; all start from rank 0's values.

        joint: whether it takes several ranks to run a network.
        """
        self.joint, self._networks, mesh = False, list[nn.Module](), None
        if self.world.size == 1:
            return
        networks = self._networks = self.task.networks() if isinstance(self.task, Shardable) else []
        if self.recipe.parallel.strategy != "ddp":
            if not isinstance(self.task, Shardable):
                raise ValueError(f"task {self.recipe.task} holds its networks whole; use parallel.strategy=ddp")
            mesh, self.joint = mesh_of(self.recipe.parallel, self.world.size), True
        for network in networks:
            with kept_ties(network, self.task.roles.values()):
                if mesh is None:
                    materialise(network)
                else:
                    assert isinstance(self.task, Shardable)
                    shard(network, self.task.blocks(), mesh, self.recipe.precision)
        for module in self.task.roles.values():
            materialise(module)
        if self.context > 1:
            if not networks:
                raise ValueError(f"task {self.recipe.task} has no sequence to share; use parallel.context=1")
            groups, self.joint = context_groups(self.context), True
            for network in networks:
                share_sequence(network, groups)

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        recipe: Base = self.recipe
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.iteration == 0 and recipe.initialise_from:
            self._initialise(Path(recipe.initialise_from))
        sink = Sink(self.folder, self.iteration) if self.world.leader else _Kept()
        bar = tqdm(total=recipe.iterations, initial=self.iteration, desc=recipe.name, unit="it", disable=self.quiet)
        with self._named(), self._signals(), contextlib.closing(sink), contextlib.closing(bar), self.saver:
            first = self.iteration
            while self.iteration < recipe.iterations:
                began = time.monotonic()
                telemetry = self._step()
                self.iteration += 1
                if self.iteration == first + 2 and self.world.leader:  # the first one warms up
                    _check_patience(time.monotonic() - began)
                bar.update()
                sink.add(telemetry)
                if self._probes() and self._joins:
                    probed = self._probe()
                    sink.add({name: [value] for name, value in probed.items()} if self.world.leader else {})
                last = self.iteration == recipe.iterations
                if self.iteration % recipe.log_every == 0 or last:
                    sink.add({**self._peak(), **self.clock.take()})
                    sink.values = _merged(self.world.gather(on_host(sink.values)), self.context)
                    bar.set_postfix(sink.flush(self.iteration, recipe.batch_size))
                if (self.iteration % recipe.preview_every == 0 or last) and self._joins:
                    with self.averaged():
                        sink.picture(self.iteration, self.task.preview().cpu())
                stop, failed = map(max, zip(*self.world.gather((self._stop or 0, self.saver.failed)), strict=True))
                if failed:
                    self.saver.wait()
                if self.iteration % recipe.save_every == 0 or last or stop:
                    self._save()
                if last or stop:
                    self.saver.wait()
                if stop and not last:
                    log.warning("stopped by signal %d at iteration %d; continue with --resume", stop, self.iteration)
                    return False
        if self._joins:
            with self.averaged():
                output = Path(recipe.output)
                output.mkdir(parents=True, exist_ok=True)
                self.task.finish(output)
        self.world.barrier()
        return True

    @property
    def _joins(self) -> bool:
        """Whether this rank takes part in previews, probes and results: it does if networks need it to run."""
        return self.world.leader or self.joint

    def _probes(self) -> bool:
        every = self.task.probe_every if isinstance(self.task, Probed) else None
        return every is not None and self.iteration % every == 0

    def _probe(self) -> Telemetry:
        assert isinstance(self.task, Probed)
        modes = {m: m.training for m in self.task.roles.values()}
        for module in modes:
            module.eval()
        try:
            # A network's own dropout must not move training's stream.
            gpus = [self.device] if self.device.type == "cuda" else []
            with self.clock.phase("probe"), torch.random.fork_rng(devices=gpus), self._probe_folder() as folder:
                return self.task.probe(folder, self.iteration)
        finally:
            for module, mode in modes.items():
                module.train(mode)

    @contextlib.contextmanager
    def _probe_folder(self) -> Iterator[Path]:
        """The run's own for the leader, a copy of its present state for the other ranks of a joint probe."""
        folder = self.folder / "probes"
        if not self.joint:
            yield folder
            return
        with tempfile.TemporaryDirectory() as scratch:
            own = Path(scratch) / "probes"
            if not self.world.leader and folder.is_dir():
                shutil.copytree(folder, own)
            self.world.barrier()
            yield folder if self.world.leader else own

    def _step(self) -> dict[str, list[Value]]:
        """One iteration; telemetry as one value per micro-batch.

        Whether numbers are finite is asked once at its end, since each look at a number waits for the device.
        """
        telemetry: dict[str, list[Value]] = {}
        seen: dict[str, list[Tensor]] = {}
        for phase in self.task.phases(self.iteration):
            with self.clock.phase(phase.role):
                optimizer, settings = self.optimizers[phase.role], self.task.optimizers[phase.role]
                rate = settings.learning_rate * schedule(settings, self.iteration, self.recipe.iterations)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                role = self.task.roles[phase.role]
                for micro in self.micros:
                    sum_groups(self._networks, last=micro == self.micros[-1])
                    loss, values = phase.loss(micro)
                    (loss / len(self.micros)).backward()
                    seen.setdefault(phase.role, []).append(loss.detach())
                    for name, value in {**values, f"{phase.role}/loss": loss.detach()}.items():
                        telemetry.setdefault(name, []).append(value)
                gradients.average(role.parameters(), self.world)
                let_go(self._networks)
                norm = gradients.clip(role.parameters(), settings.clip)
                seen[phase.role].append(norm)
                telemetry[f"{phase.role}/grad_norm"] = [norm]
                self.saver.settle()
                optimizer.step()
                for each in self.optimizers.values():
                    each.zero_grad(set_to_none=True)
                if self.ema:
                    self.ema[phase.role].follow(min(self.recipe.ema, (1 + self.iteration) / (10 + self.iteration)))
                if phase.after is not None:
                    phase.after()
        self._check(seen)
        return telemetry

    def _check(self, seen: Mapping[str, Sequence[Tensor]]) -> None:
        """Raises TrainingError for the first role of which any rank has seen a number that is not finite."""
        numbers = dict(
            zip(seen, fetched([torch.stack(list(some)).isfinite().all() for some in seen.values()]), strict=True)
        )
        wrong = [i for i, finite in enumerate(numbers.values()) if not finite]
        first = min(self.world.gather(min(wrong, default=len(seen))))
        if first < len(seen):
            raise self._not_finite(list(seen)[first])

    def _peak(self) -> dict[str, list[Value]]:
        """The most memory that this rank's GPU has held, GiB."""
        if self.device.type != "cuda":
            return {}
        return {"peak_gib": [torch.cuda.max_memory_allocated(self.device) / 2**30]}

    def _not_finite(self, role: str) -> TrainingError:
        self.saver.drain()
        saved = checkpoint.saved(self.folder)
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
        return TrainingError(
            f"{self.recipe.name}: the loss or gradient of {role!r} is not finite at iteration {self.iteration}; "
            f"{kept}. Lower {role}.learning_rate or {role}.clip and continue with --resume"
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the present iteration, with a checkpoint; a second Ctrl-C at once."""

        def stop(number: int, frame: object) -> None:
            if self._stop == number == signal.SIGINT:
                raise KeyboardInterrupt
            if self._stop is None and self.world.leader:
                # Past Python's buffers, which the signal may have come in the middle of.
                os.write(2, b"\nends after this iteration, with a checkpoint; Ctrl-C once more ends at once\n")
            self._stop = number

        try:
            previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller owns signals
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    # --- averaged weights ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap the averaged weights into the task's modules for previews, export and scores."""
        for average in self.ema.values():
            average.swap()
        modes = {m: m.training for m in self.task.roles.values()}
        for module in modes:
            module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.train(mode)
            for average in self.ema.values():
                average.swap()

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write checkpoints/step-N (distill.parallel.checkpoint). Raises TrainingError if it cannot be written."""
        with self._named():
            self._save()
            written = self.saver.wait()
        assert written is not None
        return written

    def _save(self) -> None:
        """Begin to write checkpoints/step-N; training may go on."""
        facts = {
            "task": self.recipe.task,
            "name": self.recipe.name,
            "ranks": self.world.size,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        self.saver.start(self.folder, self.iteration, self._tensors(), facts, keep=self.recipe.keep_checkpoints)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """A checkpoint that could not be written ends training with the recipe's name."""
        try:
            yield
        except checkpoint.CheckpointError as error:
            raise TrainingError(f"{self.recipe.name}: {error}") from None

    def resume(self) -> int:
        """Load the newest whole checkpoint of this run, written by any number of ranks, and return its iteration.

        Raises TrainingError if there is none, or if it does not fit.
        """
        if not checkpoint.saved(self.folder):
            raise TrainingError(f"{self.folder} has no checkpoint to resume; start without --resume")
        try:
            newest, facts = checkpoint.newest(self.folder, self.world)
        except checkpoint.CheckpointError as error:
            raise TrainingError(str(error)) from None
        if (facts["task"], facts["name"]) != (self.recipe.task, self.recipe.name):
            raise TrainingError(
                f"{newest} belongs to {facts['task']} {facts['name']!r}, not to {self.recipe.task} "
                f"{self.recipe.name!r}; resume it with its own recipe, or name it in initialise_from"
            )
        self._compare(newest, facts.get("recipe", {}))
        try:
            self._restore(newest)
        except ValueError as error:
            raise TrainingError(
                f"{newest} does not fit the recipe's model ({error}); resume it with its own recipe"
            ) from None
        self.iteration = int(facts["iteration"])
        return self.iteration

    def _compare(self, saved: Path, before: Mapping[str, Any]) -> None:
        """Tell what the recipe changes in the run; raises TrainingError where that makes another stage."""
        found = changes(before, self.recipe.model_dump(mode="json"))
        for change in found:
            if change.of_stage:
                raise TrainingError(
                    f"{saved} was trained with {change.key}: {change.before} and this recipe says {change.after}, "
                    f"which is another stage; resume it with {self.folder / 'recipe.yaml'}, or give the new stage a "
                    f"name of its own and initialise_from: {self.folder}"
                )
        if found and self.world.leader:
            log.warning("%s goes on with a changed recipe: %s", saved, "; ".join(map(str, found)))

    def _initialise(self, source: Path) -> None:
        """Start from the weights of another run's newest checkpoint; roles that it lacks start as they were made."""
        try:
            newest, _ = checkpoint.newest(source, self.world)
            stored = checkpoint.shapes(newest)
            for role, module in self.task.roles.items():
                if any(name.startswith(f"{role}/model/") for name in stored):
                    weights: dict[str, Tensor] = {}
                    _put(weights, f"{role}/model", module.state_dict())
                    checkpoint.read(newest, weights, self.world)
                else:
                    log.info("initialise_from: %s has no %s, which starts as it was made", newest, role)
        except checkpoint.CheckpointError as error:
            raise TrainingError(f"{self.recipe.name}: initialise_from {source}: {error}") from None
        except ValueError as error:
            raise TrainingError(
                f"{self.recipe.name}: initialise_from {source}: {error}; give a run of the same network and adapters"
            ) from None
        self.ema = {role: Average(self.task.roles[role]) for role in self.ema}

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that goes on after a resume, by role, kind and name; shards as DTensors."""
        tensors: dict[str, Tensor] = {}
        for role, module in self.task.roles.items():
            _put(tensors, f"{role}/model", module.state_dict())
            if role in self.ema:
                _put(tensors, f"{role}/ema", self.ema[role].state_dict())
            for i, state in self.optimizers[role].state_dict()["state"].items():
                _put(tensors, f"{role}/optimizer/{i}", state)
        return tensors

    def _restore(self, saved: Path) -> None:
        """Read a checkpoint in place. Raises ValueError, before any weight is changed, if it does not fit."""
        stored = checkpoint.shapes(saved)
        for role, optimizer in self.optimizers.items():
            optimizer.load_state_dict(_blank(optimizer, stored, f"{role}/optimizer/"))
        tensors = self._tensors()
        if unknown := sorted(stored.keys() - tensors.keys()):
            raise ValueError(f"{unknown[0]} is unknown here")
        checkpoint.read(saved, tensors, self.world)


def _check_patience(seconds: float) -> None:
    """Warn where torchrun kills ranks before an iteration and its checkpoint can end after a signal."""
    patience = int(os.environ.get(PATIENCE, "30"))
    if "TORCHELASTIC_RUN_ID" in os.environ and 3 * seconds > patience:
        log.warning(
            "an iteration takes %.0f s, and torchrun kills its ranks %d s after it passes a signal on: start it with "
            "%s=%d, or --shutdown-timeout, so that a signal leaves a checkpoint",
            seconds,
            patience,
            PATIENCE,
            math.ceil(10 * seconds),
        )


def schedule(settings: Optimizer, iteration: int, iterations: int) -> float:
    """Factor on the learning rate: linear warm-up, then constant or a cosine to zero."""
    if iteration < settings.warmup:
        return (iteration + 1) / settings.warmup
    if settings.decay == "constant":
        return 1.0
    done = (iteration - settings.warmup) / max(1, iterations - settings.warmup)
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))


def _adamw(module: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    parameters = [p for p in module.parameters() if p.requires_grad]
    # The fused step takes shards or whole tensors. Networks come first in their roles, so the order stays the same.
    groups = [[p for p in parameters if isinstance(p, DTensor) is sharded] for sharded in (True, False)]
    assert [id(p) for group in groups for p in group] == [id(p) for p in parameters], "shards come first in a role"
    return torch.optim.AdamW(
        [{"params": group} for group in groups if group],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def _put(tensors: dict[str, Tensor], prefix: str, values: Mapping[str, Tensor]) -> None:
    tensors.update({f"{prefix}/{k}": v.detach() for k, v in values.items()})


def _blank(optimizer: torch.optim.Optimizer, stored: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    """An optimizer's state with the entries that a checkpoint has, to be filled: moments lie as their parameters do."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for index, _, name in (key.removeprefix(prefix).partition("/") for key in stored if key.startswith(prefix)):
        if int(index) >= len(parameters):
            raise ValueError(f"it has {prefix}{index} for {len(parameters)} parameters")
        like = parameters[int(index)]
        states.setdefault(int(index), {})[name] = _zero(like) if name == "step" else torch.zeros_like(like)
    return {"state": states, "param_groups": optimizer.state_dict()["param_groups"]}


def _zero(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device)


class _Kept:
    """What a rank tells between two flushes when another one writes: a Sink without files."""

    def __init__(self) -> None:
        self.values: dict[str, list[Value]] = {}

    def add(self, telemetry: Mapping[str, Sequence[Value]]) -> None:
        for name, values in telemetry.items():
            self.values.setdefault(name, []).extend(values)

    def flush(self, iteration: int, batch_size: int) -> dict[str, str]:
        self.values = {}
        return {}

    def picture(self, iteration: int, images: Tensor) -> None:
        pass

    def close(self) -> None:
        pass


def _merged(told: Sequence[Mapping[str, list[Value]]], context: int) -> dict[str, list[Value]]:
    """The values of all ranks in their order, which is that of micro-batches; ranks that share some say them once."""
    heard = [
        {n: v for n, v in values.items() if rank % context == 0 or n.startswith(PER_RANK)}
        for rank, values in enumerate(told)
    ]
    names = dict.fromkeys(name for values in heard for name in values)
    return {name: [value for values in heard for value in values.get(name, ())] for name in names}
