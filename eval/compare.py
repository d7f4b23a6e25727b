"""Train variants of a recipe from several seeds, score every student, and say what differs and how surely.

    python -m eval.compare comparisons/digits-objectives.yaml --dry-run     # what would run, and for how long
    python -m eval.compare comparisons/digits-objectives.yaml --jobs 2
    python -m eval.compare comparisons/digits-objectives.yaml --jobs 2 --resume

Each run is distill.run, distill.export and eval.run in processes of their own, in a folder named by the digest of its
resolved recipe and of the folders that it reads; a finished run is recognised by that digest and never repeated. On
the clock "wall-clock" each variant gets as many iterations as fit into the time that the first one took, by the paces
that its runs at equal iterations had or that the file gives. Exit codes:
0 complete, 1 some run failed (the others are in the table), 2 the comparison cannot be used, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from eval import judges
from eval.contrast import Measure, difference_of, draw, markdown, mean_of
from eval.errors import EvalError
from eval.prompts import load_suite
from eval.run import DEFAULT_STORE, code_revision, hardware, package_versions
from eval.statistics import Interval
from eval.store import Store
from eval.trials import (
    Comparison,
    Failure,
    Job,
    Scoring,
    Workshop,
    count_of,
    describe,
    execute,
    load_comparison,
    pace,
    plan,
    plan_wall_clock,
    read_log,
    steps_of,
)

# --- results -------------------------------------------------------------------------------------------------------


def collect(comparison: Comparison, jobs: Sequence[Job], workshop: Workshop) -> list[Measure]:
    """Every metric of every way to score, then the telemetry, of one clock's jobs."""
    measures = []
    for score in comparison.scores:
        rows = {job: row for job in jobs if (row := workshop.scored(job, score)) is not None}
        with Store(workshop.store) as store:
            for metric in load_suite(score.suite).metrics:
                measures.append(_measure(store, rows, metric, score, jobs[0].clock))
    for key in comparison.telemetry:
        last = {job: log[-1].get(key) for job in jobs if workshop.facts(job) and (log := workshop.log(job))}
        runs = _by_variant({job: np.array([value]) for job, value in last.items() if value is not None})
        measures.append(Measure(jobs[0].clock, f"{key} at the end", "", 0, runs))
    return measures


def _measure(store: Store, rows: dict[Job, dict[str, Any]], metric: str, score: Scoring, clock: str) -> Measure:
    results = {job: store.results(row["id"])[metric] for job, row in rows.items()}
    protocols = {json.dumps(result["protocol"], sort_keys=True) for result in results.values()}
    if len(protocols) > 1:
        raise EvalError(f"{metric} was measured in {len(protocols)} ways; delete {store.path} and use --resume")
    arrays = {}
    for job, result in results.items():
        by_prompt: dict[str, list[float]] = {}
        for (prompt, _), value in sorted(store.per_sample(rows[job]["id"], metric).items()):
            by_prompt.setdefault(prompt, []).append(value)
        means = np.array([float(np.mean(values)) for values in by_prompt.values()])
        arrays[job] = means - means.mean() + result["value"]
    any_one = next(iter(results.values()), {"unit": "", "direction": "higher"})
    return Measure(
        clock=clock,
        title=f"{metric} ({score.title})",
        unit=any_one["unit"],
        better=1 if any_one["direction"] == "higher" else -1,
        runs=_by_variant(arrays),
        trained_on=any(result["trained_on"] for result in results.values()),
    )


def _by_variant(arrays: dict[Job, Any]) -> dict[str, dict[int, Any]]:
    runs: dict[str, dict[int, Any]] = {}
    for job, array in arrays.items():
        runs.setdefault(job.variant, {})[job.seed] = array
    return runs


