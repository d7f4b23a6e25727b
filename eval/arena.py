"""A blind A/B page: which of two pictures or clips of the same prompt and seed is better? Votes give a win rate.

    python -m eval.arena "AMD, 4 steps" "DMD2, 4 steps" --suite scenes-held-out
    python -m eval.arena RUN_A RUN_B --port 3300 --votes runs/eval/votes.sqlite

Candidate and baseline are labels (the newest complete run of the suite counts) or ids of runs whose pictures are still
in the cache. Sides are drawn anew for every voter and prompt, and no page, address or picture tells which is which. The
win rate is the mean over prompts of 1 for the candidate, ½ for a tie and 0 for the baseline, with a bootstrap interval
over them. Ctrl-C ends the page and prints it; votes are kept, and a later start goes on. Exit codes: 0, or 3 when there
is nothing to show.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sqlite3
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from eval.errors import EvalError, nearest
from eval.pictures import data_url, fps_of, pictures
from eval.run import DEFAULT_CACHE, DEFAULT_STORE
from eval.statistics import Interval, bootstrap_mean
from eval.store import Store

Key = tuple[str, int]
Choice = Literal["left", "right", "tie"]
DEFAULT_VOTES = Path("runs/eval/votes.sqlite")
PAGE = Path(__file__).parent / "arena.html"
_OPEN = 1000
"""Questions that were asked and not answered; the oldest is forgotten first."""
_LARGEST_BODY = 4096
_POLICY = "default-src 'none'; img-src data:; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS votes (
    candidate TEXT NOT NULL, baseline TEXT NOT NULL, prompt_id TEXT NOT NULL, seed INTEGER NOT NULL,
    voter TEXT NOT NULL, candidate_left INTEGER NOT NULL, score REAL NOT NULL, cast_at TEXT NOT NULL,
    PRIMARY KEY (candidate, baseline, prompt_id, seed, voter)
)"""


@dataclass(frozen=True)
class Pair:
    """One prompt and seed drawn by both: (3, H, W) uint8 each, of clips (F, 3, H, W)."""

    key: Key
    text: str
    candidate: NDArray[np.uint8]
    baseline: NDArray[np.uint8]
    fps: float = 8.0


@dataclass(frozen=True)
class Question:
    """A pair as one voter sees it."""

    pair: Pair
    voter: str
    candidate_left: bool


