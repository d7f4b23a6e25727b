"""LoRAs by name: what is kept, who may register them, and that rows wear what their requests named."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import safetensors.torch
import torch

from distill.bundle import Bundle
from service import video_request
from service.encode import EncodePool
from service.engine import Engine
from service.errors import ApiError
from service.images import Hub
from service.jobs import Job
from service.loras import Loras
from service.registry import Model, Registry
from service.rows import Order
from service.runtimes import generate
from service.runtimes.base import Conditioning, Floats, Worn
from service.runtimes.torch import TorchRuntime
from service.settings import Settings
from service.video_request import VideoPlan
from tests.service.conftest import Server, serve

PROMPT = "a red cube"
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
SIZE = (64, 64)


def lora_file(seed: int = 0, strength: float = 2.0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(2, 48, generator=generator)
    up = strength * torch.randn(48, 2, generator=generator)
    return safetensors.torch.save({f"{LAYER}.lora_A.weight": down, f"{LAYER}.lora_B.weight": up})


class Recorded(TorchRuntime):
    """The real runtime that tells what each step wore."""

    def __init__(self, bundle: Bundle) -> None:
        self.steps: list[tuple[tuple[float, ...], int]] = []
        """(scales of the LoRAs, rows)."""
        super().__init__(bundle, threads=1, max_batch=4)

    def configure(self, *, exact: bool = True, loras: Worn = ()) -> None:
        super().configure(exact=exact, loras=loras)
        self.scales = tuple(scale for _, scale in loras)

    def step(
        self, latents: Floats, timestep: Floats, coefficients: Floats, noise: Floats, conditioning: Conditioning
    ) -> tuple[Floats, Floats]:
        self.steps.append((self.scales, len(latents)))
        return super().step(latents, timestep, coefficients, noise, conditioning)


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Recorded:
    return Recorded(Bundle.open(tiny_bundle))


@pytest.fixture
def model(tiny_bundle: Path, runtime: Recorded) -> Iterator[Model]:
    engine, bundle = Engine("cpu", max_queue=64), Bundle.open(tiny_bundle)
    engine.add("tiny-sdxl", runtime, bundle.manifest)
    yield Model(bundle, runtime, engine, bundle.digest, 0)
    engine.close()
    runtime.configure()


def book(model: Model, folder: Path, **settings: int) -> Loras:
    chosen = Settings(bundles=model.bundle.path, data=folder, **settings)
    registry = Registry(chosen)
    registry._models[model.name], registry.state = model, "ready"
    return Loras(chosen, registry)


def test_what_is_registered_is_there_after_a_restart(model: Model, tmp_path: Path) -> None:
    loras = book(model, tmp_path)
    one = loras.add("one", model, lora_file(0))
    loras.add("two", model, lora_file(1))
    loras.remove("two")
    again = book(model, tmp_path)
    again.open()
    assert [entry.described() for entry in again.all()] == [one.described()]
    assert (one.lora.rank, one.lora.layers, one.lora.bytes) == (2, 1, len(lora_file(0)))


def test_a_file_that_was_altered_is_not_served(model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    book(model, tmp_path).add("one", model, lora_file(0))
    (tmp_path / "loras" / "one.safetensors").write_bytes(lora_file(1))
    again = book(model, tmp_path)
    again.open()
    assert again.all() == []
    assert "LoRA one is not served: the file was altered" in caplog.text


@pytest.mark.parametrize("name", ["", "A", "../up", "a/b", ".hidden", "x" * 65, "a b"])
def test_names_cannot_lead_out_of_the_folder(model: Model, tmp_path: Path, name: str) -> None:
    with pytest.raises(ApiError) as refused:
        book(model, tmp_path).add(name, model, lora_file())
    assert (refused.value.status, refused.value.param) == (400, "name")
    assert not (tmp_path / "loras").exists()


def test_a_name_has_one_meaning_and_there_are_only_so_many(model: Model, tmp_path: Path) -> None:
    loras = book(model, tmp_path, max_loras=1)
    first = loras.add("one", model, lora_file(0))
    assert loras.add("one", model, lora_file(0)) is first
    for name, seed, code in (("one", 1, "lora_exists"), ("two", 0, "too_many_loras")):
        with pytest.raises(ApiError) as refused:
            loras.add(name, model, lora_file(seed))
        assert (refused.value.status, refused.value.code) == (409, code)
        assert refused.value.headers["x-should-retry"] == "false"


def test_requests_name_what_there_is(model: Model, tmp_path: Path) -> None:
    loras = book(model, tmp_path)
    one, two = (loras.add(name, model, lora_file(seed)) for seed, name in enumerate(("one", "two")))
    found = loras.resolve(model, (("one", 0.5), ("two", 1.0)))
    assert found == loras.resolve(model, (("two", 1.0), ("one", 0.5))), "the order of names means nothing"
    assert dict(found) == {one.lora: 0.5, two.lora: 1.0}
    with pytest.raises(ApiError) as refused:
        loras.resolve(model, (("one", 1.0), ("three", 1.0)))
    assert (refused.value.status, refused.value.code, refused.value.param) == (404, "lora_not_found", "loras.1.name")


def test_rows_share_batches_with_those_that_wear_the_same(model: Model, runtime: Recorded) -> None:
    lora = runtime.read_lora(lora_file())
    sets: list[Worn] = [(), ((lora, 1.0),), ((lora, 0.5),)]
    runtime.steps.clear()
    orders = [
        Order(model.name, PROMPT, (seed,), 2, SIZE, loras=worn, exact=False) for seed in range(4) for worn in sets
    ]
    pictures = [future.result(60) for future in [model.engine.submit(order)[0] for order in orders]]
    assert {scales for scales, _ in runtime.steps} == {(), (1.0,), (0.5,)}
    assert max(rows for _, rows in runtime.steps) > 1
    for order, picture in zip(orders, pictures, strict=True):
        runtime.configure(loras=order.loras)
        alone = generate(runtime, runtime.manifest, [PROMPT], order.seeds, 2)[0]
        assert np.abs(picture.pixels.astype(int) - alone.astype(int)).max() <= 1
    assert not np.array_equal(pictures[0].pixels, pictures[1].pixels)


def test_a_deterministic_row_keeps_every_bit_beside_others(model: Model, runtime: Recorded) -> None:
    lora = runtime.read_lora(lora_file())
    orders = [Order(model.name, PROMPT, (seed,), 2, SIZE, loras=((lora, 1.0),)) for seed in range(4)]
    pictures = [future.result(60) for future in [model.engine.submit(order)[0] for order in orders]]
    runtime.configure(loras=((lora, 1.0),))
    for order, picture in zip(orders, pictures, strict=True):
        np.testing.assert_array_equal(picture.pixels, generate(runtime, runtime.manifest, [PROMPT], order.seeds, 2)[0])


def test_scales_of_callers_make_no_cost_curves(model: Model, runtime: Recorded) -> None:
    lora, engine = runtime.read_lora(lora_file()), model.engine
    assert isinstance(engine, Engine)
    before = len(engine.budget._curves)
    for k in range(5):
        engine.submit(Order(model.name, PROMPT, (k,), 1, SIZE, loras=((lora, k / 10),)))[0].result(60)
    assert len(engine.budget._curves) == before


def video_lora() -> bytes:
    generator = torch.Generator().manual_seed(0)
    layer = "transformer.blocks.0.attn1.to_q"
    factors = {"A": torch.randn(2, 24, generator=generator), "B": 5 * torch.randn(24, 2, generator=generator)}
    return safetensors.torch.save({f"{layer}.lora_{half}.weight": value for half, value in factors.items()})


def test_clips_wear_loras_and_jobs_without_theirs_fail(tiny_video_bundle: Path, tmp_path: Path) -> None:
    bundle, engine = Bundle.open(tiny_video_bundle), Engine("cpu", max_queue=8)
    runtime = TorchRuntime(bundle, threads=1, max_batch=1)
    engine.add("tiny-wan", runtime, bundle.manifest)
    settings = Settings(bundles=tiny_video_bundle, data=tmp_path)
    registry = Registry(settings)
    model = registry._models["tiny-wan"] = Model(bundle, runtime, engine, bundle.digest, 0)
    registry.state = "ready"
    hub = Hub(settings, registry, EncodePool(1))
    hub.open()

    def film(*loras: str) -> tuple[Job, bytes]:
        wished = [{"name": name, "scale": 1.0} for name in loras]
        body = json.dumps({"prompt": PROMPT, "seed": 7, "steps": 1, "output_format": "gif", "loras": wished})
        plan = video_request.plan(video_request.parse(body.encode()), bundle.manifest, settings)
        assert VideoPlan.of(json.loads(json.dumps(plan.kept()))) == plan
        job = hub.studio.add(model, plan, "")
        while not (job := hub.studio.get(job.id, "")).finished:
            time.sleep(0.05)
        path = hub.studio.store.path(job.id)
        return job, path.read_bytes() if path.is_file() else b""

    try:
        hub.loras.add("wild", model, video_lora())
        plain, worn = film(), film("wild")
        assert (plain[0].status, worn[0].status) == ("completed", "completed")
        assert b"" != plain[1] != worn[1]
        hub.loras.remove("wild")
        assert film("wild")[0].error_code == "lora_not_found"
    finally:
        hub.studio.close()
        registry.close()
        engine.close()
        hub.studio.end()
        hub.pool.close()


# --- over HTTP -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_server(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = {"api_keys": "user", "admin_keys": "admin", "runtime": "torch", "max_lora_mb": 1}
    with serve(tiny_bundle, tmp_path_factory.mktemp("torch") / "home", **limits) as running:
        yield running


def ask(server: Server, method: str, path: str, key: str = "admin", **more: object) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.request(method, server.url + path, headers=headers, timeout=60, **more)  # type: ignore[arg-type]


def test_a_lora_is_registered_named_worn_and_deleted(torch_server: Server) -> None:
    made = ask(torch_server, "POST", "/v1/admin/loras/wild", content=lora_file())
    assert made.status_code == 200, made.text
    assert made.json()["model"] == "tiny-sdxl"
    assert ask(torch_server, "GET", "/v1/loras", "user").json()["data"] == [made.json()]
    with openai.OpenAI(base_url=f"{torch_server.url}/v1", api_key="user", max_retries=0) as client:

        def draw(*loras: dict[str, object], seed: int = 7) -> bytes:
            body = {"seed": seed, "steps": 1, **({"loras": list(loras)} if loras else {})}
            data = client.images.generate(prompt=PROMPT, extra_body=body).data
            assert data is not None and data[0].b64_json is not None
            return base64.b64decode(data[0].b64_json)

        plain, worn = draw(), draw({"name": "wild"})
        assert plain != worn == draw({"name": "wild", "scale": 1})
        assert draw({"name": "wild", "scale": 0.5}) not in (plain, worn)
        with ThreadPoolExecutor(6) as pool:
            wishes = [{"name": "wild"} if k % 2 else None for k in range(6)]
            files = list(pool.map(lambda wish: draw(wish) if wish else draw(), wishes))
        assert files == [worn if wish else plain for wish in wishes]
        with pytest.raises(openai.NotFoundError) as unknown:
            draw({"name": "tame"})
        assert (unknown.value.code, unknown.value.param) == ("lora_not_found", "loras.0.name")
        with pytest.raises(openai.BadRequestError) as wrong:
            draw({"name": "wild", "scale": 11})
        assert wrong.value.param == "loras.0.scale"
        with pytest.raises(openai.BadRequestError, match="twice"):
            draw({"name": "wild"}, {"name": "wild"})
        gone = ask(torch_server, "DELETE", "/v1/admin/loras/wild")
        assert gone.json() == {"id": "wild", "object": "lora.deleted", "deleted": True}
        with pytest.raises(openai.NotFoundError):
            draw({"name": "wild"})
    assert ask(torch_server, "DELETE", "/v1/admin/loras/wild").status_code == 404


def test_only_admins_register(torch_server: Server) -> None:
    for key, status, code in (("user", 403, "forbidden"), ("", 401, "invalid_api_key"), ("x", 401, "invalid_api_key")):
        for method in ("POST", "DELETE"):
            answer = ask(torch_server, method, "/v1/admin/loras/wild", key)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert ask(torch_server, "GET", "/v1/models", "admin").status_code == 200
    assert ask(torch_server, "GET", "/v1/loras", "user").json()["data"] == []


def test_uploads_are_files_of_a_bounded_size(torch_server: Server) -> None:
    path = "/v1/admin/loras/wild"
    assert ask(torch_server, "POST", path, content=b"x" * (2 << 20)).status_code == 413
    answer = ask(torch_server, "POST", path, content=b"x" * 2000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_lora")
    assert ask(torch_server, "POST", path, json={"url": "https://example.org/lora"}).status_code == 415
    assert ask(torch_server, "POST", f"{path}?model=other", content=lora_file()).status_code == 404
    assert ask(torch_server, "POST", "/v1/admin/loras/%2e%2e%2fup", content=lora_file()).status_code in (400, 404)
    assert ask(torch_server, "GET", "/v1/loras").json()["data"] == []


def test_models_tell_that_they_take_loras_and_gave_bits_up_only_when_asked(torch_server: Server) -> None:
    able = ask(torch_server, "GET", "/v1/models/tiny-sdxl").json()["capabilities"]
    assert (able["runtime"], able["loras"], able["deterministic"]) == ("torch", True, True)
    body = {"prompt": PROMPT, "seed": 3, "steps": 2, "deterministic": False, "cache": False}
    assert ask(torch_server, "POST", "/v1/images/generations", json=body).status_code == 200


def test_without_admin_keys_nobody_is_an_admin(server: Server) -> None:
    answer = httpx.post(f"{server.url}/v1/admin/loras/wild", content=lora_file())
    assert answer.status_code == 403
    assert "LEAPFROG_ADMIN_KEYS" in answer.json()["error"]["message"]
    assert server.get("/v1/loras").json() == {"object": "list", "data": []}
    refused = server.images(prompt=PROMPT, loras=[{"name": "wild"}])
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_operation")
    assert "LEAPFROG_RUNTIME=torch" in refused.json()["error"]["message"]
