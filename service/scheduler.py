"""Who computes next: rows of many requests, step by step, fair between API keys and shapes.

The unit is a row, one picture. Before every denoising step the engine asks ``pick`` for the rows of that step; between
two steps any row may wait, because its latents stay where they are. There are no threads, clocks or models in here:
time is an argument, costs come from the budget, so the same code that schedules also predicts (``forecast``).

Between flows. A flow is (owner, batch key). Each holds a balance in seconds of compute: a round gives every flow its
quantum (an owner's flows share one), a step takes its share of the step's cost, and a flow whose balance is positive
may lead a batch. That is surplus round robin, the form of deficit round robin (Shreedhar and Varghese, SIGCOMM 1995)
for costs that are known afterwards. Places that the leader leaves free go to other flows of the same key, first to
those with a balance, then to anybody. Debts and savings are bounded by a few rounds.

Within a flow. First by priority; then rows that can still be done in time, by target; then those that cannot, by age.
A target is the deadline or PATIENCE times the time of the picture alone, whichever is earlier: a late one-step picture
passes an eight-step one, and under overload some are in time instead of none. Every RESERVED-th batch is led by the
row that waits longest, so that neither priority nor lateness can keep a row waiting for ever.

Size. The largest batch size that pays (see service.budget) with which every row that alone would be in time still is.

Lanes. Where several calls run at once, each on cores of its own, ``pick`` is asked by every lane that is free, and
rows are shared among those before they share a batch. What can be done sooner by all cores in one call, such as the
only row there is, is done so.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal, NamedTuple

from service.budget import BatchKey, Budget

Priority = Literal["high", "normal", "low"]
RANK: dict[str, int] = {"high": 0, "normal": 1, "low": 2}
PATIENCE = 2.0
RESERVED = 4
ROUNDS = 4.0
"""A balance stays within this many quanta of zero."""


@dataclass(eq=False)
class Job:
    """One row as the scheduler sees it. Times are seconds of the caller's clock."""

    key: BatchKey
    owner: str
    steps: int
    submitted: float
    target: float
    deadline: float = float("inf")
    priority: Priority = "normal"
    ready: bool = True
    """False until the row's text is encoded."""
    done: int = 0
    started: bool = False
    running: bool = False
    """Between ``pick`` and ``advance``."""

    @property
    def remaining(self) -> int:
        return self.steps - self.done


@dataclass(eq=False)
class Call:
    """One denoising step of some rows, from ``pick`` until ``release``."""

    key: BatchKey
    jobs: list[Job]
    wide: bool
    """On all cores."""
    ends: float
    """When its lane should be free again."""


@dataclass(eq=False)
class _Flow:
    owner: str
    key: BatchKey
    jobs: list[Job] = field(default_factory=list)
    balance: float = 0.0

    def ready(self) -> list[Job]:
        return [job for job in self.jobs if job.ready and not job.running and job.remaining > 0]


class Forecast(NamedTuple):
    """Seconds until a row would be done, and how many of the waiting rows would begin before it."""

    seconds: float
    position: int


def together(forecasts: Iterable[Forecast]) -> Forecast:
    """Of several rows of one request: done with the last, begun with the first; of none: done."""
    known = list(forecasts)
    return Forecast(max((f.seconds for f in known), default=0.0), min((f.position for f in known), default=0))


