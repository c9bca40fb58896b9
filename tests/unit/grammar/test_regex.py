"""Patterns mean what they mean to Python's `re`, or are refused."""

from __future__ import annotations

import random
import re

import pytest

from lightllmd.grammar.ebnf.expressions import matches
from lightllmd.grammar.ebnf.regex import _KNOWN, _NO_DIGITS, RegexInvalid, searched, whole

PATTERNS = (
    *(
        "^a+b$",
        "a+b",
        "^a",
        "a$",
        "^a|b$",
        "^(a|b)$",
        "(^a|b$)",
        "^[^a]$",
        r"^\d{3}-\w+\s$",
        "^.$",
        "^[A-Z][a-z]{1,3}$",
    ),
    *(
        r"\.",
        r"^[\w.+-]+@[\w-]+\.[a-z]{2,}$",
        "^(?:ab){2,3}?$",
        r"^\u0041\x42\/$",
        r"^[\d-]+$",
        r"^[^\d\s]+$",
        "",
        "^$",
    ),
    *(r"^\S+\D\W$", "^{a}$", "^a{2}$", "a|", "^[a\\]b-]$", r"^\{x\}$", r"\Aab\Z", "^(a*)*$", "^(a|)+b$", "x-"),
)
CHARACTERS = 'ab0-1A Z_.@\t"\\é٣xyX{}/]😀c\u2028'
REFUSED = (
    *(
        "(?=a)",
        "(?!a)",
        "(?<=a)",
        "(?<!a)",
        "(a)\\1",
        "\\bx",
        "(?i)a",
        "(?i:a)",
        "a++",
        "a**",
        "*",
        "(",
        "a)",
        "[",
        "[]",
    ),
    *("[b-a]", "a{3,2}", "\\", "\\p{L}", "x^y", "a{1,99999}", "\\q", "(?>a)", "a{,3}", "((a{1000}){1000})", "\\ud800"),
    *("^*", "(" * 60 + ")" * 60, "a" * 5000, "\\00", "(?P<1>a)", "[\\w-a-\\d"),
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_matches_is_what_python_finds(pattern: str) -> None:
    draw = random.Random(pattern)
    found, exact = searched(pattern), whole(pattern)
    texts = ["".join(draw.choices(CHARACTERS, k=draw.randrange(7))) for _ in range(150)]
    for text in [*texts, "123-a ", "ab", "aab", "Abc", "a@b.cd", "abab", "AB/", "{x}", "a]"]:
        if matches(found, text):
            assert re.search(pattern, text), text
        elif text.isascii():
            assert not re.search(pattern, text), text
        assert not matches(exact, text) or re.fullmatch(pattern, text), text


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:12])
def test_what_a_grammar_can_not_say_is_refused(pattern: str) -> None:
    with pytest.raises(RegexInvalid):
        searched(pattern)


def test_no_digit_of_any_script_is_a_character_that_is_no_digit() -> None:
    assert not any(re.match(r"\d", chr(code)) for low, high in _NO_DIGITS.ranges for code in range(low, high + 1))


def test_what_client_libraries_write_with_look_ahead_has_an_equal_without() -> None:
    draw = random.Random(1)
    for pattern, equal in _KNOWN.items():
        found = searched(pattern)
        texts = ["".join(draw.choices("ab.'@-+1", k=draw.randrange(9))) + "a@b.co" for _ in range(300)]
        for text in [*texts, "a@b.co", "a'@b.co", "a..b@c.de", ".a@b.co", "a.b'c@d.ef"]:
            assert matches(found, text) == bool(re.search(pattern, text)) == bool(re.search(equal, text)), text
