"""The store: states that change whole or not at all, and what is found after a crash."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.jobs import ATTEMPTS, RECORD_TTL_S, SUFFIXES, Job, JobStore, StoreError

NOW = 1_000_000.0
PLAN = {"prompt": "a red cube", "size": [64, 64]}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(tmp_path / "data")
    yield opened
    opened.close()


def added(store: JobStore, owner: str = "", now: float = NOW) -> Job:
    job = Job.new(owner=owner, model="tiny-wan", plan=PLAN, now=now)
    store.add(job)
    return job


def completed(store: JobStore, now: float = NOW, size: int = 10, ttl_s: float = 60.0) -> Job:
    job = added(store, now=now)
    assert store.begin(job.id, now)
    for variant in SUFFIXES:
        store.path(job.id, variant).write_bytes(b"x")
    assert store.complete(job.id, now, ttl_s=ttl_s, size=size, metrics={"steps": 4})
    return job


def state(store: JobStore, job: Job) -> str:
    found = store.get(job.id)
    assert found is not None
    return found.status


def test_a_job_is_kept_as_it_was_given(store: JobStore) -> None:
    job = added(store, "alice")
    assert store.get(job.id) == job
    assert job.plan == PLAN and job.id.startswith("video_")
    assert store.get("video_unknown") is None


def test_the_way_of_a_job(store: JobStore) -> None:
    job = completed(store)
    found = store.get(job.id)
    assert found is not None
    assert (found.status, found.attempts, found.completed_at, found.expires_at) == ("completed", 1, NOW, NOW + 60)
    assert (found.bytes, found.metrics, found.finished) == (10, {"steps": 4}, True)


def test_states_change_only_along_the_way(store: JobStore) -> None:
    """Whoever comes too late is told so: a cancelled job is neither begun nor completed any more."""
    job = added(store)
    assert not store.complete(job.id, NOW, ttl_s=1, size=1, metrics={})
    assert store.fail(job.id, NOW, "cancelled", "the video was cancelled")
    assert not store.begin(job.id, NOW)
    assert not store.fail(job.id, NOW, "internal_error", "late")
    found = store.get(job.id)
    assert found is not None and (found.error_code, found.completed_at) == ("cancelled", NOW)
    done = completed(store)
    assert not store.fail(done.id, NOW, "cancelled", "late") and not store.begin(done.id, NOW)


def test_after_a_crash_running_jobs_are_queued_once_more_and_then_failed(store: JobStore, tmp_path: Path) -> None:
    waiting, running, done = added(store), added(store), completed(store)
    for attempt in range(1, ATTEMPTS + 1):
        assert store.begin(running.id, NOW)
        store.path(running.id).with_name(f"{running.id}.part").write_bytes(b"half")
        store.close()
        store = JobStore(tmp_path / "data")
        queued = store.recover(NOW + attempt)
        assert [job.id for job in queued] == ([waiting.id, running.id] if attempt < ATTEMPTS else [waiting.id])
    found = store.get(running.id)
    assert found is not None and (found.status, found.error_code) == ("failed", "interrupted")
    assert "stopped" in str(found.error_message)
    assert {path.name for path in store.files.iterdir()} == {store.path(done.id, v).name for v in SUFFIXES}
    assert state(store, done) == "completed"
    store.close()


def test_pages_follow_each_other_without_gaps_in_both_orders(store: JobStore) -> None:
    mine = [added(store, "alice").id for _ in range(5)]
    added(store, "bob")
    for order, expected in (("asc", mine), ("desc", mine[::-1])):
        seen: list[str] = []
        more, after = True, None
        while more:
            page, more = store.page("alice", after=after, limit=2, order=order)  # type: ignore[arg-type]
            seen += [job.id for job in page]
            after = seen[-1]
        assert seen == expected
    assert store.page("alice", after="video_unknown", limit=2, order="asc") == ([], False)


def test_results_leave_after_their_time_and_the_oldest_when_there_are_too_many_bytes(store: JobStore) -> None:
    jobs = [completed(store, now=NOW + i, size=40, ttl_s=60 if i else 1) for i in range(4)]
    assert store.sweep(NOW + 5, max_bytes=1000) == [jobs[0].id], "its time is over"
    assert store.sweep(NOW + 5, max_bytes=100) == [jobs[1].id], "120 bytes are more than 100"
    gone = store.get(jobs[1].id)
    assert gone is not None and gone.expired and gone.status == "completed" and gone.expires_at == NOW + 5
    assert not any(store.path(jobs[1].id, variant).exists() for variant in SUFFIXES)
    assert all(store.path(jobs[2].id, variant).exists() for variant in SUFFIXES)
    assert store.kept_bytes() == 80


def test_what_is_known_of_a_job_is_forgotten_later(store: JobStore) -> None:
    failed, done, waiting = added(store), completed(store), added(store)
    store.fail(failed.id, NOW, "internal_error", "…")
    store.sweep(NOW + RECORD_TTL_S - 1, max_bytes=1000)
    assert store.get(failed.id) is not None and store.get(done.id) is not None
    store.sweep(NOW + RECORD_TTL_S + 1, max_bytes=1000)
    assert store.get(failed.id) is None and store.get(done.id) is None
    assert state(store, waiting) == "queued"


def test_deleting_removes_record_and_files(store: JobStore) -> None:
    job = completed(store)
    assert store.delete(job.id) and store.get(job.id) is None
    assert not list(store.files.iterdir())
    assert not store.delete(job.id)


def test_a_folder_belongs_to_one_process(store: JobStore, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from service.jobs import JobStore, StoreError\n"
        "try: JobStore(Path(sys.argv[1]))\n"
        "except StoreError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert "belongs to a server that runs; set LEAPFROG_DATA" in run.stdout
    store.close()
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout == ""
    )


def test_folders_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot keep jobs"):
        JobStore(tmp_path / "file")
    (tmp_path / "other").mkdir()
    with sqlite3.connect(tmp_path / "other" / "jobs.db") as database:
        database.execute("pragma user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="version 99"):
        JobStore(tmp_path / "other")
