"""The scheduler under a virtual clock: a toy device that takes exactly as long as the budget says."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from service.budget import BatchKey, Budget
from service.scheduler import PATIENCE, RESERVED, Call, Job, Priority, Scheduler, together

SMALL = BatchKey("m", "onnx", (4, 16, 16))
LARGE = SMALL._replace(shape=(4, 32, 32))
STEP_S = {SMALL: {1: 0.020, 2: 0.034, 4: 0.056, 8: 0.112}, LARGE: {1: 0.080, 2: 0.160, 4: 0.320, 8: 0.640}}
DECODE_S = 0.010


def a_budget(step_s: dict[BatchKey, dict[int, float]] = STEP_S, lanes: int = 1) -> Budget:
    budget = Budget()
    for key, curve in step_s.items():
        budget.know(key, tuple(curve), lanes)
        for rows, seconds in curve.items():
            budget.observe(key, rows, seconds)
        budget.observe_decode(key, DECODE_S)
    return budget


@dataclass
class Device:
    """Plays arrivals: between two steps it takes in what has come, then lets the picked rows advance."""

    scheduler: Scheduler = field(default_factory=lambda: Scheduler(a_budget()))
    now: float = 0.0
    finished: dict[Job, float] = field(default_factory=dict)
    steps: list[list[Job]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Compute by owner."""

    def job(
        self, steps: int = 4, owner: str = "", key: BatchKey = SMALL, at: float = 0.0, priority: Priority = "normal"
    ) -> Job:
        return self.scheduler.new(key, steps, at, owner=owner, priority=priority)

    def run(self, arrivals: Iterable[Job], until: float = float("inf")) -> None:
        coming = sorted(arrivals, key=lambda job: job.submitted)
        while self.now < until:
            while coming and coming[0].submitted <= self.now:
                self.scheduler.add(coming.pop(0))
            call = self.scheduler.pick(self.now)
            if call is None:
                if not coming:
                    return
                self.now = coming[0].submitted
                continue
            self.step(call)

    def step(self, call: Call | None) -> None:
        assert call is not None
        rows = call.jobs
        self.steps.append(rows)
        cost = self.scheduler.budget.step_s(rows[0].key, len(rows))
        self.now += cost
        for job in rows:
            self.seconds[job.owner] = self.seconds.get(job.owner, 0.0) + cost / len(rows)
            self.scheduler.advance(job)
            if job.remaining == 0:
                self.finished[job] = self.now + DECODE_S
        self.scheduler.release(call)


@pytest.fixture
def device() -> Device:
    return Device()


def test_rows_at_different_steps_share_a_batch(device: Device) -> None:
    long, short = device.job(8), device.job(1, at=0.05)
    device.run([long, short])
    together = [rows for rows in device.steps if len(rows) == 2]
    assert [{job.done - job.steps for job in rows} for rows in together] == [{0}]
    assert device.finished[short] < device.finished[long]


def test_batches_hold_one_key_and_no_more_rows_than_pay(device: Device) -> None:
    device.run([device.job(2, key=key) for key in (SMALL, LARGE) for _ in range(10)])
    assert all(len({job.key for job in rows}) == 1 for rows in device.steps)
    assert max(len(rows) for rows in device.steps if rows[0].key == SMALL) == 4, "8 rows are no faster than 4"
    assert max(len(rows) for rows in device.steps if rows[0].key == LARGE) == 1, "two rows cost as much as two calls"
    assert len(device.finished) == 20
    assert len(device.scheduler) == 0


def test_a_batch_is_no_larger_than_its_rows_can_afford(device: Device) -> None:
    """Each may take 0.18 s: four steps of 2 rows and decoding fit (0.146 s), of 4 rows (0.234 s) do not; at the last
    step the other two, late by then, may join without making the first two late."""
    device.run([device.job(4) for _ in range(4)])
    assert [len(rows) for rows in device.steps[:4]] == [2, 2, 2, 4]
    in_time = [job for job, end in device.finished.items() if end <= job.target]
    assert len(in_time) == 2


