"""LightLLM's own API."""
