"""Video jobs on their way: through the engine into files, and through everything that can go wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from distill.bundle import Bundle
from service import video_request
from service.clips import Clip
from service.engine import Engine
from service.errors import ApiError
from service.jobs import Job, JobStore, StoreError
from service.registry import Model, Registry
from service.runtimes import Conditioning, OnnxRuntime, generate
from service.runtimes.base import Floats
from service.settings import Settings
from service.studio import FED, Studio, explain
from service.video_request import VideoPlan

WAIT_S = 60.0


class Held(OnnxRuntime):
    """The real runtime, which can be held before a step."""

    go = threading.Event()

    def step(
        self, latents: Floats, timestep: Floats, coefficients: Floats, noise: Floats, conditioning: Conditioning
    ) -> tuple[Floats, Floats]:
        assert self.go.wait(WAIT_S), "nobody let the step go on"
        return super().step(latents, timestep, coefficients, noise, conditioning)


class House:
    """A server without HTTP: registry and engine of one model, and studios over one folder."""

    def __init__(self, bundle: Bundle, runtime: OnnxRuntime, data: Path) -> None:
        self.bundle, self.runtime, self.data, self.now = bundle, runtime, data, 1_000_000.0
        self.studios: list[Studio] = []
        self.engines: list[Engine] = []
        self.model = self.new_model()

    def new_model(self) -> Model:
        engine = Engine("cpu", max_queue=64)
        engine.add("tiny-wan", self.runtime, self.bundle.manifest)
        self.engines.append(engine)
        self.model = Model(self.bundle, self.runtime, engine, "digest", 0)
        return self.model

    def open(self, **settings: Any) -> Studio:
        chosen = Settings(bundles=self.bundle.path, data=self.data, **settings)
        registry = Registry(chosen)
        registry._models["tiny-wan"] = self.model
        studio = Studio(chosen, registry, clock=lambda: self.now)
        self.studios.append(studio)
        studio.open()
        return studio

    def plan(self, **fields: Any) -> VideoPlan:
        body = json.dumps({"prompt": "a red cube", "seed": 7, "steps": 2, **fields}).encode()
        return video_request.plan(video_request.parse(body), self.bundle.manifest, Settings())

    def stop(self, studio: Studio) -> None:
        """As a server does that is told to."""
        studio.close()
        self.model.engine.close()
        studio.end()
        self.studios.remove(studio)


@pytest.fixture
def house(tiny_video_bundle: Path, tmp_path: Path) -> Iterator[House]:
    bundle = Bundle.open(tiny_video_bundle)
    Held.go.set()
    made = House(bundle, Held(bundle, threads=1, max_batch=4), tmp_path / "data")
    yield made
    Held.go.set()
    for studio in list(made.studios):
        made.stop(studio)
    for engine in made.engines:
        engine.close()


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
    return found


def finished(studio: Studio, job: Job) -> Job:
    until(lambda: studio.store.get(job.id).finished)  # type: ignore[union-attr]
    return studio.get(job.id, job.owner)


def begun(studio: Studio, jobs: list[Job]) -> Job:
    """One that the engine has begun; which one comes first is the scheduler's to say."""
    found: Job = until(lambda: next((job for job in jobs if (take := studio.take(job.id)) and take.begun), None))
    return found


def frames_of(path: Path) -> Any:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_a_job_becomes_the_clip_that_the_plain_loop_makes(house: House, tmp_path: Path) -> None:
    studio, plan = house.open(), house.plan()
    job = studio.add(house.model, plan, "")
    assert job.status == "queued" and studio.get(job.id, "").plan == job.plan
    done = finished(studio, job)
    assert (done.status, done.attempts, done.error_code) == ("completed", 1, None)
    expected = generate(house.runtime, house.bundle.manifest, ["a red cube"], [7], steps=2)[0]
    with Clip(tmp_path / "expected.mp4", "mp4", plan.size, plan.fps) as clip:
        clip.write(expected)
    path = studio.store.path(job.id)
    assert path.read_bytes() == (tmp_path / "expected.mp4").read_bytes()
    assert len(frames_of(path)) == 5
    sizes = [studio.store.path(job.id, variant).stat().st_size for variant in ("video", "thumbnail", "spritesheet")]
    assert done.bytes == sum(sizes) and min(sizes) > 0
    assert done.metrics["steps"] == 2 and done.metrics["encode_video_ms"] > 0


