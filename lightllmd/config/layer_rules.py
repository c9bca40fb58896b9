"""How weights of single layers and roles are stored, as a file writes it: ``down attention_out 4-7 30: w8a16``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lightllmd.architecture.schemes import SCHEMES, Scheme, scheme_of
from lightllmd.architecture.weight_schemes import SchemeRule
from lightllmd.architecture.weights import Role
from lightllmd.config.modes import GROUP, GROUPS, group_fault
from lightllmd.errors import show

ROLES: tuple[Role, ...] = ("qkv", "attention_out", "gate_up", "down")
FORM = (
    "WHERE: SCHEME; WHERE is all, or names of matrices "
    f"({', '.join(ROLES)}) and layers (such as 3 or 0-7) with spaces or commas between, and SCHEME one of "
    f"{', '.join(SCHEMES)}, a w4a16 with gN behind it where its groups are of another size"
)
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_BETWEEN = re.compile(r"[,\s]+")


class NoRule(ValueError):
    """A text that is no rule, or no layers, says why."""


@dataclass(frozen=True)
class Layers:
    """Ranges of layers, the first and the last one of each; none: all layers."""

    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def largest(self) -> int:
        """-1 where none is named."""
        return max((last for _, last in self.ranges), default=-1)

    def numbers(self) -> tuple[int, ...]:
        """Each once, in order. Ask for them only where `largest` is a layer's."""
        return tuple(sorted({layer for first, last in self.ranges for layer in range(first, last + 1)}))


@dataclass(frozen=True)
class LayerRule:
    """What a rule says, of whatever model."""

    layers: Layers
    roles: tuple[Role, ...]  # empty: all
    scheme: Scheme

    def of_layers(self) -> SchemeRule:
        """For a model that has them."""
        return SchemeRule(self.scheme, self.roles, self.layers.numbers())


def rule(text: str) -> LayerRule:
    """Raises NoRule."""
    where, colon, how = text.partition(":")
    places, chosen = _words(where), _words(how)
    if not (colon and places and chosen):
        raise NoRule(f"{show(text)} is not of the form {FORM}")
    roles: list[Role] = []
    ranges: list[tuple[int, int]] = []
    for word in places:
        if word == "all" and len(places) == 1:
            continue
        if role := next((role for role in ROLES if role == word), None):
            roles.append(role)
        elif match := _RANGE.fullmatch(word):
            ranges.append(_range(match, text))
        else:
            raise NoRule(
                f"{show(text)}: {show(word)} is no matrix ({', '.join(ROLES)}) and no layer (such as 3 or 0-7)"
            )
    return LayerRule(Layers(tuple(ranges)), tuple(dict.fromkeys(roles)), _scheme(chosen, text))


def layers(text: str) -> Layers:
    """Of a list such as ``0-3, 7``. Raises NoRule."""
    matches = [(word, _RANGE.fullmatch(word)) for word in _words(text)]
    for word, match in matches:
        if match is None:
            raise NoRule(f"{show(text)}: {show(word)} is no layer; layers are written such as 3 or 0-7")
    return Layers(tuple(_range(match, text) for _, match in matches if match))


def _words(text: str) -> list[str]:
    return [word for word in _BETWEEN.split(text) if word]


def _range(match: re.Match[str], text: str) -> tuple[int, int]:
    first, last = int(match[1]), int(match[2] or match[1])
    if first > last:
        raise NoRule(f"{show(text)}: {match[0]} ends before it begins")
    return first, last


def _scheme(words: Iterable[str], text: str) -> Scheme:
    name, *rest = words
    if name not in SCHEMES:
        raise NoRule(f"{show(text)}: {show(name)} is no scheme; known: {', '.join(SCHEMES)}")
    if not rest:
        return scheme_of(name)
    group = GROUP.fullmatch(rest[0])
    if group is None or len(rest) > 1:
        raise NoRule(f"{show(text)}: behind a scheme stands gN or nothing")
    if SCHEMES[name].values != "uint4":
        raise NoRule(f"{show(text)}: {name} has no groups whose size may be chosen")
    if int(group[1]) not in GROUPS:
        raise NoRule(f"{show(text)}: {group_fault()}")
    return scheme_of(name, int(group[1]))
