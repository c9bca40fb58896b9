"""Python code that a checkpoint brings along: which it names, and how it is run, in processes of its own. No torch."""
