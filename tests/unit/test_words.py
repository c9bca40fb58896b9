"""The product speaks of its data in the field's words: none of these stands in code, names, comments or messages."""

from __future__ import annotations

import re

from rooms import modules

# Words for persons, and private coinages that have a standard term, with their forms.
BANNED = frozenset(
    word
    for forms in (
        "accuse accused accuses acquit acquits acquitted",
        "autopsies autopsy",
        "bequeath bequeathed bequeaths",
        "brief",
        "buried buries bury",
        "climb climbed climbs",
        "convict convicted convicts",
        "deed deeds",
        "errand errands",
        "fell felled",
        "forgave forgive forgiven forgives",
        "greet greeted greets",
        "heir heirs",
        "hopeless",
        "ladder ladders",
        "neighbour neighbours",
        "everybody nobody somebody whoever whom",
        "obey obeyed obeys",
        "rouse roused rouses",
        "seat seats",
        "shelf shelves",
        "stranger strangers",
        "twin twins",
    )
    for word in forms.split()
)

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # parts of snake_case and CamelCase, too


def test_the_product_uses_the_terms_of_the_field() -> None:
    found = [
        f"{module.path}:{number} {word}"
        for module in modules()
        for number, line in enumerate(module.text.splitlines(), 1)
        for word in _WORDS.findall(line)
        if word.lower() in BANNED
    ]
    assert found == []
