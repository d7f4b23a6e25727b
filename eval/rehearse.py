"""Nights that never were: clean ones must raise no alarm, and each planted damage must be named by the right metric.

    python -m eval.rehearse bundles/digits-sit --suite digits-canary --gates digits-sit --nights 20
    python -m eval.rehearse bundles/scenes-wan --suite scenes-wan-canary --gates scenes-wan --folder runs/rehearsal

A clean night measures the same bundle with noise of 0.0005 standard deviations on its weights, another one every night:
pictures differ, quality does not. A damaged night measures it with one damage of eval.damage. Both are judged as real
nights are, by the gates' margins and with a second panel of fresh prompts and seeds; only the suite is smaller. What a
damage must do to which metric stands in the gates, under canaries and rehearsed. With --folder a stopped rehearsal goes
on where it was. Exit codes: 0 no false alarm and every stated effect seen, 1 otherwise, 3 it could not be measured, 130
interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from eval import judges
from eval import run as scoring
from eval.damage import damage_weights, damaged, noised
from eval.errors import EvalError, nearest
from eval.gate import AnyGate, judge
from eval.gates import Canary, Gates, load_gates
from eval.night import fresh_panel, through_json
from eval.pairing import evidence
from eval.prompts import Suite, load_suite
from eval.regression import Evidence, Verdict
from eval.sources import BundleSource, Source
from eval.statistics import wilson
from eval.store import Store

CLEAN = 0.0005
"""Noise on the weights of a clean night, in standard deviations of each matrix."""
_EPOCH, _PANELS = "2026-01-{:02}", 14
"""Panels are chosen by a night's date: two for each of 14 clean nights in turn, and two for damaged ones."""


@dataclass(frozen=True)
class Judged:
    """One night. changes: by metric, positive is worse. red: the metrics that regressed, suspected: those looked at
    again. watched: those that training used as a reward, which turn nothing red."""

    name: str
    changes: dict[str, float]
    red: tuple[str, ...]
    suspected: tuple[str, ...]
    watched: tuple[str, ...] = ()


class Rehearsal:
    """Measures one bundle against copies of itself. samples: of every panel."""

    def __init__(self, source: BundleSource, suite: Suite, gates: Gates, folder: Path, samples: int | None,
                 judges_folder: Path) -> None:  # fmt: skip
        self.source, self.suite, self.folder, self.samples, self.judges = source, suite, folder, samples, judges_folder
        scores = tuple(
            gate.model_copy(update={"suite": suite.name})
            for gate in {gate.metric: gate for gate in gates.scores}.values()
            if gate.metric in suite.metrics
        )
        if not scores:
            raise EvalError(f"suite {suite.name} scores nothing that the gates judge; name another suite")
        self.gates = Gates(scores=scores)

    def night(self, name: str, other: Callable[[], Source], number: int) -> Judged:
        """One night of ``other`` against the bundle, on a panel and, if anything is suspected, on a second one."""
        days = (_EPOCH.format(2 * number + 1), _EPOCH.format(2 * number + 2))
        first, second = (fresh_panel(self._gated(), day, self._metrics) for day in days)
        there = other()
        with Store(self.folder / "rehearsal.sqlite") as store:
            ours, theirs = self._score(store, there, first, name), self._score(store, self.source, first, "baseline")

            def confirm(doubted: Sequence[AnyGate]) -> dict[str, Evidence]:
                again = self._score(store, there, second, name), self._score(store, self.source, second, "baseline")
                return {gate.key: evidence(store, *again, gate.metric) for gate in doubted}

            rows = judge(store, self.gates, {self.suite.name: ours}, {self.suite.name: theirs}, confirm)
        found = {row.gate.metric: row.finding for row in rows if row.finding is not None}
        return Judged(
            name,
            {metric: -finding.evidence.delta for metric, finding in found.items()},
            tuple(row.gate.metric for row in rows if row.verdict is Verdict.REGRESSION),
            tuple(metric for metric, finding in found.items() if finding.suspected),
            tuple(row.gate.metric for row in rows if row.watched),
        )

    def clean(self, number: int) -> Judged:
        def make() -> Source:
            path = damage_weights(self.source.path, self.folder / "clean", noised(CLEAN, seed=number + 1))
            return self.source.reopened(path)

        return self.night(f"clean {number + 1}", make, number % _PANELS)

    def planted(self, damage: str) -> Judged:
        return self.night(damage, lambda: damaged(self.source, damage, self.folder), _PANELS)

    @property
    def _metrics(self) -> list[str]:
        return [gate.metric for gate in self.gates.scores]

    def _gated(self) -> Suite:
        prompts = self.suite.prompts
        count = prompts.count if self.samples is None else min(prompts.count, self.samples)
        return self.suite.model_copy(update={"prompts": prompts.model_copy(update={"count": count})})

    def _score(self, store: Store, source: Source, panel: Suite, label: str) -> dict[str, object]:
        known, wanted = panel.model_dump(mode="json"), through_json(source.identity)
        for run in store.runs(label=label, suite=panel.name):
            if run["resolved"] == known and run["source"]["identity"] == wanted:
                return run
        identifier, _ = scoring.run(
            source, panel, store=store.path, label=label, folder=self.judges, cache=self.folder / "samples", quiet=True
        )
        return store.run(identifier)


