"""Sources, cache and the command lines, end to end on a real exported bundle."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from eval import results, run, sheet
from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.prompts import Prompt, build_prompts, load_suite
from eval.sources import BundleSource, FolderSource, generate, open_source, write_folder
from eval.statistics import bootstrap_mean
from eval.store import Store
from service.runtimes import choose


@register
class Brightness(PerSampleMetric):
    """Mean pixel: a metric without a network. poison: gives NaN for that sample."""

    name = "test-brightness"
    direction = "higher"
    unit = ""
    smallest_n = 5

    def __init__(self, poison: int | None = None) -> None:
        super().__init__()
        self.poison = poison

    def update(self, samples: Samples) -> None:
        values = samples.images.mean(axis=(1, 2, 3), dtype=np.float64)
        if self.poison is not None and self.poison in range(len(self._values), len(self._values) + len(values)):
            values[self.poison - len(self._values)] = np.nan
        self._add(values, samples)

    def compute(self) -> Score:
        values = np.array(self._values)
        return self._score(bootstrap_mean(values, self._clusters), values, {}).check()


def suite_file(folder: Path, metrics: dict[str, Any] | None = None, **changes: Any) -> str:
    tree = {
        "name": "tiny",
        "description": "for tests",
        "world": "scenes",
        "prompts": {"seed": 7_650_000, "count": 6, "things": [1, 2]},
        "metrics": metrics or {"test-brightness": {}},
        "batch": 4,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return str(path)


@pytest.fixture
def command(tmp_path: Path, tiny_bundle: Path) -> list[str]:
    places = ["--store", str(tmp_path / "s.sqlite"), "--cache", str(tmp_path / "cache"), "--judges", str(tmp_path)]
    return [str(tiny_bundle), "--suite", suite_file(tmp_path), "--steps", "2", "--threads", "1", "--quiet", *places]


@pytest.fixture(scope="module")
def source(tiny_bundle: Path) -> BundleSource:
    return BundleSource(tiny_bundle, steps=2, threads=1, batch=4)


@pytest.fixture
def prompts(tmp_path: Path) -> list[Prompt]:
    return build_prompts(load_suite(suite_file(tmp_path)))


def test_a_bundle_is_scored_and_stored(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_bundle: Path
) -> None:
    assert run.main(command) == 0
    out = capsys.readouterr().out
    assert "test-brightness" in out and f"to {tmp_path / 's.sqlite'}" in out and "n=6" in out
    with Store(tmp_path / "s.sqlite") as store:
        (row,) = store.runs()
        assert row["label"] == "tiny-sdxl, 2 steps" and row["scored"] == 6 and row["suite"] == "tiny"
        assert row["source"]["identity"]["steps"] == 2 and len(row["source"]["identity"]["digest"]) == 64
        assert row["source"]["about"]["path"] == str(tiny_bundle)
        assert row["versions"]["numpy"] == np.__version__ and row["hardware"]["cores"] >= 1
        assert row["command"].startswith("python -m eval.run ") and row["resolved"]["prompts"]["count"] == 6
        assert len(store.per_sample(row["id"], "test-brightness")) == 6


def test_runtime_and_precision_are_recorded_and_decide_the_cache(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = [["--runtime", "onnx"], ["--runtime", "openvino"], ["--runtime", "openvino", "--precision", "auto"]]
    for options in kinds:
        assert run.main([*command, *options]) == 0
    with Store(tmp_path / "s.sqlite") as store:
        identities = [row["source"]["identity"] for row in store.runs()]
        assert all("openvino" in row["versions"] and "onnxruntime" in row["versions"] for row in store.runs())
    made = {(i["runtime"], i["runtime_version"], i["precision"]) for i in identities}
    expected = choose("openvino", "auto")
    openvino, onnx = version("openvino"), version("onnxruntime")
    assert made == {("onnx", onnx, "float32"), ("openvino", openvino, "float32"), ("openvino", openvino, expected[1])}
    assert len(list((tmp_path / "cache").glob("*.npy"))) == len(made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runtime", "onnx", "--precision", "bfloat16"], "ONNX Runtime has none on the CPU"),
        (["--runtime", "openvino"], "run: pip install 'leapfrog[openvino]'"),
    ],
)
def test_a_runtime_that_cannot_be_had_ends_with_the_reason(
    command: list[str], options: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert run.main([*command, *options]) == 3
    assert message in capsys.readouterr().err


def test_a_runtime_is_no_option_for_what_is_no_bundle() -> None:
    with pytest.raises(EvalError, match=r"renders is no bundle .*precision bfloat16"):
        open_source("renders", precision="bfloat16")


def test_pictures_do_not_depend_on_the_batch_and_do_on_seed_and_prompt(
    source: BundleSource, prompts: list[Prompt]
) -> None:
    together = source.make(prompts)
    assert together.shape == (6, 3, 64, 64) and together.dtype == np.uint8
    np.testing.assert_array_equal(together[3:4], source.make(prompts[3:4]))
    swapped = Prompt("x", prompts[0].text, prompts[1].seed)
    assert not np.array_equal(source.make([swapped]), together[:1])
    assert not np.array_equal(source.make([Prompt("x", prompts[1].text, prompts[0].seed)]), together[:1])


class Counting:
    """A source that counts what it makes and can stop in the middle."""

    name = "counting"

    def __init__(self, stop_after: int | None = None, digest: str = "a") -> None:
        self.about: dict[str, Any] = {}
        self.identity: dict[str, Any] | None = {"digest": digest}
        self.made, self.stop_after = 0, stop_after

    def make(self, prompts: Sequence[Prompt]) -> np.ndarray:
        if self.stop_after is not None and self.made >= self.stop_after:
            raise KeyboardInterrupt
        self.made += len(prompts)
        return np.stack([np.full((3, 8, 8), p.seed % 251, np.uint8) for p in prompts])


def test_an_interrupted_run_resumes_from_what_it_made(tmp_path: Path) -> None:
    prompts = [Prompt(f"p{i}", "a cube", i) for i in range(200)]
    first = Counting(stop_after=90)
    with pytest.raises(KeyboardInterrupt):
        list(generate(first, prompts, batch=32, cache=tmp_path))
    second = Counting()
    images = np.concatenate([made.images for made in generate(second, prompts, batch=32, cache=tmp_path)])
    assert second.made == 200 - 64
    assert images[:, 0, 0, 0].tolist() == [i % 251 for i in range(200)]
    third = Counting()
    assert (
        sum(len(made.prompts) for made in generate(third, prompts, batch=7, cache=tmp_path)) == 200 and third.made == 0
    )
    other = Counting(digest="b")
    list(generate(other, prompts, cache=tmp_path))
    assert other.made == 200


def test_a_damaged_cache_file_is_made_again(tmp_path: Path) -> None:
    prompts = [Prompt(f"p{i}", "a cube", i) for i in range(10)]
    list(generate(Counting(), prompts, cache=tmp_path))
    (path,) = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:300])
    again = Counting()
    assert next(iter(generate(again, prompts, cache=tmp_path))).images[9, 0, 0, 0] == 9 and again.made == 10


def test_a_source_without_identity_is_never_cached(tmp_path: Path) -> None:
    prompts, anonymous = [Prompt("p", "a cube", 0)], Counting()
    anonymous.identity = None
    for _ in range(2):
        list(generate(anonymous, prompts, cache=tmp_path / "cache"))
    assert anonymous.made == 2 and not (tmp_path / "cache").exists()


def test_a_folder_gives_back_the_same_pictures(source: BundleSource, prompts: list[Prompt], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    for made in generate(source, prompts, batch=4):
        write_folder(folder, made)
    again = open_source(str(folder))
    assert isinstance(again, FolderSource)
    np.testing.assert_array_equal(again.make(prompts), source.make(prompts))
    (next(folder.iterdir())).write_bytes(b"\x89PNG broken")
    with pytest.raises(EvalError, match="cannot be decoded"):
        again.make(prompts)
    next(folder.iterdir()).unlink()
    with pytest.raises(EvalError, match="lacks 1 of 6 files"):
        again.make(prompts)


def test_renders_are_the_pictures_of_the_prompts_own_scenes(prompts: list[Prompt]) -> None:
    from distill.data.scenes import render, sample_scene

    made = open_source("renders").make(prompts)
    expected = render([sample_scene(7_650_000, i, count=(1, 2)[i % 2]) for i in range(6)]).numpy()
    np.testing.assert_array_equal(made, expected)
    with pytest.raises(EvalError, match="world scenes"):
        open_source("renders").make([Prompt("digits-0-1", "7", 0, label=7)])


@pytest.fixture(scope="module")
def service(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service's own application on a free port, with the tiny bundle loaded."""
    import uvicorn

    from service import routes
    from service.edge import Edge
    from service.encode import EncodePool
    from service.registry import Registry
    from service.settings import Settings

    bundles = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny_bundle, bundles / tiny_bundle.name)
    settings = Settings(bundles=bundles, threads=1)
    hub = routes.Hub(settings, Registry(settings), EncodePool(1))
    hub.registry.load()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(Edge(routes.build(hub), settings), "127.0.0.1", port, log_level="warning", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
    hub.registry.close()
    hub.pool.close()


def test_the_service_makes_the_pictures_of_the_bundle(
    service: str, source: BundleSource, prompts: list[Prompt], tiny_bundle: Path
) -> None:
    served = open_source(f"{service}#tiny-sdxl", steps=2)
    np.testing.assert_array_equal(served.make(prompts), source.make(prompts))
    assert served.identity is not None and source.identity is not None
    for key in ("digest", "steps", "runtime", "runtime_version", "precision", "device"):
        assert served.identity[key] == source.identity[key] is not None
    with pytest.raises(EvalError, match="not 'other'"):
        open_source(f"{service}#other")
    with pytest.raises(EvalError, match=r"--steps is 3 .* \[1, 2, 4, 8\]"):
        open_source(service, steps=3)
    with pytest.raises(EvalError, match=r"answered 400: .*prompt"):
        served.make([Prompt("empty", " ", 0)])


def test_latency_times_every_picture_alone(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite_file(tmp_path, {"latency": {}}, batch=1, cache=False)
    assert run.main(command) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("latency"))
    value = float(line.split()[1])
    assert 0.5 < value < 10_000 and "too few to report: needs 20" in line
    suite_file(tmp_path, {"latency": {}})
    assert run.main(command) == 3
    assert "batch: 1" in capsys.readouterr().err


def test_nan_scores_are_refused_and_the_run_says_so(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite_file(tmp_path, {"test-brightness": {"poison": 3}})
    assert run.main(command) == 3
    assert "gave nan for sample 3" in capsys.readouterr().err
    with Store(tmp_path / "s.sqlite") as store:
        assert store.runs() == []
        (row,) = store.failures()
        assert "sample 3" in row["error"] and (row["scored"], row["failed"], row["skipped"]) == (6, 0, 0)


def test_a_run_that_ends_in_the_middle_says_how_far_it_came(
    command: list[str], source: BundleSource, prompts: list[Prompt], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for made in generate(source, prompts, batch=4):
        write_folder(tmp_path / "pictures", made)
    (tmp_path / "pictures" / f"{prompts[5].id}_{prompts[5].seed}.png").write_bytes(b"no picture")
    folder = [str(tmp_path / "pictures"), *command[1:3], *command[7:]]
    assert run.main(folder) == 3
    assert "cannot be decoded" in capsys.readouterr().err
    with Store(tmp_path / "s.sqlite") as store:
        (row,) = store.failures("tiny")
        assert (row["expected"], row["scored"], row["failed"], row["skipped"]) == (6, 4, 0, 2) and store.runs() == []


FULL = """
import resource, sys
from eval import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
raise SystemExit(run.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("room", [20_000, 150_000])
def test_without_room_the_error_is_one_line_and_the_store_stays_whole(
    command: list[str], tmp_path: Path, room: int
) -> None:
    """The kernel refuses to let any file grow: first the pictures, then the store itself."""
    assert run.main(command) == 0
    shutil.rmtree(tmp_path / "cache")
    suite_file(tmp_path, prompts={"seed": 7_650_000, "count": 12, "things": [1, 2]})
    done = subprocess.run([sys.executable, "-c", FULL, str(room), *command], capture_output=True, text=True)
    assert done.returncode == 3 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr, done.stderr
    with Store(tmp_path / "s.sqlite") as store:
        assert store._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        (kept,) = store.runs()
        assert len(store.per_sample(kept["id"], "test-brightness")) == 6
    assert run.main(command) == 0


def test_bad_input_is_one_clear_line(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    where, suite = 0, 2
    for position, value, message in (
        (where, str(tmp_path / "nothing"), "is no folder and no URL"),
        (where, str(empty), "neither bundle.json nor .png"),
        (where, "http://127.0.0.1:9", "does not answer"),
        (suite, "scenes-traned", "did you mean 'scenes-trained'"),
        (suite, "scenes-fid", "scenes-clip is missing"),
        (4, "3", r"samples in [1, 2, 4, 8]"),
    ):
        changed = list(command)
        changed[position] = value
        assert run.main(changed) == 3
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    suite_file(tmp_path, {"test-brightnes": {}})
    assert run.main(command) == 3 and "did you mean 'test-brightness'" in capsys.readouterr().err
    suite_file(tmp_path, {"test-brightness": {"poisn": 1}})
    assert run.main(command) == 3 and "did you mean 'poison'" in capsys.readouterr().err


def test_a_damaged_bundle_is_named(
    command: list[str], tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    (broken / "step.onnx").write_bytes(b"")
    assert run.main([str(broken), *command[1:]]) == 3
    assert "step.onnx was altered or truncated (0 bytes" in capsys.readouterr().err


def test_results_show_rows_differences_and_commands(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps, label in (("2", "two"), ("4", "four")):
        assert run.main([*command[:3], "--steps", steps, "--label", label, *command[5:]]) == 0
    tables = tmp_path / "tables.yaml"
    column = {"title": "brightness", "suite": "tiny", "metric": "test-brightness", "digits": 3}
    table = {
        "title": "Tiny",
        "rows": ["two", "four", "absent"],
        "columns": [column],
        "pairs": [["two", "four"], ["two", "absent"]],
    }
    tables.write_text(yaml.safe_dump([table]))
    out = tmp_path / "docs" / "results.md"
    out.parent.mkdir()
    out.write_text("# Results\n\nWritten by hand.\n")
    arguments = ["--store", str(tmp_path / "s.sqlite"), "--tables", str(tables), "--out", str(out)]
    assert results.main(arguments) == 0 and results.main(arguments) == 0
    text = out.read_text()
    assert text.startswith("# Results\n\nWritten by hand.\n") and text.count("## Tiny") == 1
    with Store(tmp_path / "s.sqlite") as store:
        (two,), (four,) = store.runs(label="two"), store.runs(label="four")
        a, b = (store.results(r["id"])["test-brightness"] for r in (two, four))
        delta = results.difference(store, two, four, "test-brightness")
    assert f"| two | {a['value']:.3f} [{a['low']:.3f}, {a['high']:.3f}] ↑ |" in text
    assert delta.interval.value == pytest.approx(a["value"] - b["value"])
    assert f"{delta.interval.value:+.3f} [{delta.interval.low:+.3f}" in text
    assert "| absent | – |" in text and "| two − absent | – |" in text
    assert "7650000 … 7650005" in text and "--steps 2 --label two" in text
    assert results.main([*arguments[:1], str(tmp_path / "no.sqlite"), *arguments[2:]]) == 3
    assert "score something first" in capsys.readouterr().err


def test_sheet_sets_sources_side_by_side(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: BundleSource
) -> None:
    from PIL import Image

    out = tmp_path / "sheet.png"
    sources = [item for steps in (1, 2) for item in ("--source", f"{steps} steps={tiny_bundle}@{steps}")]
    suite = suite_file(tmp_path)
    assert sheet.main([*sources, "--suite", suite, "--samples", "3", "--scale", "1", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    with Image.open(out) as picture:
        pixels = np.asarray(picture)
    expected = source.make(build_prompts(load_suite(suite), 3)).transpose(0, 2, 3, 1)
    left, top, cell = pixels.shape[1] - 70, pixels.shape[0] - 3 * 70, 70
    for row in range(3):
        np.testing.assert_array_equal(pixels[top + row * cell :][:64, left : left + 64], expected[row])
    assert sheet.main(["--source", "nonsense", "--out", str(out)]) == 3
    assert "LABEL=BUNDLE@STEPS" in capsys.readouterr().err
