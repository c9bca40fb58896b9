"""Texts that tokenizers get wrong, and the strategies that make more of them."""

from __future__ import annotations

from hypothesis import strategies as st

SAMPLES = [
    "",
    " ",
    "Hello, world!",
    "  two leading spaces\n\ttab\n\n",
    "naïve café 你好世界 🙂🚀 👩‍👩‍👧‍👦",
    "12345 + 67 = 12412, 3.14159, ½ ² ٣",
    "def f(x):\n    return x**2  # comment\n\n\n\tend",
    "a  b   c    d",
    " x",
    "▁literal mark▁",
    "I'm you're we'll DON'T 's",
    "\x00\x01\x7f\u200b\ufeff\u2028",
    "trailing   ",
    "\r\n\r\n mixed \n\r",
    "the " * 50,
]

TEXTS = st.one_of(
    st.text(max_size=40),
    st.text("ab 1'\n\t▁é你🙂", max_size=40),
    st.lists(st.sampled_from(["the", " ", "  ", "\n", "12", "'s", "é", "🙂", "word", ".", "<", ">"]), max_size=20).map(
        "".join
    ),
)
