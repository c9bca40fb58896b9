"""Golden transcripts: what was sent and what came back, byte for byte but for what is drawn or measured.

``LIGHTLLMD_WRITE_TRANSCRIPTS=1`` writes them anew; the diff is then to be read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import httpx

FOLDER = Path(__file__).parent / "api" / "transcripts"
_HEADERS = ("content-type", "retry-after", "www-authenticate", "x-lightllmd-ignored")
_DRAWN = (
    (re.compile(r"\b(msg|resp|rs|fc|fco|chatcmpl|cmpl|toolu|call)_?-?[0-9a-f]{20,32}\b"), r"\1_ID"),
    (re.compile(r'("request_id": ?")[^"]+'), r"\1REQUEST"),
    (re.compile(r'("created": ?)\d+'), r"\1 0"),
    (re.compile(r'("created_at": ?")[^"]+'), r"\1TIME"),
    (re.compile(r'("(?:created|completed)_at": ?)\d+'), r"\1 0"),
)


def transcript(request: Any, answer: httpx.Response) -> str:
    """Of one exchange. `request`: its JSON body; None: it has none."""
    lines = [f"> {answer.request.method} {answer.request.url.raw_path.decode()}"]
    if request is not None:
        lines.append(f"> {json.dumps(request, ensure_ascii=False)}")
    lines.append(f"< {answer.status_code}")
    lines += [f"< {name}: {answer.headers[name]}" for name in _HEADERS if name in answer.headers]
    text = "\n".join([*lines, "", answer.text.rstrip("\n"), ""])
    for drawn, instead in _DRAWN:
        text = drawn.sub(instead, text)
    return text


def check(name: str, found: str) -> None:
    """`found` is what the file of that name (below tests/api/transcripts) has."""
    file = FOLDER / f"{name}.txt"
    if os.environ.get("LIGHTLLMD_WRITE_TRANSCRIPTS") == "1":
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(found)
    assert found == file.read_text(), f"{file} differs"
