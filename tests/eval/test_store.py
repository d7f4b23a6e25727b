"""The store: round trip, all or nothing, concurrent writers, files that are no store."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Timer

import numpy as np
import pytest

from eval.errors import EvalError
from eval.metrics.base import Score
from eval.prompts import Prompt
from eval.statistics import bootstrap_mean
from eval.store import RunInfo, Store

INFO = RunInfo(
    label="AMD, 4 steps",
    command="python -m eval.run x",
    suite="scenes-trained",
    suite_resolved={"name": "scenes-trained"},
    world="scenes",
    source={"name": "x", "identity": {"digest": "0"}, "about": {}},
    hardware={"cores": 2},
    versions={"numpy": "2"},
    revision="abc",
    dirty=False,
    expected=4,
)


def a_score(values: list[float]) -> Score:
    array = np.array(values)
    return Score(
        "reward", bootstrap_mean(array), len(array), "higher", "", 1, {"weights": "0"}, array, parts={"a": 0.5}
    )


@pytest.fixture
def prompts(scene_prompts: Callable[[int], list[Prompt]]) -> list[Prompt]:
    return scene_prompts(4)


def test_a_complete_run_comes_back_whole(tmp_path: Path, prompts: list[Prompt]) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        run = store.begin(INFO)
        assert store.status(run) == "running" and store.runs() == []
        store.complete(run, prompts, [a_score([1.0, 2.0, 3.0, 5.0])])
    with Store(tmp_path / "s.sqlite") as store:
        (row,) = store.runs(label="AMD, 4 steps", suite="scenes-trained")
        assert (row["id"], row["scored"], row["expected"], row["failed"]) == (run, 4, 4, 0)
        assert row["source"] == INFO.source and row["resolved"] == INFO.suite_resolved and row["suite"] == INFO.suite
        result = store.results(run)["reward"]
        assert result["value"] == 2.75 and result["low"] < 2.75 < result["high"]
        assert result["protocol"] == {"weights": "0"} and result["parts"] == {"a": 0.5}
        assert list(store.per_sample(run, "reward").values()) == [1.0, 2.0, 3.0, 5.0]
        assert list(store.per_sample(run, "reward")) == [p.key for p in prompts]
        assert store.runs(label="another") == []


def test_incomplete_or_nan_scores_leave_nothing(tmp_path: Path, prompts: list[Prompt]) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        run = store.begin(INFO)
        for bad, message in (
            (a_score([1.0, 2.0]), "scored 2 of 4"),
            (replace(a_score([1.0] * 4), per_sample=np.array([1, np.nan, 1, 1])), "nan for sample 1"),
            (replace(a_score([1.0] * 4), interval=bootstrap_mean(np.array([np.inf]))), "is inf"),
        ):
            with pytest.raises(EvalError, match=message):
                store.complete(run, prompts, [a_score([1.0] * 4), bad])
            assert store.status(run) == "running" and store.results(run) == {}
        with pytest.raises(sqlite3.IntegrityError):
            store.complete(run, [*prompts, prompts[0]], [a_score([1.0] * 5)])  # more samples than were expected
        with pytest.raises(sqlite3.IntegrityError):
            store.complete(run, prompts, [a_score([1.0] * 4), a_score([2.0] * 4)])
        assert store.status(run) == "running" and store.results(run) == {}


CRASH = """
import os, sys
import numpy as np
from eval.store import Store
from tests_store import INFO, a_score
from eval.prompts import build_prompts, load_suite
store = Store(sys.argv[1])
run = store.begin(INFO)
print(run, flush=True)
insert = store._insert
def dying(table, rows):
    if table == "scores":
        os.kill(os.getpid(), 9)
    insert(table, rows)
store._insert = dying
store.complete(run, build_prompts(load_suite("scenes-trained"), 4), [a_score([1.0] * 4)])
"""


def test_a_killed_process_leaves_no_complete_run(tmp_path: Path) -> None:
    """Killed by SIGKILL inside the last transaction, after results were inserted."""
    (tmp_path / "tests_store.py").write_text(Path(__file__).read_text())
    path = tmp_path / "s.sqlite"
    code = f"import sys; sys.path[:0] = ['.', {str(tmp_path)!r}]\n" + CRASH
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9, done.stderr
    run = done.stdout.strip()
    with Store(path) as store:
        assert store.status(run) == "running" and store.runs() == [] and store.results(run) == {}


def test_a_finished_run_cannot_be_changed(tmp_path: Path, prompts: list[Prompt]) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        run = store.begin(INFO)
        store.fail(run, "out of disk")
        assert store.status(run) == "failed"
        with pytest.raises(EvalError, match="not running"):
            store.complete(run, prompts, [a_score([1.0] * 4)])
        assert store.results(run) == {}
        other = store.begin(INFO)
        store.complete(other, prompts, [a_score([1.0] * 4)])
        store.fail(other, "too late")
        assert store.status(other) == "complete"


def test_two_writers_do_not_disturb_each_other(tmp_path: Path, prompts: list[Prompt]) -> None:
    with Store(tmp_path / "s.sqlite") as one, Store(tmp_path / "s.sqlite") as two:
        first, second = one.begin(INFO), two.begin(INFO)
        two.complete(second, prompts, [a_score([2.0] * 4)])
        one.complete(first, prompts, [a_score([1.0] * 4)])
        assert [row["id"] for row in two.runs()] == [first, second]


def test_a_new_store_waits_for_another_process_that_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "scores.sqlite"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE begun (started TEXT)")
    other.execute("BEGIN IMMEDIATE")
    release = Timer(0.2, other.execute, ["ROLLBACK"])
    release.start()
    with Store(path) as store:
        assert store.runs() == []
    release.join()
    other.close()


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, and long enough to be read as a header of one " * 20)
    with pytest.raises(EvalError, match="cannot be used as a store"):
        Store(text)
    newer = tmp_path / "newer.sqlite"
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(EvalError, match="schema version 99"):
        Store(newer)
    with Store(tmp_path / "s.sqlite") as store, pytest.raises(EvalError, match="'x' is not in"):
        store.status("x")


def test_a_store_of_the_first_version_keeps_its_runs_and_gains_nights(tmp_path: Path, prompts: list[Prompt]) -> None:
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        run = store.begin(INFO)
        store.complete(run, prompts, [a_score([1.0, 2.0, 3.0, 5.0])])
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE nights")
        db.execute("DROP TABLE baselines")
        db.execute("ALTER TABLE runs DROP COLUMN skipped")
        db.execute("PRAGMA user_version = 1")
    with Store(path) as store:
        assert [row["id"] for row in store.runs()] == [run] and store.nights() == []
        assert store.run(run)["scored"] == 4 and list(store.texts(run).values()) == [p.text for p in prompts]


def test_baselines_keep_their_history_and_nights_are_replaced(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        store.pin("b", {"s": "1"}, "d1", "p1", "first release")
        store.pin("b", {"s": "2"}, "d2", "p2", "second release")
        assert [row["reason"] for row in store.baselines("b")] == ["second release", "first release"]
        assert store.baselines("b")[0]["runs"] == {"s": "2"} and store.baselines("c") == []
        for verdict in ("regression", "equivalent"):
            store.keep_night("2026-01-02", "b", "2026-01-02T02:00", verdict, {"x": 1})
            store.mark_alerted("2026-01-02", "c")
        (night,) = store.nights("b")
        assert night["verdict"] == "equivalent" and night["outcome"] == {"x": 1} and not night["alerted"]
        with pytest.raises(EvalError, match="no complete run 'none'"):
            store.run("none")
