"""The settings: one declaration, precise loading, pure resolution."""
