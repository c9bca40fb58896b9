"""Plain data between processes and the two kinds of channel that carry it."""
