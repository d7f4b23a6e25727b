"""A request on its way: known files, idempotency, cancelling, deadlines, over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.service.conftest import Server

PROMPT = "a small green rubber sphere"


def test_the_same_request_is_answered_from_the_cache_unless_told_not_to(server: Server) -> None:
    first, again = (server.images(prompt=PROMPT, seed=901, steps=2).json() for _ in range(2))
    anew = server.images(prompt=PROMPT, seed=901, steps=2, cache=False).json()
    assert [answer["metrics"]["cache"] for answer in (first, again, anew)] == ["miss", "hit", "off"]
    assert first["data"] == again["data"] == anew["data"]
    assert again["metrics"]["denoise_ms"] == 0
    assert anew["metrics"]["denoise_ms"] > 0
    assert anew["metrics"]["prompt_cache"] == "off"


def test_what_decides_the_bytes_is_part_of_the_key(server: Server) -> None:
    base = {"prompt": PROMPT, "seed": 902, "steps": 2, "output_format": "jpeg", "output_compression": 80}
    server.images(**base)
    others = {"prompt": "a cube", "seed": 903, "steps": 1, "output_format": "png", "output_compression": 20}
    for name, value in others.items():
        assert server.images(**{**base, name: value}).json()["metrics"]["cache"] == "miss", name


def test_only_unknown_pictures_of_a_request_are_computed(server: Server) -> None:
    server.images(prompt=PROMPT, seed=911, steps=1)
    answer = server.images(prompt=PROMPT, seed=910, n=3, steps=1).json()
    assert answer["metrics"]["cache"] == "partial"
    assert [item["seed"] for item in answer["data"]] == [910, 911, 912]
    for item in answer["data"]:
        alone = server.images(prompt=PROMPT, seed=item["seed"], steps=1, cache=False).json()
        assert alone["data"] == [item]


def test_an_idempotency_key_gives_the_first_answer_again(server: Server) -> None:
    url, body = f"{server.url}/v1/images/generations", {"prompt": PROMPT, "steps": 4}
    headers = {"idempotency-key": "order-1"}
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: httpx.post(url, json=body, headers=headers, timeout=60), range(4)))
    answers.append(httpx.post(url, json=body, headers=headers, timeout=60))
    assert len({answer.content for answer in answers}) == 1, "the seed is drawn once"
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 4
    assert len({answer.headers["x-request-id"] for answer in answers}) == 5
    conflict = httpx.post(url, json={**body, "steps": 2}, headers=headers, timeout=60)
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert conflict.headers["x-should-retry"] == "false"
    stream = httpx.post(url, json={**body, "stream": True}, headers=headers, timeout=60)
    assert stream.status_code == 400


def test_a_running_request_can_be_cancelled_by_its_id(server: Server) -> None:
    """Tried until the cancellation arrives while the request is running, which is up to the machine."""
    url, body = f"{server.url}/v1/images/generations", {"prompt": PROMPT, "steps": 8, "n": 4, "cache": False}
    refused: list[httpx.Response] = []
    with ThreadPoolExecutor(8) as pool:
        for attempt in range(50):
            names = [f"to-cancel-{attempt}-{i}" for i in range(8)]
            asked = [
                pool.submit(httpx.post, url, json=body, headers={"x-request-id": name}, timeout=60) for name in names
            ]
            while not all(answer.done() for answer in asked):
                told = httpx.post(f"{server.url}/v1/requests/{names[-1]}/cancel", timeout=30)
                if told.status_code == 200:
                    assert told.json() == {"id": names[-1], "object": "request.cancelled", "cancelled": True}
                    break
            refused = [answer.result() for answer in asked if answer.result().status_code != 200]
            if refused:
                break
    (answer,) = refused
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")
    assert answer.headers["x-request-id"] == names[-1]
    assert httpx.post(f"{server.url}/v1/requests/{names[-1]}/cancel", timeout=30).status_code == 404


def test_a_deadline_that_cannot_be_met_is_told_at_once(server: Server) -> None:
    refused = server.images(prompt=PROMPT, steps=8, deadline_ms=1, cache=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert refused.json()["error"]["param"] == "deadline_ms"
    assert int(refused.headers["retry-after-ms"]) > 0
    assert server.images(prompt=PROMPT, steps=8, deadline_ms=60_000, cache=False).status_code == 200


def test_estimates_name_cost_time_and_place_without_computing(server: Server) -> None:
    def estimate(**body: object) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/estimate", json={"prompt": PROMPT, **body}, timeout=30)

    one, four = estimate(steps=4).json(), estimate(steps=4, n=4).json()
    assert one["admitted"] and one["error"] is None
    assert one["queue_position"] == 0
    assert 0 < one["cost_ms"] < four["cost_ms"]
    assert 0 < one["eta_ms"] <= four["eta_ms"]
    hopeless = estimate(steps=8, deadline_ms=1).json()
    assert not hopeless["admitted"]
    assert hopeless["error"]["code"] == "deadline_exceeded"
    assert estimate(steps=3).status_code == 400
    queue = httpx.get(f"{server.url}/v1/queue", timeout=30).json()
    idle = {"device": "cpu", "replicas": 1, "models": ["tiny-sdxl"], "waiting": 0, "running": 0, "work_ms": 0.0}
    assert queue["data"] == [{**idle, "videos": 0}]