def test_events_tell_of_every_step_with_a_preview_and_their_numbers_grow(house: House) -> None:
    studio = house.open()
    Held.go.clear()
    job = studio.add(house.model, house.plan(steps=4), "")
    take = until(lambda: studio.take(job.id))
    assert [event.kind for event in take.events][:1] == ["queued"]
    Held.go.set()
    finished(studio, job)
    kinds = [event.kind for event in take.events]
    assert kinds == ["queued", "progress", *["progress", "preview"] * 3]
    numbers = [event.id for event in take.events]
    assert numbers == sorted(set(numbers))
    assert [event.data["progress"] for event in take.events if event.kind == "progress"] == [0, 20, 40, 60]


def test_a_cancelled_job_fails_with_the_reason_and_leaves_nothing(house: House) -> None:
    studio = house.open()
    Held.go.clear()
    jobs = [studio.add(house.model, house.plan(seed=i), "") for i in range(FED + 2)]
    running = begun(studio, jobs)
    for job in (running, jobs[-1]):
        cancelled = studio.cancel(job.id, "")
        assert (cancelled.status, cancelled.error_code) == ("failed", "cancelled")
    Held.go.set()
    others = [job for job in jobs[:-1] if job is not running]
    for job in others:
        assert finished(studio, job).status == "completed"
    assert studio.cancel(others[0].id, "").status == "completed", "what is done stays done"
    assert not studio.store.path(running.id).exists()


def test_a_deleted_job_is_gone_when_the_engine_has_let_go(house: House) -> None:
    studio = house.open()
    job = studio.add(house.model, house.plan(), "")
    finished(studio, job)
    assert studio.delete(job.id, "")
    with pytest.raises(ApiError, match="no video"):
        studio.get(job.id, "")
    assert not list(studio.store.files.iterdir())
    running = studio.add(house.model, house.plan(num_frames=121), "")
    assert studio.delete(running.id, "")
    assert house.model.engine.load()[:2] == (0, 0)
    assert not list(studio.store.files.iterdir())


def test_other_keys_see_nothing(house: House) -> None:
    studio = house.open()
    job = studio.add(house.model, house.plan(), "alice")
    for call in (studio.get, studio.cancel, studio.delete):
        with pytest.raises(ApiError) as error:
            call(job.id, "bob")
        assert error.value.status == 404
    assert finished(studio, job).status == "completed"


