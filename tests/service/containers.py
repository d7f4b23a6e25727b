"""Executes a Dockerfile without Docker: its instructions as they are written, on top of this machine's own files.

A stage is a directory laid over / with overlayfs in a mount namespace, so that what it writes stays in that directory;
the repository and /tmp are hidden from it. This machine and its Python stand in for the base image, which is the one
thing that is not what the Dockerfile says. Needs root and the right to mount; ``usable`` tells.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[2]
SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
KNOWN = frozenset({"FROM", "WORKDIR", "COPY", "RUN", "ENV", "ARG", "USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"})
IDLE = frozenset({"VOLUME", "EXPOSE", "STOPSIGNAL"})
"""Instructions that say what the outside may do."""
ENTER = r"""
set -e
mount -t overlay overlay -o "lowerdir=/,upperdir=$UPPER,workdir=$SCRATCH" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
mount --rbind /sys "$ROOT/sys"
mount -t tmpfs -o mode=1777 tmpfs "$ROOT/tmp"
if [ -d "$ROOT$HIDDEN" ]; then mount -t tmpfs tmpfs "$ROOT$HIDDEN"; fi
if [ -n "$ALONE" ]; then ip link set lo up; fi
exec chroot --userspec="$LOGIN" "$ROOT" "$@"
"""


def usable(folder: Path) -> str:
    """Why nothing can be executed here; empty if it can."""
    if os.geteuid() != 0:
        return "only root may mount"
    if any(shutil.which(tool) is None for tool in ("unshare", "chroot", "ip", "useradd")):
        return "unshare, chroot, ip or useradd is missing"
    tried = Stage(folder).run(["true"], check=False)
    return "" if tried.returncode == 0 else f"no overlay can be mounted: {tried.stderr.strip()[-200:]}"


@dataclass
class Stage:
    """One FROM with what follows: the files that it has written and what its instructions have set."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "root"
    said: dict[str, list[str]] = field(default_factory=dict)
    """ENTRYPOINT, CMD and HEALTHCHECK."""

    def __post_init__(self) -> None:
        for name in ("files", "scratch", "root"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "files").chmod(0o755)
        python = Path(sys.base_prefix)
        self.env = {"PATH": f"{python}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"} | self.env
        for parent in reversed((python, *python.parents)):
            self.at(str(parent)).mkdir(exist_ok=True)  # in the image everybody may use Python
            self.at(str(parent)).chmod(0o755)

    def at(self, path: str) -> Path:
        """Where a path of the stage lies, if the stage has written it."""
        return self.folder / "files" / str(PurePosixPath("/") / self.workdir / path).lstrip("/")

    def account(self) -> tuple[int, int, str]:
        """(uid, gid, home) of the user, who may exist in the stage alone."""
        own = self.at("/etc/passwd")
        lines = (own if own.exists() else Path("/etc/passwd")).read_text().splitlines()
        entry = next(line.split(":") for line in lines if line.startswith(f"{self.user}:"))
        return int(entry[2]), int(entry[3]), entry[5]

    def run(
        self, command: Sequence[str], more: Mapping[str, str] | None = None, *, alone: bool = False, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command as the stage's user, which ends with all that it started. alone: on a loopback of its own."""
        uid, gid, home = self.account()
        outside = os.environ | {
            "UPPER": str(self.folder / "files"),
            "SCRATCH": str(self.folder / "scratch"),
            "ROOT": str(self.folder / "root"),
            "HIDDEN": str(REPOSITORY),
            "ALONE": "yes" if alone else "",
            "LOGIN": f"{uid}:{gid}",
        }
        inside = [f"{name}={value}" for name, value in ({"HOME": home} | self.env | dict(more or {})).items()]
        spaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *(["--net"] if alone else [])]
        full = [*spaces, "sh", "-c", ENTER, "enter", "/usr/bin/env", "-i", "-C", self.workdir, *inside, *command]
        done = subprocess.run(full, env=outside, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 or not check, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done


Substitute = Callable[[Stage], None]


def build(
    dockerfile: str,
    context: Path,
    folder: Path,
    *,
    ignored: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    instead: Mapping[str, Substitute] | None = None,
) -> Stage:
    """The last stage of a Dockerfile.

    ignored: lines of its .dockerignore; env: of RUN, as ``docker build --build-arg`` gives it; instead: what to do in
    the place of a RUN with such words in it, each of which must occur.
    """
    stages: dict[str, Stage] = {}
    left = dict(instead or {})
    for word, rest in instructions(dockerfile):
        assert word in KNOWN | IDLE, f"{word} is not known here; teach tests/service/containers.py"
        if word == "FROM":
            name = rest.split(" AS ")[-1] if " AS " in rest else str(len(stages))
            stage = stages[name] = Stage(folder / name)
            continue
        if word != "RUN":
            rest = filled(rest, stage.env)
        if word == "WORKDIR":
            stage.workdir = str(PurePosixPath(stage.workdir) / rest)
            stage.at(".").mkdir(parents=True, exist_ok=True)
        elif word in ("ENV", "ARG"):
            stage.env |= dict(part.split("=", 1) for part in shlex.split(rest))
        elif word == "USER":
            stage.user = rest
        elif word == "COPY":
            copy(stage, rest, context, stages, ignored)
        elif word == "RUN":
            found = [words for words in left if words in rest]
            if found:
                left.pop(found[0])(stage)
            else:
                stage.run(["/bin/sh", "-c", rest], env)
        elif word not in IDLE:
            stage.said[word] = json.loads(rest[rest.index("[") :])
    assert not left, f"no RUN has {sorted(left)}"
    return stage


def filled(text: str, env: Mapping[str, str]) -> str:
    """Text with $NAME and ${NAME} put in."""
    return re.sub(r"\$\{?(\w+)\}?", lambda found: env.get(found[1], ""), text)


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    lines = (line for line in dockerfile.splitlines() if not line.lstrip().startswith("#"))
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            word, rest = line.strip().split(None, 1)
            yield word, rest


def copy(stage: Stage, rest: str, context: Path, stages: Mapping[str, Stage], ignored: Sequence[str]) -> None:
    words = rest.split()
    flags = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
    *sources, target = [word for word in words if not word.startswith("--")]
    assert flags.keys() <= {"from", "chown"}, flags
    for source in sources:
        begin = stages[flags["from"]].at(source) if "from" in flags else context / source
        assert begin.exists(), f"COPY {source}: it is not there"
        into = stage.at(target)
        if begin.is_file() and (target.endswith("/") or len(sources) > 1):
            into = into / begin.name
        into.parent.mkdir(parents=True, exist_ok=True)
        if begin.is_file():
            assert sent(PurePosixPath(source), ignored), f"COPY {source}: .dockerignore leaves it out"
            shutil.copy2(begin, into)
            continue

        def left_out(at: str, names: list[str]) -> list[str]:
            paths = {name: PurePosixPath((Path(at) / name).relative_to(context)) for name in names}
            return [name for name, path in paths.items() if not sent(path, ignored)]

        shutil.copytree(begin, into, symlinks=True, dirs_exist_ok=True, ignore=None if "from" in flags else left_out)
        if "chown" in flags:
            named = Stage(stage.folder, user=flags["chown"].split(":")[0])
            uid, gid, _ = named.account()
            for path in (into, *into.rglob("*")):
                os.chown(path, uid, gid, follow_symlinks=False)


def sent(path: PurePosixPath, ignored: Sequence[str]) -> bool:
    """Whether a path of the context is sent to the builder: the last line of .dockerignore about it decides."""
    decided = True
    for line in ignored:
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, str(part)) for part in (path, *path.parents)):
            decided = line.startswith("!")
    return decided


