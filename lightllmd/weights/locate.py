"""Where a model lies: a directory in Hugging Face layout, or a .gguf file. No torch."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from lightllmd.config.files import refusal
from lightllmd.errors import ConfigInvalid, Problem
from lightllmd.weights.model_files import present

PACKAGE_PREFIX = "package:"
_LONGEST_SHOWN = 200  # characters of a path in a message
GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def locate_model(model_dir: str) -> Path:
    """Resolves `model_dir` to a directory in Hugging Face layout or to a .gguf file, absolute.

    Accepts a directory, a .gguf file (of a split one the first part), a directory that holds exactly one .gguf, and
    ``package:NAME``: the folder of an installed Python package, which is found without importing it. Raises
    ConfigInvalid.
    """
    shown = _shown(model_dir)
    if model_dir.startswith(PACKAGE_PREFIX):
        root = _package_folder(model_dir.removeprefix(PACKAGE_PREFIX))
        return _find_inside(root, shown, deep=True)
    try:
        path = Path(model_dir).expanduser().absolute()
    except RuntimeError:  # "~user/…", or "~" where there is no home
        raise _invalid(f"{shown}: there is no user of that name, or it has no home directory") from None
    try:
        if path.is_dir():
            return _find_inside(path, shown, deep=False)
        path.stat()
    except (OSError, ValueError) as error:
        raise _invalid(f"{shown} {refusal(error)}") from None
    if path.suffix != ".gguf":
        raise _invalid(f"{shown} is neither a directory nor a .gguf file")
    return path


def _shown(model_dir: str) -> str:
    return repr(model_dir if len(model_dir) <= _LONGEST_SHOWN else f"{model_dir[: _LONGEST_SHOWN - 1]}…")


def _package_folder(name: str) -> Path:
    if len(name) > _LONGEST_SHOWN or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name, re.ASCII):
        raise _invalid(f"'package:{name[:_LONGEST_SHOWN]}' names no Python package")
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)  # of a top-level name: finds the file, executes nothing
    except ValueError:  # "__main__" has none
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise _invalid(f"package {top!r} is not installed (pip install --no-deps {top.replace('_', '-')})")
    for location in spec.submodule_search_locations:
        folder = Path(location, *rest)
        if folder.is_dir():
            return folder
    raise _invalid(f"package {top!r} has no folder {'/'.join(rest)!r}")


def _find_inside(root: Path, shown: str, *, deep: bool) -> Path:
    """The one model in `root`: the folder itself, a .gguf file in it or (`deep`) either of them further down."""
    folders = [root, *(path for path in sorted(root.rglob("*")) if path.is_dir())] if deep else [root]
    candidates: list[Path] = []
    for folder in folders:
        ggufs = [path for path in sorted(folder.glob("*.gguf")) if _is_first_part(path)]
        # A config.json beside .gguf files and no other weights only describes them.
        weights = any(any(folder.glob(f"*.{kind}")) for kind in ("safetensors", "bin", "pt"))
        if present(folder / "config.json") and (weights or not ggufs):
            candidates.append(folder)
            continue
        candidates += ggufs
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise _invalid(f"{shown} holds neither a config.json nor a .gguf file ({root})")
    names = ", ".join(str(path.relative_to(root)) for path in candidates[:6])
    raise _invalid(f"{shown} holds {len(candidates)} models, name one of them: {names}")


def _is_first_part(path: Path) -> bool:
    """Or no part of a split file."""
    match = GGUF_PART.fullmatch(path.name)
    return match is None or int(match[2]) == 1


def _invalid(message: str) -> ConfigInvalid:
    return ConfigInvalid([Problem("model_dir", message)])
