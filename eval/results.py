"""Render the result tables of docs/results.md from the store.

    python -m eval.results
    python -m eval.results --store runs/eval/scores.sqlite --tables eval/tables.yaml --out docs/results.md

Tables are described in eval/tables.yaml: rows are labels of runs, columns are metrics of suites, pairs are differences.
Text outside the two marker lines of the file is left alone. A cell without a complete run shows a dash.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from eval.errors import EvalError
from eval.pairing import COSTS, require_comparable
from eval.run import DEFAULT_STORE
from eval.statistics import Difference, influence_difference, paired_difference
from eval.store import Store

BEGIN, END = "<!-- scores: begin, made by python -m eval.results -->", "<!-- scores: end -->"
Run = dict[str, Any]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(_Strict):
    title: str
    suite: str
    metric: str
    digits: int = 2


class Table(_Strict):
    """rows: labels, top to bottom. pairs: (a, b) for the differences a − b, of the metrics in columns."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    pairs: tuple[tuple[str, str], ...] = ()


def load_tables(path: Path) -> list[Table]:
    try:
        return [Table.model_validate(item) for item in yaml.safe_load(path.read_text())]
    except (OSError, yaml.YAMLError, ValidationError, TypeError) as error:
        raise EvalError(f"{path} describes no tables: {error}; see eval/tables.yaml") from None


def render(store: Store, table: Table) -> str:
    """One table with its differences and the runs it rests on, as Markdown."""
    runs = {(row, suite): _newest(store, row, suite) for row in table.rows for suite in _suites(table)}
    if not any(runs.values()):
        return f"## {table.title}\n\nNothing has been scored yet."
    lines = [f"## {table.title}", "", _row("", [c.title for c in table.columns]), _rule(len(table.columns))]
    lines += [_row(row, [_cell(store, runs[row, c.suite], c) for c in table.columns]) for row in table.rows]
    lines += ["", _legend(), "", _differences(store, table, runs), "", _provenance(table, runs)]
    return "\n".join(lines)


def _suites(table: Table) -> tuple[str, ...]:
    return tuple(dict.fromkeys(column.suite for column in table.columns))


def _newest(store: Store, label: str, suite: str) -> Run | None:
    return next(iter(store.runs(label=label, suite=suite)), None)


def _row(head: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join((head, *cells))} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * (columns + 1)


def _legend() -> str:
    return (
        "Brackets hold 95 % intervals: Wilson for accuracies, a studentised bootstrap over prompts for other means, "
        "influence functions for distances (reference held fixed), order statistics for times. ↑ higher is better, "
        "↓ lower is better. † this reward was trained on. ‡ fewer samples than the metric needs to be reported."
    )


def _cell(store: Store, run: Run | None, column: Column) -> str:
    result = store.results(run["id"]).get(column.metric) if run else None
    if result is None:
        return "–"
    digits = column.digits
    text = f"{result['value']:.{digits}f}"
    if result["low"] is not None:
        text += f" [{result['low']:.{digits}f}, {result['high']:.{digits}f}]"
    text += " ↑" if result["direction"] == "higher" else " ↓"
    text += " †" if result["trained_on"] else ""
    return text + (" ‡" if result["n"] < result["smallest_n"] else "")


def difference(store: Store, a: Run, b: Run, metric: str) -> Difference:
    """a − b of a metric, paired by (prompt, seed). Raises EvalError for results that cannot be compared."""
    require_comparable(store, a, b, metric)
    ours, theirs = store.results(a["id"])[metric], store.results(b["id"])[metric]
    left, right = store.per_sample(a["id"], metric), store.per_sample(b["id"], metric)
    try:
        if ours["per_sample_kind"] == "influence":
            return influence_difference(ours["value"], theirs["value"], left, right)
        return paired_difference(left, right)
    except ValueError as error:
        raise EvalError(f"not comparable: {error}") from None


def _differences(store: Store, table: Table, runs: dict[tuple[str, str], Run | None]) -> str:
    columns = [column for column in table.columns if column.metric not in COSTS]
    lines = [_row("difference", [column.title for column in columns]), _rule(len(columns))]
    for first, second in table.pairs:
        cells = [_difference_cell(store, runs[first, c.suite], runs[second, c.suite], c) for c in columns]
        lines.append(_row(f"{first} − {second}", cells))
    head = "Paired by prompt and seed, with 95 % intervals; **bold** where the interval excludes 0.\n\n"
    return head + "\n".join(lines) if table.pairs else ""


def _difference_cell(store: Store, a: Run | None, b: Run | None, column: Column) -> str:
    if not a or not b or any(column.metric not in store.results(run["id"]) for run in (a, b)):
        return "–"
    try:
        found = difference(store, a, b, column.metric).interval
    except EvalError as error:
        return str(error)
    digits = column.digits
    text = f"{found.value:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def _provenance(table: Table, runs: dict[tuple[str, str], Run | None]) -> str:
    lines = ["<details><summary>Runs: samples, seeds, weights, code and commands</summary>", ""]
    lines += [
        "| row | suite | samples | evaluation seeds | training seed | weights | code | machine | command |",
        _rule(8),
    ]
    for (row, suite), run in runs.items():
        if run is None:
            continue
        about, identity = run["source"]["about"], run["source"]["identity"] or {}
        seed = about.get("provenance", {}).get("recipe", {}).get("seed", "–")
        draw = run["resolved"]["prompts"]["seed"]
        cells = [
            suite,
            str(run["scored"]),
            f"{draw} … {draw + run['scored'] - 1}",
            str(seed),
            str(identity.get("digest", about.get("url", about.get("path", "–"))))[:12],
            run["revision"][:10] + ("+" if run["dirty"] else ""),
            f"{run['hardware']['cores']} × {run['hardware']['processor']}",
            f"`{run['command']}`",
        ]
        lines.append(_row(row, cells))
    return "\n".join([*lines, "", "</details>"])


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the markers; a file without them gets them at its end."""
    old = path.read_text() if path.exists() else "# Results\n"
    block = f"{BEGIN}\n\n{text}\n\n{END}"
    before, found, rest = old.partition(BEGIN)
    if not found:
        new = f"{old.rstrip()}\n\n{block}\n"
    elif END in rest:
        new = before + block + rest.split(END, 1)[1]
    else:
        raise EvalError(f"{path} has the line {BEGIN!r} but not {END!r}; put it back or delete both")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(new)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    parser.add_argument(
        "--tables", type=Path, default=Path(__file__).parent / "tables.yaml", help="default: eval/tables.yaml"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        if not args.store.is_file():
            raise EvalError(f"{args.store} is missing; score something first with python -m eval.run")
        with Store(args.store) as store:
            text = "\n\n".join(render(store, table) for table in load_tables(args.tables))
        write_between_markers(args.out, text)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