# --- packages --------------------------------------------------------------------------------------------------------


def closure(requirements: Iterable[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """Every package that these need, by name, as it is installed here, which must be in a version that will do."""
    found: dict[str, importlib.metadata.Distribution] = {}
    extras: dict[str, set[str]] = {}
    waiting = list(requirements)
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        found[name] = known = importlib.metadata.distribution(name)
        assert need.specifier.contains(known.version, prereleases=True), f"{need} and {known.version} is installed"
        new = ({""} | need.extras) - extras.setdefault(name, set())
        extras[name] |= new
        for extra in new:
            waiting += wanted(known, extra)
    return found


def wanted(package: importlib.metadata.Distribution, extra: str = "") -> list[Requirement]:
    """What a package needs on this machine, of an extra or besides all extras."""
    every = [Requirement(line) for line in package.requires or ()]
    plain = [need for need in every if need.marker is None or need.marker.evaluate({"extra": ""})]
    if not extra:
        return plain
    return [need for need in every if need not in plain and need.marker and need.marker.evaluate({"extra": extra})]


def pins() -> dict[str, str]:
    """What constraints.txt says."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pairs = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, _, version in pairs}


def lay(packages: Iterable[importlib.metadata.Distribution], stage: Stage, environment: str) -> None:
    """Put installed packages into an environment of a stage, as links where the file system allows.

    Links have no owner of their own: nothing may write into them, so that only users without rights may run afterwards.
    Of the programs that packages bring, only BentoML's.
    """
    for package in packages:
        for file in package.files or ():
            source = Path(str(file.locate()))
            if ".." not in file.parts and source.is_file():
                target = stage.at(environment) / SITE / file
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target)
                except OSError:  # on another file system
                    shutil.copy2(source, target)
    program = stage.at(environment) / "bin" / "bentoml"
    program.write_text(f"#!{environment}/bin/python\nfrom bentoml_cli.cli import cli\ncli()\n")
    program.chmod(0o755)
