"""The APIs that clients speak: each translates its bodies into jobs, and what becomes of those into its answers."""
