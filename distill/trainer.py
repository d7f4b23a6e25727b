"""The training loop. It knows phases, optimizers, averages, checkpoints and logs; it knows no objective or family.

A task offers, per iteration, phases; each phase trains one role and yields a loss per micro-batch. The trainer runs
them one at a time, so that only one graph is alive:

    for phase in task.phases(iteration):  for each micro-batch: loss.backward();  clip;  optimizer[role].step()

Everything random is drawn from generators seeded by (seed, iteration, micro-batch, purpose), so a resumed run equals
an uninterrupted one without any generator state.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from distill.bundle import sha256
from distill.config import Base, Optimizer
from distill.telemetry.sink import Sink, Total, Value

log = logging.getLogger(__name__)
Telemetry = Mapping[str, Value]


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
        self.task, self.recipe, self.folder, self.quiet = task, task.recipe, folder, quiet
        self.iteration = 0
        self.optimizers = {role: _adamw(task.roles[role], task.optimizers[role]) for role in task.roles}
        self.ema = {r: copy.deepcopy(m).requires_grad_(False) for r, m in task.roles.items()} if self.recipe.ema else {}
        self._stop: int | None = None

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        recipe: Base = self.recipe
        self.folder.mkdir(parents=True, exist_ok=True)
        sink = Sink(self.folder, self.iteration)
        bar = tqdm(total=recipe.iterations, initial=self.iteration, desc=recipe.name, unit="it", disable=self.quiet)
        with self._signals(), contextlib.closing(sink), contextlib.closing(bar):
            while self.iteration < recipe.iterations:
                telemetry = self._step()
                self.iteration += 1
                bar.update()
                sink.add(telemetry)
                if self._probes():
                    sink.add({name: [value] for name, value in self._probe().items()})
                last = self.iteration == recipe.iterations
                if self.iteration % recipe.log_every == 0 or last:
                    bar.set_postfix(sink.flush(self.iteration, recipe.batch_size))
                if self.iteration % recipe.preview_every == 0 or last:
                    with self.averaged():
                        sink.picture(self.iteration, self.task.preview())
                if self.iteration % recipe.save_every == 0 or last or self._stop is not None:
                    self.save()
                if self._stop is not None and not last:
                    log.warning(
                        "stopped by signal %d at iteration %d; continue with --resume", self._stop, self.iteration
                    )
                    return False
        with self.averaged():
            output = Path(recipe.output)
            output.mkdir(parents=True, exist_ok=True)
            self.task.finish(output)
        return True

    def _probes(self) -> bool:
        every = self.task.probe_every if isinstance(self.task, Probed) else None
        return every is not None and self.iteration % every == 0

    def _probe(self) -> Telemetry:
        assert isinstance(self.task, Probed)
        began, modes = time.process_time(), {m: m.training for m in self.task.roles.values()}
        for module in modes:
            module.eval()
        try:
            with torch.random.fork_rng(devices=[]):  # a network's own dropout must not move training's stream
                telemetry = self.task.probe(self.folder / "probes", self.iteration)
        finally:
            for module, mode in modes.items():
                module.train(mode)
        return {**telemetry, "cpu_seconds/probe": Total(time.process_time() - began)}

    def _step(self) -> dict[str, list[Value]]:
        """One iteration; telemetry as one value per micro-batch."""
        telemetry: dict[str, list[Value]] = {}
        for phase in self.task.phases(self.iteration):
            began = time.process_time()
            optimizer, settings = self.optimizers[phase.role], self.task.optimizers[phase.role]
            rate = settings.learning_rate * schedule(settings, self.iteration, self.recipe.iterations)
            for group in optimizer.param_groups:
                group["lr"] = rate
            for micro in range(self.recipe.accumulate):
                loss, values = phase.loss(micro)
                (loss / self.recipe.accumulate).backward()
                for name, value in {**values, f"{phase.role}/loss": loss.detach()}.items():
                    telemetry.setdefault(name, []).append(value)
            norm = nn.utils.clip_grad_norm_(self.task.roles[phase.role].parameters(), settings.clip)
            if not all(math.isfinite(float(v)) for v in (norm, *telemetry[f"{phase.role}/loss"])):
                raise self._not_finite(phase.role)
            telemetry[f"{phase.role}/grad_norm"] = [norm]
            optimizer.step()
            for role in self.task.roles:
                self.optimizers[role].zero_grad(set_to_none=True)
            if self.ema:
                self._average(phase.role)
            if phase.after is not None:
                phase.after()
            telemetry[f"cpu_seconds/{phase.role}"] = [Total(time.process_time() - began)]
        return telemetry

    def _not_finite(self, role: str) -> TrainingError:
        saved = self._checkpoints()
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
        return TrainingError(
            f"{self.recipe.name}: the loss or gradient of {role!r} is not finite at iteration {self.iteration}; "
            f"{kept}. Lower {role}.learning_rate or {role}.clip and continue with --resume"
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the present iteration, with a checkpoint."""

        def stop(number: int, frame: object) -> None:
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

    def _average(self, role: str) -> None:
        decay = min(self.recipe.ema, (1 + self.iteration) / (10 + self.iteration))
        source, target = self.task.roles[role], self.ema[role]
        with torch.no_grad():
            torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - decay)
            for a, b in zip(target.buffers(), source.buffers(), strict=True):
                a.copy_(b)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap the averaged weights into the task's modules for previews, export and scores."""
        pairs = [(m, self.ema[r]) for r, m in self.task.roles.items() if r in self.ema]
        _swap(pairs)
        modes = {m: m.training for m in self.task.roles.values()}
        for module in modes:
            module.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.train(mode)
            _swap(pairs)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write checkpoints/step-N atomically: everything under a temporary name, then one rename."""
        final = self.folder / "checkpoints" / f"step-{self.iteration:07d}"
        temporary = final.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(self._tensors(), temporary / "state.safetensors")
        facts = {
            "iteration": self.iteration,
            "task": self.recipe.task,
            "name": self.recipe.name,
            "recipe": self.recipe.model_dump(mode="json"),
            "sha256": sha256(temporary / "state.safetensors"),
        }
        (temporary / "state.json").write_text(json.dumps(facts, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in self._checkpoints()[: -self.recipe.keep_checkpoints]:
            shutil.rmtree(old)
        return final

    def resume(self) -> int:
        """Load the newest checkpoint of this run and return its iteration. Raises TrainingError if it does not fit."""
        saved = self._checkpoints()
        if not saved:
            raise TrainingError(f"{self.folder} has no checkpoint to resume; start without --resume")
        facts, tensors = _read(saved[-1])
        if (facts["task"], facts["name"]) != (self.recipe.task, self.recipe.name):
            raise TrainingError(
                f"{saved[-1]} belongs to {facts['task']} {facts['name']!r}, not to {self.recipe.task} "
                f"{self.recipe.name!r}; resume it with its own recipe"
            )
        try:
            self._restore(tensors)
        except (RuntimeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"{saved[-1]} does not fit the recipe's model ({first}); resume it with its own recipe"
            ) from None
        self.iteration = int(facts["iteration"])
        return self.iteration

    def _checkpoints(self) -> list[Path]:
        return sorted(p for p in (self.folder / "checkpoints").glob("step-*") if p.suffix != ".tmp")

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for role, module in self.task.roles.items():
            _put(tensors, f"{role}/model", module.state_dict())
            if role in self.ema:
                _put(tensors, f"{role}/ema", self.ema[role].state_dict())
            for i, state in self.optimizers[role].state_dict()["state"].items():
                _put(tensors, f"{role}/optimizer/{i}", state)
        return tensors

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        for role, module in self.task.roles.items():
            module.load_state_dict(_take(tensors, f"{role}/model"))
            if role in self.ema:
                self.ema[role].load_state_dict(_take(tensors, f"{role}/ema"))
            optimizer = self.optimizers[role]
            states: dict[int, dict[str, Tensor]] = {}
            for key, value in _take(tensors, f"{role}/optimizer").items():
                index, _, name = key.partition("/")
                states.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a checkpoint. Raises TrainingError for one that is not as it was written."""
    state = checkpoint / "state.safetensors"
    try:
        facts = json.loads((checkpoint / "state.json").read_text())
        whole = sha256(state) == facts["sha256"]
    except (OSError, ValueError, KeyError):
        state, whole = checkpoint, False
    if not whole:
        raise TrainingError(f"{state} was altered or truncated; delete {checkpoint} to resume from an older one")
    return facts, load_file(checkpoint / "state.safetensors")


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
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )


def _swap(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    for a, b in pairs:
        for x, y in zip([*a.parameters(), *a.buffers()], [*b.parameters(), *b.buffers()], strict=True):
            x.data, y.data = y.data, x.data


def _put(tensors: dict[str, Tensor], prefix: str, values: Mapping[str, Tensor]) -> None:
    tensors.update({f"{prefix}/{k}": v.detach().contiguous().clone() for k, v in values.items()})


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix + "/"): v for k, v in tensors.items() if k.startswith(prefix + "/")}
