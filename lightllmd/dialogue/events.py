"""What a model's output says, piece by piece. Each dialect translates these, and these alone."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Content(msgspec.Struct, frozen=True):
    """Text for the reader. Never empty."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """Text that the model wrote for itself. Never empty."""

    text: str


class CallBegun(msgspec.Struct, frozen=True):
    """A call of a tool; the next calls begin after it has ended."""

    index: int  # from 0, of the calls of one output
    id: str  # unique; drawn when the call begins, or the model's own
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """A piece of a call's arguments. Together they are the JSON text as the model wrote it. Never empty."""

    index: int
    text: str


class CallEnded(msgspec.Struct, frozen=True):
    """Nothing follows of this call."""

    index: int


Event = Content | Reasoning | CallBegun | CallArguments | CallEnded


def merged(events: Iterable[Event]) -> list[Event]:
    """Pieces of the same text put together, so that it plays no part how the output was cut."""
    runs: list[tuple[Event, list[str]]] = []
    for event in events:
        text = event.text if isinstance(event, Content | Reasoning | CallArguments) else None
        if text is not None and runs and type(runs[-1][0]) is type(event):
            runs[-1][1].append(text)
        else:
            runs.append((event, [] if text is None else [text]))
    return [_joined(event, parts) for event, parts in runs]


def _joined(event: Event, parts: list[str]) -> Event:
    return msgspec.structs.replace(event, text="".join(parts)) if len(parts) > 1 else event
