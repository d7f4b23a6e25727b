"""Suites: which prompts, which seeds, which metrics. One YAML file each in eval/suites.

Prompts are drawn from the same generators as the training data, with seeds that training must not use: evaluation owns
EVALUATION_SEEDS, and a suite whose seeds lie outside of it is refused. Those of the world "text" are read from files,
one per style. A sample is a pair (prompt, seed).

    suite = load_suite("scenes-trained")
    prompts = build_prompts(suite, limit=100)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from distill.data.captions import Caption, describe
from distill.data.errors import DataError
from distill.data.prompts import read_prompts
from distill.data.world import Scene, sample_scene
from eval.errors import EvalError, first_fault, nearest

SUITES = Path(__file__).parent / "suites"
EVALUATION_SEEDS = range(7_000_000, 8_000_000)
"""Streams of scenes and of noise that belong to evaluation; recipes take theirs from below."""
DIGITS = 10


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Draw(_Strict):
    """Which prompts: `count` of them from stream `seed`. things: how many objects, in turn; None draws 1 to 3.

    files: of the world "text", a file of prompts per style; `count` takes the first of each style in turn.
    """

    seed: int
    count: int = Field(ge=0)
    things: tuple[int, ...] | None = None
    combinations: Literal["trained", "held_out"] = "trained"
    files: dict[str, str] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _ours(self) -> Draw:
        if self.seed not in EVALUATION_SEEDS:
            raise ValueError(
                f"seed is {self.seed}, which may be a training stream; use {EVALUATION_SEEDS.start} to "
                f"{EVALUATION_SEEDS.stop - 1}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_nothing(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Drawn prompts name no files, so that their runs compare with those from before there were any."""
        return {key: value for key, value in dump(self).items() if (key, value) != ("files", None)}


class Suite(_Strict):
    """A suite file. metrics: metric names with their options. batch: pictures or clips made at once.

    frames: of the clip that every sample is; None: pictures. cache: False makes every sample again, for metrics of
    time.
    """

    name: str
    description: str
    world: Literal["scenes", "moving-scenes", "digits", "text"]
    prompts: Draw
    seeds_per_prompt: int = Field(default=1, ge=1)
    metrics: dict[str, dict[str, Any]]
    batch: int = Field(default=32, ge=1)
    cache: bool = True
    frames: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _not_empty(self) -> Suite:
        if self.prompts.count == 0 or not self.metrics:
            raise ValueError("the suite is empty; give prompts.count of at least 1 and at least one metric")
        if (self.world == "text") != (self.prompts.files is not None):
            given = "given" if self.prompts.files else "missing"
            raise ValueError(f"world is {self.world} and prompts.files {given}; use files with the world text alone")
        if self.world != "text" and (self.world == "moving-scenes") != (self.frames is not None):
            raise ValueError(f"world is {self.world} and frames {self.frames}; give frames to worlds of clips alone")
        return self

    @model_serializer(mode="wrap")
    def _without_nothing(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Pictures have no frames, so that their runs compare with those from before there were clips."""
        return {key: value for key, value in dump(self).items() if (key, value) != ("frames", None)}


@dataclass(frozen=True)
class Prompt:
    """One sample to make: the prompt (id, text), its noise seed, and what a right picture shows.

    id is one per drawn scene, so that samples which share it are the same prompt with different seeds. style: of a
    prompt from a file.
    """

    id: str
    text: str
    seed: int
    caption: Caption | None = None
    label: int | None = None
    scene: Scene | None = None
    style: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return self.id, self.seed

    @property
    def moving(self) -> bool:
        """Whether it is of a scene in which something moves."""
        return self.scene is not None and self.scene.motion != "still"


def suite_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in SUITES.glob("*.yaml")))


def load_suite(name: str) -> Suite:
    """A suite by name or by the path of a YAML file. Raises EvalError that names the field at fault."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.is_file():
        raise EvalError(f"suite {name!r} is unknown; {nearest(name, suite_names())}")
    try:
        return Suite.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise EvalError(f"{path} is no YAML: {error}; correct it") from None
    except ValidationError as error:
        raise EvalError(f"{path}: {first_fault(error, Suite, Draw)}") from None


def build_prompts(suite: Suite, limit: int | None = None) -> list[Prompt]:
    """All samples of a suite in order, the seeds of one prompt together; limit keeps the first ones."""
    total = suite.prompts.count * suite.seeds_per_prompt
    number = total if limit is None else limit
    if not 1 <= number <= total:
        raise EvalError(f"--samples is {number} but suite {suite.name!r} has {total}; use 1 to {total}")
    drawn = {"scenes": scene_prompt, "moving-scenes": moving_prompt, "digits": digit_prompt}
    make = _reader(suite.prompts) if suite.world == "text" else drawn[suite.world]
    prompts = []
    for position in range(number):
        index, repeat = divmod(position, suite.seeds_per_prompt)
        prompts.append(make(suite.prompts, index, suite.prompts.seed + index * suite.seeds_per_prompt + repeat))
    return prompts


def _reader(draw: Draw) -> Callable[[Draw, int, int], Prompt]:
    """Prompts of files by number: the first of every style, then the second of every style, and so on."""
    files = draw.files or {}
    styles = {style: read_style(Path(file)) for style, file in files.items()}
    for number, (style, texts) in enumerate(styles.items()):
        wanted = len(range(number, draw.count, len(styles)))
        if len(texts) < wanted:
            raise EvalError(f"{files[style]} holds {len(texts)} prompts and {wanted} are wanted; lower prompts.count")

    def make(draw: Draw, index: int, seed: int) -> Prompt:
        row, column = divmod(index, len(styles))
        style = list(styles)[column]
        return Prompt(f"{style}-{row:05d}", styles[style][row], seed, style=style)

    return make


def read_style(path: Path) -> list[str]:
    """Prompts of a .json list, as HPSv2's benchmark has them, or of whatever distill.data.prompts reads."""
    if not path.is_file():
        raise EvalError(f"{path} is missing, so its prompts cannot be drawn; put the benchmark's file there")
    try:
        if path.suffix != ".json":
            return read_prompts(str(path))
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (DataError, ValueError) as error:
        raise EvalError(f"{path} cannot be read: {error}; give a list of prompts") from None
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise EvalError(f'{path} is no list of prompts; give JSON such as ["a cat", "a dog"]')
    return texts


def scene_prompt(draw: Draw, index: int, seed: int, *, moving: bool = False) -> Prompt:
    count = draw.things[index % len(draw.things)] if draw.things else None
    scene = sample_scene(draw.seed, index, count=count, combinations=draw.combinations, moving=moving)
    caption = describe(scene, np.random.default_rng((draw.seed, index, 1)))
    kind = "moving-" if moving else ""
    return Prompt(f"{kind}scenes-{draw.combinations}-{draw.seed}-{index}", caption.text, seed, caption, scene=scene)


def moving_prompt(draw: Draw, index: int, seed: int) -> Prompt:
    return scene_prompt(draw, index, seed, moving=True)


def digit_prompt(draw: Draw, index: int, seed: int) -> Prompt:
    label = index % DIGITS
    return Prompt(f"digits-{draw.seed}-{index}", str(label), seed, label=label)
