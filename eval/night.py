"""One bundle's night: generate, score, control, compare, and put everything that a report shows into one record.

Runs carry the night in their label, so a night that was interrupted finds its finished runs, and pictures are cached by
content, so nothing is made twice. Whatever fails becomes a row that says why; the other rows stand.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from distill.bundle import Bundle, BundleError
from eval import run as scoring
from eval.controls import invalid_metrics, run_controls
from eval.curve import step_curve
from eval.errors import EvalError
from eval.gate import AnyGate, Row, judge, overall, trade_offs
from eval.gates import CostGate, Gates, load_gates
from eval.golden import unverified
from eval.pairing import NotComparable, evidence, evidence_of, movers, require_comparable, retention, rolling
from eval.prompts import EVALUATION_SEEDS, Suite, load_suite
from eval.regression import CONFIRM, Evidence, Verdict
from eval.sources import BundleSource, Source
from eval.store import Store

Run = dict[str, Any]
ROLLING = 5
"""Accepted nights that make up the rolling history."""
ACCEPTED = (Verdict.EQUIVALENT, Verdict.IMPROVEMENT, Verdict.INCONCLUSIVE)
_ROOM = 50_000
"""Seeds between the streams of two suites; fresh panels use what the suite leaves of them."""
_SHOWN = 4
"""Samples that a report shows of each kind."""


class Watch(BaseModel):
    """A bundle to be measured every night, as nightly.yaml says it. teacher: the label of its teacher's runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: Path
    gates: str
    steps: int | None = None
    runtime: Literal["auto", "onnx", "openvino"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    teacher: str | None = None


@dataclass(frozen=True)
class Place:
    """Where a night works. samples: only the first so many of every suite, for a quick look."""

    store: Path
    cache: Path
    judges: Path
    scratch: Path
    samples: int | None = None
    quiet: bool = True


class Night:
    """Measures one bundle on one date, YYYY-MM-DD."""

    def __init__(self, watch: Watch, night: str, place: Place, store: Store) -> None:
        self.watch, self.night, self.place, self.store = watch, night, place, store
        self.gates: Gates = load_gates(watch.gates)
        self.name = watch.bundle.name
        self.failures: list[str] = []
        self.seconds: dict[str, float] = {}

    def measure(self) -> dict[str, Any]:
        """The record of the night; see ``report``."""
        started = time.monotonic()
        try:
            source = self._open(self.watch.bundle)
            self.name = source.manifest.name
        except EvalError as error:
            return self._record({}, [self._broken(gate, str(error)) for gate in self.gates.all], None, started)
        runs = self._score_all(source)
        pinned = next(iter(self.store.baselines(self.name)), None)
        baseline = self._baseline_runs(pinned)
        rows = judge(self.store, self.gates, runs, baseline, self._confirm_with(source, pinned))
        if pinned is None:
            rows = [replace(row, note=self._no_baseline()) if row.candidate else row for row in rows]
        controls = self._controls(source)
        reasons = invalid_metrics(controls)
        rows = [self._doubt(row, reasons) for row in rows]
        curve, turns = self._curve(source)
        return self._record(runs, rows, pinned, started) | {
            "controls": [asdict(control) for control in controls],
            "curve": curve,
            "turns": turns,
            "trade_offs": trade_offs(rows, self.gates.guards),
        }

    def _no_baseline(self) -> str:
        return f'there is no baseline yet; run: python -m eval.baseline pin {self.watch.bundle} --reason "…"'

    def _broken(self, gate: AnyGate, why: str) -> Row:
        return Row(gate, Verdict.BROKEN, note=why)

    def _doubt(self, row: Row, reasons: Mapping[str, str]) -> Row:
        why = reasons.get(row.gate.metric)
        if why is None or row.verdict in (Verdict.REGRESSION, Verdict.BROKEN):
            return row
        return replace(row, verdict=Verdict.INVALID, note=why)

    # --- measuring ------------------------------------------------------------------------------------------------

    def _open(self, path: Path) -> BundleSource:
        watch = self.watch
        return BundleSource(path, watch.steps, watch.threads, 32, watch.runtime, watch.precision)

    def _score_all(self, source: Source) -> dict[str, Run]:
        runs = {}
        for suite in self.gates.suites:
            try:
                runs[suite] = self._score(source, load_suite(suite), f"{self.name}, night {self.night}")
            except (EvalError, OSError, sqlite3.Error) as error:
                self.failures.append(f"{Path(suite).stem}: {error}")
        return runs

    def _score(self, source: Source, suite: Suite, label: str, *, cached: bool = True, limit: int | None = None) -> Run:
        """The finished run of this label, suite and source, else a new one."""
        total = suite.prompts.count * suite.seeds_per_prompt
        samples = min(total, self.place.samples or total, limit or total)
        samples -= samples % suite.seeds_per_prompt
        for run in self.store.runs(label=label, suite=suite.name):
            if run["source"]["identity"] == through_json(source.identity) and run["scored"] == samples:
                return run
        began = time.monotonic()
        identifier, _ = scoring.run(
            source,
            suite if cached else suite.model_copy(update={"cache": False}),
            store=self.place.store,
            samples=samples,
            label=label,
            folder=self.place.judges,
            cache=self.place.cache,
            command=f"python -m eval.nightly --night {self.night}",
            quiet=self.place.quiet,
        )
        self.seconds[f"{suite.name}: {label}"] = time.monotonic() - began
        return self.store.run(identifier)

    def _curve(self, source: BundleSource) -> tuple[list[dict[str, Any]], list[str]]:
        def at(steps: int) -> Run:
            assert self.gates.canaries is not None
            canaries = self.gates.canaries
            own = steps == source.steps
            label = f"{self.name}, night {self.night}, {'control' if own else f'{steps} steps'}"
            return self._score(source.at_steps(steps), load_suite(canaries.suite), label, limit=canaries.samples)

        try:
            curve, turns = step_curve(self.store, source, self.gates, at)
        except (EvalError, OSError, sqlite3.Error) as error:
            self.failures.append(f"steps: {error}")
            return [], []
        return [_finite(point) for point in curve], turns

    def _controls(self, source: Source) -> list[Any]:
        def score(other: Source, suite: str, samples: int | None, what: str, cached: bool) -> Run:
            label = f"{self.name}, night {self.night}, {what}"
            return self._score(other, load_suite(suite), label, cached=cached, limit=samples)

        try:
            return run_controls(self.store, source, self.gates, score, self.place.scratch)
        except (EvalError, OSError, sqlite3.Error) as error:
            self.failures.append(f"controls: {error}")
            return []

    def _baseline_runs(self, pinned: dict[str, Any] | None) -> dict[str, Run]:
        return {} if pinned is None else {suite: self.store.run(run) for suite, run in pinned["runs"].items()}

    def _confirm_with(self, source: Source, pinned: dict[str, Any] | None) -> Any:
        """A function that measures suspected gates on prompts and seeds that neither model was judged on tonight.

        None when the baseline's bundle is gone: then a regression needs more certainty from the one panel.
        """
        if pinned is None:
            return None
        try:
            Bundle.open(pinned["path"])
        except BundleError as error:
            self.failures.append(f"no second panel: {error}")
            return None

        def confirm(doubted: Sequence[AnyGate]) -> dict[str, Evidence]:
            before = self._open(Path(pinned["path"]))
            found: dict[str, Evidence] = {}
            label = f"{self.name}, night {self.night}, second panel"
            for name in dict.fromkeys(gate.suite for gate in doubted):
                gates = [gate for gate in doubted if gate.suite == name]
                try:
                    suite = fresh_panel(load_suite(name), self.night, [gate.metric for gate in gates])
                    ours, theirs = self._score(source, suite, label), self._score(before, suite, f"{label} of baseline")
                    found |= {gate.key: evidence(self.store, ours, theirs, gate.metric) for gate in gates}
                except (EvalError, OSError, sqlite3.Error) as error:
                    self.failures.append(f"second panel of {Path(name).stem}: {error}")
            return found

        return confirm

    # --- the record -----------------------------------------------------------------------------------------------

    def _record(
        self, runs: Mapping[str, Run], rows: Sequence[Row], pinned: dict[str, Any] | None, started: float
    ) -> dict[str, Any]:
        baseline = self._baseline_runs(pinned)
        earlier = [night for night in self.store.nights(self.name) if night["night"] < self.night]
        accepted = [night for night in earlier if night["verdict"] in ACCEPTED][:ROLLING]
        shown = [self._row(row, runs, baseline, accepted) for row in rows]
        verdict = overall(rows)
        if verdict in (Verdict.EQUIVALENT, Verdict.IMPROVEMENT) and any(row["drift"] for row in shown):
            verdict = Verdict.INCONCLUSIVE
        environment = environment_of(next(iter(runs.values()), None))
        before = accepted[0]["outcome"]["environment"] if accepted else {}
        return {
            "night": self.night,
            "bundle": self.name,
            "path": str(self.watch.bundle),
            "verdict": str(verdict),
            "rows": shown,
            "runs": {suite: run["id"] for suite, run in runs.items()},
            "baseline": pinned and {key: pinned[key] for key in ("pinned", "reason", "digest", "runs")},
            "controls": [],
            "trade_offs": [],
            "curve": [],
            "turns": [],
            "failures": self.failures,
            "environment": environment,
            "changes": changes(before, environment) if before and environment else [],
            "since": accepted[0]["night"] if accepted else None,
            "seconds": time.monotonic() - started,
            "cost": self.seconds,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _row(
        self, row: Row, runs: Mapping[str, Run], baseline: Mapping[str, Run], accepted: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        gate, ours = row.gate, runs.get(row.gate.suite)
        shown: dict[str, Any] = {
            "key": gate.key,
            "suite": gate.suite,
            "metric": gate.metric,
            "verdict": str(row.verdict),
            "note": row.note,
            "watched": row.watched,
            "candidate": _value(row.candidate),
            "baseline": _value(row.baseline),
            "unit": row.candidate["unit"] if row.candidate else "",
            "direction": row.candidate["direction"] if row.candidate else "higher",
            "drift": False,
        }
        if row.finding is not None:
            finding = row.finding
            shown |= {
                "change": asdict(finding.evidence),
                "p": finding.adjusted,
                "margin": finding.rule.margin,
                "mde": finding.mde,
                "suspected": finding.suspected,
                "confirmation": finding.confirmation and asdict(finding.confirmation),
            }
        if ours is None or row.candidate is None:
            return shown
        shown |= self._against_history(row, ours, accepted)
        shown["teacher"] = self._against_teacher(gate, ours)
        theirs = baseline.get(gate.suite)
        if theirs is not None and row.finding is not None and not isinstance(gate, CostGate):
            worst, best = movers(self.store, ours, theirs, gate.metric, _SHOWN)
            shown |= {"worst": worst, "best": best}
        if unverified(gate.metric, self.store.results(ours["id"])[gate.metric]["protocol"], self.place.store):
            shown["note"] = "; ".join(filter(None, (row.note, "unverified weights")))
        clean: dict[str, Any] = _finite(shown)
        return clean

    def _against_history(self, row: Row, ours: Run, accepted: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Drift: sure over all gates at one percent against the mean of the last accepted nights, and a real drop."""
        gate = row.gate
        earlier = []
        for night in accepted:
            try:
                run = self.store.run(night["outcome"]["runs"][gate.suite])
                require_comparable(self.store, ours, run, gate.metric)
                earlier.append(run)
            except (EvalError, KeyError):
                continue
        if not earlier:
            return {"drift": False}
        result, vector = rolling(self.store, earlier, gate.metric)
        tonight = self.store.results(ours["id"])[gate.metric]
        try:
            found = evidence_of(tonight, result, self.store.per_sample(ours["id"], gate.metric), vector)
        except NotComparable:
            return {"drift": False}
        threshold = row.finding.rule.threshold if row.finding else getattr(gate, "margin", np.inf) / 2
        drift = found.worse < CONFIRM / len(self.gates.all) and found.delta <= -threshold and not row.watched
        return {"drift": bool(drift), "history": asdict(found) | {"nights": len(earlier)}}

    def _against_teacher(self, gate: AnyGate, ours: Run) -> dict[str, Any] | None:
        if self.watch.teacher is None:
            return None
        run = next(iter(self.store.runs(label=self.watch.teacher, suite=Path(gate.suite).stem)), None)
        if run is None:
            return None
        try:
            found = asdict(evidence(self.store, ours, run, gate.metric))
        except NotComparable:
            return None
        kept = retention(self.store, ours, run, gate.metric)
        return found | {"retention": kept and asdict(kept)}


def fresh_panel(suite: Suite, night: str, metrics: Sequence[str]) -> Suite:
    """The suite with prompts and seeds of another stretch of its stream, chosen by the night; only these metrics.

    Stretches are as long as the suite and lie before the next suite's stream, so they repeat after as many nights as
    there are of them, and never overlap with the suite's own.
    """
    total = suite.prompts.count * suite.seeds_per_prompt
    room = max(1, min(_ROOM, EVALUATION_SEEDS.stop - suite.prompts.seed) // total - 1)
    number = 1 + datetime.fromisoformat(night).toordinal() % room
    seed = suite.prompts.seed + number * total
    draw = suite.prompts.model_copy(update={"seed": seed})
    if seed not in EVALUATION_SEEDS:
        raise EvalError(f"suite {suite.name!r} leaves no room for a fresh panel of {total} seeds; give it a lower seed")
    name = f"{suite.name}-fresh-{number}"
    kept = {metric: suite.metrics[metric] for metric in metrics}
    return suite.model_copy(update={"name": name, "prompts": draw, "metrics": kept})


def environment_of(run: Run | None) -> dict[str, Any]:
    """What a night ran on, flat, so that two nights compare key by key."""
    if run is None:
        return {}
    identity = run["source"]["identity"] or {}
    flat = {f"hardware {key}": value for key, value in run["hardware"].items()}
    flat |= {f"package {key}": value for key, value in run["versions"].items()}
    flat |= {key: identity.get(key) for key in ("runtime", "runtime_version", "precision", "device", "steps", "digest")}
    return flat | {"code": run["revision"][:12] + ("+" if run["dirty"] else "")}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words."""
    names = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{name}: {_brief(before.get(name))} → {_brief(now.get(name))}" for name in names]


def _brief(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text


def _value(result: dict[str, Any] | None) -> dict[str, Any] | None:
    return result and {key: result[key] for key in ("value", "low", "high", "n", "smallest_n")}


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that does not exist is null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def through_json(identity: dict[str, Any] | None) -> Any:
    import json

    return json.loads(json.dumps(identity))
