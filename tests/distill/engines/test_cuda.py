"""The CUDA driver where there is none: a reason, not a crash."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from distill.engines import cuda
from distill.engines.cuda import CudaUnavailable, Driver, Gpu


def test_architecture_is_the_compute_capability() -> None:
    assert [Gpu("", capability).architecture for capability in ((9, 0), (8, 9), (12, 1))] == ["sm90", "sm89", "sm121"]


def test_a_machine_without_the_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-nowhere.so.1")
    with pytest.raises(CudaUnavailable, match=r"libcuda-that-is-nowhere\.so\.1 is not found: no NVIDIA driver"):
        Driver()


@pytest.mark.parametrize(
    ("started", "message"),
    [(100, r"does not start: no device \(error 100\)"), (0, "sees no GPU; look at CUDA_VISIBLE")],
)
def test_a_driver_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, started: int, message: str) -> None:
    """A driver whose cuInit fails, as in a container without a device, and one that counts none."""

    class Library:
        def cuInit(self, flags: Any) -> int:  # noqa: N802
            return started

        def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
            return 0

        def cuGetErrorString(self, code: Any, text: Any) -> int:  # noqa: N802
            text._obj.value = b"no device"
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    with pytest.raises(CudaUnavailable, match=message):
        Driver()
