"""vLLM's routes for models that score."""
