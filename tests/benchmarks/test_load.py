"""The load test: the same traces for everybody, honest sums, baselines that draw the right pictures."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from benchmarks.load import best_rate, divide, main, next_free, parse, solo_ms
from benchmarks.load_baselines import Policy, Server, Waiting, build
from benchmarks.load_client import KEEP_EVERY, Answer, Outcome, Sent, Target, replay, saturate
from benchmarks.load_client import parse as parse_answer
from benchmarks.load_report import bars, plot, render, ticks, write_report
from benchmarks.load_servers import SERVERS, Sample
from benchmarks.load_sums import agree, fairness, max_min, quantiles, recovery, summarise, wrong_files
from benchmarks.load_traces import ABUSE, BURST_S, TENANTS, TRACES, Arrival, Kind, Trace, make_trace
from distill.bundle import Bundle
from service.runtimes import OnnxRuntime

STEPS = (1, 2, 4)
WORKS = [Arrival(0.0, "", 0, steps) for steps in STEPS]
KINDS: tuple[Kind, ...] = (*("ordinary",) * 6, "disconnect", "invalid", "oversize", "ordinary")
SLO_MS = {"1": 40.0, "2": 60.0, "4": 100.0}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> OnnxRuntime:
    return OnnxRuntime(bundle, threads=1, max_batch=8)


@pytest.fixture(scope="module")
def target(bundle: Bundle) -> Iterator[Target]:
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
    yield Target(free)
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


def test_bursts_have_silences_abuse_has_all_kinds_and_one_tenant_asks_for_most() -> None:
    burst = make_trace("burst", 20.0, 40.0, STEPS)
    assert all(a.at % (2 * BURST_S) <= BURST_S for a in burst)
    kinds = [a.kind for a in make_trace("abuse", 20.0, 400.0, STEPS)]
    assert {kind: kinds.count(kind) / len(kinds) for kind in ABUSE} == pytest.approx(ABUSE, abs=0.01)
    keys = [a.key for a in make_trace("tenants", 20.0, 200.0, STEPS)]
    assert [keys.count(k) / len(keys) for k in range(4)] == pytest.approx(TENANTS, abs=0.03)
    clips = make_trace("video", 20.0, 20.0, STEPS, frames=(5, 9))
    assert {a.work for a in clips} == {f"{steps}x{frames}" for steps in STEPS for frames in (5, 9)}


def sent(outcome: Any = "ok", latency_ms: float = 50.0, steps: int = 4, key: int = 0, **more: Any) -> Sent:
    return Sent(Arrival(0.0, "a cube", 0, steps, key=key), outcome, latency_ms, 0.1, **more)


def test_goodput_counts_answers_in_time_by_their_own_steps() -> None:
    seen = [sent(), sent(latency_ms=101), sent(steps=1), sent(steps=1, latency_ms=40), sent("rejected", 3)]
    run = summarise(seen, 2.0, SLO_MS)
    assert (run["sent"], run["ok"], run["rejected"], run["failed"]) == (5, 4, 1, 0)
    assert (run["throughput"], run["goodput"], run["in_time"]) == (2.0, 1.0, 0.4)
    assert run["latency_ms"]["max"] == 101
    assert run["latency_ms_by_work"]["2"] is None
    assert "eta_error" not in run


def test_waiting_and_being_served_are_told_apart_and_what_is_answered_after_the_end_is_no_throughput() -> None:
    seen = [
        sent(metrics={"queue_ms": 30.0, "total_ms": 45.0}, first_preview_ms=12.0, received=500),
        sent(latency_ms=2500.0, received=500),
    ]
    run = summarise(seen, 2.0, SLO_MS)
    assert (run["queue_ms"]["p50"], run["service_ms"]["p50"], run["first_preview_ms"]["max"]) == (30.0, 15.0, 12.0)
    assert (run["throughput"], run["bytes_per_s"]) == (0.5, 500)


def test_errors_of_the_eta_are_parts_of_what_it_took() -> None:
    run = summarise([sent(eta_ms=40.0), sent(eta_ms=75.0), sent()], 1.0, SLO_MS)
    assert run["eta_error"] == {"n": 2, "p50": 0.35, "p90": pytest.approx(0.47)}
    assert quantiles([]) is None


def test_fair_is_what_nobody_could_have_more_of_without_taking_it_from_one_with_less() -> None:
    assert max_min({"a": 8, "b": 1, "c": 3}, 9) == {"b": 1, "c": 3, "a": 5}
    wanted = [*[sent(key=0)] * 8, *[sent(key=1)] * 2]
    fair = fairness(wanted, [*[sent(key=0)] * 4, *[sent(key=1)] * 2], lambda s: str(s.arrival.key))
    assert fair == {"jain": 1.0, "in_time": {"0": 0.5, "1": 1.0}}
    greedy = fairness(wanted, [sent(key=0)] * 6, lambda s: str(s.arrival.key))
    assert greedy is not None and greedy["jain"] == pytest.approx((6 / 4) ** 2 / (2 * (6 / 4) ** 2))
    assert fairness([sent()], [sent()], lambda s: "alone") is None


def test_the_servers_counts_must_be_the_clients() -> None:
    seen = [sent(), sent("rejected"), Sent(Arrival(0, "x", 0, 1, kind="oversize"), "invalid", 1.0, 0.0)]
    assert agree(seen, {"ok": 5.0}, {"ok": 6.0, "rejected": 1.0})
    assert not agree(seen, {"ok": 5.0}, {"ok": 7.0, "rejected": 1.0})
    assert not agree(seen, {"ok": 5.0}, {"ok": 6.0})


def test_who_left_may_have_been_answered_but_is_counted_once() -> None:
    seen = [sent(), sent("disconnected"), sent("disconnected")]
    assert agree(seen, {}, {"ok": 2.0, "disconnected": 1.0})
    assert agree(seen, {}, {"ok": 1.0, "disconnected": 2.0})
    assert not agree(seen, {}, {"ok": 1.0, "disconnected": 1.0})
    assert not agree(seen, {}, {"ok": 0.0, "disconnected": 3.0})


def at(second: float, latency_ms: float) -> Sent:
    return Sent(Arrival(second, "a cube", 0, 4), "ok", latency_ms, 0.0)


def test_after_an_overload_only_what_came_when_the_queue_was_empty_counts() -> None:
    """Ten calm seconds, ten of overload, ten calm ones; the queue is empty two seconds after the overload."""
    seen = [at(k, 50.0 if k < 10 else 900.0 if k < 22 else 55.0) for k in range(30)]
    samples = [Sample(100.0 + k, 300.0, 0.0, 9 if 10 <= k < 22 else 0) for k in range(31)]
    found = recovery(seen, samples, 100.0, 10.0, 10.0)
    assert found["drain_s"] == 2.0
    assert (found["latency_ms_before"]["p99"], found["latency_ms_after"]["p99"]) == (50.0, 55.0)
    assert found["returned"] and found["memory_flat"]
    assert [window["latency_ms"]["p50"] for window in found["windows"]] == [50, 50, 900, 900, 55, 55]
    growing = [sample._replace(rss_mb=300.0 + 10 * k) for k, sample in enumerate(samples)]
    slow = recovery([*seen, at(29.0, 80.0)], growing, 100.0, 10.0, 10.0)
    assert not slow["returned"] and not slow["memory_flat"]
    assert recovery(seen, samples[:20], 100.0, 10.0, 10.0)["drain_s"] == float("inf")


def test_answers_are_read_in_all_their_forms() -> None:
    metrics = '"metrics": {"queue_ms": 1.5, "steps": 4}'
    picture = '"b64_json": "AAE="'
    plain = Answer(200, {"content-type": "application/json"}, f'{{"data": [{{{picture}}}], {metrics}}}'.encode())
    listed = Answer(200, {"content-type": "application/json"}, f'[{{"data": [{{{picture}}}]}}]'.encode())
    event = f'event: x\ndata: {{"type": "image_generation.completed", {picture}, {metrics}}}\n\n'
    streamed = Answer(200, {"content-type": "text/event-stream; charset=utf-8"}, b": hm\n\n" + event.encode())
    clip = Answer(200, {"content-type": "video/mp4", "server-timing": "queue;dur=1.5, total;dur=9"}, b"\0\1")
    assert parse_answer(plain) == parse_answer(streamed) == (b"\0\1", {"queue_ms": 1.5})
    assert parse_answer(listed) == (b"\0\1", {})
    assert parse_answer(clip) == (b"\0\1", {"queue_ms": 1.5, "total_ms": 9.0})
    with pytest.raises(ValueError, match="unpack"):
        parse_answer(Answer(200, {"content-type": "text/event-stream"}, b"event: error\ndata: {}\n\n"))


def test_the_baseline_draws_the_right_pictures_and_every_request_is_accounted_for(
    target: Target, bundle: Bundle, runtime: OnnxRuntime
) -> None:
    trace = [replace(a, kind=kind) for a, kind in zip(make_trace("mixed", 40.0, 1.0, STEPS), KINDS, strict=False)]
    seen = asyncio.run(replay(target, trace))
    assert [s.arrival for s in seen] == trace
    run = summarise(seen, 1.0, SLO_MS)
    assert (run["invalid"], run["disconnected"]) == (2, 1)
    assert run["failed"] == 0
    names = ("ok", "rejected", "deadline", "invalid", "disconnected")
    assert sum(run[name] for name in names) == run["sent"] == len(trace)
    assert all((s.file is not None) == (k % KEEP_EVERY == 0) for k, s in enumerate(seen))
    assert wrong_files(seen, runtime, bundle) == (1, 0)
    other = [replace(s, arrival=replace(s.arrival, seed=s.arrival.seed + 1)) for s in seen]
    assert wrong_files(other, runtime, bundle) == (1, 1)
    assert run["queue_ms"]["p50"] >= 0 and run["service_ms"]["p50"] > 0


def test_the_closed_loop_counts_answers(target: Target) -> None:
    assert asyncio.run(saturate(target, make_trace("mixed", 500.0, 3.0, STEPS), 4, 3.0)) > 0


def test_alone_is_measured_for_every_kind_of_request(target: Target) -> None:
    alone = solo_ms(target, WORKS)
    assert set(alone) == set(SLO_MS) and all(value > 0 for value in alone.values())


def test_client_and_servers_share_cores_only_where_there_are_few() -> None:
    assert divide([0, 1]) == ([0, 1], [0, 1])
    assert divide([0, 1, 2, 3]) == ([3], [0, 1, 2])


def test_a_port_that_somebody_has_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert next_free(port - 1) > port


def test_traces_must_fit_the_bundle(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([str(tiny_bundle)]).traces == ["mixed"]
    with pytest.raises(SystemExit):
        parse([str(tiny_bundle), "--traces", "video"])
    assert "makes pictures; give any other trace" in capsys.readouterr().err


@pytest.mark.slow
def test_one_command_runs_everything_and_every_request_is_accounted_for(
    tiny_bundle: Path, tmp_path: Path, free_port: int
) -> None:
    """All servers, two traces and an overload, as short as they can be: what is judged here is the sums."""
    counts = ["--seconds", "2", "--repeats", "1", "--rates", "0.5", "--at", "0.3", "--clients", "2", "--threads", "1"]
    out = tmp_path / "load.json"
    main(
        [
            str(tiny_bundle),
            "--traces",
            "tenants",
            "abuse",
            *counts,
            "--recovery",
            "2",
            "--port",
            str(free_port),
            "--out",
            str(out),
        ]
    )
    result = json.loads(out.read_text())
    assert {(row["trace"], row["server"]) for row in result["rows"]} == {
        (trace, server) for trace in ("tenants", "abuse") for server in SERVERS
    }
    for row in result["rows"]:
        (run,) = row["runs"]
        assert sum(run[name] for name in get_args(Outcome)) == run["sent"]
        assert run["failed"] == 0 and run["memory_mb"] > 0
    assert result["metrics_agree"] and result["recovery"]["metrics_agree"]
    assert result["compared"] > 0 and result["different"] == 0
    assert result["recovery"]["rejected"] + result["recovery"]["ok"] == result["recovery"]["sent"]
    assert {bar["name"] for bar in result["bars"]} >= {"goodput over naive", "goodput over batching"}


@pytest.mark.slow
def test_clips_are_compared_with_those_made_alone(tiny_video_bundle: Path, tmp_path: Path, free_port: int) -> None:
    counts = ["--seconds", "2", "--repeats", "1", "--rates", "0.4", "--clients", "1", "--threads", "1"]
    servers = ["--servers", "ours", "batching"]
    out = tmp_path / "load.json"
    main([str(tiny_video_bundle), *servers, *counts, "--port", str(free_port), "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["traces"] == ["video"] and result["metrics_agree"]
    assert result["compared"] > 0 and result["different"] == 0


def test_dynamic_batches_hold_one_number_of_steps_and_serial_ones_one_request(
    bundle: Bundle, runtime: OnnxRuntime
) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        policies: tuple[tuple[Policy, list[int]], ...] = (("batching", [3, 2]), ("serial", [1] * 5))
        for policy, sizes in policies:
            server = Server(bundle, runtime, policy, max_batch=8, max_queue=64)
            for k, steps in enumerate((4, 1, 4, 1, 4)):
                server.queue.append(Waiting("a cube", k, steps, 0, loop.create_future()))
            taken = []
            while server.queue:
                batch = server.take()
                assert len({request.steps for request in batch}) == 1
                taken.append(len(batch))
            assert taken == sizes

    asyncio.run(scenario())


def found() -> dict[str, Any]:
    """A result of two servers at two rates."""
    usage = {"server_cores_busy": 0.5, "client_cores_busy": 0.1, "memory_mb": 300.0}
    runs = [summarise([sent(eta_ms=45.0)], 1.0, SLO_MS) | usage, summarise([], 1.0, SLO_MS) | usage]
    samples = [Sample(float(k), 300.0, 0.0, 0) for k in range(31)]
    return {
        "bundle": "b<1>",
        "runtime": "onnx",
        "traces": ["mixed", "burst"],
        "seconds": 2.0,
        "repeats": 2,
        "threads": 2,
        "cores": {"client": [0, 1], "servers": [0, 1]},
        "processor": "p",
        "revision": "r",
        "command": "python -m benchmarks.load b<1>",
        "capacity_per_s": 10.0,
        "solo_ms": {"ours": {"1": 20.0}, "naive": {"1": 21.0}},
        "slo_ms": {"1": 40.0},
        "saturation_per_s": {"ours": {"1": [5.0], "16": [9.0, 9.5]}, "naive": {"1": [7.0]}},
        "saturation_parts": {"ours": {"1": [0.5], "16": [0.9, 0.94]}, "naive": {"1": [0.7]}},
        "compared": 3,
        "different": 0,
        "metrics_agree": True,
        "recovery": recovery([at(float(k), 50.0) for k in range(30)], samples, 0.0, 10.0, 10.0)
        | {"sent": 30, "ok": 30, "rejected": 0, "failed": 0},
        "rows": [
            {
                "trace": trace,
                "server": name,
                "rate": rate,
                "goodput": goodput * rate,
                "goodput_spread": [4.0, 6.0],
                "runs": runs,
            }
            for trace in ("mixed", "burst")
            for name, goodput in (("ours", 8.0), ("naive", 2.0))
            for rate in (0.5, 1.0)
        ],
    }


def test_the_report_is_a_page_without_foreign_hosts(tmp_path: Path) -> None:
    result = found()
    page = render(result)
    assert "b&lt;1&gt;" in page and "b<1>" not in page
    assert page.count("<polyline") == 4 * 2 + 4
    assert page.count("<table") == 2
    assert not re.search(r"https?://", page)
    written = write_report(result, tmp_path / "load.json")
    assert [path.name for path in written] == ["load.json", "load.html"]
    assert written[1].read_text() == page


def test_axes_have_round_numbers_and_latencies_powers_of_ten() -> None:
    assert ticks(47.3) == [0, 10, 20, 30, 40, 50]
    assert ticks(0.183) == [0, 0.05, 0.1, 0.15, 0.2]
    assert ticks(0.0) == [0, 1]
    drawn = plot("latency", {"ours": [(1.0, 30.0, 20.0, 4000.0)]}, "x", log=True)
    assert re.findall(r'text-anchor="end">(\d+)<', drawn) == ["10", "100", "1000", "10000"]
    flat = plot("nothing refused", {"ours": [(1.0, 0.0, 0.0, 0.0)]}, "x")
    assert 'cy="280.0"' in flat, "on the axis"


def test_promises_are_judged_by_what_was_found() -> None:
    judged = {bar.name: bar for bar in bars(found())}
    assert judged["goodput over naive"].found == "4.00" and judged["goodput over naive"].met
    assert "goodput over batching" not in judged, "it was not run"
    assert judged["throughput at saturation of the bare runtime's"].found == "92%"
    assert judged["p90 of the ETA's error, median of runs"].met
    assert all(bar.met for bar in judged.values())
    worse = found() | {"different": 1, "metrics_agree": False}
    assert {bar.name for bar in bars(worse) if not bar.met} == {
        "answers that differ from those made alone",
        "every request accounted for by client and server",
    }


def test_a_server_that_keeps_no_promise_is_compared_too() -> None:
    still = found()
    for row in still["rows"]:
        if row["server"] == "naive":
            row["goodput"] = 0.0
    ours = max(row["goodput"] for row in still["rows"] if row["server"] == "ours")
    judged = {bar.name: bar for bar in bars(still)}
    assert judged["goodput over naive"].found == f"{ours:g} against 0" and judged["goodput over naive"].met
    for row in still["rows"]:
        row["goodput"] = 0.0
    assert not {bar.name: bar for bar in bars(still)}["goodput over naive"].met, "nothing is no success over nothing"


def test_the_bare_runtime_has_a_best_rate(bundle: Bundle, runtime: OnnxRuntime) -> None:
    assert best_rate(runtime, bundle, WORKS[:1], seconds=0.05) > 0


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
