"""What differs between two configurations, and what has to be replaced for it to take effect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from lightllmd.config.models import TABLE, place
from lightllmd.config.parameters import Config
from lightllmd.config.setting import Reload, by_key, fields, put


class Change(msgspec.Struct, frozen=True):
    """One difference. A model's table that came or went is one change, its absence None."""

    key: str  # "port", "http.workers", "models.NAME", "models.NAME.data_type"
    old: Any
    new: Any
    reload: Reload


def diff(old: Config, new: Config) -> list[Change]:
    """In the order of the declaration. Lines and comments of the file are no difference.

    The tables [models.NAME] are live by themselves: they say what a later swap would serve. What they mean for the
    model that serves now is a change of its parameters, so let both sides be as `models.with_model` makes them.
    """
    if old == new:  # a hundred times as fast as looking at each setting
        return []
    changed = [
        Change(field.key, field.of(old), field.of(new), field.setting.reload)
        for field in fields(Config)
        if field.of(old) != field.of(new)
    ]
    return [*changed, *_keys(old, new, {change.key for change in changed}), *_models(old, new)]


def _keys(old: Config, new: Config, known: set[str]) -> Iterator[Change]:
    """Files of the same name that hold other keys."""
    for setting, before, after in (
        ("http.api_keys_file", old.keys.requests, new.keys.requests),
        ("http.metrics_key", old.keys.metrics, new.keys.metrics),
    ):
        if before != after and setting not in known:
            was, now = ({key.sha256: key for key in keys or ()} for keys in (before, after))
            came, went = len(now.keys() - was.keys()), len(was.keys() - now.keys())
            other = sum(was[one] != now[one] for one in was.keys() & now.keys())
            counts = f"{came} new, {went} gone" + (f", {other} changed" if other else "")
            yield Change(
                setting, f"{len(was)} keys", f"{len(now)} keys ({counts})", by_key(Config)[setting].setting.reload
            )


def _models(old: Config, new: Config) -> Iterator[Change]:
    for name in dict.fromkeys([*old.models, *new.models]):
        before, after = old.models.get(name), new.models.get(name)
        if before is None or after is None:
            yield Change(f"{TABLE}.{name}", before, after, "live")
            continue
        for key in dict.fromkeys([*before, *after]):
            if before.get(key) != after.get(key):
                yield Change(place(name, key), before.get(key), after.get(key), "live")


def blend(old: Config, new: Config, changes: Iterable[Change]) -> Config:
    """`old` with those differences to `new` alone."""
    known = by_key(Config)
    for change in changes:
        if change.key in known:
            old = put(old, known[change.key].path, change.new)
        else:
            old = msgspec.structs.replace(old, models=new.models)
    return old