def write(
    comparison: Comparison, clocks: Sequence[Sequence[Job]], workshop: Workshop, failures: Sequence[Failure]
) -> list[Path]:
    """table.md, table.json and figure.png of what is finished. Returns the files."""
    measures = [measure for jobs in clocks if jobs for measure in collect(comparison, jobs, workshop)]
    variants = list(comparison.variants)
    revision, dirty = code_revision()
    runs = [_run_row(job, workshop) for jobs in clocks for job in jobs]
    tree = {
        "comparison": comparison.model_dump(mode="json"),
        "measures": [_measure_tree(measure, variants) for measure in measures],
        "runs": runs,
        "failures": [asdict(failure) for failure in failures],
        "revision": revision, "dirty": dirty, "hardware": hardware(), "versions": package_versions(),
    }  # fmt: skip
    text = [f"## {comparison.name}", comparison.description.strip(), markdown(measures, variants), LEGEND]
    text += [_runs_table(runs), *(f"- {describe(failure)}" for failure in failures)]
    paths = [workshop.folder / name for name in ("table.md", "table.json", "figure.png")]
    paths[0].write_text("\n\n".join(part for part in text if part) + "\n")
    paths[1].write_text(json.dumps(tree, indent=1, allow_nan=False))
    draw(measures, variants, paths[2])
    return [path for path in paths if path.exists()]


LEGEND = (
    "Means over training seeds and prompts with 95 % intervals over both: a bootstrap of seeds and of prompts, with "
    "Student's t for few seeds. Differences are paired by seed and prompt, **bold** where the interval excludes 0. One "
    "seed alone has an interval over prompts, which says nothing of training. ↑ higher is better, ↓ lower is better, "
    "† this reward was trained on."
)


def _measure_tree(measure: Measure, variants: Sequence[str]) -> dict[str, Any]:
    found = {
        variant: {
            "mean": _interval(mean_of(measure, variant)),
            "difference": _interval(difference_of(measure, variant, variants[0])),
            "seeds": {seed: float(array.mean()) for seed, array in sorted(measure.runs.get(variant, {}).items())},
        }
        for variant in variants
    }
    about = {"clock": measure.clock, "title": measure.title, "unit": measure.unit, "better": measure.better}
    return about | {"trained_on": measure.trained_on, "variants": found}


