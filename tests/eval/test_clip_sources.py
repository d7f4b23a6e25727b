"""Clips from a real exported bundle, a service, a folder and the truth: made, kept, scored, shown."""

from __future__ import annotations

import base64
import io
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from eval import run, sheet
from eval.damage import CLIP_DAMAGES, damaged, damaged_clip
from eval.errors import EvalError
from eval.metrics.base import PerSampleMetric, Samples, Score, register
from eval.pairing import NotComparable, require_comparable
from eval.pictures import data_url, pictures
from eval.prompts import Prompt, build_prompts, load_suite
from eval.sources import CLIP_CHUNK, BundleSource, generate, open_source, write_folder
from eval.statistics import bootstrap_mean
from eval.store import Store

FRAMES = 5


@register
class Change(PerSampleMetric):
    """Mean difference of neighbouring frames: a metric of clips without a network."""

    name = "test-change"
    direction = "higher"
    unit = ""
    smallest_n = 2
    media = "clips"

    def update(self, samples: Samples) -> None:
        apart = np.abs(np.diff(samples.images.astype(np.float64), axis=1))
        self._add(apart.reshape(len(apart), -1).mean(axis=1), samples)

    def compute(self) -> Score:
        values = np.array(self._values)
        return self._score(bootstrap_mean(values, self._clusters), values, {}).check()


def suite_file(folder: Path, **changes: Any) -> str:
    tree = {
        "name": "tiny-clips",
        "description": "for tests",
        "world": "moving-scenes",
        "frames": FRAMES,
        "prompts": {"seed": 7_660_000, "count": 3, "things": [1, 2]},
        "metrics": {"test-change": {}},
        "batch": 2,
    }
    path = folder / "tiny-clips.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return str(path)


@pytest.fixture(scope="module")
def source(tiny_video_bundle: Path) -> BundleSource:
    return BundleSource(tiny_video_bundle, steps=1, threads=1, batch=2)


@pytest.fixture
def prompts(tmp_path: Path) -> list[Prompt]:
    return build_prompts(load_suite(suite_file(tmp_path)))


@pytest.fixture
def command(tmp_path: Path, tiny_video_bundle: Path) -> list[str]:
    places = ["--store", str(tmp_path / "s.sqlite"), "--cache", str(tmp_path / "cache"), "--judges", str(tmp_path)]
    words = ["--suite", suite_file(tmp_path), "--steps", "1", "--threads", "1", "--quiet", *places]
    return [str(tiny_video_bundle), *words]


def test_clips_do_not_depend_on_the_batch_and_do_on_seed_prompt_and_length(
    source: BundleSource, prompts: list[Prompt], tiny_video_bundle: Path
) -> None:
    made = source.make(prompts)
    assert made.shape == (3, FRAMES, 3, 32, 32) and made.dtype == np.uint8
    np.testing.assert_array_equal(made[1:2], source.make(prompts[1:2]))
    for other in (Prompt("x", prompts[0].text, 7_000_001), Prompt("x", prompts[1].text, prompts[0].seed)):
        assert not np.array_equal(source.make([other]), made[:1])
    longer = BundleSource(tiny_video_bundle, steps=1, threads=1, batch=2, frames=9)
    assert longer.make(prompts[:1]).shape == (1, 9, 3, 32, 32)
    assert source.identity is not None and longer.identity is not None
    assert (source.identity["frames"], longer.identity["frames"], source.about["fps"]) == (5, 9, 8.0)


def test_lengths_and_media_that_do_not_fit_are_refused(
    command: list[str], tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EvalError, match=r"frames is 8 and .* use 7"):
        open_source(command[0], frames=8)
    assert run.main([str(tiny_bundle), *command[1:]]) == 3
    assert "makes pictures and the suite asks for clips" in capsys.readouterr().err
    stills = suite_file(tmp_path, world="scenes", frames=None, metrics={"latency": {}}, batch=1, cache=False)
    assert run.main([command[0], "--suite", stills, *command[3:]]) == 3
    assert "makes clips of 5 frames and suite tiny-clips asks for pictures" in capsys.readouterr().err
    faces = suite_file(tmp_path, metrics={"composition": {"labeller": None}})
    shutil.copytree(Path("models/scenes-labeller"), tmp_path / "scenes-labeller")
    assert run.main([command[0], "--suite", faces, *command[3:]]) == 3
    assert "composition judges pictures and suite tiny-clips is of clips" in capsys.readouterr().err
    for changes in ({"frames": None}, {"world": "scenes"}):
        with pytest.raises(EvalError, match="give frames to worlds of clips alone"):
            load_suite(suite_file(tmp_path, **changes))


