"""Which features of generation go together: the one declaration. The rules enforce it, the documentation prints it.

Features that no pair names go together, each meaning beside the other what it means alone.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightllmd.config.parameters import Params


@dataclass(frozen=True)
class Feature:
    """A parameter that changes how or what is generated, and is off by default."""

    key: str
    on: Any = True  # one value that turns it on
    switched_on: str = ""  # how to write that it is on, where the key doesn't say it

    @property
    def name(self) -> str:
        """As the table shows it."""
        return self.switched_on or self.key

    def is_on(self, params: Params) -> bool:
        """Whether these parameters turn it on."""
        return bool(getattr(params, self.key))


@dataclass(frozen=True)
class Pair:
    """`reason`: why the two exclude each other. `note`: what they mean together, where that is no matter of course."""

    first: str
    second: str
    reason: str = ""
    note: str = ""


FEATURES: tuple[Feature, ...] = (
    Feature("use_dynamic_prompt_cache"),
    Feature("splitfuse_mode"),
    Feature("beam_mode"),
    Feature("diverse_mode"),
    Feature("token_healing_mode"),
    Feature("return_all_prompt_logprobs"),
    Feature("long_truncation_mode", on="head"),
    Feature("router_token_ratio", on=0.5, switched_on="router_token_ratio > 0"),
    Feature("mode", on=["triton_int8kv", "triton_w8a16"]),
)

PAIRS: tuple[Pair, ...] = (
    Pair("beam_mode", "diverse_mode", reason="each says what best_of > 1 means"),
    Pair(
        "beam_mode", "token_healing_mode", reason="which tokens heal a prompt depends on one sequence, not on n beams"
    ),
    Pair(
        "beam_mode",
        "router_token_ratio",
        note="the beams of a request are paused together, and their search begins anew",
    ),
    Pair(
        "use_dynamic_prompt_cache",
        "return_all_prompt_logprobs",
        note="requests fill the cache and don't read it, since log-probabilities take the whole prompt",
    ),
    Pair(
        "token_healing_mode",
        "return_all_prompt_logprobs",
        note="the log-probabilities are of the prompt without the tokens that were taken back",
    ),
    Pair(
        "token_healing_mode",
        "long_truncation_mode",
        note="a prompt is cut first, then healed at its end",
    ),
)


def pair(first: str, second: str) -> Pair:
    """What is declared of these two keys, in whichever order."""
    declared = (one for one in PAIRS if {one.first, one.second} == {first, second})
    return next(declared, Pair(first, second))


def pairs() -> Iterator[tuple[Feature, Feature, Pair]]:
    """Every two features, once."""
    for first, second in itertools.combinations(FEATURES, 2):
        yield first, second, pair(first.key, second.key)


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """Of two features that meet; `remark`: the number of what is to be said of them, 0: nothing."""

    works: bool
    remark: int = 0


@dataclass(frozen=True)
class Table:
    """A row for each feature: its letter, its name, and a cell for each feature before it."""

    rows: list[tuple[str, str, list[Cell]]]
    remarks: list[str]  # numbered from 1


def table() -> Table:
    """What goes with what, read out of FEATURES and their pairs."""
    rows: list[tuple[str, str, list[Cell]]] = []
    remarks: list[str] = []
    for letter, here in zip(string.ascii_uppercase, FEATURES, strict=False):
        cells = []
        for before in FEATURES[: len(rows)]:
            declared = pair(before.key, here.key)
            if said := declared.reason or declared.note:
                remarks.append(f"{before.name} with {here.name}: {said}.")
            cells.append(Cell(not declared.reason, len(remarks) if said else 0))
        rows.append((letter, here.name, cells))
    return Table(rows, remarks)
