"""The key locator agrees with the parser on which keys there are, and knows their lines."""

from __future__ import annotations

from typing import Any

import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllmd.config.toml_lines import Path, key_lines

DOCUMENT = '''\
# a comment = 1
plain = 1 # plain = 2
"quoted.key" = "x # [not.a.table]"
dotted.'literal key'."f" = [1, # one
  2,
  "]",
 {z = 1, "q" = [1,
2]},
]
text = """a
b \\" # [t]
c"""""
raw = \'\'\'
x = 1
\'\'\'
when = 1979-05-27 07:32:00
[table] # hi
inline = {y = 1, z.w = 'a}#'}
  [ u . v ]
k=1
[[several]]
n = 1
[[several]]
n = 2
[several.sub]
m = 1
'''


def test_lines_of_every_kind_of_key() -> None:
    lines = key_lines(DOCUMENT)
    expected: dict[Path, int] = {
        ("plain",): 2,
        ("quoted.key",): 3,
        ("dotted", "literal key", "f"): 4,
        ("dotted", "literal key", "f", 1): 5,
        ("dotted", "literal key", "f", 2): 6,
        ("dotted", "literal key", "f", 3, "q", 1): 8,
        ("text",): 10,
        ("raw",): 13,
        ("when",): 16,
        ("table",): 17,
        ("table", "inline", "z", "w"): 18,
        ("u", "v"): 19,
        ("u", "v", "k"): 20,
        ("several", 0, "n"): 22,
        ("several", 1, "n"): 24,
        ("several", 1, "sub", "m"): 26,
    }
    assert {path: lines[path] for path in expected} == expected
    assert set(lines) == paths(tomli.loads(DOCUMENT))


def test_windows_line_ends_count_once() -> None:
    assert key_lines("a = 1\r\n\r\nb = '''x\r\ny'''\r\nc = 1\r\n") == {("a",): 1, ("b",): 3, ("c",): 5}


def paths(value: Any, here: Path = ()) -> set[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: set[Path] = {here} if here else set()
    for key, inner in items:
        found |= paths(inner, (*here, key))
    return found


KEYS = st.one_of(
    st.text("abcXYZ019_-", min_size=1, max_size=6),
    st.text(st.sampled_from("ab .#=[]{}\"'\\é\n"), max_size=6),
)
SCALARS = st.one_of(
    st.integers(-99, 99), st.booleans(), st.text(st.sampled_from("ab#=[]{},\"'\\é\n "), max_size=8), st.floats(-9, 9)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=6,
)


def basic(text: str) -> str:
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n"}
    return '"' + "".join(escapes.get(letter, letter) for letter in text) + '"'


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return basic(value)
    if isinstance(value, list):
        return "[" + "".join(f" {toml(one)}, # ]\n" for one in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{basic(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    return str(value)


@settings(deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.dictionaries(KEYS, VALUES, max_size=3))
def test_the_locator_finds_the_parsers_keys(top: dict[str, Any], table: dict[str, Any]) -> None:
    text, expected = "", {}
    for key, value in top.items():
        expected[(key,)] = text.count("\n") + 1
        text += f"{basic(key)} = {toml(value)} # end\n\n"
    if "the table" not in top:
        expected[("the table",)] = text.count("\n") + 1
        text += '["the table"]\n'
        for key, value in table.items():
            expected[("the table", key)] = text.count("\n") + 1
            text += f"{basic(key)} = {toml(value)}\n"
    lines = key_lines(text)
    assert set(lines) == paths(tomli.loads(text))
    assert {path: lines[path] for path in expected} == expected
