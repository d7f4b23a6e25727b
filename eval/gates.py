"""Gates: what may not get worse, by how much, and what must be seen for a metric to be believed. YAML in eval/gates.

scores:    {suite, metric, margin}           a mean or a distance; margin in the metric's own unit
costs:     {suite, metric, percent, floor}   slower or larger by more than both
guards:    {up, down, because}               a gain of the one that the other pays for
canaries:  a suite, and what every damage must do to a metric
rehearsed: more of that, for eval.rehearse alone

gates = load_gates("scenes-sdxl")
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from eval.damage import DAMAGES
from eval.errors import EvalError, first_fault, nearest
from eval.metrics import registered
from eval.prompts import suite_names

GATES = Path(__file__).parent / "gates"
Named = Annotated[str, StringConstraints(pattern=r"^[^/]+/[^/]+$")]
"""SUITE/METRIC."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Watched(_Strict):
    suite: str
    metric: str

    @model_validator(mode="after")
    def _known(self) -> _Watched:
        if self.metric not in registered():
            raise ValueError(f"metric {self.metric!r} is unknown; {nearest(self.metric, registered())}")
        if not self.suite.endswith((".yaml", ".yml")) and self.suite not in suite_names():
            raise ValueError(f"suite {self.suite!r} is unknown; {nearest(self.suite, suite_names())}")
        return self

    @property
    def key(self) -> str:
        return f"{Path(self.suite).stem}/{self.metric}"


class ScoreGate(_Watched):
    """No worse than the baseline by ``margin``, in the metric's unit."""

    margin: float = Field(gt=0)


class CostGate(_Watched):
    """Slower or larger by more than ``percent`` of the baseline and by more than ``floor`` in the metric's unit."""

    percent: float = Field(gt=0)
    floor: float = Field(ge=0)


class Guard(_Strict):
    """Two measures as SUITE/METRIC: when ``up`` is better and ``down`` is worse than before, somebody has to look."""

    up: Named
    down: Named
    because: str


class Canary(_Strict):
    """A damage that ``metric`` must see: worse by ``at_least``, in the metric's unit."""

    damage: str
    metric: str
    at_least: float = Field(gt=0)

    @model_validator(mode="after")
    def _known(self) -> Canary:
        if self.metric not in registered():
            raise ValueError(f"metric {self.metric!r} is unknown; {nearest(self.metric, registered())}")
        if self.damage not in DAMAGES:
            raise ValueError(f"damage {self.damage!r} is unknown; {nearest(self.damage, DAMAGES)}")
        return self


class Canaries(_Strict):
    suite: str
    samples: int | None = Field(default=None, ge=2)
    expect: tuple[Canary, ...]


class Gates(_Strict):
    scores: tuple[ScoreGate, ...]
    costs: tuple[CostGate, ...] = ()
    guards: tuple[Guard, ...] = ()
    canaries: Canaries | None = None
    rehearsed: tuple[Canary, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Gates:
        keys = [gate.key for gate in self.all]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"{twice[0]} has two gates; keep one")
        for guard in self.guards:
            for name in (guard.up, guard.down):
                if name not in keys:
                    raise ValueError(f"guard names {name!r}, which has no gate; {nearest(name, keys)}")
        return self

    @property
    def all(self) -> tuple[ScoreGate | CostGate, ...]:
        return (*self.scores, *self.costs)

    @property
    def suites(self) -> tuple[str, ...]:
        """Every suite that a gate needs, once, in order."""
        return tuple(dict.fromkeys(gate.suite for gate in self.all))


def load_gates(name: str) -> Gates:
    """Gates by name or by the path of a YAML file. Raises EvalError that names the field at fault."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else GATES / f"{name}.yaml"
    if not path.is_file():
        raise EvalError(f"gates {name!r} are unknown; {nearest(name, (p.stem for p in GATES.glob('*.yaml')))}")
    try:
        return Gates.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise EvalError(f"{path} is no YAML: {error}; correct it") from None
    except ValidationError as error:
        fault = first_fault(error, Gates, ScoreGate, CostGate, Guard, Canary)
        raise EvalError(f"{path}: {fault}") from None