def test_a_late_short_row_passes_long_ones_but_never_waits_for_ever(device: Device) -> None:
    long = [device.job(8, at=i / 1000) for i in range(6)]
    short = device.job(1, at=0.1)
    device.run([*long, short])
    assert device.finished[short] - short.submitted <= 0.2
    stream = [device.job(1, at=i * 0.015) for i in range(400)]
    busy = Device()
    old = busy.job(8)
    busy.run([old, *stream], until=6.0)
    assert busy.finished[old] < 2.0, "more work than the device can do has come all the time"


def test_overload_leaves_some_rows_in_time_instead_of_none() -> None:
    """Twice as many rows come as can be served; first come, first served would be late with all but the first."""
    device, dice = Device(), random.Random(0)
    jobs = [device.job(dice.choice((1, 2, 4)), at=i * 0.018) for i in range(300)]
    device.run(jobs, until=5.4)
    in_time = sum(end <= job.target for job, end in device.finished.items())
    assert in_time >= 0.5 * len(device.finished)
    oldest_left = min((job.submitted for job in device.scheduler), default=device.now)
    assert device.now - oldest_left < 5.0


@pytest.mark.parametrize("greedy", [10, 100])
def test_owners_get_equal_compute_whatever_they_queue(device: Device, greedy: int) -> None:
    jobs = [device.job(4, "greedy") for _ in range(greedy)] + [device.job(4, "modest") for _ in range(10)]
    device.run(jobs)
    last_modest = max(end for job, end in device.finished.items() if job.owner == "modest")
    two_times_ten = 20 * 4 * 0.014
    assert last_modest <= 1.2 * two_times_ten, "as if each had half the device"


def test_two_owners_of_different_shapes_share_seconds_not_pictures(device: Device) -> None:
    jobs = [device.job(4, "small") for _ in range(200)] + [device.job(4, "large", LARGE) for _ in range(40)]
    device.run(jobs, until=6.0)
    assert device.seconds["small"] == pytest.approx(device.seconds["large"], rel=0.1)


def test_an_owner_of_two_shapes_gets_no_more_than_one_of_one(device: Device) -> None:
    jobs = [device.job(4, "both", key) for key in (SMALL, LARGE) for _ in range(100)]
    jobs += [device.job(4, "one") for _ in range(200)]
    device.run(jobs, until=6.0)
    assert device.seconds["both"] == pytest.approx(device.seconds["one"], rel=0.15)


def test_what_nobody_else_wants_is_given_away(device: Device) -> None:
    device.run([device.job(4, "modest"), *(device.job(4, "greedy") for _ in range(20))])
    assert device.now == pytest.approx(21 * 4 * 0.014, rel=0.15), "the best rate, although one owner has one row"


def test_borrowed_places_are_not_held_against_a_flow_for_long(device: Device) -> None:
    """ "greedy" fills the places that "trickle" leaves for ten seconds; then "trickle" asks for more."""
    jobs = [device.job(4, "greedy") for _ in range(300)]
    jobs += [device.job(4, "trickle", at=i * 0.07) for i in range(140)]
    device.run(jobs, until=9.8)
    before = device.seconds["greedy"]
    device.run([device.job(4, "trickle", at=9.8) for _ in range(50)], until=device.now + 1.0)
    assert device.seconds["greedy"] - before >= 0.35


def test_priority_reorders_within_an_owner_and_within_a_bounded_share(device: Device) -> None:
    low = [device.job(4, "a", priority="low") for _ in range(20)]
    high = [device.job(4, "a", at=0.001 + i / 1e5, priority="high") for i in range(80)]
    device.run([*low, *high], until=4.0)
    done = [sum(job in device.finished for job in jobs) for jobs in (low, high)]
    assert done[1] > 2 * done[0], "although the low ones came first"
    assert done[0] >= 3, "yet every fourth batch has a place for the oldest row"
    other = Device()
    theirs = [other.job(4, "b") for _ in range(20)]
    other.run([*theirs, *(other.job(4, "a", priority="high") for _ in range(100))], until=2.0)
    assert other.seconds["b"] >= 0.4 * sum(other.seconds.values()), "another owner's priority is no concern of b"


def test_rows_whose_text_is_not_ready_wait_without_holding_up_others(device: Device) -> None:
    waiting, other = device.job(4), device.job(4)
    waiting.ready = False
    device.run([waiting, other])
    assert other in device.finished
    assert device.scheduler.waiting() == 1
    waiting.ready = True
    device.run([])
    assert waiting in device.finished


