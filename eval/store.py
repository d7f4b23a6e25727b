"""The store: one SQLite file (WAL) that holds every run and all that is needed to trust it later.

    runs      id, label, status (running | complete | failed), error, started, finished (UTC, ISO 8601), command,
              suite, resolved_json (the suite in full), world, source_json (name; identity: kind, digest, runtime,
              steps, guidance …; about: path, provenance …), hardware_json, versions_json, revision, dirty (the code
              differed from the revision), expected, scored, failed, skipped (numbers of samples: judged by every
              metric; of the batch that a metric could not judge; never made, because the run had ended)
    samples   run, position, prompt_id, prompt, seed: one row per sample in order
    results   run, metric, value, low, high, se, n, clusters, direction, unit, smallest_n, trained_on,
              per_sample_kind (value | influence), protocol_json, parts_json
    scores    run, metric, vector: one float64 per sample in the order of samples, little-endian
    baselines bundle, pinned (UTC), runs_json (run by suite), digest, path (a copy of the bundle), reason: history, the
              newest row per bundle counts
    nights    night (UTC date), bundle, started, finished, verdict, alerted (somebody was told), outcome_json (all that
              a report shows); a night that is made again replaces its row

A run is `running` until results, samples and scores are written, in one transaction that also makes it `complete`. A
process that dies leaves a `running` row, which nothing reads as a result. Several processes may write at once.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from eval.errors import EvalError
from eval.metrics.base import Score
from eval.prompts import Prompt

VERSION = 3
_PATIENCE = 30.0
"""Seconds to wait for another process that writes."""
_SCHEMA = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY, label TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('running', 'complete', 'failed')), error TEXT,
    started TEXT NOT NULL, finished TEXT, command TEXT NOT NULL,
    suite TEXT NOT NULL, resolved_json TEXT NOT NULL, world TEXT NOT NULL, source_json TEXT NOT NULL,
    hardware_json TEXT NOT NULL, versions_json TEXT NOT NULL, revision TEXT NOT NULL, dirty INTEGER NOT NULL,
    expected INTEGER NOT NULL, scored INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0,
    CHECK (status != 'complete' OR (finished IS NOT NULL AND scored + failed = expected))
);
CREATE TABLE samples (
    run TEXT NOT NULL REFERENCES runs (id), position INTEGER NOT NULL, prompt_id TEXT NOT NULL, prompt TEXT NOT NULL,
    seed INTEGER NOT NULL, PRIMARY KEY (run, position)
) WITHOUT ROWID;
CREATE TABLE results (
    run TEXT NOT NULL REFERENCES runs (id), metric TEXT NOT NULL, value REAL NOT NULL, low REAL, high REAL, se REAL,
    n INTEGER NOT NULL, clusters INTEGER NOT NULL, direction TEXT NOT NULL, unit TEXT NOT NULL,
    smallest_n INTEGER NOT NULL, trained_on INTEGER NOT NULL, per_sample_kind TEXT NOT NULL,
    protocol_json TEXT NOT NULL, parts_json TEXT NOT NULL, PRIMARY KEY (run, metric)
) WITHOUT ROWID;
CREATE TABLE scores (
    run TEXT NOT NULL REFERENCES runs (id), metric TEXT NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (run, metric)
);
CREATE INDEX runs_by_suite ON runs (suite, status, finished);
"""
_SECOND = """
CREATE TABLE baselines (
    bundle TEXT NOT NULL, pinned TEXT NOT NULL, runs_json TEXT NOT NULL, digest TEXT NOT NULL, path TEXT NOT NULL,
    reason TEXT NOT NULL, PRIMARY KEY (bundle, pinned)
) WITHOUT ROWID;
CREATE TABLE nights (
    night TEXT NOT NULL, bundle TEXT NOT NULL, started TEXT NOT NULL, finished TEXT NOT NULL, verdict TEXT NOT NULL,
    alerted INTEGER NOT NULL, outcome_json TEXT NOT NULL, PRIMARY KEY (night, bundle)
) WITHOUT ROWID;
"""
_THIRD = "ALTER TABLE runs ADD COLUMN skipped INTEGER NOT NULL DEFAULT 0"
_UPGRADES = (_SCHEMA, _SECOND, _THIRD)
"""Entry v takes a store of version v to v + 1."""


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before it starts; the columns of `runs` with their JSON still as objects."""

    label: str
    command: str
    suite: str
    suite_resolved: dict[str, Any]
    world: str
    source: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]
    revision: str
    dirty: bool
    expected: int


class Store:
    """Use as a context manager. Raises EvalError for a file that is no store or of another version."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._enter_wal()
            self._db.execute("PRAGMA foreign_keys = ON")
            self._migrate()
        except (sqlite3.DatabaseError, OSError) as error:
            raise EvalError(f"{self.path} cannot be used as a store: {error}; give another --store") from None

    def _enter_wal(self) -> None:
        """Two processes that make one new file: SQLite refuses the later switch at once instead of waiting for it."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.01)

    def _migrate(self) -> None:
        with self._transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise EvalError(f"{self.path} has schema version {version}; this version of Leapfrog reads {VERSION}")
            for statement in ";".join(_UPGRADES[version:]).split(";"):
                self._db.execute(statement)
            if version < VERSION:
                self._db.execute(f"PRAGMA user_version = {VERSION}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def begin(self, info: RunInfo) -> str:
        """Enter a run as `running` and return its id."""
        run = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"
        row = {
            "id": run, "label": info.label, "status": "running", "started": _now(), "command": info.command,
            "suite": info.suite, "resolved_json": _json(info.suite_resolved), "world": info.world,
            "source_json": _json(info.source), "hardware_json": _json(info.hardware),
            "versions_json": _json(info.versions), "revision": info.revision, "dirty": int(info.dirty),
            "expected": info.expected,
        }  # fmt: skip
        self._insert("runs", [row])
        return run

    def fail(self, run: str, error: str, *, scored: int = 0, failed: int = 0) -> None:
        """Say why a run ended without results, and how far it came; what it never reached was skipped."""
        self._db.execute(
            "UPDATE runs SET status = 'failed', error = ?, finished = ?, scored = ?, failed = ?, "
            "skipped = expected - ? WHERE id = ? AND status = 'running'",
            (error, _now(), scored, failed, scored + failed, run),
        )

    def complete(self, run: str, prompts: Sequence[Prompt], scores: Sequence[Score]) -> None:
        """Write everything that was measured and make the run complete, all or nothing.

        Raises EvalError for a score that is NaN or does not cover every sample.
        """
        for score in scores:
            if score.check().n != len(prompts):
                raise EvalError(f"{score.metric} scored {score.n} of {len(prompts)} samples; nothing was stored")
        with self._transaction():
            self._insert(
                "samples",
                [
                    {"run": run, "position": i, "prompt_id": p.id, "prompt": p.text, "seed": p.seed}
                    for i, p in enumerate(prompts)
                ],
            )
            self._insert("results", [_result_row(run, score) for score in scores])
            vectors = [(score.metric, score.per_sample.astype("<f8").tobytes()) for score in scores]
            self._insert("scores", [{"run": run, "metric": name, "vector": vector} for name, vector in vectors])
            done = self._db.execute(
                "UPDATE runs SET status = 'complete', finished = ?, scored = ? WHERE id = ? AND status = 'running'",
                (_now(), len(prompts), run),
            )
            if done.rowcount != 1:
                raise EvalError(f"run {run} is not running in {self.path}; start it again")

    def _insert(self, table: str, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            names = list(rows[0])
            marks = ", ".join(f":{name}" for name in names)
            self._db.executemany(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks})", rows)

    def runs(self, *, label: str | None = None, suite: str | None = None) -> list[dict[str, Any]]:
        """Complete runs, newest first, JSON decoded."""
        query = "SELECT * FROM runs WHERE status = 'complete'"
        values = [value for value in (label, suite) if value is not None]
        query += " AND label = ?" * (label is not None) + " AND suite = ?" * (suite is not None)
        rows = self._db.execute(query + " ORDER BY finished DESC, id DESC", values)
        return [_decode(row) for row in rows]

    def run(self, run: str) -> dict[str, Any]:
        """One complete run, JSON decoded. Raises EvalError for one that is missing or not complete."""
        row = self._db.execute("SELECT * FROM runs WHERE id = ? AND status = 'complete'", (run,)).fetchone()
        if row is None:
            raise EvalError(f"{self.path} has no complete run {run!r}; give the id of one that is")
        return _decode(row)

    def failures(self, suite: str | None = None) -> list[dict[str, Any]]:
        """Runs that ended without results, newest first, JSON decoded."""
        where, values = (" AND suite = ?", [suite]) if suite is not None else ("", [])
        rows = self._db.execute(f"SELECT * FROM runs WHERE status = 'failed'{where} ORDER BY finished DESC", values)
        return [_decode(row) for row in rows]

    def status(self, run: str) -> str:
        row = self._db.execute("SELECT status FROM runs WHERE id = ?", (run,)).fetchone()
        if row is None:
            raise EvalError(f"run {run!r} is not in {self.path}; give the id of one that is")
        return str(row["status"])

    def results(self, run: str) -> dict[str, dict[str, Any]]:
        """Results of a run by metric, JSON decoded."""
        rows = self._db.execute("SELECT * FROM results WHERE run = ?", (run,))
        return {row["metric"]: _decode(row) for row in rows}

    def per_sample(self, run: str, metric: str) -> dict[tuple[str, int], float]:
        """A metric's numbers by (prompt id, seed)."""
        row = self._db.execute("SELECT vector FROM scores WHERE run = ? AND metric = ?", (run, metric)).fetchone()
        if row is None:
            raise EvalError(f"run {run} has no scores of {metric!r}; score it with a suite that names the metric")
        vector: NDArray[np.float64] = np.frombuffer(row["vector"], dtype="<f8")
        keys = self._db.execute("SELECT prompt_id, seed FROM samples WHERE run = ? ORDER BY position", (run,))
        return {(str(k["prompt_id"]), int(k["seed"])): float(v) for k, v in zip(keys, vector, strict=True)}

    def texts(self, run: str) -> dict[tuple[str, int], str]:
        """The prompts of a run's samples by (prompt id, seed), in order."""
        rows = self._db.execute("SELECT prompt_id, seed, prompt FROM samples WHERE run = ? ORDER BY position", (run,))
        return {(str(r["prompt_id"]), int(r["seed"])): str(r["prompt"]) for r in rows}

    def pin(self, bundle: str, runs: dict[str, str], digest: str, path: str, reason: str) -> None:
        """Make these runs, one per suite, the baseline of a bundle from now on."""
        row = {"bundle": bundle, "pinned": _now(), "runs_json": _json(runs), "digest": digest, "path": path}
        self._insert("baselines", [{**row, "reason": reason}])

    def baselines(self, bundle: str | None = None) -> list[dict[str, Any]]:
        """Pinned baselines, newest first, JSON decoded."""
        where, values = (" WHERE bundle = ?", [bundle]) if bundle is not None else ("", [])
        rows = self._db.execute(f"SELECT * FROM baselines{where} ORDER BY pinned DESC", values)
        return [_decode(row) for row in rows]

    def keep_night(self, night: str, bundle: str, started: str, verdict: str, outcome: dict[str, Any]) -> None:
        """Enter the outcome of a bundle's night, replacing an earlier one of the same night."""
        row = {"night": night, "bundle": bundle, "started": started, "finished": _now(), "verdict": verdict}
        with self._transaction():
            self._db.execute("DELETE FROM nights WHERE night = ? AND bundle = ?", (night, bundle))
            self._insert("nights", [{**row, "alerted": 0, "outcome_json": _json(outcome)}])

    def mark_alerted(self, night: str, bundle: str) -> None:
        """Somebody was told about this night."""
        self._db.execute("UPDATE nights SET alerted = 1 WHERE night = ? AND bundle = ?", (night, bundle))

    def nights(self, bundle: str | None = None) -> list[dict[str, Any]]:
        """Finished nights, newest first, JSON decoded."""
        where, values = (" WHERE bundle = ?", [bundle]) if bundle is not None else ("", [])
        rows = self._db.execute(f"SELECT * FROM nights{where} ORDER BY night DESC, bundle", values)
        return [_decode(row) for row in rows]


def _result_row(run: str, score: Score) -> dict[str, Any]:
    interval = score.interval
    return {
        "run": run, "metric": score.metric, "value": score.value, "low": _finite(interval.low),
        "high": _finite(interval.high), "se": _finite(interval.se), "n": score.n, "clusters": interval.n,
        "direction": score.direction, "unit": score.unit, "smallest_n": score.smallest_n,
        "trained_on": int(score.trained_on), "per_sample_kind": score.per_sample_kind,
        "protocol_json": _json(score.protocol), "parts_json": _json(score.parts),
    }  # fmt: skip


def _finite(value: float) -> float | None:
    """NaN means that there is no such number (an interval from one prompt), which SQL calls NULL."""
    return value if math.isfinite(value) else None


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _decode(row: sqlite3.Row) -> dict[str, Any]:
    return {
        name.removesuffix("_json"): json.loads(value) if name.endswith("_json") else value
        for name, value in dict(row).items()
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
