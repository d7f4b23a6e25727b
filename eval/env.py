"""Interpreters of their own for packages that cannot live beside ours.

    python -m eval.env create vbench     # a virtual environment with what eval/environments/vbench.yaml pins
    python -m eval.env list
    python -m eval.env remove vbench

They lie in ~/.cache/leapfrog/environments, or where LEAPFROG_ENVIRONMENTS says. An environment sees torch and
torchvision of the interpreter that made it; what its recipe pins comes before that interpreter's packages, and nothing
is installed into the latter. Exit codes: 0 done, 3 it could not be made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval.errors import EvalError, first_fault, nearest

RECIPES = Path(__file__).parent / "environments"
_STAMP = "leapfrog.json"


class Recipe(BaseModel):
    """A file in eval/environments. requirements: pinned and complete, nothing else is installed.

    python: the minor version that the pins have wheels for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    python: str = Field(pattern=r"^3\.\d+$")
    requirements: tuple[str, ...] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """Of what decides an environment: the pins, and the interpreter whose torch it sees."""
        return hashlib.sha256(json.dumps([self.requirements, _ours()]).encode()).hexdigest()


def _ours() -> str:
    return sysconfig.get_path("purelib")


def recipe_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in RECIPES.glob("*.yaml")))


def load_recipe(name: str) -> Recipe:
    """Raises EvalError for an unknown name or a faulty file."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise EvalError(f"environment {name!r} is unknown; {nearest(name, recipe_names())}")
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        raise EvalError(f"{path}: {first_fault(error, Recipe)}") from None


def home() -> Path:
    """Where environments lie."""
    given = os.environ.get("LEAPFROG_ENVIRONMENTS")
    return Path(given) if given else Path.home() / ".cache" / "leapfrog" / "environments"


def state(name: str) -> str:
    """ready, stale (made by other pins or for another interpreter), broken (not made to its end) or absent."""
    folder = home() / name
    if not folder.is_dir():
        return "absent"
    stamp = _stamp(folder)
    if not stamp or not _python(folder).exists():
        return "broken"
    return "ready" if stamp["digest"] == load_recipe(name).digest else "stale"


def interpreter(name: str) -> Path:
    """The python of an environment that is ready. Raises EvalError with the command that makes it."""
    found = state(name)
    if found != "ready":
        raise EvalError(f"the environment {name} is {found}; run: python -m eval.env create {name}")
    return _python(home() / name)


def create(name: str) -> Path:
    """Make the environment anew and return its folder. The stamp is written last, so half of one is never used."""
    recipe = load_recipe(name)
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running != recipe.python:
        raise EvalError(
            f"{name} has wheels for Python {recipe.python} and this is {running}; run it with python{recipe.python}"
        )
    folder = home() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "leapfrog.pth").write_text(_ours() + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(_python(folder)), "install", "--no-deps", "--quiet"]
    done = subprocess.run([*command, *recipe.requirements], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise EvalError(f"{name} could not be installed into {folder}: {reason}; see that the index can be reached")
    stamp = {"digest": recipe.digest, "requirements": recipe.requirements, "sees": _ours()}
    (folder / _STAMP).write_text(json.dumps(stamp, indent=1))
    return folder


def remove(name: str) -> bool:
    """Delete an environment; False when there was none."""
    load_recipe(name)
    there = (home() / name).is_dir()
    shutil.rmtree(home() / name, ignore_errors=True)
    return there


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _stamp(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / _STAMP).read_text()))
    except (OSError, ValueError):
        return {}


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.env", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for verb, what in (("create", "make it, anew if it is there"), ("remove", "delete it")):
        commands.add_parser(verb, help=what).add_argument("name", help=f"one of {', '.join(recipe_names())}")
    commands.add_parser("list", help="what there is")
    args = parser.parse_args(arguments)
    try:
        if args.command == "create":
            print(f"installing {len(load_recipe(args.name).requirements)} packages into {home() / args.name}")
            print(f"wrote {create(args.name)}")
        elif args.command == "remove":
            print(f"removed {home() / args.name}" if remove(args.name) else f"there was no {home() / args.name}")
        else:
            for name in recipe_names():
                folder, found = home() / name, state(name)
                size = "" if found == "absent" else f", {_size(folder) / 2**20:.0f} MiB in {folder}"
                print(f"{found:7} {name:10} {load_recipe(name).description}{size}")
    except (EvalError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