def test_a_bundle_of_clips_is_scored_stored_and_found_again(
    command: list[str], source: BundleSource, prompts: list[Prompt], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*command, "--keep", str(tmp_path / "kept")]) == 0
    assert "test-change" in capsys.readouterr().out
    with Store(tmp_path / "s.sqlite") as store:
        (row,) = store.runs()
        assert row["world"] == "moving-scenes" and row["resolved"]["frames"] == FRAMES
        assert row["source"]["identity"]["frames"] == FRAMES and row["scored"] == 3
        found = pictures(store, row, tmp_path / "cache", [prompts[1].key])
    made = source.make(prompts)
    np.testing.assert_array_equal(found[prompts[1].key], made[1])
    folder = open_source(str(tmp_path / "kept"), frames=FRAMES)
    np.testing.assert_array_equal(folder.make(prompts), made)
    with pytest.raises(EvalError, match=r"neither bundle\.json nor \.png"):
        open_source(str(tmp_path / "kept"))


class Counting:
    """A source of clips that counts what it makes and can stop in the middle."""

    name = "counting"

    def __init__(self, stop_after: int | None = None) -> None:
        self.about: dict[str, Any] = {}
        self.identity: dict[str, Any] | None = {"digest": "a", "frames": 2}
        self.made, self.stop_after = 0, stop_after

    def make(self, prompts: Sequence[Prompt]) -> np.ndarray:
        if self.stop_after is not None and self.made >= self.stop_after:
            raise KeyboardInterrupt
        self.made += len(prompts)
        return np.stack([np.full((2, 3, 4, 4), p.seed % 251, np.uint8) for p in prompts])


def test_an_interrupted_run_loses_few_clips(tmp_path: Path) -> None:
    prompts = [Prompt(f"p{i}", "a cube", i) for i in range(40)]
    with pytest.raises(KeyboardInterrupt):
        list(generate(Counting(stop_after=22), prompts, batch=4, cache=tmp_path))
    again = Counting()
    images = np.concatenate([made.images for made in generate(again, prompts, batch=4, cache=tmp_path)])
    assert again.made == 40 - CLIP_CHUNK and images[:, 1, 0, 0, 0].tolist() == list(range(40))


def test_renders_are_true_clips_of_the_prompts_own_scenes(prompts: list[Prompt]) -> None:
    from distill.data.scenes import render_clip

    truth = open_source("renders", frames=FRAMES)
    made = truth.make(prompts)
    for clip, prompt in zip(made, prompts, strict=True):
        assert prompt.scene is not None and prompt.moving
        np.testing.assert_array_equal(clip, render_clip(prompt.scene, FRAMES).transpose(0, 1).numpy())
    assert truth.identity is not None and truth.identity != open_source("renders", frames=9).identity
    with pytest.raises(EvalError, match="moving-scenes"):
        truth.make([Prompt("p", "a cat", 0)])


@pytest.mark.parametrize("damage", [*CLIP_DAMAGES, "blurred", "channels-swapped", "greyed", "prompt-ignored"])
def test_damage_of_pictures_and_of_frames_comes_to_clips(
    damage: str, source: BundleSource, prompts: list[Prompt]
) -> None:
    plain, broken = source.make(prompts), damaged(source, damage)
    made = broken.make(prompts)
    assert made.shape == plain.shape and made.dtype == np.uint8 and not np.array_equal(made, plain)
    np.testing.assert_array_equal(made[1:2], broken.make(prompts[1:2]))
    if damage == "channels-swapped":
        np.testing.assert_array_equal(made, plain[:, :, ::-1])
    if damage == "greyed":
        assert np.array_equal(made[:, :, 0], made[:, :, 2])
    if damage == "frames-backwards":
        np.testing.assert_array_equal(made[0], damaged_clip(plain[0], damage))


def test_damage_to_frames_is_refused_for_pictures(tiny_bundle: Path, prompts: list[Prompt]) -> None:
    stills = BundleSource(tiny_bundle, steps=1, threads=1, batch=2)
    with pytest.raises(EvalError, match="is damage to clips"):
        damaged(stills, "frames-frozen").make(prompts)


