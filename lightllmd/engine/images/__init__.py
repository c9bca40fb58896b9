"""Images of prompts: their embeddings, asked of the visual worker, and the requests that wait for them. No torch."""
