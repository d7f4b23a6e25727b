"""The doctor finds what is missing and says how to get it."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval import doctor
from eval.metrics import registered


def test_every_metric_has_a_probe() -> None:
    assert {name for name in registered() if not name.startswith("test-")} == {
        *doctor.PROBES,
        *doctor.published(),
    }


def test_published_scorers_that_are_not_here_break_nothing_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "PROBES", {})
    monkeypatch.setattr("eval.metrics.registered", lambda: ("hpsv2.1",))
    places = ["--judges", str(tmp_path), "--store", str(tmp_path / "s.sqlite")]
    assert doctor.main(places) == 0
    shown = capsys.readouterr().out
    assert "none hpsv2.1" in shown and "hpsv2.1 was not run" in shown
    assert doctor.main([*places, "--metric", "hpsv2.1"]) == 3
    assert "FAIL hpsv2.1" in capsys.readouterr().out


def test_a_metric_without_its_judge_cannot_run_and_the_fix_is_named(tmp_path: Path) -> None:
    (found,) = doctor.examine(tmp_path, tmp_path / "s.sqlite", ["reward"])
    assert not found.ok and "scenes-reward is missing" in found.text and "train it with its recipe" in found.text
    (unknown,) = doctor.examine(tmp_path, tmp_path / "s.sqlite", ["rewad"])
    assert not unknown.ok and "--metric is 'rewad'; did you mean 'reward'?" in unknown.text


def test_what_is_there_is_run_for_real(judges_folder: Path, tmp_path: Path) -> None:
    reward, latency = doctor.examine(judges_folder, tmp_path / "s.sqlite", ["reward", "latency"])
    for found in doctor.examine(judges_folder, tmp_path / "s.sqlite", ["throughput", "memory", "parity"]):
        assert found.ok and "noise scores" in found.text
    assert reward.ok and "noise scores" in reward.text and latency.ok and "10 ms" in latency.text


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), "constraints.txt"),
        (ModuleNotFoundError("No module named 'torch_fidelity'"), "pip install 'leapfrog\\[eval\\]'"),
        (ImportError("cannot import name 'packaging' from 'pkg_resources'"), "setuptools>=77"),
        (FileNotFoundError("bpe_simple_vocab_16e6.txt.gz"), "open_clip_torch"),
        (ValueError("something new"), "traceback"),
    ],
)
def test_known_breakages_have_their_fix(error: Exception, fix: str) -> None:
    import re

    assert re.search(fix, doctor.diagnose(error))


def test_the_command_counts_and_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--judges", str(tmp_path), "--store", str(tmp_path / "s.sqlite")]
    assert doctor.main([*where, "--metric", "latency"]) == 0
    assert "1 of 1 can run" in capsys.readouterr().out
    assert doctor.main([*where, "--metric", "latency", "--metric", "kid"]) == 3
    assert "FAIL kid" in capsys.readouterr().out
    full = Path("/proc")
    with pytest.raises(doctor.EvalError, match="GiB free and a night needs"):
        doctor.space_probe(full)()
