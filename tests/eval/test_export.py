"""The store as Parquet and JSON: every number comes back, and what is not finished does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from eval import export
from eval.prompts import Prompt
from eval.store import Store
from tests.eval.nights import record, row
from tests.eval.test_store import INFO, a_score

VALUES = [1.0, 0.1 + 0.2, -3e-9, 5.0]


@pytest.fixture
def store(tmp_path: Path, scene_prompts: Callable[[int], list[Prompt]]) -> Iterator[Store]:
    with Store(tmp_path / "s.sqlite") as opened:
        run = opened.begin(INFO)
        opened.complete(run, scene_prompts(4), [a_score(VALUES)])
        opened.fail(opened.begin(INFO), "out of disk")
        opened.begin(INFO)
        opened.pin("tiny", {"scenes-trained": run}, "d" * 64, "there", 'the "first"')
        made = record(row(note="ünïcode | “quoted”"))
        opened.keep_night(made["night"], made["bundle"], made["started"], made["verdict"], made)
        yield opened


def in_json(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}


def check(tables: dict[str, list[dict[str, Any]]], store: Store) -> None:
    (run,) = store.runs()
    assert set(tables) == set(export.COLUMNS)
    assert tables["runs"] == [{name: run[name] for name in export.COLUMNS["runs"]}]
    (result,) = tables["results"]
    assert result == {name: store.results(run["id"])["reward"][name] for name in export.COLUMNS["results"]}
    assert [line["score"] for line in tables["scores"]] == VALUES
    keys = list(store.per_sample(run["id"], "reward"))
    assert [(line["prompt_id"], line["seed"], line["position"]) for line in tables["scores"]] == [
        (*key, place) for place, key in enumerate(keys)
    ]
    assert [line["prompt"] for line in tables["scores"]] == list(store.texts(run["id"]).values())
    assert tables["baselines"][0]["runs"] == {"scenes-trained": run["id"]}
    assert tables["nights"][0]["outcome"] == store.nights()[0]["outcome"]


def test_json_holds_every_number_of_complete_runs(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert export.main([str(out), "--format", "json", "--store", str(store.path)]) == 0
    assert "runs.jsonl (1)" in capsys.readouterr().out
    check(in_json(out), store)
    assert sorted(path.suffix for path in out.iterdir()) == [".jsonl"] * 5


def test_a_suite_or_a_label_narrows_runs_and_what_belongs_to_them(store: Store, tmp_path: Path) -> None:
    export.export(store, tmp_path / "out", "json", suite="scenes-held-out")
    tables = in_json(tmp_path / "out")
    assert tables["runs"] == tables["results"] == tables["scores"] == [] and len(tables["nights"]) == 1


def test_parquet_holds_the_same(store: Store, tmp_path: Path) -> None:
    assert export.export(store, tmp_path / "out") == {
        "runs.parquet": 1, "results.parquet": 1, "scores.parquet": 4, "baselines.parquet": 1, "nights.parquet": 1,
    }  # fmt: skip
    tables = {path.stem: pyarrow.parquet.read_table(path).to_pylist() for path in (tmp_path / "out").iterdir()}
    for name, lines in tables.items():
        for line in lines:
            line |= {key: json.loads(line[key]) for key, kind in export.COLUMNS[name].items() if kind is dict}
    check(tables, store)


def test_parquet_without_pyarrow_names_the_extra_and_leaves_nothing(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert export.main([str(tmp_path / "out"), "--store", str(store.path)]) == 3
    assert "pip install 'leapfrog[parquet]', or use --format json" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_store_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(tmp_path), "--store", str(tmp_path / "none.sqlite")]) == 3
    assert "none.sqlite is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "scenes-trainde"], "--suite 'scenes-trainde'; did you mean 'scenes-trained'?"),
        (["--label", "nobody"], "--label 'nobody'; "),
    ],
)
def test_a_label_or_suite_that_no_run_has_writes_nothing(
    words: list[str], message: str, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(tmp_path / "out"), "--format", "json", "--store", str(store.path), *words]) == 3
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_named(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([str(store.path), "--format", "json", "--store", str(store.path)]) == 3
    assert "s.sqlite is a file; give a folder" in capsys.readouterr().err
