"""Compare two sets of runs by the gates of a bundle, and end with a code that a script can act on.

    python -m eval.gate "AMD, 4 steps" "DMD2, 4 steps" --gates scenes-sdxl
    python -m eval.gate 20261123-193347-29b755ff 20261123-193421-b4fbe5fb --gates scenes-sdxl --strict

Candidate and baseline are labels (the newest complete run of each suite counts) or ids of runs. Without a second panel
a regression needs certainty over all gates at 1 %. Exit codes: 0 pass, 1 regression, 2 inconclusive (with --strict),
3 incomplete or broken, 4 not comparable.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.errors import EvalError
from eval.gates import CostGate, Gates, Guard, ScoreGate, load_gates
from eval.pairing import NotComparable, evidence
from eval.regression import Evidence, Finding, Rule, Verdict, decide, exit_code, suspects
from eval.run import DEFAULT_STORE
from eval.store import Store

Run = dict[str, Any]
AnyGate = ScoreGate | CostGate
Confirm = Callable[[Sequence[AnyGate]], Mapping[str, Evidence]]
"""Measures suspected gates on a fresh panel; a gate that it leaves out could not be measured."""
GUARD = 0.05
"""Level at which a guard calls a gain a gain and a loss a loss; it wakes nobody, so nothing is corrected."""


@dataclass(frozen=True)
class Row:
    """One gate judged. watched: shown and guarded only, as training used this score. note: why there is no more."""

    gate: AnyGate
    verdict: Verdict
    finding: Finding | None = None
    candidate: dict[str, Any] | None = None
    baseline: dict[str, Any] | None = None
    watched: bool = False
    note: str = ""


def judge(
    store: Store,
    gates: Gates,
    candidate: Mapping[str, Run],
    baseline: Mapping[str, Run],
    confirm: Confirm | None = None,
) -> list[Row]:
    """Every gate with a verdict. candidate, baseline: runs by suite; a missing candidate is broken."""
    rows: dict[str, Row] = {}
    found: dict[str, tuple[AnyGate, Evidence, Rule]] = {}
    for gate in gates.all:
        ours, theirs = candidate.get(gate.suite), baseline.get(gate.suite)
        results = [store.results(run["id"]).get(gate.metric) if run else None for run in (ours, theirs)]
        watched = bool(results[0] and results[0]["trained_on"])
        row = Row(gate, Verdict.BROKEN, None, results[0], results[1], watched)
        if ours is None or results[0] is None:
            rows[gate.key] = _with(row, note="the candidate has no complete run with this metric")
        elif theirs is None or results[1] is None:
            rows[gate.key] = _with(row, Verdict.NOT_COMPARABLE, note="the baseline has no run with this metric")
        else:
            try:
                measured = evidence(store, ours, theirs, gate.metric)
            except NotComparable as error:
                rows[gate.key] = _with(row, Verdict.NOT_COMPARABLE, note=str(error))
                continue
            rows[gate.key] = row
            found[gate.key] = gate, measured, _rule(gate, float(results[1]["value"]))
    counted = {key: value for key, value in found.items() if not rows[key].watched}
    for key, finding in _decide(counted, confirm).items():
        note = "a drop that the second panel did not confirm" if _unconfirmed(finding) else ""
        rows[key] = _with(rows[key], finding.verdict, finding, note)
    for key in found.keys() - counted.keys():
        _, measured, rule = found[key]
        (finding,) = decide([measured], [rule], [None])
        rows[key] = _with(rows[key], finding.verdict, finding, "training used this score, so it does not count")
    return [rows[gate.key] for gate in gates.all]


def _with(row: Row, verdict: Verdict | None = None, finding: Finding | None = None, note: str = "") -> Row:
    return Row(row.gate, verdict or row.verdict, finding, row.candidate, row.baseline, row.watched, note)


def _rule(gate: AnyGate, baseline: float) -> Rule:
    if isinstance(gate, CostGate):
        return Rule.of_cost(baseline, gate.percent, gate.floor)
    return Rule.of_score(gate.margin)


def _decide(found: Mapping[str, tuple[AnyGate, Evidence, Rule]], confirm: Confirm | None) -> dict[str, Finding]:
    if not found:
        return {}
    gates, measured, rules = zip(*found.values(), strict=True)
    second: list[Evidence | None] | None = None
    if confirm is not None:
        doubted = [gate for gate, doubt in zip(gates, suspects(measured, rules), strict=True) if doubt]
        answers = confirm(doubted) if doubted else {}
        second = [answers.get(key) for key in found]
    return dict(zip(found, decide(measured, rules, second), strict=True))


def _unconfirmed(finding: Finding) -> bool:
    return finding.suspected and finding.verdict is not Verdict.REGRESSION


def trade_offs(rows: Sequence[Row], guards: Sequence[Guard]) -> list[str]:
    """What was gained at the price of what, in words, for every guard that fires."""
    by_key = {row.gate.key: row for row in rows}
    fired = []
    for guard in guards:
        up, down = by_key[guard.up].finding, by_key[guard.down].finding
        if up is None or down is None or up.evidence.better >= GUARD or down.evidence.worse >= GUARD:
            continue
        fired.append(f"{guard.up} is up while {guard.down} is down: {guard.because}")
    return fired


def resolve(store: Store, name: str, suites: Sequence[str]) -> dict[str, Run]:
    """Runs by suite: the one with this id, else the newest of this label. Raises EvalError when there is none."""
    with suppress(EvalError):
        run = store.run(name)
        return {suite: run for suite in suites if Path(suite).stem == run["suite"]}
    runs = {suite: next(iter(store.runs(label=name, suite=Path(suite).stem)), None) for suite in suites}
    found = {suite: run for suite, run in runs.items() if run is not None}
    if not found:
        raise EvalError(f"{store.path} has no complete run with id or label {name!r}; score it with python -m eval.run")
    return found


def overall(rows: Sequence[Row]) -> Verdict:
    """The verdict of all gates that count: the worst one, improvement when nothing is worse than equivalent."""
    order = (
        Verdict.REGRESSION,
        Verdict.BROKEN,
        Verdict.INVALID,
        Verdict.NOT_COMPARABLE,
        Verdict.INCONCLUSIVE,
        Verdict.IMPROVEMENT,
        Verdict.EQUIVALENT,
    )
    seen = {row.verdict for row in rows if not row.watched}
    return next((verdict for verdict in order if verdict in seen), Verdict.BROKEN)


def describe(row: Row) -> str:
    """One line: verdict, values, change with its interval, what would have been seen."""
    head = f"{row.verdict:14} {row.gate.key:28}"
    finding = row.finding
    if finding is None or row.candidate is None or row.baseline is None:
        return f"{head} {row.note}"
    sign = 1 if row.candidate["direction"] == "higher" else -1
    low, high = sorted((sign * finding.evidence.low, sign * finding.evidence.high))
    digits = decimals(finding.evidence.se or abs(finding.rule.margin))
    line = f"{head} {row.baseline['value']:.{digits}f} to {row.candidate['value']:.{digits}f} {row.candidate['unit']}"
    line += f"  change {sign * finding.evidence.delta:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    line += f"  p {finding.adjusted:.2g}  margin {finding.rule.margin:.3g}  detectable {finding.mde:.2g}"
    return line + (f"  ({row.note})" if row.note else "")


def decimals(size: float) -> int:
    """Decimals that show two figures of a number of this size."""
    return 2 if not size > 0 or not math.isfinite(size) else min(6, max(0, 1 - math.floor(math.log10(size))))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("candidate", help="a label or the id of a run")
    parser.add_argument("baseline", help="a label or the id of a run")
    parser.add_argument("--gates", required=True, help="a name from eval/gates or the path of a YAML file")
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    parser.add_argument("--strict", action="store_true", help="end with 2 when a gate is inconclusive")
    args = parser.parse_args(arguments)
    try:
        gates = load_gates(args.gates)
        if not args.store.is_file():
            raise EvalError(f"{args.store} is missing; score something first with python -m eval.run")
        with Store(args.store) as store:
            candidate, baseline = (resolve(store, name, gates.suites) for name in (args.candidate, args.baseline))
            rows = judge(store, gates, candidate, baseline)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    for warning in trade_offs(rows, gates.guards):
        print(f"suspicious trade-off: {warning}")
    for row in rows:
        print(describe(row))
    print(f"verdict: {overall(rows)}")
    return exit_code((row.verdict for row in rows if not row.watched), strict=args.strict)


if __name__ == "__main__":
    raise SystemExit(main())
