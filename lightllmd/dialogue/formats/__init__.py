"""The formats in which models write calls of tools and their reasoning: a parser and a grammar of each."""
