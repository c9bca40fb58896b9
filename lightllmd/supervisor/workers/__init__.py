"""What the children do: api workers, engines and their revisions, the spare engine, the health probe."""
