"""The runs of a comparison: what to train, how a run is recognised, and processes that do it.

    runs/<digest>/   recipe.yaml, <stage>.log, training/ (logs and checkpoints), bundle/, run.json once exported
    scores.sqlite    the store of all scores; a run's label is its digest

The digest covers the resolved recipe without its names and every file of the folders that it reads, so a finished run
is recognised whatever its variant is called, and a changed teacher or reward makes a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tqdm import tqdm

from distill.config import DistillRecipe, RecipeError, load_recipe
from eval import judges
from eval.errors import EvalError, nearest
from eval.prompts import build_prompts, load_suite
from eval.store import Store
from service.runtimes.base import Precision, RuntimeChoice

Clock = Literal["iterations", "wall-clock"]
OURS = ("name", "output", "seed")
"""Keys of a recipe that a comparison sets itself."""
NAME = "student"
"""Of every run: names decide nothing, so that a renamed variant finds its runs again."""
_SAME_PACE = 0.05
"""Variants whose iteration takes as long as the first one's, within this fraction, share the runs of both clocks."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Scoring(_Strict):
    """One suite at one number of steps. samples: only the first ones; None: all. runtime, precision: as of eval.run."""

    suite: str
    steps: int | None = None
    samples: int | None = None
    runtime: RuntimeChoice = "auto"
    precision: Precision = "float32"

    @property
    def title(self) -> str:
        return self.suite if self.steps is None else f"{self.suite}, {self.steps} step{'s' * (self.steps != 1)}"


class Comparison(_Strict):
    """A file in comparisons/. Overrides are dotted keys of the recipe, as on the command line of distill.run."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    description: str = ""
    recipe: str
    shared: dict[str, Any] = Field({}, description="overrides of every variant")
    variants: dict[str, dict[str, Any]] = Field(min_length=1, description="overrides by name; the first is the control")
    seeds: tuple[int, ...] = Field(min_length=1)
    clocks: tuple[Clock, ...] = ("iterations",)
    paces: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="milliseconds per iteration of every variant where they are known; else they are measured"
    )
    scores: tuple[Scoring, ...] = Field(min_length=1)
    telemetry: tuple[str, ...] = Field((), description="keys of log.jsonl; their last interval joins the table")
    threads: int = Field(1, ge=1, description="of each run")

    @model_validator(mode="after")
    def _sensible(self) -> Comparison:
        for key in [*self.shared, *(key for overrides in self.variants.values() for key in overrides)]:
            if key in OURS:
                raise ValueError(f"{key} is set for every run by the comparison; remove it from the overrides")
        if self.paces and self.paces.keys() != self.variants.keys():
            odd = sorted(self.paces.keys() ^ self.variants.keys())
            raise ValueError(f"paces and variants differ in {odd}; give a pace for every variant, or none")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} repeat one; give different ones")
        return self


def load_comparison(path: Path) -> Comparison:
    """Raises EvalError that names the key, the value and the way out."""
    try:
        return Comparison.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise EvalError(f"{path} cannot be read: {error}; comparisons/ has examples") from None
    except ValidationError as error:
        # A misspelt key is also a missing one; what is unknown says more.
        faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
        raise EvalError("\n".join(f"{path}: {_explain(fault)}" for fault in faults)) from None


def _explain(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"]) or "the file"
    if fault["type"] == "extra_forbidden":
        fields = Scoring.model_fields if fault["loc"][0] == "scores" else Comparison.model_fields
        return f"{where} is unknown; {nearest(str(fault['loc'][-1]), fields)}"
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}"


# --- one run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One training with its scores: the resolved recipe and what identifies it."""

    variant: str
    seed: int
    clock: Clock
    recipe: DistillRecipe
    digest: str

    @property
    def title(self) -> str:
        return f"{self.variant}, seed {self.seed}, {self.recipe.iterations} iterations"


@dataclass(frozen=True)
class Failure:
    """What to tell of a run that ended without scores."""

    run: str
    stage: str
    code: int
    log: str
    last_line: str


class RunFailed(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.last_line)
        self.failure = failure


