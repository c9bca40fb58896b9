"""Features of generation: what is declared of a pair is what a configuration gets and what the documentation says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lightllmd.config import reference
from lightllmd.config.features import FEATURES, PAIRS, Feature, Pair, pairs, table
from lightllmd.config.load import load
from lightllmd.config.parameters import Config, Params
from lightllmd.config.setting import by_key
from lightllmd.errors import ConfigInvalid, Problem

ROOT = Path(__file__).parents[3]


def problems_of(flags: Mapping[str, Any]) -> list[Problem]:
    try:
        load(None, {"model_dir": "m", **flags})
    except ConfigInvalid as invalid:
        return invalid.problems
    return []


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.key)
def test_a_feature_is_off_by_default_and_works_alone(feature: Feature) -> None:
    assert not feature.is_on(Params())
    assert feature.is_on(Params(**{feature.key: feature.on}))
    assert problems_of({feature.key: feature.on}) == []


@pytest.mark.parametrize(
    ("first", "second", "declared"), [pytest.param(*one, id=f"{one[0].key}-{one[1].key}") for one in pairs()]
)
def test_a_pair_is_accepted_or_refused_as_declared(first: Feature, second: Feature, declared: Pair) -> None:
    found = problems_of({first.key: first.on, second.key: second.on})
    if not declared.reason:
        assert found == []
        return
    (one,) = found
    assert one.key in (first.key, second.key)
    assert one.message == f"{first.name} and {second.name} exclude each other: {declared.reason}"
    # Whoever reads about one of the two is told of the other.
    for here, other in ((first, second), (second, first)):
        assert re.search(rf"Not with [^.]*\b{other.key}\b", by_key(Config)[here.key].setting.doc), here.key


def test_all_features_but_the_refused_ones_go_together() -> None:
    flags = {feature.key: feature.on for feature in FEATURES if feature.key != "beam_mode"}
    assert problems_of(flags) == []


def test_every_declared_pair_is_of_two_features_and_says_one_thing() -> None:
    keys = {feature.key for feature in FEATURES}
    for one in PAIRS:
        assert {one.first, one.second} <= keys
        assert one.first != one.second
        assert bool(one.reason) != bool(one.note)
    assert len({frozenset((one.first, one.second)) for one in PAIRS}) == len(PAIRS)


def test_the_table_has_every_pair_once() -> None:
    made = table()
    assert [len(cells) for _, _, cells in made.rows] == list(range(len(FEATURES)))
    remarks = sorted(cell.remark for _, _, cells in made.rows for cell in cells if cell.remark)
    assert remarks == list(range(1, len(PAIRS) + 1))
    refused = sum(not cell.works for _, _, cells in made.rows for cell in cells)
    assert refused == sum(bool(one.reason) for one in PAIRS)


def test_the_table_in_the_readme_is_what_is_generated() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = readme.partition("<!-- feature table -->\n")
    written, _, _ = rest.partition("<!-- end -->")
    assert written == reference.feature_table(), "run: lightllmd --feature-table"
