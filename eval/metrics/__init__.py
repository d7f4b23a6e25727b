"""Metrics by name: importing this package registers all of them."""

from __future__ import annotations

from eval.metrics import cmmd, composition, digits, diversity, fid, inception, latency, manifold, preference, reward
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
    "inception",
    "latency",
    "manifold",
    "preference",
    "registered",
    "reward",
]
