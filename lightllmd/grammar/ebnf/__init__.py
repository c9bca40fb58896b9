"""From what a constraint says (a JSON schema, a regular expression, a list of choices) to EBNF as xgrammar reads it."""
