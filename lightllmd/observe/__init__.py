"""Metrics, statistics lines and logging."""
