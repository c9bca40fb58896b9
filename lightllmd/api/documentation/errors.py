"""The one table of errors: each class that a client may be told of, and how each dialect tells it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightllmd.api.dialects.dialect import Dialect
from lightllmd.api.web.errors import ErrorShape
from lightllmd.errors import RequestError

SAMPLE = "…"  # stands for the message
_ROOMS = ("lightllmd.errors", "lightllmd.api.")  # others' never reach a client as they are


@dataclass(frozen=True)
class Told:
    """An error as one dialect has it."""

    status: int
    words: tuple[str, ...]  # what tells it from other errors, beside the message


@dataclass(frozen=True)
class ErrorRow:
    """A class of errors. `told`: by the name of the dialect."""

    kind: type[RequestError]
    told: Mapping[str, Told]

    @property
    def meaning(self) -> str:
        """The first sentence of its docstring."""
        first, _, _ = " ".join((self.kind.__doc__ or "").split()).partition(". ")
        return first.rstrip(".")


def client_errors() -> list[type[RequestError]]:
    """All classes, by status. What is only a base of others is none."""
    found = {kind for kind in _below(RequestError) if kind.__module__.startswith(_ROOMS)}
    return sorted(found, key=lambda kind: (kind.status, kind.__name__))


def _below(kind: type[RequestError]) -> Iterator[type[RequestError]]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)


def forms(dialects: Sequence[Dialect]) -> dict[str, ErrorShape]:
    """How errors are told, by the name of the first dialect that tells them so."""
    shapes: dict[ErrorShape, str] = {}
    for dialect in dialects:
        shapes.setdefault(dialect.errors, dialect.name)
    return {name: shape for shape, name in shapes.items()}


def error_rows(dialects: Sequence[Dialect]) -> list[ErrorRow]:
    """One for each class."""
    shapes, kinds = forms(dialects), client_errors()
    leaves = {name: {kind: _leaves(sample(shape, kind)) for kind in kinds} for name, shape in shapes.items()}
    common = {name: frozenset.intersection(*map(frozenset, by_kind.values())) for name, by_kind in leaves.items()}
    return [
        ErrorRow(
            kind,
            {
                name: Told(
                    shape.status(kind(SAMPLE)), tuple(one for one in leaves[name][kind] if one not in common[name])
                )
                for name, shape in shapes.items()
            },
        )
        for kind in kinds
    ]


def sample(shape: ErrorShape, kind: type[RequestError]) -> dict[str, Any]:
    """A body."""
    body = shape.body(kind(SAMPLE))
    return body | {"request_id": SAMPLE} if shape.names_request else body


def _leaves(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in _leaves(inner)]
    return [] if value is None or SAMPLE in str(value) else [str(value)]


def errors_markdown(dialects: Sequence[Dialect]) -> str:
    """As a README has it. A status is told where the dialect has another."""
    rows = error_rows(dialects)
    names = [name for name in rows[0].told if any(row.told[name].words or _differs(row, name) for row in rows)]
    lines = [f"| error | status | when | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(names)]
    for row in rows:
        cells = [
            " ".join([*([str(row.told[name].status)] if _differs(row, name) else []), *row.told[name].words])
            for name in names
        ]
        lines.append(f"| {row.kind.__name__} | {row.kind.status} | {row.meaning} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _differs(row: ErrorRow, name: str) -> bool:
    return row.told[name].status != row.kind.status
