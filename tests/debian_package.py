"""The Debian package, built from the checkout; and wheels to build it with that need no network."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[1]
BUILD = CHECKOUT / "packaging" / "deb" / "build.sh"


def build(folder: Path, *words: object, **environment: str) -> Path:
    """The package, in `folder`. `words`: of the build script. AssertionError with what it said if it fails."""
    done = run_build(folder, *words, **environment)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def run_build(folder: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(BUILD), "--output", str(folder), *map(str, words)],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def control(package: Path) -> dict[str, str]:
    """The fields of the package's control file that take one line."""
    text = subprocess.run(["dpkg-deb", "--field", str(package)], capture_output=True, text=True, check=True).stdout
    return dict(line.split(": ", 1) for line in text.splitlines() if not line.startswith(" "))


# --- wheels ---------------------------------------------------------------------------------------------------------


def needed() -> Iterator[Requirement]:
    """What lightllmd itself asks for."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    yield from map(Requirement, project["dependencies"])


def stand_in_wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any") -> None:
    """An empty distribution that needs nothing."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", ""]
    _write_wheel(folder, name, version, tag, {_info(name, version, "METADATA"): "\n".join(lines).encode()})


def pack_wheels(folder: Path, stand_ins: Iterable[str]) -> None:
    """All that lightllmd needs, as it is installed here, packed into wheels again; `stand_ins` come out empty."""
    empty = {canonicalize_name(name) for name in stand_ins}
    packed: set[str] = set()
    waiting = list(needed())
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name in packed:
            continue
        packed.add(name)
        distribution = importlib.metadata.distribution(name)
        if name in empty:
            stand_in_wheel(folder, name, distribution.version)
            continue
        _pack(folder, distribution)
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement)


def _pack(folder: Path, distribution: importlib.metadata.Distribution) -> None:
    name, version = distribution.metadata["Name"], distribution.version
    tag = re.search(r"^Tag: (\S+)$", distribution.read_text("WHEEL") or "", re.MULTILINE)[1]
    content = {  # without their own tests, which each installation would compile
        str(file): file.locate().read_bytes()
        for file in distribution.files or ()
        if not {"..", "__pycache__", "tests"} & set(file.parts)
    }
    left_out = ("RECORD", "WHEEL", "INSTALLER", "REQUESTED", "direct_url.json")
    kept = {
        path: body for path, body in content.items() if not path.endswith(tuple(f".dist-info/{x}" for x in left_out))
    }
    old = next(path.partition("/")[0] for path in kept if ".dist-info/" in path)
    _write_wheel(folder, name, version, tag, kept, old)


def _info(name: str, version: str, file: str) -> str:
    return f"{re.sub('[-_.]+', '_', name)}-{version}.dist-info/{file}"


def _write_wheel(
    folder: Path, name: str, version: str, tag: str, content: Mapping[str, bytes], info: str | None = None
) -> None:
    info = info or _info(name, version, "").rstrip("/")
    record = f"{info}/RECORD"
    wheel = f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: false\nTag: {tag}\n"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{re.sub('[-_.]+', '_', name)}-{version}-{tag}.whl", "w") as archive:
        for path, body in {**content, f"{info}/WHEEL": wheel.encode()}.items():
            archive.writestr(path, body)
        archive.writestr(record, "".join(f"{path},,\n" for path in [*content, f"{info}/WHEEL", record]))
