"""Every format's parser: what it finds, and that it plays no part how the output was cut, whatever the output is."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable

import pytest

from dialogue_outputs import CALLS, FIRST, SECOND, TEXTS, TOOLS, broken, outputs
from lightllmd.dialogue.events import CallArguments, CallBegun, CallEnded, Content, Event, Reasoning, merged
from lightllmd.dialogue.parser import MAX_HELD, Parser
from lightllmd.dialogue.registry import FORMATS, Opening

THINK = ("<think>", "</think>")
FEW = 200  # broken outputs of each format


def opened(name: str, *, inside: bool = False) -> Parser:
    return FORMATS[name].parser(Opening(TOOLS, THINK, inside))


def read(parser: Parser, pieces: Iterable[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return merged(events + parser.end())


def told(events: list[Event]) -> list[tuple[object, ...]]:
    """Without the ids, which are drawn."""
    return [
        (type(event).__name__, *((event.index, event.name) if isinstance(event, CallBegun) else ()))
        + ((event.text,) if isinstance(event, Content | Reasoning | CallArguments) else ())
        for event in events
    ]


def said(events: list[Event], kind: type[Content] | type[Reasoning]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def calls(events: list[Event]) -> list[tuple[str, str]]:
    names = [event.name for event in events if isinstance(event, CallBegun)]
    texts = ["" for _ in names]
    for event in events:
        if isinstance(event, CallArguments):
            texts[event.index] += event.text
    return list(zip(names, texts, strict=True))


def cut(text: str, rng: random.Random, most: int) -> list[str]:
    pieces = []
    while text:
        size = rng.randint(1, most)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize("name", FORMATS)
def test_the_calls_of_each_format_are_found(name):
    for text in CALLS[name]:
        for before in ("", "<think>\nHm, <a> b.\n</think>\n\n") if name != "harmony" else ("",):
            parser = opened(name)
            events = read(parser, [before + text])
            found = calls(events)
            assert [one for one, _ in found] == ["get_weather", "now"], text
            assert [json.loads(arguments) for _, arguments in found] == [FIRST, SECOND], text
            bare = name in ("llama3_json", "pythonic")
            assert said(events, Content) == ("" if bare else "I look."), text
            thought = "We need <b>both</b>." if name == "harmony" else "Hm, <a> b." if before else ""
            assert said(events, Reasoning) == thought
            ids = [event.id for event in events if isinstance(event, CallBegun)]
            assert len({*ids}) == 2
            assert sum(isinstance(event, CallEnded) for event in events) == 2


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_without_calls_is_content(name):
    for text in TEXTS:
        assert said(read(opened(name), [text]), Content) == text
        assert not calls(read(opened(name), [text]))


@pytest.mark.parametrize("name", FORMATS)
def test_an_output_that_begins_within_reasoning(name):
    if name == "harmony":
        pytest.skip("its prompt never ends so")
    for text in CALLS[name]:
        events = read(opened(name, inside=True), [f"\nHm, <a> b.\n</think>\n\n{text}"])
        assert said(events, Reasoning) == "Hm, <a> b."
        assert [json.loads(arguments) for _, arguments in calls(events)] == [FIRST, SECOND]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_how_an_output_was_cut_plays_no_part(name, inside):
    """Whole, character by character and in random pieces; recorded outputs and `FEW` broken ones."""
    rng = random.Random(name)
    texts = [*outputs(name, THINK), *broken(name, THINK, FEW // 2, seed=int(inside))]
    for text in texts:
        whole = told(read(opened(name, inside=inside), [text]))
        for pieces in (list(text), cut(text, rng, 3), cut(text, rng, 9), cut(text, rng, 60)):
            assert told(read(opened(name, inside=inside), pieces)) == whole, text


@pytest.mark.parametrize("name", FORMATS)
def test_events_of_broken_outputs_are_in_order(name):
    """A call begins once, its arguments come before its end, and the next begins behind it; no piece is empty."""
    for text in broken(name, THINK, FEW, seed=7):
        open_call, begun = None, 0
        for event in read(opened(name), cut(text, random.Random(text), 5)):
            if isinstance(event, CallBegun):
                assert (open_call, event.index) == (None, begun)
                assert event.name
                open_call, begun = event.index, begun + 1
            elif isinstance(event, CallEnded):
                assert event.index == open_call
                open_call = None
            elif isinstance(event, CallArguments):
                assert event.index == open_call
                assert event.text
            else:
                assert open_call is None
                assert event.text
        assert open_call is None


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_parser_holds_back_is_bounded(name):
    """However long a name, key, value or run of spaces is, and whatever mark stands before it."""
    marks = sorted(FORMATS[name].marks) or ["["]
    for head in (*marks, "".join(marks), '{"name": "', '[{"parameters": "', "<tool_call>{", "["):
        for filler in ("x", " ", '"', "[", "\\", "{", "\n"):
            parser, given, got = opened(name), 0, 0
            for piece in (head, *([filler * 1000] * 40)):
                given += len(piece)
                got += sum(len(getattr(event, "text", "")) for event in parser.feed(piece))
                before = given - len(piece)
                assert filler.isspace() or "think" in head or given - got <= 3 * MAX_HELD, (head, filler, before)
            parser.end()


def test_time_is_linear_in_the_text():
    """Pieces of one character, in states that hold text back: ten times the text takes no hundred times as long."""
    for name in ("hermes", "glm45", "pythonic", "harmony"):
        for head in ('<tool_call>{"arguments": "', "<tool_call>now\n<arg_key>x</arg_key><arg_value>", "[now(a='", "<|"):
            spent = []
            for size in (500, 5_000):
                parser = opened(name)
                parser.feed(head)
                begin = time.process_time()
                for _ in range(size):
                    parser.feed("a")
                spent.append(time.process_time() - begin)
            assert spent[1] < 40 * spent[0] + 0.02, (name, head, spent)
