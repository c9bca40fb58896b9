"""Where compiled kernels are kept from one start to the next. Imports neither torch nor triton: it comes before them.

The folder carries the versions of both and the card's name, so that an update starts with an empty one.
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

VARIABLE = "TRITON_CACHE_DIR"

log = logging.getLogger(__name__)


def settle(plan: Plan) -> None:
    """Before the first import of triton. Leaves alone what the environment says, and a plan that needs no kernels."""
    if plan.device.kind != "cuda" or plan.config.engine.backend == "fake" or os.environ.get(VARIABLE):
        return
    root = cache_root(os.environ)
    folder = None if root is None else root / "kernels" / key(plan.device.name)
    try:
        if folder is None:
            raise OSError("there is no home directory")
        _prepare(folder)
    except OSError as refused:
        folder = Path(tempfile.mkdtemp(prefix="lightllmd-kernels-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        log.warning("compiled kernels can't be kept, the next start compiles them again: %s", refused)
    os.environ[VARIABLE] = str(folder)


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
