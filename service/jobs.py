"""Video jobs that outlive the process: one SQLite database in WAL mode and one folder of files.

    store = JobStore(Path("data"))
    store.add(Job.new(owner="", model="scenes-wan", plan={…}, now=time.time()))
    store.begin(id, now)                 # queued -> in_progress, counts an attempt
    store.complete(id, now, …)           # in_progress -> completed, files in place
    store.fail(id, now, code, message)   # queued or in_progress -> failed

A state changes in one transaction or not at all, so that after ``kill -9`` every job is in one of them. ``recover``, at
the start, queues what was running again, once; a job that took its worker down twice is failed with the reason. After a
power failure the last moments may be missing, as SQLite writes to the disk at checkpoints; what is there is whole.
Results are kept for their time to live and within a number of bytes, the oldest leave first; what is known of a job
stays longer.

One process owns a folder, held by a lock on a file in it. Every call takes milliseconds on a disk: call it in a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

Status = Literal["queued", "in_progress", "completed", "failed"]
Order = Literal["asc", "desc"]
SCHEMA_VERSION = 1
ATTEMPTS = 2
"""A job is begun at most so often: once, and once more after a worker died with it."""
RECORD_TTL_S = 7 * 86_400.0
"""What is known of a finished job is kept so long, without its files."""
MAX_RECORDS = 10_000
"""Of finished jobs."""
SUFFIXES = {"video": "", "thumbnail": ".webp", "spritesheet": ".jpg"}

_TABLE = """
create table if not exists jobs (
    seq integer primary key autoincrement,
    id text not null unique,
    owner text not null,
    model text not null,
    plan text not null,
    status text not null check (status in ('queued', 'in_progress', 'completed', 'failed')),
    attempts integer not null default 0,
    created_at real not null,
    started_at real,
    completed_at real,
    expires_at real,
    expired integer not null default 0,
    bytes integer not null default 0,
    error_code text,
    error_message text,
    metrics text not null default '{}'
) strict;
create index if not exists jobs_by_owner on jobs (owner, seq);
create index if not exists jobs_by_status on jobs (status, seq);
"""


class StoreError(Exception):
    """The folder cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Job:
    """One row. Times are Unix seconds."""

    id: str
    owner: str
    model: str
    plan: dict[str, Any]
    created_at: float
    status: Status = "queued"
    attempts: int = 0
    """How often it was begun."""
    started_at: float | None = None
    completed_at: float | None = None
    """Also of a failure."""
    expires_at: float | None = None
    expired: bool = False
    """Whether its files are gone."""
    bytes: int = 0
    error_code: str | None = None
    error_message: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def new(cls, *, owner: str, model: str, plan: dict[str, Any], now: float) -> Self:
        return cls(f"video_{secrets.token_hex(12)}", owner, model, plan, now)

    @property
    def finished(self) -> bool:
        return self.status in ("completed", "failed")


COLUMNS = tuple(Job.__dataclass_fields__)