def expected(gates: Gates, only: Sequence[str] | None) -> tuple[Canary, ...]:
    """Every damage that the gates state an effect of; only: these. Raises EvalError when one is not stated."""
    stated = (*(gates.canaries.expect if gates.canaries else ()), *gates.rehearsed)
    unknown = next((name for name in only or () if name not in {canary.damage for canary in stated}), None)
    if unknown is not None:
        raise EvalError(f"--damage is {unknown!r}; {nearest(unknown, {canary.damage for canary in stated})}")
    return tuple(canary for canary in stated if not only or canary.damage in only)


def seen(judged: Judged, canary: Canary) -> bool:
    """Whether the stated metric turned red, or is one that is only watched, by at least the stated effect."""
    return canary.metric in (*judged.red, *judged.watched) and judged.changes[canary.metric] >= canary.at_least


@contextlib.contextmanager
def kept(folder: Path | None) -> Iterator[Path]:
    """The folder of a rehearsal: the given one, or one that is gone afterwards."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="leapfrog-rehearsal-") as temporary:
            yield Path(temporary)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def describe(judged: Judged) -> str:
    changes = ", ".join(f"{metric} worse by {change:.4g}" for metric, change in judged.changes.items())
    return f"{judged.name:24} red: {', '.join(judged.red) or 'nothing':24} {changes}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.rehearse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--suite", required=True, help="a small one, with the gates' metrics")
    parser.add_argument("--gates", required=True)
    parser.add_argument("--nights", type=int, default=20, help="clean ones; default: %(default)s")
    parser.add_argument(
        "--damage", action="append", help="only this one, of those whose effect the gates state; give several"
    )
    parser.add_argument("--samples", type=int, help="prompts of every panel; default: the suite's")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--judges", type=Path, default=judges.DEFAULT_FOLDER, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where to keep what was measured, to go on with; default: nowhere")
    args = parser.parse_args(arguments)
    try:
        source = BundleSource(args.bundle, args.steps, args.threads)
        with kept(args.folder) as folder:
            gates, suite = load_gates(args.gates), load_suite(args.suite)
            canaries = [c for c in expected(gates, args.damage) if c.metric in suite.metrics]
            damages = tuple(dict.fromkeys(canary.damage for canary in canaries))
            rehearsal = Rehearsal(source, suite, gates, folder, args.samples, args.judges)
            nights = [rehearsal.clean(number) for number in tqdm(range(args.nights), desc="clean", unit="night")]
            planted = {name: rehearsal.planted(name) for name in tqdm(damages, desc="damaged", unit="night")}
    except (EvalError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept where --folder was given", file=sys.stderr)
        return 130
    for judged in (*nights, *planted.values()):
        print(describe(judged))
    alarms, looks = sum(bool(night.red) for night in nights), sum(bool(night.suspected) for night in nights)
    if nights:
        high = 100 * wilson(alarms, len(nights)).high
        print(
            f"clean nights: {alarms} false alarms of {len(nights)} (95 %: at most {high:.0f} %), {looks} second panels"
        )
    missed = [canary for canary in canaries if not seen(planted[canary.damage], canary)]
    for canary in missed:
        print(f"missed: {canary.damage} by {canary.metric}, expected {canary.at_least:g} at least")
    print(f"planted damage: {len(canaries) - len(missed)} of {len(canaries)} stated effects seen")
    return 1 if alarms or missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