class Votes:
    """Votes on one pair of runs, kept in a file; a voter's later vote on the same pictures replaces the earlier."""

    def __init__(self, path: Path, candidate: str, baseline: str) -> None:
        self._of, self._lock = (candidate, baseline), threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False)
            self._db.execute(_SCHEMA)
        except (sqlite3.DatabaseError, OSError) as error:
            raise EvalError(f"{path} cannot keep votes: {error}; give another --votes") from None

    def cast(self, question: Question, choice: Choice) -> None:
        won = 0.5 if choice == "tie" else float((choice == "left") == question.candidate_left)
        prompt, seed = question.pair.key
        row = (*self._of, prompt, seed, question.voter, question.candidate_left, won, datetime.now(UTC).isoformat())
        with self._lock, self._db:
            self._db.execute("INSERT OR REPLACE INTO votes VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)

    def seen(self, voter: str) -> set[Key]:
        query = "SELECT prompt_id, seed FROM votes WHERE candidate = ? AND baseline = ? AND voter = ?"
        with self._lock:
            return {(str(p), int(s)) for p, s in self._db.execute(query, (*self._of, voter))}

    def win_rate(self) -> tuple[Interval, int] | None:
        """Percent with an interval over prompts, and the number of votes; None before the first."""
        query = (
            "SELECT prompt_id, score FROM votes WHERE candidate = ? AND baseline = ? ORDER BY prompt_id, seed, voter"
        )
        with self._lock:
            rows = self._db.execute(query, self._of).fetchall()
        if not rows:
            return None
        return bootstrap_mean(100 * np.array([score for _, score in rows]), [prompt for prompt, _ in rows]), len(rows)

    def close(self) -> None:
        self._db.close()


class Arena:
    """Asks voters and counts."""

    def __init__(self, pairs: Sequence[Pair], votes: Votes) -> None:
        self._pairs, self.votes = list(pairs), votes
        self._open: dict[str, Question] = {}
        self._lock = threading.Lock()

    def ask(self, voter: str) -> dict[str, Any]:
        """A question that the voter has not answered: prompt and two pictures; without them when all are answered."""
        seen = self.votes.seen(voter)
        left = [pair for pair in self._pairs if pair.key not in seen]
        told = {"answered": len(seen), "of": len(self._pairs)}
        if not left:
            return told
        # A voter who reloads the page sees the same pictures on the same sides.
        rng = np.random.default_rng(np.frombuffer(voter.encode().ljust(8), dtype=np.uint8).tolist())
        order, sides = rng.permutation(len(self._pairs)), rng.integers(2, size=len(self._pairs))
        number = next(int(i) for i in order if self._pairs[i].key not in seen)
        question = Question(self._pairs[number], voter, bool(sides[number]))
        token = secrets.token_urlsafe(12)
        with self._lock:
            self._open[token] = question
            while len(self._open) > _OPEN:
                del self._open[next(iter(self._open))]
        shown = [data_url(image, question.pair.fps) for image in (question.pair.candidate, question.pair.baseline)]
        first, second = shown if question.candidate_left else shown[::-1]
        return {**told, "id": token, "prompt": question.pair.text, "left": first, "right": second}

    def answer(self, token: str, choice: Choice) -> None:
        """Raises KeyError for a question that nobody was asked."""
        with self._lock:
            question = self._open.pop(token)
        self.votes.cast(question, choice)


def collect(store: Store, candidate: dict[str, Any], baseline: dict[str, Any], cache: Path) -> list[Pair]:
    """Pairs of all prompts and seeds that both runs drew. Raises EvalError when no picture is left."""
    texts, theirs = store.texts(candidate["id"]), store.texts(baseline["id"])
    shared = [key for key, text in texts.items() if theirs.get(key) == text]
    ours, others = (pictures(store, run, cache, shared) for run in (candidate, baseline))
    both, fps = [key for key in shared if key in ours and key in others], fps_of(candidate)
    pairs = [Pair(key, texts[key], ours[key], others[key], fps) for key in both]
    if not pairs:
        raise EvalError(
            f"{candidate['label']} and {baseline['label']} share {len(shared)} samples and no picture of them is in "
            f"{cache}; score both again on the same suite"
        )
    return pairs


def find_run(store: Store, name: str, suite: str) -> dict[str, Any]:
    """By label and suite, or by id. Raises EvalError with the nearest label, or with the suites that the label has."""
    found = store.runs(label=name, suite=suite) or [run for run in store.runs() if run["id"] == name]
    if found:
        return found[0]
    elsewhere = sorted({str(run["suite"]) for run in store.runs(label=name)})
    if elsewhere:
        raise EvalError(f"{name!r} has no complete run of {suite}; give --suite {' or '.join(elsewhere)}")
    labels = {str(run["label"]) for run in store.runs(suite=suite)}
    if not labels:
        raise EvalError(f"{store.path} has no complete run of {suite}; score one, or give another --suite")
    raise EvalError(f"{store.path} has no run of {suite} labelled {name!r}, nor of that id; {nearest(name, labels)}")


def find_runs(path: Path, names: Sequence[str], suite: str, cache: Path) -> tuple[list[dict[str, Any]], list[Pair]]:
    """Candidate and baseline with what both drew. Raises EvalError for runs that cannot be told apart or shown."""
    if not path.is_file():
        raise EvalError(f"{path} is missing; score something first with python -m eval.run")
    with Store(path) as store:
        candidate, baseline = (find_run(store, name, suite) for name in names)
        if candidate["id"] == baseline["id"]:
            raise EvalError(f"candidate and baseline are both run {candidate['id']}; give two different runs")
        return [candidate, baseline], collect(store, candidate, baseline, cache)


def describe(candidate: str, baseline: str, votes: Votes) -> str:
    found = votes.win_rate()
    if found is None:
        return "nobody has voted"
    rate, count = found
    interval = f" [{rate.low:.1f}, {rate.high:.1f}]" if rate.n > 1 else ""
    return f"{candidate} wins {rate.value:.1f} %{interval} against {baseline}: {count} votes on {rate.n} prompts"


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /question and /vote take and give JSON."""

    arena: Arena
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path != "/":
            self._reply(HTTPStatus.NOT_FOUND, {"error": f"{self.path} is not here; open /"})
            return
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.read_bytes())

    def do_POST(self) -> None:
        try:
            body = self._body()
            if self.path == "/question":
                self._reply(HTTPStatus.OK, self.arena.ask(_text(body, "voter")))
            elif self.path == "/vote":
                choice = _text(body, "choice")
                if choice not in get_args(Choice):
                    raise ValueError(f"choice is {choice!r}; use one of {', '.join(get_args(Choice))}")
                self.arena.answer(_text(body, "id"), choice)  # type: ignore[arg-type]
                self._reply(HTTPStatus.OK, {})
            else:
                self._reply(HTTPStatus.NOT_FOUND, {"error": f"{self.path} is not here; use /question or /vote"})
        except KeyError:
            self._reply(HTTPStatus.CONFLICT, {"error": "this question is answered or forgotten; ask for another"})
        except ValueError as error:
            self._reply(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def _body(self) -> Mapping[str, Any]:
        # A form of another site cannot send this type without asking first.
        if self.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ValueError("the body is not application/json; send JSON")
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > _LARGEST_BODY:
            self.close_connection = True
            raise ValueError(f"content-length is {length or 'missing'}; send at most {_LARGEST_BODY} bytes")
        found = json.loads(self.rfile.read(int(length)))
        if not isinstance(found, dict):
            raise ValueError("the body is no JSON object; send one")
        return found

    def _reply(self, status: HTTPStatus, tree: Mapping[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(tree).encode())

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.send_header("cache-control", "no-store")
        self.send_header("content-security-policy", _POLICY)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  (the name of the base class)
        """The terminal shows the result, not every request."""


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not 1 <= len(value) <= 64:
        raise ValueError(f"{name} is {value!r}; give a text of 1 to 64 characters")
    return value


def make_server(arena: Arena, host: str, port: int) -> ThreadingHTTPServer:
    """port: 0 takes a free one. Raises EvalError for an address that cannot be had."""
    try:
        return ThreadingHTTPServer((host, port), type("Bound", (Handler,), {"arena": arena}))
    except (OSError, OverflowError) as error:
        raise EvalError(f"{host}:{port} cannot be served: {error}; give another --host or --port") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.arena", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("candidate", help="label or id of a run")
    parser.add_argument("baseline", help="label or id of a run")
    parser.add_argument("--suite", default="scenes-held-out", help="of runs given by label; default: %(default)s")
    parser.add_argument("--store", type=Path, default=DEFAULT_STORE, help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="of pictures; default: %(default)s")
    parser.add_argument("--votes", type=Path, default=DEFAULT_VOTES, help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s; there are no passwords")
    parser.add_argument("--port", type=int, default=3300, help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        runs, pairs = find_runs(args.store, (args.candidate, args.baseline), args.suite, args.cache)
        votes = Votes(args.votes, runs[0]["id"], runs[1]["id"])
        server = make_server(Arena(pairs, votes), args.host, args.port)
    except (EvalError, OSError, sqlite3.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    print(f"{len(pairs)} pairs at http://{args.host}:{server.server_port}; Ctrl-C ends", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    print(describe(runs[0]["label"], runs[1]["label"], votes))
    votes.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
