"""Nights that never were, on the shipped digits: a clean one raises nothing, a dropped mode is named by its metric."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import rehearse
from eval.errors import EvalError
from eval.gates import Canary, load_gates
from eval.rehearse import Judged, expected, seen
from eval.store import Store

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "digits-sit"
OPTIONS = ["--suite", "digits-canary", "--gates", "digits-sit", "--judges", str(ROOT / "models"), "--threads", "1"]


def test_a_clean_night_is_clean_and_planted_damage_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert rehearse.main([str(BUNDLE), *OPTIONS, "--nights", "1", "--damage", "mode-dropped"]) == 0
    out = capsys.readouterr().out
    assert "clean 1" in out and "0 false alarms of 1" in out and "1 of 1 stated effects seen" in out
    line = next(line for line in out.splitlines() if line.startswith("mode-dropped"))
    assert "red: digit-accuracy" in line


def test_a_rehearsal_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the folder holds is measured once; another number of samples is measured anew."""
    options = [str(BUNDLE), *OPTIONS, "--folder", str(tmp_path), "--nights", "1", "--damage", "mode-dropped"]

    def counts() -> tuple[int, ...]:
        with Store(tmp_path / "rehearsal.sqlite") as store:
            return tuple(len(store.runs(label=label)) for label in ("baseline", "clean 1", "mode-dropped"))

    assert rehearse.main([*options, "--samples", "60"]) in (0, 1)
    first, told = counts(), capsys.readouterr().out
    assert first[1] == 1 and min(first) >= 1
    assert rehearse.main([*options, "--samples", "60"]) in (0, 1)
    assert counts() == first and capsys.readouterr().out == told
    assert rehearse.main([*options, "--samples", "50"]) in (0, 1)
    assert counts()[1] == 2


def test_an_effect_counts_only_if_its_own_metric_turned_red_by_enough() -> None:
    canary = Canary(damage="mode-dropped", metric="fid", at_least=20)
    assert seen(Judged("n", {"fid": 21.0}, ("fid",), ()), canary)
    assert not seen(Judged("n", {"fid": 19.0}, ("fid",), ()), canary)
    assert not seen(Judged("n", {"fid": 21.0}, ("kid",), ()), canary)
    assert seen(Judged("n", {"fid": 21.0}, (), (), watched=("fid",)), canary)
    assert not seen(Judged("n", {"fid": 19.0}, (), (), watched=("fid",)), canary)


def test_damage_without_a_stated_effect_is_refused() -> None:
    gates = load_gates("digits-sit")
    assert {canary.damage for canary in expected(gates, None)} >= {"mode-dropped", "weights-coarse", "step-dropped"}
    assert {canary.damage for canary in expected(gates, ["blurred"])} == {"blurred"}
    with pytest.raises(EvalError, match="did you mean 'blurred'"):
        expected(gates, ["blured"])


def test_a_suite_without_the_gates_metrics_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(BUNDLE), "--suite", "digits-memory", "--gates", "digits-sit", "--nights", "0", "--threads", "1"]
    assert rehearse.main(words) == 3
    assert "scores nothing that the gates judge" in capsys.readouterr().err
