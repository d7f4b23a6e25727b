"""Metrics by name: importing this package registers all of them."""

from __future__ import annotations

from eval.metrics import (
    cmmd,
    composition,
    digits,
    diversity,
    fid,
    geneval,
    inception,
    latency,
    manifold,
    memory,
    parity,
    preference,
    reward,
    throughput,
)
from eval.metrics.base import Metric, Samples, Score, create, registered

__all__ = [
    "Metric",
    "Samples",
    "Score",
    "cmmd",
    "composition",
    "create",
    "digits",
    "diversity",
    "fid",
    "geneval",
    "inception",
    "latency",
    "manifold",
    "memory",
    "parity",
    "preference",
    "registered",
    "reward",
    "throughput",
]
