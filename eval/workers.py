"""A program with an interpreter of its own that scores for us: JSON lines over pipes, everything large in files.

    with Worker([python, "worker.py"], "vbench", probe=(expected, tolerance)) as worker:
        worker.ask({"do": "score", …}, seconds=600)

It must say hello first, and with a probe score that is right: a broken scorer is found before a night is wasted on
it. A worker that dies, is silent for too long or answers something else than JSON is an error with the end of its log.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

from eval.errors import EvalError

_START = 300.0
"""Seconds until hello: torch and a dozen packages are imported, weights are hashed."""
_FAREWELL = 2.0
_LOG_END = 400


class Worker:
    """A running worker. hello: what it said of itself. Use as a context manager; leaving it ends the process."""

    def __init__(
        self,
        command: Sequence[str],
        name: str,
        *,
        probe: tuple[float, float],
        environment: Mapping[str, str] | None = None,
        start: float = _START,
    ) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (close() closes it)
        self._rest = b""
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            self._log.close()
            raise EvalError(f"the worker {name} does not start ({error}); make its interpreter again") from None
        try:
            self.hello = self._answer(start)
            self._check(probe)
        except BaseException:
            self.close()
            raise

    def _check(self, probe: tuple[float, float]) -> None:
        expected, tolerance = probe
        found = self.hello.get("probe")
        if self.hello.get("hello") != self.name:
            raise EvalError(f"the worker {self.name} says it is {self.hello.get('hello')!r}; start the right program")
        if not isinstance(found, int | float) or not math.isclose(found, expected, abs_tol=tolerance, rel_tol=0):
            raise EvalError(
                f"the worker {self.name} scores its probe {found} instead of {expected:g} ± {tolerance:g}; "
                "its packages are not what they should be, make its interpreter again"
            )

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to one request. Raises EvalError for an error of the worker, its end, or its silence."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request, allow_nan=False).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._failure("has ended") from None
        answer = self._answer(seconds)
        if "error" in answer:
            raise EvalError(f"the worker {self.name} could not {request.get('do')}: {answer['error']}")
        return answer

    def _answer(self, seconds: float) -> dict[str, Any]:
        line = self._line(time.monotonic() + seconds, seconds)
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._failure(f"answered {line[:80]!r}, which is no JSON") from None
        if not isinstance(answer, dict):
            raise self._failure(f"answered {line[:80]!r}, which is no JSON object")
        return answer

    def _line(self, deadline: float, seconds: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._failure(f"said nothing for {seconds:g} s")
                block = os.read(self._process.stdout.fileno(), 65536)
                if not block:
                    raise self._failure("has ended")
                self._rest += block
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _failure(self, what: str) -> EvalError:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LOG_END))
        end = " ".join(self._log.read().decode(errors="replace").split())
        return EvalError(f"the worker {self.name} {what}; the end of its log: {end or '(empty)'}")

    def close(self) -> None:
        """End the process, at first by closing its input, which it should understand."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=_FAREWELL)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