class Scheduler:
    """All rows that are waiting or between two steps."""

    def __init__(self, budget: Budget, lanes: int = 1) -> None:
        """lanes: calls that may run at once, of all models together."""
        self.budget, self.lanes = budget, lanes
        self._flows: deque[_Flow] = deque()
        self._calls: list[Call] = []
        self._picks = 0

    def __iter__(self) -> Iterator[Job]:
        return (job for flow in self._flows for job in flow.jobs)

    def __len__(self) -> int:
        return sum(len(flow.jobs) for flow in self._flows)

    def new(
        self,
        key: BatchKey,
        steps: int,
        now: float,
        *,
        owner: str = "",
        deadline: float = float("inf"),
        priority: Priority = "normal",
        ready: bool = True,
    ) -> Job:
        """A job with its target set; ``add`` queues it."""
        target = min(deadline, now + PATIENCE * self.budget.solo_s(key, steps))
        return Job(key, owner, steps, now, target, deadline, priority, ready)

    def add(self, job: Job) -> None:
        for flow in self._flows:
            if (flow.owner, flow.key) == (job.owner, job.key):
                flow.jobs.append(job)
                return
        self._flows.append(_Flow(job.owner, job.key, [job]))

    def remove(self, job: Job) -> None:
        """Forget a row that is done, failed or given up; a flow without rows leaves, and with it its balance."""
        for flow in self._flows:
            if job in flow.jobs:
                flow.jobs.remove(job)
                if not flow.jobs:
                    self._flows.remove(flow)
                return

    def waiting(self, owner: str | None = None) -> int:
        """Rows that have not begun, of everybody or of one owner."""
        return sum(not job.started and owner in (None, job.owner) for job in self)

    def held(self, owner: str) -> int:
        """Rows of one owner, begun or not."""
        return sum(job.owner == owner for job in self)

    def work_s(self) -> float:
        """Seconds of compute still to do."""
        return sum(self.budget.row_step_s(flow.key) * sum(job.remaining for job in flow.jobs) for flow in self._flows)

    def room_s(self, places: int) -> float:
        """About how long until ``places`` of the waiting rows have begun: the work of all rows before them."""
        rows = sorted(self, key=lambda job: (not job.started, job.submitted))
        begun = sum(job.started for job in rows)
        return sum(job.remaining * self.budget.row_step_s(job.key) for job in rows[: begun + places])

    def pick(self, now: float) -> Call | None:
        """The next step for a free lane, of rows of one key; None when none is ready. Their flows are charged for it.

        ``advance`` each of its rows and then ``release`` it.
        """
        flows = self._startable()
        if not flows:
            return None
        key, jobs = flows[0].key, self._all_at_once(flows)
        if wide := bool(jobs):
            cost_s = self.budget.wide_s(key, len(jobs))
        else:
            jobs = self._next_batch(flows, now)
            key, cost_s = jobs[0].key, self.budget.step_s(jobs[0].key, len(jobs))
        for job in jobs:
            job.started = job.running = True
        call = Call(key, jobs, wide, now + cost_s)
        self._calls.append(call)
        return call

    def advance(self, job: Job) -> None:
        """A row's step is over; it may go on in any lane."""
        job.running = False
        job.done += 1
        if job.remaining == 0:
            self.remove(job)

    def release(self, call: Call) -> None:
        """Its lane is free."""
        self._calls.remove(call)

    def startable(self) -> bool:
        """Whether ``pick`` would find something."""
        return bool(self._startable())

    def forecast(self, now: float, extra: Sequence[Job] = ()) -> dict[Job, Forecast]:
        """What becomes of every row, and of ``extra`` as if they were added now, if nothing else comes.

        The schedule is played on a copy, with the budget's costs for the time of every step and of the decoding, which
        overlaps with steps where there is one lane, and else occupies one; all texts count as ready.
        """
        twin, originals = self._copy(extra)
        waiting = {job for job in originals if not job.started}
        position: dict[Job, int] = {}
        result: dict[Job, Forecast] = {}
        clock = decoded = now
        order = count()
        ends = [(call.ends, next(order), call) for call in twin._calls]
        heapq.heapify(ends)
        while True:
            while call := twin.pick(clock):
                begun = sum(job in waiting for job in position)
                for job in call.jobs:
                    position.setdefault(job, begun if job in waiting else 0)
                heapq.heappush(ends, (call.ends, next(order), call))
            if not ends:
                return result
            end, _, call = heapq.heappop(ends)
            clock = max(clock, end)
            decoded = clock if self.lanes > 1 else max(clock, decoded)
            for job in call.jobs:
                twin.advance(job)
                if job.remaining == 0:
                    decoded += self.budget.decode_s(job.key)
                    result[originals[job]] = Forecast(decoded - now, position.get(job, 0))
            call.jobs = []
            if self.lanes > 1 and decoded > clock:
                heapq.heappush(ends, (decoded, next(order), call))
            else:
                twin.release(call)

    def _copy(self, extra: Sequence[Job]) -> tuple[Scheduler, dict[Job, Job]]:
        """Another scheduler with copies of all rows, and the original of every copy."""
        twin = Scheduler(self.budget, self.lanes)
        twin._picks = self._picks
        originals: dict[Job, Job] = {}
        for flow in self._flows:
            copies = [replace(job, ready=True) for job in flow.jobs]
            originals.update(zip(copies, flow.jobs, strict=True))
            twin._flows.append(_Flow(flow.owner, flow.key, copies, flow.balance))
        copy_of = {job: copy for copy, job in originals.items()}
        for call in self._calls:
            running = [copy_of[job] for job in call.jobs if job.running and job in copy_of]
            twin._calls.append(replace(call, jobs=running))
        for job in extra:
            copy = replace(job, ready=True)
            originals[copy] = job
            twin.add(copy)
        return twin, originals

    def _startable(self) -> list[_Flow]:
        """Flows with rows that a lane could take, none when no lane is free."""
        if len(self._calls) >= self.lanes:
            return []
        busy = Counter(call.key.model for call in self._calls)
        return [flow for flow in self._flows if busy[flow.key.model] < self.budget.lanes(flow.key) and flow.ready()]

    def _all_at_once(self, flows: list[_Flow]) -> list[Job]:
        """All ready rows, if one call on all cores ends before each would in a lane of its own; else none."""
        key, jobs = flows[0].key, [job for flow in flows for job in flow.ready()]
        if self._calls or len(jobs) > self.lanes or any(flow.key != key for flow in flows):
            return []
        return jobs if self.budget.wide_pays(key, len(jobs)) else []

    def _next_batch(self, flows: list[_Flow], now: float) -> list[Job]:
        """The rows of one lane's next call; charges their flows."""
        self._picks += 1
        oldest_leads = self._picks % RESERVED == 0
        lead = self._leader(flows)
        while self._flows[0] is not lead:
            self._flows.rotate(-1)
        each = -(-sum(len(flow.ready()) for flow in flows) // (self.lanes - len(self._calls)))
        jobs = self._fill(lead, now, oldest_leads)[:each]
        jobs = jobs[: self._size(jobs, now)]
        share = self.budget.step_s(lead.key, len(jobs)) / len(jobs)
        for flow in self._flows:
            flow.balance -= share * sum(job in flow.jobs for job in jobs)
        self._bound(flows)
        if lead.balance <= 0:
            self._flows.rotate(-1)
        return jobs

    def _leader(self, flows: list[_Flow]) -> _Flow:
        """The first flow of the ring with a balance; when none has one, as many rounds pass as one of them needs."""
        owners = [flow.owner for flow in flows]
        round_s = max(self.budget.step_s(flow.key, 1) for flow in flows)
        quanta = {id(flow): round_s / owners.count(flow.owner) for flow in flows}
        if all(flow.balance <= 0 for flow in flows):
            rounds = min(int(-flow.balance / quanta[id(flow)]) + 1 for flow in flows)
            for flow in flows:
                flow.balance += rounds * quanta[id(flow)]
        return next(flow for flow in flows if flow.balance > 0)

    def _bound(self, flows: list[_Flow]) -> None:
        for flow in flows:
            limit = ROUNDS * self.budget.step_s(flow.key, self.budget.sizes(flow.key)[-1])
            flow.balance = min(max(flow.balance, -limit), limit)

    def _fill(self, lead: _Flow, now: float, oldest_leads: bool) -> list[Job]:
        """Up to a capful of rows of the leader's key: one per flow and turn, flows with a balance first."""
        flows = [flow for flow in self._flows if flow.key == lead.key]
        queues = [deque(self._ordered(flow, now, oldest_leads)) for flow in flows]
        balances = [flow.balance for flow in flows]
        cap = self.budget.sizes(lead.key)[-1]
        share = self.budget.step_s(lead.key, cap) / cap
        rows: list[Job] = []
        for floor in (0.0, float("-inf")):
            moved = True
            while moved and len(rows) < cap:
                moved = False
                for i, queue in enumerate(queues):
                    if queue and balances[i] > floor and len(rows) < cap:
                        rows.append(queue.popleft())
                        balances[i] -= share
                        moved = True
        return rows

    def _ordered(self, flow: _Flow, now: float, oldest_first: bool) -> list[Job]:
        """A flow's rows as they should run; see the module's text."""

        def rank(job: Job) -> tuple[int, bool, float]:
            late = self._alone_at(job, now) > job.target
            return RANK[job.priority], late, job.submitted if late else job.target

        rows = sorted(flow.ready(), key=rank)
        if oldest_first and rows:
            oldest = min(rows, key=lambda job: job.submitted)
            rows.remove(oldest)
            rows.insert(0, oldest)
        return rows

    def _size(self, rows: list[Job], now: float) -> int:
        key = rows[0].key
        sizes = [size for size in self.budget.sizes(key) if size <= len(rows)]
        hopeful = [self._alone_at(job, now) <= job.target for job in rows]
        for size in reversed(sizes):
            finish = [now + job.remaining * self.budget.step_s(key, size) + self.budget.decode_s(key) for job in rows]
            if all(finish[i] <= rows[i].target for i in range(size) if hopeful[i]):
                return size
        return 1

    def _alone_at(self, job: Job, now: float) -> float:
        """When a row would be done if it ran alone from now on."""
        return now + job.remaining * self.budget.step_s(job.key, 1) + self.budget.decode_s(job.key)
