"""Seconds of phases: on this machine's CPU, on a GPU where there is one, and by events that are made up."""

from __future__ import annotations

import time

import pytest
import torch

from distill.telemetry.clock import CpuClock, GpuClock, clock_of


def busy(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_the_processor_is_timed_while_it_works_and_not_while_it_waits() -> None:
    clock = CpuClock()
    for _ in range(2):
        with clock.phase("student"):
            busy(0.03)
    with clock.phase("fake"):
        time.sleep(0.05)
    busy(0.03)  # of no phase
    told = clock.take()
    assert told["cpu_seconds/student"] == [pytest.approx(0.06, abs=0.02)]
    assert told["cpu_seconds/fake"] == [pytest.approx(0.0, abs=0.02)]
    assert told.keys() == {"cpu_seconds/student", "cpu_seconds/fake"} and clock.take() == {}


class Stream:
    """A GPU with its own time, ms, of which the host knows what it has waited for; what events are asked is noted."""

    def __init__(self) -> None:
        self.ms, self.waited, self.asked = 0.0, 0.0, list[str]()

    def work(self, ms: float) -> None:
        self.ms += ms

    def event(self) -> Event:
        return Event(self)


class Event:
    """What GpuClock needs of torch.cuda.Event; it has no time before it, or something later, was waited for."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def record(self) -> None:
        self.at = self.stream.ms
        self.stream.asked.append("record")

    def synchronize(self) -> None:
        self.stream.waited = self.at
        self.stream.asked.append("synchronize")

    def elapsed_time(self, later: Event) -> float:
        assert later.at <= self.stream.waited, "read before it was waited for"
        self.stream.asked.append("elapsed_time")
        return later.at - self.at


def test_a_gpu_is_timed_by_events_and_asked_once_per_interval() -> None:
    """Work before the first phase is not counted, what lies between phases belongs to the whole alone."""
    stream = Stream()
    clock = GpuClock(stream.event)
    assert clock.take() == {} and stream.asked == []
    stream.work(700)
    for ms in (100, 150):
        with clock.phase("student"):
            stream.work(ms)
        stream.work(20)
    with clock.phase("fake"):
        stream.work(400)
    assert stream.asked == ["record"] * 6, "nothing waits for the device until the interval is told"
    told = {name: sum(values) for name, values in clock.take().items()}
    assert told == pytest.approx({"gpu_seconds": 0.69, "gpu_seconds/student": 0.25, "gpu_seconds/fake": 0.4})
    assert stream.asked.count("synchronize") == 1


def test_the_next_interval_begins_where_the_last_one_was_told() -> None:
    stream = Stream()
    clock = GpuClock(stream.event)
    with clock.phase("student"):
        stream.work(100)
    clock.take()
    stream.work(30)  # a preview
    with clock.phase("student"):
        stream.work(200)
    told = {name: sum(values) for name, values in clock.take().items()}
    assert told == pytest.approx({"gpu_seconds": 0.23, "gpu_seconds/student": 0.2})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_is_timed_while_its_host_goes_on() -> None:
    place = torch.device("cuda")
    clock, began = clock_of(place), time.perf_counter()
    x = torch.randn(4096, 4096, device=place)
    with clock.phase("student"):
        for _ in range(20):
            x = x @ x / 64
    told = {name: sum(values) for name, values in clock.take().items()}
    assert 0 < told["gpu_seconds/student"] <= told["gpu_seconds"] < time.perf_counter() - began
    assert isinstance(clock, GpuClock)


def test_a_clock_is_that_of_its_device() -> None:
    assert isinstance(clock_of(torch.device("cpu")), CpuClock)
    assert isinstance(clock_of(torch.device("meta")), CpuClock)
    assert isinstance(clock_of(torch.device("cuda:1")), GpuClock)
