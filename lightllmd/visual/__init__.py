"""The visual worker: fetches, decodes and encodes the images of requests, and keeps their embeddings."""
