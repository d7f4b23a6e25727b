"""Runtimes: what computes a bundle's graphs. Nothing else in the service knows which one runs."""

from distill.bundle import Bundle
from service.runtimes.base import Capabilities, Conditioning, Runtime, Tokens, generate
from service.runtimes.onnx import OnnxRuntime

__all__ = ["Capabilities", "Conditioning", "OnnxRuntime", "Runtime", "Tokens", "generate", "open_runtime"]


def open_runtime(bundle: Bundle, *, threads: int, max_batch: int) -> Runtime:
    """The best runtime that the bundle has engines for, warmed up. Raises BundleError when there is none."""
    return OnnxRuntime(bundle, threads=threads, max_batch=max_batch)
