"""What a code host can be asked, by name. A task gets the checkpoint's folder and the order's arguments; its result is
plain data. Where it is a pair, the second is a function of the link and the guard's pid: what the host does from then
on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from lightllmd.code_host.classes import class_of

HostTask = Callable[..., Any]


def config(directory: str, reference: str) -> dict[str, Any]:
    """The settings that the checkpoint's own class makes of its config.json."""
    made = class_of(directory, reference).from_pretrained(directory, trust_remote_code=True, local_files_only=True)
    return _plain(made.to_dict())


def _plain(value: Any) -> Any:
    """As JSON would have it; of anything else the text."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, bool | float | str):
        return value
    return int(value) if isinstance(value, int) else str(value).removeprefix("torch.")


def outline(directory: str, trust: bool, weights: bool) -> Any:
    """An `architecture.outline.Outlined` of what transformers makes of the checkpoint's config. `trust`: by its own
    code, too. `weights`: its files have to hold them."""
    from lightllmd.models.hf.dry_run import outlined

    return msgspec.to_builtins(outlined(directory, trust, weights=weights))


def tokenizer(directory: str, reference: str, limits: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """See `code_host.tokenizer.serve`."""
    from lightllmd.code_host.tokenizer import serve

    return serve(directory, reference, limits)


TASKS: dict[str, HostTask] = {"config": config, "outline": outline, "tokenizer": tokenizer}
