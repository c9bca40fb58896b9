"""The verbs of lightllmctl."""
