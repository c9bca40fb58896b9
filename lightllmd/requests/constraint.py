"""What the output of a request has to be, said without any dialect."""

from __future__ import annotations

from dataclasses import dataclass

from lightllmd.ipc.messages import Grammar, GrammarKind


@dataclass(frozen=True)
class Constraint:
    """The text of every generated sequence keeps to it.

    ``kind``: ``json_object`` any JSON object, `text` is empty; ``json_schema`` JSON that is valid under a schema;
    ``regex`` a whole match of a pattern; ``ebnf`` a grammar in GBNF, whose rule ``root`` is meant, or in Lark's
    language, whose ``start`` is; ``choice`` one of some texts; ``structural_tag`` xgrammar's description of text
    with constrained parts.
    """

    kind: GrammarKind
    text: str  # the JSON of a schema, of the list of choices, of a structural tag; else the pattern or grammar
    field: str  # the dialect's name, for refusals
    whitespace: str | None = None  # a pattern of what stands between tokens of JSON; None: at most a space

    @property
    def grammar(self) -> Grammar:
        """Not checked and not translated yet."""
        return Grammar(self.kind, self.text, self.whitespace)
