"""Causal language models of transformers behind our runners: its modules compute, our attention keeps the KV cache."""
