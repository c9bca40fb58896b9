"""The files of the page, as the package brings them along; read once, and cached by browsers by what they hold."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import PurePosixPath

from starlette.responses import Response

TEMPLATE = "page.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_YEAR = 31_536_000  # seconds; the most that a cache heeds

# Of every answer here. Scripts and styles are files of ours alone; nothing can be put into the document as HTML.
# Cross-Origin-Opener-Policy is not among them: over plain HTTP browsers ignore it, and complain of that.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class PageFiles:
    """All of them, in memory: a few ten kB."""

    def __init__(self) -> None:
        folder = resources.files(__package__) / "static"
        held = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        self.template = held.pop(TEMPLATE).decode()
        self._held = {name: body for name, body in held.items() if PurePosixPath(name).suffix in _TYPES}
        # Of all files together, since scripts import each other: those of two versions never meet.
        self.tag = hashlib.sha256(repr(sorted(held.items())).encode()).hexdigest()[:16]

    @property
    def names(self) -> list[str]:
        """Of what `answer` knows."""
        return sorted(self._held)

    def answer(self, tag: str, name: str, if_none_match: str) -> Response | None:
        """The file, or that the browser has it; None: there is none of that name. Under another tag, which an older
        page asks by, it is not kept."""
        body = self._held.get(name)
        if body is None:
            return None
        etag = f'"{self.tag}"'
        caching = f"public, max-age={_YEAR}, immutable" if tag == self.tag else "no-cache"
        headers = HEADERS | {"ETag": etag, "Cache-Control": caching}
        if any(known.strip().removeprefix("W/") in (etag, "*") for known in if_none_match.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=_TYPES[PurePosixPath(name).suffix])
