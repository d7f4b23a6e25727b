"""Prometheus metrics, shown by GET /metrics beside BentoML's own. Seconds and counts; every label is bounded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import psutil
from prometheus_client import Counter, Gauge, Histogram

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 600.0)
OUTCOMES = ("ok", "invalid", "rejected", "disconnected", "cancelled", "deadline", "unavailable", "error")

REQUESTS = Counter("leapfrog_requests_total", "Picture requests by how they ended", ["model", "outcome"])
IMAGES = Counter("leapfrog_images_total", "Pictures that were decoded", ["model"])
STEPS = Counter("leapfrog_denoise_steps_total", "Denoising steps of single pictures", ["model"])
CANCELLED = Counter("leapfrog_cancelled_rows_total", "Pictures given up because their client left", ["model"])
FAILED = Counter("leapfrog_failed_rows_total", "Pictures whose computation failed", ["model"])
LATE = Counter("leapfrog_late_rows_total", "Pictures given up because their deadline passed", ["model"])
CACHE = Counter("leapfrog_cache_total", "Look-ups of encoded prompts and of files", ["model", "cache", "result"])

FRAMES = Counter("leapfrog_video_frames_total", "Frames of clips that were decoded", ["model"])
REJECTIONS = Counter("leapfrog_rejections_total", "Requests that found no place, by the code of the error", ["reason"])
DEATHS = Counter("leapfrog_engine_deaths_total", "Engines that stopped because a thread of theirs died", ["device"])

VIDEOS = Counter("leapfrog_videos_total", "Video jobs by how they ended", ["model", "outcome"])
UNFINISHED_VIDEOS = Gauge(
    "leapfrog_unfinished_videos", "Video jobs that wait or are being made", multiprocess_mode="livesum"
)

SESSIONS = Gauge("leapfrog_realtime_sessions", "Open realtime sessions", multiprocess_mode="livesum")

QUEUED = Gauge(
    "leapfrog_queue_rows",
    "Pictures waiting for a place in a batch",
    ["model", "device", "priority"],
    multiprocess_mode="livesum",
)
RUNNING = Gauge("leapfrog_running_rows", "Pictures being denoised", ["model", "device"], multiprocess_mode="livesum")
MEMORY = Gauge(
    "leapfrog_device_memory_bytes",
    "Memory of the server's process: resident on cpu; allocated and reserved by torch on a GPU",
    ["device", "kind"],
    multiprocess_mode="livesum",
)
ALIVE = Gauge("leapfrog_engine_alive", "1 while an engine computes", ["device"], multiprocess_mode="livesum")
LARGEST_BATCH = Gauge(
    "leapfrog_batch_limit_rows",
    "Largest batch that pays, as measured",
    ["model", "size", "device"],
    multiprocess_mode="livesum",
)
WORK_SECONDS = Gauge(
    "leapfrog_queue_work_seconds", "Compute that is still to do; scale on this", ["device"], multiprocess_mode="livesum"
)

REQUEST_SECONDS = Histogram("leapfrog_request_seconds", "Time of successful requests", ["model"], buckets=SECONDS)
QUEUE_SECONDS = Histogram("leapfrog_queue_seconds", "Wait for a place in a batch", ["model"], buckets=SECONDS)
STAGE_SECONDS = Histogram("leapfrog_stage_seconds", "Time per picture and stage", ["model", "stage"], buckets=SECONDS)
STEP_SECONDS = Histogram("leapfrog_step_seconds", "Time of one denoising call", ["model", "batch"], buckets=SECONDS)
BATCH_ROWS = Histogram(
    "leapfrog_batch_rows", "Pictures per denoising step", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64)
)
PREVIEW_SECONDS = Histogram(
    "leapfrog_time_to_first_preview_seconds", "From a stream's request to its first preview", ["model"], buckets=SECONDS
)
COST_RATIO = Histogram(
    "leapfrog_cost_estimate_ratio",
    "Seconds of compute of a picture over what they were estimated at when it was queued",
    ["model"],
    buckets=(0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 8.0),
)


def stage(model: str, name: str, milliseconds: float) -> None:
    """Record one stage of one picture: encode_text, denoise, decode or encode_image."""
    _stage(model, name).observe(milliseconds / 1e3)


def step(model: str, rows: int, seconds: float) -> None:
    """Record one denoising call of ``rows`` pictures."""
    steps, batches, times = _steps(model, rows)
    steps.inc(rows)
    batches.observe(rows)
    times.observe(seconds)


@cache
def _stage(model: str, name: str) -> Histogram:
    return STAGE_SECONDS.labels(model, name)


@cache
def _steps(model: str, rows: int) -> tuple[Counter, Histogram, Histogram]:
    return STEPS.labels(model), BATCH_ROWS.labels(model), STEP_SECONDS.labels(model, str(rows))


def memory(devices: Mapping[str, Mapping[str, int]]) -> None:
    """Record the memory of this process, and what it holds in bytes by kind on each GPU of ``devices``."""
    MEMORY.labels("cpu", "resident").set(psutil.Process().memory_info().rss)
    for device, held in devices.items():
        for kind, size in held.items():
            MEMORY.labels(device, kind).set(size)
