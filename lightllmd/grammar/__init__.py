"""Grammars that a generation keeps to: checked and compiled by xgrammar, and the masks of what may come next."""
