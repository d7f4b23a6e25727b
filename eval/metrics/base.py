"""The contract of a metric: ``update(samples)`` any number of times, then ``compute() -> Score``.

A metric says what it is (name, direction, unit, smallest number of samples at which it may be reported), takes samples
in batches of any size and never keeps more than it needs. Its score carries one number per sample: the sample's value
where the metric is a mean, the sample's influence where it is not (FID, KID). Paired differences need nothing else.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from eval.errors import EvalError, nearest
from eval.prompts import Prompt
from eval.statistics import Interval

Direction = Literal["higher", "lower"]
Media = Literal["pictures", "clips", "any"]
PerSample = Literal["value", "influence"]


@dataclass(frozen=True)
class Samples:
    """A batch of pictures, or of clips, with what they were asked for.

    images: (B, 3, H, W) uint8, of clips (B, F, 3, H, W). seconds: (B,) wall time of each one where it was made alone,
    else None. batch_seconds: wall time of all of them together, None where they were not made now.
    """

    images: NDArray[np.uint8]
    prompts: tuple[Prompt, ...]
    seconds: NDArray[np.float64] | None = None
    batch_seconds: float | None = None

    def __post_init__(self) -> None:
        shape = self.images.shape
        fits = len(shape) in (4, 5) and shape[-3] == 3 and shape[0] == len(self.prompts)
        if self.images.dtype != np.uint8 or not fits:
            raise EvalError(
                f"images have shape {shape} and type {self.images.dtype} for {len(self.prompts)} prompts; "
                "give (B, 3, H, W) uint8, one picture per prompt, or clips (B, F, 3, H, W)"
            )

    @property
    def frames(self) -> int | None:
        """Of each clip; None: pictures."""
        return self.images.shape[1] if self.images.ndim == 5 else None


@dataclass(frozen=True)
class Score:
    """What a metric found. n counts samples; ci and se come from interval, whose n counts prompts.

    protocol: everything that must be equal for two scores to be compared. parts: further rates by name.
    per_sample: (n,) values or influences in the order of the samples. trained_on: the score was a training reward.
    """

    metric: str
    interval: Interval
    n: int
    direction: Direction
    unit: str
    smallest_n: int
    protocol: dict[str, Any]
    per_sample: NDArray[np.float64]
    per_sample_kind: PerSample = "value"
    parts: dict[str, float] = field(default_factory=dict)
    trained_on: bool = False

    @property
    def value(self) -> float:
        return self.interval.value

    @property
    def ci(self) -> tuple[float, float]:
        return self.interval.low, self.interval.high

    def check(self) -> Score:
        """This score. Raises EvalError when it or a per-sample number is NaN or infinite, or one is missing."""
        bad = np.flatnonzero(~np.isfinite(self.per_sample))
        if len(bad):
            raise EvalError(
                f"{self.metric} gave {self.per_sample[bad[0]]} for sample {bad[0]} and {len(bad) - 1} more; "
                "look at those pictures and at the metric's model, nothing was stored"
            )
        if not math.isfinite(self.value):
            raise EvalError(f"{self.metric} is {self.value} over {self.n} samples; nothing was stored")
        if len(self.per_sample) != self.n:
            raise EvalError(f"{self.metric} scored {len(self.per_sample)} of {self.n} samples; nothing was stored")
        return self


class Metric(ABC):
    """Subclasses set the class attributes and register themselves with ``@register``. media: what they judge.

    What update gathers stays in attributes that are lists of numbers, strings, dictionaries of them and arrays, and
    nothing else is a list: a run that is divided among processes moves them with take and give.
    """

    name: ClassVar[str]
    direction: ClassVar[Direction]
    unit: ClassVar[str]
    smallest_n: ClassVar[int] = 1
    media: ClassVar[Media] = "pictures"

    @abstractmethod
    def update(self, samples: Samples) -> None:
        """Take a batch. The order of batches is the order of per_sample."""

    @abstractmethod
    def compute(self) -> Score:
        """The score of everything seen. Raises EvalError when nothing was seen."""

    @property
    def judge(self) -> str:
        """Digest of the network that judges; empty where there is none."""
        extractor = getattr(self, "_extractor", None)
        return str(extractor.digest if extractor else getattr(self, "_identity", ""))

    def take(self) -> dict[str, list[Any]]:
        """What update has gathered since the last call, by attribute, taken out of the metric."""
        gathered = {name: value for name, value in vars(self).items() if isinstance(value, list)}
        for name in gathered:
            setattr(self, name, [])
        return gathered

    def give(self, gathered: dict[str, list[Any]]) -> None:
        """Put back what another metric of the same kind has gathered, after what is here."""
        for name, entries in gathered.items():
            getattr(self, name).extend(entries)

    def _score(
        self, interval: Interval, per_sample: NDArray[np.float64], protocol: dict[str, Any], **more: Any
    ) -> Score:
        return Score(
            metric=self.name,
            interval=interval,
            n=len(per_sample),
            direction=self.direction,
            unit=self.unit,
            smallest_n=self.smallest_n,
            protocol=protocol,
            per_sample=per_sample,
            **more,
        )

    def _need(self, count: int, least: int = 1) -> None:
        if count < least:
            raise EvalError(f"{self.name} saw {count} samples and needs at least {least}; raise --samples")


class PerSampleMetric(Metric):
    """Keeps one value and the prompt's id per sample; subclasses add values in update and define compute."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._clusters: list[str] = []

    def _add(self, values: NDArray[Any], samples: Samples) -> None:
        if len(values) != len(samples.prompts):
            raise EvalError(
                f"{self.name} gave {len(values)} values for {len(samples.prompts)} samples; one each is needed"
            )
        self._values.extend(float(v) for v in values)
        self._clusters.extend(prompt.id for prompt in samples.prompts)


_FACTORIES: dict[str, Callable[..., Metric]] = {}


def register(factory: type[Metric]) -> type[Metric]:
    """Class decorator that makes a metric known by its name."""
    if factory.name in _FACTORIES:
        raise ValueError(f"metric {factory.name!r} is registered twice; give one of them another name")
    _FACTORIES[factory.name] = factory
    return factory


def registered() -> tuple[str, ...]:
    return tuple(sorted(_FACTORIES))


def create(name: str, **options: Any) -> Metric:
    """A fresh metric. Raises EvalError for an unknown name or option."""
    if name not in _FACTORIES:
        raise EvalError(f"metric {name!r} is unknown; {nearest(name, _FACTORIES)}")
    known = inspect.signature(_FACTORIES[name]).parameters
    for option in options:
        if option not in known:
            raise EvalError(f"option {option!r} of metric {name!r} is unknown; {nearest(option, known)}")
    return _FACTORIES[name](**options)