def test_an_owner_whose_rows_all_wait_for_their_text_stops_nobody(device: Device) -> None:
    ready = [device.job(steps=8, owner="a") for _ in range(3)]
    for job in [*ready, device.scheduler.new(SMALL, 4, 0.0, owner="b", ready=False)]:
        device.scheduler.add(job)
    for _ in range(2 * RESERVED):
        call = device.scheduler.pick(device.now)
        assert call is not None and set(call.jobs) <= set(ready)
        device.step(call)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_in_whatever_order_runs_once_and_ends(device: Device, seed: int) -> None:
    """Random owners, shapes, lengths and times, texts that become ready late, rows that are given up."""
    dice, scheduler = random.Random(seed), device.scheduler
    late: list[Job] = []
    expected: set[Job] = set()
    for turn in range(400):
        if turn < 200 and dice.random() < 0.7:
            key, owner = dice.choice([SMALL, LARGE]), dice.choice("abc")
            job = scheduler.new(key, dice.choice([1, 2, 4, 8]), device.now, owner=owner, ready=dice.random() < 0.5)
            scheduler.add(job)
            expected.add(job)
            if not job.ready:
                late.append(job)
        if late and (turn >= 200 or dice.random() < 0.5):
            late.pop(dice.randrange(len(late))).ready = True
        if expected - set(device.finished) and dice.random() < 0.05:
            given_up = dice.choice(sorted(expected - set(device.finished), key=lambda job: job.submitted))
            scheduler.remove(given_up)
            expected.remove(given_up)
        if call := scheduler.pick(device.now):
            rows = call.jobs
            assert len(set(rows)) == len(rows) and all(job.ready and job.key == rows[0].key for job in rows)
            device.step(call)
        else:
            device.now += 0.01
    while call := scheduler.pick(device.now):
        device.step(call)
    assert set(device.finished) == expected and not list(scheduler)


def test_work_and_waiting_rows_are_counted(device: Device) -> None:
    for owner in ("a", "a", "b"):
        device.scheduler.add(device.job(4, owner))
    assert (len(device.scheduler), device.scheduler.waiting(), device.scheduler.waiting("a")) == (3, 3, 2)
    assert device.scheduler.work_s() == pytest.approx(12 * 0.014)
    call = device.scheduler.pick(0.0)
    device.step(call)
    assert call is not None and device.scheduler.waiting() == 3 - len(call.jobs)
    assert device.scheduler.held("a") == 2
    assert 0 < device.scheduler.room_s(1) <= device.scheduler.work_s()


def test_the_forecast_is_what_happens_when_nothing_else_comes() -> None:
    dice = random.Random(1)
    for _ in range(20):
        device = Device()
        jobs = [
            device.job(dice.choice((1, 2, 4, 8)), dice.choice("abc"), dice.choice((SMALL, LARGE))) for _ in range(12)
        ]
        for job in jobs:
            device.scheduler.add(job)
        device.step(device.scheduler.pick(0.0))
        mine = dice.choice([job for job in jobs if job.remaining])
        now, told = device.now, device.scheduler.forecast(device.now)
        device.run([])
        assert now + told[mine].seconds == pytest.approx(device.finished[mine], abs=6 * DECODE_S)
        assert now + together(told.values()).seconds == pytest.approx(max(device.finished.values()), abs=6 * DECODE_S)


def test_a_forecast_tells_the_place_in_the_queue(device: Device) -> None:
    jobs = [device.job(1, key=LARGE, at=i / 1000) for i in range(4)]
    for job in jobs:
        device.scheduler.add(job)
    told = device.scheduler.forecast(0.004)
    assert sorted(told[job].position for job in jobs) == [0, 1, 2, 3]
    assert min(told.values(), key=lambda forecast: forecast.seconds).position == 0
    device.step(device.scheduler.pick(0.004))
    extra = device.job(1, key=LARGE, at=device.now)
    later = device.scheduler.forecast(device.now, [extra])
    assert set(later) == {extra, *device.scheduler}
    assert sorted(forecast.position for forecast in later.values()) == [0, 1, 2, 3]


