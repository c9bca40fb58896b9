"""Processes that do what a client could make slow, huge or endless."""
