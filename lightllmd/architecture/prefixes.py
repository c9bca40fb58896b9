"""What the names of a checkpoint's tensors begin with. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

BASE = "model."  # of the names of a decoder's tensors beside its head, as families have them


@dataclass(frozen=True)
class Prefixes:
    """Of one checkpoint. A decoder by itself has `BASE` before all but its head."""

    base: str = BASE  # of the decoder
    head: str = ""  # of what it ends in
    tower: str = ""  # of a vision tower
    connector: str = ""  # of what else a vision model has

    def text(self, name: str) -> str:
        """The checkpoint's name of what a text family calls `name`."""
        return self.base + name.removeprefix(BASE) if name.startswith(BASE) else self.head + name


PLAIN = Prefixes()
UNPREFIXED = Prefixes(base="")  # names tensors as the decoder by itself does


@dataclass(frozen=True)
class PrefixChoices:
    """Those that the checkpoints of a family have, each by itself; the first ones where no file says which."""

    base: tuple[str, ...] = (BASE,)
    head: tuple[str, ...] = ("",)
    tower: tuple[str, ...] = ("",)
    connector: tuple[str, ...] = ("",)

    @property
    def usual(self) -> Prefixes:
        """The first ones."""
        return Prefixes(self.base[0], self.head[0], self.tower[0], self.connector[0])

    def of(self, stored: Collection[str], embed: str, head: str, tower: str, connector: str) -> Prefixes:
        """Those that the names in `stored` have. The others name one tensor of each kind, as it is without them."""
        embed = embed.removeprefix(BASE)
        return Prefixes(
            _first(self.base, embed, stored),
            _first(self.head, head, stored),
            _first(self.tower, tower, stored),
            _first(self.connector, connector, stored),
        )


def _first(prefixes: tuple[str, ...], name: str, stored: Collection[str]) -> str:
    return next((prefix for prefix in prefixes if prefix + name in stored), prefixes[0])
