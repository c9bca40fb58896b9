"""What children print, on its way to ring, terminal and journal: tagged, bounded, readable, with its priority."""

from __future__ import annotations

import pytest

from lightllmd.supervisor.journal.logs import LONGEST, EventBook, LogBook, Sink, parse_output, renderer, text_line
from lightllmd.supervisor.journal.output import BURST, LAST_LINES, LINE_COST, LONGEST_LINE, RATE, OutputLines


def said(*chunks: bytes, at: float = 0.0) -> list[str]:
    lines: list[str] = []
    output = OutputLines(lines.append)
    for chunk in chunks:
        output.feed(chunk, at)
    output.end()
    return lines


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"one\ntwo\nthr", b"ee\nlast"], ["one", "two", "three", "last"]),
        ([b"from windows\r\n\n"], ["from windows", ""]),
        ([b"\x1b[31mred\x1b[0m \x00 50%\r100%\n"], [r"\x1b[31mred\x1b[0m \x00 50%\r100%"]),
        ([b"\xff\xfe caf\xc3", b"\xa9\ttab\n"], ["�� café\ttab"]),
        (["next\u2028line\u0085\n".encode()], [r"next\u2028line\x85"]),
    ],
)
def test_lines_are_whole_and_readable_whatever_bytes_come(chunks: list[bytes], lines: list[str]) -> None:
    assert said(*chunks) == lines


def test_a_traceback_is_an_error_up_to_the_next_line_with_a_priority() -> None:
    traceback = b'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: no\nof two lines\n'
    lines = [parse_output(line) for line in said(b"hello\n" + traceback + b"<6>going on\nplain\n")]
    assert [level for level, _ in lines] == ["info", *["error"] * 4, "info", "info"]
    assert lines[4] == ("error", "of two lines")


def test_the_stacks_of_faulthandler_are_errors() -> None:
    stacks = b'Fatal Python error: Aborted\n\nThread 0x00007f (most recent call first):\n  File "x.py", line 1 in f\n'
    assert {parse_output(line)[0] for line in said(b"<6>begins\n" + stacks)[1:]} == {"error"}


def test_a_very_long_line_comes_in_pieces_with_its_priority_and_no_character_cut() -> None:
    text = "é" * 20_000
    pieces = said(b"<3>" + text.encode() + b"\n", b"after\n")
    assert pieces.pop() == "after"
    assert len(pieces) == 5
    assert all(len(piece.encode()) <= LONGEST_LINE for piece in pieces)
    assert [parse_output(piece)[0] for piece in pieces] == ["error"] * 5
    assert "".join(parse_output(piece)[1] for piece in pieces) == text


def test_a_line_without_end_is_held_only_up_to_its_bound() -> None:
    lines: list[str] = []
    output = OutputLines(lines.append)
    for _ in range(4):
        output.feed(b"x" * LONGEST_LINE, 0.0)
    assert len(lines) >= 3


def test_a_flood_is_thinned_and_said_and_its_last_lines_are_kept() -> None:
    lines: list[str] = []
    output = OutputLines(lines.append)
    number, seconds = 0, 10
    for tick in range(seconds * 100):
        chunk = b"".join(b"%d\n" % (number + i) for i in range(1000))
        number += 1000
        output.feed(chunk, tick / 100)
    assert len(lines) * LINE_COST < BURST + seconds * RATE * 1.1
    assert any("were dropped" in line for line in lines)
    kept = [int(line) for line in lines if line.isdecimal()]
    assert kept == sorted(kept), "in their order"
    output.end()
    assert lines[-LAST_LINES:] == [str(number - LAST_LINES + i) for i in range(LAST_LINES)], "its last words"


def test_a_flood_without_line_ends_is_thinned_too() -> None:
    lines: list[str] = []
    output = OutputLines(lines.append)
    for tick in range(1000):
        output.feed(b"x" * 65536, tick / 100)
    assert sum(map(len, lines)) < BURST + 10 * RATE * 1.5
    output.end()
    assert lines[-1].endswith("x" * 1000)


def test_a_flood_that_ends_costs_no_later_line() -> None:
    lines: list[str] = []
    output = OutputLines(lines.append)
    output.feed(b"\n" * 65536, 0.0)
    output.feed(b"calm again\n", 60.0)
    assert lines[-1] == "calm again"
    assert sum("were dropped" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("form", "journal", "begins"),
    [("text", True, "<4>engine-0: hot"), ("json", True, '<4>{"at"'), ("json", False, '{"at"'), ("text", False, "20")],
)
def test_the_journal_gets_every_lines_priority_in_both_formats(
    form: str, journal: bool, begins: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target = tmp_path_factory.mktemp("log") / "out"
    with target.open("wb") as file:
        sink = Sink(file.fileno())
        book = LogBook(10, "info", renderer(form, journal), sink)
        book.write_output("engine-0", "<4>hot")
        sink.close()
    assert target.read_text().startswith(begins)


def test_a_message_of_several_lines_keeps_worker_and_level_on_each() -> None:
    book = LogBook(10, "info", text_line, None)
    book.own("error", "first\nsecond\x1b[2J")
    assert [(line.worker, line.level, line.message) for line in book.last(10)] == [
        ("lightllmd", "error", "first"),
        ("lightllmd", "error", r"second\x1b[2J"),
    ]


def test_rings_follow_a_new_length() -> None:
    book = LogBook(10, "info", text_line, None)
    for number in range(10):
        book.own("info", str(number))
    book.configure(3, "info", text_line)
    assert [line.message for line in book.last(10)] == ["7", "8", "9"]
    for number in range(10):
        book.own("info", str(number))
    assert len(book.last(10)) == 3


def test_a_message_of_our_own_is_bounded_and_keeps_its_end() -> None:
    book = LogBook(10, "info", text_line, None)
    EventBook(book).add("job", f"job 1: swap {'m' * 900_000} failed: no such file")
    (line,) = book.last(1)
    assert len(line.message) <= LONGEST
    assert line.message.startswith("job 1: swap mmm")
    assert line.message.endswith("failed: no such file")