def _interval(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    return {key: value if np.isfinite(value) else None for key, value in asdict(interval).items()}


def _run_row(job: Job, workshop: Workshop) -> dict[str, Any]:
    facts = workshop.facts(job)
    return {
        "variant": job.variant,
        "seed": job.seed,
        "clock": job.clock,
        "iterations": job.recipe.iterations,
        "seconds_per_iteration": pace(workshop.log(job), job.recipe),
        "seconds": facts.get("seconds"),
        "digest": job.digest,
        "folder": str(workshop.home(job)),
    }


def _runs_table(runs: Sequence[dict[str, Any]]) -> str:
    """Cost by clock and variant; training's seconds are those of the machine as it was, whatever else it did."""
    lines = ["| variant | clock | finished seeds | iterations | ms per iteration | training, s |", "|" + "---|" * 6]
    for clock, variant in dict.fromkeys((run["clock"], run["variant"]) for run in runs):
        own = [run for run in runs if (run["clock"], run["variant"]) == (clock, variant)]
        done = [run for run in own if run["seconds"]]
        paces = [1000 * run["seconds_per_iteration"] for run in done if run["seconds_per_iteration"]]
        cells = [variant, clock, f"{len(done)} of {len(own)}", str(own[0]["iterations"])]
        cells += [f"{np.median(paces):.1f}" if paces else "–"]
        cells += [f"{np.mean([run['seconds']['train'] for run in done]):.0f}" if done else "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the command ---------------------------------------------------------------------------------------------------


def preview(comparison: Comparison, jobs: Sequence[Job], workshop: Workshop, workers: int) -> str:
    """What would run, and for how long judging by earlier runs of the same recipe and suites."""
    lines, total, unknown = [], 0.0, False
    for job in jobs:
        trained = bool(workshop.facts(job))
        todo = [score for score in comparison.scores if not trained or workshop.scored(job, score) is None]
        training = 0.0 if trained else _training_seconds(comparison, job, jobs, workshop)
        seconds = [training, *(_scoring_seconds(job, score) for score in todo)]
        unknown |= None in seconds
        total += sum(value for value in seconds if value is not None)
        state = "finished" if trained and not todo else "to score" if trained else "to train"
        need = "" if state == "finished" else ", " + (_minutes(sum(filter(None, seconds))) or "time unknown")
        lines.append(f"{job.digest[:16]}  {job.title}: {state}{need}")
    lines.append(f"{len(jobs)} runs of {len(comparison.variants)} variants and {len(comparison.seeds)} seeds")
    estimate = _minutes(total / min(workers, max(1, len(jobs))))
    if estimate:
        more = ", and what nothing on this machine tells" if unknown else ""
        lines.append(f"about {estimate} with --jobs {workers}{more}; start-up and export not counted")
    else:
        lines.append("time unknown: no earlier run of this recipe or suite is on this machine")
    if "wall-clock" in comparison.clocks and jobs[0].clock == "iterations":
        lines.append("then, at equal wall-clock, the variants whose iteration takes longer or shorter once more")
    return "\n".join(lines)


def _training_seconds(comparison: Comparison, job: Job, jobs: Sequence[Job], workshop: Workshop) -> float | None:
    """From runs of this variant, else of this comparison, else the base recipe's own run in LEAPFROG_RUNS or runs/."""
    paces = {other: pace(workshop.log(other), other.recipe) for other in jobs}
    own = [value for other, value in paces.items() if value and other.variant == job.variant]
    known = own or [value for value in paces.values() if value]
    if not known:
        folder = Path(os.environ.get("LEAPFROG_RUNS", "runs")) / job.recipe.name
        earlier = pace(read_log(folder / "log.jsonl"), job.recipe)
        known = [] if earlier is None else [earlier]
    return float(np.median(known)) * job.recipe.iterations if known else None


def _scoring_seconds(job: Job, score: Scoring) -> float | None:
    """From the newest run of the suite in the usual store, by the sample."""
    if not DEFAULT_STORE.is_file():
        return None
    with Store(DEFAULT_STORE) as store:
        rows = store.runs(suite=load_suite(score.suite).name)
    near = [row for row in rows if (row["source"]["identity"] or {}).get("steps") == steps_of(job, score)] or rows
    if not near:
        return None
    started, finished = (datetime.fromisoformat(near[0][key]) for key in ("started", "finished"))
    per_sample = (finished - started).total_seconds() / int(near[0]["scored"])
    return per_sample * count_of(score)


def _minutes(seconds: float) -> str:
    if seconds <= 0:
        return ""
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=Path, help="a YAML file, such as comparisons/digits-objectives.yaml")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time; default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="keep finished runs and continue the others")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and the estimated time")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="default: %(default)s/<name>")
    parser.add_argument("--judges", type=Path, default=judges.DEFAULT_FOLDER, help="default: %(default)s")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    try:
        comparison = load_comparison(options.comparison)
        if options.jobs < 1:
            raise EvalError(f"--jobs is {options.jobs}; use 1 or more")
        jobs = plan(comparison)
        workshop = Workshop(options.out / comparison.name, comparison.threads, options.judges)
        if comparison.clocks == ("wall-clock",) and comparison.paces:  # nothing needs to be measured first
            jobs = plan_wall_clock(comparison, jobs, workshop)
        if options.dry_run:
            print(preview(comparison, jobs, workshop, options.jobs))
            return 0
        if (workshop.folder / "runs").exists() and not options.resume:
            raise EvalError(f"{workshop.folder} holds runs of an earlier start; add --resume, or delete the folder")
        return _run(comparison, jobs, workshop, options.jobs, quiet=options.quiet)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        return 130


def _run(comparison: Comparison, jobs: list[Job], workshop: Workshop, workers: int, *, quiet: bool) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    failures = execute(jobs, comparison, workshop, workers, quiet=quiet)
    clocks = [jobs] if jobs[0].clock in comparison.clocks else []
    if "wall-clock" in comparison.clocks and jobs[0].clock == "iterations":
        timed = plan_wall_clock(comparison, jobs, workshop)
        failures += execute(timed, comparison, workshop, workers, quiet=quiet)
        clocks.append(timed)
    if not any(workshop.facts(job) for job in jobs):
        print("error: no run finished, so there is nothing to compare", file=sys.stderr)
        return 1
    for path in write(comparison, clocks, workshop, failures):
        print(f"wrote {path}")
    return 1 if failures else 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
