"""What stays of a conversation that is too long."""

from __future__ import annotations

from lightllmd.requests.asked import Chat
from lightllmd.requests.shortening import without_oldest


def roles(*those: str) -> Chat:
    names = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
    return Chat([{"role": names[one[0]], "content": one} for one in those], {})


def left(chat: Chat, size: int) -> list[str] | None:
    shorter = without_oldest(chat, size)
    return None if shorter is None else [message["content"] for message in shorter.messages]


def test_the_oldest_go_and_what_stays_begins_with_a_user():
    chat = roles("s", "d", "u1", "a1", "u2", "a2", "t2", "a2", "u3", "a3", "t3")
    assert left(chat, 1) == left(chat, 4) == ["s", "d", "u2", "a2", "t2", "a2", "u3", "a3", "t3"]
    assert left(chat, 5) == left(chat, 12) == left(chat, 10**9) == ["s", "d", "u3", "a3", "t3"]
    assert left(roles("s", "d", "u3", "a3", "t3"), 1) is None
    assert left(roles("u1"), 1) is None
    assert left(roles("s1", "s2"), 1) is None
    assert left(roles("a1", "u1"), 1) == ["u1"]
    assert left(roles(), 1) is None
