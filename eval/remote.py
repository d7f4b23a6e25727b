"""A running service as its users see it: pictures by POST /v1/images/generations, clips by POST /v1/videos.

Several requests are under way at a time. Clips come as the service compresses them, hence with losses, so their scores
compare with those of other clips from services alone.
"""

from __future__ import annotations

import base64
import binascii
import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from eval.clips import read_clip
from eval.errors import EvalError
from eval.prompts import Prompt
from eval.sources import Images, read_picture

CODEC = "the service's mp4"
_PARALLEL_REQUESTS = 8
_ATTEMPTS = 5
_CLIP_SECONDS = 600.0
_ASK_AGAIN_S = 0.2


class Service:
    """HTTP with a service that may be busy, or restart in the middle: what fails for now is asked again."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's JSON."""
        try:
            return json.loads(self.fetch(path, body))
        except ValueError as error:
            raise EvalError(f"{self.url}{path} answered no JSON ({error}); start it with: make serve") from None

    def fetch(self, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> bytes:
        """The answer's body. Posts are asked again with growing pauses."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers, method=method)
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1
            try:
                with urllib.request.urlopen(request, timeout=300) as response:
                    found: bytes = response.read()
                    return found
            except urllib.error.HTTPError as error:
                detail = error.read(2000).decode(errors="replace")
                if error.code not in (429, 503) or last:
                    raise EvalError(f"{self.url}{path} answered {error.code}: {detail}") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
                if last or body is None:
                    raise EvalError(f"{self.url}{path} does not answer ({error}); start it with: make serve") from None
            time.sleep(0.5 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


class ServiceSource:
    """One model of a service. frames: of the clips that it shall make; None: pictures."""

    def __init__(self, url: str, steps: int | None = None, frames: int | None = None) -> None:
        url, _, name = url.partition("#")
        self._service, self._steps, self._frames = Service(url), steps, frames
        models = {model["id"]: model for model in self._service.ask("/v1/models")["data"]}
        if name and name not in models:
            raise EvalError(f"{url} serves {sorted(models)}, not {name!r}; use one of these")
        model = models[name] if name else self._first(models)
        self._model, able = model["id"], model.get("capabilities", {})
        self._check(able)
        taken = steps or able.get("default_steps")
        self.name = f"{self._model} at {url}, {taken or 'default'} steps"
        self.about = {"kind": "service", "url": url, "model": model, **({"fps": able["fps"]} if frames else {})}
        # Only a service that says which weights it runs makes pictures that may be reused.
        known = {
            "digest": model.get("digest"),
            "steps": taken,
            "runtime": able.get("runtime"),
            "runtime_version": able.get("runtime_version"),
            "precision": able.get("precision"),
            "device": able.get("device"),
            **({"frames": frames, "codec": CODEC} if frames else {}),
        }
        self.identity: dict[str, Any] | None = {"kind": "service", **known} if all(known.values()) else None

    def _first(self, models: dict[str, Any]) -> Any:
        """The first model of the wanted kind, or else the first."""
        films = [m for m in models.values() if self._films(m.get("capabilities", {})) == (self._frames is not None)]
        return next(iter(films or models.values()))

    @staticmethod
    def _films(able: dict[str, Any]) -> bool:
        return able.get("task") == "text-to-video"

    def _check(self, able: dict[str, Any]) -> None:
        if self._films(able) != (self._frames is not None):
            made, asked = ("clips", "pictures") if self._films(able) else ("pictures", "clips")
            raise EvalError(f"{self._model} makes {made} and the suite asks for {asked}; name another model: URL#MODEL")
        if self._steps is not None and self._steps not in able.get("steps", [self._steps]):
            raise EvalError(f"--steps is {self._steps} but {self._model} samples in {able['steps']}; use one of these")

    def make(self, prompts: Sequence[Prompt]) -> Images:
        one = self._picture if self._frames is None else self._clip
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            return np.stack(list(pool.map(one, prompts)))

    def _asked(self, prompt: Prompt, **more: Any) -> dict[str, Any]:
        steps = {"steps": self._steps} if self._steps else {}
        return {"model": self._model, "prompt": prompt.text, "seed": prompt.seed, **steps, **more}

    def _picture(self, prompt: Prompt) -> Images:
        answer = self._service.ask("/v1/images/generations", self._asked(prompt, n=1, response_format="b64_json"))
        try:
            data = base64.b64decode(answer["data"][0]["b64_json"], validate=True)
        except (KeyError, IndexError, TypeError, binascii.Error) as error:
            raise EvalError(f"{self._service.url} answered without a picture for {prompt.id} ({error!r})") from None
        return read_picture(data, f"the picture of {prompt.id}")

    def _clip(self, prompt: Prompt) -> Images:
        """(F, 3, H, W): a job, waited for, fetched and forgotten."""
        body = self._asked(prompt, num_frames=self._frames, output_format="mp4", cache=False)
        job, deadline = self._service.ask("/v1/videos", body), time.monotonic() + _CLIP_SECONDS
        path = f"/v1/videos/{job.get('id')}"
        while job.get("status") in ("queued", "in_progress") and time.monotonic() < deadline:
            time.sleep(_ASK_AGAIN_S)
            job = self._service.ask(path)
        if job.get("status") != "completed":
            why = job.get("error") or f"it is {job.get('status')!r} after {_CLIP_SECONDS:g} s"
            raise EvalError(f"{self._service.url} made no clip of {prompt.id} ({why}); look at the service's log")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{prompt.id}.mp4"
            file.write_bytes(self._service.fetch(f"{path}/content"))
            frames, _ = read_clip(file)
        self._service.fetch(path, method="DELETE")
        return frames
