"""The load test: the same traces for everybody, honest sums, baselines that draw the right pictures."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import _agree, best_rate, quantiles, summarise, wrong_pictures
from benchmarks.load_baselines import Server, Waiting, build
from benchmarks.load_client import Sent, replay, saturate
from benchmarks.load_report import render, write_report
from benchmarks.load_traces import BURST_S, TRACES, Arrival, Kind, Trace, make_trace
from distill.bundle import Bundle
from service.runtimes import OnnxRuntime

STEPS = (1, 2, 4)
KINDS: tuple[Kind, ...] = (*("picture",) * 6, "disconnect", "invalid", "oversize", "picture")
SLO_MS = {1: 40.0, 2: 60.0, 4: 100.0}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> OnnxRuntime:
    return OnnxRuntime(bundle, threads=1, max_batch=8)


@pytest.fixture(scope="module")
def port(bundle: Bundle) -> Iterator[int]:
    """The batching baseline in a thread."""
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = int(probe.getsockname()[1])
    web = build(bundle, "batching", threads=1)
    server = uvicorn.Server(uvicorn.Config(web, "127.0.0.1", free, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    yield free
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("name", TRACES)
def test_traces_are_seeded_ordered_and_have_their_rate(name: Trace) -> None:
    trace = make_trace(name, 20.0, 100.0, STEPS)
    assert trace == make_trace(name, 20.0, 100.0, STEPS)
    assert trace != make_trace(name, 20.0, 100.0, STEPS, seed=1)
    assert [a.at for a in trace] == sorted(a.at for a in trace)
    assert len(trace) == pytest.approx(2000, rel=0.1)
    assert {a.steps for a in trace} == ({4} if name == "single" else set(STEPS))
    assert (len({a.prompt for a in trace}) < 20) == (name == "repeat")
    assert all(a.cache == (name == "repeat") for a in trace)


def test_bursts_have_silences_and_abuse_has_all_kinds() -> None:
    burst = make_trace("burst", 20.0, 40.0, STEPS)
    assert all(a.at % (2 * BURST_S) <= BURST_S for a in burst)
    kinds = [a.kind for a in make_trace("abuse", 20.0, 200.0, STEPS)]
    assert {kind: kinds.count(kind) / len(kinds) for kind in ("disconnect", "invalid", "oversize")} == pytest.approx(
        {"disconnect": 0.05, "invalid": 0.02, "oversize": 0.02}, abs=0.01
    )


def sent(outcome: Any = "ok", latency_ms: float = 50.0, steps: int = 4, **more: Any) -> Sent:
    return Sent(Arrival(0.0, "a cube", 0, steps), outcome, latency_ms, 0.1, **more)


def test_goodput_counts_answers_in_time_by_their_own_steps() -> None:
    seen = [sent(), sent(latency_ms=101), sent(steps=1), sent(steps=1, latency_ms=40), sent("rejected", 3)]
    run = summarise(seen, 2.0, SLO_MS)
    assert (run["sent"], run["ok"], run["rejected"], run["failed"]) == (5, 4, 1, 0)
    assert (run["throughput"], run["goodput"], run["in_time"]) == (2.0, 1.0, 0.4)
    assert run["latency_ms"]["max"] == 101
    assert run["latency_ms_by_steps"]["2"] is None
    assert "eta_error" not in run


def test_errors_of_the_eta_are_parts_of_what_it_took() -> None:
    run = summarise([sent(eta_ms=40.0), sent(eta_ms=75.0), sent()], 1.0, SLO_MS)
    assert run["eta_error"] == {"n": 2, "p50": 0.35, "p90": pytest.approx(0.47)}
    assert quantiles([]) is None


def test_the_servers_counts_must_be_the_clients() -> None:
    seen = [sent(), sent("rejected"), Sent(Arrival(0, "x", 0, 1, kind="oversize"), "invalid", 1.0, 0.0)]
    assert _agree(seen, {"ok": 5.0}, {"ok": 6.0, "rejected": 1.0, "disconnected": 3.0})
    assert not _agree(seen, {"ok": 5.0}, {"ok": 7.0, "rejected": 1.0})


def test_the_baseline_draws_the_right_pictures_and_every_request_is_accounted_for(
    port: int, bundle: Bundle, runtime: OnnxRuntime
) -> None:
    trace = [replace(a, kind=kind) for a, kind in zip(make_trace("mixed", 40.0, 1.0, STEPS), KINDS, strict=False)]
    seen = asyncio.run(replay(port, trace))
    assert [s.arrival for s in seen] == trace
    run = summarise(seen, 1.0, SLO_MS)
    assert (run["invalid"], run["disconnected"]) == (2, 1)
    assert run["failed"] == 0
    names = ("ok", "rejected", "deadline", "invalid", "disconnected")
    assert sum(run[name] for name in names) == run["sent"] == len(trace)
    assert wrong_pictures(seen, runtime, bundle) == (1, 0)
    other = [Sent(s.arrival, s.outcome, 1.0, 0.0, seen[-1].b64_json) for s in seen if s.b64_json][:1]
    assert wrong_pictures(other, runtime, bundle) == (1, 1)


def test_the_closed_loop_counts_answers(port: int) -> None:
    assert asyncio.run(saturate(port, make_trace("mixed", 500.0, 2.0, STEPS), 4, 0.5)) > 0


def test_dynamic_batches_hold_one_number_of_steps_and_serial_ones_one_request(
    bundle: Bundle, runtime: OnnxRuntime
) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        for policy, sizes in (("batching", [3, 2]), ("serial", [1] * 5)):
            server = Server(bundle, runtime, policy, max_batch=8, max_queue=64)  # type: ignore[arg-type]
            for k, steps in enumerate((4, 1, 4, 1, 4)):
                server.queue.append(Waiting("a cube", k, steps, loop.create_future()))
            taken = []
            while server.queue:
                batch = server.take()
                assert len({request.steps for request in batch}) == 1
                taken.append(len(batch))
            assert taken == sizes

    asyncio.run(scenario())


def test_the_report_is_a_page_without_foreign_hosts(tmp_path: Path) -> None:
    result: dict[str, Any] = {
        "bundle": "b<1>",
        "trace": "mixed",
        "seconds": 2.0,
        "repeats": 2,
        "threads": 2,
        "cores": 2,
        "processor": "p",
        "revision": "r",
        "capacity_per_s": 10.0,
        "solo_ms": {"ours": {"1": 20.0}, "serial": {"1": 21.0}},
        "slo_ms": {"1": 40.0},
        "saturation_per_s": {"ours": [9.0, 9.5], "serial": [7.0]},
        "pictures_compared": 3,
        "pictures_different": 0,
        "metrics_agree": True,
        "rows": [
            {
                "server": name,
                "rate": rate,
                "goodput": 5.0,
                "goodput_spread": [4.0, 6.0],
                "runs": [summarise([sent(eta_ms=45.0)], 1.0, SLO_MS), summarise([], 1.0, SLO_MS)],
            }
            for name in ("ours", "serial")
            for rate in (0.5, 1.0)
        ],
    }
    page = render(result)
    assert "b&lt;1&gt;" in page and "b<1>" not in page
    assert page.count("<polyline") == 4
    assert not re.search(r"https?://", page)
    written = write_report(result, tmp_path / "load.json")
    assert [path.name for path in written] == ["load.json", "load.html"]
    assert written[1].read_text() == page


def test_the_bare_runtime_has_a_best_rate(bundle: Bundle, runtime: OnnxRuntime) -> None:
    assert best_rate(runtime, bundle, (1,), seconds=0.05) > 0
