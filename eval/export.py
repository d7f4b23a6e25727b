"""The store as files that other tools read: Parquet or JSON, a file per table.

    python -m eval.export runs/export                                        # Parquet; pip install 'leapfrog[parquet]'
    python -m eval.export runs/export --format json --suite scenes-fid       # a JSON object per line

Tables are those of eval.store, with complete runs only: runs, results, scores (one row per run, metric and sample, in
the order of the samples), baselines and nights. Columns that hold JSON in the store are objects in JSON and text in
Parquet. A file appears under its name only when it is whole. Exit codes: 0 written, 3 impossible.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from eval.errors import EvalError, nearest
from eval.run import DEFAULT_STORE
from eval.store import Store

Format = Literal["parquet", "json"]
Row = dict[str, Any]
COLUMNS: dict[str, dict[str, type]] = {
    "runs": {
        "id": str, "label": str, "status": str, "started": str, "finished": str, "command": str, "suite": str,
        "resolved": dict, "world": str, "source": dict, "hardware": dict, "versions": dict, "revision": str,
        "dirty": int, "expected": int, "scored": int, "failed": int, "skipped": int,
    },
    "results": {
        "run": str, "metric": str, "value": float, "low": float, "high": float, "se": float, "n": int, "clusters": int,
        "direction": str, "unit": str, "smallest_n": int, "trained_on": int, "per_sample_kind": str, "protocol": dict,
        "parts": dict,
    },
    "scores": {
        "run": str, "metric": str, "position": int, "prompt_id": str, "prompt": str, "seed": int, "score": float,
    },
    "baselines": {"bundle": str, "pinned": str, "runs": dict, "digest": str, "path": str, "reason": str},
    "nights": {
        "night": str, "bundle": str, "started": str, "finished": str, "verdict": str, "alerted": int, "outcome": dict,
    },
}  # fmt: skip
"""What is written, by table: the columns of the store, every one of which may be null."""


def rows(store: Store, table: str, *, label: str | None = None, suite: str | None = None) -> Iterator[list[Row]]:
    """A table in blocks, those of runs narrowed to a label and a suite."""
    runs = store.runs(label=label, suite=suite)
    if table == "runs":
        yield runs
    elif table == "results":
        for run in runs:
            yield list(store.results(run["id"]).values())
    elif table == "scores":
        for run in runs:
            texts = store.texts(run["id"])
            for metric in store.results(run["id"]):
                numbers = store.per_sample(run["id"], metric)
                yield [
                    {
                        "run": run["id"], "metric": metric, "position": position, "prompt_id": key[0],
                        "prompt": texts[key], "seed": key[1], "score": number,
                    }
                    for position, (key, number) in enumerate(numbers.items())
                ]  # fmt: skip
    else:
        yield store.baselines() if table == "baselines" else store.nights()


def require_runs(store: Store, label: str | None, suite: str | None) -> None:
    """Raises EvalError where a label or a suite, or both together, leave no complete run."""
    for name, value in (("label", label), ("suite", suite)):
        known = {str(run[name]) for run in store.runs()}
        if value is not None and value not in known:
            raise EvalError(f"{store.path} has no complete run with --{name} {value!r}; {nearest(value, known)}")
    if label is not None and suite is not None and not store.runs(label=label, suite=suite):
        raise EvalError(f"{store.path} has no complete run of {suite} labelled {label!r}; give one of the two alone")


def _kept(table: str, block: Iterable[Row]) -> list[Row]:
    return [{name: row[name] for name in COLUMNS[table]} for row in block]


def write_json(path: Path, table: str, blocks: Iterable[list[Row]]) -> int:
    """A JSON object per line; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for block in blocks:
            for row in _kept(table, block):
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                count += 1
    return count


def write_parquet(path: Path, table: str, blocks: Iterable[list[Row]]) -> int:
    """A row group per block; returns the number of rows."""
    try:
        pa, pq = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise EvalError(
            "Parquet needs pyarrow, which is not installed; pip install 'leapfrog[parquet]', or use --format json"
        ) from None
    types = {str: pa.string(), int: pa.int64(), float: pa.float64(), dict: pa.string()}
    columns = COLUMNS[table]
    schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        for block in blocks:
            kept = [
                {name: json.dumps(row[name], sort_keys=True) if kind is dict else row[name]
                 for name, kind in columns.items()}
                for row in _kept(table, block)
            ]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(kept, schema=schema))
            count += len(kept)
    return count


WRITERS: dict[Format, tuple[str, Callable[[Path, str, Iterable[list[Row]]], int]]] = {
    "parquet": ("parquet", write_parquet),
    "json": ("jsonl", write_json),
}


def export(
    store: Store, folder: Path, form: Format = "parquet", *, label: str | None = None, suite: str | None = None
) -> dict[str, int]:
    """Write every table to the folder; returns the number of rows by file name."""
    ending, write = WRITERS[form]
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for table in COLUMNS:
        path = folder / f"{table}.{ending}"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            written[path.name] = write(temporary, table, rows(store, table, label=label, suite=suite))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the files go; files of the same names are replaced")
    parser.add_argument("--format", choices=get_args(Format), default="parquet", help="default: %(default)s")
    parser.add_argument("--label", help="only runs of this label")
    parser.add_argument("--suite", help="only runs of this suite")
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        if not args.store.is_file():
            raise EvalError(f"{args.store} is missing; score something first with python -m eval.run")
        if args.folder.exists() and not args.folder.is_dir():
            raise EvalError(f"{args.folder} is a file; give a folder")
        with Store(args.store) as store:
            require_runs(store, args.label, args.suite)
            written = export(store, args.folder, args.format, label=args.label, suite=args.suite)
    except (EvalError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(f"wrote to {args.folder}: " + ", ".join(f"{name} ({count:,})" for name, count in written.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