def make_job(comparison: Comparison, variant: str, seed: int, clock: Clock, iterations: int | None = None) -> Job:
    """Resolve a variant's recipe. Raises EvalError with the recipe's own explanation."""
    overrides = comparison.shared | comparison.variants[variant] | {"seed": seed}
    if iterations is not None:
        overrides |= {"iterations": iterations}
    try:
        recipe = load_recipe(comparison.recipe, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
    except RecipeError as error:
        raise EvalError(f"variant {variant!r}: {error}") from None
    if not isinstance(recipe, DistillRecipe):
        raise EvalError(f"{comparison.recipe} has task {recipe.task}; a comparison takes a recipe with task distill")
    return Job(variant, seed, clock, recipe, recipe_digest(recipe))


def recipe_digest(recipe: DistillRecipe) -> str:
    """sha256 of everything that decides a run's result: its recipe without names, and the folders that it reads.

    Of the recipe counts what differs from the defaults, so that a new option leaves finished runs finished; the folders
    are those of the whole of it. The price: where a default gets another value, runs that relied on it must be removed.
    """
    names = {"name", "output"}
    tree = recipe.model_dump(mode="json", exclude=names, exclude_defaults=True)
    inputs = {path: _folder_digest(path) for path in sorted(_folders(recipe.model_dump(mode="json", exclude=names)))}
    return hashlib.sha256(json.dumps([tree, inputs], sort_keys=True).encode()).hexdigest()


def _folders(tree: Any) -> set[str]:
    if isinstance(tree, dict):
        return set().union(*(_folders(value) for value in tree.values()))
    if isinstance(tree, list):
        return set().union(*(_folders(value) for value in tree))
    return {tree} if isinstance(tree, str) and Path(tree).is_dir() else set()


@lru_cache
def _folder_digest(path: str) -> str:
    return judges.digest(Path(path))


class Workshop:
    """The folder of a comparison; does what is missing of a run and tells what is there."""

    def __init__(self, folder: Path, threads: int, judges_folder: Path) -> None:
        self.folder, self.threads, self.judges = folder, threads, judges_folder
        self.store = folder / "scores.sqlite"
        self.processes: set[subprocess.Popen[bytes]] = set()

    def home(self, job: Job) -> Path:
        return self.folder / "runs" / job.digest[:16]

    def facts(self, job: Job) -> dict[str, Any]:
        """run.json of a trained and exported run, else nothing."""
        try:
            facts = json.loads((self.home(job) / "run.json").read_text())
        except (OSError, ValueError):
            return {}
        return dict(facts) if facts["digest"] == job.digest and (self.home(job) / "bundle").is_dir() else {}

    def log(self, job: Job) -> list[dict[str, Any]]:
        return read_log(self.home(job) / "training" / NAME / "log.jsonl")

    def run(self, job: Job, scores: Sequence[Scoring]) -> None:
        """Do what is not done yet. Raises RunFailed."""
        home = self.home(job)
        if not self.facts(job):
            home.mkdir(parents=True, exist_ok=True)
            tree = job.recipe.model_dump(mode="json") | {"name": NAME, "output": str(home / "bundle")}
            (home / "recipe.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
            shutil.rmtree(home / "bundle", ignore_errors=True)
            started = time.monotonic()
            self._call(job, "train", "distill.run", str(home / "recipe.yaml"), "--resume", "--quiet")
            trained = time.monotonic()
            self._call(job, "export", "distill.export", str(home / "bundle"), "--to", "onnx")
            seconds = {"train": round(trained - started, 1), "export": round(time.monotonic() - trained, 1)}
            facts = {"digest": job.digest, "variant": job.variant, "seed": job.seed, "seconds": seconds}
            temporary = home / "run.json.tmp"
            temporary.write_text(json.dumps(facts, indent=1))
            os.replace(temporary, home / "run.json")
            shutil.rmtree(home / "training" / NAME / "checkpoints", ignore_errors=True)
        for score in scores:
            if self.scored(job, score) is None:
                self._score(job, score)

    def _score(self, job: Job, score: Scoring) -> None:
        options = ["--suite", score.suite, "--label", job.digest, "--store", str(self.store), "--quiet"]
        options += ["--judges", str(self.judges), "--cache", str(self.home(job) / "samples")]
        options += ["--threads", str(self.threads), "--steps", str(steps_of(job, score))]
        options += ["--runtime", score.runtime, "--precision", score.precision]
        options += [] if score.samples is None else ["--samples", str(score.samples)]
        self._call(job, f"score-{Path(score.suite).stem}", "eval.run", str(self.home(job) / "bundle"), *options)
        shutil.rmtree(self.home(job) / "samples", ignore_errors=True)

    def _call(self, job: Job, stage: str, module: str, *arguments: str) -> None:
        path = self.home(job) / f"{stage}.log"
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = os.environ | threads | {"LEAPFROG_RUNS": str(self.home(job) / "training")}
        command = [sys.executable, "-m", module, *arguments]
        with path.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            self.processes.add(process)
            code = process.wait()
            self.processes.discard(process)
        if code:
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
            raise RunFailed(Failure(job.title, stage, code, str(path), lines[-1] if lines else ""))

    def stop(self) -> None:
        """Let running trainings write a checkpoint and end."""
        for process in list(self.processes):
            process.terminate()

    def scored(self, job: Job, score: Scoring) -> dict[str, Any] | None:
        """The newest complete run of the store that scored this student with this very suite, else None."""
        if not self.store.is_file():
            return None
        suite = load_suite(score.suite)
        with Store(self.store) as store:
            for row in store.runs(label=job.digest, suite=suite.name):
                same = row["resolved"] == suite.model_dump(mode="json")
                if same and row["scored"] == count_of(score) and _made_as(row["source"]["identity"], job, score):
                    return row
        return None


def _made_as(identity: dict[str, Any], job: Job, score: Scoring) -> bool:
    """Whether pictures came from what a score asks for; "auto" takes what there is."""
    asked = {"runtime": score.runtime, "precision": score.precision}
    told = {key: value for key, value in asked.items() if value != "auto"}
    return identity["steps"] == steps_of(job, score) and all(identity[key] == value for key, value in told.items())


def steps_of(job: Job, score: Scoring) -> int:
    return max(job.recipe.steps) if score.steps is None else score.steps


def count_of(score: Scoring) -> int:
    suite = load_suite(score.suite)
    return score.samples or suite.prompts.count * suite.seeds_per_prompt


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def pace(log: Sequence[dict[str, Any]], recipe: DistillRecipe) -> float | None:
    """Seconds per iteration: the lower quartile of the intervals after the fake score's warm-up, None without any.

    Of processor time where a CPU did the work, which what else the machine does changes little; wall-clock otherwise.
    Previews, checkpoints and whatever else the machine did make some intervals longer; none makes one shorter.
    """
    full = [line for line in log if line["iteration"] - recipe.log_every >= recipe.fake_warmup] or log[-1:]
    return float(np.quantile([_seconds(line, recipe) for line in full], 0.25)) if full else None


def _seconds(line: dict[str, Any], recipe: DistillRecipe) -> float:
    """Of one iteration, in the interval that a line of the log tells of."""
    if "cpu_seconds" in line and "peak_gib" not in line:
        iterations: int = (line["iteration"] - 1) % recipe.log_every + 1
        return float(line["cpu_seconds"]) / iterations
    return float(recipe.batch_size / line["samples_per_second"])


# --- all runs ------------------------------------------------------------------------------------------------------


def plan(comparison: Comparison) -> list[Job]:
    """The runs at equal iterations. Raises EvalError for a comparison that cannot say anything."""
    jobs = [make_job(comparison, v, seed, "iterations") for seed in comparison.seeds for v in comparison.variants]
    found: dict[str, Job] = {}
    for job in jobs:
        other = found.setdefault(job.digest, job)
        if other is not job:
            raise EvalError(f"variants {other.variant!r} and {job.variant!r} resolve to the same recipe; drop one")
        for score in comparison.scores:
            if steps_of(job, score) not in job.recipe.steps:
                raise EvalError(
                    f"scores asks for {score.steps} steps, but {job.variant!r} learns {list(job.recipe.steps)}; "
                    "change scores or the recipe's steps"
                )
    for score in comparison.scores:
        build_prompts(load_suite(score.suite), score.samples)
    return jobs


def plan_wall_clock(comparison: Comparison, jobs: Sequence[Job], workshop: Workshop) -> list[Job]:
    """Each variant with as many iterations as the first one's take; variants without a known pace are left out."""
    paces = dict(comparison.paces)
    for variant in () if paces else comparison.variants:
        own = [pace(workshop.log(job), job.recipe) for job in jobs if job.variant == variant and workshop.facts(job)]
        if known := [value for value in own if value is not None]:
            paces[variant] = float(np.median(known))
    control = next(iter(comparison.variants))
    timed = []
    for job in jobs:
        if control not in paces or job.variant not in paces:
            continue
        ratio = paces[control] / paces[job.variant]
        iterations = job.recipe.iterations if abs(ratio - 1) <= _SAME_PACE else round(job.recipe.iterations * ratio)
        timed.append(make_job(comparison, job.variant, job.seed, "wall-clock", max(1, iterations)))
    return timed


def execute(
    jobs: Sequence[Job], comparison: Comparison, workshop: Workshop, workers: int, *, quiet: bool
) -> list[Failure]:
    """Run what is not done, ``workers`` at a time; a failure is reported and stops nothing else."""
    unique, failures = {job.digest: job for job in jobs}, []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(unique), unit="run", disable=quiet) as bar:
        futures: dict[Future[None], Job] = {
            pool.submit(workshop.run, job, comparison.scores): job for job in unique.values()
        }
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                except RunFailed as error:
                    failures.append(error.failure)
                    bar.write(describe(error.failure), file=sys.stderr)
                bar.set_postfix_str(futures[future].title)
                bar.update()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            workshop.stop()
            raise
    return failures


def describe(failure: Failure) -> str:
    return f"failed: {failure.run}: {failure.stage} ended with {failure.code}: {failure.last_line} (see {failure.log})"
