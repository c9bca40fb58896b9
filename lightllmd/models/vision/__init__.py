"""Vision towers and their connectors, in torch: what makes image embeddings of prepared images."""
