"""GET /v1/models in Anthropic's form, for clients that say by `anthropic-version` that they speak it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import QueryParams
from starlette.routing import Match
from starlette.types import Scope

from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.errors import InvalidRequest, NotFound
from lightllmd.requests.faults import shown

VERSION_HEADER = b"anthropic-version"
_MOST = 1000  # models of a page
_USUAL = 20


class VersionedRoute(NamingRoute):
    """A route for requests with the header alone: others go on to the dialect that has the same path."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Starlette's."""
        if scope["type"] != "http" or all(name != VERSION_HEADER for name, _ in scope["headers"]):
            return Match.NONE, {}
        return super().matches(scope)


class ModelList:
    """The served model first, then those that could be swapped in."""

    def __init__(self, revisions: Revisions) -> None:
        self._revisions = revisions
        self._started = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    def _infos(self) -> dict[str, dict[str, Any]]:
        revision = self._revisions.current
        limits = revision.limits
        served = {"max_input_tokens": limits.max_req_input_len, "max_tokens": limits.max_req_total_len}
        infos = {revision.model_name: self._info(revision.model_name) | served}
        return infos | {name: self._info(name) for name in self._revisions.others()}

    def _info(self, name: str) -> dict[str, Any]:
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": self._started,
            "lifecycle": "active",
        }

    def one(self, name: str) -> dict[str, Any]:
        """Raises NotFound."""
        infos = self._infos()
        if name not in infos:
            raise NotFound(f"model: {shown(name)} is not one of {', '.join(infos)}", param="model")
        return infos[name]

    def page(self, query: QueryParams) -> dict[str, Any]:
        """As `limit`, and `after_id` or `before_id` say. Raises InvalidRequest."""
        infos = list(self._infos().values())
        limit = _limit(query.get("limit"))
        first, end = 0, len(infos)
        for name in ("after_id", "before_id"):
            if (given := query.get(name)) is None:
                continue
            at = next((index for index, info in enumerate(infos) if info["id"] == given), None)
            if at is None:
                raise InvalidRequest(f"{name}: {shown(given)} is no model's name", param=name)
            first, end = (at + 1, end) if name == "after_id" else (first, at)
        backwards = "before_id" in query and "after_id" not in query
        data = infos[first:end][-limit:] if backwards else infos[first:end][:limit]
        return {
            "data": data,
            "has_more": len(data) < end - first,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }


def _limit(given: str | None) -> int:
    if given is None:
        return _USUAL
    if not (len(given) <= 4 and given.isascii() and given.isdecimal() and 1 <= int(given) <= _MOST):
        raise InvalidRequest(f"limit: should be 1 … {_MOST}; got {shown(given)}", param="limit")
    return int(given)
