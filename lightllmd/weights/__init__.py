"""Checkpoint formats. ``headers`` and ``probe`` import no torch; the loaders do."""
