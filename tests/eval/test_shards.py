"""A run divided among processes: the same digits, nothing lost and nothing doubled, whatever is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from eval import run
from eval.errors import EvalError
from eval.metrics import create
from eval.metrics.base import Metric, Samples
from eval.prompts import build_prompts, load_suite
from eval.shards import Shard, Shares, parse_shard
from eval.sources import CHUNK
from eval.store import Store

COUNT = CHUNK + 5
"""Prompts of two seeds each: three chunks, the last of which is not full, and one prompt's seeds in two chunks."""
REFERENCE = {"extractor": "scenes-clip", "reference_seed": 7_650_500, "reference_count": 8}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    tree = {
        "name": "divided",
        "description": "for tests",
        "world": "scenes",
        "prompts": {"seed": 7_650_000, "count": COUNT, "things": [1, 2]},
        "seeds_per_prompt": 2,
        "metrics": {"fid": REFERENCE, "kid": REFERENCE, "diversity": {}, "reward": {}},
    }
    path = tmp_path / "divided.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def command(tmp_path: Path, tiny_bundle: Path, judges_folder: Path, suite: Path) -> Callable[..., list[str]]:
    """Arguments of eval.run with a store and a cache of the given name."""

    def of(name: str, *more: str) -> list[str]:
        places = ["--store", str(tmp_path / f"{name}.sqlite"), "--cache", str(tmp_path / name)]
        options = ["--steps", "1", "--threads", "1", "--quiet", "--judges", str(judges_folder)]
        return [str(tiny_bundle), "--suite", str(suite), *options, *places, *more]

    return of


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "eval.run", *arguments], stdout=subprocess.PIPE, text=True)


def everything(path: Path) -> dict[str, object]:
    """All digits of the one complete run of a store."""
    with Store(path) as store:
        (found,) = store.runs()
        results = store.results(found["id"])
        names = ("value", "low", "high", "se", "n", "clusters", "protocol", "parts")
        numbers = {metric: [row[name] for name in names] for metric, row in results.items()}
        return numbers | {f"{metric} by sample": store.per_sample(found["id"], metric) for metric in results}


def test_two_processes_give_the_digits_of_one(command: Callable[..., list[str]], tmp_path: Path) -> None:
    torch.set_num_threads(3)  # of whatever ran in this process before; the run has those of its command
    assert run.main(command("one")) == 0
    both = [start(command("two", "--shard", shard)) for shard in ("1/2", "2/2")]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(["kept share" in text for text in said]) == [False, True], said
    assert sum("wrote run" in text for text in said) == 1
    alone = everything(tmp_path / "one.sqlite")
    assert everything(tmp_path / "two.sqlite") == alone
    assert len(alone["fid by sample"]) == 2 * COUNT  # type: ignore[arg-type]
    assert not list((tmp_path / "two" / "shards").rglob("*.pt"))


def test_torchruns_ranks_are_shards(
    command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("1", "kept share 2/2; 1 of 2 are missing"), ("0", "wrote run")):
        monkeypatch.setenv("RANK", rank)
        assert run.main(command("ranks")) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
def test_what_is_killed_goes_on_and_counts_every_sample_once(
    command: Callable[..., list[str]], tmp_path: Path, divided: bool
) -> None:
    shares = [["--shard", "1/2"], ["--shard", "2/2"]] if divided else [[]]
    victim = start(command("killed", *shares[0]))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("*.npy")) and time.monotonic() < deadline:
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    with Store(tmp_path / "killed.sqlite") as store:
        assert store.runs() == []
    for more in shares:
        assert run.main(command("killed", *more)) == 0
    assert run.main(command("one")) == 0
    assert everything(tmp_path / "killed.sqlite") == everything(tmp_path / "one.sqlite")


def test_a_share_that_is_there_is_not_made_again_and_a_damaged_one_is_named(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(command("again", "--shard", "1/2")) == 0
    (share,) = (tmp_path / "again" / "shards").rglob("*.pt")
    made = share.stat().st_mtime_ns
    assert run.main(command("again", "--shard", "1/2")) == 0
    assert share.stat().st_mtime_ns == made
    share.write_bytes(b"no share")
    assert run.main(command("again", "--shard", "2/2")) == 3
    assert "is no share of a run" in capsys.readouterr().err
    with Store(tmp_path / "again.sqlite") as store:
        assert store.runs() == []


def test_other_judges_never_meet(tmp_path: Path) -> None:
    ours = Shares(tmp_path, Shard(1, 2), {"judges": ["a"]})
    ours.keep([[{"_values": [1.0, np.ones(2)]}]])
    assert Shares(tmp_path, Shard(2, 2), {"judges": ["a"]}).missing == [2]
    assert Shares(tmp_path, Shard(2, 2), {"judges": ["b"]}).missing == [1, 2]
    assert Shares(tmp_path, Shard(2, 3), {"judges": ["a"]}).missing == [1, 2, 3]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "1", "a/b", "-1/2"])
def test_shards_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(EvalError, match=r"write i/n with i from 1 to n"):
        parse_shard(text)


def test_one_rank_alone_is_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert parse_shard(None) is None and parse_shard("2/3") == Shard(2, 3)


def test_times_are_not_divided(
    command: Callable[..., list[str]], suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(suite.read_text()) | {"cache": False, "batch": 1, "metrics": {"latency": {}}}
    suite.write_text(yaml.safe_dump(tree))
    assert run.main(command("timed", "--shard", "1/2")) == 3
    assert "omit --shard" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["composition", "inception-score", "digit-accuracy", "recall"])
def test_what_a_metric_gathered_moves_to_another(name: str) -> None:
    from eval.doctor import PROBES, noise

    suite = load_suite(PROBES[name])
    prompts = tuple(build_prompts(suite, 8))
    images = noise(8, 8 if suite.world == "digits" else 64)
    options = dict(suite.metrics[name]) | ({"reference_count": 8} if name == "recall" else {})

    def fed(*batches: slice) -> Metric:
        metric = create(name, **options)
        for batch in batches:
            metric.update(Samples(images[batch], prompts[batch]))
        return metric

    whole, first, second = fed(slice(0, 4), slice(4, 8)), fed(slice(0, 4)), fed(slice(4, 8))
    collector = create(name, **options)
    for part in (first, second):
        collector.give(part.take())
    ours, theirs = collector.compute(), whole.compute()
    assert (ours.interval, ours.parts, ours.protocol) == (theirs.interval, theirs.parts, theirs.protocol)
    assert np.array_equal(ours.per_sample, theirs.per_sample)
    assert first.take() == {key: [] for key in first.take()}
