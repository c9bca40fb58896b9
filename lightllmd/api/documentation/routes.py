"""The one table of routes and fields: what works, what is accepted without effect, what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightllmd.api.dialects.dialect import Dialect
from lightllmd.api.web.bodies import body_name
from lightllmd.requests.faults import fields_of
from lightllmd.requests.fields import Body

_OWN_BODY = "parameters"  # of some bodies, with most of their fields


@dataclass(frozen=True)
class DocumentedRoute:
    """One method of one path."""

    path: str
    method: str
    operation: dict[str, Any]
    dialect: Dialect | None  # that its errors are told in, as `ErrorAnswers` chooses it
    body: type[Body] | None


@dataclass
class FieldsRow:
    """A body, and the paths that take it."""

    body: type[Body]
    api: str  # the dialect's name
    paths: list[str] = field(default_factory=list)

    @property
    def works(self) -> list[str]:
        """Names of fields; those of an object `parameters` with it before them."""
        return list(_fields(self.body, lambda model: model.fields_that_work()))

    @property
    def ignored(self) -> list[str]:
        """Accepted without effect."""
        return sorted(_fields(self.body, lambda model: model.without_effect.difference(fields_of(model))))

    @property
    def refused(self) -> list[str]:
        """Refused by name, unless their value asks for nothing."""
        return sorted(
            _fields(
                self.body,
                lambda model: [
                    name for name, one in model.refused.items() if one.inherited or name not in fields_of(model)
                ],
            )
        )


def _fields(body: type[Body], names: Any) -> Iterator[str]:
    inner = fields_of(body).get(_OWN_BODY)
    nested = inner.annotation if inner is not None else None
    if isinstance(nested, type) and issubclass(nested, Body):
        yield from (name for name in names(body) if name != _OWN_BODY)
        yield from (f"{_OWN_BODY}.{name}" for name in names(nested))
    else:
        yield from names(body)


def routes_of(paths: Mapping[str, Mapping[str, Any]], dialects: Sequence[Dialect]) -> list[DocumentedRoute]:
    """`paths` of an OpenAPI document."""
    bodies = {body.__name__: body for dialect in dialects for body in dialect.bodies}
    beginnings = [(path, dialect) for dialect in dialects for path in dialect.paths if path != "/"]
    whole: list[tuple[str, Dialect | None]] = [("/", dialect) for dialect in dialects if "/" in dialect.paths]
    found = []
    for path, operations in paths.items():
        fitting = sorted((one for one in beginnings if path.startswith(one[0])), key=lambda one: -len(one[0]))
        _, dialect = (fitting or whole or [("/", None)])[0]
        for method, operation in operations.items():
            named = body_name(operation)
            body = bodies.get(named) if named is not None else None
            found.append(DocumentedRoute(path, method, operation, dialect, body))
    return found


def field_rows(routes: Sequence[DocumentedRoute]) -> list[FieldsRow]:
    """One for each body, in the order of the routes."""
    rows: dict[type[Body], FieldsRow] = {}
    for one in routes:
        if one.body is not None:
            row = rows.setdefault(one.body, FieldsRow(one.body, one.dialect.name if one.dialect is not None else ""))
            if one.path not in row.paths:
                row.paths.append(one.path)
    return list(rows.values())


def fields_markdown(rows: Sequence[FieldsRow]) -> str:
    """As a README has it."""
    lines = ["| API | routes | works | without effect | refused |", "|---|---|---|---|---|"]
    for row in rows:
        paths = ", ".join(f"`{path}`" for path in row.paths)
        cells = [_listed(names) for names in (row.works, row.ignored, row.refused)]
        lines.append(f"| {row.api} | {paths} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    """Those of an inner body behind its name."""
    own = [name for name in names if not name.startswith(f"{_OWN_BODY}.")]
    inner = [name.removeprefix(f"{_OWN_BODY}.") for name in names if name.startswith(f"{_OWN_BODY}.")]
    return "; ".join([*([", ".join(own)] if own else []), *([f"`{_OWN_BODY}`: {', '.join(inner)}"] if inner else [])])
