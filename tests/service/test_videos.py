"""Videos over HTTP: in this process with all but BentoML around it, and on a live server with OpenAI's client."""

from __future__ import annotations

import io
import json
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from starlette.testclient import TestClient

from distill.bundle import Bundle
from service import routes
from service.edge import Edge, RestorePath
from service.encode import EncodePool
from service.engine import Engine
from service.images import Hub
from service.registry import Model, Registry
from service.runtimes import Conditioning, OnnxRuntime
from service.runtimes.base import Floats
from service.settings import Settings
from tests.service.conftest import Server, tree

WAIT_S = 120.0
KEYS = ("alpha", "beta")


class Held(OnnxRuntime):
    """The real runtime, which can be held before a step."""

    go = threading.Event()

    def step(
        self, latents: Floats, timestep: Floats, coefficients: Floats, noise: Floats, conditioning: Conditioning
    ) -> tuple[Floats, Floats]:
        assert self.go.wait(WAIT_S), "nobody let the step go on"
        return super().step(latents, timestep, coefficients, noise, conditioning)


@pytest.fixture(scope="module")
def hub(tiny_video_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """All of a server but BentoML: two keys, one model of videos."""
    Held.go.set()
    data = tmp_path_factory.mktemp("videos") / "data"
    settings = Settings(bundles=tiny_video_bundle, data=data, api_keys=KEYS, max_frames=21, max_key_videos=32)
    registry, bundle = Registry(settings), Bundle.open(tiny_video_bundle)
    runtime, engine = Held(bundle, threads=1, max_batch=2), Engine("cpu", max_queue=64)
    engine.add("tiny-wan", runtime, bundle.manifest)
    registry._models["tiny-wan"] = Model(bundle, runtime, engine, bundle.digest, 0)
    registry._engines["cpu"] = engine
    registry.state = "ready"
    made = Hub(settings, registry, EncodePool(1))
    made.studio.open()
    yield made
    Held.go.set()
    made.studio.close()
    registry.close()
    made.studio.end()
    made.pool.close()


@pytest.fixture
def http(hub: Hub) -> Iterator[TestClient]:
    Held.go.set()
    with TestClient(
        Edge(RestorePath(routes.build(hub)), hub.settings), headers={"authorization": "Bearer alpha"}
    ) as client:
        yield client
    Held.go.set()


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def created(http: TestClient, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/videos", json={"prompt": "a red cube", "seed": 7, "steps": 2, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def finished(http: TestClient, video: dict[str, Any]) -> dict[str, Any]:
    get = lambda: http.get(f"/v1/videos/{video['id']}").json()  # noqa: E731
    return dict(until(lambda: (now := get())["status"] in ("completed", "failed") and now))


def events_of(text: str) -> list[tuple[int | None, str, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "event" in lines:
            found.append((int(lines["id"]) if "id" in lines else None, lines["event"], json.loads(lines["data"])))
    return found


def alike(clip: bytes, other: bytes) -> bool:
    """Whether two clips show the same."""
    both = []
    for data in (clip, other):
        with av.open(io.BytesIO(data)) as container:
            both.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    return both[0].shape == both[1].shape and float(np.abs(both[0].astype(int) - both[1].astype(int)).mean()) < 1


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_a_job_has_openais_fields_and_ours(http: TestClient) -> None:
    Held.go.clear()
    answer = http.post("/v1/videos", json={"prompt": " a red cube ", "seconds": "1", "seed": 7, "user": "me"})
    job = answer.json()
    assert answer.headers["openai-poll-after-ms"].isdigit()
    expected = {"object": "video", "model": "tiny-wan", "status": "queued", "progress": 0, "completed_at": None}
    expected |= {"expires_at": None, "prompt": "a red cube", "seconds": "1.125", "size": "32x32", "error": None}
    expected |= {"remixed_from_video_id": None, "seed": 7, "num_frames": 9, "fps": 8.0, "steps": 4}
    expected |= {"output_format": "mp4", "metrics": None, "ignored": ["user"]}
    assert {name: job[name] for name in expected} == expected
    assert job["id"].startswith("video_") and job["created_at"] > 1e9 and job["eta_ms"] > 0
    assert "trained on clips of 5 frames" in job["warnings"][0]
    until(lambda: http.get(f"/v1/videos/{job['id']}").json()["status"] == "in_progress")
    assert "in_progress" in error_of(http.get(f"/v1/videos/{job['id']}/content"), 404)["message"]
    Held.go.set()
    done = finished(http, job)
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert done["expires_at"] > done["completed_at"] >= done["created_at"]
    assert done["metrics"]["steps"] == 4 and done["eta_ms"] is None


@pytest.mark.parametrize(
    ("file_format", "media", "codec"),
    [("mp4", "video/mp4", "h264"), ("webm", "video/webm", "vp9"), ("gif", "image/gif", "gif")],
)
def test_content_is_a_clip_in_the_format_that_was_asked_for(
    http: TestClient, file_format: str, media: str, codec: str
) -> None:
    job = finished(http, created(http, output_format=file_format))
    answer = http.get(f"/v1/videos/{job['id']}/content")
    assert answer.headers["content-type"] == media
    assert f'filename="{job["id"]}.{file_format}"' in answer.headers["content-disposition"]
    with av.open(io.BytesIO(answer.content)) as container:
        assert container.streams.video[0].codec_context.name == codec
        assert len(list(container.decode(video=0))) == 5


def test_thumbnail_sheet_and_ranges(http: TestClient) -> None:
    job = finished(http, created(http))
    path = f"/v1/videos/{job['id']}/content"
    whole = http.get(path).content
    for variant, kind, size in (("thumbnail", "WEBP", (32, 32)), ("spritesheet", "JPEG", (96, 64))):
        image = Image.open(io.BytesIO(http.get(path, params={"variant": variant}).content))
        assert (image.format, image.size) == (kind, size)
    part = http.get(path, headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    beyond = http.get(path, headers={"range": f"bytes={len(whole)}-"})
    assert error_of(beyond, 416)["code"] == "range_not_satisfiable"
    assert beyond.headers["content-range"] == f"bytes */{len(whole)}"
    assert error_of(http.get(path, params={"variant": "audio"}), 400)["param"] == "variant"


def test_an_expired_video_is_gone_but_its_record_stays(http: TestClient, hub: Hub) -> None:
    job = finished(http, created(http))
    hub.studio.store.sweep(job["expires_at"] + 1, max_bytes=1 << 30)
    assert error_of(http.get(f"/v1/videos/{job['id']}/content"), 410)["code"] == "expired"
    assert http.get(f"/v1/videos/{job['id']}").json()["status"] == "completed"


def test_lists_go_on_where_the_last_page_ended(http: TestClient) -> None:
    mine = [created(http, seed=i)["id"] for i in range(3)]
    page = http.get("/v1/videos", params={"limit": 2}).json()
    assert [job["id"] for job in page["data"]] == [mine[2], mine[1]]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (mine[2], mine[1], True)
    following = http.get("/v1/videos", params={"limit": 1, "after": page["last_id"]}).json()
    assert [job["id"] for job in following["data"]] == [mine[0]]
    oldest = http.get("/v1/videos", params={"order": "asc", "limit": 1}).json()["data"][0]["id"]
    assert oldest not in mine
    for query, param in (
        ({"limit": "0"}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"order": "up"}, "order"),
        ({"a": 1}, "a"),
    ):
        assert error_of(http.get("/v1/videos", params=query), 400)["param"] == param
    assert error_of(http.get("/v1/videos", params={"after": "video_x"}), 404)["code"] == "not_found"


def test_keys_do_not_see_each_others_videos(http: TestClient) -> None:
    job = created(http)
    other = {"authorization": "Bearer beta"}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/content"), ("GET", "/events")):
        answer = http.request(method, f"/v1/videos/{job['id']}{path}", headers=other)
        assert error_of(answer, 404)["code"] == "not_found"
    assert http.get("/v1/videos", headers=other).json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    assert error_of(http.get("/v1/videos", headers={"authorization": ""}), 401)["code"] == "invalid_api_key"


def test_cancelled_and_deleted_videos(http: TestClient) -> None:
    Held.go.clear()
    job = created(http)
    cancelled = http.post(f"/v1/videos/{job['id']}/cancel")
    assert cancelled.status_code == 200 and cancelled.json()["status"] == "failed"
    assert cancelled.json()["error"] == {"code": "cancelled", "message": "the video was cancelled"}
    Held.go.set()
    deleted = http.delete(f"/v1/videos/{job['id']}").json()
    assert deleted == {"id": job["id"], "object": "video.deleted", "deleted": True}
    assert error_of(http.get(f"/v1/videos/{job['id']}"), 404)


def test_one_key_of_idempotency_is_one_job(http: TestClient) -> None:
    post = lambda seed: http.post(  # noqa: E731
        "/v1/videos", json={"prompt": "a cube", "seed": seed}, headers={"idempotency-key": "once"}
    )
    first, again = post(1), post(1)
    assert first.json()["id"] == again.json()["id"] and again.headers["idempotent-replayed"] == "true"
    assert error_of(post(2), 409)["code"] == "idempotency_conflict"


def test_forms_and_what_is_none(http: TestClient) -> None:
    form = {"prompt": (None, "a red cube"), "seed": (None, "7"), "num_frames": (None, "5")}
    job = http.post("/v1/videos", files=form).json()
    assert (job["seed"], job["num_frames"]) == (7, 5)
    reference = {**form, "input_reference": ("first.png", b"\x89PNG")}
    assert error_of(http.post("/v1/videos", files=reference), 400)["param"] == "input_reference"
    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert error_of(http.post("/v1/videos", content=b"--x\r\nnothing", headers=kind), 400)
    assert error_of(http.post("/v1/videos", content=b"", headers={"content-type": "multipart/form-data"}), 400)
    twice = b"prompt=a&prompt=b"
    kind = {"content-type": "application/x-www-form-urlencoded"}
    assert error_of(http.post("/v1/videos", content=twice, headers=kind), 400)["param"] == "prompt"
    assert error_of(http.post("/v1/videos", content=b"a", headers={"content-type": "text/plain"}), 415)


# --- events ----------------------------------------------------------------------------------------------------------


def test_events_tell_the_way_to_the_end_and_go_on_from_the_last_one(http: TestClient, hub: Hub) -> None:
    Held.go.clear()
    job = created(http, steps=4)
    take = until(lambda: hub.studio.take(job["id"]))
    until(lambda: len(take.events) == 2)
    threading.Timer(0.3, Held.go.set).start()
    last = {"last-event-id": str(take.events[0].id)}
    answer = http.get(f"/v1/videos/{job['id']}/events", headers=last)
    assert answer.headers["content-type"].startswith("text/event-stream")
    numbered = [(number, name) for number, name, _ in events_of(answer.text) if number is not None]
    assert [name for _, name in numbered] == ["video.progress", *["video.progress", "video.preview"] * 3]
    assert [number for number, _ in numbered] == [event.id for event in take.events[1:]]
    _, name, data = events_of(answer.text)[-1]
    assert name == data["type"] == "video.completed" and data["status"] == "completed"
    preview = next(data for _, name, data in events_of(answer.text) if name == "video.preview")
    assert preview["size"] == "32x32" and preview["b64_json"].startswith("/9j/")
    whole = http.get(f"/v1/videos/{job['id']}/events")
    assert [number for number, _, _ in events_of(whole.text)] == [*(event.id for event in take.events), None]
    wrong = http.get(f"/v1/videos/{job['id']}/events", headers={"last-event-id": "x"})
    assert error_of(wrong, 400)["param"] == "Last-Event-ID"


# --- at once, and what else knows of videos --------------------------------------------------------------------------


def test_a_clip_at_once_is_that_of_a_job(http: TestClient) -> None:
    job = finished(http, created(http))
    answer = http.post("/v1/videos/sync", json={"prompt": "a red cube", "seed": 7, "steps": 2})
    assert answer.headers["content-type"] == "video/mp4"
    assert (answer.headers["x-seed"], answer.headers["x-num-frames"], answer.headers["x-fps"]) == ("7", "5", "8")
    assert alike(answer.content, http.get(f"/v1/videos/{job['id']}/content").content)


def test_estimates_models_and_the_queue_know_videos(http: TestClient) -> None:
    told = http.post("/v1/estimate", json={"prompt": "a cube", "seconds": 1}).json()
    assert told["admitted"] and told["eta_ms"] > 0 and told["cost_ms"] > 0
    assert (told["num_frames"], told["seconds"], told["steps"]) == (9, "1.125", 4)
    able = http.get("/v1/models/tiny-wan").json()["capabilities"]
    expected = {"task": "text-to-video", "frames": [5], "frame_stride": 2, "max_frames": 21, "fps": 8.0}
    expected |= {"output_formats": ["mp4", "webm", "gif"], "max_prompt_tokens": 511}
    assert {name: able[name] for name in expected} == expected
    assert http.get("/v1/queue").json()["data"][0]["videos"] >= 0


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "x", "num_frames": 22}, 400, "num_frames"),
        ({"prompt": "x", "model": "other"}, 404, "model"),
        ({"prompt": ""}, 400, "prompt"),
        ({"seed": 1}, 400, "prompt"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/sync", "/v1/estimate"])
def test_wrong_requests_name_the_field(
    http: TestClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    assert error_of(http.post(path, json=body), status)["param"] == param


def test_a_model_of_videos_draws_no_pictures(http: TestClient) -> None:
    answer = http.post("/v1/images/generations", json={"prompt": "a cube", "model": "tiny-wan"})
    assert "POST /v1/videos" in error_of(answer, 400)["message"]


# --- a live server ---------------------------------------------------------------------------------------------------


@pytest.fixture
def client(video_server: Server) -> Iterator[openai.OpenAI]:
    with warnings.catch_warnings():  # OpenAI's own service of this shape has ended; its client says so at every call
        warnings.simplefilter("ignore", DeprecationWarning)
        with openai.OpenAI(base_url=f"{video_server.url}/v1", api_key="unused", max_retries=0) as connected:
            yield connected


def test_openai_client_creates_polls_lists_downloads_and_deletes(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(
        prompt="a red cube", model="tiny-wan", seconds="1", size="32x32", extra_body={"seed": 7, "steps": 2}
    )
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "1.125", "32x32")
    assert (video.model_extra or {})["seed"] == 7
    content = client.videos.download_content(video.id)
    with av.open(io.BytesIO(content.content)) as container:
        assert len(list(container.decode(video=0))) == 9
    assert client.videos.download_content(video.id, variant="thumbnail").content[8:12] == b"WEBP"
    assert video.id in [listed.id for listed in client.videos.list(limit=1)]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)
    with pytest.raises(openai.BadRequestError) as refused:
        client.videos.create(prompt="a red cube", extra_body={"num_frames": 500})
    assert refused.value.param == "num_frames"


def test_pictures_and_videos_are_made_side_by_side(client: openai.OpenAI, video_server: Server) -> None:
    job = client.videos.create(prompt="a red cube", extra_body={"num_frames": 21})
    assert client.images.generate(prompt="a red cube", extra_body={"seed": 1}).data
    until(lambda: client.videos.retrieve(job.id).status == "completed")
    text = video_server.get("/metrics").text
    assert 'leapfrog_videos_total{model="tiny-wan",outcome="completed"}' in text
    assert 'endpoint="/v1/videos/{id}"' in text and job.id not in text


def test_every_job_is_accounted_for_after_the_worker_is_killed(client: openai.OpenAI, video_server: Server) -> None:
    ask = lambda seed: client.videos.create(prompt="a blue cube", extra_body={"seed": seed, "num_frames": 21})  # noqa: E731
    jobs = [ask(seed) for seed in range(20)]  # more than it makes while they are sent, on any machine so far
    for process in tree(video_server.process.pid)[1:]:
        process.kill()
    database = video_server.log.parent / "data" / "jobs.db"
    with sqlite3.connect(database) as found:
        states = dict(found.execute("select id, status from jobs").fetchall())
    found.close()
    assert {job.id for job in jobs} <= set(states), "what was told to a client is kept"

    def state(job_id: str) -> str:
        try:
            return client.videos.retrieve(job_id).status
        except (openai.APIConnectionError, openai.InternalServerError):
            return "nobody answers"

    until(lambda: all(state(job.id) in ("completed", "failed") for job in jobs))
    assert [client.videos.retrieve(job.id).status for job in jobs] == ["completed"] * len(jobs)
    first = client.videos.download_content(jobs[0].id).content
    again = client.videos.create_and_poll(prompt="a blue cube", extra_body={"seed": 0, "num_frames": 21})
    assert alike(client.videos.download_content(again.id).content, first)