@pytest.fixture(scope="module")
def service(tiny_bundle: Path, tiny_video_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service's own application on a free port, with a model for pictures and one for videos."""
    import uvicorn

    from service import routes
    from service.edge import Edge, RestorePath
    from service.encode import EncodePool
    from service.registry import Registry
    from service.settings import Settings

    home = tmp_path_factory.mktemp("served")
    for bundle in (tiny_bundle, tiny_video_bundle):
        shutil.copytree(bundle, home / "bundles" / bundle.name)
    settings = Settings(bundles=home / "bundles", data=home / "data", threads=1)
    hub = routes.Hub(settings, Registry(settings), EncodePool(1))
    hub.registry.load()
    hub.studio.open()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(
        Edge(RestorePath(routes.build(hub)), settings), "127.0.0.1", port, log_level="warning", ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
    hub.studio.close()
    hub.registry.close()
    hub.studio.end()
    hub.pool.close()


def test_the_service_films_what_the_bundle_films_up_to_its_codec(
    service: str, source: BundleSource, prompts: list[Prompt]
) -> None:
    served = open_source(service, steps=1, frames=FRAMES)
    made, exact = served.make(prompts[:2]), source.make(prompts[:2])
    assert made.shape == exact.shape
    # H.264 halves the resolution of colour, so compare what it keeps: brightness.
    assert np.abs(made.mean(2) - exact.mean(2)).mean() < np.abs(exact.mean(2) - exact.mean(2)[::-1]).mean() / 3
    assert served.identity is not None and source.identity is not None
    for key in ("digest", "steps", "runtime", "runtime_version", "precision", "device", "frames"):
        assert served.identity[key] == source.identity[key] is not None
    with pytest.raises(EvalError, match="makes pictures and the suite asks for clips"):
        open_source(f"{service}#tiny-sdxl", frames=FRAMES)
    with pytest.raises(EvalError, match=r"answered 400: .*prompt"):
        served.make([Prompt("empty", " ", 0)])


def test_clips_of_a_service_compare_with_no_lossless_ones(service: str, command: list[str], tmp_path: Path) -> None:
    assert run.main(command) == 0 and run.main([service, *command[1:]]) == 0
    with Store(tmp_path / "s.sqlite") as store:
        served, exact = store.runs()
        with pytest.raises(NotComparable, match="codec the service's mp4 against None"):
            require_comparable(store, served, exact, "test-change")


def test_a_page_shows_a_clip_that_moves_and_has_lost_nothing() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    head, _, text = data_url(clip, 8.0, side=16).partition(",")
    assert head == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(text))) as animation:
        assert animation.n_frames == 4 and animation.size == (16, 16)  # type: ignore[attr-defined]
        for i, frame in enumerate(clip):
            animation.seek(i)
            np.testing.assert_array_equal(np.asarray(animation.convert("RGB"))[::2, ::2].transpose(2, 0, 1), frame)
            assert animation.info["duration"] == 125
    assert data_url(clip[0]).startswith("data:image/png;base64,")


def test_a_sheet_of_clips_is_animated(
    tiny_video_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--suite", suite_file(tmp_path), "--samples", "2", "--scale", "1"]
    sources = ["--source", f"one={tiny_video_bundle}@1", "--source", f"two={tiny_video_bundle}@2"]
    out = tmp_path / "sheet.webp"
    assert sheet.main([*sources, *words, "--out", str(out)]) == 0
    with Image.open(out) as animation:
        assert animation.n_frames == FRAMES and animation.width > 2 * 32  # type: ignore[attr-defined]
    assert sheet.main([*sources, *words, "--out", str(tmp_path / "sheet.png")]) == 3
    assert "name a .webp or .gif file for clips" in capsys.readouterr().err


def test_a_folder_of_clips_says_what_is_missing(prompts: list[Prompt], tmp_path: Path) -> None:
    clips = np.zeros((1, FRAMES, 3, 16, 16), np.uint8)
    write_folder(tmp_path / "few", Samples(clips, tuple(prompts[:1])))
    with pytest.raises(EvalError, match=r"lacks 2 of 3 files, first .*mp4"):
        open_source(str(tmp_path / "few"), frames=FRAMES).make(prompts)