def test_a_full_disk_is_a_failed_job_with_that_reason(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = house.open()

    def full(self: Clip, frames: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Clip, "write", full)
    job = finished(studio, studio.add(house.model, house.plan(), ""))
    assert (job.status, job.error_code) == ("failed", "disk_full")
    assert "disk is full" in str(job.error_message)
    assert not list(studio.store.files.iterdir())
    monkeypatch.undo()
    assert finished(studio, studio.add(house.model, house.plan(), "")).status == "completed"


def test_no_job_is_taken_when_the_disk_is_nearly_full(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    studio = house.open()
    monkeypatch.setattr("service.studio.LEAST_FREE_BYTES", 1 << 62)
    with pytest.raises(ApiError) as error:
        studio.add(house.model, house.plan(), "")
    assert (error.value.status, error.value.code) == (503, "storage_full")


def test_there_are_only_so_many_jobs_of_all_and_of_one_key(house: House) -> None:
    studio = house.open(max_videos=3, max_key_videos=2, api_keys=("a", "b"))
    Held.go.clear()
    for _ in range(2):
        studio.add(house.model, house.plan(), "alice")
    for owner, code in (("alice", "key_limit"), ("bob", ""), ("carol", "queue_full")):
        if not code:
            studio.add(house.model, house.plan(), owner)
            continue
        with pytest.raises(ApiError) as error:
            studio.add(house.model, house.plan(), owner)
        assert (error.value.status, error.value.code) == (429, code)
        assert int(error.value.headers["retry-after-ms"]) > 0


def test_the_key_with_the_fewest_jobs_at_work_is_next(house: House) -> None:
    studio = house.open()
    Held.go.clear()
    mine = [studio.add(house.model, house.plan(seed=i), "alice") for i in range(FED + 2)]
    theirs = studio.add(house.model, house.plan(), "bob")
    waiting = [job.id for job in (*mine, theirs) if studio.take(job.id).filming is None]  # type: ignore[union-attr]
    assert waiting == [mine[-2].id, mine[-1].id, theirs.id]
    position, seconds = studio.outlook(studio.take(theirs.id))  # type: ignore[arg-type]
    assert position == FED + 2 and seconds > 0
    with studio._lock:
        assert studio._next() is None, "the engine has enough"
        studio._takes[mine[0].id].filming, kept = None, studio._takes[mine[0].id].filming
        chosen = studio._next()
        studio._takes[mine[0].id].filming = kept
    assert chosen is not None and chosen.job.id == theirs.id


def test_priority_orders_the_jobs_of_one_key(house: House) -> None:
    studio = house.open()
    Held.go.clear()
    for i in range(FED):
        studio.add(house.model, house.plan(seed=i), "")
    jobs = {name: studio.add(house.model, house.plan(priority=name), "") for name in ("low", "normal", "high")}
    with studio._lock:
        first = next(iter(studio._takes.values()))
        first.filming, kept = None, first.filming
        studio._takes[first.job.id].plan = house.plan(priority="low")
        chosen = studio._next()
        first.filming = kept
    assert chosen is not None and chosen.job.id == jobs["high"].id


def test_a_deadline_that_passed_in_the_queue_fails_the_job(house: House) -> None:
    studio = house.open()
    Held.go.clear()
    for i in range(FED):
        studio.add(house.model, house.plan(seed=i), "")
    late = studio.add(house.model, house.plan(deadline_ms=1000), "")
    house.now += 2
    assert finished(studio, late).error_code == "deadline_exceeded"


def test_what_was_queued_or_running_goes_on_after_a_stop(house: House) -> None:
    studio = house.open()
    Held.go.clear()
    jobs = [studio.add(house.model, house.plan(seed=i), "") for i in range(FED + 2)]
    begun(studio, jobs)
    threading.Timer(0.2, Held.go.set).start()
    house.stop(studio)
    house.new_model()
    studio = house.open()
    assert all(finished(studio, job).status == "completed" for job in jobs)


def test_a_job_that_was_running_in_a_crash_is_done_again_and_its_events_are_numbered_on(house: House) -> None:
    store = JobStore(house.data)
    job = Job.new(owner="", model="tiny-wan", plan=house.plan().kept(), now=house.now)
    store.add(job)
    store.begin(job.id, house.now)
    store.close()
    Held.go.clear()
    studio = house.open()
    take = studio.take(job.id)
    assert take is not None and take.events[0].id > 2_000_000
    Held.go.set()
    done = finished(studio, job)
    assert (done.status, done.attempts) == ("completed", 2)


def test_a_job_of_a_model_that_is_gone_fails_with_the_reason(house: House) -> None:
    store = JobStore(house.data)
    jobs = [
        Job.new(owner="", model=model, plan={**house.plan().kept(), "steps": steps}, now=house.now)
        for model, steps in (("other", 2), ("tiny-wan", 3))
    ]
    for job in jobs:
        store.add(job)
    store.close()
    studio = house.open()
    for job in jobs:
        assert finished(studio, job).error_code == "model_not_found"


def test_without_models_or_jobs_for_videos_no_folder_is_touched(tiny_bundle: Path, tmp_path: Path) -> None:
    settings = Settings(bundles=tiny_bundle, data=tmp_path / "data")
    studio = Studio(settings, Registry(settings))
    studio.open()
    assert not (tmp_path / "data").exists()
    with pytest.raises(ApiError, match="no video"):
        studio.get("video_1", "")
    with pytest.raises(ApiError, match="no model for videos"):
        _ = studio.store
    studio.end()


def test_a_folder_that_another_server_has_leaves_pictures(house: House) -> None:
    other = JobStore(house.data)
    with pytest.raises(StoreError, match="belongs to a server"):
        house.open()
    house.studios.pop()
    settings = Settings(bundles=house.bundle.path, data=house.data)
    registry = Registry(settings)
    registry._models |= {"tiny-wan": house.model, "pictures": replace(house.model, bundle=picture_bundle(house))}
    studio = Studio(settings, registry)
    studio.open()
    for call in (lambda: studio.add(house.model, house.plan(), ""), lambda: studio.get("video_1", "")):
        with pytest.raises(ApiError, match="its log says why") as error:
            call()
        assert (error.value.status, error.value.code) == (503, "storage_unavailable")
    studio.end()
    other.close()


def picture_bundle(house: House) -> Bundle:
    """The bundle as if it made pictures."""
    return replace(house.bundle, manifest=house.bundle.manifest.model_copy(update={"task": "text-to-image"}))


def test_unknown_failures_tell_nothing_but_where_to_look() -> None:
    code, message = explain(RuntimeError("secret path"), "video_1")
    assert code == "internal_error" and "secret" not in message and "video_1" in message
    assert explain(MemoryError(), "video_1")[0] == "out_of_memory"
