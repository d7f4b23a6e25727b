"""LoRAs by name: registered with an admin key, kept on disk, and worn by the requests that name them.

GET    /v1/loras                          every LoRA with its model
POST   /v1/admin/loras/{name}?model=…     the body is a safetensors file
DELETE /v1/admin/loras/{name}

A file is checked against the model before it is kept: layers, shapes, finite values. Who asks for pictures gives names,
never paths or addresses. Rows that wear the same LoRAs at the same scales share batches; see service.budget.BatchKey.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.responses import JSONResponse

from service import errors
from service.edge import STATE, RequestState
from service.errors import ApiError, invalid, unsupported
from service.registry import Model, Registry
from service.runtimes import Lora, LoraRefused
from service.runtimes.base import Worn
from service.settings import Settings

logger = logging.getLogger(__name__)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
FILE_TYPES = ("application/octet-stream", "application/safetensors", "application/vnd.safetensors")


@dataclass(frozen=True)
class Entry:
    """One registered LoRA."""

    name: str
    model: str
    lora: Lora
    created: int
    """Unix seconds."""

    def described(self) -> dict[str, Any]:
        lora = self.lora
        about = {"rank": lora.rank, "layers": lora.layers, "bytes": lora.bytes, "digest": lora.digest}
        return {"id": self.name, "object": "lora", "model": self.model, "created": self.created, **about}


class Loras:
    """All LoRAs of a server, in a folder with two files each: the tensors, and what they are for."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self.settings, self.registry, self.folder = settings, registry, settings.data / "loras"
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}

    def open(self) -> None:
        """Read what was registered before. What does not fit any more is left where it is and told in the log."""
        for path in sorted(self.folder.glob("*.json")):
            try:
                entry = self._read(path)
            except (OSError, ValueError, KeyError, LoraRefused) as error:
                logger.warning("LoRA %s is not served: %s", path.stem, error)
                continue
            self._entries[entry.name] = entry
        if self._entries:
            logger.info("LoRAs: %s", ", ".join(self._entries))

    def all(self) -> list[Entry]:
        with self._lock:
            return list(self._entries.values())

    def add(self, name: str, model: Model, data: bytes) -> Entry:
        """Register a LoRA, kept before this returns; the same bytes under the same name are no second one.

        Raises ApiError: 400 for a name or file that does not fit, 409 for a name that is taken, 503 for a full disk.
        """
        if not NAME.fullmatch(name):
            text = f"name is {name[:64]!r}; give up to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit"
            raise invalid("name", text)
        if not model.runtime.capabilities.loras:
            raise unsupported("model", _takes_none(model))
        try:
            entry = Entry(name, model.name, model.runtime.read_lora(data), int(time.time()))
        except LoraRefused as error:
            raise invalid("body", str(error), "invalid_lora") from None
        with self._lock:
            known = self._entries.get(name)
            if known is not None and (known.lora.digest, known.model) == (entry.lora.digest, entry.model):
                return known
            if known is not None:
                raise _conflict(
                    f"{name!r} is the name of another LoRA; delete that one or take another name", "lora_exists"
                )
            if len(self._entries) >= self.settings.max_loras:
                raise _conflict(
                    f"there are {len(self._entries)} LoRAs, which is the most; delete one", "too_many_loras"
                )
            try:
                self._write(entry, data)
            except OSError as error:
                logger.error("no LoRA can be kept: %s", error)
                raise errors.unavailable("the server cannot keep the file; try again later", "storage_full") from None
            self._entries[name] = entry
        logger.info(
            "LoRA %s of %s registered: rank %d, %d layers", name, model.name, entry.lora.rank, entry.lora.layers
        )
        return entry

    def remove(self, name: str) -> None:
        """Forget a LoRA; pictures that were begun with it are finished. Raises ApiError 404."""
        with self._lock:
            if name not in self._entries:
                raise _unknown(name, "name")
            for suffix in (".json", ".safetensors"):
                (self.folder / f"{name}{suffix}").unlink(missing_ok=True)
            del self._entries[name]
        logger.info("LoRA %s deleted", name)

    def resolve(self, model: Model, wished: tuple[tuple[str, float], ...]) -> Worn:
        """The LoRAs of a request in an order of their own, so that equal sets are equal. Raises ApiError."""
        if wished and not model.runtime.capabilities.loras:
            raise unsupported("loras", _takes_none(model))
        worn: list[tuple[Lora, float]] = []
        with self._lock:
            for index, (name, scale) in enumerate(wished):
                entry = self._entries.get(name)
                if entry is None:
                    raise _unknown(name, f"loras.{index}.name")
                if entry.model != model.name:
                    text = f"{name!r} is a LoRA of {entry.model!r} and not of {model.name!r}; see GET /v1/loras"
                    raise invalid(f"loras.{index}.name", text)
                worn.append((entry.lora, scale))
        return tuple(sorted(worn, key=lambda pair: pair[0].digest))

    def _read(self, path: Path) -> Entry:
        about = json.loads(path.read_text(encoding="utf-8"))
        data = path.with_suffix(".safetensors").read_bytes()
        if hashlib.sha256(data).hexdigest() != about["digest"]:
            raise ValueError("the file was altered; register it again")
        model = self.registry.get_loaded(about["model"])
        return Entry(path.stem, model.name, model.runtime.read_lora(data), int(about["created"]))

    def _write(self, entry: Entry, data: bytes) -> None:
        """The tensors first, so that what is described is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = json.dumps({"model": entry.model, "created": entry.created, "digest": entry.lora.digest})
        for suffix, content in ((".safetensors", data), (".json", about.encode())):
            draft = self.folder / f"{entry.name}{suffix}.part"
            draft.write_bytes(content)
            os.replace(draft, self.folder / f"{entry.name}{suffix}")


def add_routes(web: FastAPI, loras: Loras) -> None:
    @web.get("/v1/loras")
    async def listed() -> Response:
        return JSONResponse({"object": "list", "data": [entry.described() for entry in loras.all()]})

    @web.post("/v1/admin/loras/{name}")
    async def register(request: Request, name: str) -> Response:
        _only_admins(request)
        model = _model(loras.registry, request.query_params.get("model"))
        kind = request.headers.get("content-type", FILE_TYPES[0]).partition(";")[0].strip().lower()
        if kind not in FILE_TYPES:
            text = f"content-type is {kind[:80]!r}; send the file's bytes as {FILE_TYPES[0]}"
            raise ApiError(415, text, code="unsupported_media_type")
        entry = await asyncio.to_thread(loras.add, name, model, await request.body())
        return JSONResponse(entry.described())

    @web.delete("/v1/admin/loras/{name}")
    async def delete(request: Request, name: str) -> Response:
        _only_admins(request)
        loras.registry.get(None)
        await asyncio.to_thread(loras.remove, name)
        return JSONResponse({"id": name, "object": "lora.deleted", "deleted": True})


def _only_admins(request: Request) -> None:
    """The edge has looked at the key already; a route that it does not know as an admin's stays shut."""
    state: RequestState = request.scope[STATE]
    if not state.admin:
        raise errors.needs_admin()


def _model(registry: Registry, name: str | None) -> Model:
    """The named model, else the first that takes LoRAs, else the first. Raises ApiError."""
    first = registry.get(name)
    if name is not None:
        return first
    return next((model for model in registry.all() if model.runtime.capabilities.loras), first)


def _takes_none(model: Model) -> str:
    able = model.runtime.capabilities
    return f"{model.name} runs on {able.runtime}, which takes no LoRAs; start the server with LEAPFROG_RUNTIME=torch"


def _unknown(name: str, param: str) -> ApiError:
    return ApiError(404, f"there is no LoRA {name[:64]!r}; see GET /v1/loras", code="lora_not_found", param=param)


def _conflict(message: str, code: str) -> ApiError:
    return ApiError(409, message, code=code, param="name", headers={"x-should-retry": "false"})
