"""The CUDA driver where there is none: a reason, not a crash."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from distill.engines import cuda
from distill.engines.cuda import Buffer, CudaUnavailable, Driver, Gpu, Stream, gpu_of


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


class TwoGpus:
    """The driver of a machine with two GPUs of compute capability 9.0, as far as handles go; it notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int | None]] = []

    def __getattr__(self, name: str) -> Any:
        def called(*arguments: Any) -> int:
            values = {
                "cuDeviceGetCount": lambda: 2,
                "cuDeviceGet": lambda: arguments[1].value,
                "cuDeviceGetAttribute": lambda: {75: 9, 76: 0}[arguments[1].value],
                "cuDevicePrimaryCtxRetain": lambda: 100 + arguments[1].value,
            }
            if name in values:
                arguments[0]._obj.value = values[name]()
            self.calls.append((name, arguments[0].value if name == "cuCtxSetCurrent" else None))
            return 0

        return called


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoGpus]:
    library = TwoGpus()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    cuda.driver.cache_clear()
    yield library
    cuda.driver.cache_clear()


def test_what_belongs_to_a_gpu_is_made_in_its_context(two_gpus: TwoGpus) -> None:
    for gpu in (1, 0, 1):
        stream = Stream(gpu)
        buffer = Buffer((2, 3), np.dtype(np.float32), stream.gpu)
        made = [call for call in two_gpus.calls if call[0] in ("cuCtxSetCurrent", "cuStreamCreate", "cuMemAlloc_v2")]
        entered = ("cuCtxSetCurrent", 100 + gpu)
        assert made[-4:] == [entered, ("cuStreamCreate", None), entered, ("cuMemAlloc_v2", None)]
        assert buffer.host.shape == (2, 3)


def test_replicas_take_the_gpus_in_turns_and_counting_them_takes_none(two_gpus: TwoGpus) -> None:
    assert [gpu_of(replica) for replica in range(4)] == [0, 1, 0, 1]
    assert not any(name == "cuDevicePrimaryCtxRetain" for name, _ in two_gpus.calls)


def test_without_a_driver_every_replica_is_told_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-nowhere.so.1")
    assert [gpu_of(replica) for replica in range(3)] == [0, 0, 0]