def test_a_forecast_changes_nothing(device: Device) -> None:
    for _ in range(5):
        device.scheduler.add(device.job(4))
    extra = device.job(2)
    first = device.scheduler.forecast(0.0, [extra])[extra]
    assert device.scheduler.forecast(0.0, [extra])[extra] == first
    assert extra not in list(device.scheduler)
    assert all(not job.started and job.done == 0 for job in device.scheduler)
    assert first.seconds > 2 * 0.020 + DECODE_S
    assert together(Scheduler(a_budget()).forecast(0.0).values()) == (0.0, 0)


def test_the_target_is_the_deadline_if_that_is_earlier() -> None:
    scheduler = Scheduler(a_budget())
    assert scheduler.new(SMALL, 4, now=10.0).target == pytest.approx(10.0 + PATIENCE * (4 * 0.020 + DECODE_S))
    assert scheduler.new(SMALL, 4, now=10.0, deadline=10.1).target == 10.1


WIDE_S = {1: 0.014, 2: 0.025, 4: 0.045, 8: 0.090}


@dataclass
class Lanes:
    """Plays arrivals on several lanes; a lane decodes what it has finished before it is free."""

    count: int = 2
    now: float = 0.0
    finished: dict[Job, float] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    at_work: list[tuple[float, int, Call, tuple[Job, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        budget = a_budget(lanes=self.count)
        for rows, seconds in WIDE_S.items():
            budget.observe(SMALL, rows, seconds, wide=True)
        self.scheduler = Scheduler(budget, self.count)

    def job(self, steps: int = 4, key: BatchKey = SMALL, at: float = 0.0) -> Job:
        return self.scheduler.new(key, steps, at)

    def run(self, arrivals: Iterable[Job] = (), until: float = float("inf")) -> None:
        coming = sorted(arrivals, key=lambda job: job.submitted)
        while True:
            while coming and coming[0].submitted <= self.now:
                self.scheduler.add(coming.pop(0))
            while call := self.scheduler.pick(self.now):
                self.begin(call)
            moments = [coming[0].submitted] if coming else []
            moments += [self.at_work[0][0]] if self.at_work else []
            if not moments or min(moments) > until:
                return
            self.now = min(moments)
            while self.at_work and self.at_work[0][0] <= self.now:
                self.end(*heapq.heappop(self.at_work))

    def begin(self, call: Call) -> None:
        running = {job for *_, jobs in self.at_work for job in jobs}
        assert not running & set(call.jobs), "a row is in one call at a time"
        assert len(self.at_work) < self.count
        heapq.heappush(self.at_work, (call.ends, len(self.calls), call, tuple(call.jobs)))
        self.calls.append(call)

    def end(self, at: float, number: int, call: Call, jobs: tuple[Job, ...]) -> None:
        done = at
        for job in jobs:
            self.scheduler.advance(job)
            if job.remaining == 0:
                done += DECODE_S
                self.finished[job] = done
        if done > at:
            call.ends = done
            heapq.heappush(self.at_work, (done, number, call, ()))
        else:
            self.scheduler.release(call)


@pytest.fixture
def lanes() -> Lanes:
    return Lanes()


def test_a_row_that_is_alone_has_all_cores_and_one_in_company_a_lane(lanes: Lanes) -> None:
    lanes.run([lanes.job(4)])
    assert [(len(call.jobs), call.wide) for call in lanes.calls] == [(1, True)] * 4
    assert lanes.now == pytest.approx(4 * WIDE_S[1] + DECODE_S)
    lanes.calls.clear()
    lanes.run([lanes.job(4, at=lanes.now), lanes.job(4, at=lanes.now)])
    assert [(len(call.jobs), call.wide) for call in lanes.calls] == [(1, False)] * 8, (
        "shared among lanes before a batch"
    )


def test_rows_that_are_sooner_done_together_on_all_cores_are() -> None:
    lanes = Lanes(count=8)
    lanes.scheduler.budget.observe(SMALL, 1, 0.05)  # in a lane; the moving average goes to 0.023
    lanes.run([lanes.job(1), lanes.job(1)])
    assert [(len(call.jobs), call.wide) for call in lanes.calls] == [(1, False)] * 2, "0.025 s are no gain over 0.023"
    for _ in range(20):
        lanes.scheduler.budget.observe(SMALL, 1, 0.05)
    lanes.calls.clear()
    lanes.run([lanes.job(1, at=lanes.now) for _ in range(2)])
    assert [(len(call.jobs), call.wide) for call in lanes.calls] == [(2, True)]


def test_what_comes_while_all_cores_compute_begins_in_a_lane(lanes: Lanes) -> None:
    first, second = lanes.job(4), lanes.job(1, at=0.001)
    lanes.run([first, second])
    assert [call.wide for call in lanes.calls[:2]] == [True, False]
    assert lanes.finished[second] == pytest.approx(0.001 + 0.020 + DECODE_S)


def test_a_queue_is_shared_among_lanes_and_then_batched(lanes: Lanes) -> None:
    for _ in range(20):
        lanes.scheduler.add(lanes.job(8))
    calls = [lanes.scheduler.pick(10.0) for _ in range(3)]
    assert [len(call.jobs) for call in calls if call is not None] == [4, 4], "all are late: batches that pay"
    assert calls[2] is None, "no lane is free"


def test_rows_of_a_step_go_on_while_others_of_it_are_decoded(lanes: Lanes) -> None:
    long, short = lanes.job(2), lanes.job(1)
    other = [lanes.job(8, at=-9.0) for _ in range(2)]
    for job in (*other, long, short):
        lanes.scheduler.add(job)
    call, beside = lanes.scheduler.pick(9.0), lanes.scheduler.pick(9.0)
    assert call is not None and beside is not None and len(call.jobs) == len(beside.jobs) == 2
    mixed = call if short in call.jobs else beside
    for job in mixed.jobs:
        lanes.scheduler.advance(job)
    assert not lanes.scheduler.startable(), "its lane decodes"
    lanes.scheduler.release(call if mixed is beside else beside)
    again = lanes.scheduler.pick(9.1)
    assert again is not None and short not in again.jobs


def test_a_model_of_one_lane_has_one_call_at_a_time(lanes: Lanes) -> None:
    other = SMALL._replace(model="one lane")
    lanes.scheduler.budget.know(other, (1,))
    lanes.scheduler.budget.observe(other, 1, 0.020)
    for key in (other, other, SMALL):
        lanes.scheduler.add(lanes.job(4, key))
    first, second = lanes.scheduler.pick(0.0), lanes.scheduler.pick(0.0)
    assert first is not None and second is not None
    assert {first.key.model, second.key.model} == {"one lane", "m"}


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_every_row_ends_once_whatever_comes_on_several_lanes(count: int, seed: int) -> None:
    dice, lanes = random.Random(seed), Lanes(count)
    jobs = [
        lanes.job(dice.choice((1, 2, 4, 8)), dice.choice((SMALL, SMALL, LARGE)), at=dice.random() * 3)
        for _ in range(100)
    ]
    lanes.run(jobs)
    assert set(lanes.finished) == set(jobs) and not list(lanes.scheduler) and not lanes.at_work
    assert all(job.done == job.steps for job in jobs)


def test_two_lanes_do_nearly_twice_as_much() -> None:
    ends = []
    for count in (1, 2):
        lanes = Lanes(count)
        lanes.run([lanes.job(4) for _ in range(40)])
        ends.append(lanes.now)
    assert ends[0] / ends[1] > 1.9


@pytest.mark.parametrize("seed", range(10))
def test_the_forecast_of_several_lanes_is_what_happens(seed: int) -> None:
    """Also from the middle of calls and decodings."""
    dice, lanes = random.Random(seed), Lanes()
    jobs = [lanes.job(dice.choice((1, 2, 4, 8)), dice.choice((SMALL, LARGE)), at=dice.random() / 10) for _ in range(12)]
    lanes.run(jobs, until=dice.uniform(0.1, 0.3))
    now, told = lanes.now, lanes.scheduler.forecast(lanes.now)
    assert set(told) == set(lanes.scheduler)
    lanes.run()
    for job, forecast in told.items():
        assert now + forecast.seconds == pytest.approx(lanes.finished[job], abs=1e-9)


def test_work_is_counted_in_seconds_of_all_lanes(lanes: Lanes) -> None:
    for _ in range(3):
        lanes.scheduler.add(lanes.job(4))
    assert lanes.scheduler.work_s() == pytest.approx(12 * 0.014 / 2)
