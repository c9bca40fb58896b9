"""Where libraries keep from one start to the next what they make: compiled kernels, and transformers its copies of a
checkpoint's own modules. Imports none of them: it comes before them.

The folder of kernels carries the versions of triton and torch and the card's name, so that an update starts with an
empty one.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from lightllmd.config.plan import Plan

VARIABLE, MODULES = "TRITON_CACHE_DIR", "HF_MODULES_CACHE"

log = logging.getLogger(__name__)


def settle(plan: Plan) -> None:
    """Before the first import of triton. Leaves alone what the environment says, and a plan that needs no kernels."""
    if plan.device.kind == "cuda" and plan.config.engine.backend != "fake":
        _settle(VARIABLE, "kernels", key(plan.device.name))


def settle_modules() -> None:
    """Before the first import of transformers, which fetches nothing from then on. Leaves alone what the environment
    says."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _settle(MODULES, "modules")


def _settle(variable: str, *place: str) -> None:
    if os.environ.get(variable):
        return
    root = cache_root(os.environ)
    folder = None if root is None else root.joinpath(*place)
    try:
        if folder is None:
            raise OSError("there is no home directory")
        _prepare(folder)
    except OSError as refused:
        folder = Path(tempfile.mkdtemp(prefix=f"lightllmd-{place[0]}-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        log.warning("%s can't be kept, the next start makes them again: %s", place[0], refused)
    os.environ[variable] = str(folder)


def cache_root(environment: Mapping[str, str]) -> Path | None:
    """The program's cache directory: systemd's, else the user's. None where neither is known."""
    given = environment.get("CACHE_DIRECTORY", "").split(":")[0]
    if os.path.isabs(given):
        return Path(given)
    user = environment.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(user):  # the XDG specification: relative paths are to be ignored
        user = os.path.expanduser("~/.cache")
    return Path(user, "lightllmd") if os.path.isabs(user) else None


def key(card: str) -> str:
    """The name of the folder, such as ``3.6.0-2.11.0+cu130-nvidia-h100-80gb-hbm3``."""
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return "-".join([_version("triton"), _version("torch"), slug])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _prepare(folder: Path) -> None:
    """Makes it, closed to others, and tries to write. Raises OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
