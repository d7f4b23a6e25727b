"""Measure every configured bundle, compare, report, and wake somebody only when there is a reason.

    python -m eval.nightly
    python -m eval.nightly --config eval/nightly.yaml --bundle digits-sit --samples 64     # a quick look
    python -m eval.nightly --night 2026-11-23                                              # goes on where it stopped

Writes index.html, summary.md, report.json and junit.xml to OUT/NIGHT. A night may be started again: finished runs are
found, pictures are cached. Exit codes: 0 pass, 1 regression, 2 inconclusive (with --strict), 3 incomplete or broken,
4 not comparable.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from eval.errors import EvalError, first_fault, nearest
from eval.night import Night, Place, Watch
from eval.notify import alert_of, github_summary, junit, send
from eval.regression import Verdict, exit_code
from eval.report import markdown, render
from eval.store import Store

DEFAULT_CONFIG = Path(__file__).parent / "nightly.yaml"


class Config(BaseModel):
    """nightly.yaml. expected_by: UTC time of day by which a night should have started; later ones are shown as late."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Path
    cache: Path
    judges: Path
    out: Path
    expected_by: str = Field(default="04:00", pattern=r"^[0-2]\d:[0-5]\d$")
    bundles: tuple[Watch, ...] = Field(min_length=1)
    webhook: str | None = None

    @field_validator("bundles")
    @classmethod
    def _once(cls, bundles: tuple[Watch, ...]) -> tuple[Watch, ...]:
        names = [watch.bundle.name for watch in bundles]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is listed twice; keep one")
        return bundles


def load_config(path: Path) -> Config:
    """Raises EvalError that names the field at fault."""
    try:
        return Config.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise EvalError(f"{path} cannot be read: {error}; see eval/nightly.yaml") from None
    except ValidationError as error:
        raise EvalError(f"{path}: {first_fault(error, Config, Watch)}") from None


def run_night(config: Config, night: str, *, samples: int | None = None, quiet: bool = True) -> list[dict[str, Any]]:
    """Measure all bundles and enter them into the store. Returns their records.

    samples: a quick look, whose runs are kept and which is no night: it enters no history and tells nobody.
    """
    records = []
    for watch in config.bundles:
        started = datetime.now(UTC).isoformat(timespec="seconds")
        with Store(config.store) as store, tempfile.TemporaryDirectory(prefix="leapfrog-night-") as scratch:
            place = Place(config.store, config.cache, config.judges, Path(scratch), samples, quiet)
            record = Night(watch, night, place, store).measure() | {"started": started}
            earlier = [row for row in store.nights(record["bundle"]) if row["night"] < night]
            record["alert"] = alert_of(record, earlier) if samples is None else None
            if samples is None:
                store.keep_night(night, record["bundle"], started, record["verdict"], record)
        records.append(record)
    return records


def publish(config: Config, night: str, records: Sequence[dict[str, Any]]) -> list[Path]:
    """Write the four files of a night and return them."""
    folder = config.out / night
    folder.mkdir(parents=True, exist_ok=True)
    with Store(config.store) as store:
        page = render(store, records, cache=config.cache, expected_by=config.expected_by)
        summary = markdown(store, records, expected_by=config.expected_by)
    files = {
        "index.html": page,
        "summary.md": summary,
        "report.json": json.dumps(list(records), indent=1, allow_nan=False),
        "junit.xml": junit(records),
    }
    for name, text in files.items():
        temporary = folder / f"{name}.tmp"
        temporary.write_text(text)
        os.replace(temporary, folder / name)
    return [folder / name for name in files]


def code_of(records: Sequence[dict[str, Any]], *, strict: bool = False) -> int:
    """The exit code of all bundles together."""
    verdicts = [Verdict(row["verdict"]) for record in records for row in record["rows"] if not row["watched"]]
    verdicts += [Verdict.INCONCLUSIVE for record in records if any(row["drift"] for row in record["rows"])]
    verdicts += [Verdict.BROKEN for record in records if record["failures"]]
    return exit_code(verdicts, strict=strict)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.nightly", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="default: eval/nightly.yaml")
    parser.add_argument("--night", help="YYYY-MM-DD; default: today in UTC")
    parser.add_argument("--bundle", action="append", help="only this one of the configured bundles; give several")
    parser.add_argument("--samples", type=int, help="only the first N samples of every suite, for a quick look")
    parser.add_argument("--strict", action="store_true", help="end with 2 when a gate is inconclusive")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(arguments)
    try:
        config = _only(load_config(args.config), args.bundle)
        night = _night(args.night)
        if args.samples is not None and args.samples < 2:
            raise EvalError(f"--samples is {args.samples}; use 2 or more")
        records = run_night(config, night, samples=args.samples, quiet=args.quiet)
        files = publish(config, night, records)
    except (EvalError, OSError, sqlite3.Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    for record in records:
        print(f"{record['bundle']}: {record['verdict']} ({record['seconds']:.0f} s)")
        for failure in record["failures"]:
            print(f"  {failure}")
    github_summary(files[1].read_text())
    hook = os.environ.get("LEAPFROG_WEBHOOK") or config.webhook
    told = True
    for record in records:
        if hook and record["alert"]:
            sent = send(hook, record["alert"], files[0])
            told &= sent
            if sent:
                with Store(config.store) as store:
                    store.mark_alerted(night, record["bundle"])
    print("wrote " + ", ".join(str(path) for path in files))
    return code_of(records, strict=args.strict) or (0 if told else 3)


def _only(config: Config, names: Sequence[str] | None) -> Config:
    if not names:
        return config
    known = {watch.bundle.name: watch for watch in config.bundles}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise EvalError(f"--bundle is {unknown!r}; {nearest(unknown, known)}")
    return config.model_copy(update={"bundles": tuple(known[name] for name in dict.fromkeys(names))})


def _night(text: str | None) -> str:
    if text is None:
        return datetime.now(UTC).date().isoformat()
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise EvalError(f"--night is {text!r}; write a date such as 2026-11-23") from None


if __name__ == "__main__":
    raise SystemExit(main())