class JobStore:
    """All jobs of a server. Safe for several threads of one process."""

    def __init__(self, folder: Path) -> None:
        """Raises StoreError when the folder cannot be written, is held by another process, or is of another version."""
        self.folder, self.files = folder, folder / "videos"
        self._lock, self._open = threading.Lock(), contextlib.ExitStack()
        with contextlib.ExitStack() as opened:
            try:
                self.files.mkdir(parents=True, exist_ok=True)
                held = opened.enter_context((folder / "lock").open("a"))
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                database = sqlite3.connect(folder / "jobs.db", check_same_thread=False, isolation_level=None)
                self._db = opened.enter_context(contextlib.closing(database))
                self._prepare()
            except BlockingIOError:
                raise StoreError(
                    f"{folder} belongs to a server that runs; set LEAPFROG_DATA to another folder"
                ) from None
            except (OSError, sqlite3.Error) as error:
                raise StoreError(
                    f"{folder} cannot keep jobs: {error}; set LEAPFROG_DATA to a folder to write to"
                ) from None
            self._open = opened.pop_all()

    def _prepare(self) -> None:
        self._db.row_factory = sqlite3.Row
        for line in ("journal_mode = wal", "synchronous = normal", "busy_timeout = 5000"):
            self._db.execute(f"pragma {line}")
        version = int(self._db.execute("pragma user_version").fetchone()[0])
        if version not in (0, SCHEMA_VERSION):
            raise StoreError(
                f"{self.folder}/jobs.db has version {version} and this server writes {SCHEMA_VERSION}; "
                "set LEAPFROG_DATA to another folder"
            )
        self._db.executescript(_TABLE)
        self._db.execute(f"pragma user_version = {SCHEMA_VERSION}")

    def close(self) -> None:
        with self._lock:
            self._open.close()

    def path(self, job_id: str, variant: str = "video") -> Path:
        """Where a job's file is or will be; ids are our own, so that no name leads out of the folder."""
        return self.files / f"{job_id}{SUFFIXES[variant]}"

    # --- changes of state --------------------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        values = [json.dumps(value) if name in ("plan", "metrics") else value for name, value in _row(job).items()]
        marks = ", ".join("?" * len(COLUMNS))
        self._change(f"insert into jobs ({', '.join(COLUMNS)}) values ({marks})", values)

    def begin(self, job_id: str, now: float) -> bool:
        """queued -> in_progress. False when the job is not queued any more."""
        return self._change(
            "update jobs set status = 'in_progress', attempts = attempts + 1, started_at = ? "
            "where id = ? and status = 'queued'",
            (now, job_id),
        )

    def complete(self, job_id: str, now: float, *, ttl_s: float, size: int, metrics: dict[str, Any]) -> bool:
        """in_progress -> completed. False when the job was given up meanwhile: its files have no owner then."""
        return self._change(
            "update jobs set status = 'completed', completed_at = ?, expires_at = ?, bytes = ?, metrics = ? "
            "where id = ? and status = 'in_progress'",
            (now, now + ttl_s, size, json.dumps(metrics), job_id),
        )

    def fail(self, job_id: str, now: float, code: str, message: str) -> bool:
        """queued or in_progress -> failed. False when it is finished already."""
        return self._change(
            "update jobs set status = 'failed', completed_at = ?, error_code = ?, error_message = ? "
            "where id = ? and status in ('queued', 'in_progress')",
            (now, code, message, job_id),
        )

    def delete(self, job_id: str) -> bool:
        """Forget a job and remove its files."""
        found = self._change("delete from jobs where id = ?", (job_id,))
        self.remove_files(job_id)
        return found

    def recover(self, now: float) -> list[Job]:
        """After a start: what was running is queued again, or failed at the last attempt. Returns all that is queued.

        Files of jobs that are not completed are halves of something and are removed.
        """
        self._change(
            "update jobs set status = 'failed', completed_at = ?, error_code = 'interrupted', error_message = ? "
            "where status = 'in_progress' and attempts >= ?",
            (now, f"the server stopped while it made this video, {ATTEMPTS} times; send the request again", ATTEMPTS),
        )
        self._change("update jobs set status = 'queued', started_at = null where status = 'in_progress'", ())
        kept = {row["id"] for row in self._rows("select id from jobs where status = 'completed' and expired = 0")}
        for path in self.files.iterdir():
            if path.name.partition(".")[0] not in kept or path.name.endswith(".part"):
                path.unlink(missing_ok=True)
        return self._jobs("select * from jobs where status = 'queued' order by seq", ())

    def sweep(self, now: float, max_bytes: int) -> list[str]:
        """Remove the files of completed jobs that are past their time, or too many bytes, the oldest first.

        Forgets what was finished long ago. Returns the ids of those whose files went.
        """
        kept = self._rows(
            "select id, bytes, expires_at from jobs where status = 'completed' and expired = 0 order by completed_at"
        )
        total, gone = sum(int(row["bytes"]) for row in kept), []
        for row in kept:
            if row["expires_at"] <= now or total > max_bytes:
                total -= int(row["bytes"])
                gone.append(str(row["id"]))
        for job_id in gone:
            self._change("update jobs set expired = 1, expires_at = min(expires_at, ?) where id = ?", (now, job_id))
            self.remove_files(job_id)
        old = self._rows(
            "select id from jobs where status in ('completed', 'failed') and (completed_at < ? or seq <= "
            "(select max(seq) from jobs) - ?) and (status = 'failed' or expired = 1)",
            (now - RECORD_TTL_S, MAX_RECORDS),
        )
        for row in old:
            self.delete(str(row["id"]))
        return gone

    def remove_files(self, job_id: str) -> None:
        for variant in SUFFIXES:
            self.path(job_id, variant).unlink(missing_ok=True)

    # --- questions ---------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job | None:
        found = self._jobs("select * from jobs where id = ?", (job_id,))
        return found[0] if found else None

    def page(self, owner: str, *, after: str | None, limit: int, order: Order) -> tuple[list[Job], bool]:
        """Jobs of one owner by age, and whether there are more. ``after``: the last id of the page before."""
        sign, where, values = (">", "asc") if order == "asc" else ("<", "desc"), "owner = ?", [owner]
        if after is not None:
            where += f" and seq {sign[0]} (select seq from jobs where id = ? and owner = ?)"
            values += [after, owner]
        found = self._jobs(f"select * from jobs where {where} order by seq {sign[1]} limit ?", (*values, limit + 1))
        return found[:limit], len(found) > limit

    def unfinished(self, owner: str | None = None) -> int:
        """How many jobs are queued or in progress, of everybody or of one owner."""
        where = "status in ('queued', 'in_progress')" + ("" if owner is None else " and owner = ?")
        values = () if owner is None else (owner,)
        return int(self._rows(f"select count(*) as n from jobs where {where}", values)[0]["n"])

    def kept_bytes(self) -> int:
        rows = self._rows("select coalesce(sum(bytes), 0) as n from jobs where status = 'completed' and expired = 0")
        return int(rows[0]["n"])

    def _change(self, statement: str, values: Sequence[Any]) -> bool:
        """One transaction: SQLite's own of a single statement. Whether it changed anything."""
        with self._lock:
            return self._db.execute(statement, values).rowcount > 0

    def _rows(self, statement: str, values: Iterable[Any] = ()) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(statement, tuple(values)).fetchall()

    def _jobs(self, statement: str, values: Iterable[Any]) -> list[Job]:
        return [_job(row) for row in self._rows(statement, values)]


def _row(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in COLUMNS} | {"expired": int(job.expired)}


def _job(row: sqlite3.Row) -> Job:
    read = {name: row[name] for name in COLUMNS}
    read |= {name: json.loads(row[name]) for name in ("plan", "metrics")}
    return Job(**read | {"expired": bool(row["expired"])})
