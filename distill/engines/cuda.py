"""The CUDA driver through ctypes: which GPU there is, memory, streams, captured graphs. Needs no package.

Names and types are those of the CUDA Driver API, https://docs.nvidia.com/cuda/cuda-driver-api/.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and …_MINOR."""
_NON_BLOCKING, _THREAD_LOCAL = 1, 1
"""CU_STREAM_NON_BLOCKING and CU_STREAM_CAPTURE_MODE_THREAD_LOCAL."""


class CudaUnavailable(Exception):
    """This machine has no usable NVIDIA GPU; the message says what is missing."""


class CudaError(RuntimeError):
    """A call of the driver failed: out of memory, a kernel that broke."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of this machine."""

    name: str
    capability: tuple[int, int]
    """Compute capability, (9, 0) for an H100."""

    @property
    def architecture(self) -> str:
        major, minor = self.capability
        return f"sm{major}{minor}"


class Library:
    """The driver's library, which has no GPU current yet. Raises CudaUnavailable when there is no driver or no GPU."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError:
            raise CudaUnavailable(f"{LIBRARY} is not found: no NVIDIA driver is installed") from None
        code = self._library.cuInit(c_uint(0))
        if code:
            raise CudaUnavailable(f"the NVIDIA driver does not start: {self._explain(code)}")
        count = c_int()
        self.call("cuDeviceGetCount", byref(count))
        self.gpus = count.value
        """Those that CUDA_VISIBLE_DEVICES lets through."""
        if not self.gpus:
            raise CudaUnavailable("the NVIDIA driver sees no GPU; look at CUDA_VISIBLE_DEVICES")

    def call(self, name: str, *arguments: object) -> None:
        """One driver call. Raises CudaError with the driver's own words."""
        function: Callable[..., int] = getattr(self._library, name)
        code = function(*arguments)
        if code:
            raise CudaError(f"{name} failed: {self._explain(code)}")

    def _explain(self, code: int) -> str:
        text = c_char_p()
        self._library.cuGetErrorString(c_int(code), byref(text))
        return f"{text.value.decode(errors='replace') if text.value else 'unknown error'} (error {code})"


class Driver(Library):
    """The calls that an engine needs, on one GPU. Raises CudaUnavailable when there is no driver or no GPU."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        device, self._context = c_int(), c_void_p()
        self.call("cuDeviceGet", byref(device), c_int(index))
        self.gpu = self._describe(device)
        self.call("cuDevicePrimaryCtxRetain", byref(self._context), device)

    def enter(self) -> None:
        """Make the GPU current in this thread; what is allocated belongs to it."""
        self.call("cuCtxSetCurrent", self._context)

    def _describe(self, device: c_int) -> Gpu:
        name, major, minor = ctypes.create_string_buffer(256), c_int(), c_int()
        self.call("cuDeviceGetName", name, c_int(len(name)), device)
        self.call("cuDeviceGetAttribute", byref(major), c_int(_CAPABILITY_MAJOR), device)
        self.call("cuDeviceGetAttribute", byref(minor), c_int(_CAPABILITY_MINOR), device)
        return Gpu(name.value.decode(errors="replace"), (major.value, minor.value))


@functools.cache
def driver(index: int = 0) -> Driver:
    """The process's only Driver of a GPU. Raises CudaUnavailable."""
    return Driver(index)


def find_gpu(index: int = 0) -> Gpu:
    """The GPU that engines run on, the first that is visible unless told. Raises CudaUnavailable."""
    return driver(index).gpu


def gpu_of(replica: int) -> int:
    """The number of the GPU that a replica goes to, in turns; 0 where there is none. Takes no memory of any GPU."""
    try:
        return replica % Library().gpus if replica else 0
    except CudaUnavailable:
        return 0


class Buffer:
    """Memory of a GPU for one tensor of fixed shape, with its own array on the host. Freed with the object."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[np.generic], gpu: int = 0) -> None:
        self.host: NDArray[np.generic] = np.zeros(shape, dtype)
        self._driver, pointer = driver(gpu), c_uint64()
        self._driver.enter()
        self._driver.call("cuMemAlloc_v2", byref(pointer), c_size_t(max(self.host.nbytes, 1)))
        self.address = pointer.value

    def upload(self, values: NDArray[np.generic], stream: Stream) -> None:
        """values: of the buffer's shape; cast to its dtype."""
        np.copyto(self.host, values, casting="same_kind")
        size, source = c_size_t(self.host.nbytes), c_void_p(self.host.ctypes.data)
        self._driver.call("cuMemcpyHtoDAsync_v2", c_uint64(self.address), source, size, stream.handle)

    def download(self, stream: Stream) -> None:
        """Into ``host``, which holds the values once the stream is synchronised."""
        size, target = c_size_t(self.host.nbytes), c_void_p(self.host.ctypes.data)
        self._driver.call("cuMemcpyDtoHAsync_v2", target, c_uint64(self.address), size, stream.handle)

    def __del__(self) -> None:
        if address := getattr(self, "address", 0):
            self._driver._library.cuMemFree_v2(c_uint64(address))


class Stream:
    """A queue of work on a GPU, and the graphs that were recorded from it."""

    def __init__(self, gpu: int = 0) -> None:
        self.gpu, self._driver, self.handle = gpu, driver(gpu), c_void_p()
        self._driver.enter()
        self._driver.call("cuStreamCreate", byref(self.handle), c_uint(_NON_BLOCKING))

    def synchronize(self) -> None:
        self._driver.call("cuStreamSynchronize", self.handle)

    @contextmanager
    def _recording(self, graph: c_void_p) -> Iterator[None]:
        self._driver.call("cuStreamBeginCapture_v2", self.handle, c_int(_THREAD_LOCAL))
        try:
            yield
        finally:  # a stream that is left recording takes no other work
            self._driver.call("cuStreamEndCapture", self.handle, byref(graph))

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What ``work`` puts on the stream, as one graph: returns what launches it again, with the same addresses."""
        graph, executable = c_void_p(), c_void_p()
        with self._recording(graph):
            work()
        try:
            self._driver.call("cuGraphInstantiateWithFlags", byref(executable), graph, c_uint64(0))
        finally:
            self._driver.call("cuGraphDestroy", graph)
        return lambda: self._driver.call("cuGraphLaunch", executable, self.handle)
