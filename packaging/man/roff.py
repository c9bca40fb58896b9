"""Writes man(7) macros: text that comes out as it went in, whatever roff would make of it."""

from __future__ import annotations

import re
from collections.abc import Iterable


def escape(text: str) -> str:
    """Plain text. What is not ASCII becomes roff's name for it, so that the page needs no preprocessor."""
    text = (
        text.replace("\\", "\\e")
        .replace("'", "\\(aq")
        .replace("`", "\\(ga")
        .replace("^", "\\(ha")
        .replace("~", "\\(ti")
    )
    return re.sub(r"[^\x00-\x7f]", lambda found: f"\\[u{ord(found[0]):04X}]", text)


def literal(text: str) -> str:
    """What is typed as it stands: hyphens are minus signs, so that it can be copied out of the page."""
    return escape(text).replace("-", "\\-")


def bold(text: str) -> str:
    return f"\\fB{literal(text)}\\fR"


def italic(text: str) -> str:
    return f"\\fI{literal(text)}\\fR"


def prose(text: str) -> str:
    """One paragraph: `backquoted` words are literal, name(8) is a page; a sentence a line, as man(7) asks for."""
    parts = re.split(r"(`[^`]+`|\b[a-z][a-z.]+\([1-8]\))", " ".join(text.split()))
    shown = "".join(_part(part) for part in parts)
    return re.sub(r"(?<=[a-z0-9)\]R][.!?]) (?=[A-Z\\(])", "\n", shown)


def _part(part: str) -> str:
    if part.startswith("`") and len(part) > 2:
        return bold(part[1:-1])
    if page := re.fullmatch(r"([a-z.]+)(\([1-8]\))", part):
        return bold(page[1]) + page[2]
    # a flag in the text is typed as it stands, too
    return re.sub(r"(?<![\w-])--?[a-z]", lambda found: found[0].replace("-", "\\-"), escape(part))


class Page:
    """One manual page, from its heading downwards."""

    def __init__(self, name: str, section: int, date: str, source: str, manual: str) -> None:
        self._lines = [f'.TH "{name.upper()}" "{section}" "{date}" "{source}" "{manual}"', ".nh", ".ad l"]
        self._opened = True  # nothing stands between the heading and what comes: no paragraph macro is needed

    def section(self, title: str) -> None:
        self._heading(".SH", title)

    def subsection(self, title: str) -> None:
        self._heading(".SS", title)

    def paragraph(self, roff: str) -> None:
        """`roff` is made by `prose`, `bold`, …"""
        if not self._opened:
            self._lines.append(".PP")
        self._add(roff)

    def item(self, tag: str, *paragraphs: str) -> None:
        """A hanging paragraph. Arguments are roff."""
        self._lines.append(".TP")
        self._add(tag)
        for number, one in enumerate(paragraphs):
            if number:
                self._lines.append(".IP")
            self._add(one)

    def items(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Hanging paragraphs: literal tag -> text."""
        for tag, text in pairs:
            self.item(bold(tag), prose(text))

    def code(self, text: str) -> None:
        if not self._opened:
            self._lines.append(".PP")
        self._lines += [".in +4n", ".nf"]
        self._add(literal(text.strip("\n")))
        self._lines += [".fi", ".in"]

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def _heading(self, macro: str, title: str) -> None:
        self._lines.append(f'{macro} "{escape(title)}"')
        self._opened = True

    def _add(self, roff: str) -> None:
        # a full stop at the beginning of a line would be a macro's
        self._lines += [f"\\&{line}" if line.startswith(".") else line for line in roff.split("\n")]
        self._opened = False
