"""What travels through the engine: orders, the rows that they become, pictures, and what may go wrong on the way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from distill.bundle import Manifest
from distill.sampling import Table, noise
from service.budget import BatchKey
from service.runtimes.base import Conditioning, Floats, Images, Runtime, Worn
from service.scheduler import Job, Priority

OnStage = Callable[[int, str, float, float, int], None]
"""Called with (index of the seed, stage, begun, ended, rows in the same call) when a stage is over; be quick.

Times are time.perf_counter's; stages are queue, encode_text, denoise for each step, and decode.
"""


class QueueFull(Exception):
    """No place in the queue: how many pictures wait, in how many seconds there should be one, whose limit it is."""

    def __init__(self, waiting: int, retry_after_s: float, *, of_owner: bool = False) -> None:
        super().__init__(f"{waiting} pictures wait")
        self.waiting, self.retry_after_s, self.of_owner = waiting, retry_after_s, of_owner


class DeadlineExceeded(Exception):
    """The picture cannot be, or was not, ready by its deadline; ``needed_s`` is how long it would have taken."""

    def __init__(self, needed_s: float) -> None:
        super().__init__(f"{needed_s:.3f} s are needed")
        self.needed_s = needed_s


class OutOfMemory(Exception):
    """Memory ran out, and again with half the rows."""


class EngineClosed(Exception):
    """The engine takes no more work: it is shutting down or one of its threads has died."""


@dataclass(frozen=True)
class Order:
    """What one request wants: a picture per seed."""

    model: str
    prompt: str
    seeds: tuple[int, ...]
    steps: int
    size: tuple[int, int]
    tag: str = ""
    """The request's id, for the log."""
    owner: str = ""
    """Who asks, for fairness and limits; see service.edge."""
    priority: Priority = "normal"
    deadline_s: float | None = None
    """From now on."""
    cache: bool = True
    """Whether the encoded prompt may come from the cache and stay in it."""
    exact: bool = True
    """Whether the picture must be the same to the last bit whatever it is batched with."""
    loras: Worn = ()
    on_step: Callable[[int, int, Floats], None] | None = None
    """Called on the denoising thread with (index of the seed, steps done, x0 (C, h, w)) after each step; be quick."""
    frames: int = 0
    """Of a clip; 0: a picture."""
    on_begin: Callable[[int], None] | None = None
    """Called on the denoising thread with the index of the seed before its first step; be quick."""
    on_frames: Callable[[int, Images], None] | None = None
    """Called on the decoding thread with (index of the seed, frames (n, H, W, 3)) as they come; it may wait a little.

    What it raises fails the row. None: the frames are in the result.
    """
    on_stage: OnStage | None = None


@dataclass(frozen=True)
class Picture:
    """A finished row: pixels (H, W, 3) uint8 and milliseconds per stage; queue_ms is every wait between stages.

    pixels of a clip are (F, H, W, 3), none of them where they were told by on_frames.
    """

    pixels: Images
    seed: int
    queue_ms: float
    encode_text_ms: float
    denoise_ms: float
    decode_ms: float
    largest_batch: int
    prompt_cache: str
    """hit, miss or off."""


@dataclass(frozen=True)
class Served:
    """One model on the device."""

    runtime: Runtime
    """On all cores of a processor."""
    manifest: Manifest
    tables: dict[int, Table]
    keys: dict[tuple[tuple[int, int], int], BatchKey]
    """By size in pixels and number of frames, 0 of pictures; other numbers of frames join when they are asked for."""
    lanes: tuple[Runtime, ...] = ()
    """Runtimes that compute at the same time, each on cores of its own; none: one call at a time."""

    @property
    def lane_count(self) -> int:
        """How many calls it takes at once."""
        return max(1, len(self.lanes))

    @property
    def in_company(self) -> Runtime:
        """What computes beside others without taking all cores from them."""
        return self.lanes[0] if self.lanes else self.runtime

    def key(self, size: tuple[int, int], frames: int) -> BatchKey:
        """Raises KeyError for a size that the model does not have, and for frames of a model of pictures."""
        known = self.keys.get((size, frames))
        if known is not None:
            return known
        if size not in self.manifest.sizes or not (frames and self.manifest.frames):
            raise KeyError((size, frames))
        key = next(iter(self.keys.values()))._replace(shape=self.manifest.latent_shape(size, frames))
        return self.keys.setdefault((size, frames), key)


@dataclass(eq=False)
class Row:
    """One picture on its way: after ``job.done`` steps its latents are ``latents``.

    (1, C, h, w) float32, of a clip (1, C, f, h, w).
    """

    order: Order
    index: int
    table: Table
    job: Job
    cost_s: float
    """Seconds of compute that it was estimated at."""
    spent_s: float = 0.0
    """Its share of the steps that it took part in, and of its lane while it was decoded."""
    future: Future[Picture] = field(default_factory=Future)
    encode_text_ms: float = 0.0
    denoise_ms: float = 0.0
    largest_batch: int = 0
    prompt_cache: str = "off"
    latents: Floats = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    draws: Floats = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    conditioning: Conditioning = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.order.seeds[self.index]

    def start(self) -> None:
        """Draw all noise and set the first latents."""
        self.draws = noise(self.seed, 0, self.job.key.shape, draws=len(self.table))
        self.latents = self.draws[:1]

    def fresh_noise(self) -> Floats:
        """Noise (1, C, h, w) that enters after the current step; nothing enters after the last one."""
        k = self.job.done + 1
        return self.draws[k : k + 1] if k < len(self.draws) else np.zeros_like(self.latents)

    def tell(self, stage: str, begun: float, ended: float, rows: int = 1) -> None:
        """Tell whoever follows the order that a stage of this row is over."""
        if self.order.on_stage is not None:
            self.order.on_stage(self.index, stage, begun, ended, rows)

    def settle(self, outcome: Picture | Exception) -> None:
        """Tell the waiter, unless it has gone. Only whoever took the row out of the engine's table may call this."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)
